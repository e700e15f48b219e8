"""A prompt that `vlm finetune coop` has learned, in every command that reads its run; and labels by descriptors."""

import json

import pytest
import torch

from vlm.cli.main import main
from vlm.export.drawings import drawn_picture
from vlm.models import load_model
from vlm.runtime.bundle import open_bundle
from vlm.runtime.prompt import LearnedPrompt
from vlm.tuning.prompt import CONTEXT

FEW = ["train.epochs=1", "train.batch_size=8", "data.source=scenes:?n=96&objects=1", "data.val=scenes:?n=12&objects=1&split=val"]
WORDS = [*FEW, "data.sampler.k=2", "tuning.prompt.length=3", "optimizer.lr=1.0", "scale.threads=1", "--no-report"]


@pytest.fixture(scope="module", params=["false", "true"])
def run(request, tmp_path_factory, clip_model):
    """(run, whether each class has its own vectors)"""
    output = tmp_path_factory.mktemp("coop") / "run"
    own = [f"tuning.prompt.per_class={request.param}"]
    assert main(["finetune", "coop", "--model", str(clip_model), "--output", str(output), *WORDS, *own]) == 0
    return output, request.param == "true"


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("bundle") / "bundle"
    assert main(["export", str(run[0]), "--output", str(output)]) == 0
    return output


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    drawn_picture(40, 30, 3).save(path)
    return path


def said(capsys, *words):
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def scores(answer):
    return {entry["label"]: entry["score"] for entry in answer["predictions"]}


def test_coop_every_other_weight_keeps_its_bits(run, clip_model):
    before, after = load_model(clip_model).state_dict(), load_model(run[0]).state_dict()
    assert set(after) - set(before) == {CONTEXT}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_coop_what_is_saved_names_no_class_unless_each_has_its_own(run):
    text = json.loads((run[0] / "model" / "vlm.json").read_text())["options"]["text"]["prompt"]
    assert text["length"] == 3
    assert bool(text["classes"]) == run[1]
    assert not (run[0] / "objectives.safetensors").exists()


def test_labels_are_written_with_the_learned_prompt(capsys, run, picture):
    labels = "square,circle"
    learned = LearnedPrompt(3)
    if run[1]:
        assert set(scores(said(capsys, "predict", run[0], picture))) >= {"square", "circle"}
        capsys.readouterr()
        assert main(["predict", str(run[0]), str(picture), "--labels", "a new class,circle"]) == 2
        assert "'a new class' is none of them" in capsys.readouterr().err
        return
    by_default = scores(said(capsys, "predict", run[0], picture, "--labels", labels))
    assert by_default == scores(said(capsys, "predict", run[0], picture, "--labels", labels, "--template", learned.template()))
    assert by_default != scores(said(capsys, "predict", run[0], picture, "--labels", labels, "--template", "{}"))
    others = scores(said(capsys, "predict", run[0], picture, "--labels", "a new class,circle"))
    assert others["circle"] == pytest.approx(by_default["circle"], abs=1e-4)


def test_evaluation_writes_classes_with_the_learned_prompt(capsys, run, clip_model):
    words = ["--task", "zero-shot", "--labels-from", "category", "--data", "scenes:?n=20&objects=1&split=val"]
    learned = said(capsys, "evaluate", run[0], *words)
    stored = {path.stem: json.loads(path.read_text()) for path in (run[0] / "evaluation").iterdir()}
    assert set(stored) == {"learned", "hand"}
    assert learned["details"]["classes"] >= 5
    hand = [said(capsys, "evaluate", model, *words, "--template", "a photo of a {}.")["metrics"] for model in (run[0], clip_model)]
    assert hand[0] == hand[1]  # a text without learned words is what it was


def test_a_bundle_says_the_same(capsys, run, bundle, picture):
    prompt = open_bundle(bundle).prompt
    assert prompt.length == 3
    assert bool(prompt.classes) == run[1]
    words = [] if run[1] else ["--labels", "square,circle,star"]
    one, two = (scores(said(capsys, "predict", model, picture, *words)) for model in (run[0], bundle))
    assert set(one) == set(two)
    assert all(two[label] == pytest.approx(score, abs=2e-3) for label, score in one.items())


def test_a_prompted_model_can_be_trained_on(capsys, run, tmp_path):
    words = ["train.steps=1", "train.batch_size=4", "data.source=scenes:?n=24", "evaluation.tasks=[]", "scale.threads=1", "--no-report"]
    again = ["finetune", "coop", "--model", str(run[0]), *words, "data.sampler=!delete"]
    assert main([*again, "--output", str(tmp_path / "refused")]) == 2
    assert "has learned a prompt already" in capsys.readouterr().err
    on = ["tuning.prompt=!delete", f'tuning.train=["{CONTEXT}"]', "data.source=scenes:?n=96&objects=1"]
    assert main([*again, "--output", str(tmp_path / "on"), *on]) == 0
    before, after = load_model(run[0]).state_dict(), load_model(tmp_path / "on").state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed <= {CONTEXT}


def test_a_prompt_wants_a_trained_model(capsys, tmp_path):
    words = ["pretrain", "clip-tiny", "--output", str(tmp_path / "x"), "tuning.prompt={}", "data.source=scenes:?n=24", "--no-report"]
    assert main(words) == 2
    assert "tuning.prompt learns the words of a trained dual encoder" in capsys.readouterr().err


def test_dclip_labels_come_with_what_speaks_for_them(capsys, clip_model, clip_bundle, picture, tmp_path):
    path = tmp_path / "seen.json"
    path.write_text(json.dumps({"square": ["four corners", "a flat side"], "circle": ["no corner"]}))
    for model in (clip_model, clip_bundle):
        answer = said(capsys, "predict", model, picture, "--descriptors", path)
        texts = {entry["label"]: entry["why"] for entry in answer["predictions"]}
        assert {reason["text"] for reason in texts["square"]} == {"square, which has four corners", "square, which is a flat side"}
        opened = open_bundle(clip_bundle)
        scale, bias = opened.scale, opened.bias
        for entry in answer["predictions"]:
            mean = sum(reason["score"] for reason in entry["why"]) / len(entry["why"])
            assert scale * mean + bias == pytest.approx(entry["score"], abs=1e-3)
        capsys.readouterr()
        assert main(["predict", str(model), str(picture), "--descriptors", str(path), "--why", "1", "-k", "2"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 4
    capsys.readouterr()
    assert main(["predict", str(clip_model), str(picture), "--descriptors", str(path), "--labels", "wolf,square"]) == 3
    assert "class 'wolf' has no descriptors" in capsys.readouterr().err
    assert main(["predict", str(clip_model), str(picture), "--labels", "a,b", "--reduce", "score-max"]) == 2


def test_dclip_a_task_of_the_command_line_and_its_control(capsys, clip_model, tmp_path):
    path = tmp_path / "seen.json"
    shapes = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "arrow")
    path.write_text(json.dumps({name: [f"seen {i}", f"shown {i}"] for i, name in enumerate(shapes)}))
    words = ["--task", "zero-shot", "--labels-from", "category", "--data", "scenes:?n=20&objects=1&split=val", "--descriptors", path]
    plain = said(capsys, "evaluate", clip_model, *words)
    assert plain["details"]["descriptors"] == {"texts": plain["details"]["classes"] * 2, "fewest": 2, "most": 2}
    other = said(capsys, "evaluate", clip_model, *words, "--control", "names", "--control", "random-words", "--reduce", "score-max")
    figures = other["metrics"]
    assert {"names", "over_names", "random-words", "over_random-words"} <= set(figures)
    for control in ("names", "random-words"):
        assert figures[f"over_{control}"]["top1"] == pytest.approx(figures["top1"] - figures[control]["top1"], abs=1e-5)
        assert set(other["intervals"][f"over_{control}"]["top1"]) == {"lower", "upper"}
    alone = said(capsys, "evaluate", clip_model, *words[:-2], "--reduce", "score-max")
    assert alone["metrics"]["top1"] == figures["names"]["top1"]
    capsys.readouterr()
    assert main(["evaluate", str(clip_model), *map(str, words), "--control", "names"]) == 0
    assert "names" in capsys.readouterr().out
    assert main(["evaluate", str(clip_model), *map(str, words), "--control", "shuffled"]) == 2
