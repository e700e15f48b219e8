"""Operations and memory of a model that reads pictures and writes, counted from shapes.

One floating-point multiplication with its addition is 2 operations. Norms, activations, softmax and additions are
left out: they are below a hundredth of a transformer's work. C width, H query heads, G key/value heads, D head
width, F hidden width, V vocabulary. Source: pyramiddrop (cost by the positions that each layer keeps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.attention import seen_keys
from vlm.attention.mixer import MixerCost, MixerShape


@dataclass(frozen=True)
class TrunkShape:
    """A stack of transformer blocks. gated: the feed-forward layer has three matrices, not two. mixers: by layer, of a
    recurrent layer in place of attention; () for none. attention: of which keys queries see, None for all."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    gated: bool = False
    mixers: tuple[MixerCost, ...] = ()
    attention: Any = None

    @classmethod
    def of(cls, options: Any) -> TrunkShape:
        """From a trunk's options (`width`, `depth`, `heads`, `kv_heads`, `head_width`, `ffn_width`, `ffn`, `mixer`, `attention`)."""
        kv_heads, head_width = options.kv_heads or options.heads, options.head_width or options.width // options.heads
        mixers = () if options.mixer is None else tuple(
            options.mixer.cost(MixerShape(options.width, options.heads, kv_heads, head_width, layer, options.depth, options.norm_eps))
            for layer in range(options.depth)
        )
        return cls(
            options.width,
            options.depth,
            options.heads,
            kv_heads,
            head_width,
            options.ffn_width,
            options.ffn == "gated",
            mixers,
            options.attention,
        )


@dataclass(frozen=True)
class TowerShape:
    """What turns one picture into visual tokens: patches of `patch_values` numbers, a trunk over `positions` of them.

    connector: parameters in the matrices of the connector that every visual token passes. pairs: of tokens that become one
    between attention and feed-forward layer, by block; () for none.
    """

    trunk: TrunkShape
    positions: int
    patch_values: int
    connector: int = 0
    pairs: tuple[int, ...] = ()


@dataclass(frozen=True)
class GeneratorShape:
    """parameters: of each part; towers: by picture stream; visual_tokens: of one picture of each stream;
    cache_bytes_per_value: 4 for float32."""

    parameters: Mapping[str, int]
    towers: Mapping[str, TowerShape]
    visual_tokens: Mapping[str, int]
    decoder: TrunkShape
    vocab_size: int
    cache_bytes_per_value: int = 4


def layer_flops(shape: TrunkShape, queries: int, keys: int, layer: int = 0) -> int:
    """Operations of one block on `queries` new positions that attend `keys` positions in all, n and m below.

    Projections 2 n C D (2 H + 2 G), attention 4 n m H D (causally masked pairs are counted: a kernel may skip
    them), feed-forward 4 n C F, gated 6 n C F. Of attention to chosen keys m is the most that a query sees; finding them is
    not counted. A recurrent layer takes the same for every position, however many came before: n times its mixer's cost.
    """
    if shape.mixers:
        return queries * shape.mixers[layer].flops + _feed_forward(shape, queries)
    keys = seen_keys(shape.attention, keys)
    projections = 2 * queries * shape.width * shape.head_width * 2 * (shape.heads + shape.kv_heads)
    attention = 4 * queries * keys * shape.heads * shape.head_width
    return projections + attention + _feed_forward(shape, queries)


def _feed_forward(shape: TrunkShape, positions: int) -> int:
    return (6 if shape.gated else 4) * positions * shape.width * shape.ffn_width


def prefill_flops(shape: TrunkShape, positions: Sequence[int]) -> int:
    """Operations of a stack whose l-th block reads positions[l] positions. Raises ValueError unless there are
    `depth` of them."""
    if len(positions) != shape.depth:
        raise ValueError(f"{len(positions)} numbers of positions for {shape.depth} layers")
    return sum(layer_flops(shape, n, n, layer) for layer, n in enumerate(positions))


def step_flops(shape: TrunkShape, cached: Sequence[int], vocab_size: int) -> int:
    """Operations of one new token over cached[l] earlier positions of block l, the vocabulary's logits included."""
    return sum(layer_flops(shape, 1, n + 1, layer) for layer, n in enumerate(cached)) + 2 * shape.width * vocab_size


def tower_flops(shape: TowerShape, visual_tokens: int) -> int:
    """Operations of one picture: patches, trunk, connector."""
    patches = 2 * shape.positions * shape.patch_values * shape.trunk.width
    pairs = shape.pairs or (0,) * shape.trunk.depth
    left = [shape.positions - sum(pairs[:layer]) for layer in range(shape.trunk.depth)]
    trunk = prefill_flops(shape.trunk, left) - sum(_feed_forward(shape.trunk, r) for r in pairs[: shape.trunk.depth])
    return patches + trunk + 2 * visual_tokens * shape.connector


def generator_flops(shape: GeneratorShape, pictures: Mapping[str, int], positions: Sequence[int]) -> dict[str, int]:
    """Operations from pixels to the first token's logits: `vision` (pictures of each stream), `decoder` (layers over
    positions[l] positions and the logits of the last one), `total`."""
    vision = sum(
        count * tower_flops(shape.towers[name], shape.visual_tokens.get(name, 0))
        for name, count in pictures.items()
        if name in shape.towers
    )
    decoder = prefill_flops(shape.decoder, positions) + 2 * shape.decoder.width * shape.vocab_size
    return {"vision": vision, "decoder": decoder, "total": vision + decoder}


def cache_bytes(shape: TrunkShape, positions: Sequence[int], bytes_per_value: int = 4) -> int:
    """Keys and values of positions[l] positions at each layer l; of recurrent layers the states, whatever was read.

    A block memory keeps a little more: scores and representatives.
    """
    if shape.mixers:
        return sum(mixer.state for mixer in shape.mixers) * bytes_per_value
    return 2 * shape.kv_heads * shape.head_width * sum(positions) * bytes_per_value
