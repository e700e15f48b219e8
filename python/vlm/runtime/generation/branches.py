"""A prompt and its negative prompts, each with a stepper of its own, fed alike. Source: debias-lvlm; guidance is the same.

n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm.config.errors import RequestError, RunFailed
from vlm.runtime.generation.protocols import Prompt, Stepper
from vlm.runtime.generation.settings import NegativeKind

Pictures = Mapping[str, Sequence[np.ndarray]]


def without_pictures(prompt: Prompt, image_id: int) -> Prompt:
    """The prompt with its pictures, their placeholders and their tags deleted."""
    return Prompt(tuple(i for at, i in enumerate(prompt.ids) if i != image_id and at not in prompt.tags))


def with_unknown(prompt: Prompt, image_id: int, unknown_id: int) -> Prompt:
    """The prompt with its pictures deleted and each placeholder replaced by the unknown (or padding) token; tags stay."""
    return Prompt(tuple(unknown_id if i == image_id else i for i in prompt.ids))


@dataclass(frozen=True)
class Negatives:
    """How negative prompts are made.

    image_id: the placeholder; unknown_id: what `unk` puts in its place; pictures: the other pictures of a prompt
    (`mean-image`, `noise-image`), as many in each stream as it has.
    """

    image_id: int
    unknown_id: int | None = None
    pictures: Callable[[Prompt], Pictures] | None = None

    def of(self, prompt: Prompt, kind: NegativeKind) -> tuple[Prompt, ...]:
        """The negative prompts of one; their logits are averaged. Raises RequestError when what `kind` needs is not there."""
        where = "decoding.negative"
        if kind in ("mean-image", "noise-image"):
            if self.pictures is None:
                raise RequestError(f"{kind} needs other pictures", where=where, remedy="use none, unk or none+unk")
            others = self.pictures(prompt)
            if {k: len(v) for k, v in others.items()} != {k: len(v) for k, v in prompt.pictures.items()}:
                raise RequestError("the other pictures are not as many as the prompt's", where=where)
            return (replace(prompt, pictures=others),)
        made = []
        if kind in ("none", "none+unk"):
            made.append(without_pictures(prompt, self.image_id))
            if not made[0].ids:
                raise RequestError("nothing is left of a prompt without its pictures", where=where, remedy="ask a question in text")
        if kind in ("unk", "none+unk"):
            if self.unknown_id is None:
                raise RequestError(f"{kind} needs an unknown or padding token, the tokenizer has none", where=where, remedy="use none")
            made.append(with_unknown(prompt, self.image_id, self.unknown_id))
        return tuple(made)


def check_logits(logits: np.ndarray) -> None:
    """Raises RunFailed for logits [n, V] of which a row is not finite."""
    # Not a number spreads through max, so one pass finds it; -inf alone may be a mask of the model's own.
    if not np.isfinite(logits.max(axis=-1)).all():
        raise RunFailed("the model gave logits that are not finite", remedy="its weights are unusable: check the training loss")


class Branches:
    """Steppers side by side: the first on the prompts, the others on their negative prompts.

    Every branch has its own cache, is given the tokens that were chosen, and is reordered as the first.
    """

    def __init__(self, steppers: Sequence[Stepper]) -> None:
        self._steppers = tuple(steppers)
        self.vocab_size = self._steppers[0].vocab_size

    def start(self, prompts: Sequence[Sequence[Prompt]]) -> tuple[np.ndarray, np.ndarray | None]:
        """prompts: for each branch, n of them. Logits [n, V] of the prompts, and the mean of the negative ones' or None."""
        return self._joined([s.start(p) for s, p in zip(self._steppers, prompts, strict=True)], len(prompts[0]))

    def advance(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """One token int64 [n] for each row of every branch; logits as `start` gives them."""
        return self._joined([s.advance(ids) for s in self._steppers], len(ids))

    def reorder(self, index: np.ndarray) -> None:
        """Rows kept, repeated or dropped in every branch: int64 [m]."""
        for stepper in self._steppers:
            stepper.reorder(index)

    def _joined(self, logits: list[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray | None]:
        for part in logits:
            if part.shape != (rows, self.vocab_size):
                raise RunFailed(f"the model gave logits of shape {part.shape}, expected {(rows, self.vocab_size)}")
            check_logits(part)
        if len(logits) < 2:
            return logits[0], None
        negative = logits[1] if len(logits) == 2 else sum(logits[2:], logits[1]) / logits[1].dtype.type(len(logits) - 1)
        return logits[0], negative
