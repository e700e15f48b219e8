"""What makes a stored unit stale, and what does not."""

import ast
import shutil

import pytest

from vlm.data.sources.uri import open_source
from vlm.training.preset import load_preset, stages_of
from vlm.workflows.reproduce import fingerprint
from vlm.workflows.reproduce.fingerprint import (
    CATALOGUES,
    CORE,
    fingerprint_of_code,
    fingerprint_of_data,
    normalised,
)

PLAIN = "def f(x):\n    return x + 1\n"


def code(text):
    return normalised(ast.parse(text))


def test_comments_docstrings_and_layout_change_nothing():
    dressed = '"""A module."""\n\n# why\ndef f(x):\n    """What."""\n    # how\n    return (x\n        + 1)\n'
    assert code(dressed) == code(PLAIN)


@pytest.mark.parametrize("changed", ["def f(x):\n    return x + 2\n", "def g(x):\n    return x + 1\n", PLAIN + "f(1)\n"])
def test_code_changes_it(changed):
    assert code(changed) != code(PLAIN)


def test_a_docstring_alone_is_a_body():
    assert code('def f():\n    """Nothing."""\n') == code("def f():\n    pass\n")


def visited(key):
    """The modules that the fingerprint of a preset reads."""
    seen = []
    original = fingerprint._code
    fingerprint._code = lambda module: seen.append(module) or original(module)
    try:
        fingerprint_of_code(stages_of(load_preset(key)[1]))
    finally:
        fingerprint._code = original
    return set(seen)


def test_the_parts_of_a_preset_are_in_it_and_others_are_not():
    clip, language = visited("clip-tiny"), visited("lm-tiny")
    assert {"vlm.objectives.contrastive", "vlm.models.dual_encoder", *CORE} <= clip
    assert "vlm.models.language" in language
    assert "vlm.models.language" not in clip
    assert "vlm.objectives.token_ce" not in clip
    assert not CATALOGUES & clip


def test_the_trainer_is_in_it():
    for module in ("vlm.training.engine", "vlm.training.optimizer", "vlm.data.loader", "vlm.data.decode"):
        assert module in visited("clip-tiny")


def test_catalogues_exist():
    import importlib

    for name in CATALOGUES | set(CORE):
        importlib.import_module(name)


def test_the_content_of_the_data_counts_and_its_place_does_not(pictures, tmp_path):
    first = fingerprint_of_data(open_source(str(pictures / "train.jsonl")))
    shutil.copytree(pictures, tmp_path / "copy")
    assert fingerprint_of_data(open_source(str(tmp_path / "copy" / "train.jsonl"))) == first
    path = tmp_path / "copy" / "train.jsonl"
    path.write_text(path.read_text().replace("red green", "red grey", 1))
    assert fingerprint_of_data(open_source(str(path))) != first


def test_drawn_scenes_differ_by_seed_split_and_number():
    addresses = ["scenes:?n=10", "scenes:?n=11", "scenes:?n=10&seed=1", "scenes:?n=10&split=val"]
    assert len({fingerprint_of_data(open_source(uri)) for uri in addresses}) == len(addresses)
    assert fingerprint_of_data(open_source("scenes:?n=10")) == fingerprint_of_data(open_source("scenes:?n=10"))
