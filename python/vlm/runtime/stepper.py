"""Rows of prompts over the graphs of a decoder, advanced token by token.

n rows, S positions of the longest row, T positions cached, C width, V vocabulary, K visual tokens of a picture, M visual
tokens beside a row. Rows of unequal length stand right, padding left of them; a stage has the layers between two drops.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime
from onnxruntime import OrtValue as Value

from vlm.config.errors import RequestError
from vlm.runtime.beside import Laid, expanded, laid_apart, laid_beside
from vlm.runtime.decoder import DecoderGraphs
from vlm.runtime.generation.protocols import Prompt


class BundleStepper:
    """A `Stepper` with the cache of its rows. Source of stages: pyramiddrop."""

    def __init__(self, graphs: DecoderGraphs) -> None:
        self.vocab_size = graphs.vocab_size
        self.graphs = graphs
        self._cache: list[Value] = []
        self._masks: list[np.ndarray] = []  # [n, T] int64 of each stage
        self._stage_masks: list[np.ndarray] = []  # those that the prefill graph gave
        self._next: list[np.ndarray] = []  # [n] position of the next token at each stage
        self._beside: list[np.ndarray] = []  # keys and values [n, G, M, D] of the cross blocks
        self._beside_mask = np.zeros((0, 1), np.int64)  # [n, M]
        self._filled = np.zeros(0, np.int64)  # [n] positions of each row, dropped ones too

    def start(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Logits float32 [n, V] after each prompt. Raises ValueError for placeholders and pictures that do not agree."""
        if not prompts:
            return np.zeros((0, self.vocab_size), np.float32)
        shown = [_pictures_of(prompt, number, self.graphs) for number, prompt in enumerate(prompts)]
        visual = self.graphs.visual([picture for pictures in shown for picture in pictures])
        first = np.cumsum([0, *map(len, shown)])
        rows = [self._row(prompt, visual[first[row] : first[row + 1]]) for row, prompt in enumerate(prompts)]
        self._filled = np.array([len(row.x) for row in rows], np.int64)
        size = int(self._filled.max())
        self._check_room(size)
        x = np.zeros((len(rows), size, self.graphs.shape.width), np.float32)
        mask, position = np.zeros((2, len(rows), size), np.int64)
        picture = np.full((len(rows), size), -1, np.int64)
        for number, row in enumerate(rows):
            place = slice(size - len(row.x), size)
            x[number, place], mask[number, place], picture[number, place] = row.x, 1, row.owner
            position[number, place] = np.arange(len(row.x))
        if self.graphs.shape.drops:
            return self._prefill_reduced(x, mask, position, picture)
        feed: dict[str, np.ndarray] = {"inputs_embeds": x, "attention_mask": mask, "position_ids": position}
        if self.graphs.shape.cross:
            feed |= self._lay_beside(rows, size)
        shape = self.graphs.shape
        empty = Value.ortvalue_from_numpy(np.zeros((len(rows), shape.kv_heads, 0, shape.head_width), np.float32))
        logits = self._run(self.graphs.prefill, feed, [empty] * (2 * shape.layers))
        self._masks, self._next = [mask], [self._filled.copy()]
        return logits

    def advance(self, ids: np.ndarray) -> np.ndarray:
        """One more token a row, int64 [n] -> logits float32 [n, V]. Raises RequestError beyond the model's length."""
        if not len(self._filled):
            raise RuntimeError("the stepper has no rows: call start first")
        self._check_room(int(self._filled.max()) + 1)
        feed = {"inputs_embeds": self.graphs.embed(np.ascontiguousarray(ids, np.int64)[:, None])}
        one = np.ones((len(ids), 1), np.int64)
        self._masks = [np.concatenate([mask, one], axis=1) for mask in self._masks]
        staged = bool(self.graphs.shape.drops)
        for stage, (mask, position) in enumerate(zip(self._masks, self._next)):
            end = f".{stage}" if staged else ""
            feed[f"attention_mask{end}"], feed[f"position_ids{end}"] = mask, position[:, None]
        if self._beside:
            feed |= self._beside_feed(self._beside_mask[:, None])
        logits = self._run(self.graphs.decode, feed, self._cache)
        self._next, self._filled = [position + 1 for position in self._next], self._filled + 1
        return logits

    def reorder(self, index: np.ndarray) -> None:
        """The rows become rows `index` int64 [m]; positions that no row holds any more are given up."""
        self._masks = [mask[index] for mask in self._masks]
        held = [mask.any(axis=0) for mask in self._masks]
        stages = self.graphs.shape.stages
        for number, value in enumerate(self._cache):
            kept = held[stages[number // 2]]
            rows = value.numpy()[index]
            self._cache[number] = Value.ortvalue_from_numpy(rows if kept.all() else np.ascontiguousarray(rows[:, :, kept]))
        self._masks = [mask[:, kept] for mask, kept in zip(self._masks, held)]
        self._next = [position[index] for position in self._next]
        self._filled = self._filled[index]
        if self._beside:
            self._beside, self._beside_mask = [value[index] for value in self._beside], self._beside_mask[index]

    def join(self, other: BundleStepper) -> None:
        """The rows of another stepper of the same bundle come behind its own. Raises RuntimeError before `start` of either."""
        if not len(self._filled) or not len(other._filled):
            raise RuntimeError("a stepper has no rows: call start first")
        for number, (mine, its) in enumerate(zip(self._cache, other._cache, strict=True)):
            self._cache[number] = Value.ortvalue_from_numpy(_joined(mine.numpy(), its.numpy(), 2, right=True))
        self._masks = [_joined(mine, its, 1, right=True) for mine, its in zip(self._masks, other._masks, strict=True)]
        self._next = [np.concatenate(pair) for pair in zip(self._next, other._next, strict=True)]
        self._filled = np.concatenate([self._filled, other._filled])
        self._beside = [_joined(mine, its, 2, right=False) for mine, its in zip(self._beside, other._beside, strict=True)]
        self._beside_mask = _joined(self._beside_mask, other._beside_mask, 1, right=False)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that are held."""
        return sum(value.numpy().nbytes for value in self._cache) + sum(value.nbytes for value in self._beside)

    def _row(self, prompt: Prompt, visual: np.ndarray) -> Laid:
        """The row of a prompt with its visual tokens [k, K, C]."""
        ids = np.asarray(prompt.ids, np.int64)
        if not len(ids):
            raise ValueError("a prompt has no tokens")
        embedded = self.graphs.embed(ids[None])[0]
        placed = ids == self.graphs.image_id if self.graphs.image_id is not None else np.zeros(len(ids), bool)
        if self.graphs.shape.apart:
            return laid_apart(prompt, embedded, placed, visual)
        if self.graphs.shape.cross:
            return laid_beside(prompt, embedded, placed, visual)
        x, owner = expanded(embedded, placed, visual) if placed.any() else (embedded, np.full(len(ids), -1, np.int64))
        return Laid(x, owner, visual[:0, 0], np.zeros((len(x), 0), np.int64))

    def _lay_beside(self, rows: Sequence[Laid], size: int) -> dict[str, np.ndarray]:
        """Keys and values of what stands beside the rows, and which positions see them."""
        shape = self.graphs.shape
        made = self.graphs.cross_keys(np.concatenate([row.tokens for row in rows]))
        most = max(1, max(len(row.tokens) for row in rows))
        self._beside = [np.zeros((len(rows), shape.kv_heads, most, shape.head_width), np.float32) for _ in made]
        self._beside_mask = np.zeros((len(rows), most), np.int64)
        sees = np.zeros((len(rows), size, most), np.int64)
        taken = 0
        for number, row in enumerate(rows):
            count = len(row.tokens)
            for target, given in zip(self._beside, made):
                target[number, :, :count] = given[taken : taken + count].transpose(1, 0, 2)
            self._beside_mask[number, :count] = 1
            sees[number, size - len(row.x) :, :count] = row.sees
            taken += count
        return self._beside_feed(sees)

    def _beside_feed(self, sees: np.ndarray) -> dict[str, np.ndarray]:
        return {"cross_mask": sees, **dict(zip(self.graphs.shape.cross_names, self._beside))}

    def _prefill_reduced(self, x: np.ndarray, mask: np.ndarray, position: np.ndarray, picture: np.ndarray) -> np.ndarray:
        feed = {"inputs_embeds": x, "attention_mask": mask, "position_ids": position, "picture_ids": picture}
        drops = self.graphs.shape.drops
        for number, count in enumerate(drops.values(), start=1):
            feed[f"kept.{number}"] = np.arange(most_kept(mask, picture, count), dtype=np.int64)
        masks = [f"present_mask.{number}" for number in range(1, len(drops) + 1)]
        logits = self._run(self.graphs.prefill, feed, None, masks)
        self._masks = [mask, *self._stage_masks]
        # Kept as they were, positions go on after the last one, which is never dropped.
        self._next = [m.sum(axis=1) if self.graphs.shape.renumber else self._filled.copy() for m in self._masks]
        return logits

    def _run(
        self, graph: onnxruntime.InferenceSession, feed: dict[str, np.ndarray], past: list[Value] | None, more: Sequence[str] = ()
    ) -> np.ndarray:
        """Logits; the cache is what the graph gives. The values go from call to call without a copy."""
        shape = self.graphs.shape
        names = ["logits", *shape.cache("present"), *more]
        given = {name: Value.ortvalue_from_numpy(np.ascontiguousarray(value)) for name, value in feed.items()}
        if past is not None:
            given |= dict(zip(shape.cache("past_key_values"), past))
        logits, *values = graph.run_with_ort_values(names, given)
        self._cache, rest = values[: 2 * shape.layers], values[2 * shape.layers :]
        self._stage_masks = [value.numpy() for value in rest]
        out: np.ndarray = logits.numpy()
        return out

    def _check_room(self, positions: int) -> None:
        if positions > self.graphs.length:
            raise RequestError(f"{positions} positions, but the model has {self.graphs.length} for prompt and answer together")


def _joined(one: np.ndarray, other: np.ndarray, axis: int, *, right: bool) -> np.ndarray:
    """The rows of both, the shorter along `axis` padded by zeros; right: what they hold ends in one place."""
    size = max(one.shape[axis], other.shape[axis])
    out = np.zeros((len(one) + len(other), *one.shape[1:axis], size, *one.shape[axis + 1 :]), one.dtype)
    for rows, part in ((slice(len(one)), one), (slice(len(one), None), other)):
        own = part.shape[axis]
        place = slice(size - own, size) if right else slice(own)
        out[(rows, *[slice(None)] * (axis - 1), place)] = part
    return out


def most_kept(mask: np.ndarray, picture: np.ndarray, count: int) -> int:
    """The most positions of any row [n, S] when each picture keeps `count`: text, and all of pictures that no text follows."""
    place = np.arange(mask.shape[1])
    text = (mask > 0) & (picture < 0)
    last = np.where(text, place, -1).max(axis=1, initial=-1)
    most = 1
    for row in range(len(mask)):
        judged = picture[row, (picture[row] >= 0) & (place < last[row])]
        dropped = sum(max(0, int(size) - count) for size in np.unique(judged, return_counts=True)[1])
        most = max(most, int(mask[row].sum()) - dropped)
    return most


def _pictures_of(prompt: Prompt, number: int, graphs: DecoderGraphs) -> list[dict[str, np.ndarray]]:
    """The pictures of a prompt, each by stream. Raises ValueError unless there is one for each placeholder."""
    wanted = 0 if graphs.image_id is None else sum(token == graphs.image_id for token in prompt.ids)
    counts = {stream: len(prompt.pictures.get(stream, ())) for stream in graphs.pixels}
    strange = set(prompt.pictures) - set(graphs.pixels)
    if strange:
        raise ValueError(f"prompt {number}: the model reads no pictures {min(strange)!r}")
    for stream, count in counts.items():
        if count != wanted:
            raise ValueError(f"prompt {number}: {wanted} picture placeholders, {count} pictures in {stream!r}")
    return [{stream: prompt.pictures[stream][i] for stream in graphs.pixels} for i in range(wanted)] if counts else []
