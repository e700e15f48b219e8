"""The graphs of a decoder and the description that bundle.json gives of them.

n rows, s new positions, C width, V vocabulary, G key and value heads, D head width, K visual tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config.errors import CheckpointError
from vlm.runtime.manifest import MANIFEST, REMEDY, Manifest
from vlm.runtime.session import open_graph

MOST_LAYERS = 4096
PICTURES_AT_ONCE = 16


@dataclass(frozen=True)
class DecoderShape:
    """What the graphs do not say of themselves.

    layers, width C, kv_heads G, head_width D; cross: the layers after which a cross block stands; drops: layer after which
    visual positions are dropped -> how many a picture keeps; renumber: positions are counted anew after a drop. apart: only thumbnails
    stand in the row; tiles and their tags stand beside it.
    """

    layers: int
    width: int
    kv_heads: int
    head_width: int
    cross: tuple[int, ...] = ()
    drops: Mapping[int, int] = field(default_factory=dict)
    renumber: bool = True
    apart: bool = False

    @classmethod
    def of(cls, data: Any, where: str) -> DecoderShape:
        """From the table `decoder` of bundle.json. Raises CheckpointError."""
        try:
            numbers = {name: data[name] for name in ("layers", "width", "kv_heads", "head_width")}
            if any(type(number) is not int for number in numbers.values()):
                raise TypeError("layers, width, kv_heads and head_width are whole numbers")
            cross = tuple(int(layer) for layer in data.get("cross", ()))
            drops = {int(layer): count for layer, count in sorted(data.get("drops", {}).items(), key=lambda d: int(d[0]))}
            if any(type(count) is not int for count in drops.values()):
                raise TypeError("drops are whole numbers")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the table decoder is missing or wrong: {error!r}", where=where, remedy=REMEDY) from error
        layers = numbers["layers"]
        inside = all(1 <= layer <= layers for layer in cross) and all(1 <= layer < layers and n >= 0 for layer, n in drops.items())
        if min(numbers.values()) < 1 or layers > MOST_LAYERS or not inside:
            raise CheckpointError("the table decoder has a number out of its range", where=where, remedy=REMEDY)
        return cls(**numbers, cross=cross, drops=drops, renumber=bool(data.get("renumber", True)), apart=bool(data.get("apart", False)))

    @property
    def stages(self) -> list[int]:
        """The stage of each layer: how many drops come before it."""
        return [sum(layer > drop for drop in self.drops) for layer in range(1, self.layers + 1)]

    def cache(self, prefix: str) -> list[str]:
        """prefix.0.key, prefix.0.value, prefix.1.key, ..."""
        return [f"{prefix}.{layer}.{kind}" for layer in range(self.layers) for kind in ("key", "value")]

    @property
    def cross_names(self) -> list[str]:
        """cross.LAYER.key, cross.LAYER.value of each cross block."""
        return [f"cross.{layer}.{kind}" for layer in self.cross for kind in ("key", "value")]


class DecoderGraphs:
    """The sessions of a bundle that writes, shared by all its steppers."""

    def __init__(
        self, directory: Path, manifest: Manifest, decoder: str, *, pixels: Mapping[str, str], tokens: int,
        image_id: int | None, length: int, vocab_size: int, threads: int | None, providers: Sequence[str],
    ) -> None:  # fmt: skip
        """decoder: its graph, where nothing is dropped. pixels: picture stream -> input of the vision graph; tokens: K."""
        where = str(directory / MANIFEST)
        self.shape = DecoderShape.of(manifest.data.get("decoder"), where)
        self.pixels, self.tokens, self.image_id = dict(pixels), tokens, image_id
        self.length, self.vocab_size = length, vocab_size

        def opened(name: str) -> Any:
            return open_graph(directory, manifest, name, threads, providers)

        self._embed = opened("embed")
        self._vision = opened("vision") if pixels else None
        self._cross = opened("cross") if self.shape.cross else None
        self.prefill = opened("prefill" if self.shape.drops else decoder)
        self.decode = opened("decode") if self.shape.drops else self.prefill
        caches = {"past_key_values": self.decode.get_inputs(), "present": self.prefill.get_outputs()}
        for prefix, values in caches.items():
            missing = set(self.shape.cache(prefix)) - {value.name for value in values}
            if missing:
                raise CheckpointError(f"the decoder's graph has no {min(missing)}", where=where, remedy=REMEDY)
        self._check_shape(where)

    def _check_shape(self, where: str) -> None:
        """What bundle.json says of keys and values is what the graph wants. Raises CheckpointError."""
        shape = self.shape
        inputs = {value.name: value.shape for value in self.decode.get_inputs()}
        more = [name for name in inputs if name.startswith("past_key_values.") and name not in shape.cache("past_key_values")]
        if more:
            raise CheckpointError(f"decoder.layers is {shape.layers}, but the graph has {more[0]}", where=where, remedy=REMEDY)
        wanted = {"past_key_values.0.key": {1: shape.kv_heads, 3: shape.head_width}, "inputs_embeds": {2: shape.width}}
        for name, sides in wanted.items():
            for axis, side in sides.items():
                own = inputs.get(name, [])
                if len(own) > axis and isinstance(own[axis], int) and own[axis] != side:
                    raise CheckpointError(f"the decoder's {name} is {own}, bundle.json says {side} in place {axis}", where=where, remedy=REMEDY)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n, s] -> float32 [n, s, C]. Raises ValueError for an id that the model lacks: the graph would not."""
        if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise ValueError(f"a token id is outside the vocabulary of {self.vocab_size}")
        out: np.ndarray = self._embed.run(["inputs_embeds"], {"input_ids": ids})[0]
        return out

    def visual(self, pictures: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
        """Prepared pictures, each by stream, to visual tokens float32 [n, K, C]."""
        parts = [np.zeros((0, self.tokens, self.shape.width), np.float32)]
        for start in range(0, len(pictures), PICTURES_AT_ONCE):
            chosen = pictures[start : start + PICTURES_AT_ONCE]
            feed = {name: np.stack([picture[stream] for picture in chosen]) for stream, name in self.pixels.items()}
            assert self._vision is not None
            parts.append(self._vision.run(["visual_tokens"], feed)[0])
        return np.concatenate(parts)

    def cross_keys(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Tokens [m, C] to the keys and values [m, G, D] of each cross block, in order of `cross_names`."""
        if not len(tokens):
            return [np.zeros((0, self.shape.kv_heads, self.shape.head_width), np.float32)] * len(self.shape.cross_names)
        assert self._cross is not None
        # The graph reads K tokens at a time, each by itself.
        groups = -(-len(tokens) // self.tokens)
        filled = np.zeros((groups * self.tokens, tokens.shape[1]), np.float32)
        filled[: len(tokens)] = tokens
        made = self._cross.run(self.shape.cross_names, {"visual_tokens": filled.reshape(groups, self.tokens, -1)})
        flat = [value.transpose(0, 2, 1, 3).reshape(-1, self.shape.kv_heads, self.shape.head_width) for value in made]
        return [value[: len(tokens)] for value in flat]
