"""Fixtures of the operator tests: one thread unless a test says otherwise, and every instruction-set level."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from vlm.ops.backend import core


@pytest.fixture(autouse=True)
def _two_threads_and_a_seed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level in turn; skipped where this machine lacks it."""
    native = core()
    if request.param not in native.supported_levels():
        pytest.skip(f"{request.param} does not run here")
    before = native.active_level()
    native.set_level(request.param)
    yield request.param
    native.set_level(before)


@pytest.fixture
def onnx_run(tmp_path: Path) -> Callable[..., list[Tensor]]:
    """Export a module with its example inputs, run it in onnxruntime on the same inputs."""

    def run(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        path = tmp_path / "module.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter uses what its own torch deprecates
            torch.onnx.export(module.eval(), inputs, path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        return [torch.from_numpy(o) for o in session.run(None, {n: t.numpy() for n, t in zip(names, inputs)})]

    return run
