"""Texts to ids for a bundle, over the `tokenizers` library: the same ids as in training.

n texts, T positions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from vlm.config.errors import CheckpointError, DataError

_MAX_FILE = 64 * 2**20


class BundleTokenizer:
    """length: positions of the text graph; fixed: whether every row must have exactly that many."""

    def __init__(self, directory: Path, *, length: int, fixed: bool) -> None:
        path = directory / "tokenizer.json"
        self._core = tokenizers_from(path)
        self._core.no_truncation()
        self._core.no_padding()
        self.length, self.fixed = length, fixed
        config = tokenizer_config(directory)
        self.padding_side: str = config.get("padding_side") or "right"
        self.pad_id = self._pad(config)

    def _pad(self, config: dict[str, Any]) -> int:
        for name in ("pad_token", "eos_token"):
            value = config.get(name)
            token = value.get("content") if isinstance(value, dict) else value
            found = self._core.token_to_id(token) if isinstance(token, str) else None
            if found is not None:
                return found
        return 0

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, cut to the length; a long text loses its end but keeps the closing special tokens."""
        check_texts(texts)
        return [cut(e.ids, e.special_tokens_mask, self.length) for e in self._core.encode_batch(list(texts))]

    def whole_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, special tokens included, not cut."""
        check_texts(texts)
        return [e.ids for e in self._core.encode_batch(list(texts))]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each id as text."""
        return [self._core.decode([int(i)], skip_special_tokens=False) for i in ids]

    @property
    def core(self) -> tokenizers.Tokenizer:
        """The library's own tokenizer, which neither cuts nor pads."""
        return self._core

    def decode(self, ids: Sequence[int]) -> str:
        """Ids as text; special tokens have none, nor has an id outside the vocabulary."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=True)

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n, T] int64, mask [n, T] int64), T the longest row or the fixed length."""
        width = self.length if self.fixed else max((len(row) for row in rows), default=1)
        ids, mask = pad(rows, max(width, 1), self.pad_id, self.padding_side)
        return ids, mask.astype(np.int64)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self.pad(self.rows(texts))


def cut(ids: list[int], special: Sequence[int], length: int) -> list[int]:
    """At most `length` ids: a long text loses its end, but keeps the closing ones that `special` marks."""
    if len(ids) <= length:
        return ids
    closing = 0
    while closing < min(len(special), length - 1) and special[-1 - closing]:
        closing += 1
    return ids[: length - closing] + ids[len(ids) - closing :]


def pad(rows: Sequence[Sequence[int]], width: int, pad_id: int, side: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids [n, width] int64, mask [n, width] bool): rows of at most `width` ids, filled on the side named right or left."""
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place] = row
        mask[i, place] = True
    return ids, mask


def check_texts(texts: Sequence[str]) -> None:
    """Raises DataError for a text that is no valid Unicode (a lone surrogate), which no tokenizer can take."""
    for i, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"text {i} is not valid Unicode: a lone surrogate at character {error.start}",
                remedy="send the text as valid UTF-8",
            ) from None


def tokenizers_from(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a file. Raises CheckpointError naming it."""
    try:
        if path.stat().st_size > _MAX_FILE:
            raise CheckpointError(f"larger than {_MAX_FILE} bytes", where=str(path))
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from error
    except CheckpointError:
        raise
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"not a tokenizer file: {error}", where=str(path)) from error


def tokenizer_config(directory: Path) -> dict[str, Any]:
    """The tokenizer's settings in a directory, empty where it has none. Raises CheckpointError naming the file."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > _MAX_FILE:
                raise ValueError(f"larger than {_MAX_FILE} bytes")
            part = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(part, dict):
                raise ValueError("expected a JSON object")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot be read as JSON: {error}", where=str(path)) from error
        merged |= part
    return merged
