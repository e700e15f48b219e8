"""`vlm predict` with the head that a run has trained."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vlm.cli.main import main
from vlm.export.drawings import drawn_picture

WORDS = ["train.steps=2", "train.batch_size=8", "train.checkpoint_every=0", "data.source=scenes:?n=40", "scale.threads=1", "--no-report"]


@pytest.fixture(scope="module", params=["true", "false"])
def run(request, tmp_path_factory, clip_model):
    """A finetuned run whose head reads unit vectors, or the vectors as they are."""
    output = tmp_path_factory.mktemp("head") / "run"
    normalise = f"objectives.classification.normalise={request.param}"
    words = ["finetune", "linear-probe", "--model", str(clip_model), "--output", str(output), *WORDS, normalise, "evaluation.tasks=[]"]
    assert main(words) == 0
    return output, request.param == "true"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    drawn_picture(40, 30, 3).save(path)
    return path


def test_a_trained_head_answers_with_its_own_classes(capsys, run, picture):
    import torch

    from vlm.evaluation.encoder import open_model

    output, normalise = run
    capsys.readouterr()
    assert main(["predict", str(output), str(picture), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["head"], answer["form"]) == ("classification", "softmax")
    found = {entry["label"]: entry["score"] for entry in answer["predictions"]}

    model = open_model(output)
    pixels = torch.from_numpy(model.prepare_image(str(picture)))[None]
    with torch.no_grad():
        _, pooled, _ = model.model.vision(model.model.pixel_norm(pixels), ())
        vector = model.model.vision.project(pooled)[0].double().numpy()
    tensors = {name: value.astype(np.float64) for name, value in load_file(output / "objectives.safetensors").items()}
    given = vector / np.linalg.norm(vector) if normalise else vector
    wanted = tensors["classification.head.weight"] @ given + tensors["classification.head.bias"]
    assert len(found) == len(wanted) > 3
    assert sorted(found.values()) == pytest.approx(sorted(wanted.tolist()), abs=1e-5)
    assert sum(entry["probability"] for entry in answer["predictions"]) == pytest.approx(1, abs=1e-5)


def test_labels_win_over_the_head(capsys, run, picture):
    capsys.readouterr()
    assert main(["predict", str(run[0]), str(picture), "--labels", "a,b", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["head"] is None
    assert {entry["label"] for entry in answer["predictions"]} == {"a", "b"}


def test_a_model_without_a_head_wants_labels(capsys, clip_model, clip_bundle, picture):
    for model in (clip_model, clip_bundle):
        assert main(["predict", str(model), str(picture)]) == 2
        assert "no trained head" in capsys.readouterr().err


def test_a_template_needs_labels(capsys, run, picture):
    assert main(["predict", str(run[0]), str(picture), "--template", "a {}"]) == 2
    assert "--labels" in capsys.readouterr().err


def test_a_damaged_head_is_named(capsys, run, picture):
    path = run[0] / "objectives.safetensors"
    kept = path.read_bytes()
    tensors = load_file(path)
    try:
        path.write_bytes(kept[:50])
        assert main(["predict", str(run[0]), str(picture)]) == 3
        assert "objectives.safetensors" in capsys.readouterr().err
        save_file(tensors, path, metadata={"classification": '["one"]'})
        assert main(["predict", str(run[0]), str(picture)]) == 3
        assert "for 1 classes" in capsys.readouterr().err
    finally:
        path.write_bytes(kept)
