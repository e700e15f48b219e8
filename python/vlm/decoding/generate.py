"""Text token by token: the options of greedy decoding, sampling and beam search. Source of contrast, calibrate: debias-lvlm."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlm.config.options import Options
from vlm.runtime.generation.calibration import Calibration, Mode, Scope
from vlm.runtime.generation.settings import Contrast, Decoding, NegativeKind, Strategy


class ContrastOptions(Options):
    """Logits against those of the same prompt without its picture, (1 + alpha) l - alpha l'."""

    negative: NegativeKind = Field(
        "none+unk",
        description="second prompt: pictures deleted (none), the unknown token in their places (unk), the mean of both, other pictures",
    )
    alpha: float = Field(1.0, allow_inf_nan=False, description="strength; 0 is off, g - 1 is guidance of scale g")
    beta: float = Field(0.1, ge=0, le=1, description="tokens below this share of the original's greatest probability are cut; 0 cuts none")

    def to_runtime(self) -> Contrast:
        return Contrast(self.negative, self.alpha, self.beta)


class CalibrateOptions(Options):
    """Answers of a closed set, corrected by the answers without the picture."""

    content_free: NegativeKind = Field("none+unk", description="what is read instead of the picture, as in contrast.negative")
    mode: Mode = Field("diagonal", description="divide by the probabilities without the picture, or subtract them (identity)")
    eps: float = Field(1e-4, gt=0, lt=1, description="added to each probability without the picture")
    scope: Scope = Field("question", description="a correction for each question, or their mean for all")

    def to_runtime(self) -> Calibration:
        return Calibration(self.content_free, self.mode, self.eps, self.scope)


class GenerateOptions(Options):
    """Answers token by token."""

    kind: Literal["generate"] = "generate"
    strategy: Strategy = Field("greedy", description="the likeliest token, a drawn one, or beam search")
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False, description="sample: logits are divided by it; 0 takes the likeliest token")
    top_k: int = Field(0, ge=0, description="sample: only the k likeliest tokens; 0 is off")
    top_p: float = Field(1.0, gt=0, le=1, description="sample: only the fewest tokens that reach this probability; 1 is off")
    min_p: float = Field(0.0, ge=0, le=1, description="sample: only tokens above this share of the greatest probability; 0 is off")
    repetition_penalty: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="positive logits of tokens that stand in prompt or answer are divided by it; 1 is off"
    )
    beams: int = Field(4, ge=1, description="beam: beginnings kept side by side")
    length_penalty: float = Field(1.0, allow_inf_nan=False, description="beam: the score is divided by length to this power")
    early_stopping: bool = Field(True, description="beam: stop with as many answers as beams, not when none can become better")
    max_new_tokens: int = Field(64, ge=1, description="longest answer in tokens")
    min_new_tokens: int = Field(0, ge=0, description="shortest answer in tokens")
    stop: tuple[str, ...] = Field((), description="texts that end an answer and are not part of it")
    seed: int = Field(0, description="sample: seed of the draws")
    contrast: ContrastOptions | None = Field(None, description="second branch against the bias of language")
    calibrate: CalibrateOptions | None = Field(None, description="correction of answers from a closed set")

    @model_validator(mode="after")
    def _possible(self) -> GenerateOptions:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        if not all(self.stop):
            raise ValueError("a stop text is empty")
        self.read_only_where(self.strategy == "sample", 'strategy = "sample"', "temperature", "top_k", "top_p", "min_p", "seed")
        self.read_only_where(self.strategy == "beam", 'strategy = "beam"', "beams", "length_penalty", "early_stopping")
        return self

    def to_runtime(self) -> Decoding:
        """The plain settings for `vlm.runtime.generation`; `calibrate` has its own, `calibrate.to_runtime()`."""
        plain = self.model_dump(exclude={"kind", "contrast", "calibrate"})
        return Decoding(**plain, contrast=self.contrast.to_runtime() if self.contrast is not None else None)
