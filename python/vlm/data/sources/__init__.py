"""Sources: where samples come from. `uri.open_source` opens any of them from one address.

Each kind has a source (the index: how many, which ids, which keys) and a reader (one sample from a recipe).
"""
