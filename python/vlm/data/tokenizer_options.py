"""From the options of a tokenizer to the tokenizer: trained on the data, or read from a directory."""

from __future__ import annotations

from itertools import chain

from vlm.config.errors import DataError
from vlm.data.options import BpeTokenizer, DataOptions, LocalTokenizer
from vlm.data.sources.base import Source
from vlm.data.texts import source_texts
from vlm.data.tokenizer import Tokenizer


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
    return Tokenizer.train_bpe(chain([first], texts), options.vocab_size, options.special, max_length=max_length)
