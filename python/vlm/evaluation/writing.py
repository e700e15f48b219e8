"""What the tasks of models that write share: options, arms, prompts and the call of the decoding loop.

n samples, q questions (or captions), one row each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator, model_validator

from vlm.config.errors import DataError
from vlm.evaluation.controlled import MAIN
from vlm.evaluation.material import clean
from vlm.evaluation.pictured import Pictured
from vlm.evaluation.shuffling import Control, derangement
from vlm.evaluation.task import Needs, Task

if TYPE_CHECKING:
    from vlm.runtime.generation import Decoding, Prompt

Integers = NDArray[np.int64]


class WritingTask(Task):
    """A task that reads what a model writes about pictures. Greedy decoding unless `decoding` says otherwise."""

    needs: ClassVar[Needs] = "generator"
    closed: ClassVar[bool] = False
    """Whether answers of a closed set are among those asked for."""
    controls: tuple[Control, ...] = Field(
        ("shuffled", "none"),
        description="the same model with a picture of another concept (shuffled) and without one (none)",
    )
    max_new_tokens: int = Field(32, ge=1, description="longest answer in tokens")
    decoding: dict[str, Any] = Field({}, description="settings of the decoding table; default: greedy")

    @field_validator("controls")
    @classmethod
    def _once(cls, value: tuple[Control, ...]) -> tuple[Control, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a control is named twice")
        return value

    @field_validator("decoding")
    @classmethod
    def _settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value:
            from vlm.decoding import GenerateOptions

            try:
                GenerateOptions.model_validate(value)
            except ValidationError as error:
                first = error.errors()[0]
                raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
            if value.get("calibrate") is not None and not cls.closed:
                raise ValueError("calibrate corrects answers of a closed set, which this task does not ask for; it goes with vqa")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> WritingTask:
        """Both places say the longest answer; what they say together must hold too."""
        if "max_new_tokens" in self.decoding and "max_new_tokens" in self.model_fields_set:
            raise ValueError("max_new_tokens and decoding.max_new_tokens are one setting; leave one out")
        if self.decoding:
            try:
                self.settings()
            except ValidationError as error:
                raise ValueError(f"decoding: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
        return self

    def settings(self) -> Decoding:
        """The decoding of every answer of this task."""
        from vlm.decoding import GenerateOptions

        given = {"max_new_tokens": self.max_new_tokens, **self.decoding}
        return GenerateOptions.model_validate(given).to_runtime()

    def run(self, samples: Pictured, batch: int) -> Any:
        """The result of this task. Raises DataError when the data cannot serve it."""
        raise TypeError(f"{type(self).__name__} defines no run")


@dataclass(frozen=True)
class Ask:
    """One question to one sample. sample: its number; text: the user's words."""

    sample: int
    text: str


def arms_of(samples: Pictured, controls: Sequence[Control], seed: int) -> tuple[dict[str, Integers | None], bool]:
    """(arm -> the sample whose picture each sample is shown [n], None for no picture; whether shuffling permutes).

    The model's own arm, '', comes first. Raises DataError when pictures cannot be shuffled.
    """
    arms: dict[str, Integers | None] = {MAIN: np.arange(len(samples))}
    permutes = True
    for control in controls:
        arms[control] = None
        if control == "shuffled":
            arms[control], permutes = derangement(samples.likenesses(), seed)
    return arms, permutes


def prompts_of(samples: Pictured, asks: Sequence[Ask], shown: Integers | None) -> list[Prompt]:
    """The prompt of each question, with the picture of sample shown[ask.sample] where the template puts it, or
    without one."""
    from vlm.runtime.chat import Message

    generator = samples.generator
    out = []
    for ask in asks:
        pictures = [] if shown is None else [samples.prepared(int(shown[ask.sample]))]
        messages = generator.template.with_pictures([Message("user", (ask.text,))], len(pictures))
        out.append(generator.prompt(messages, pictures))
    return out


def batches(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def written(
    samples: Pictured,
    asks: Sequence[Ask],
    arms: Mapping[str, Integers | None],
    decoding: Decoding,
    batch: int,
) -> dict[str, list[str]]:
    """arm -> the answer to each question, white space as `clean` leaves it.

    An answer hangs on the seed, the sample's key and its number, not on the batch. Raises RequestError when a prompt
    leaves no room for the answer.
    """
    from vlm.runtime.generation import generate

    out: dict[str, list[str]] = {}
    negatives = getattr(samples.generator, "negatives", None)
    keys = [f"{samples.keys[ask.sample]}\x1f{number}" for number, ask in enumerate(asks)]
    for arm, shown in arms.items():
        answers: list[str] = []
        for part in batches(len(asks), batch):
            prompts = prompts_of(samples, [asks[i] for i in part], shown)
            found = generate(
                samples.generator,
                prompts,
                decoding,
                keys=[keys[i] for i in part],
                negatives=negatives if decoding.contrast is not None else None,
            )
            answers += [clean(completion.text) for completion in found]
            samples.said(len(answers), f"{arm or 'own'} pictures: answers")
        out[arm] = answers
    return out


def texts_at(fields: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """The texts of the first of some fields that has any: a string, or a list of strings."""
    from vlm.data.samples import field_at

    for name in names:
        value = field_at(dict(fields), name)
        values = value if isinstance(value, list | tuple) else [value]
        found = tuple(text for v in values if isinstance(v, str) and (text := clean(v)))
        if found:
            return found
    return ()


def filled(template: str, text: str) -> str:
    """The template with the text in the place of its `{}`."""
    return template.replace("{}", text, 1)


def one_place(template: str) -> str:
    """The template. Raises ValueError unless it holds `{}` exactly once."""
    if template.count("{}") != 1:
        raise ValueError(f"{template!r} must hold {{}} exactly once")
    return template


def balanced(good: NDArray[np.bool_], count: int, seed: int) -> list[int]:
    """Up to `count` places, as many right as wrong ones where there are enough, in turns; the first of a seeded
    shuffle of each. So failures are seen even where they are rare."""
    order = np.random.default_rng([seed, 7]).permutation(len(good))
    sides = [order[~good[order]].tolist(), order[good[order]].tolist()]
    out: list[int] = []
    while len(out) < count and any(sides):
        side = sides[len(out) % 2] or sides[1 - len(out) % 2]
        out.append(side.pop(0))
    return out


def need(found: int, what: str, remedy: str) -> None:
    """Raises DataError when nothing was found."""
    if not found:
        raise DataError(f"the data holds {what}", remedy=remedy)
