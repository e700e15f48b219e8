"""One pass over a source in its own order, for evaluation: streams as in training, and the raw fields beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from vlm.config.errors import DataError
from vlm.data.collate import Row
from vlm.data.ledger import Ledger
from vlm.data.loader import open_split
from vlm.data.options import DataOptions, OneCaption
from vlm.data.packing import PackedRow, document_rows, pack_batch
from vlm.data.plan import Plan, Preprocesses, Reads, with_texts
from vlm.data.pool import open_decoder
from vlm.data.sources.base import Source
from vlm.data.tokenizer import Tokenizer
from vlm.runtime.chat import Template
from vlm.types.batch import Batch


class EvaluationPass:
    """Iterate once. After it `report()` counts what was read and refused."""

    def __init__(
        self,
        source: Source,
        options: DataOptions,
        reads: Reads,
        *,
        batch_size: int,
        limit: int | None,
        classes: Sequence[str],
    ) -> None:
        # Evaluation never draws anew: one caption a sample, no augmentation, one draw of each stream for good.
        self.options = options.model_copy(update={"captions": OneCaption()})
        self.source, self.reads, self.tokenizer = source, reads, reads.tokenizer
        self.batch_size, self.classes = batch_size, classes
        self.samples = len(source) if limit is None else min(limit, len(source))
        self._ledger = Ledger(len(source), options.bad_samples)

    def __len__(self) -> int:
        """Samples in the source (documents for text alone), bad ones included."""
        return self.samples

    def report(self) -> dict[str, Any]:
        return self._ledger.report()

    def __iter__(self) -> Iterator[Batch]:
        self._ledger = Ledger(len(self.source), self.options.bad_samples)
        if self.options.packer is not None and not self.reads.pictures and not self.options.conversations:
            yield from self._documents()
        else:
            yield from self._samples()

    def _samples(self) -> Iterator[Batch]:
        plan = Plan(self.source, self.options, self.reads, seed=0, train=False, extra=True, classes=self.classes)
        decoder = open_decoder(plan.spec, self.options.workers)
        ahead = self.options.prefetch * self.batch_size
        rows: list[Row] = []
        submitted = 0
        try:
            for index in range(self.samples):
                if index >= submitted:
                    stop = min(self.samples, index + ahead)
                    decoder.submit([(i, plan.job(i, 0)) for i in range(index, stop)])
                    submitted = stop
                result, encoded = plan.finish(decoder.take(index))
                self._ledger.count(0, result.reason, lambda index=index: self.source.key(index))  # type: ignore[misc]
                if result.reason:
                    continue
                rows.append(with_texts(plan.row(index, 0, result, encoded)))
                if len(rows) == self.batch_size:
                    yield plan.batch(rows)
                    rows = []
            if rows:
                yield plan.batch(rows)
        finally:
            decoder.close()
        if not self._ledger.epoch_good:
            raise DataError(f"none of the {self.samples} samples can be used", remedy="see `vlm data check`")

    def _documents(self) -> Iterator[Batch]:
        assert self.options.packer is not None
        if self.tokenizer is None:
            raise DataError("text-only data need a tokenizer")
        length = self.options.packer.length
        rows: list[PackedRow] = []
        texts: list[str] = []
        for row, text in document_rows(self.source, self.options, self.tokenizer, length, self._ledger):
            rows.append(row)
            texts.append(text)
            if len(rows) == self.batch_size:
                yield self._document_batch(rows, texts, length)
                rows, texts = [], []
        if rows:
            yield self._document_batch(rows, texts, length)

    def _document_batch(self, rows: list[PackedRow], texts: list[str], length: int) -> Batch:
        assert self.tokenizer is not None
        extra: dict[str, list[Any]] = {
            "text": texts,
            "characters": [len(text) for text in texts],
            "bytes": [len(text.encode()) for text in texts],
        }
        return replace(pack_batch(rows, length, self.tokenizer.pad_id), extra=extra)


def iterate_once(
    options: DataOptions,
    *,
    tokenizer: Tokenizer | None = None,
    preprocess: Preprocesses = None,
    batch_size: int = 256,
    split: str = "val",
    source: Source | None = None,
    limit: int | None = None,
    classes: Sequence[str] = (),
    picture_positions: int | None = None,
    template: Template | None = None,
) -> EvaluationPass:
    """A finite pass in source order; the last batch may be smaller, bad samples are skipped within the budget.

    Batch.extra holds the raw fields, one value a sample (None where it lacks the field): `text` is the caption that
    was encoded, `caption` the field of that name or else the same, and `category`, `concept`, ... as stored.
    Text alone (options.packer set): a document a row, longer ones over several rows; extra `text`, `characters` and
    `bytes` are those of the whole document at its first row, and empty or 0 at the rows that continue it.
    Conversations: extra `text` is the last answer; preprocess, picture_positions and template as in `build_loader`.
    limit: at most so many samples (not for text alone). classes: those of the training data, for the stream `label`.
    """
    source = source if source is not None else open_split(options, split)
    return EvaluationPass(
        source,
        options,
        Reads.of(tokenizer, preprocess, picture_positions, template),
        batch_size=batch_size,
        limit=limit,
        classes=classes,
    )
