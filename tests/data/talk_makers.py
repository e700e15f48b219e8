"""Conversations as files, and what the tests of streams share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data.data_makers import WORDS, sample
from vlm.data import DataOptions, Tokenizer, build_loader
from vlm.runtime.preprocess import Preprocess

PRE = Preprocess(16, "squash", "bilinear")
TOKENIZER = Tokenizer.train_bpe(
    ["what is in the picture? a red thing number 12", "is there a green circle? yes no"], 320, ["<image>"]
)
IMAGE_ID = TOKENIZER.token_to_id("<image>")


def talk(n: int, pictures: int = 1, turns: int = 1) -> dict[str, Any]:
    """A LLaVA conversation over `pictures` pictures, marked in the first question."""
    marks = "<image>\n" * pictures
    messages = []
    for turn in range(turns):
        messages.append({"from": "human", "value": (marks if turn == 0 else "") + f"what is thing {turn}?"})
        messages.append({"from": "gpt", "value": f"a {WORDS[(n + turn) % 10]} thing number {n}"})
    entry: dict[str, Any] = {"id": n, "conversations": messages}
    if pictures:
        names = [f"{(n + k) % 12}.png" for k in range(pictures)]
        entry["image"] = names if pictures > 1 else names[0]
    return entry


def write_talks(folder: Path, entries: list[dict[str, Any]], name: str = "talks.jsonl") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(12):
        (folder / f"{n}.png").write_bytes(sample(n)["png"])
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(folder / name)


def loader_of(
    source: str | None, streams: dict[str, Any], *, preprocess: Any = PRE, batch_size: int = 6, seed: int = 3, **rest: Any
) -> Any:
    """A loader of streams; rest: further entries of the `[data]` table and arguments of `build_loader`."""
    known = ("communicator", "quarantine", "picture_positions", "template", "tokenizer", "tiling", "tiles_apart")
    outer = {name: rest.pop(name) for name in known if name in rest}
    table = {"streams": streams, "text": {"length": 64}, "bad_samples": {"budget": 0.5}, **rest}
    if "packer" in table:  # which has a length of its own
        table["text"] = {name: value for name, value in table["text"].items() if name != "length"}
    if source is not None:
        table["source"] = source
    options = DataOptions.model_validate(table)
    return build_loader(
        options, preprocess=preprocess, batch_size=batch_size, seed=seed, **{"tokenizer": TOKENIZER, **outer}
    )
