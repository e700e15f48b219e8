"""Pooling as a step before the decoder: exact checks of core-pool in a model."""

import pytest
import torch
import torch.nn.functional as F

from tests.tokens.rows import batch, check_cached_decoding, reducing

POOLS = [{"stride": 2}, {"stride": 3, "method": "max"}, {"stride": 2, "method": "bilinear"}, {"shape": [3, 2]}]


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: "-".join(map(str, p.values())))
@torch.no_grad()
def test_core_pool_after_the_projector_is_the_pool_of_the_tokens_as_a_picture(pool):
    model = reducing({"pre": [{"select": {"kind": "pool", **pool}}]})
    pixels = {"main": model.pixel_norms["main"](batch()["image"].values)}
    whole = reducing(None).visual_tokens(pixels)[0]
    planes = whole.unflatten(1, (4, 4)).movedim(-1, 1)
    if "shape" in pool:
        expected = F.adaptive_avg_pool2d(planes, (3, 2))
    elif pool.get("method") == "max":
        expected = F.max_pool2d(planes, 3, ceil_mode=True)
    else:
        expected = F.avg_pool2d(planes, 2)
    got, mask = model.visual_tokens(pixels)
    assert mask is None
    assert torch.allclose(got, expected.flatten(2).transpose(1, 2), atol=1e-6)
    assert model.picture_tokens == got.shape[1]
    if pool == POOLS[0]:
        check_cached_decoding(model, steps=2)


@torch.no_grad()
def test_core_pool_to_the_own_shape_is_the_identity_and_what_does_not_fit_is_refused():
    pixels = {"main": torch.rand(2, 3, 32, 32)}
    for pool in ({"shape": [4, 4]}, {"stride": 1}):
        model = reducing({"pre": [{"select": {"kind": "pool", **pool}}]})
        assert torch.equal(model.visual_tokens(pixels)[0], reducing(None).visual_tokens(pixels)[0])
    for wrong, said in (({}, "either"), ({"stride": 2, "shape": [2, 2]}, "either"), ({"shape": [2, 2], "method": "max"}, "average")):
        with pytest.raises(ValueError, match=said):
            reducing({"pre": [{"select": {"kind": "pool", **wrong}}]})
    with pytest.raises(ValueError, match="take no score"):
        reducing({"pre": [{"score": {"kind": "norm"}, "select": {"kind": "pool", "stride": 2}}]})
