"""Which visual tokens there are and which of them are kept."""
