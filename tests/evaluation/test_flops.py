"""The formula of operations against torch's own count of what a trunk does."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlm.evaluation.flops import (
    GeneratorShape,
    TowerShape,
    TrunkShape,
    cache_bytes,
    generator_flops,
    layer_flops,
    prefill_flops,
    step_flops,
    tower_flops,
)
from vlm.layers import Trunk, TrunkOptions
from vlm.models.decoder import run_decoder
from vlm.models.trunks import trunk_of
from vlm.ops.backend import backend
from vlm.types import Layout

TRUNKS = [
    {"width": 24, "depth": 3, "heads": 4, "ffn_width": 40},
    {"width": 24, "depth": 2, "heads": 6, "kv_heads": 2, "ffn_width": 56, "ffn": "gated", "bias": False, "norm": "rmsnorm"},
    {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "head_width": 12, "ffn_width": 31, "rope_theta": 100.0},
]


def counted(model, *inputs, **given):
    # torch counts the matrix products of attention, but not its fused kernel of the CPU.
    with backend("torch"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs, **given)
    return counter.get_total_flops()


@pytest.mark.parametrize("settings", TRUNKS)
@pytest.mark.parametrize("positions", [1, 2, 13])
def test_pyramiddrop_operations_of_a_trunk_are_what_torch_counts(settings, positions):
    options = TrunkOptions(**settings)
    expected = counted(Trunk(options), torch.randn(1, positions, options.width), causal=True)
    assert prefill_flops(TrunkShape.of(options), [positions] * options.depth) == expected > 0


@pytest.mark.parametrize("settings", TRUNKS)
def test_operations_of_new_queries_over_a_context_are_what_torch_counts(settings):
    options = TrunkOptions(**settings)
    block = Trunk(options).blocks[0]
    queries, keys = 1, 9
    x, context = torch.randn(1, queries, options.width), torch.randn(1, keys, options.width)
    attention = counted(block.attention, x, context=context)
    # With a cache only the new positions are projected to keys and values.
    shape = TrunkShape.of(options)
    again = 4 * (keys - queries) * shape.width * shape.kv_heads * shape.head_width
    feed_forward = counted(block.ffn, x)
    assert layer_flops(shape, queries, keys) == attention - again + feed_forward


def test_pyramiddrop_cost_follows_the_positions_that_each_layer_keeps():
    shape = TrunkShape(8, 4, 2, 2, 4, 16)
    full, dropped = prefill_flops(shape, [64] * 4), prefill_flops(shape, [64, 32, 16, 8])
    assert dropped == sum(layer_flops(shape, n, n) for n in (64, 32, 16, 8)) < full
    # 2 matrices of 2 heads of 4, float32, at 120 positions in all.
    assert cache_bytes(shape, [64, 32, 16, 8]) == 2 * 8 * 120 * 4
    assert cache_bytes(shape, [5] * 4, 2) == 2 * 8 * 20 * 2
    with pytest.raises(ValueError, match="2 numbers of positions for 4 layers"):
        prefill_flops(shape, [1, 2])


def test_a_whole_model_by_hand():
    shape = TrunkShape(2, 1, 1, 1, 2, 3)
    # n = 1: projections 2*1*2*2*4 = 32, attention 4*1*1*2 = 8, feed-forward 4*1*2*3 = 24.
    assert layer_flops(shape, 1, 1) == 64
    tower = TowerShape(shape, 1, 12, connector=4)
    assert tower_flops(tower, 3) == 2 * 12 * 2 + 64 + 2 * 3 * 4
    model = GeneratorShape({"decoder": 1}, {"image": tower}, {"image": 3}, shape, 10)
    found = generator_flops(model, {"image": 2, "image.other": 1}, [1])
    assert found == {"vision": 2 * 136, "decoder": 64 + 40, "total": 272 + 104}
    assert step_flops(shape, [0], 10) == 64 + 40


def test_core_tome_merged_tokens_are_not_counted_in_what_comes_after():
    trunk = TrunkShape(width=8, depth=2, heads=2, kv_heads=2, head_width=4, ffn_width=32)
    whole, short = TowerShape(trunk, 17, 12), TowerShape(trunk, 17, 12, pairs=(8, 4))
    patches, feed_forward = 2 * 17 * 12 * 8, 4 * 8 * 32
    attention = [2 * n * 8 * 4 * 8 + 4 * n * n * 8 for n in (17, 9)]
    assert tower_flops(short, 0) == patches + sum(attention) + feed_forward * (9 + 5)
    assert tower_flops(whole, 0) == tower_flops(TowerShape(trunk, 17, 12, pairs=(0, 0)), 0) > tower_flops(short, 0)


MIXERS = [
    {"kind": "linear-decay"},
    {"kind": "linear-decay", "gate": False, "lrpe": (0, 2)},
    {"kind": "ssm", "states": 5, "expand": 3, "convolution": 4},
]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("positions", [1, 2, 13])
def test_operations_of_a_recurrent_trunk_are_its_projections_and_its_recurrence(mixer, positions):
    options = TrunkOptions(width=24, depth=3, heads=6, kv_heads=2, ffn_width=40, ffn="gated", bias=False, mixer=mixer)
    trunk, shape = trunk_of(options), TrunkShape.of(options)
    # Every position passes every matrix once; what is left is the recurrence, by hand.
    matrices = sum(2 * module.weight.numel() for module in trunk.modules() if isinstance(module, torch.nn.Linear))
    if mixer["kind"] == "ssm":
        recurrence = 3 * (2 * 72 * 4 + 6 * 72 * 5)
    else:
        recurrence = sum(6 * (2 + 2) * 4 * (8 if layer in mixer.get("lrpe", (0,)) else 4) for layer in range(3))
    assert prefill_flops(shape, [positions] * 3) == positions * (matrices + recurrence)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_recurrent_step_costs_the_same_after_any_number_of_tokens(mixer):
    options = TrunkOptions(width=24, depth=3, heads=6, kv_heads=2, ffn_width=40, mixer=mixer)
    shape = TrunkShape.of(options)
    assert step_flops(shape, [0] * 3, 10) == step_flops(shape, [10**6] * 3, 10) == prefill_flops(shape, [1] * 3) + 2 * 24 * 10
    x = torch.randn(1, 7, 24)
    layout = Layout.of_tokens(torch.zeros(1, 7, dtype=torch.int64), torch.ones(1, 7, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    kept = run_decoder(trunk_of(options), x, layout, keep_cache=True).cache
    assert cache_bytes(shape, [7] * 3) == kept.bytes
    assert cache_bytes(shape, [700] * 3) == kept.bytes


def test_core_hip_a_step_over_chosen_keys_costs_no_more_than_the_budget():
    table = dict(width=24, depth=2, heads=6, ffn_width=40)
    full = TrunkShape.of(TrunkOptions(**table))
    few = TrunkShape.of(TrunkOptions(**table, attention={"kind": "windowed", "window": 30, "sinks": 2}))
    assert step_flops(few, [31] * 2, 10) == step_flops(full, [31] * 2, 10)
    assert step_flops(few, [900] * 2, 10) == step_flops(full, [31] * 2, 10)
    chosen = TrunkShape.of(TrunkOptions(**table, attention={"kind": "hierarchical", "k": 16, "block_q": 4, "window": 8, "sinks": 2}))
    assert step_flops(chosen, [900] * 2, 10) == step_flops(full, [33] * 2, 10)
