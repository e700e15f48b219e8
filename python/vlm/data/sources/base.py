"""What every source says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from vlm.data.samples import Sample


class Source(Protocol):
    """A fixed, indexed set of samples.

    kind: what was detected, in words. ids: [n] int64 in 0..2^63, one for each sample, that depend on its name or
    content and never on its neighbours, so that removing a sample moves no other.
    """

    kind: str
    ids: np.ndarray

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """`shard:key` of a sample, for logs and errors."""
        ...

    def recipe(self, index: int) -> Any:
        """Where the sample lies: a JSON value that the reader of `spec()` understands."""
        ...

    def spec(self) -> dict[str, Any]:
        """What `open_reader` needs, as JSON."""
        ...

    def read(self, index: int) -> Sample:
        """The sample, pictures still encoded. Raises BadSample or BadPicture."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What was detected: kind, samples, files."""
        ...
