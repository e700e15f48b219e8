"""dreamlip at the size of a test: its rows of text, both arms of its claim, a resume with the same bits, what is exported."""

import math

from safetensors import safe_open

from tests.presets.stand_ins import FEW, assembled, begin, digest, resumed_after
from vlm.data import open_source
from vlm.data.captions import sentences
from vlm.evaluation import LocalisationOptions
from vlm.workflows.reproduce.claim import claim_of

TASK = '{task="localisation", name="localisation", phrase="a {size} {color} {shape}", resamples=100}'


def test_dreamlip_a_picture_has_its_caption_and_k_sentences_of_its_own_scene(tmp_path):
    run = begin(tmp_path / "run", "dreamlip", {}, "train.batch_size=12")
    scenes = open_source(FEW)
    with assembled(run) as parts:
        batch = next(parts.loader)
        text = batch["text"]
        assert text.slot.tolist() == [0, 1, 2, 3] * 12
        assert text.sample_index.tolist() == [i for i in range(12) for _ in range(4)]
        drawn = {
            row: sentences(fields["long_caption"], [".", "\n"])
            for row, key in enumerate(batch.keys)
            for fields in [scenes.read(int(key.rpartition(":")[2])).fields]
        }
        for row, (sample, slot) in enumerate(zip(text.sample_index.tolist(), text.slot.tolist())):
            said = run.tokenizer.decode(text.values[row][text.mask[row]].tolist())  # a long one is cut
            assert slot == 0 or any(whole.startswith(said) for whole in drawn[sample])
        assert dict(parts.objectives["grouping"].named_parameters()).keys() == {"log_scale"}


def test_dreamlip_learns_in_parts_and_resumes_with_the_same_bits(tmp_path):
    settings = ("train.steps=3", "train.accumulate=2", "train.checkpoint_every=1", "train.keep=0", f"evaluation.tasks=[{TASK}]")
    run = begin(tmp_path / "whole", "dreamlip", {}, *settings)
    result = run.train()
    expected = digest(tmp_path / "whole")
    lines = [line for line in expected[1] if "train/loss" in line]
    assert len(lines) == 3
    for line in lines:
        both = line["train/multi-positive"], line["train/grouping"]
        assert all(map(math.isfinite, both))
        assert math.isclose(line["train/loss"], sum(both), rel_tol=1e-5)
    assert result.evaluations[0]["metrics"].keys() == {"accuracy", "quadrant"}
    for step in (1, 2):
        assert resumed_after(tmp_path / "whole", step, tmp_path / f"from-{step}") == expected
    # Pooled vectors are all that is exported, and no weight of an objective is among the model's.
    with safe_open(tmp_path / "whole" / "model" / "model.safetensors", "pt") as held:
        assert [name for name in held.keys() if "scale" in name] == ["logit_scale"]  # noqa: SIM118
    with assembled(run) as parts:
        assert {name: part.outputs for name, part in parts.model.export_parts().items()} == {"vision": ["embedding"], "text": ["embedding"]}


def test_dreamlip_the_claim_compares_with_the_slots_alone():
    claim = claim_of("dreamlip")
    names = {arm.name: [o["name"] for o in arm.values["objectives"]] for arm in claim.arms}
    assert names[claim.method.name] == ["multi-positive", "grouping"]
    assert names[claim.baseline.name] == ["multi-positive"]
    assert claim.method.values["data"] == claim.baseline.values["data"]
    assert claim.test == "scenes:?n=500&split=test"
    asked = next(task for task in claim.tasks if task.title == "localisation")
    assert isinstance(asked, LocalisationOptions)
    assert not any(word in asked.phrase for word in ("left", "top", "sentence"))  # no word of place
