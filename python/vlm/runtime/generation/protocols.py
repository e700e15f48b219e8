"""What writes: prompts, steppers that turn them into logits, generators that own both.

n rows, V vocabulary, S side of the model's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

import numpy as np

from vlm.runtime.embedder import Picture
from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits

if TYPE_CHECKING:
    from vlm.runtime.chat import Message, Template


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a model reads before it writes.

    ids: token ids, one placeholder a row of pictures; pictures: picture stream -> rows [3, S, S], in order.
    places: (picture, tile row, tile column) of each row where pictures were cut into tiles, the thumbnail at (-1, -1);
    empty: each row is a picture. tags: the indices of ids that announce the tile of the next placeholder.
    """

    ids: Sequence[int]
    pictures: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    places: Sequence[tuple[int, int, int]] = ()
    tags: frozenset[int] = frozenset()


@runtime_checkable
class Stepper(Protocol):
    """Rows of prompts, advanced token by token. A row's logits must not depend on the rows beside it."""

    vocab_size: int

    def start(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Logits float32 [n, V] of the token after each prompt. Called once."""
        ...

    def advance(self, ids: np.ndarray) -> np.ndarray:
        """One token int64 [n] for each row; logits float32 [n, V] of the token after it."""
        ...

    def reorder(self, index: np.ndarray) -> None:
        """The rows become rows `index` int64 [m]: kept, repeated or dropped."""
        ...

    def join(self, other: Self) -> None:
        """The rows of another stepper of the same generator come behind its own; the other is used no more. Both have
        started; they may have read prompts of any lengths and advanced unequally often."""
        ...


@runtime_checkable
class Generator(Protocol):
    """A model that answers: a bundle here, a torch model in `vlm.evaluation`, used alike.

    length: positions of prompt and answer together; eos_ids: tokens that end an answer.
    """

    name: str
    template: Template
    length: int
    eos_ids: frozenset[int]

    def prepare_image(self, picture: Picture, limits: PictureLimits = DEFAULT_LIMITS) -> Mapping[str, np.ndarray]:
        """Picture stream -> [3, S, S]; of a model that reads tiles, a `vlm.runtime.tiled.TiledPicture`, whose arrays are
        [k, 3, S, S]. A bundle gives normalised float32. Raises BadPicture."""
        ...

    def prompt(self, messages: Sequence[Message], pictures: Sequence[Mapping[str, np.ndarray]]) -> Prompt:
        """The prompt of a conversation and its prepared pictures, in order."""
        ...

    def positions(self, prompt: Prompt) -> int:
        """Positions of a prompt after its pictures are expanded."""
        ...

    def stepper(self) -> Stepper:
        """A stepper without rows."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text; special tokens have none."""
        ...
