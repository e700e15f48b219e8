"""Models that read pictures and answer: where visual tokens go, what each position may see, cached decoding."""

from dataclasses import replace
from itertools import chain

import pytest
import torch

from tests.models.model_makers import answering, batch_of, logits_of, pictures_of, random_rows, rows_of
from tests.models.picture_rows import BOTH, COUNTS, CROSS, IMAGE, PREFIX, ROWS, built
from vlm.types.batch import Role
from vlm.types.layout import IGNORE, Modality


def expanded(model, rows, features):
    """The sequences that the prefix form must read, built position by position: [S_i, C] a row."""
    embedding, taken = model.language.tokens.weight, iter(features)
    out = []
    for row in rows:
        parts = [next(taken) if token == IMAGE else embedding[token][None] for token in row]
        out.append(torch.cat(parts))
    return out


def visual(model, pictures):
    norm = model.pixel_norms["main"](pictures.values)
    return model.visual_tokens({"main": norm})[0]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_prefix_equals_the_row_built_by_hand(side):
    model, pictures = built(PREFIX), pictures_of(COUNTS)
    logits, layout = logits_of(model, batch_of(4, text=rows_of(ROWS, side=side, extra=2), image=pictures))
    sequences = expanded(model, ROWS, visual(model, pictures))
    for row, x in enumerate(sequences):
        hidden, _ = model.language.trunk(x[None], causal=True)
        expected = model.language.post_norm(hidden)[0] @ model.language.head_weight.T
        assert layout.mask[row].sum() == len(x)
        assert torch.allclose(logits[row, layout.mask[row]], expected, atol=1e-5)


@torch.no_grad()
def test_the_layout_says_what_every_position_is():
    roles = [[int(Role.INSTRUCTION)] * (len(row) - 1) + [int(Role.ANSWER)] for row in ROWS]
    supervised = [[0] * (len(row) - 1) + [1] for row in ROWS]
    text = rows_of(ROWS, role=roles, supervised=supervised, side="left")
    _, layout = logits_of(built(PREFIX), batch_of(4, text=text, image=pictures_of(COUNTS)))
    number = -1
    for row, tokens in enumerate(ROWS):
        expected = []
        for token, role, counted in zip(tokens, roles[row], supervised[row]):
            number += token == IMAGE
            image = (int(Modality.IMAGE), role, IGNORE, number)
            expected += [image] * 4 if token == IMAGE else [(int(Modality.TEXT), role, token if counted else IGNORE, -1)]
        size = len(expected)
        columns = torch.stack([layout.modality, layout.role, layout.label, layout.picture])[:, row, :size].T.tolist()
        assert [tuple(column) for column in columns] == expected
        assert layout.mask[row].tolist() == [place < size for place in range(layout.mask.shape[1])]
        assert layout.position[row, :size].tolist() == list(range(size))
        assert layout.kept[row].tolist() == list(range(layout.mask.shape[1]))
        assert layout.segment[row].tolist() == [0 if place < size else -1 for place in range(layout.mask.shape[1])]
        assert set(layout.label[row, size:].tolist()) <= {IGNORE}
        assert set(layout.picture[row, size:].tolist()) <= {-1}


@BOTH
@torch.no_grad()
def test_padding_and_batch_mates_change_nothing(fusion):
    model, pictures = built(fusion), pictures_of(COUNTS)
    together = {}
    for side in ("left", "right"):
        logits, layout = logits_of(model, batch_of(4, text=rows_of(ROWS, side=side, extra=3), image=pictures))
        together[side] = [logits[row, layout.mask[row]] for row in range(4)]
    for row, tokens in enumerate(ROWS):
        mine = pictures.rows(pictures.sample_index == row)
        mine = replace(mine, sample_index=torch.zeros(len(mine), dtype=torch.int64))
        alone, _ = logits_of(model, batch_of(1, text=rows_of([tokens]), image=mine))
        for side in together:
            assert torch.allclose(together[side][row], alone[0], atol=1e-5)


@BOTH
@torch.no_grad()
def test_packed_documents_equal_rows(fusion):
    model, pictures = built(fusion), pictures_of(COUNTS)
    joined = list(chain(*ROWS))
    segment = torch.tensor([[*chain(*([number] * len(row) for number, row in enumerate(ROWS))), -1]])
    text = replace(rows_of([joined], extra=1), segment=segment)
    one = replace(pictures, sample_index=pictures.sample_index * 0, slot=torch.arange(len(pictures)))
    packed, packed_layout = logits_of(model, batch_of(1, text=text, image=one))
    apart, layout = logits_of(model, batch_of(4, text=rows_of(ROWS), image=pictures))
    expected = torch.cat([apart[row, layout.mask[row]] for row in range(4)])
    assert torch.allclose(packed[0, packed_layout.mask[0]], expected, atol=1e-5)


@BOTH
@torch.no_grad()
def test_nothing_sees_what_comes_later(fusion):
    model, pictures = built(fusion), pictures_of([2])
    row = [2, 5, IMAGE, 6, 7, IMAGE, 8, 9, 10]
    logits, layout = logits_of(model, batch_of(1, text=rows_of([row]), image=pictures))
    changed_text, _ = logits_of(model, batch_of(1, text=rows_of([[*row[:-2], 20, 21]]), image=pictures))
    first = int((layout.label[0] == 9).nonzero())
    assert torch.equal(logits[0, :first], changed_text[0, :first])
    assert not torch.equal(logits[0, first], changed_text[0, first])
    second = replace(pictures, values=torch.stack([pictures.values[0], 1 - pictures.values[1]]))
    changed_picture, _ = logits_of(model, batch_of(1, text=rows_of([row]), image=second))
    before = int((layout.label[0] == 7).nonzero()) + 1
    assert torch.equal(logits[0, :before], changed_picture[0, :before])
    assert not torch.allclose(logits[0, -1], changed_picture[0, -1])
    # the placeholder stands where its picture begins: from there on the second picture is seen
    assert not torch.allclose(logits[0, before], changed_picture[0, before])


@BOTH
@torch.no_grad()
def test_cached_equals_uncached_decoding(fusion):
    model, pictures = built(fusion), pictures_of(COUNTS)
    more = random_rows([5] * 4, seed=3)
    for side in ("left", "right"):
        logits, cache = model.prefill(rows_of(ROWS, side=side), {"image": pictures})
        steps = [logits]
        for place in range(5):
            logits, cache = model.advance(torch.tensor([row[place] for row in more]), cache)
            steps.append(logits)
        whole, layout = logits_of(model, batch_of(4, text=rows_of([a + b for a, b in zip(ROWS, more)]), image=pictures))
        for row in range(4):
            assert torch.allclose(torch.stack(steps)[:, row], whole[row, layout.mask[row]][-6:], atol=1e-5)


@BOTH
@torch.no_grad()
def test_rows_of_a_cache_keep_their_pictures(fusion):
    model, pictures = built(fusion), pictures_of(COUNTS)
    _, cache = model.prefill(rows_of(ROWS), {"image": pictures})
    index = torch.tensor([2, 2, 0])
    logits, _ = model.advance(torch.tensor([20, 21, 22]), cache.rows(index))
    for row, (source, token) in enumerate(zip(index.tolist(), (20, 21, 22))):
        mine = pictures.rows(pictures.sample_index == source)
        mine = replace(mine, sample_index=mine.sample_index * 0)
        whole, _ = logits_of(model, batch_of(1, text=rows_of([ROWS[source] + [token]]), image=mine))
        assert torch.allclose(logits[row], whole[0, -1], atol=1e-5)


def test_what_it_offers():
    model = answering(PREFIX)
    assert model.options.special_tokens == ("<image>",)
    assert (model.options.text_part, model.takes_context, model.options.text_length) == ("language", True, 64)
    assert (model.picture_positions, answering(CROSS).picture_positions) == (4, None)
    out = model.encode(
        batch_of(4, text=rows_of(ROWS), image=pictures_of(COUNTS)), {"text": frozenset({"hidden:0", "hidden:3", "statistics"})}
    )["text"]
    assert sorted(out.hidden) == [0, 3]
    assert out.hidden[3].shape[:2] == out.layout.mask.shape
    assert out.vocabulary is None
    assert out.statistics["kept_share"].tolist() == [1, 1, 1, 1]
    assert out.layout_of(3) is out.layout
