"""Late interaction: the tiled kernel and its twin against all token scores, and the exact checks of the method book."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.ops.oracle import error, errors, run
from vlm import ops
from vlm.ops.late_interaction_native import native_late_interaction

Masks = tuple[Tensor | None, Tensor | None]


def tokens(r: int, t: int, c: int, u: int, e: int) -> list[Tensor]:
    return [F.normalize(torch.randn(r, t, e, dtype=torch.float64), dim=-1),
            F.normalize(torch.randn(c, u, e, dtype=torch.float64), dim=-1)]


def ragged(n: int, length: int) -> Tensor:
    """Some tokens masked, a sample of none among them."""
    mask = torch.rand(n, length) < 0.7
    if n > 2:
        mask[1] = False
    return mask


def brute(v: Tensor, w: Tensor, mask_v: Tensor, mask_w: Tensor, mean: bool = True) -> tuple[Tensor, Tensor]:
    """Pair by pair, with the tokens that count cut out; equals only in that the first maximum wins."""
    rows, columns = [], []
    for i, j in itertools.product(range(v.shape[0]), range(w.shape[0])):
        s = v[i][mask_v[i]] @ w[j][mask_w[j]].T
        if s.numel() == 0:
            rows.append(v.new_zeros(()))
            columns.append(v.new_zeros(()))
            continue
        a, b = s.max(1).values, s.max(0).values
        rows.append(a.mean() if mean else a.sum())
        columns.append(b.mean() if mean else b.sum())
    shape = (v.shape[0], w.shape[0])
    return torch.stack(rows).view(shape), torch.stack(columns).view(shape)


def clip_loss(rows: Tensor, columns: Tensor, log_scale: Tensor) -> Tensor:
    label = torch.arange(rows.shape[0])
    tau = log_scale.exp()
    return (F.cross_entropy(tau * rows, label) + F.cross_entropy(tau * columns.T, label)) / 2


SIZES = [(1, 1, 1, 1, 1), (3, 13, 4, 15, 7), (3, 14, 4, 16, 16), (2, 15, 5, 17, 33), (5, 49, 6, 16, 32), (2, 130, 3, 270, 20)]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_core_filip_equals_the_scores_of_all_tokens_with_ragged_masks(
    size: tuple[int, int, int, int, int], mean: bool, backend: ops.Backend
) -> None:
    r, t, c, u, _ = size
    inputs = tokens(*size)
    mask_v, mask_w = ragged(r, t), ragged(c, u)

    def ours(v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return ops.late_interaction(v, w, mask_v=mask_v, mask_w=mask_w, mean=mean)

    def oracle(v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return brute(v, w, mask_v, mask_w, mean)

    dtype = torch.float32 if backend == "native" else torch.float64
    for got, exact in zip(run(ours, inputs, backend, dtype), run(oracle, inputs, "torch", torch.float64)):
        assert error(got, exact) < (1e-5 if backend == "native" else 1e-12)


def test_every_level_agrees_with_the_twin(level: str) -> None:
    inputs = tokens(9, 31, 8, 19, 40)
    mask_v, mask_w = ragged(9, 31), ragged(8, 19)
    assert max(errors(lambda v, w: ops.late_interaction(v, w, mask_v=mask_v, mask_w=mask_w), inputs)) < 1e-5


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_core_filip_one_token_is_clip(backend: ops.Backend) -> None:
    x, y = tokens(37, 1, 37, 1, 24)
    s = torch.tensor(2.3, dtype=torch.float64)

    def late(v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor]:
        return (clip_loss(*ops.late_interaction(v, w), s),)

    def clip(v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor]:
        rows, columns = ops.contrastive_softmax(v[:, 0], w[:, 0], s)
        return ((rows + columns).mean() / 2,)

    dtype = torch.float32 if backend == "native" else torch.float64
    for got, exact in zip(run(late, [x, y, s], backend, dtype), run(clip, [x, y, s], "torch", torch.float64)):
        assert error(got, exact) < (2e-5 if backend == "native" else 1e-12)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_core_filip_order_of_tokens_does_not_matter(backend: ops.Backend) -> None:
    v, w = (t.float() for t in tokens(6, 20, 5, 18, 16))
    with ops.backend(backend):
        expected = ops.late_interaction(v, w)
        got = ops.late_interaction(v[:, torch.randperm(20)], w[:, torch.randperm(18)])
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_core_filip_a_masked_token_changes_nothing(backend: ops.Backend) -> None:
    v, w = (t.float() for t in tokens(6, 20, 5, 18, 16))
    mask_v, mask_w = torch.ones(6, 21, dtype=torch.bool), torch.ones(5, 19, dtype=torch.bool)
    mask_v[:, 20] = mask_w[:, 0] = False
    longer = [torch.cat([v, torch.full((6, 1, 16), float("nan"))], 1), torch.cat([torch.full((5, 1, 16), 9.0), w], 1)]
    plain = run(lambda v, w: ops.late_interaction(v, w), [v, w], backend, torch.float32)
    padded = run(lambda v, w: ops.late_interaction(v, w, mask_v=mask_v, mask_w=mask_w), longer, backend, torch.float32)
    padded = [padded[0], padded[1], padded[2][:, :20], padded[3][:, 1:]]
    for a, b in zip(padded, plain):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_core_filip_doubled_tokens_leave_both_means(backend: ops.Backend) -> None:
    v, w = (t.float() for t in tokens(6, 20, 5, 18, 16))
    with ops.backend(backend):
        for a, b in zip(ops.late_interaction(v, torch.cat([w, w], 1)), ops.late_interaction(v, w)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("batch", "patches", "words", "width"), [(224, 32, 16, 64), (256, 64, 32, 32)])
def test_core_filip_and_filip_memory_is_far_below_the_token_scores(batch: int, patches: int, words: int, width: int) -> None:
    """[B, B, T, U] floats would be 98 and 512 MiB here. Measured in a process of its own: what the peak grows by."""
    import subprocess
    import sys

    script = f"""
import resource, torch
from vlm import ops
torch.set_num_threads(1)
def step(b):
    v, w = torch.randn(b, {patches}, {width}, requires_grad=True), torch.randn(b, {words}, {width}, requires_grad=True)
    with ops.backend("native"):
        rows, columns = ops.late_interaction(v, w)
    (rows.sum() + columns.sum()).backward()
step(8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step({batch})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert grown < 40  # MiB: tokens and gradients are 5, the packed copy 2, places 4, [B, B] 1


def test_error_is_at_most_twice_that_of_torch_in_the_same_type() -> None:
    inputs = tokens(12, 49, 12, 30, 128)
    for mine, theirs in zip(errors(ops.late_interaction, inputs), errors(ops.late_interaction, inputs, "torch")):
        assert mine <= 2 * theirs + 2e-7


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_of_equal_tokens_the_first_gets_the_gradient(backend: ops.Backend) -> None:
    one = torch.ones(2, 5, 3)
    outputs = run(lambda v, w: ops.late_interaction(v, w)[:1], [one, one], backend, torch.float32)
    assert (outputs[2][:, 1:] == 0).all()
    assert outputs[2][:, 0].abs().min() > 0


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_samples_without_tokens_give_zero_and_no_gradient(backend: ops.Backend) -> None:
    inputs = tokens(3, 4, 3, 4, 8)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    rows, columns, dv, dw = run(lambda v, w: ops.late_interaction(v, w, mask_v=mask), inputs, backend, torch.float32)
    assert (rows[1] == 0).all()
    assert (columns[1] == 0).all()
    assert (dv[1] == 0).all()
    assert torch.isfinite(dw).all()
    empty = run(lambda v, w: ops.late_interaction(v, w), [torch.zeros(2, 0, 8), torch.zeros(3, 4, 8)], backend, torch.float32)
    assert (empty[0] == 0).all()
    assert empty[3].shape == (3, 4, 8)


def test_a_broken_token_breaks_its_sample_alone() -> None:
    v, w = (t.float() for t in tokens(4, 5, 3, 6, 8))
    v[2, 1, 3] = float("nan")
    w[0, 2, 0] = float("inf")
    with ops.backend("native"):
        for values in ops.late_interaction(v, w):
            assert values[2].isnan().all()
            assert values[:, 0].isnan().all()
            assert values[[0, 1, 3]][:, 1:].isfinite().all()


def test_bits_do_not_depend_on_the_thread_count(level: str) -> None:
    inputs = tokens(17, 40, 23, 21, 24)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(ops.late_interaction, inputs, "native", torch.float32))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def test_strides_and_half_precision() -> None:
    v, w = (t.float() for t in tokens(5, 12, 6, 9, 16))
    with ops.backend("native"):
        expected = ops.late_interaction(v, w)
        wide = torch.zeros(5, 14, 20)
        wide[:, 1:13, 2:18] = v
        for a, b in zip(ops.late_interaction(wide[:, 1:13, 2:18], w.transpose(1, 2).contiguous().transpose(1, 2)), expected):
            assert torch.equal(a, b)
        narrow = ops.late_interaction(v.bfloat16(), w.bfloat16())
        exact = ops.late_interaction(v.bfloat16().float(), w.bfloat16().float())
    for a, b in zip(narrow, exact):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_gradcheck_of_the_twin() -> None:
    v, w = (t.requires_grad_() for t in tokens(3, 4, 2, 5, 3))
    mask = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])
    torch.autograd.gradcheck(lambda v, w: ops.late_interaction_reference(v, w, mask_w=mask), (v, w))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 6), st.integers(1, 40), st.integers(1, 20), st.integers(0, 10**6))
def test_any_shape_and_mask(r: int, t: int, c: int, u: int, e: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = tokens(r, t, c, u, e)
    mask_v, mask_w = torch.rand(r, t) < 0.5, torch.rand(c, u) < 0.8
    assert max(errors(lambda v, w: ops.late_interaction(v, w, mask_v=mask_v, mask_w=mask_w), inputs)) < 2e-5


def test_selected_tokens_are_the_best_matches_in_order() -> None:
    v, w = tokens(4, 9, 5, 6, 8)
    mask, mask_w = torch.rand(4, 9) < 0.8, torch.rand(5, 6) < 0.8
    mask[2] = torch.arange(9) < 2
    index = ops.select_tokens(v, w, 3, mask=mask, mask_others=mask_w)
    for i in range(4):
        worth = torch.where(mask[i], (v[i] @ w[mask_w].T).max(1).values, -9.0)
        expected = worth.argsort(descending=True)[: min(3, int(mask[i].sum()))].sort().values
        assert index[i][index[i] >= 0].tolist() == expected.tolist()
    taken, kept = ops.take_tokens(v, index)
    assert kept[2].tolist() == [True, True, False]
    assert torch.equal(taken[0, 0], v[0, index[0, 0]])
    every = ops.select_tokens(v, w, 100)
    assert every.tolist() == [list(range(9))] * 4


def test_core_filip_all_tokens_kept_is_the_whole() -> None:
    v, w = (t.float() for t in tokens(4, 9, 5, 6, 8))
    taken, mask = ops.take_tokens(v, ops.select_tokens(v, w, 9))
    for a, b in zip(ops.late_interaction(taken, w, mask_v=mask), ops.late_interaction(v, w)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("change", "message"), [
    ({"w": torch.zeros(4, 3, 9)}, "wants tokens"),
    ({"w": torch.zeros(4, 3, 8, dtype=torch.float64)}, "share one floating type"),
    ({"mask_v": torch.ones(4, 3)}, "first side must be bool"),
    ({"mask_w": torch.ones(4, 2, dtype=torch.bool)}, "second side must be bool"),
])
def test_wrong_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    arguments = {"v": torch.zeros(4, 3, 8), "w": torch.zeros(4, 3, 8)} | change
    with pytest.raises(ValueError, match=message):
        ops.late_interaction(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        ops.select_tokens(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), 0)


# ---- torch's view of the operator


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("masked", [False, True])
def test_passes_opcheck(masked: bool) -> None:
    masks: Masks = (torch.rand(3, 5) < 0.7, torch.rand(4, 6) < 0.7) if masked else (None, None)
    torch.library.opcheck(native_late_interaction, (leaf(3, 5, 8), leaf(4, 6, 8), *masks, True))


def test_compiles_as_one_graph() -> None:
    inputs = [leaf(4, 5, 8), leaf(4, 6, 8)]

    def step(v: Tensor, w: Tensor) -> Tensor:
        return clip_loss(*ops.late_interaction(v, w), torch.tensor(1.0))

    with ops.backend("native"):
        expected = torch.autograd.grad(step(*inputs), inputs)
        got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


class Score(torch.nn.Module):
    """What a server computes: pictures' tokens against the tokens of class prompts."""

    def forward(self, v: Tensor, w: Tensor, mask: Tensor) -> Tensor:
        return ops.late_interaction(v, w, mask_w=mask)[0]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_exports_to_onnx(tmp_path: object) -> None:
    import onnxruntime

    example = (torch.randn(2, 5, 8), torch.randn(3, 4, 8), torch.rand(3, 4) < 0.7)
    batch = torch.export.Dim("batch")
    path = f"{tmp_path}/late.onnx"
    torch.onnx.export(Score().eval(), example, path, dynamo=True, dynamic_shapes=({0: batch}, None, None), verbose=False)
    v = torch.randn(7, 5, 8)
    session = onnxruntime.InferenceSession(path)
    names = [i.name for i in session.get_inputs()]
    got = session.run(None, dict(zip(names, (v.numpy(), example[1].numpy(), example[2].numpy()))))[0]
    torch.testing.assert_close(torch.from_numpy(got), Score()(v, *example[1:]), rtol=1e-5, atol=1e-6)


def test_scale_of_the_loss_gets_its_gradient() -> None:
    v, w = (t.float() for t in tokens(6, 4, 6, 5, 8))
    s = torch.tensor(math.log(14.3), requires_grad=True)
    clip_loss(*ops.late_interaction(v, w), s).backward()
    assert s.grad is not None
    assert s.grad.abs() > 0
