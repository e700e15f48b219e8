"""Soups: exact sums, whole directories, and only of models that fit."""

import json
import shutil

import pytest
import torch

from tests.training.test_resume import begin
from vlm.cli.main import main
from vlm.config.errors import CheckpointError, RequestError
from vlm.data.tokenizer import Tokenizer
from vlm.models import load_model
from vlm.workflows.soup import soup


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one recipe with other seeds, and one of another width."""
    folder = tmp_path_factory.mktemp("soup")
    for name, overrides in (("a", ("train.seed=1",)), ("b", ("train.seed=2",)), ("wide", ("model.embed_dim=24",))):
        begin(folder / name, "train.steps=0", "evaluation.tasks=[]", *overrides).train()
    return folder


def states(*paths):
    return [load_model(path).state_dict() for path in paths]


@pytest.mark.parametrize("weights", [None, (0.75, 0.25), (1.5, -0.5)])
def test_each_tensor_is_the_weighted_sum(runs, tmp_path, weights):
    soup([runs / "a", runs / "b"], tmp_path / "made", weights)
    first, second, made = states(runs / "a", runs / "b", tmp_path / "made")
    one, other = weights or (0.5, 0.5)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name, tensor in made.items():
        assert torch.equal(tensor, (one * first[name].double() + other * second[name].double()).float()), name


def test_all_of_one_model_is_that_model_and_a_directory_like_it(runs, tmp_path):
    soup([runs / "a", runs / "b"], tmp_path / "made", (1, 0))
    first, made = states(runs / "a", tmp_path / "made")
    assert all(torch.equal(first[name], tensor) for name, tensor in made.items())
    names = {path.name for path in (runs / "a/model").iterdir()}
    assert {path.name for path in (tmp_path / "made").iterdir()} == names
    assert (tmp_path / "made/preprocessor_config.json").read_text() == (runs / "a/model/preprocessor_config.json").read_text()
    assert Tokenizer.load(tmp_path / "made").vocab_size == Tokenizer.load(runs / "a/model").vocab_size


def test_models_that_do_not_fit_are_named_and_nothing_is_written(runs, tmp_path):
    with pytest.raises(CheckpointError, match=r"wide/model: tensor '.*' differs"):
        soup([runs / "a", runs / "wide"], tmp_path / "made")
    other = tmp_path / "other"
    shutil.copytree(runs / "b/model", other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        soup([runs / "a", other], tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("weights", [(0.5, 0.6), (1.0,), (float("nan"), 1.0)])
def test_weights_that_do_not_fit_are_refused(runs, tmp_path, weights):
    with pytest.raises(RequestError, match="weights"):
        soup([runs / "a", runs / "b"], tmp_path / "made", weights)


def test_the_command(runs, tmp_path, capsys):
    words = ["soup", str(runs / "a"), str(runs / "b"), "--output", str(tmp_path / "made")]
    assert main([*words, "--weights", "0.25,0.75", "--json"]) == 0
    assert [part["weight"] for part in json.loads(capsys.readouterr().out)["models"]] == [0.25, 0.75]
    assert main(words) == 2
    assert f"{tmp_path / 'made'}: something is there already" in capsys.readouterr().err
    assert main([*words, "--weights", "half"]) == 2
    assert main(["soup", str(runs / "a"), "--output", str(tmp_path / "one")]) == 2
