"""Contrastive losses on given similarities: what late interaction and other similarities without embeddings end in.

R rows, C columns. The two matrices are inputs; a few temporaries of their size are made. They stay below the tokens that
they were made of as long as C < (T + U) E / 2 for T and U tokens of width E: at 64 and 32 tokens of 256, below 12288.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.contrastive_pairs import Relations, Teacher, softmax_values
from vlm.ops.contrastive_reference import matrix_sigmoid, matrix_statistics, pair_masks


def contrastive_matrices(
    rows: Tensor,
    columns: Tensor,
    log_scale: Tensor,
    bias: Tensor | None = None,
    *,
    groups_x: Tensor | None = None,
    groups_y: Tensor | None = None,
    exclude_x: Tensor | None = None,
    exclude_y: Tensor | None = None,
    decoupled: bool = False,
    smoothing: float | tuple[Tensor, Tensor] = 0.0,
    labels: tuple[Tensor, Tensor] | None = None,
    teacher: Teacher | None = None,
    negative_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """rows [R, C], columns [R, C], similarities seen from either side -> values by row [R] and by column [C].

    Softmax form without a bias: the rows of exp(log_scale) * `rows` and the columns of exp(log_scale) * `columns` against
    targets as in `contrastive_softmax`. Sigmoid form with a bias: sums of the binary terms, of either matrix along its own
    side, as in `contrastive_sigmoid`; smoothing eps is labels of 1 - eps and eps, and `labels` [R], [R] are those of the
    positives and of the others, given row by row. smoothing of the softmax form is one eps, or one a row and one a column.
    Raises ValueError where the matrices are not of one shape, or smoothing or labels do not go with the form.
    """
    if rows.ndim != 2 or rows.shape != columns.shape:
        raise ValueError(f"contrastive loss on matrices wants two of one shape, got {tuple(rows.shape)} and {tuple(columns.shape)}")
    each = isinstance(smoothing, tuple)
    if (bias is not None and each) or (labels is not None and (bias is None or smoothing)):
        raise ValueError("contrastive loss on matrices: labels are of the sigmoid form, without smoothing; one eps a row is of the other")
    relations = Relations(groups_x, groups_x if groups_y is None else groups_y, 0, exclude_x,
                          exclude_x if exclude_y is None else exclude_y, decoupled, teacher)
    wide = torch.promote_types(rows.dtype, torch.float32)
    share = 0.0 if teacher is None else teacher.share
    values = []
    with torch.autocast(rows.device.type, enabled=False):
        masks = pair_masks(rows.to(wide), columns.to(wide).T, relations)
        for matrix, axis in ((rows, 1), (columns, 0)):
            z = log_scale.exp().to(wide) * matrix.to(wide)
            if bias is None:
                eps = smoothing[1 - axis] if isinstance(smoothing, tuple) else smoothing
                values.append(softmax_values(matrix_statistics(z, *masks, decoupled, axis), smoothing=eps, share=share))
                continue
            ones = z.new_ones(z.shape[0])
            pair = labels if isinstance(smoothing, tuple) or labels is not None else (ones * (1 - smoothing), ones * smoothing)
            assert pair is not None
            values.append(matrix_sigmoid(z + bias.to(wide), *masks, share, torch.stack([p.to(wide) for p in pair]), negative_weight).sum(axis))
    return values[0], values[1]
