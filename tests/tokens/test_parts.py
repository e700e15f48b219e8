"""Scores, selection and schedules of token reduction put together: every one decodes as it reads anew."""

from itertools import pairwise

import pytest
import torch

from tests.models.model_makers import logits_of
from tests.tokens.rows import batch, check_cached_decoding, equal_bits, kept, reducing
from vlm.tokens.score_options import random_order, uniform_order

SCORES = [
    {"kind": "attention-from-rows", "norm": "next-layer"},
    {"kind": "attention-from-rows", "norm": "previous-layer"},
    {"kind": "attention-received", "norm": "previous-layer"},
    {"kind": "attention-received", "norm": "next-layer"},
    {"kind": "pagerank", "damping": 0.2, "temperature": 1.0},
    {"kind": "norm"},
    {"kind": "norm", "best": "smallest"},
    {"kind": "random", "seed": 3},
    {"kind": "uniform"},
]
KEEPS = [
    {"kind": "constant", "ratio": 0.4},
    {"kind": "one-cut", "after": 2, "ratio": 0.25},
    {"kind": "stages", "layers": [1, 3], "ratios": [0.5, 0.1]},
    {"kind": "linear", "start": 2, "step": 0.4},
    {"kind": "sigmoid", "k": 1.0, "budget": 0.6},
    {"kind": "table", "ratios": [1, 0.8, 0.8, 0.1], "min_tokens": 3},
]


@pytest.mark.parametrize("score", SCORES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("positions", ["renumber", "keep"])
@torch.no_grad()
def test_core_select_every_score_decodes_with_a_cache_as_without(score, positions):
    tokens = {"score": score, "apply": {"positions": positions}, "keep": {"kind": "stages", "layers": [1, 3], "ratios": [0.5, 0.2]}}
    lengths = check_cached_decoding(reducing(tokens), steps=3)
    assert lengths == [[20, 4, 36, 18], [12, 4, 20, 10], [12, 4, 20, 10], [7, 4, 10, 5]]


@pytest.mark.parametrize("keep", KEEPS, ids=lambda k: k["kind"])
@torch.no_grad()
def test_core_select_every_schedule_gives_caches_of_its_lengths(keep):
    model = reducing({"keep": keep, "score": {"kind": "attention-received"}})
    plan = model.options.tokens.plan(4).read(16, 4)
    assert plan == sorted(plan, reverse=True)
    assert check_cached_decoding(model, steps=3) == [[4 + n, 4, 4 + 2 * n, 2 + n] for n in plan]


@pytest.mark.parametrize("score", SCORES, ids=lambda s: "-".join(map(str, s.values())))
@torch.no_grad()
def test_core_select_a_share_of_1_is_the_unmodified_model_bit_for_bit(score):
    assert equal_bits(reducing({"score": score, "keep": {"kind": "stages", "layers": [1, 2], "ratios": [1.0, 1.0]}}), reducing(None))


@torch.no_grad()
def test_core_select_kept_sets_are_nested_and_ragged_batches_are_their_rows():
    model = reducing({"keep": {"kind": "linear", "start": 1, "step": 0.25}, "score": {"kind": "pagerank"}})
    output = model.encode(batch(), {"text": frozenset({f"hidden:{layer}" for layer in range(5)})})["text"]
    sets = [kept(output.layout_of(layer)) for layer in range(1, 5)]
    for early, late in pairwise(sets):
        for row in range(4):
            assert set(late[row]) <= set(early[row])
            assert late[row] == sorted(late[row])


@pytest.mark.parametrize("keep", [{"kind": "sigmoid", "k": 1.0, "budget": 0.6}, {"kind": "table", "ratios": [1, 0.7, 0.4, 0.2]}],
                         ids=["sigmoid", "table"])  # fmt: skip
@torch.no_grad()
def test_vision_token_search_kept_sets_are_nested_and_keep_their_positions(keep):
    model = reducing({"keep": keep, "score": {"kind": "attention-from-rows", "norm": "previous-layer"}, "apply": {"positions": "keep"}})
    output = model.encode(batch(), {"text": frozenset({f"hidden:{layer}" for layer in range(5)})})["text"]
    layouts = [output.layout_of(layer) for layer in range(1, 5)]
    sets = [kept(layout) for layout in layouts]
    assert len(sets[0][0]) > len(sets[-1][0])
    for early, late in pairwise(sets):
        for row in range(4):
            assert set(late[row]) <= set(early[row])
    for layout, own in zip(layouts, sets):
        for row in range(4):
            assert layout.position[row, layout.mask[row]].tolist() == own[row]  # rotary positions are those of before


@torch.no_grad()
def test_core_select_a_threshold_keeps_another_number_of_every_picture():
    pre = [{"score": {"kind": "norm"}, "select": {"kind": "threshold", "times": 1.05}}]
    model = reducing({"pre": pre})
    pixels = batch()["image"].values
    tokens, mask = model.visual_tokens({"main": model.pixel_norms["main"](pixels)})
    whole = reducing(None).visual_tokens({"main": model.pixel_norms["main"](pixels)})[0]
    length = whole.norm(dim=-1)
    for picture in range(len(pixels)):
        expected = whole[picture][length[picture] >= 1.05 * length[picture].mean()]
        assert torch.allclose(tokens[picture][mask[picture]], expected, atol=1e-6)
    assert len(set(mask.sum(1).tolist())) > 1
    check_cached_decoding(model, steps=3)
    select = {"kind": "threshold", "times": 1.0}
    inside = reducing({"keep": {"kind": "constant", "ratio": 0.75}, "select": select, "score": {"kind": "norm"}})
    check_cached_decoding(inside, steps=3)
    layout = logits_of(inside, batch())[1]
    counts = [int(((layout.picture[row] == p) & layout.mask[row]).sum()) for row, p in ((0, 0), (2, 1), (2, 2), (3, 3))]
    assert all(0 < count <= 12 for count in counts)
    assert len(set(counts)) > 1


def test_core_select_uniform_places_are_spread_and_random_ones_drawn():
    number = torch.arange(16)
    order = uniform_order(number)
    for count in (1, 2, 4, 8):
        assert order.topk(count).indices.sort().values.tolist() == list(range(0, 16, 16 // count))
    assert sorted(uniform_order(torch.arange(10)).argsort(descending=True).tolist()) == list(range(10))
    assert torch.equal(random_order(number, 1), random_order(number, 1))
    assert not torch.equal(random_order(number, 1).argsort(), random_order(number, 2).argsort())
    assert len(set(random_order(torch.arange(1000), 0).tolist())) == 1000
