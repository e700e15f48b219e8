"""Order-preserving alignment of pairs of sequences: DTW, soft-DTW and the global alignment kernel. Source: sugar.

B pairs, N and M elements of the two sequences of a pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.alignment_native import native_alignment
from vlm.ops.alignment_reference import sequence_alignment_reference
from vlm.ops.backend import use_native


def sequence_alignment(
    cost: Tensor, row_lengths: Tensor | None = None, column_lengths: Tensor | None = None, *, gamma: float = 1.0
) -> Tensor:
    """cost [B, N, M] -> [B], the (soft) minimum over all monotone ways from the first to the last pair of elements.

    R(i, j) = c(i, j) + softmin {R(i-1, j-1), R(i-1, j), R(i, j-1)}, softmin {x} = -gamma log sum exp(-x / gamma); gamma = 0: hard
    DTW, whose gradient follows one best way. row_lengths, column_lengths: integers [B], default N and M; costs beyond are not read
    into a result. A cost of +inf forbids a cell; a pair without a way has the value inf and no gradient, two empty sequences 0.

    float32, or float64 for float64 input; half types are widened, autocast or not. Differentiable once in cost.
    Raises ValueError on shapes, dtypes, lengths or a gamma that do not fit.
    """
    if cost.ndim != 3 or not cost.is_floating_point():
        raise ValueError(f"sequence_alignment wants floating costs [B, N, M], got {cost.dtype} {tuple(cost.shape)}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"sequence_alignment: gamma must be 0 or positive, got {gamma}")
    for name, lengths, most in (("row_lengths", row_lengths, cost.shape[1]), ("column_lengths", column_lengths, cost.shape[2])):
        if lengths is None:
            continue
        if lengths.shape != (cost.shape[0],) or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise ValueError(f"sequence_alignment: {name} must be integers [{cost.shape[0]}], got {lengths.dtype} {tuple(lengths.shape)}")
        traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        if not traced and lengths.numel() and not (int(lengths.min()) >= 0 and int(lengths.max()) <= most):
            raise ValueError(f"sequence_alignment: {name} must be in 0..{most}")
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    if use_native(cost):
        return native_alignment(cost, row_lengths, column_lengths, gamma)
    return sequence_alignment_reference(cost, row_lengths, column_lengths, gamma=gamma)


def log_alignment_kernel(log_kernel: Tensor, row_lengths: Tensor | None = None, column_lengths: Tensor | None = None) -> Tensor:
    """log k [B, N, M] of pairs of elements -> [B], the logarithm of the global alignment kernel

    G(i, j) = k(i, j) (G(i-1, j-1) + G(i-1, j) + G(i, j-1)), G(0, 0) = 1: the sum over all monotone ways of the product of k along
    them. log k may be -inf. -inf for a pair without a way. Otherwise as `sequence_alignment`.
    """
    return -sequence_alignment(-log_kernel, row_lengths, column_lengths, gamma=1.0)
