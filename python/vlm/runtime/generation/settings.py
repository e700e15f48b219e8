"""How an answer is written: the plain settings behind the `[decoding]` table. Source of the contrast: debias-lvlm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vlm.config.errors import RequestError

Strategy = Literal["greedy", "sample", "beam"]
NegativeKind = Literal["none", "unk", "none+unk", "mean-image", "noise-image"]
"""What the second branch reads: the prompt without its pictures (none), with the unknown token in their places (unk),
the mean of both logits, or with other pictures."""


@dataclass(frozen=True)
class Contrast:
    """Logits (1 + alpha) l - alpha l', l' those of the negative prompt; tokens with l < max l + log(beta) are cut.

    beta 0 cuts nothing. Guidance of scale g is alpha = g - 1 with beta 0. Raises RequestError.
    """

    negative: NegativeKind = "none+unk"
    alpha: float = 1.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        _one_of("contrast.negative", self.negative, get_args(NegativeKind))
        _check("contrast.alpha", self.alpha, math.isfinite(self.alpha), "a finite number")
        _check("contrast.beta", self.beta, 0 <= self.beta <= 1, "0 to 1")


@dataclass(frozen=True)
class Decoding:
    """Settings of one call. Raises RequestError for a value out of its range.

    temperature, top_k, top_p, min_p and seed belong to `sample` (temperature 0 takes the likeliest token); beams,
    length_penalty and early_stopping to `beam`. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 change nothing.
    allowed, forbidden: token ids; min_new_tokens: no end token before; stop: texts that end an answer and are not part of it.
    """

    strategy: Strategy = "greedy"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = True
    max_new_tokens: int = 64
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0
    allowed: tuple[int, ...] | None = None
    forbidden: tuple[int, ...] = ()
    contrast: Contrast | None = None

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, get_args(Strategy))
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1 (off)")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 (off) to 1")
        _check("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0")
        _check("beams", self.beams, self.beams >= 1, "1 or more")
        _check("length_penalty", self.length_penalty, math.isfinite(self.length_penalty), "a finite number")
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more")
        _check("min_new_tokens", self.min_new_tokens, 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens")
        _check("stop", self.stop, not isinstance(self.stop, str) and all(self.stop), "texts that are not empty")
        _check("allowed", self.allowed, self.allowed is None or len(self.allowed) > 0, "at least one token")


def _check(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise RequestError(f"{name} is {value!r}, expected {expected}", where=f"decoding.{name}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    _check(name, value, value in choices, "one of " + ", ".join(choices))
