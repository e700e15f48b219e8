"""Retrieval of a small CLIP trained by open_clip on exactly the batches that `vlm pretrain clip-tiny` sees.

    python -m vlm.bench.peers.open_clip_quality store --data 'data/emoji/train-*.tar' --val 'data/emoji/val-*.tar' --output BATCHES
    OTHER/bin/python bench/peers/open_clip_training.py train BATCHES OUT --seed 0
    python -m vlm.bench.peers.open_clip_quality score --val 'data/emoji/val-*.tar' BATCHES OUT
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def store(data: str, val: str, output: Path, steps: int, batch: int, seeds: int, vocabulary: int) -> None:
    """Pixels [N, 3, 64, 64], ids [N, 32], the order of every seed [steps, batch], and the evaluation pictures and texts."""
    from vlm.data.loader import build_loader, open_split
    from vlm.data.options import DataOptions
    from vlm.data.tokenizer_options import BpeTokenizer, build_tokenizer
    from vlm.evaluation.material import clean
    from vlm.evaluation.reading import EvaluationData
    from vlm.runtime.preprocess import Preprocess

    output.mkdir(parents=True, exist_ok=True)
    options = DataOptions(source=data, val=val)
    source = open_split(options, "train")
    tokenizer = build_tokenizer(BpeTokenizer(vocab_size=vocabulary), options, source, max_length=32)
    preprocess = Preprocess(64)
    pixels, ids = [], []
    numbers: dict[int, int] = {}
    for item in EvaluationData(data).items():
        if item.problem is not None or item.picture is None:
            raise SystemExit(f"{item.key}: {item.problem or 'no picture'}: both sides must see the same samples")
        numbers[int(source.ids[item.index])] = len(numbers)
        pixels.append(preprocess.to_array(item.picture()))
        ids.append(tokenizer.encode([item.texts[0].strip()], 32)[0][0])
    np.save(output / "pixels.npy", np.stack(pixels))
    np.save(output / "ids.npy", np.stack(ids))
    for seed in range(seeds):
        with build_loader(options, tokenizer=tokenizer, preprocess=preprocess, batch_size=batch, seed=seed, source=source) as loader:
            rows = [[numbers[draw] for draw in next(loader).draws.tolist()] for _ in range(steps)]
        np.save(output / f"order-{seed}.npy", np.array(rows))
    pictures = [preprocess.to_array(item.picture()) for item in EvaluationData(val).items()]
    np.save(output / "val_pixels.npy", np.stack(pictures))
    texts = list(dict.fromkeys(clean(text) for item in EvaluationData(val).items() for text in item.texts))
    encoded = tokenizer.encode(texts, 32)
    np.save(output / "val_ids.npy", np.asarray(encoded[0]))
    (output / "about.json").write_text(json.dumps({"vocabulary": tokenizer.vocab_size, "texts": texts, "data": data, "val": val}))


class Stored:
    """Embeddings computed elsewhere, as evaluation asks for them: pictures in source order, texts by their words."""

    name, scale, bias, form = "open_clip", 100.0, 0.0, "softmax"

    def __init__(self, images: np.ndarray, texts: dict[str, np.ndarray]) -> None:
        self.images, self.texts, self.at = images, texts, 0

    def encode_image(self, pictures: Sequence[Any]) -> np.ndarray:
        self.at += len(pictures)
        return self.images[self.at - len(pictures) : self.at]

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.texts[text] for text in texts])


def score(val: str, batches: Path, output: Path) -> dict[str, Any]:
    """The retrieval result of stored embeddings, by the same evaluation that ours goes through."""
    from vlm.evaluation import RetrievalOptions
    from vlm.evaluation.material import clean
    from vlm.evaluation.session import Session

    texts = json.loads((batches / "about.json").read_text())["texts"]
    rows = dict(zip(map(clean, texts), np.load(output / "text.npy"), strict=True))
    return Session(Stored(np.load(output / "image.npy"), rows), val).run(RetrievalOptions()).as_json(examples=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("store")
    first.add_argument("--data", required=True)
    first.add_argument("--val", required=True)
    first.add_argument("--output", type=Path, required=True)
    first.add_argument("--steps", type=int, default=300)
    first.add_argument("--batch", type=int, default=256)
    first.add_argument("--seeds", type=int, default=3)
    first.add_argument("--vocabulary", type=int, default=4096)
    second = commands.add_parser("score")
    second.add_argument("--val", required=True)
    second.add_argument("batches", type=Path)
    second.add_argument("output", type=Path)
    given = parser.parse_args()
    if given.command == "store":
        store(given.data, given.val, given.output, given.steps, given.batch, given.seeds, given.vocabulary)
    else:
        print(json.dumps(score(given.val, given.batches, given.output)))


if __name__ == "__main__":
    main()
