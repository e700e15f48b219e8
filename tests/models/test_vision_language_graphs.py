"""The graphs of a bundle give what the model gives: in torch, and exported."""

import numpy as np
import pytest
import torch

from tests.models.model_makers import TOWER, answering, pictures_of, rows_of
from vlm.config.errors import RequestError
from vlm.export.graphs import export_part

IMAGE = 3
ROWS = [[2, 5, IMAGE, 6, 7], [2, 8, 9], [IMAGE, 10, IMAGE, 11]]
COUNTS = [1, 0, 2]


def written(parts, model, pictures, steps):
    """Logits of the prompts and of `steps` tokens behind them, by a loop over the three functions in `parts`."""
    options = model.language.options
    seen = parts["vision"](model.pixel_norms["main"](pictures.values))
    embed, rows, taken = parts["embed"], [], iter(seen)
    for row in ROWS:
        rows.append(torch.cat([next(taken) if token == IMAGE else embed(torch.tensor([[token]]))[0] for token in row]))
    size = max(map(len, rows))
    x, mask = torch.zeros(3, size, options.width), torch.zeros(3, size, dtype=torch.int64)
    for row, part in enumerate(rows):
        x[row, size - len(part) :], mask[row, size - len(part) :] = part, 1
    past = [torch.zeros(3, options.depth, options.kv_heads, 0, 4) for _ in range(2)]
    logits, *past = parts["decoder"](x, mask, (mask.cumsum(1) - 1).clamp(min=0), *past)
    out = [logits]
    for token in steps:
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], 1)
        x = embed(torch.full((3, 1), token))
        logits, *past = parts["decoder"](x, mask, mask.sum(1, keepdim=True) - 1, *past)
        out.append(logits)
    return torch.stack(out)


def expected(model, pictures, steps):
    logits, cache = model.prefill(rows_of(ROWS), {"image": pictures})
    out = [logits]
    for token in steps:
        logits, cache = model.advance(torch.full((3,), token), cache)
        out.append(logits)
    return torch.stack(out)


@torch.no_grad()
def test_the_graphs_together_are_the_model():
    model, pictures = answering(shake=0.2), pictures_of(COUNTS)
    parts = {name: part.module for name, part in model.export_parts().items()}
    got = written(parts, model, pictures, [20, 21, 22])
    assert torch.allclose(got, expected(model, pictures, [20, 21, 22]), atol=1e-5)


@pytest.mark.long
@torch.no_grad()
def test_the_exported_graphs_are_the_model(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = answering(shake=0.2, language=dict(width=16, depth=2, heads=4, kv_heads=2, ffn_width=24, length=64))
    pictures, sessions = pictures_of(COUNTS), {}
    for name, part in model.export_parts().items():
        export_part(name, part, tmp_path / f"{name}.onnx", opset=18)
        sessions[name] = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx")

    def function(name):
        def call(*given):
            session = sessions[name]
            feed = {wanted.name: tensor.numpy() for wanted, tensor in zip(session.get_inputs(), given, strict=True)}
            found = [torch.from_numpy(np.asarray(array)) for array in session.run(None, feed)]
            return found if len(found) > 1 else found[0]

        return call

    got = written({name: function(name) for name in sessions}, model, pictures, [20, 21])
    assert torch.allclose(got, expected(model, pictures, [20, 21]), atol=1e-5)


def test_models_without_a_bundle_say_so():
    for named in (
        {"fusion": {"kind": "cross-attention", "every": 2}},
        {"tokens": {"keep": {"layers": [1], "ratios": [0.5]}}},
        {"towers": {"main": TOWER, "side": TOWER}},
    ):
        with pytest.raises(RequestError, match="has no bundle"):
            answering(**named).export_parts()
