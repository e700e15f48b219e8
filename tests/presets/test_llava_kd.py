"""llava-kd at the size of a test: which terms a sample has, and that equal models have none."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.presets.stand_ins import assembled, begin
from vlm.training.preset import stages_of
from vlm.workflows.reproduce.claim import claim_of, settled

TERMS = ("response", "visual", "relation")


def figures(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def mixed(tmp_path):
    """mixed.jsonl: samples with a picture and without one in turns; text.jsonl: the latter alone."""
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(tmp_path / "p.png")
    rows = []
    for i in range(8):
        talk = [{"role": "user", "content": "what is there?"}, {"role": "assistant", "content": f"a red circle {i}"}]
        rows.append({"messages": talk, **({} if i % 2 else {"image": "p.png"})})
    for name, chosen in (("mixed", rows), ("text", rows[1::2])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)) + "\n")
    return tmp_path


def talks(path):
    return [
        f'data.source="{path}"', "data.val=!delete", 'data.streams.text={kind="conversation", messages="messages", text_only=true}',
        "data.streams.text.questions=!delete", "stages.dpt=!delete", "stages.sft=!delete", "stages.dft.train.steps=1",
        "evaluation.tasks=[]",
    ]  # fmt: skip


def test_llava_kd_text_only_samples_have_no_visual_terms(models, tmp_path, mixed):
    begin(tmp_path / "run", "llava-kd", models, *talks(mixed / "text.jsonl")).train()
    [line] = figures(tmp_path / "run")
    assert line["train/visual"] == line["train/relation"] == 0
    assert line["train/answer"] > 0
    assert line["train/response"] > 0
    run = begin(tmp_path / "mixed", "llava-kd", models, *talks(mixed / "mixed.jsonl"), "train.batch_size=8")
    with assembled(run) as parts:
        batch = next(parts.loader)
        counts = {name: parts.objectives[name].count(batch).item() for name in TERMS}
    assert len(batch.keys) == 8
    assert counts == {"response": 8, "visual": 4, "relation": 4}


def test_llava_kd_a_teacher_that_is_the_student_has_nothing_to_say(models, tmp_path):
    same = str(models["vlm-tiny"])
    settings = [
        "start.parts=!delete", f'start.model="{same}"', f'stages.dpt.companions.teacher.source="{same}"',
        "stages.dpt.train.steps=1", "stages.sft.train.steps=0", "stages.dft.train.steps=0", "train.precision=float32",
        "evaluation.tasks=[]",
    ]  # fmt: skip
    begin(tmp_path / "same", "llava-kd", models, *settings).train()
    [line] = figures(tmp_path / "same")
    assert {name: line[f"train/{name}"] for name in TERMS} == pytest.approx(dict.fromkeys(TERMS, 0), abs=1e-5)
    begin(tmp_path / "other", "llava-kd", models, *settings[3:]).train()
    [line] = figures(tmp_path / "other")
    assert all(line[f"train/{name}"] > 1e-4 for name in TERMS)


def test_llava_kd_its_baseline_has_the_same_updates_and_no_teacher():
    method, baseline = (settled(arm.values)[1] for arm in claim_of("llava-kd").arms)
    for own, other in zip(method.values["stages"], baseline.values["stages"], strict=True):
        assert own["name"] == other["name"]
        assert own["train"] == other["train"]
        assert own["tuning"] == other["tuning"]
        assert own.get("data") == other.get("data")
        assert not other.get("companions") or other["companions"] == "!delete"
    assert [[o.name for o in stage.objectives] for stage in stages_of(baseline)] == [["answer"]] * 3
    taught = [[o.name for o in stage.objectives] for stage in stages_of(method)]
    assert taught == [["answer", *TERMS], ["answer"], ["answer", *TERMS]]
    assert [o.weight for o in stages_of(method)[2].objectives] == [1.0, 1.0, 1.0, 0.5]
