"""Which pictures a text takes: by context, sample, order and tile, and refusals that name the sample."""

from dataclasses import replace

import pytest
import torch

from tests.models.model_makers import batch_of, logits_of, pictures_of, rows_of
from tests.models.picture_rows import BOTH, COUNTS, IMAGE, PREFIX, ROWS, built
from vlm.types import TokenIds


@torch.no_grad()
def test_the_context_names_the_pictures_and_each_stream_is_encoded_once():
    model = built(PREFIX)
    clean, noisy = pictures_of(COUNTS), pictures_of(COUNTS, seed=9)
    preferred, rejected = rows_of(ROWS), rows_of([[*row, 30] for row in ROWS])
    batch = batch_of(4, answer__preferred=preferred, answer__rejected=rejected, image=clean, image__noisy=noisy)
    calls = []
    model.connector.register_forward_hook(lambda *_: calls.append(1))
    fields = frozenset({"vocabulary"})
    out = model.encode(
        batch, {"answer.preferred": fields, "answer.rejected": fields, "answer.preferred@image.noisy": fields}
    )
    assert len(calls) == 2
    for key, text, pictures in (
        ("answer.preferred", preferred, clean),
        ("answer.rejected", rejected, clean),
        ("answer.preferred@image.noisy", preferred, noisy),
    ):
        alone, _ = logits_of(model, batch_of(4, text=text, image=pictures))
        assert torch.equal(out[key].vocabulary.logits(), alone)
        assert out[key].sample_index.tolist() == [0, 1, 2, 3]
    assert not torch.allclose(
        out["answer.preferred"].vocabulary.logits(), out["answer.preferred@image.noisy"].vocabulary.logits(), atol=1e-3
    )
    with pytest.raises(KeyError, match="no stream 'image.blurred'"):
        model.encode(batch, {"answer.preferred@image.blurred": fields})


@torch.no_grad()
def test_several_texts_of_a_sample_share_its_pictures():
    model, pictures = built(PREFIX), pictures_of([2, 1])
    rows = [[2, IMAGE, 5, IMAGE, 6], [IMAGE, IMAGE, 7], [2, IMAGE, 8]]
    text = replace(rows_of(rows), sample_index=torch.tensor([0, 0, 1]), slot=torch.tensor([0, 1, 0]))
    logits, layout = logits_of(model, batch_of(2, text=text, image=pictures))
    assert layout.picture.max() == 2
    assert sorted(set(layout.picture[1].tolist())) == [-1, 0, 1]
    for row, sample in enumerate((0, 0, 1)):
        mine = pictures.rows(pictures.sample_index == sample)
        mine = replace(mine, sample_index=mine.sample_index * 0)
        alone, own = logits_of(model, batch_of(1, text=rows_of([rows[row]]), image=mine))
        assert torch.allclose(logits[row, layout.mask[row]], alone[0, own.mask[0]], atol=1e-5)


@torch.no_grad()
def test_rows_of_pictures_may_stand_in_any_order_and_be_tiles():
    model, pictures = built(PREFIX), pictures_of([2, 1])
    text = rows_of([[2, IMAGE, 5, IMAGE], [IMAGE, 6]])
    logits, _ = logits_of(model, batch_of(2, text=text, image=pictures))
    turned = pictures.rows(torch.tensor([2, 1, 0]))
    again, other = logits_of(model, batch_of(2, text=text, image=turned))
    assert torch.equal(logits, again)
    assert other.picture[0, other.modality[0] == 1].tolist() == [2] * 4 + [1] * 4
    # two tiles of one picture: one placeholder takes both, or each has its own
    place = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 0]])
    tiles = replace(pictures, slot=torch.zeros(3, dtype=torch.int64), place=place)
    one, own = logits_of(model, batch_of(2, text=rows_of([[2, IMAGE, 5], [IMAGE, 6]]), image=tiles))
    assert own.picture[0, own.modality[0] == 1].tolist() == [0] * 4 + [1] * 4
    per_tile, _ = logits_of(model, batch_of(2, text=text, image=tiles))
    assert torch.equal(per_tile, logits)
    assert torch.equal(one[0, :9], logits_of(model, batch_of(1, text=rows_of([[2, IMAGE, IMAGE]]),
                                                             image=tiles.rows(torch.tensor([0, 1]))))[0][0])


@BOTH
def test_placeholders_that_do_not_fit_the_pictures_name_the_sample(fusion):
    model = built(fusion)
    with pytest.raises(ValueError, match=r"'sample 1': 2 picture placeholders in 'text', 1 pictures in 'image'"):
        logits_of(model, batch_of(2, text=rows_of([[2, 5], [IMAGE, IMAGE]]), image=pictures_of([0, 1])))
    with pytest.raises(ValueError, match=r"'sample 0': 0 picture placeholders in 'text', 1 pictures"):
        logits_of(model, batch_of(1, text=rows_of([[2, 5]]), image=pictures_of([1])))
    with pytest.raises(ValueError, match=r"'sample 0': 1 picture placeholders in 'text', 0 pictures"):
        logits_of(model, batch_of(1, text=rows_of([[IMAGE]])))
    with pytest.raises(ValueError, match="'prompt 0': 1 picture placeholders"):
        model.prefill(rows_of([[IMAGE]]), {})


@BOTH
@torch.no_grad()
def test_rows_may_be_empty_or_none(fusion):
    model = built(fusion)
    logits, layout = logits_of(model, batch_of(2, text=rows_of([[], [IMAGE]]), image=pictures_of([0, 1])))
    assert torch.isfinite(logits).all()
    assert not layout.mask[0].any()
    none = TokenIds(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0, dtype=torch.int64))
    assert logits_of(model, batch_of(0, text=none, image=pictures_of([])))[0].shape[0] == 0
