"""One connector of every kind and step, small, for tests that hold for all."""

from __future__ import annotations

import torch
from pydantic import TypeAdapter

from vlm.connectors import Connector, ConnectorOptions

ADAPTER = TypeAdapter(ConnectorOptions)

KINDS: dict[str, dict] = {
    "linear": {"kind": "linear"},
    "linear-k": {"kind": "linear", "tokens": 3},
    "mlp": {"kind": "mlp", "hidden": 9, "activation": "quick_gelu"},
    "pool2d": {"kind": "mlp", "pre": {"kind": "pool2d", "grid": [2, 3]}, "norm": "layernorm", "norm_at": "tokens"},
    "pixel-shuffle": {"kind": "mlp", "depth": 3, "pre": {"kind": "pixel-shuffle", "factor": 2}, "norm": "rmsnorm"},
    "concat": {"kind": "mlp", "depth": 1, "pre": {"kind": "concat", "k": 3}, "norm": "layernorm", "norm_at": "output"},
    "qformer": {"kind": "qformer", "queries": 5, "width": 8, "heads": 2, "depth": 3},
    "qformer-pre": {"kind": "qformer", "queries": 1, "heads": 2, "cross_every": 1, "norm_order": "pre", "norm": "rmsnorm"},
    "resampler": {"kind": "resampler", "latents": 5, "heads": 7},
    "resampler-apart": {"kind": "resampler", "latents": 2, "width": 8, "heads": 2, "concat_latents": False, "bias": True},
}
GRID = (4, 6)
N = GRID[0] * GRID[1]
WIDTH_IN, WIDTH_OUT = 7, 10
K = {
    "linear": 24, "linear-k": 3, "mlp": 24, "pool2d": 6, "pixel-shuffle": 6, "concat": 8, "qformer": 5,
    "qformer-pre": 1, "resampler": 5, "resampler-apart": 2,
}  # fmt: skip


def made(name: str, seed: int = 0, **change: object) -> Connector:
    """A connector in evaluation mode. Weights that start at 0 or 1 are moved, so that a test can see them."""
    torch.manual_seed(seed)
    module = ADAPTER.validate_python({**KINDS[name], **change}).build(WIDTH_IN, WIDTH_OUT, GRID).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def tokens(n: int, seed: int = 0, count: int = N) -> torch.Tensor:
    return torch.randn(n, count, WIDTH_IN, generator=torch.Generator().manual_seed(seed))
