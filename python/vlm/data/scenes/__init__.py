"""Drawn scenes: coloured shapes with attributes, relations, boxes, captions and questions.

Infinite, seeded by the index of the scene, nothing to download. `layout` decides what is in a scene, `draw` paints
it, `language` writes about it, `reader` joins the three, `source` gives it an address.
"""
