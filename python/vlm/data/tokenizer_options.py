"""From the options of a tokenizer to the tokenizer: trained on the data, or read from a directory."""

from __future__ import annotations

from collections.abc import Iterator

from vlm.config.errors import DataError
from vlm.data.captions import text_values
from vlm.data.options import BpeTokenizer, DataOptions, LocalTokenizer
from vlm.data.samples import BadSample, clean_text
from vlm.data.sources.base import Source
from vlm.data.tokenizer import Tokenizer
from vlm.runtime.pictures import BadPicture


def source_texts(source: Source, options: DataOptions, limit: int) -> Iterator[str]:
    """At most `limit` usable texts, evenly spread over the source in its own order; all entries of a list of captions."""
    step = max(1, -(-len(source) // limit))
    for index in range(0, len(source), step):
        try:
            values = text_values(source.read(index).fields, options.columns.text)
        except (BadSample, BadPicture):
            continue  # the loader counts and names it
        for value in values:
            try:
                yield clean_text(value, options.max_text)
            except BadSample:
                continue


def build_tokenizer(
    options: BpeTokenizer | LocalTokenizer,
    data: DataOptions,
    source: Source,
    *,
    max_length: int | None = None,
) -> Tokenizer:
    """Train on the texts of `source`, or load the directory. Raises DataError when no text can be used."""
    if isinstance(options, LocalTokenizer):
        return Tokenizer.load(options.path)
    texts = source_texts(source, data, options.samples)
    first = next(texts, None)
    if first is None:
        raise DataError(
            "no usable text to train a tokenizer on", remedy="see data.columns.text and `vlm data check`"
        )

    def everything() -> Iterator[str]:
        yield first
        yield from texts

    return Tokenizer.train_bpe(everything(), options.vocab_size, options.special, max_length=max_length)
