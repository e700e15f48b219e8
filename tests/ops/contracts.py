"""Every operator of the native core with what `test_contracts.py` needs to hold it to the contract that all share.

A new operator adds an entry; the tests fail until it does. `call` is the public function over floating tensors, the same for
every backend and type. Letters of the shapes are those of the operator's own tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops import oracle
from vlm import ops
from vlm.ops import masks

Call = Callable[..., tuple[Tensor, ...]]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Masked:
    """A call with rows of which nothing is left.

    dead: by input, bool where nothing may be read: NaN there changes no bit, and the gradient there is 0 (None: nowhere).
    still: by input, bool where the gradient is 0 besides. empty: by output, bool where it must hold the number beside it.
    """

    call: Call
    inputs: list[Tensor]
    dead: list[Tensor | None]
    empty: list[tuple[Tensor, float] | None]
    still: list[Tensor | None] = field(default_factory=list)


@dataclass(frozen=True)
class Contract:
    """`make(shape)` gives float64 inputs of `call`.

    sizes: shapes with 0, 1 and primes. usual: one for graphs. large: one for threads, strides and the error against torch.
    operators: torch's names of what is behind it. masked: or why no row can be empty.
    trains: whether there are gradients. loose: results (outputs, then gradients) that are what is left of large terms of either
    sign: the gradients of scales, and of a decay, sum i <q_i, dq_i> - sum j <k_j, dk_j>.
    same_bits: false where the products are torch's, which sums in another order for other
    strides or numbers of threads.
    """

    operators: tuple[str, ...]
    call: Call
    make: Callable[..., list[Tensor]]
    sizes: tuple[Shape, ...]
    usual: Shape
    large: Shape
    masked: Callable[[], Masked] | str
    trains: bool = True
    loose: tuple[int, ...] = ()
    same_bits: bool = True


def drawn(*shapes: Shape) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def lengths(rows: int, length: int) -> Tensor:
    """bool [rows, length]: all, then fewer and fewer, then none."""
    return torch.arange(length)[None] < torch.arange(rows)[:, None].neg() * (length // 3) + length


def narrow(contract: Contract, shape: tuple[int, ...]) -> list[Tensor]:
    return [t.float() for t in contract.make(*shape)]


def results(contract: Contract, inputs: Sequence[Tensor], backend: ops.Backend, dtype: torch.dtype = torch.float32,
            call: Call | None = None) -> list[Tensor]:
    """Outputs, and gradients where there are any."""
    call = call or contract.call
    if contract.trains:
        return oracle.run(call, inputs, backend, dtype)
    with torch.no_grad(), ops.backend(backend):
        return list(call(*(t.to(dtype) for t in inputs)))


def spread(t: Tensor, turned: bool) -> Tensor:
    """The same values with gaps of NaN between them; `turned`: with the last axis not contiguous."""
    if turned and t.ndim > 1:
        return spread(t.mT, False).mT
    buffer = torch.full([size + 3 for size in t.shape], math.nan)
    view = buffer[tuple(slice(1, size + 1) for size in t.shape)]
    view.copy_(t)
    return view if t.ndim != 1 else torch.stack([t, torch.full_like(t, math.nan)], 1)[:, 0]


# ---- attention


def heads(b: int, h: int, g: int, n: int, m: int, d: int, v: int) -> list[Tensor]:
    return drawn((b, h, n, d), (b, g, m, d), (b, g, m, v), (1, h, n, m))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return ops.attention(q, k, v, causal=True, key_mask=lengths(k.shape[0], k.shape[2]), bias=bias, return_lse=True)


def attend_masked() -> Masked:
    """The second sequence has no key, the third five; the first two queries stand before every key."""
    mask = torch.tensor([[True] * 7, [False] * 7, [True] * 5 + [False] * 2])
    removed, rows = ~mask[:, None, :, None], torch.zeros(3, 1, 9, dtype=torch.bool)
    rows[:, :, :2] = rows[1] = True

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return ops.attention(q, k, v, causal=True, key_mask=mask, return_lse=True)

    return Masked(call, drawn((3, 4, 9, 8), (3, 2, 7, 8), (3, 2, 7, 6)), [None, removed, removed],
                  [(rows[..., None], 0.0), (rows, -math.inf)], [rows[..., None]])


def program(q: Tensor, k: Tensor) -> masks.MaskProgram:
    n, m, b = q.shape[2], k.shape[2], q.shape[0]
    queries, keys = (torch.arange(size)[None].expand(b, size) // 60 % 3 for size in (n, m))
    return masks.MaskProgram(masks.Lambda(50, 3), masks.Segments(queries, keys, shared=0), masks.KeyPadding(lengths(b, m)))


def attend_program(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
    return ops.attention(q, k, v, mask=program(q, k), bias=ops.Alibi(slopes), score="cosine", temperature=tau.abs() + 1,
                         softcap=5.0, dropout=(0.2, 7), return_lse=True)


def heads_and_slopes(b: int, h: int, g: int, n: int, m: int, d: int, v: int) -> list[Tensor]:
    """Slopes that keep the bias small: the backward pass reads the float32 lse, so that logits of hundreds cost it digits."""
    return [*drawn((b, h, n, d), (b, g, m, d), (b, g, m, v)), torch.rand(h, dtype=torch.float64) * 0.05, *drawn((h,))]


def program_masked() -> Masked:
    """Queries 4 and 5 are of a document without keys; the last two keys are padding."""
    mask = masks.MaskProgram(masks.Causal(), masks.Segments(torch.tensor([[1, 1, 1, 1, 9, 9]]), torch.tensor([[1, 1, 1, 1, 2, 2]])),
                             masks.KeyPadding(torch.tensor([4])))
    removed, rows = torch.arange(6)[None, None, :, None] > 3, torch.arange(6)[None, None] > 3

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return ops.attention(q, k, v, mask=mask, softcap=3.0, return_lse=True)

    return Masked(call, drawn((1, 2, 6, 8), (1, 1, 6, 8), (1, 1, 6, 5)), [None, removed, removed],
                  [(rows[..., None], 0.0), (rows, -math.inf)], [rows[..., None]])


def packed(total: int, h: int, g: int, d: int) -> list[Tensor]:
    return drawn((total, h, d), (total, g, d), (total, g, d))


def starts(total: int) -> Tensor:
    """Three sequences, the first of which is empty."""
    return torch.tensor([0, 0, total // 3, total])


def attend_packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return ops.attention_varlen(q, k, v, starts(q.shape[0]), causal=True, return_lse=True)


def packed_masked() -> Masked:
    """The second sequence has queries and no keys."""
    rows = (torch.arange(7) >= 4)[:, None]

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return ops.attention_varlen(q, k, v, torch.tensor([0, 4, 7]), torch.tensor([0, 5, 5]), return_lse=True)

    return Masked(call, drawn((7, 4, 8), (5, 2, 8), (5, 2, 6)), [None, None, None], [(rows[..., None], 0.0), (rows, -math.inf)],
                  [rows[..., None]])


def qk(b: int, h: int, g: int, n: int, m: int, d: int) -> list[Tensor]:
    return drawn((b, h, n, d), (b, g, m, d))


def statistics(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    options: dict[str, Any] = {"causal": True, "key_mask": lengths(k.shape[0], k.shape[2]), "temperature": 0.7}
    rows = torch.tensor([q.shape[2] - 1, -1]) if q.shape[2] else torch.zeros(0, dtype=torch.int64)
    lse, entropy, _ = ops.attention_row_statistics(q, k, **options)
    return lse, entropy, ops.attention_column_sums(q, k, **options), ops.attention_rows(q, k, rows, **options)


def statistics_masked() -> Masked:
    mask = torch.tensor([[True] * 4, [False] * 4])
    removed, rows = ~mask[:, None, :, None], torch.zeros(2, 1, 6, dtype=torch.bool)
    rows[:, :, :2] = rows[1] = True

    def call(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"causal": True, "key_mask": mask}
        lse, entropy, _ = ops.attention_row_statistics(q, k, **options)
        return lse, entropy, ops.attention_column_sums(q, k, **options), ops.attention_rows(q, k, torch.arange(6), **options)

    return Masked(call, drawn((2, 2, 6, 8), (2, 1, 4, 8)), [None, removed],
                  [(rows, -math.inf), (rows, 0.0), (~mask[:, None], 0.0), (rows[..., None], 0.0)])


def parts(b: int, h: int, n: int, v: int) -> list[Tensor]:
    return [t * 2 for t in drawn((b, h, n, v), (b, h, n), (b, h, n, v), (b, h, n))]


def merge(a: Tensor, la: Tensor, b: Tensor, lb: Tensor) -> tuple[Tensor, ...]:
    return ops.merge_attention((a, la), (b, lb))


def merge_masked() -> Masked:
    """One row of the first part is empty, one of both."""
    inputs = parts(1, 2, 5, 4)
    inputs[1][0, 0, 1] = inputs[1][0, 1, 3] = inputs[3][0, 1, 3] = -math.inf
    one, both = (t == -math.inf for t in inputs[1::2])
    return Masked(merge, inputs, [one[..., None], None, both[..., None], None], [(both[..., None], 0.0), (both, -math.inf)],
                  [None, one, None, both])


def maps(b: int, rows: int, columns: int, h: int, d: int) -> list[Tensor]:
    qkv, tau, table = drawn((b, rows, columns, 3 * h * d), (h,), (49, h))
    return [qkv, tau.abs() * 4 + 1, table]


def attend_windows(qkv: Tensor, tau: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    return (ops.window_attention(qkv, tau, table, window=4, shift=2),)


# ---- tokens


def tokens(b: int, n: int, c: int) -> list[Tensor]:
    return drawn((b, n, c), (b, n, 16))


def reduce(x: Tensor, metric: Tensor) -> tuple[Tensor, ...]:
    matching = ops.bipartite_match(metric, max(0, x.shape[1] - 1) // 2)
    merged, sizes = ops.merge_tokens(x, None, matching)
    best = ops.select_top(metric[..., 0], x.shape[1] // 3)
    rows = ops.gather_tokens(x, best.indices)
    return merged, sizes, ops.unmerge_tokens(merged, matching), rows, ops.scatter_tokens(rows, best.indices, x.shape[1])


def reduce_masked() -> Masked:
    """Nothing of the second sequence may be kept, and two tokens of the first weigh nothing."""
    valid, score = torch.tensor([[True] * 7, [False] * 7]), torch.randn(2, 7)
    sizes = torch.ones(2, 7)
    sizes[0, [2, 4]] = 0
    matching = ops.Matching(*(torch.tensor(t).expand(2, -1) for t in ([2, 4], [1, 1], [0, 6, 1, 3, 5], [0, 2, 2, 3, 2, 4, 1])))

    def call(x: Tensor) -> tuple[Tensor, ...]:
        kept = ops.select_top(score, 3, valid=valid, size=3).indices
        rows = ops.gather_tokens(x, kept)
        merged, _ = ops.merge_tokens(x[:1], sizes[:1].to(x), ops.Matching(*(t[:1] for t in matching)))
        return rows, ops.scatter_tokens(rows, kept, 7), merged

    second = torch.tensor([False, True])[:, None, None]
    dead = second.expand(2, 7, 1).clone()
    weightless = torch.zeros(2, 7, 1, dtype=torch.bool)
    score[0, [2, 4]] = -9.0  # not chosen either
    weightless[0, [2, 4]] = True
    return Masked(call, drawn((2, 7, 9)), [dead | weightless], [(second, 0.0), (second, 0.0), None])


# ---- losses


def pairs(r: int, c: int, e: int) -> list[Tensor]:
    return [*(F.normalize(t, dim=1) for t in drawn((r, e), (c, e))), torch.tensor(1.5, dtype=torch.float64)]


def softmax_pairs(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    return ops.contrastive_softmax(x, y, s, groups_x=torch.arange(len(x)) // 2, groups_y=torch.arange(len(y)) // 2, smoothing=0.1,
                                   exclude_x=torch.arange(len(x)) % 5, exclude_y=torch.arange(len(y)) % 7)


def sigmoid_pairs(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    ids = torch.arange(len(x)) // 2, torch.arange(len(y)) // 2
    return ops.contrastive_sigmoid(x, y, s, b, groups_x=ids[0], groups_y=ids[1], negative_weight=0.5)


def softmax_masked() -> Masked:
    """Rows 1 and 3 have no positive: no value, and their embedding gets no gradient from their own values."""
    gx, gy = torch.tensor([0, 9, 1, 8, 2]), torch.tensor([0, 1, 2, 0])
    rows = torch.tensor([False, True, False, True, False])

    def call(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return (ops.contrastive_softmax(x, y, s, groups_x=gx, groups_y=gy)[0],)

    return Masked(call, pairs(5, 4, 8), [None, None, None], [(rows, 0.0)], [rows[:, None]])


def sigmoid_masked() -> Masked:
    """Every pair of rows 1 and 3 is excluded and none is a positive."""
    gx, gy = torch.tensor([0, 9, 1, 8, 2]), torch.tensor([0, 1, 2, 0])
    rows = torch.tensor([False, True, False, True, False])

    def call(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (ops.contrastive_sigmoid(x, y, s, b, groups_x=gx, groups_y=gy, exclude_x=rows.long(), exclude_y=torch.ones(4).long())[0],)

    return Masked(call, [*pairs(5, 4, 8), torch.tensor(-1.0)], [None] * 4, [(rows, 0.0)], [rows[:, None]])


def sides(r: int, t: int, c: int, u: int, e: int) -> list[Tensor]:
    return [F.normalize(x, dim=-1) for x in drawn((r, t, e), (c, u, e))]


def late(v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return ops.late_interaction(v, w, mask_v=lengths(*v.shape[:2]), mask_w=lengths(*w.shape[:2]))


def late_masked() -> Masked:
    mask = torch.tensor([[True] * 4, [False] * 4, [True, False, True, False]])
    first = torch.tensor([False, True, False])[:, None]

    def call(v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return ops.late_interaction(v, w, mask_v=mask)

    return Masked(call, sides(3, 4, 5, 6, 8), [~mask[..., None], None], [(first, 0.0), (first, 0.0)])


def vocabulary(n: int, c: int, v: int) -> list[Tensor]:
    return drawn((n, c), (v, c), (v,))


def cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    labels = torch.arange(len(hidden)) % len(weight)
    labels = torch.where(torch.arange(len(hidden)) % 5 == 3, -100, labels)
    return (ops.linear_cross_entropy(hidden, weight, labels, bias=bias, smoothing=0.1, z_loss=1e-3, softcap=20.0,
                                     chunk=7 * len(weight)).loss,)


def cross_entropy_masked() -> Masked:
    labels = torch.tensor([3, -100, 0, -100, 8])
    rows = labels < 0

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (ops.linear_cross_entropy(hidden, weight, labels, bias=bias, smoothing=0.1).loss,)

    return Masked(call, vocabulary(5, 6, 9), [rows[:, None], None, None], [(rows, 0.0)])


def distillation(hidden: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    return (ops.linear_distillation(hidden, weight, teacher_logits=teacher, bias=bias, divergence="js", temperature=1.5,
                                    mask=torch.arange(len(hidden)) % 4 > 0, chunk=7 * len(weight)),)


def distillation_masked() -> Masked:
    mask = torch.tensor([True, False, True, False, False])

    def call(hidden: Tensor, weight: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        return (ops.linear_distillation(hidden, weight, teacher_logits=teacher, mask=mask),)

    return Masked(call, drawn((5, 6), (9, 6), (5, 9)), [~mask[:, None], None, ~mask[:, None]], [(~mask, 0.0)])


# ---- sequences


def align(cost: Tensor) -> tuple[Tensor, ...]:
    return (ops.sequence_alignment(cost, gamma=0.5),)


def align_masked() -> Masked:
    """The second pair has no way, the third nothing on either side."""
    rows, columns = torch.tensor([3, 0, 0]), torch.tensor([2, 4, 0])
    beyond = (torch.arange(4)[:, None] >= rows[:, None, None]) | (torch.arange(5) >= columns[:, None, None])

    def call(cost: Tensor) -> tuple[Tensor, ...]:
        values = ops.sequence_alignment(cost, rows, columns, gamma=0.5)
        return values[1:2], values[2:]

    return Masked(call, drawn((3, 4, 5)), [beyond], [(torch.tensor([True]), math.inf), (torch.tensor([True]), 0.0)])


def decays(b: int, h: int, n: int, d: int, e: int) -> list[Tensor]:
    return [*drawn((b, h, n, d), (b, h, n, d), (b, h, n, e)), -torch.rand(h, dtype=torch.float64) * 0.3, *drawn((b, h, d, e))]


def decay(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    return ops.linear_decay(q, k, v, rate, state=state, key_mask=lengths(q.shape[0], q.shape[2]))


def decay_masked() -> Masked:
    mask = torch.tensor([[False] * 7, [True] * 5 + [False] * 2])
    gone = ~mask[:, None, :, None]

    def call(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return ops.linear_decay(q, k, v, rate, state=state, key_mask=mask)

    return Masked(call, decays(2, 2, 7, 4, 6), [gone, gone, gone, None, None], [(gone, 0.0), None])


def scans(b: int, n: int, c: int, s: int) -> list[Tensor]:
    x, delta, rate, first, second, skip, state = drawn((b, n, c), (b, n, c), (c, s), (b, n, s), (b, n, s), (c,), (b, c, s))
    return [x, delta - 1, -rate.abs() - 0.01, first, second, skip, state]


def scan(x: Tensor, delta: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    return ops.ssm_scan(x, delta, rate, b, c, skip, state=state, key_mask=lengths(*x.shape[:2]))


def scan_masked() -> Masked:
    mask = torch.tensor([[False] * 7, [True] * 5 + [False] * 2])
    gone = ~mask[..., None]

    def call(*t: Tensor) -> tuple[Tensor, ...]:
        return ops.ssm_scan(*t[:6], state=t[6], key_mask=mask)

    return Masked(call, scans(2, 7, 4, 3), [gone, gone, None, gone, gone, None, None], [(gone, 0.0), None])


# ---- selection


def quarters(b: int, h: int, g: int, n: int, m: int, d: int) -> list[Tensor]:
    """Products of q and k are exact in float32, so that every type chooses the same blocks."""
    q, k = (torch.randint(-6, 7, shape).double() / 4 for shape in ((b, h, n, d), (b, g, m, d)))
    return [q, k, *drawn((b, g, m, d))]


def select(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    blocks, scored = ops.select_hierarchical(q, k, budget=12, block_q=8, block_k=2, window=6, sinks=3)
    places = torch.arange(blocks.index.shape[-1]) < blocks.count[..., None]
    return ops.block_sparse_attention(q, k, v, blocks), torch.where(places, blocks.index, -1), blocks.count, scored


def select_masked() -> Masked:
    """The first block of queries lists nothing."""
    index = torch.tensor([[-1, -1], [0, 1], [1, 4]], dtype=torch.int32).expand(1, 2, 3, 2).contiguous()
    blocks = ops.BlockList(index, torch.tensor([0, 2, 2], dtype=torch.int32).expand(1, 2, 3).contiguous(), 4, 2)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (ops.block_sparse_attention(q, k, v, blocks),)

    return Masked(call, drawn((1, 2, 12, 8), (1, 1, 12, 8), (1, 1, 12, 5)), [None, None, None],
                  [(torch.arange(12)[None, None, :, None] < 4, 0.0)])


def memory_row(h: int, g: int, n: int, t: int, d: int) -> list[Tensor]:
    return drawn((h, n, d), (g, t, d), (g, t, d))


def remember(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Short rows choose; in long ones, which every type must read alike, all blocks are seen."""
    shape = ops.MemoryShape(n_init=2, n_local=12, block=4, topk=2 if k.shape[1] < 50 else 100, representatives=4, chunk=5)
    before = k.shape[1] - q.shape[1]
    return tuple(ops.block_memory(q, k, v, q.new_zeros(q.shape[0], before), q.new_zeros(q.shape[0], 0, q.shape[2]), shape=shape))


CONTRACTS: dict[str, Contract] = {
    "attention": Contract(
        ("attention",), attend, heads,
        ((1, 1, 1, 1, 1, 1, 1), (2, 2, 1, 0, 3, 4, 4), (2, 2, 1, 3, 0, 4, 4), (0, 2, 1, 3, 3, 4, 4), (3, 2, 2, 31, 37, 7, 5)),
        (2, 4, 2, 6, 9, 8, 6), (2, 4, 2, 150, 290, 32, 16), attend_masked),
    "attention, program": Contract(
        ("attention",), attend_program, heads_and_slopes,
        ((1, 1, 1, 1, 1, 1, 1), (2, 2, 1, 0, 3, 4, 4), (2, 2, 1, 3, 0, 4, 4), (0, 2, 1, 3, 3, 4, 4), (3, 2, 2, 31, 37, 7, 5)),
        (2, 4, 2, 6, 9, 8, 6), (2, 4, 2, 150, 290, 32, 16), program_masked),
    "attention, packed": Contract(
        ("attention",), attend_packed, packed, ((0, 2, 1, 4), (1, 1, 1, 1), (2, 2, 1, 3), (61, 3, 1, 7)), (12, 4, 2, 8), (401, 4, 2, 32),
        packed_masked),
    "statistics": Contract(
        ("attention_row_statistics", "attention_column_sums", "attention_rows"), statistics, qk,
        ((1, 1, 1, 1, 1, 1), (2, 2, 1, 0, 3, 4), (2, 2, 1, 3, 0, 4), (0, 2, 1, 3, 3, 4), (3, 2, 2, 31, 37, 7)),
        (2, 4, 2, 6, 9, 8), (2, 4, 2, 300, 290, 32), statistics_masked, trains=False),
    "merge_attention": Contract(
        ("merge_attention",), merge, parts, ((1, 1, 1, 1), (0, 2, 3, 4), (1, 2, 0, 4), (2, 1, 3, 0), (2, 3, 31, 17)), (1, 2, 5, 8),
        (2, 4, 150, 33), merge_masked),
    "window_attention": Contract(
        ("window_attention",), attend_windows, maps,
        ((0, 3, 3, 1, 4), (1, 0, 3, 1, 4), (1, 1, 1, 1, 1), (2, 7, 11, 2, 5)), (2, 5, 6, 2, 8), (3, 18, 14, 3, 16),
        "every position sees itself", loose=(1, 2)),
    "tokens": Contract(
        ("bipartite_match", "merge_weights", "scatter_rows", "gather_rows", "select_top"), reduce, tokens,
        ((0, 3, 4), (1, 1, 1), (2, 2, 3), (2, 3, 8), (2, 61, 37)), (2, 16, 8), (2, 197, 70), reduce_masked),
    "contrastive_softmax": Contract(
        ("pair_loss",), softmax_pairs, pairs, ((0, 4, 4), (4, 0, 4), (1, 1, 1), (31, 37, 7)), (6, 5, 8), (300, 170, 48),
        softmax_masked, loose=(4,)),
    "contrastive_sigmoid": Contract(
        ("pair_loss",), sigmoid_pairs, lambda *shape: [*pairs(*shape), torch.tensor(-2.0, dtype=torch.float64)],
        ((0, 4, 4), (4, 0, 4), (1, 1, 1), (31, 37, 7)), (6, 5, 8), (300, 170, 48), sigmoid_masked,
        loose=(4, 5)),
    "late_interaction": Contract(
        ("late_interaction",), late, sides, ((0, 3, 2, 3, 4), (2, 0, 3, 4, 8), (1, 1, 1, 1, 1), (3, 13, 5, 17, 7)), (3, 5, 4, 6, 8),
        (8, 49, 7, 30, 64), late_masked),
    "linear_cross_entropy": Contract(
        ("linear_cross_entropy",), cross_entropy, vocabulary, ((0, 3, 5), (1, 1, 1), (5, 7, 2), (31, 13, 61)), (7, 5, 11), (64, 32, 1031),
        cross_entropy_masked, same_bits=False),
    "linear_distillation": Contract(
        ("linear_distillation",), distillation, lambda n, c, v: [*vocabulary(n, c, v), *drawn((n, v))],
        ((0, 3, 5), (1, 1, 1), (5, 7, 2), (31, 13, 61)), (7, 5, 11), (64, 32, 1031), distillation_masked,
        same_bits=False),
    "sequence_alignment": Contract(
        ("sequence_alignment",), align, lambda *shape: drawn(shape), ((0, 3, 3), (2, 0, 3), (1, 1, 1), (5, 7, 11), (17, 2, 13)), (3, 4, 5),
        (19, 31, 23), align_masked),
    "linear_decay": Contract(
        ("linear_decay",), decay, decays, ((0, 2, 3, 4, 4), (2, 1, 0, 4, 4), (1, 1, 1, 1, 1), (2, 3, 67, 7, 11)), (2, 2, 9, 4, 6),
        (2, 3, 200, 24, 33), decay_masked, loose=(5,)),
    "ssm_scan": Contract(
        ("ssm_scan",), scan, scans, ((0, 3, 2, 2), (1, 1, 1, 1), (2, 67, 7, 5)), (2, 9, 4, 3), (2, 150, 50, 16), scan_masked),
    "selection": Contract(
        ("select_hierarchical", "block_sparse_attention"), select, quarters,
        ((0, 2, 1, 3, 3, 4), (1, 2, 1, 0, 5, 4), (1, 2, 1, 5, 0, 4), (1, 1, 1, 1, 1, 1), (2, 4, 2, 31, 61, 7)), (1, 2, 1, 9, 40, 8),
        (2, 4, 2, 100, 300, 24), select_masked, trains=False),
    "block_memory": Contract(
        ("block_memory",), remember, memory_row,
        ((0, 1, 3, 5, 4), (2, 1, 0, 9, 4), (2, 1, 0, 0, 4), (1, 1, 1, 1, 2), (4, 2, 31, 37, 6)), (4, 2, 17, 41, 8), (4, 2, 150, 290, 24),
        "a query always sees itself, and the store holds nothing else than what was read", trains=False),
}
