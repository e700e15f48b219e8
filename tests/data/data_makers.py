"""Small data sets of every format from one generator, and clean or poisoned samples to put into them."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.runtime.picture_makers import encode

WORDS = ("red", "green", "blue", "grey", "old", "new", "small", "large", "round", "square")


def sample(number: int, size: int = 16) -> dict[str, bytes]:
    """Member extension -> bytes of one good sample."""
    draw = np.random.default_rng(number)
    picture = Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8))
    text = f"a {WORDS[number % 10]} {WORDS[number // 10 % 10]} thing number {number}"
    fields = {"caption": text, "category": WORDS[number % 3], "number": number}
    return {"png": encode(picture, "PNG"), "json": json.dumps(fields).encode(), "txt": text.encode()}


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """One shard: key -> extension -> bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, members in samples.items():
            for extension, data in members.items():
                add(archive, f"{key}.{extension}", data)
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **header: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in header.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(data))


def write_shards(folder: Path, count: int = 64, shards: int = 4) -> str:
    """`count` good samples over some shards; the pattern that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        numbers = range(shard * count // shards, (shard + 1) * count // shards)
        write_tar(folder / f"{shard:05}.tar", {f"{n:06}": sample(n) for n in numbers})
    return str(folder / f"{{00000..{shards - 1:05}}}.tar")


def write_pairs(folder: Path, count: int = 48) -> str:
    """JSON lines with pictures beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(count):
        members = sample(n)
        (folder / f"{n}.png").write_bytes(members["png"])
        lines.append(json.dumps({"image": f"{n}.png", **json.loads(members["json"])}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "pairs.jsonl")


def write_texts(folder: Path, count: int = 60) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    with open(folder / "texts.jsonl", "w") as file:
        for n in range(count):
            words = " ".join(WORDS[i] for i in draw.integers(0, 10, int(draw.integers(1, 60))))
            file.write(json.dumps({"id": n, "text": f"document {n}: {words}"}) + "\n")
    return str(folder / "texts.jsonl")


class Ranks:
    """`size` communicators over threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._slots: list[Any] = [None] * size

    def run(self, work: Any) -> list[Any]:
        """work(communicator) on every rank at once; their results in rank order."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def body(rank: int) -> None:
            try:
                results[rank] = work(_ThreadCommunicator(self, rank))
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if real or errors:
            raise (real or errors)[0]
        return results

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        self._barrier.wait()
        out = list(self._slots)
        self._barrier.wait()
        return out


class _ThreadCommunicator:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank, self.size = ranks, rank, ranks.size

    def sum(self, tensor: Any) -> Any:
        return sum(self.ranks.exchange(self.rank, tensor))

    def gather_rows(self, tensor: Any) -> list[Any]:
        return self.ranks.exchange(self.rank, tensor)

    def gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        told = self.ranks.exchange(self.rank, list(numbers))
        assert len({len(part) for part in told}) == 1, "lists of unequal length"
        return told

    def barrier(self) -> None:
        self.ranks.exchange(self.rank, None)
