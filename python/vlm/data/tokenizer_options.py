"""The `[tokenizer]` table: trained on the texts of the training data, or read from a directory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from vlm.config.errors import DataError
from vlm.config.options import Options
from vlm.data.options import DataOptions
from vlm.data.sources.base import Source
from vlm.data.texts import source_texts
from vlm.data.tokenizer import Tokenizer


class BpeTokenizer(Options):
    """A byte-level BPE trained on the texts of the training data."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(4096, ge=259, le=1_000_000, description="entries, the 256 bytes and specials included")
    special: tuple[str, ...] = Field((), description="further special tokens")
    samples: int = Field(100_000, ge=1, description="at most so many texts are read, spread over the data")


class LocalTokenizer(Options):
    """The tokenizer of a local Hugging Face directory."""

    kind: Literal["directory"] = "directory"
    path: str = Field(description="directory with tokenizer.json and tokenizer_config.json")


TokenizerOptions = Annotated[BpeTokenizer | LocalTokenizer, Field(discriminator="kind")]


def build_tokenizer(
    options: BpeTokenizer | LocalTokenizer, data: DataOptions, source: Source, *, max_length: int | None = None
) -> Tokenizer:
    """Train on the texts of `source`, or load the directory. Raises DataError when no text can be used."""
    if isinstance(options, LocalTokenizer):
        return Tokenizer.load(options.path)
    texts = source_texts(source, data, options.samples)
    first = next(texts, None)
    if first is None:
        raise DataError("no usable text to train a tokenizer on", remedy="see data.columns.text and `vlm data check`")

    def everything() -> Iterator[str]:
        yield first
        yield from texts

    return Tokenizer.train_bpe(everything(), options.vocab_size, options.special, max_length=max_length)
