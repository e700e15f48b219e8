"""The Python side of the CUDA operators over the emulated kernels: addresses, strides, types, gradients.

Usage: check_operators.py MODULE, the path of `_native_cuda_emulated`. It runs the very functions that serve CUDA
tensors, on CPU tensors, against the float64 twins. Exit code 77 (skipped) without torch.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

try:
    import torch
except ImportError:
    sys.exit(77)

from torch import Tensor

from vlm.ops import Alibi, attention_cuda, attention_reference, contrastive_cuda
from vlm.ops.attention_bias import alibi_slopes
from vlm.ops.contrastive_reference import contrastive_sigmoid_reference, contrastive_softmax_reference
from vlm.ops.masks import GlobalTokens, LoweredMask, MaskProgram, MaskShape, Segments, SymmetricWindow


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("_native_cuda_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def near(name: str, got: Tensor, exact: Tensor, tolerance: float) -> None:
    assert got.shape == exact.shape, f"{name}: {tuple(got.shape)} instead of {tuple(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{name}: infinities differ"
    error = (got.double() - exact)[finite].abs().max() / exact[finite].abs().max().clamp(min=1.0)
    assert error <= tolerance, f"{name}: error {float(error):.2e}"


def strided(*shape: int) -> Tensor:
    """Like the heads of a fused projection: [B, N, H, E] in memory, with something between the rows."""
    batch, heads, length, width = shape
    return torch.randn(batch, length, heads, width + 3)[..., :width].transpose(1, 2)


def check_attention(core: Any) -> None:
    q, k, v = strided(2, 4, 37, 24), strided(2, 2, 70, 24), strided(2, 2, 70, 17)
    bias = torch.randn(1, 4, 1, 70)
    mask = torch.rand(2, 70) > 0.2
    mask[0] = False
    leaves = [t.double().requires_grad_() for t in (q, k, v, bias)]
    options = {"causal": True, "alignment": "bottom-right", "key_mask": mask}
    exact = attention_reference(*leaves[:3], bias=leaves[3], return_lse=True, **options)  # type: ignore[arg-type]
    dout, dlse = torch.randn(2, 4, 37, 17), torch.randn(2, 4, 37)
    loss = (exact[0] * dout).sum() + (torch.where(exact[1].isinf(), 0.0, exact[1]) * dlse).sum()
    gradients = torch.autograd.grad(loss, leaves)
    arguments = (q, k, v, mask, bias, 24**-0.5, True, 70 - 37)
    out, lse = attention_cuda.call_forward(core, 0, *arguments)
    near("attention out", out, exact[0].detach(), 2e-6)
    near("attention lse", lse, exact[1].detach(), 2e-6)
    got = attention_cuda.call_backward(core, 0, *arguments, out, lse, dout, dlse, True)
    for name, a, b in zip("qkvb", got, gradients):
        near(f"attention d{name}", a, b, 1e-5)
    assert attention_cuda.call_backward(core, 0, *arguments, out, lse, dout, dlse, False)[3].numel() == 0

    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    wide = (q.double(), k.double(), v.double())
    exact = attention_reference(*wide, bias=bias.double(), return_lse=True, **options)  # type: ignore[arg-type]
    out, lse = attention_cuda.call_forward_bf16(core, 0, q, k, v, mask, bias, 24**-0.5, True, 70 - 37)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    near("attention bf16 out", out, exact[0], 6e-3)
    near("attention bf16 lse", lse, exact[1], 3e-6)
    assert core.attention_shared_bytes((1, 1, 1, 1, 1, 64, 64)) <= 99 * 1024  # every device since sm_80
    try:
        core.attention_shared_bytes((1, 1, 1, 1, 1, 300, 64))
    except ValueError as error:
        assert "at most 256" in str(error)
    else:
        raise AssertionError("a width of 300 was taken")


def view(t: Tensor) -> tuple[int, int, int, int]:
    return (t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def addressed(mask: LoweredMask) -> list[tuple[int, ...]]:
    """Atoms with addresses instead of places, as the module takes them."""
    atoms = []
    for at in range(0, len(mask.code), 12):
        row = list(mask.code[at : at + 12])
        for place in (5, 9):
            row[place] = row[place] * 4 + (0 if mask.arrays is None else mask.arrays.data_ptr())
        atoms.append(tuple(row))
    return atoms


def check_masks(core: Any) -> None:
    q, k, v = strided(2, 4, 70, 24), strided(2, 2, 90, 24), strided(2, 2, 90, 17)
    documents = torch.randint(0, 3, (2, 90)).sort().values
    mask = MaskProgram(SymmetricWindow(40), Segments(documents[:, 20:], documents),
                       GlobalTokens(torch.rand(2, 70) < 0.05, torch.rand(2, 90) < 0.05))
    lowered = mask.lower(MaskShape(2, 4, 70, 90, q.device))
    sizes, slopes = (2, 4, 2, 70, 90, 24, 17), alibi_slopes(4)
    distance = (torch.arange(70 + 90 - 1) - 69 - 20).abs()  # key - query - offset, of each place in the table
    relative = -slopes[:, None] * distance
    leaves = [t.double().requires_grad_() for t in (q, k, v, slopes)]
    exact = attention_reference(*leaves[:3], mask=mask, bias=Alibi(leaves[3]), return_lse=True)
    dout, dlse = torch.randn(2, 4, 70, 17), torch.randn(2, 4, 70)
    gradients = torch.autograd.grad((exact[0] * dout).sum() + (exact[1] * dlse).sum(), leaves)
    atoms = addressed(lowered)
    first, second = core.attention_workspace(sizes, atoms)
    room = torch.empty(max(first, second), dtype=torch.uint8)
    arguments = {"sizes": sizes, "q": view(q), "k": view(k), "v": view(v), "scale": 24**-0.5, "causal": False,
                 "causal_offset": 0, "key_mask": (0, 0), "bias": (0, 0, 0, 0), "stream": 0, "atoms": atoms,
                 "relative": (relative.data_ptr(), relative.stride(0)), "workspace": room.data_ptr()}
    out, lse = torch.empty(2, 4, 70, 17), torch.empty(2, 4, 70)
    core.attention_forward(**arguments, out=view(out), lse=lse.data_ptr())
    near("masked attention out", out, exact[0].detach(), 2e-6)
    near("masked attention lse", lse, exact[1].detach(), 2e-6)
    got = [torch.empty(t.shape) for t in (q, k, v)]
    drelative = torch.empty_like(relative)
    core.attention_backward(**arguments, out=view(out), lse=lse.data_ptr(), dout=view(dout), dlse=dlse.data_ptr(),
                            dq=view(got[0]), dk=view(got[1]), dv=view(got[2]), dbias=0, bias_sizes=(1, 1, 1),
                            drelative=drelative.data_ptr())
    got.append(-(drelative * distance).sum(1))
    for name, a, b in zip(("q", "k", "v", "slopes"), got, gradients):
        near(f"masked attention d{name}", a, b, 1e-5)


def check_contrastive(core: Any) -> None:
    x, y = torch.randn(70, 43)[:, :40] / 6, torch.randn(90, 40).T.contiguous().T / 6
    groups_x, groups_y = torch.randint(-5, 20, (70,), dtype=torch.int32), torch.randint(-5, 20, (90,))
    log_scale, bias = torch.tensor(1.9), torch.tensor(-2.0)
    drows, dcolumns = torch.randn(70), torch.randn(90)
    for loss, twin, scalars in (("softmax", contrastive_softmax_reference, [log_scale]),
                                ("sigmoid", contrastive_sigmoid_reference, [log_scale, bias])):
        for options in ({"groups_x": groups_x, "groups_y": groups_y}, {"row_offset": 15}):
            leaves = [t.double().requires_grad_() for t in (x, y, *scalars)]
            rows, columns = twin(*leaves, **options)
            gradients = torch.autograd.grad((rows * drows).sum() + (columns * dcolumns).sum(), leaves)
            arguments = (loss, x, y, log_scale, bias if loss == "sigmoid" else None, options.get("groups_x"),
                         options.get("groups_y"), options.get("row_offset", 0))
            got = contrastive_cuda.call_forward(core, 0, *arguments)  # type: ignore[arg-type]
            near(f"{loss} rows", got[0], rows.detach(), 2e-6)
            near(f"{loss} columns", got[1], columns.detach(), 2e-6)
            given = (core, 0, *arguments, got[2], got[3], drows, dcolumns)
            found = contrastive_cuda.call_backward(*given, True, True)  # type: ignore[arg-type]
            for name, a, b in zip(("x", "y", "scale", "bias"), found, gradients):
                near(f"{loss} d{name}", a, b, 1e-5)
            less = contrastive_cuda.call_backward(*given, False, True)  # type: ignore[arg-type]
            assert less[0].numel() == 0
            assert torch.equal(less[1], found[1])
            assert torch.equal(less[2], found[2])


def main() -> None:
    torch.manual_seed(0)
    core = load(sys.argv[1])
    check_attention(core)
    check_masks(core)
    check_contrastive(core)
    print("the Python side agrees with the float64 twins")


if __name__ == "__main__":
    main()
