"""Claims of the methods at the size of a test: both arms train, and their tasks give every figure that is judged."""

import json
import tomllib

import pytest

from tests.presets.stand_ins import TEXT, VISION, quiet
from vlm.config.load import merge_tables
from vlm.workflows.carve import Carving
from vlm.workflows.reproduce.claim import claim_of
from vlm.workflows.reproduce.unit import Unit, train_unit

KEYS = ("limber", "infmllm", "povid", "llava-kd", "debias-lvlm", "sugar", "structure-clip")
PART = Carving(("concept",), 0.5, held_out=False)


def shrunk(values):
    """An arm of one update a stage, of four samples; one of no updates stays one of none."""
    settings = {"train": {"steps": 1, "batch_size": 4}, "scale": {"threads": 1}}
    stages = [
        {"name": stage["name"], "train": {"steps": min(1, stage["train"]["steps"]), "batch_size": 4}} for stage in values.get("stages", [])
    ]
    merged = merge_tables(values, {**settings, **({"stages": stages} if stages else {})})
    if "captions" in merged["data"].get("text", {}):  # no longer than the teacher's stand-in reads
        merged["data"]["text"]["captions"] = 16
    if merged.get("model", {}).get("kind") == "dual-encoder" and merged["start"].get("parts"):  # as large as the stand-in that it starts from
        merged["model"] |= tomllib.loads(f"embed_dim = 24\nvision = {VISION}\ntext = {TEXT}")
    text = json.dumps(merged).replace("scenes:?n=40000", "scenes:?n=96")
    return json.loads(text.replace('"layer": 4', '"layer": 2'))  # the last one of a stand-in


@pytest.mark.parametrize("key", KEYS)
def test_both_arms_give_the_figures_that_the_claim_reads(key, models, tmp_path):
    claim = claim_of(key)
    tasks = tuple(task.model_copy(update={"limit": 6, "resamples": 100}) for task in claim.tasks)
    updates = {}
    for number, arm in enumerate(claim.arms):
        carving = Carving(("concept",), 0.5, held_out=True)
        unit = Unit(arm.name, "tune", 0, shrunk(arm.values), PART, "scenes:?n=24&split=test", carving, tasks)
        made = train_unit(unit, tmp_path / "units" / str(number), models, note=quiet)
        wanted = {claim.metric_of(arm.name), *(gate.metric for gate in claim.options.gates)}
        if made["figures"].get("hallucination.mentions") == 0:  # of nothing said, no share is absent
            wanted -= {"hallucination.absent_object_rate"}
        assert wanted <= set(made["figures"])
        updates[arm.name] = made["updates"]
    assert updates[claim.method.name] == max(1, len(claim.method.values.get("stages", [])))
    assert updates[claim.baseline.name] == (1 if key == "povid" else updates[claim.method.name])


@pytest.mark.parametrize("key", KEYS)
def test_arms_learn_from_drawn_scenes_of_the_training_split_and_are_scored_on_others(key):
    claim = claim_of(key)
    assert claim.train.startswith("scenes:?n=40000")
    assert claim.test == "scenes:?n=1000&split=test"
    assert claim.options.margin > 0
    assert claim.options.seeds == 5
