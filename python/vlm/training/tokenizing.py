"""The tokenizer of a run: trained from its data, or read from a directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import Field

from vlm.config.options import Options
from vlm.data import DataOptions, open_source, texts_of
from vlm.data.tokenizer import Tokenizer
from vlm.types import VocabularyLayout


class TokenizerOptions(Options):
    """Byte-level BPE, trained once at the start of a run."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(4096, ge=260, description="greatest number of ids, special tokens included")
    source: str | None = Field(None, description="texts to train on; default: the training data")
    path: str | None = Field(None, description="directory with tokenizer.json to use as it is")
    samples: int = Field(50_000, gt=0, description="texts read for training at most")


def vocabulary_of(tokenizer: Tokenizer) -> VocabularyLayout:
    """One text span and the special ids that models ask for."""
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    return VocabularyLayout.of_text(tokenizer.vocab_size, {name: i for name, i in special.items() if i is not None})


def make_tokenizer(options: TokenizerOptions, data: DataOptions, note: Callable[[str], None]) -> Tokenizer:
    """Train or load. Raises DataError for data without text."""
    if options.path is not None:
        return Tokenizer.load(options.path)
    source = open_source(options.source or data.source)

    def texts() -> Iterator[str]:
        for index in range(min(len(source), options.samples)):
            yield from texts_of(source.read(index), data)

    tokenizer = Tokenizer.train_bpe(texts(), options.vocab_size)
    note(f"tokenizer: {tokenizer.vocab_size} ids trained on {min(len(source), options.samples)} texts")
    return tokenizer
