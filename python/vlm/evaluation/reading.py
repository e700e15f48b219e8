"""Samples for evaluation: any source, in its own order, each once, pictures decoded as everywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vlm.config.errors import DataError
from vlm.data.captions import AUTO_TEXT
from vlm.data.decode import AUTO_IMAGE
from vlm.data.samples import BadSample, field_at
from vlm.data.sources.base import Source
from vlm.data.sources.readers import open_reader
from vlm.data.sources.uri import open_source
from vlm.data.streams.messages import pictures_in
from vlm.evaluation.material import Item
from vlm.runtime.film import film_strip
from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits, decode_picture

if TYPE_CHECKING:
    from vlm.data.options import DataOptions

MAX_TEXT = 1_000_000


@dataclass(frozen=True)
class Reading:
    """How samples are read: the columns of picture and text (`auto`: the usual names), the caps of a picture, the most
    characters of a text, and which samples of `data.val` are kept (all, where nothing is said)."""

    image: str = "auto"
    text: str = "auto"
    limits: PictureLimits = DEFAULT_LIMITS
    max_text: int = MAX_TEXT
    where: Mapping[str, str | Sequence[str]] = field(default_factory=dict)

    @property
    def of_all(self) -> Reading:
        """The same without a choice of samples, for other data than `data.val`."""
        return replace(self, where={})

    @classmethod
    def of(cls, data: DataOptions) -> Reading:
        """As a `[data]` table says."""
        return cls(data.columns.image, data.columns.text, data.limits, data.max_text, data.where)

    @classmethod
    def of_table(cls, table: Mapping[str, Any]) -> Reading:
        """As the `[data]` table of a run's preset says, of which nothing else is looked at."""
        from vlm.data.options import DataOptions

        columns = {name: table["columns"][name] for name in ("image", "text") if name in table.get("columns", {})}
        caps = {name: table[name] for name in ("max_pixels", "max_bytes", "max_text", "where") if name in table}
        return cls.of(DataOptions.model_validate({"columns": columns, **caps}))


class EvaluationData:
    """A source, opened once, whose samples are drawn for each task.

    Raises DataError when the address names nothing that can be read.
    """

    def __init__(self, uri: str, reading: Reading | None = None) -> None:
        self.uri = uri
        self.reading = reading or Reading()
        self.source: Source = open_source(uri, self.reading.limits)
        if self.reading.where:
            # It brings torch, which the evaluation of a bundle does without.
            from vlm.data.mixture import fitting

            self.source = fitting(self.source, self.reading.where, self.reading.limits)
        self._reader: Any = open_reader(self.source.spec(), self.reading.limits)

    def __len__(self) -> int:
        return len(self.source)

    def chosen(self, limit: int | None, seed: int) -> list[int]:
        """All samples, or a seeded draw of `limit`, in the order of the source."""
        count = len(self.source)
        if limit is None or limit >= count:
            return list(range(count))
        return sorted(np.random.default_rng([seed, 5]).choice(count, size=limit, replace=False).tolist())

    def items(self, limit: int | None = None, seed: int = 0) -> Iterator[Item]:
        """Each chosen sample once; one that cannot be read says its problem."""
        for index in self.chosen(limit, seed):
            key = self.source.key(index)
            try:
                fields = self._reader.read(self.source.recipe(index))
                texts = self._texts(fields)
            except DataError as error:
                yield Item(key, (), {}, index=index, problem=error.message)
                continue
            plain = {k: v for k, v in fields.items() if not isinstance(v, bytes | Image.Image)}
            value = self._value(fields)
            yield Item(key, texts, plain, None if value is None else partial(self._decode, value), index)

    def picture(self, index: int) -> Image.Image:
        """The decoded RGB picture of a sample. Raises DataError."""
        return self._decode(self._value(self._reader.read(self.source.recipe(index))))

    def _value(self, fields: dict[str, Any]) -> Any:
        wanted = self.reading.image
        for path in AUTO_IMAGE if wanted == "auto" else (wanted,):
            value = field_at(fields, path)
            if value is not None:
                return value
        return None

    def _decode(self, value: Any) -> Image.Image:
        if isinstance(value, Image.Image):
            return value
        if isinstance(value, list) and len(value) > 1:  # a clip, by its frames
            return film_strip([self._decode(one) for one in pictures_in(value)])
        if isinstance(value, str | list) and hasattr(self._reader, "picture"):
            value = self._reader.picture(value)
        if not isinstance(value, bytes):
            raise BadSample("missing_image", f"a {type(value).__name__}")
        return decode_picture(value, self.reading.limits)

    def _texts(self, fields: dict[str, Any]) -> tuple[str, ...]:
        """Every text of the text column; a list gives all its entries. Raises BadSample for one that is too long."""
        wanted = self.reading.text
        for path in AUTO_TEXT if wanted == "auto" else (wanted,):
            value = field_at(fields, path)
            texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
            found = tuple(t for t in texts if isinstance(t, str) and t.strip())
            if any(len(t) > self.reading.max_text for t in found):
                raise BadSample("text_too_long", f"more than {self.reading.max_text} characters")
            if found:
                return found
        return ()
