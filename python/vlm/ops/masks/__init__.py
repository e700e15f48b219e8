"""Attention masks as programs: atoms that the native core turns into tiles to skip, and plain torch into booleans.

`allow` is true where a query may attend. Source: core-exact-attention, core-facet.
"""

from vlm.ops.masks.atom import Atom, Lowered, MaskShape, key_mask_of
from vlm.ops.masks.positions import (
    Alignment,
    BlockCausal,
    Causal,
    Lambda,
    Positional,
    Prefix,
    Spans,
    SymmetricWindow,
    Window,
)
from vlm.ops.masks.program import LoweredMask, MaskProgram
from vlm.ops.masks.tokens import BlockList, Dense, GlobalTokens, KeyPadding, Rows, Segments, TileTags

__all__ = [
    "Alignment",
    "Atom",
    "BlockCausal",
    "BlockList",
    "Causal",
    "Dense",
    "GlobalTokens",
    "KeyPadding",
    "Lambda",
    "Lowered",
    "LoweredMask",
    "MaskProgram",
    "MaskShape",
    "Positional",
    "Prefix",
    "Rows",
    "Segments",
    "Spans",
    "SymmetricWindow",
    "TileTags",
    "Window",
    "key_mask_of",
]
