"""The loader of a `[data]` table: samples, packed texts or packed conversations."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vlm.config.errors import DataError
from vlm.data.endless import Loader
from vlm.data.few_shot import few_shot
from vlm.data.mixture import Mixture, open_filtered
from vlm.data.options import DataOptions
from vlm.data.packing import PackedLoader
from vlm.data.packing_conversations import PackedConversations
from vlm.data.plan import Preprocesses, Reads
from vlm.data.sample_loader import SampleLoader
from vlm.data.sources.base import Source
from vlm.data.tokenizer import Tokenizer
from vlm.runtime.chat import Template
from vlm.runtime.prompt import LearnedPrompt
from vlm.runtime.tiling import Tiling
from vlm.types.communicator import Communicator, SingleProcess


def build_loader(
    options: DataOptions,
    *,
    tokenizer: Tokenizer | None = None,
    preprocess: Preprocesses = None,
    batch_size: int,
    seed: int = 0,
    communicator: Communicator | None = None,
    split: str = "train",
    source: Source | None = None,
    quarantine: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    picture_positions: int | None = None,
    template: Template | None = None,
    tiling: Tiling | None = None,
    tiles_apart: bool = False,
    frames: int | None = None,
    prompt: LearnedPrompt | None = None,
    triples: tuple[int, int] | None = None,
) -> Loader:
    """The loader of a `[data]` table: next(loader) is this rank's share of the next global batch.

    batch_size: samples (rows of a packer) of a global batch. preprocess: None for text alone; tokenizer: None for
    pictures alone. split: `train`, or `val` (no augmentation). source: already open, instead of the table's address.
    quarantine: directory for `quarantine.jsonl`, which rank 0 writes. classes: of `data.label`, where they are known
    (those of the training data for `val`); else they are collected from the source.
    preprocess: one, or one for each picture stream (`image`, `image.NAME`). picture_positions: positions that a picture
    takes in a row once it is expanded (1 unless said): what a row's length counts. template: how messages are written,
    where `data.text.template` does not say; else plain. tiling: how a picture becomes several rows, each of which takes
    `picture_positions` beside the text that announces it; None: it is one row. tiles_apart: tiles and that text take none,
    thumbnails alone do. frames: most pictures of a sample, for a model that reads them as a clip; None: it reads one.
    prompt: that the model has learned or is to learn, which class texts are then written with. triples: how many triples of a
    caption are rows beside it, and of how many tokens a part; None: none.
    Raises DataError (exit code 3) when data are missing, and from next() when the budget of bad samples is spent.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}, expected at least 1")
    communicator = communicator if communicator is not None else SingleProcess()
    source = source if source is not None else open_split(options, split, seed)
    reads = Reads.of(tokenizer, preprocess, picture_positions, template, tiling, tiles_apart, frames, prompt, triples)
    talks = [*options.conversations, *(name for part in options.mixture for name in options.of_part(part).conversations)]
    if options.packer is not None and talks:
        return PackedConversations(
            source,
            options,
            reads,
            batch_size=batch_size,
            seed=seed,
            communicator=communicator,
            train=split == "train",
            quarantine=quarantine,
            classes=classes,
        )
    if options.packer is not None:
        if tokenizer is None or preprocess is not None:
            raise DataError(
                "data.packer is for text-only models", remedy="leave data.packer out for pictures and text"
            )
        return PackedLoader(
            source,
            options,
            tokenizer=tokenizer,
            batch_size=batch_size,
            seed=seed,
            communicator=communicator,
            quarantine=quarantine,
        )
    return SampleLoader(
        source,
        options,
        reads,
        batch_size=batch_size,
        seed=seed,
        communicator=communicator,
        train=split == "train",
        quarantine=quarantine,
        classes=classes,
    )


def open_split(options: DataOptions, split: str, seed: int = 0) -> Source:
    """The source of `train` (a mixture where the table has one) or `val`, filtered by `where`; of `train`, what the sampler draws.

    seed: of that draw, where the sampler has none of its own. Raises DataError when the table names no `val`.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, expected train or val")
    if split == "train" and options.mixture:
        return Mixture(options)
    uri = options.source if split == "train" else options.val
    if uri is None:
        raise DataError("no evaluation data", where="data.val", remedy="set data.val (or pass --val URI)")
    source = open_filtered(uri, options, train=split == "train")
    return few_shot(source, options, seed) if split == "train" and options.sampler is not None else source
