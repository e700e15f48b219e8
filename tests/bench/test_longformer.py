"""The Longformer layer of transformers gives what ours gives, in value and gradient."""

import pytest
import torch

from vlm.bench.longformer import works_of


@pytest.mark.parametrize(("length", "window"), [(64, 16), (48, 8)])
def test_core_budget_longformer_equals_the_published_layer(length, window):
    ours, peer = (work() for work in works_of(length, window, False, batch=2))
    torch.testing.assert_close(ours, peer, atol=2e-5, rtol=2e-5)
    ours, peer = (work() for work in works_of(length, window, True, batch=2))
    assert len(ours) == len(peer) == 13
    for a, b in zip(ours, peer):  # of x, then of the projections in one order
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
