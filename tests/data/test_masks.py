"""Hidden squares: how many, drawn by what, and the stream of the batch."""

import pytest
import torch

from vlm.config.errors import DataError
from vlm.data.loader import build_loader
from vlm.data.masks import drawn_squares
from vlm.data.options import DataOptions
from vlm.runtime.preprocess import Preprocess

PREPROCESS = Preprocess(64, "shortest", "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def loader_of(seed=0, **stream):
    table = {"source": "scenes:?n=12", "streams": {"image.masked": {"kind": "masked-pixels", **stream}}}
    return build_loader(DataOptions.model_validate(table), preprocess=PREPROCESS, batch_size=6, seed=seed)


@pytest.mark.parametrize(("grid", "ratio", "count"), [(4, 0.6, 10), (2, 0.6, 3), (1, 0.1, 1), (3, 1.0, 9)])
def test_the_share_is_rounded_up(grid, ratio, count):
    assert drawn_squares(grid, ratio, 5).sum() == count


def test_swin_v2_a_mask_hangs_on_seed_sample_and_epoch_alone():
    with loader_of(patch=16) as one, loader_of(patch=16) as two, loader_of(1, patch=16) as other:
        first, again, seeded = next(one), next(two), next(other)
        later = [next(one) for _ in range(3)]
    stream = first["image.masked"]
    assert stream.masked.shape == (6, 4, 4)
    assert stream.masked.flatten(1).sum(1).tolist() == [10] * 6
    assert torch.equal(stream.values, first["image"].values)
    assert first["image"].masked is None
    assert torch.equal(stream.masked, again["image.masked"].masked)
    assert len({tuple(row.flatten().tolist()) for row in stream.masked}) > 1
    by_key = dict(zip(first.keys, stream.masked))
    seeds = dict(zip(seeded.keys, seeded["image.masked"].masked))
    assert any(not torch.equal(by_key[key], seeds[key]) for key in by_key.keys() & seeds.keys())
    epochs = [(key, mask) for batch in later for key, mask in zip(batch.keys, batch["image.masked"].masked) if key in by_key]
    assert epochs
    assert any(not torch.equal(by_key[key], mask) for key, mask in epochs)


def test_rows_and_parts_of_a_batch_keep_their_squares():
    with loader_of(patch=16) as loader:
        batch = next(loader)
    parts = batch.split(2)
    assert torch.equal(torch.cat([part["image.masked"].masked for part in parts]), batch["image.masked"].masked)


@pytest.mark.parametrize(("stream", "words"), [({"patch": 24}, "divisor"), ({"of": "image.fine", "patch": 16}, "the model reads")])
def test_what_does_not_fit_the_model_is_refused(stream, words):
    with pytest.raises(DataError, match=words):
        loader_of(**stream)


def test_the_stream_has_the_name_of_a_picture_stream():
    with pytest.raises(ValueError, match=r"image\.NAME"):
        DataOptions.model_validate({"source": "scenes:?n=4", "streams": {"masked": {"kind": "masked-pixels"}}})
