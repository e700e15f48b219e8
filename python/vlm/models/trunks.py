"""The trunk that the options of a language model ask for."""

from __future__ import annotations

from vlm.attention import TrunkAttentionOptions
from vlm.layers import Trunk, TrunkOptions
from vlm.models.attending import AttendingTrunk
from vlm.models.recurrent import RecurrentTrunk


def trunk_of(options: TrunkOptions) -> Trunk:
    """Plain attention, attention under a mask or of an encoder, or a recurrent mixer."""
    if options.mixer is not None:
        return RecurrentTrunk(options)
    plain = not isinstance(options.attention, TrunkAttentionOptions) or options.attention.plain
    return Trunk(options) if plain and options.causal else AttendingTrunk(options)
