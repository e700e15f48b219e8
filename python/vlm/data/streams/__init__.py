"""Streams that `[data.streams.NAME]` makes: conversations from columns, pictures from other pictures."""
