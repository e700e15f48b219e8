"""Dropping visual positions between layers: the exact checks of pyramiddrop, and the parts by brute force."""

import math
from dataclasses import replace
from itertools import chain

import pytest
import torch

from tests.models.model_makers import answering, batch_of, logits_of, pictures_of, rows_of
from vlm.models.language import layout_of
from vlm.tokens import TokensOptions, picture_counts, query_rows, select_top
from vlm.types import Layout
from vlm.types.batch import Role
from vlm.types.layout import IGNORE, Modality

IMAGE, INSTRUCTION, ANSWER, CONTEXT = 3, int(Role.INSTRUCTION), int(Role.ANSWER), int(Role.CONTEXT)
TOWERS = {"main": dict(width=12, depth=2, heads=2, image_size=24, patch_size=8)}  # 9 visual positions a picture
PROMPTS = [[2, 5, IMAGE, 6, 7], [2, 8, 9, 10], [IMAGE, 2, IMAGE, 11, 12, 13], [2, IMAGE, 14]]
ANSWERS = [[20, 21, 22], [23], [24, 25], [26, 27, 28, 1]]
COUNTS = [1, 0, 2, 1]


def table(layers=(1, 2, 3), ratios=(0.7, 0.45, 0.2), positions="renumber"):
    return {"apply": {"positions": positions}, "keep": {"kind": "stages", "layers": list(layers), "ratios": list(ratios)}}


def dropping(**changes):
    return answering(towers=TOWERS, tokens=table(**changes))


def trained_rows(prompts=PROMPTS, answers=ANSWERS, **named):
    rows = [p + a for p, a in zip(prompts, answers)]
    roles = [[INSTRUCTION] * len(p) + [ANSWER] * len(a) for p, a in zip(prompts, answers)]
    supervised = [[0] * len(p) + [1] * len(a) for p, a in zip(prompts, answers)]
    return rows_of(rows, role=roles, supervised=supervised, **named)


def final_layout(model, batch, layer=None):
    return model.encode(batch, {"text": frozenset({"hidden:4"})})["text"].layout


def kept(layout):
    return [layout.kept[row, layout.mask[row]].tolist() for row in range(len(layout.mask))]


@torch.no_grad()
def test_pyramiddrop_ratios_of_one_are_the_full_model_bit_for_bit():
    batch = batch_of(4, text=trained_rows(), image=pictures_of(COUNTS, size=24))
    for side in ("right", "left"):
        batch = batch.with_streams({"text": trained_rows(side=side)})
        dropped, layout = logits_of(dropping(ratios=(1.0, 1.0, 1.0)), batch)
        full, whole = logits_of(answering(towers=TOWERS), batch)
        assert torch.equal(dropped, full)
        assert torch.equal(layout.kept, whole.kept)


@torch.no_grad()
def test_pyramiddrop_padding_order_and_batch_mates_change_nothing():
    model, pictures = dropping(), pictures_of(COUNTS, size=24)
    told = {}
    for side in ("left", "right"):
        logits, layout = logits_of(model, batch_of(4, text=trained_rows(side=side, extra=3), image=pictures))
        told[side] = [(logits[row, layout.mask[row]], kept(layout)[row]) for row in range(4)]
    order = [3, 0, 2, 1]
    turned = pictures.rows(torch.cat([(pictures.sample_index == old).nonzero()[:, 0] for old in order]))
    turned = replace(turned, sample_index=torch.tensor([order.index(old) for old in turned.sample_index.tolist()]))
    text = trained_rows([PROMPTS[o] for o in order], [ANSWERS[o] for o in order])
    logits, layout = logits_of(model, batch_of(4, text=text, image=turned))
    told["turned"] = [(logits[order.index(row), layout.mask[order.index(row)]], kept(layout)[order.index(row)]) for row in range(4)]
    for row in range(4):
        mine = pictures.rows(pictures.sample_index == row)
        mine = replace(mine, sample_index=mine.sample_index * 0)
        text = trained_rows([PROMPTS[row]], [ANSWERS[row]])
        alone, own = logits_of(model, batch_of(1, text=text, image=mine))
        for name, rows in told.items():
            assert rows[row][1] == kept(own)[0], (name, row)
            assert torch.allclose(rows[row][0], alone[0, own.mask[0]], atol=1e-5), (name, row)


@torch.no_grad()
def test_pyramiddrop_kept_positions_ascend_and_text_is_untouched():
    batch = batch_of(4, text=trained_rows(), image=pictures_of(COUNTS, size=24))
    whole = final_layout(answering(towers=TOWERS), batch)
    output = dropping().encode(batch, {"text": frozenset({"hidden:1", "hidden:2", "hidden:3", "hidden:4", "statistics"})})["text"]
    for layer, count in ((1, 9), (2, 6), (3, 4), (4, 1)):  # the layout before the drop after that layer
        layout = output.layout_of(layer)
        assert output.hidden[layer].shape[:2] == layout.mask.shape
        for row, indices in enumerate(kept(layout)):
            assert indices == sorted(set(indices))
            text = [place for place in indices if whole.modality[row, place] == int(Modality.TEXT)]
            assert text == [place for place in kept(whole)[row] if whole.modality[row, place] == int(Modality.TEXT)]
            assert layout.position[row, : len(indices)].tolist() == list(range(len(indices)))
            pictures = layout.picture[row, layout.mask[row]]
            # floors of 9 * 0.7, 9 * 0.45, 9 * 0.2, each from the original count and each for its own picture
            assert pictures[pictures >= 0].unique(return_counts=True)[1].tolist() == [count] * COUNTS[row]
    assert torch.allclose(output.statistics["kept_share"], torch.tensor([1 / 9, 1, 1 / 9, 1 / 9]))


def test_pyramiddrop_shares_are_floored_in_integers():
    options = TokensOptions.model_validate(table(layers=[1, 2], ratios=[0.29, 0.07]))
    assert int(100 * 0.29) == 28  # what floating point makes of it
    shares = options.keep.shares(3)
    assert [100 * share.numerator // share.denominator for share in shares.values()] == [29, 7]
    for layers, ratios in (([2, 1], [0.5, 0.5]), ([1, 2], [0.2, 0.5]), ([0], [0.5]), ([1], [1.5]), ([1, 2], [0.5])):
        with pytest.raises(ValueError, match="expected"):
            TokensOptions.model_validate(table(layers=layers, ratios=ratios))
    with pytest.raises(ValueError, match="expected below the language model's depth 4"):
        answering(tokens=table(layers=[4], ratios=[0.5]))
    with pytest.raises(ValueError, match="no visual positions to drop"):
        answering({"kind": "cross-attention", "every": 2}, tokens=table())


@torch.no_grad()
def test_pyramiddrop_a_training_turn_keeps_what_generation_keeps():
    model, pictures = dropping(), pictures_of(COUNTS, size=24)
    trained = kept(final_layout(model, batch_of(4, text=trained_rows(), image=pictures)))
    prompts = rows_of(PROMPTS, role=[[INSTRUCTION] * len(p) for p in PROMPTS])
    bare = kept(final_layout(model, batch_of(4, text=prompts, image=pictures)))
    for with_answer, without, answer in zip(trained, bare, ANSWERS):
        assert with_answer[: len(without)] == without
        assert len(with_answer) == len(without) + len(answer)
    # and the loss sees the same whatever is supervised
    unsupervised = replace(trained_rows(), supervised=None)
    assert kept(final_layout(model, batch_of(4, text=unsupervised, image=pictures))) == trained


@torch.no_grad()
def test_pyramiddrop_rows_without_picture_or_instruction_are_unchanged():
    model, full = dropping(), answering(towers=TOWERS)
    text = trained_rows([[2, 5, 6], [2, IMAGE, 7]], [[20, 21], [22]])
    text = replace(text, role=torch.where(torch.tensor([[True], [False]]), text.role, CONTEXT))  # no turn at all
    batch = batch_of(2, text=text, image=pictures_of([0, 1], size=24))
    got, layout = logits_of(model, batch)
    expected, whole = logits_of(full, batch)
    assert kept(layout) == kept(whole)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("positions", ["renumber", "keep"])
@torch.no_grad()
def test_pyramiddrop_greedy_decoding_with_stage_caches_equals_recomputing(positions):
    model, pictures = dropping(positions=positions), pictures_of(COUNTS, size=24)
    answers = [[] for _ in PROMPTS]
    for side in ("right", "left"):
        logits, cache = model.prefill(rows_of(PROMPTS, side=side), {"image": pictures})
        if side == "right":
            lengths = [layer.mask.sum(1).tolist() for layer in cache.layers]
            assert lengths == [[13, 4, 22, 11], [10, 4, 16, 8], [8, 4, 12, 6], [5, 4, 6, 3]]
            renumbered = [[13, 4, 22, 11], [10, 4, 16, 8], [8, 4, 12, 6], [5, 4, 6, 3]]
            assert cache.next_position.T.tolist() == (renumbered if positions == "renumber" else [renumbered[0]] * 4)
        for step in range(6):
            roles = [[INSTRUCTION] * len(p) + [ANSWER] * step for p in PROMPTS]
            text = rows_of([p + a[:step] for p, a in zip(PROMPTS, answers)], role=roles)
            whole, layout = logits_of(model, batch_of(4, text=text, image=pictures))
            last = torch.stack([whole[row, layout.mask[row]][-1] for row in range(4)])
            assert torch.allclose(logits, last, atol=1e-5)
            token = logits.argmax(-1)
            for answer, one in zip(answers, token.tolist()):
                if side == "right":
                    answer.append(one)
            logits, cache = model.advance(token, cache)


def next_targets(layout):
    """Per row, what the positions have to predict: the label of the next one of the same document."""
    follows = layout.mask[:, 1:] & layout.mask[:, :-1] & (layout.segment[:, 1:] == layout.segment[:, :-1])
    target = torch.where(follows, layout.label[:, 1:], IGNORE)
    return [row[row != IGNORE].tolist() for row in target]


def test_pyramiddrop_targets_are_unchanged_by_dropping():
    batch = batch_of(4, text=trained_rows(), image=pictures_of(COUNTS, size=24))
    full = answering(towers=TOWERS)
    for model in (full, dropping(), dropping(positions="keep")):
        assert next_targets(final_layout(model, batch)) == ANSWERS


@torch.no_grad()
def test_pyramiddrop_removal_equals_masking_when_positions_are_kept():
    """Dropped positions are as if every later layer could not attend them."""
    model, pictures = dropping(positions="keep"), pictures_of(COUNTS, size=24)
    batch = batch_of(4, text=trained_rows(), image=pictures)
    fields = {"text": frozenset({"vocabulary", *(f"hidden:{layer}" for layer in range(5))})}
    cut = model.encode(batch, fields)["text"]
    full = answering(towers=TOWERS).encode(batch, {"text": frozenset({"hidden:0"})})["text"]
    x, layout, trunk = full.hidden[0], full.layout, model.language.trunk
    mask = layout.mask
    for layer, block in enumerate(trunk.blocks, start=1):
        x = block(x, True, mask, None, trunk.rotary(layout.position))
        after = cut.layout_of(layer + 1) if layer < 4 else cut.layout
        mask = torch.zeros_like(mask)
        for row, indices in enumerate(kept(after)):
            mask[row, indices] = True
    logits = model.language.post_norm(x) @ model.language.head_weight.T
    for row, indices in enumerate(kept(cut.layout)):
        assert torch.allclose(cut.vocabulary.logits()[row, : len(indices)], logits[row, indices], atol=1e-5)


def test_pyramiddrop_gradients_flow_through_kept_positions_only():
    model = dropping(layers=[2], ratios=[0.5])
    batch = batch_of(4, text=trained_rows(), image=pictures_of(COUNTS, size=24))
    output = model.encode(batch, {"text": frozenset({"hidden:0", "hidden:2", "vocabulary"})})["text"]
    early, before = output.hidden[2], output.layout_of(2)
    early.retain_grad()
    output.vocabulary.logits()[output.layout.mask].logsumexp(-1).sum().backward()
    keeps = torch.zeros_like(before.mask)
    for row, indices in enumerate(kept(output.layout)):
        keeps[row, indices] = True
    assert (keeps & before.mask).sum() < before.mask.sum()
    assert (early.grad[keeps].abs().sum(-1) > 0).all()
    assert not early.grad[~keeps].any()


def scores_by_hand(model, layer, x, layout, row, queries):
    """[T] mean over queries and heads of the softmax over each query's prefix, in float64 and by loops."""
    block = model.language.trunk.blocks[layer]
    valid = [place for place in range(x.shape[1]) if layout.mask[row, place]]
    y = block.norm1(x[row])
    rotary = model.language.trunk.rotary(layout.position[row : row + 1])
    q = block.attention.queries(y[None], rotary)[0].double()
    k = block.attention.keys(y[None], rotary)[0].double()
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for query in queries:
        seen = [p for p in valid if p <= query and layout.segment[row, p] == layout.segment[row, query]]
        for head in range(q.shape[0]):
            logits = torch.stack([(q[head, query] * k[head // (q.shape[0] // k.shape[0]), p]).sum() for p in seen])
            total[seen] += (logits / math.sqrt(q.shape[-1])).softmax(0) / q.shape[0]
    return total / len(queries)


@torch.no_grad()
def test_pyramiddrop_several_turns_use_the_mean_of_their_rows():
    model = dropping(layers=[2], ratios=[0.5])
    first, second = [2, IMAGE, 5, 6], [7, IMAGE, 8]
    rows = [[*first, 20, 21, *second, 22]]
    roles = [[INSTRUCTION] * 4 + [ANSWER] * 2 + [INSTRUCTION] * 3 + [ANSWER]]
    for side in ("right", "left"):
        text = rows_of(rows, role=roles, side=side, extra=2)
        batch = batch_of(1, text=text, image=pictures_of([2], size=24))
        output = model.encode(batch, {"text": frozenset({"hidden:2", "hidden:4"})})["text"]
        x, before = output.hidden[2], output.layout_of(2)
        queries = query_rows(before)[0].nonzero()[:, 0].tolist()
        assert queries == [11, 11 + 2 + 1 + 9 + 1]
        score = scores_by_hand(model, 2, x, before, 0, queries)
        best = []
        for picture in (0, 1):
            places = (before.picture[0] == picture).nonzero()[:, 0]
            best += sorted(places[score[places].argsort(descending=True)[:4]].tolist())
        text_places = (before.mask[0] & (before.picture[0] < 0)).nonzero()[:, 0].tolist()
        assert kept(output.layout)[0] == sorted(best + text_places)


@torch.no_grad()
def test_pyramiddrop_packed_documents_drop_what_rows_drop():
    model, pictures = dropping(), pictures_of(COUNTS, size=24)
    text = trained_rows()
    apart, layout = logits_of(model, batch_of(4, text=text, image=pictures))
    rows = [p + a for p, a in zip(PROMPTS, ANSWERS)]
    roles = [[INSTRUCTION] * len(p) + [ANSWER] * len(a) for p, a in zip(PROMPTS, ANSWERS)]
    joined = rows_of([list(chain(*rows))], role=[list(chain(*roles))])
    segment = torch.tensor([list(chain(*([number] * len(row) for number, row in enumerate(rows))))])
    one = replace(pictures, sample_index=pictures.sample_index * 0, slot=torch.arange(len(pictures)))
    packed, own = logits_of(model, batch_of(1, text=replace(joined, segment=segment), image=one))
    expected = torch.cat([apart[row, layout.mask[row]] for row in range(4)])
    assert torch.allclose(packed[0, own.mask[0]], expected, atol=1e-5)
    assert own.position[0].tolist() == list(chain(*(range(len(indices)) for indices in kept(layout))))


@torch.no_grad()
def test_pyramiddrop_trains_under_recompute():
    with torch.enable_grad():
        gradients = []
        for on in (False, True):
            model = dropping().train()
            model.set_recompute(on)
            logits, layout = logits_of(model, batch_of(4, text=trained_rows(), image=pictures_of(COUNTS, size=24)))
            logits[layout.mask].logsumexp(-1).sum().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-5) for name in gradients[0])


def layout_with(modality, picture, role=None, mask=None, segment=None):
    modality, picture = torch.tensor(modality), torch.tensor(picture)
    mask = torch.ones_like(modality, dtype=torch.bool) if mask is None else torch.tensor(mask)
    layout = Layout.of_tokens(
        modality * 0, mask, torch.arange(len(modality)), modality=modality, role=None if role is None else torch.tensor(role),
        segment=None if segment is None else torch.tensor(segment),
    )
    return replace(layout, picture=picture)


def test_selection_takes_the_best_of_each_picture_and_the_lower_of_equals():
    layout = layout_with([[0, 1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0]], [[-1, 0, 0, 0, -1, 4, 4], [4, 4, 4, -1, -1, -1, -1]],
                         mask=[[True] * 7, [True] * 4 + [False] * 3])
    score = torch.tensor([[9.0, 1, 2, 2, 9, 5, 5], [3.0, torch.inf, 4, 0, 0, 0, 0]])
    counts = torch.tensor([[0, 2, 2, 2, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    assert select_top(score, layout, counts).tolist() == [[0, 2, 3, 4, 5], [1, 2, 3, -1, -1]]
    assert select_top(torch.zeros(2, 7), layout, counts).tolist() == [[0, 1, 2, 4, 5], [0, 3, -1, -1, -1]]
    assert select_top(torch.zeros(2, 7), layout, counts * 0).tolist() == [[0, 4], [3, -1]]
    assert picture_counts(layout).tolist() == [[0, 3, 3, 3, 0, 2, 2], [3, 3, 3, 0, 0, 0, 0]]
    empty = layout_with([[0, 0]], [[-1, -1]])
    assert select_top(torch.zeros(1, 2), empty, torch.zeros(1, 2, dtype=torch.int64)).tolist() == [[0, 1]]


def test_the_query_is_the_last_position_of_text_before_an_answer():
    i, a, c = INSTRUCTION, ANSWER, CONTEXT
    rows = [
        ([i, i, a, a, i, i, a], [0] * 7, [1, 5]),
        ([i, i, i, a, a, c, c], [0] * 7, [2]),  # what follows the last answer waits for none
        ([i, i, c, a, c, i, c], [0] * 7, [2, 6]),  # markup belongs to the turn; a prompt without its answer
        ([c, c, a, a, c, c, c], [0] * 7, [1]),
        ([c, c, c, c, c, c, c], [0] * 7, []),
        ([i, i, i, i, a, a, a], [0, 0, 1, 1, 0, 0, 0], [1]),  # a picture after the text is no query
    ]
    for roles, modality, expected in rows:
        layout = layout_with([modality], [[-1] * 7], role=[roles])
        assert query_rows(layout)[0].nonzero()[:, 0].tolist() == expected
    layout = layout_with([[0] * 7], [[-1] * 7], role=[[i, i, i, a, i, a, i]], segment=[[0, 0, 1, 1, 2, 2, -1]],
                         mask=[[True] * 6 + [False]])
    assert query_rows(layout)[0].nonzero()[:, 0].tolist() == [1, 2, 4]
    assert query_rows(layout_of(rows_of([[], []]))).shape == (2, 0)
