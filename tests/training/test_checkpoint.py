"""A checkpoint is complete or absent, and the last good one survives everything."""

import os
import shutil

import pytest
import torch

from vlm.config.errors import CheckpointError, RunFailed
from vlm.training import checkpoint as module
from vlm.training.checkpoint import MARKER, Checkpoints


def tree(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"a.weight": torch.randn(3, 4, generator=generator), "b": torch.tensor(step)},
        "optimizer": {"a.weight": {"step": torch.tensor(float(step)), "exp_avg": torch.randn(3, 4, generator=generator)}},
        "average": None,
        "loader": {"position": step, "names": ["x", "y"]},
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def test_a_tree_comes_back_bit_for_bit_and_old_ones_are_retired(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10):
        checkpoints.save(step, tree(step))
    assert checkpoints.steps() == [2, 10]
    assert same(checkpoints.load(10), tree(10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-2"]


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_every_file_of_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path / "good", keep=0)
    checkpoints.save(1, tree(1))
    checkpoints.save(2, tree(2))
    for name in sorted(os.listdir(tmp_path / "good" / "step-2")):
        work = tmp_path / "work"
        shutil.copytree(tmp_path / "good", work)
        path = work / "step-2" / name
        raw = bytearray(path.read_bytes())
        if damage == "delete":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(raw[: len(raw) // 2])
        else:
            raw[len(raw) // 2] ^= 1
            path.write_bytes(raw)
        said = []
        found = Checkpoints(work).newest(said.append)
        assert found is not None
        if found[0] == 1:
            assert same(found[1], tree(1))
            assert (name == MARKER and damage == "delete") or name in said[0]
        else:  # a flip inside the marker's white space or step number changes nothing that is read
            assert name == MARKER
            assert damage == "flip"
        if damage != "delete" and name != MARKER:
            with pytest.raises(CheckpointError, match=name):
                Checkpoints(work).newest(said.append, strict=True)
        shutil.rmtree(work)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_refusing_disk_never_loses_the_last_checkpoint(tmp_path, monkeypatch, call):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, tree(1))
    real = getattr(os, call)
    for failing in range(1, 40):
        count = [0]

        def refuse(*arguments, _failing=failing, _count=count):
            _count[0] += 1
            if _count[0] == _failing:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        monkeypatch.setattr(module.os, call, refuse)
        try:
            checkpoints.save(2, tree(2))
        except RunFailed as error:
            assert "step-2" in str(error)
            assert "No space left" in str(error)
        finally:
            monkeypatch.setattr(module.os, call, real)
        found = checkpoints.newest(lambda text: None, strict=True)
        assert found is not None
        assert same(found[1], tree(found[0]))
        if count[0] < failing:
            assert found[0] == 2
            return
    raise AssertionError("saving never succeeded")


def test_a_partial_folder_is_not_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, tree(3))
    shutil.copytree(tmp_path / "step-3", tmp_path / ".step-4.partial")
    (tmp_path / "step-5").mkdir()
    assert checkpoints.steps() == [3]
