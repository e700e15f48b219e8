"""NaN in what is read comes out of the native core, as it does of torch: a broken row is never an empty one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlm import ops

Call = Callable[..., Tensor]
KEYS = torch.Size((1, 1, 71, 8))
CASES: dict[str, tuple[Call, list[tuple[int, ...]]]] = {
    "attention": (lambda q, k: ops.attention(q, k, k, return_lse=True)[0], [(1, 2, 9, 8), KEYS]),
    "attention_lse": (lambda q, k: ops.attention(q, k, k, return_lse=True)[1], [(1, 2, 9, 8), KEYS]),
    "row_statistics": (lambda q, k: torch.stack(ops.attention_row_statistics(q, k)[:2]), [(1, 2, 9, 8), KEYS]),
    "column_sums": (lambda q, k: ops.attention_column_sums(q, k), [(1, 2, 9, 8), KEYS]),
    "rows": (lambda q, k: ops.attention_rows(q, k, torch.tensor([0, 3, 5])), [(1, 2, 9, 8), (1, 1, 5, 8)]),
    "merge": (lambda out, lse: torch.cat([t.flatten() for t in ops.merge_attention((out, lse))]), [(1, 2, 3, 5), (1, 2, 3)]),
    "cross_entropy": (lambda h, w: ops.linear_cross_entropy(h, w, torch.arange(6)).loss, [(6, 5), (19, 5)]),
    "distillation": (lambda h, w, t: ops.linear_distillation(h, w, teacher_logits=t), [(6, 5), (19, 5), (6, 19)]),
    "alignment": (lambda cost: ops.sequence_alignment(cost, gamma=0.1), [(2, 5, 6)]),
    "contrastive": (lambda x, y: torch.stack(ops.contrastive_softmax(x, y, torch.tensor(1.0), smoothing=0.1)), [(7, 5), (7, 5)]),
}


@pytest.mark.parametrize("filling", [math.nan, -1], ids=["quiet", "all bits"])
@pytest.mark.parametrize("name", CASES)
def test_nan_comes_out_where_torch_has_it(name: str, filling: float) -> None:
    call, shapes = CASES[name]
    torch.manual_seed(0)
    given = [torch.randn(shape) for shape in shapes]
    broken = torch.tensor([math.nan]) if filling != -1 else torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    for place, t in enumerate(given):
        for at in range(0, t.numel(), max(1, t.numel() // 24)):
            inputs = [x.clone() for x in given]
            inputs[place].view(-1)[at] = broken[0]
            found = []
            for backend in ("native", "torch"):
                with ops.backend(backend):  # type: ignore[arg-type]
                    found.append(call(*inputs).isnan())
            assert torch.equal(*found), (place, at)


def test_a_large_lse_does_not_cost_the_twin_its_weights() -> None:
    """exp(s - lse) of logits near 1e30 would give every one of 70 keys the weight 1."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 70, 8), torch.randn(1, 2, 70, 5)
    with ops.backend("torch"):
        out, _ = ops.attention(q, k, v, bias=torch.full((1, 1, 9, 70), 1e30), return_lse=True)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
