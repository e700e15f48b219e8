"""The rig itself: it sees what is there, and nothing where nothing is."""

import pytest

from vlm.workflows.reproduce.claim import claim_of, settled
from vlm.workflows.reproduce.page import rig_block
from vlm.workflows.reproduce.rig import check_rig, rig_claims


def test_its_arms_differ_by_length_alone_and_by_chance_alone(make_claim):
    found = rig_claims(claim_of(make_claim(steps=40)), factor=2.0)
    whole, quarter = (settled(arm.values)[0] for arm in found["planted"].arms)
    assert (whole.train.steps, quarter.train.steps) == (40, 10)
    assert whole.optimizer.lr == quarter.optimizer.lr == pytest.approx(6e-3)
    assert whole.model_copy(update={"train": quarter.train}) == quarter
    own, again = found["self"].arms
    assert own.values == again.values
    assert (own.seed_offset, again.seed_offset) == (0, 1000)


def test_a_planted_loss_is_seen_and_an_arm_equals_itself(make_claim, make_workspace):
    claim = claim_of(make_claim(steps=24, margin=5.0))
    workspace = make_workspace()
    record = check_rig(claim, workspace, seeds=4)
    assert record["planted"]["verdict"] == "holds", rig_block(record)
    itself = record["self"]["difference"]
    assert itself["lower"] <= 0 <= itself["upper"], rig_block(record)
    assert record["ok"]
    assert workspace.trained == 12  # the whole arm serves both comparisons
    assert workspace.results.latest(f"rig-{claim.key}", "real")["ok"]


def test_a_rig_that_sees_nothing_says_so(make_claim, make_workspace):
    """With a margin out of reach the planted loss is not called found."""
    record = check_rig(claim_of(make_claim(steps=4, margin=99.0)), make_workspace(), seeds=2)
    assert record["planted"]["verdict"] != "holds"
    assert not record["ok"]
    assert "NOT AS IT MUST BE" in rig_block(record)
