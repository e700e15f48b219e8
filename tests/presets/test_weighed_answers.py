"""Weights of the tokens of answers in a model that reads pictures, from a preset's own words: what they do to its loss."""

import json

import pytest

from tests.presets.stand_ins import begin


def losses(tmp_path, models, name, weights):
    """Of two updates of `vlm-tiny`, whose answers list what is in the picture."""
    steps = ["stages.align.train.steps=2", "stages.instruct.train.steps=0", "stages.align.tuning.train=['*']"]
    steps += ["schedule.warmup=0", "optimizer.lr=0.1", "evaluation.tasks=[]", "train.precision=float32"]
    stream = f'stages.align.data.streams.heavy={{kind="token-weights", {weights}}}'
    own = [stream, 'objectives.answer.weights="heavy"'] if weights else []
    if weights:  # the other stage takes no step, but its data are read
        own.append(stream.replace("align", "instruct"))
    begin(tmp_path / name, "vlm-tiny", models, *steps, *own).train()
    lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_words_and_ends_of_answers_weigh_in_the_loss(models, tmp_path):
    """A model that knows nothing finds all tokens about as hard; after an update on some of them these are easier than the rest."""
    plain = losses(tmp_path, models, "plain", "")
    assert len(plain) == 2
    assert losses(tmp_path, models, "alike", "rest=3.0") == pytest.approx(plain, rel=1e-5)
    assert losses(tmp_path, models, "words", "words={red=8.0, circle=8.0}")[1] != pytest.approx(plain[1], rel=1e-4)
    assert losses(tmp_path, models, "ends", "end=0.0")[1] != pytest.approx(plain[1], rel=1e-4)
