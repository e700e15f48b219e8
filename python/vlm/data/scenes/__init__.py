"""Drawn scenes: coloured shapes with attributes, relations, boxes, captions and questions.

Infinite, seeded by the index of the scene, nothing to download. `layout` decides what is in a scene, `draw` paints
it, `language` writes about it, `reader` joins the three, `source` gives it an address. `digits` and `digits_source` do the
same for rows of digits, whose pictures are wider than high; `clips` and `clips_source` for shapes that move. `drawn` is
what their addresses share.
"""
