"""What training and evaluation data share: the same pictures, nearly the same ones, the same texts, long texts word for word.

n pictures of training data, m of evaluation data.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm.config.errors import DataError
from vlm.data.check import Checker
from vlm.data.options import DataOptions
from vlm.data.samples import BadSample
from vlm.data.sources.base import Source
from vlm.runtime.pictures import BadPicture

BITS = 128
SIDE = 8
RISE = 3
"""Levels that are a step: less is noise and compression, of which flat areas are full."""
THUMBNAIL = Image.Resampling.BILINEAR
"""Its places overlap, so that a picture of another size has the same thumbnail (boxes differ at every edge)."""
WORDS = 13
"""Words of a run that two long texts share only if one was copied (GPT-3's choice)."""


@dataclass(frozen=True)
class Nearness:
    """bits: how many of the 128 signs of brightness steps may differ; colour: greatest difference of an 8 x 8 thumbnail in levels,
    of which the signs know nothing; words: share of a text's runs of 13 words that must be found."""

    bits: int = 6
    colour: int = 16
    words: float = 0.5


@dataclass
class Signs:
    """Of the samples of one source. owner [n]: sample of each picture; hashes uint64 [n, 2]; small uint8 [n, 192]."""

    keys: list[str] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    small: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 3 * SIDE * SIDE), np.uint8))
    texts: list[bytes | None] = field(default_factory=list)
    runs: list[NDArray[np.uint64]] = field(default_factory=list)
    bad: int = 0


@dataclass(frozen=True)
class Match:
    """A training sample that shares something with an evaluation sample. picture: exact or near, bits apart; words: share."""

    key: str
    evaluation: str
    picture: str | None = None
    bits: int | None = None
    text: bool = False
    words: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None and value is not False}


def signs_of(source: Source, options: DataOptions, progress: Callable[[int], None] | None = None) -> Signs:
    """Reads every sample as training does; bad ones are counted and left out."""
    checker, out = Checker(source, options), Signs()
    hashes, small = [], []
    for index in range(len(source)):
        if progress is not None:
            progress(index)
        try:
            looked = checker.read(index)
        except (BadSample, BadPicture):
            out.bad += 1
            continue
        sample = len(out.keys)
        out.keys.append(source.key(index))
        for picture in looked.pictures:
            out.owner.append(sample)
            out.digests.append(_digest(picture))
            hashes.append(steps_of(picture))
            small.append(np.asarray(picture.convert("RGB").resize((SIDE, SIDE), THUMBNAIL)).reshape(-1))
        words = words_of(looked.text or "")
        out.texts.append(hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest() if words else None)
        out.runs.append(runs_of(words))
    if hashes:
        out.hashes, out.small = np.stack(hashes), np.stack(small)
    return out


def _digest(picture: Image.Image) -> bytes:
    rgb = picture.convert("RGB")
    return hashlib.blake2b(rgb.tobytes(), digest_size=16, salt=f"{rgb.width}x{rgb.height}".encode()[:16]).digest()


def steps_of(picture: Image.Image) -> NDArray[np.uint64]:
    """uint64 [2]: whether brightness rises from place to place of an 8 x 9 and a 9 x 8 thumbnail (difference hash)."""
    out = []
    for width, height, axis in ((SIDE + 1, SIDE, 1), (SIDE, SIDE + 1, 0)):
        grey = np.asarray(picture.convert("L").resize((width, height), THUMBNAIL), np.int16)
        out.append(np.packbits(np.diff(grey, axis=axis) > RISE).view(np.uint64)[0])
    return np.array(out, np.uint64)


def words_of(text: str) -> list[str]:
    """Words without case, accents' forms and punctuation."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def runs_of(words: Sequence[str]) -> NDArray[np.uint64]:
    """A number for each run of 13 words, distinct and sorted."""
    found = (hashlib.blake2b(" ".join(words[i : i + WORDS]).encode(), digest_size=8).digest() for i in range(len(words) - WORDS + 1))
    return np.unique(np.frombuffer(b"".join(found), np.uint64))


def overlap(train: Signs, evaluation: Signs, near: Nearness) -> list[Match]:
    """The matches, by evaluation sample. Every exact or near picture, every equal text, every text that was copied."""
    found: dict[tuple[int, int], dict[str, Any]] = defaultdict(dict)
    by_digest: dict[bytes, list[int]] = defaultdict(list)
    for owner, digest in zip(train.owner, train.digests, strict=True):
        by_digest[digest].append(owner)
    for owner, digest in zip(evaluation.owner, evaluation.digests, strict=True):
        for other in by_digest.get(digest, ()):
            found[owner, other] |= {"picture": "exact", "bits": 0}
    for mine, its, bits in _near(train, evaluation, near):
        pair = found[evaluation.owner[mine], train.owner[its]]
        if pair.get("bits", BITS + 1) > bits:
            pair |= {"picture": "near", "bits": bits}
    by_text: dict[bytes, list[int]] = defaultdict(list)
    for sample, text in enumerate(train.texts):
        if text is not None:
            by_text[text].append(sample)
    for sample, text in enumerate(evaluation.texts):
        for other in by_text.get(text, ()) if text is not None else ():
            found[sample, other]["text"] = True
    for sample, other, words in _copied(train, evaluation, near.words):
        found[sample, other]["words"] = words
    return [Match(train.keys[other], evaluation.keys[sample], **shared) for (sample, other), shared in sorted(found.items())]


def _near(train: Signs, evaluation: Signs, near: Nearness) -> Iterator[tuple[int, int, int]]:
    """(evaluation picture, training picture, bits apart). Of bits + 1 pieces of a hash one must be equal: only those are compared."""
    if not len(train.hashes) or not len(evaluation.hashes):
        return
    mine, its = (_pieces(signs.hashes, max(3, near.bits + 1)) for signs in (train, evaluation))
    order = np.argsort(mine, axis=0, kind="stable")
    ordered = np.take_along_axis(mine, order, 0)
    starts, stops = (np.stack([np.searchsorted(ordered[:, p], its[:, p], side) for p in range(its.shape[1])], 1) for side in ("left", "right"))
    for at in range(len(its)):
        candidates = np.unique(np.concatenate([order[a:b, p] for p, (a, b) in enumerate(zip(starts[at], stops[at], strict=True))]))
        apart = np.bitwise_count(train.hashes[candidates] ^ evaluation.hashes[at]).sum(1)
        candidates, apart = candidates[apart <= near.bits], apart[apart <= near.bits]
        colour = np.abs(train.small[candidates].astype(np.int16) - evaluation.small[at]).max(1)
        for other, bits in zip(candidates[colour <= near.colour], apart[colour <= near.colour], strict=True):
            yield at, int(other), int(bits)


def _pieces(hashes: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """[n, count]: the bits of a hash in `count` >= 3 pieces, each a number."""
    bits = np.unpackbits(hashes.view(np.uint8).reshape(len(hashes), -1), axis=1).astype(np.int64)
    cuts = np.linspace(0, BITS, count + 1).astype(int)
    return np.stack([bits[:, start:stop] @ (1 << np.arange(stop - start)) for start, stop in itertools.pairwise(cuts)], 1)


def _copied(train: Signs, evaluation: Signs, least: float) -> Iterator[tuple[int, int, float]]:
    """(evaluation sample, training sample, share of its runs of words found there)."""
    owners: dict[int, list[int]] = defaultdict(list)
    for sample, runs in enumerate(evaluation.runs):
        for run in runs.tolist():
            owners[run].append(sample)
    for other, runs in enumerate(train.runs):
        counts: dict[int, int] = defaultdict(int)
        for run in runs.tolist():
            for sample in owners.get(run, ()):
                counts[sample] += 1
        for sample, count in counts.items():
            share = count / len(evaluation.runs[sample])
            if share >= least:
                yield sample, other, round(share, 4)


def check_comparable(train: Signs, evaluation: Signs) -> None:
    """Raises DataError where nothing could be found: no sample of one side has what the other has."""
    pictures = bool(train.owner) and bool(evaluation.owner)
    texts = any(t is not None for t in train.texts) and any(t is not None for t in evaluation.texts)
    if not pictures and not texts:
        raise DataError("the two have neither pictures nor texts in common to compare", remedy="see vlm data inspect of both")
