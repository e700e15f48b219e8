"""Scores, selection and schedules of token reduction put together: every one decodes as it reads anew."""

from itertools import pairwise

import pytest
import torch

from tests.models.model_makers import logits_of
from tests.tokens.rows import batch, check_cached_decoding, equal_bits, kept, reducing
from vlm.tokens.score_options import SimilarityToTextOptions, View, grid_order, random_order, uniform_order

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
    {"kind": "uniform-grid", "columns": 4},
    {"kind": "similarity-to-text"},
    {"kind": "similarity-to-text", "reduce": "max"},
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


@pytest.mark.parametrize(("side", "keep", "places"), [(8, 4, (0, 4)), (8, 16, (0, 2, 4, 6)), (4, 4, (0, 2)), (8, 1, (0,))])
def test_core_select_uniform_grid_places_are_a_grid(side, keep, places):
    chosen = grid_order(torch.arange(side * side), side).topk(keep).indices.sort().values
    assert chosen.tolist() == [row * side + column for row in places for column in places]
    odd = grid_order(torch.arange(35), 7)
    assert sorted(odd.argsort(descending=True).tolist()) == list(range(35))
    assert len(set(odd.tolist())) == 35


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_core_select_similarity_to_text_is_the_cosine_with_text_of_the_prompt(reduce):
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    text = torch.tensor([[1, 0, 0, 1, 1, 0, 0], [0] * 7]).bool()
    scope = torch.tensor([[1, 1, 1, 1, 0, 1, 0], [1] * 7]).bool()
    x[0, 4] = x[0, 6] = torch.nan  # beyond the prompt: never read
    view = View(x, x, None, None, None, scope, torch.arange(7).expand(2, 7), text)
    got = SimilarityToTextOptions(reduce=reduce).score(view)
    for place in (1, 2, 5):
        cosines = [float(torch.cosine_similarity(x[0, place], x[0, said], dim=0)) for said in (0, 3)]
        expected = sum(cosines) / 2 if reduce == "mean" else max(cosines)
        assert abs(float(got[0, place]) - expected) < 1e-6
    assert torch.equal(got[1], torch.zeros(7))  # a row without text


@torch.no_grad()
def test_core_select_fastv_is_one_cut_by_the_attention_of_the_last_text_in_the_layer_before():
    tokens = {"score": {"kind": "attention-from-rows", "norm": "previous-layer"}, "keep": {"kind": "one-cut", "after": 2, "ratio": 0.25}}
    model, whole = reducing(tokens), reducing(None)
    given = batch()
    layers = model.encode(given, {"text": frozenset({"hidden:1", "hidden:2", "hidden:3"})})["text"]
    full = whole.encode(given, {"text": frozenset({"hidden:1"})})["text"]
    x, layout, block = full.hidden[1], full.layout_of(1), whole.language.trunk.blocks[1]
    y, rotary = block.norm1(x), whole.language.trunk.rotary(layout.position)
    q, k = block.attention.queries(y, rotary), block.attention.keys(y, rotary).repeat_interleave(2, 1)
    row = 0  # 2, 5, 16 visual positions, 6, 7, then its answer: the last position of the instruction asks
    asks = 2 + 16 + 1
    logits = (q[row, :, asks] * k[row, :, : asks + 1].transpose(0, 1)).sum(-1).T * block.attention.head_width**-0.5
    received = logits.softmax(-1).mean(0)[2:18]
    best = (2 + received.topk(4).indices).sort().values.tolist()
    cut = layers.layout_of(3)
    stays = cut.kept[row][cut.mask[row] & (cut.picture[row] >= 0)].tolist()
    assert stays == best
    assert [int((layers.layout_of(n).picture[row] >= 0).sum()) for n in (1, 2, 3)] == [16, 16, 4]
