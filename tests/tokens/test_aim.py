"""AIM in the model: merged before the decoder, pruned inside it by a short walk along the attention."""

from dataclasses import replace
from itertools import chain

import pytest
import torch

from tests.models.model_makers import batch_of, logits_of, pictures_of, rows_of
from tests.tokens.oracle import probabilities, walk
from tests.tokens.rows import (
    ANSWER,
    ANSWERS,
    INSTRUCTION,
    PROMPTS,
    asked,
    batch,
    check_cached_decoding,
    equal_bits,
    kept,
    pictures,
    reducing,
)
from vlm.tokens.merging import merge_down
from vlm.types.layout import Modality

PRE = [{"select": {"kind": "bipartite", "keep": 0.5}, "apply": {"kind": "merge", "weighting": "mean"}}]


def table(step=0.25, start=1, pre=(), positions="keep", **score):
    return {
        "pre": list(pre),
        "score": {"kind": "pagerank", **score},
        "apply": {"positions": positions},
        "keep": {"kind": "linear", "start": start, "step": step},
    }


@torch.no_grad()
def test_aim_importance_of_one_step_is_the_root_mean_square_of_column_means():
    for norm, layer in (("previous-layer", 0), ("next-layer", 1)):
        model = reducing(table(iterations=1, temperature=1.0, norm=norm))
        output = model.encode(batch(), {"text": frozenset({"hidden:0", "hidden:1", "hidden:2"})})["text"]
        x, before = output.hidden[layer], output.layout_of(1)
        block = model.language.trunk.blocks[layer]
        for row in range(4):
            last = int(before.mask[row].sum()) - [3, 1, 2, 4][row]  # without the answer
            rotary = model.language.trunk.rotary(before.position[row : row + 1, :last])
            y = block.norm1(x[row : row + 1, :last])
            p = probabilities(block.attention.queries(y, rotary), block.attention.keys(y, rotary), causal=True)
            score = p.mean(2)[0].square().mean(0).sqrt()
            expected = [place for place in range(int(before.mask[row].sum())) if before.picture[row, place] < 0]
            for picture in before.picture[row].unique().tolist():
                if picture >= 0:
                    places = (before.picture[row] == picture).nonzero()[:, 0]
                    expected += places[score[places].argsort(descending=True, stable=True)[:12]].tolist()
            assert kept(output.layout_of(2))[row] == sorted(expected)


@torch.no_grad()
def test_aim_the_walk_of_padded_rows_is_that_of_each_row():
    model = reducing(table(iterations=5, temperature=0.1))
    told = kept(logits_of(model, batch())[1])
    for side, extra in (("left", 0), ("right", 3), ("left", 2)):
        moved = kept(logits_of(model, batch(asked(4, side=side, extra=extra)))[1])
        assert moved == told


@torch.no_grad()
def test_aim_packed_documents_drop_what_rows_drop():
    for score in ({"kind": "pagerank"}, {"kind": "attention-received"}):
        model = reducing(table() | {"score": score})
        apart, layout = logits_of(model, batch())
        rows = [p + a for p, a in zip(PROMPTS, ANSWERS)]
        roles = [[INSTRUCTION] * len(p) + [ANSWER] * len(a) for p, a in zip(PROMPTS, ANSWERS)]
        joined = rows_of([list(chain(*rows))], role=[list(chain(*roles))])
        segment = torch.tensor([list(chain(*([number] * len(row) for number, row in enumerate(rows))))])
        one = pictures()
        one = replace(one, sample_index=one.sample_index * 0, slot=torch.arange(len(one)))
        packed, own = logits_of(model, batch_of(1, text=replace(joined, segment=segment), image=one))
        expected = torch.cat([apart[row, layout.mask[row]] for row in range(4)])
        assert torch.allclose(packed[0, own.mask[0]], expected, atol=1e-5)


@torch.no_grad()
def test_aim_shares_fall_from_the_original_count_until_none_is_left():
    model = reducing(table(step=0.375, start=2))
    output = model.encode(batch(), {"text": frozenset({f"hidden:{layer}" for layer in range(5)})})["text"]
    for layer, count in ((1, 16), (2, 16), (3, 10), (4, 4)):
        layout = output.layout_of(layer)
        pictured = layout.picture[0, layout.mask[0]]
        assert int((pictured >= 0).sum()) == count
    gone = reducing(table(step=0.5))
    layout = logits_of(gone, batch())[1]
    assert not (layout.modality[layout.mask] == int(Modality.IMAGE)).any()
    assert [int(n) for n in layout.mask.sum(1)] == [len(p) - p.count(3) + a for p, a in zip(PROMPTS, (3, 1, 2, 4))]


@torch.no_grad()
def test_aim_shares_of_one_are_the_unmodified_model_bit_for_bit():
    full = reducing(None)
    keep_all = [
        {"keep": {"kind": "table", "ratios": [1, 1, 1, 1]}, "score": {"kind": "pagerank"}},
        {"keep": {"kind": "constant", "ratio": 1.0}, "pre": [{"select": {"kind": "bipartite", "keep": 1.0}, "apply": {"kind": "merge"}}]},
    ]
    for tokens in keep_all:
        assert equal_bits(reducing(tokens), full)


@torch.no_grad()
def test_aim_removal_equals_masking_to_1e_5():
    model, full = reducing(table()), reducing(None)
    cut = model.encode(batch(), {"text": frozenset({"vocabulary", *(f"hidden:{layer}" for layer in range(5))})})["text"]
    whole = full.encode(batch(), {"text": frozenset({"hidden:0"})})["text"]
    x, layout, trunk = whole.hidden[0], whole.layout, model.language.trunk
    mask = layout.mask
    for layer, block in enumerate(trunk.blocks, start=1):
        x = block(x, True, mask, None, trunk.rotary(layout.position))
        mask = torch.zeros_like(mask)
        for row, places in enumerate(kept(cut.layout_of(layer + 1) if layer < 4 else cut.layout)):
            mask[row, places] = True
    assert int(mask.sum()) < int(layout.mask.sum())
    logits = model.language.post_norm(x) @ model.language.head_weight.T
    for row, places in enumerate(kept(cut.layout)):
        assert torch.allclose(cut.vocabulary.logits()[row, : len(places)], logits[row, places], atol=1e-5)


def test_aim_the_walk_of_the_oracle_sums_to_one():
    q, k = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    p = probabilities(q, k, causal=True, temperature=0.1)
    for steps in range(6):
        assert torch.allclose(walk(p, torch.ones(1, 9), steps).sum(-1), torch.ones(1, 2, dtype=torch.float64))


def test_aim_duplicates_merge_to_the_same_vector_in_rounds():
    base = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    x = base.repeat_interleave(4, 1)  # four copies of each beside one another: two rounds leave one
    for order in ("similarity", "position"):
        merged = merge_down(x, 4, weighting="mean", order=order)
        assert merged.shape == (2, 4, 6)
        if order == "position":
            assert torch.allclose(merged, base, atol=1e-6)
        else:
            distance = torch.cdist(merged, base)
            assert torch.allclose(distance.min(-1).values, torch.zeros(2, 4), atol=1e-5)
    counts = [merge_down(torch.randn(1, 16, 3), keep, weighting="mean", order="position").shape[1] for keep in (16, 8, 5, 4, 2, 1)]
    assert counts == [16, 8, 5, 4, 2, 1]


def test_aim_mean_of_a_second_round_forgets_sizes_and_that_by_size_does_not():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.1], [4.0, 0.4]]])
    plain = merge_down(x, 1, weighting="mean", order="position")
    sized = merge_down(x, 1, weighting="size", order="position")
    assert torch.allclose(sized[0, 0], x[0].mean(0), atol=1e-6)
    assert torch.allclose(plain[0, 0], x[0].mean(0), atol=1e-6)  # pairs of pairs: the same
    three = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [5.0, 0.1]]])
    assert torch.allclose(merge_down(three, 1, weighting="size", order="position")[0, 0], three[0].mean(0), atol=1e-6)
    assert not torch.allclose(merge_down(three, 1, weighting="mean", order="position")[0, 0], three[0].mean(0), atol=1e-3)


@pytest.mark.parametrize("positions", ["renumber", "keep"])
@pytest.mark.parametrize("norm", ["previous-layer", "next-layer"])
@torch.no_grad()
def test_aim_cached_decoding_equals_recomputing(positions, norm):
    lengths = check_cached_decoding(reducing(table(pre=PRE, positions=positions, norm=norm)))
    assert lengths[0] == [12, 4, 20, 10]  # 8 positions a picture are left by merging
    assert lengths[1:] == [[10, 4, 16, 8], [8, 4, 12, 6], [6, 4, 8, 4]]


@torch.no_grad()
def test_aim_reads_everything_in_a_training_step_where_the_preset_says_so():
    model, full = reducing(table(pre=PRE) | {"when": "inference"}), reducing(None)
    assert (model.picture_positions, model.training_positions) == (8, 16)
    assert reducing(table(pre=PRE)).training_positions == 8
    assert equal_bits(model.train(), full.train())
    assert not equal_bits(model.eval(), full.eval())
    assert equal_bits(model, reducing(table(pre=PRE)))


@torch.no_grad()
def test_aim_pictures_are_merged_one_by_one():
    model = reducing({"pre": PRE})
    together = model.visual_tokens({"main": pictures_of([3], size=32).values})[0]
    for number in range(3):
        alone = model.visual_tokens({"main": pictures_of([3], size=32).values[number : number + 1]})[0]
        assert torch.allclose(together[number], alone[0], atol=1e-6)
    assert together.shape == (3, model.picture_tokens, 16)
