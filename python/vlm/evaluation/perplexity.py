"""Perplexity: how many bits a language model needs for each character of a text source.

Bits per character compares models with different tokenizers; it counts every bit of a document, its end included.
Documents never see one another. One longer than the model's context is read in windows that overlap, and every
token is scored once, with at least `length - stride` tokens before it (the document's start aside).

n rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vlm.config.errors import DataError, RunFailed
from vlm.data.samples import field_at
from vlm.evaluation.bootstrap import bootstrap
from vlm.evaluation.material import CONCEPT, BadTally, Fingerprint, Item
from vlm.evaluation.result import Result, figures
from vlm.evaluation.task import Needs, Task

Integers = NDArray[np.int64]
Wide = NDArray[np.float64]

_SHOWN_TOKENS = 160


class LanguageScorer(Protocol):
    """What perplexity needs of a language model.

    length: greatest number of positions; packs: several documents may share a row; starts: documents begin with a
    token that is given, not predicted.
    """

    name: str
    vocab_size: int
    length: int
    packs: bool
    starts: bool

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each document, its opening and closing tokens included."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as text, for the report."""
        ...

    def nats(self, ids: Integers, segment: Integers, scored: NDArray[np.bool_]) -> Wide:
        """-log p of the token that follows each scored position, [scored.sum()] in row order.

        ids, segment [n, T]: segment numbers the documents of a row, -1 is padding; scored [n, T].
        """
        ...


class PerplexityOptions(Task):
    """Bits per character and per token of a language model over texts."""

    task: Literal["perplexity"] = "perplexity"
    needs: ClassVar[Needs] = "tokens"
    field: str = Field("auto", description="data field with the document; auto: the text column")
    length: int | None = Field(None, gt=1, description="context in tokens; default: the model's")
    stride: int | None = Field(
        None, gt=0, description="new tokens of each further window; default: half the context"
    )
    batch_tokens: int = Field(8192, gt=0, description="tokens of one forward pass")


@dataclass(frozen=True)
class Window:
    """Tokens start..stop-1 of a document, of which first..stop-1 are scored."""

    document: int
    start: int
    stop: int
    first: int


def windows_of(lengths: Sequence[int], length: int, stride: int) -> Iterator[Window]:
    """Windows of at most `length` tokens that score every token but the first of each document exactly once."""
    for document, count in enumerate(lengths):
        start, scored = 0, 1
        while scored < count:
            stop = min(start + length, count)
            yield Window(document, start, stop, scored)
            scored = stop
            start += stride
            # The last window ends at the document's end with as much before it as fits.
            start = min(start, max(count - length, 0)) if start + length > count else start


def packed(windows: Sequence[Window], length: int, several: bool) -> list[list[Window]]:
    """Rows of windows that fit `length` together, by first fit over falling size."""
    order = sorted(windows, key=lambda w: (w.start - w.stop, w.document, w.start))
    if not several:
        return [[window] for window in order]
    rows: list[list[Window]] = []
    space: list[int] = []
    first_open = 0
    for window in order:
        size = window.stop - window.start
        while first_open < len(rows) and space[first_open] < 2:
            first_open += 1
        # A look at a bounded number of rows keeps packing linear; what it misses is a little padding.
        for row in range(first_open, min(first_open + 64, len(rows))):
            if space[row] >= size:
                rows[row].append(window)
                space[row] -= size
                break
        else:
            rows.append([window])
            space.append(length - size)
            first_open = max(first_open, len(rows) - 512)
    return rows


def document_nats(
    scorer: LanguageScorer,
    documents: Sequence[Sequence[int]],
    *,
    length: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 8192,
) -> list[Wide]:
    """-log p of every token of each document after its first, [len - 1] float64 each.

    Raises RunFailed when the model gives a number that is not finite.
    """
    length = min(length or scorer.length, scorer.length)
    stride = min(stride or max(1, length // 2), length - 1) if length > 1 else 1
    rows = packed(list(windows_of([len(d) for d in documents], length, stride)), length, scorer.packs)
    out = [np.full(max(len(d) - 1, 0), np.nan) for d in documents]
    at = 0
    while at < len(rows):
        width = max(sum(w.stop - w.start for w in rows[at]), 1)
        part = rows[at : at + max(1, batch_tokens // width)]
        at += len(part)
        width = max(sum(w.stop - w.start for w in row) for row in part)
        ids = np.zeros((len(part), width), dtype=np.int64)
        segment = np.full((len(part), width), -1, dtype=np.int64)
        scored = np.zeros((len(part), width), dtype=bool)
        places: list[Window] = []
        for r, row in enumerate(part):
            column = 0
            for number, w in enumerate(row):
                size = w.stop - w.start
                ids[r, column : column + size] = documents[w.document][w.start : w.stop]
                segment[r, column : column + size] = number
                scored[r, column + w.first - w.start - 1 : column + size - 1] = True
                column += size
                places.append(w)
        values = scorer.nats(ids, segment, scored)
        if not np.isfinite(values).all():
            raise RunFailed(
                "the model gives probabilities that are not finite",
                remedy="its weights are unusable: check the training loss, or evaluate an earlier checkpoint",
            )
        start = 0
        for w in places:
            count = w.stop - w.first
            out[w.document][w.first - 1 : w.stop - 1] = values[start : start + count]
            start += count
    return out


def perplexity(
    scorer: LanguageScorer,
    items: Sequence[Item] | Iterator[Item],
    options: PerplexityOptions,
    bad: BadTally | None = None,
) -> Result:
    """Bits per character, byte and token, nats per token and perplexity; intervals by document (or concept).

    Without an opening token the first token of a document is charged as a uniform guess, log2 of the vocabulary.
    Raises DataError when no document is left.
    """
    bad = bad if bad is not None else BadTally()
    keys: list[str] = []
    texts: list[str] = []
    concepts: list[Any] = []
    fingerprint = Fingerprint()
    for item in items:
        if options.limit is not None and len(texts) >= options.limit:
            break
        value = (
            field_at(dict(item.fields), options.field)
            if options.field != "auto"
            else next(iter(item.texts), None)
        )
        if item.problem is not None or not isinstance(value, str) or not value.strip():
            bad.add(item.key, item.problem or "missing_text: the sample has no text")
            continue
        bad.good += 1
        keys.append(item.key)
        texts.append(value)
        concept = item.fields.get(CONCEPT)
        concepts.append(concept if isinstance(concept, str | int) else None)
        fingerprint.add(Item(item.key, (value,), {}, None), None)
    bad.check()
    if not texts:
        raise DataError("the data holds no text", remedy="see what it holds with: vlm data inspect URI")
    documents = scorer.tokenize(texts)
    nats = document_nats(
        scorer, documents, length=options.length, stride=options.stride, batch_tokens=options.batch_tokens
    )
    unguided = 0.0 if scorer.starts else math.log(scorer.vocab_size)
    total = np.array(
        [part.sum() + (unguided if len(document) else 0.0) for part, document in zip(nats, documents)]
    )
    tokens = np.array([len(d) - 1 if scorer.starts else len(d) for d in documents], dtype=np.float64)
    characters = np.array([len(text) for text in texts], dtype=np.float64)
    size = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts], dtype=np.float64)
    bits = total / math.log(2)
    top = np.stack([bits, bits, bits, total], axis=1)
    bottom = np.stack([characters, size, tokens, tokens], axis=1)
    names = ("bits_per_character", "bits_per_byte", "bits_per_token", "nats_per_token")
    estimate = bootstrap(top, bottom, clusters=concepts, resamples=options.resamples, seed=options.seed)
    metrics, intervals = figures(names, estimate)
    metrics["perplexity"] = round(math.exp(min(metrics["nats_per_token"], 700)), 6)
    intervals["perplexity"] = {
        k: round(math.exp(min(v, 700)), 6) for k, v in intervals["nats_per_token"].items()
    }
    uniform = math.log2(scorer.vocab_size) * tokens.sum()
    chance = {
        "bits_per_character": round(float(uniform / characters.sum()), 6),
        "bits_per_byte": round(float(uniform / size.sum()), 6),
        "bits_per_token": round(math.log2(scorer.vocab_size), 6),
        "nats_per_token": round(math.log(scorer.vocab_size), 6),
        "perplexity": float(scorer.vocab_size),
    }
    details = {
        "tokens": int(tokens.sum()),
        "characters": int(characters.sum()),
        "bytes": int(size.sum()),
        "clusters": estimate.clusters,
        "context": min(options.length or scorer.length, scorer.length),
        "first_token": "predicted after the opening token" if scorer.starts else "charged as a uniform guess",
    }
    examples = _examples(scorer, keys, texts, documents, nats, options) if options.examples else []
    return Result(
        "perplexity",
        options.title,
        len(texts),
        metrics,
        intervals,
        chance,
        details,
        examples,
        data={"sha256": fingerprint.hexdigest()},
        bad=bad.as_json(),
    )


def _examples(
    scorer: LanguageScorer,
    keys: list[str],
    texts: list[str],
    documents: Sequence[Sequence[int]],
    nats: list[Wide],
    options: PerplexityOptions,
) -> list[dict[str, Any]]:
    """The first documents of a seeded shuffle, with the bits of each of their leading tokens."""
    chosen = np.random.default_rng([options.seed, 4]).permutation(len(texts))[: options.examples].tolist()
    out = []
    for i in chosen:
        bits = (nats[i] / math.log(2)).round(3).tolist()
        out.append(
            {
                "key": keys[i],
                "bits_per_character": round(sum(bits) / len(texts[i]), 4),
                "tokens": scorer.pieces(documents[i][1 : 1 + _SHOWN_TOKENS]),
                "bits": bits[:_SHOWN_TOKENS],
                "cut": len(bits) > _SHOWN_TOKENS,
            }
        )
    return out
