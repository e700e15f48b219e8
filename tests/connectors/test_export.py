"""Connectors as graphs: torch.export and ONNX, another batch size than the exported one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from tests.connectors.kinds import KINDS, N, made, tokens
from vlm.export.graphs import export_part
from vlm.types.export import ExportPart


class Tokens(torch.nn.Module):
    """The tokens of a connector alone, without a mask, as a vision graph gives them."""

    def __init__(self, connector: torch.nn.Module) -> None:
        super().__init__()
        self.connector = connector

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.connector(x)[0]


@pytest.mark.parametrize("name", KINDS)
def test_torch_export_takes_any_batch(name):
    module = made(name)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(module, (tokens(2), torch.rand(2, N) > 0.5), dynamic_shapes=({0: batch}, {0: batch}))
    graph = program.module()
    for n in (1, 5):
        x, mask = tokens(n, seed=n), torch.rand(n, N, generator=torch.Generator().manual_seed(n)) > 0.5
        mask[0] = False
        for ours, theirs in zip(module(x, mask), graph(x, mask), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "linear-k", "pool2d", "pixel-shuffle", "concat", "qformer", "resampler"])
def test_onnx_equals_torch_on_another_batch_size(name, tmp_path: Path):
    module = made(name)
    part = ExportPart(Tokens(module), {"x": tokens(2)}, {"x": {0: "batch"}}, ["tokens"])
    session = saved(part, tmp_path / "connector.onnx", name)
    for n in (1, 5):
        x = tokens(n, seed=n)
        (out,) = session.run(None, {"x": x.numpy()})
        assert np.abs(out - module(x)[0].detach().numpy()).max() < 1e-5


@pytest.mark.parametrize("name", ["pool2d", "qformer", "resampler"])
def test_onnx_with_a_mask(name, tmp_path: Path):
    module = made(name)
    mask = torch.rand(2, N) > 0.5
    part = ExportPart(
        module, {"x": tokens(2), "mask": mask}, {"x": {0: "batch"}, "mask": {0: "batch"}}, ["tokens", "kept"]
    )
    session = saved(part, tmp_path / "connector.onnx", name)
    x, mask = tokens(5, seed=4), torch.rand(5, N, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[1] = False
    out, kept = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    ours, ours_kept = module(x, mask)
    assert np.abs(out - ours.detach().numpy()).max() < 1e-5
    assert np.array_equal(kept, ours_kept.numpy())


def saved(part: ExportPart, path: Path, name: str) -> onnxruntime.InferenceSession:
    """The part written and opened: plain operators alone, whatever the connector."""
    export_part(name, part, path, opset=18)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
