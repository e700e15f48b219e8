"""What `vlm data overlap` found, in numbers, lines and a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.config.errors import RunFailed
from vlm.data.options import DataOptions
from vlm.data.overlap import Match, Nearness, Signs, check_comparable, overlap, signs_of
from vlm.data.sources.base import Source

SHOWN = 10


@dataclass(frozen=True)
class Found:
    """Matches of two sets of samples."""

    train: Signs
    evaluation: Signs
    matches: list[Match]

    def keys(self, *, texts: bool) -> dict[str, Match]:
        """Training key -> its closest match, of those that are to be left out."""
        out: dict[str, Match] = {}
        for match in self._meant(texts):
            before = out.get(match.key)
            if before is None or _closeness(match) < _closeness(before):
                out[match.key] = match
        return out

    def share(self, *, texts: bool) -> float:
        """Of the evaluation samples."""
        return len({match.evaluation for match in self._meant(texts)}) / max(1, len(self.evaluation.keys))

    def _meant(self, texts: bool) -> list[Match]:
        return [match for match in self.matches if match.picture or match.words or texts]

    def summary(self) -> dict[str, Any]:
        kinds = {
            "exact_pictures": [m for m in self.matches if m.picture == "exact"],
            "near_pictures": [m for m in self.matches if m.picture == "near"],
            "equal_texts": [m for m in self.matches if m.text],
            "copied_texts": [m for m in self.matches if m.words],
        }
        counts = {
            name: {"training": len({m.key for m in own}), "evaluation": len({m.evaluation for m in own})} for name, own in kinds.items()
        }
        sides = {
            name: {"samples": len(signs.keys), "pictures": len(signs.owner), "bad": signs.bad}
            for name, signs in (("training", self.train), ("evaluation", self.evaluation))
        }
        return {**sides, **counts, "share": self.share(texts=False), "first": [m.as_dict() for m in self._first()]}

    def _first(self) -> list[Match]:
        return sorted(self._meant(texts=False), key=_closeness)[:SHOWN]

    def lines(self) -> list[str]:
        """For a person."""
        summary = self.summary()
        out = []
        for name in ("training", "evaluation"):
            side = summary[name]
            bad = f", {side['bad']} bad ones left out" if side["bad"] else ""
            out.append(f"{name:10} {side['samples']} samples, {side['pictures']} pictures{bad}")
        for name in ("exact_pictures", "near_pictures", "copied_texts", "equal_texts"):
            side = summary[name]
            out.append(f"  {name.replace('_', ' '):15} {side['evaluation']} evaluation samples, {side['training']} of training")
        for match in self._first():
            how = " ".join(f"{key}={value}" for key, value in match.as_dict().items() if key not in ("key", "evaluation"))
            out.append(f"    {match.evaluation}  is  {match.key}  ({how})")
        return out

    def write(self, path: Path, *, texts: bool) -> None:
        """JSON lines that `data.exclude` reads. Raises RunFailed."""
        text = "".join(json.dumps(match.as_dict(), ensure_ascii=False) + "\n" for _, match in sorted(self.keys(texts=texts).items()))
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise RunFailed(f"cannot be written: {error.strerror}", where=str(path)) from error


def _closeness(match: Match) -> tuple[int, int, float]:
    return {"exact": 0, "near": 1, None: 2}[match.picture], match.bits or 0, -(match.words or 0.0)


def run_overlap(
    train: tuple[Source, DataOptions], evaluation: tuple[Source, DataOptions], *, bits: int, colour: int, words: float,
    progress: Callable[[int], Callable[[int], None] | None],
) -> Found:  # fmt: skip
    """Reads both sides and compares them. Raises DataError where there is nothing to compare."""
    sides = [signs_of(source, options, progress(len(source))) for source, options in (evaluation, train)]
    check_comparable(sides[1], sides[0])
    return Found(sides[1], sides[0], overlap(sides[1], sides[0], Nearness(bits, colour, words)))
