"""Whole training steps as cases: what they read, and that native operators and torch's compute the same loss."""

import pytest
import torch

from vlm.bench.steps import documents, pairs, step, swin_pictures


def test_packed_rows_hold_documents_without_gaps():
    text = documents(rows=2, length=96, mean=16)["text"]
    assert text.values.shape == (2, 96)
    assert text.mask.all()
    for segment, position in zip(text.segment, text.position):
        assert segment.unique().tolist() == list(range(6))
        starts = position == 0
        assert starts.sum() == 6
        assert torch.equal(segment.diff() == 1, starts[1:])


def test_pairs_end_with_the_end_of_text():
    text = pairs(7)["text"]
    last = text.mask.sum(1) - 1
    assert (text.values[torch.arange(7), last] == 1).all()


@pytest.mark.parametrize("stage", [0, 1])
def test_both_sides_of_a_step_compute_the_same_losses(stage):
    arms = step("swin-v2", lambda: swin_pictures(2), stage)()
    losses = {}
    for arm in ("native", "peer"):
        torch.manual_seed(1)  # both drop the same paths
        losses[arm] = torch.cat(arms[arm]())
    torch.testing.assert_close(losses["native"], losses["peer"], rtol=1e-4, atol=1e-5)
