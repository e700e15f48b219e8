"""What is trained, at which rate, and through which added parts."""

from __future__ import annotations

from pydantic import Field

from vlm.config.options import Options
from vlm.tuning.freeze import RatePattern, trainable
from vlm.tuning.lora import (
    LoraOptions,
    adapters_off,
    add_lora,
    has_adapters,
    load_merged,
    lora_files,
    merged_state,
    plain_name,
)
from vlm.tuning.prompt import PromptOptions, with_prompt


class TuningOptions(Options):
    """Patterns are shell patterns over parameter names (`vision.*`, `*.norm?.*`)."""

    train: tuple[str, ...] = Field(("*",), description="parameters that are trained")
    freeze: tuple[str, ...] = Field((), description="parameters taken out of `train` again")
    rates: tuple[RatePattern, ...] = Field((), description="learning-rate factors by pattern, the last match counts")
    lora: LoraOptions | None = Field(None, description="low-rank adapters; all other weights of their modules are frozen")
    prompt: PromptOptions | None = Field(None, description="a learned prompt at the text input; all other weights are frozen")


__all__ = [
    "LoraOptions",
    "PromptOptions",
    "RatePattern",
    "TuningOptions",
    "adapters_off",
    "add_lora",
    "has_adapters",
    "load_merged",
    "lora_files",
    "merged_state",
    "plain_name",
    "trainable",
    "with_prompt",
]
