"""Measured cases of attention statistics and token reduction, beside plain torch written from the formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm import ops
from vlm.bench.case import Account, Arm, Case, Work, with_backend


def _arms(ours: Work, peer: Work) -> dict[Arm, Work]:
    return {"native": with_backend("native", ours), "dispatched": ours, "peer": peer}


def _heads(batch: int, heads: int, length: int, width: int = 64) -> list[Tensor]:
    """q, k, v as a projection leaves them, [B, N, H, D] in memory."""
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(batch, length, heads, width, generator=generator).transpose(1, 2) for _ in range(3)]


def _received(causal: bool, length: int) -> Callable[[], dict[Arm, Work]]:
    """Attention output and the attention that every token receives; `forward`: our output alone."""

    def build() -> dict[Arm, Work]:
        q, k, v = _heads(1, 8, length)

        def ours() -> object:
            out, lse = ops.attention(q, k, v, causal=causal, return_lse=True)
            return out, ops.attention_column_sums(q, k, causal=causal, lse=lse)

        def peer() -> object:
            logits = q @ k.mT * q.shape[3] ** -0.5
            if causal:
                logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
            p = logits.softmax(-1)
            return p @ v, p.sum(2)

        return _arms(ours, peer) | {"forward": with_backend("native", lambda: ops.attention(q, k, v, causal=causal))}

    return build


def _over_forward(length: int) -> Account:
    def account(times: Mapping[Arm, float]) -> Mapping[str, object]:
        return {"cost_over_forward": round(times["native"] / times["forward"], 3), "wanted_at_most": 2.2,
                "matrix_mb": round(8 * length * length * 4 / 2**20, 1)}

    return account


def _pagerank(length: int) -> Callable[[], dict[Arm, Work]]:
    """Five steps on a causal matrix of temperature 0.1."""

    def build() -> dict[Arm, Work]:
        q, k, _ = _heads(1, 8, length)

        def ours() -> object:
            return ops.attention_pagerank(q, k, temperature=0.1, causal=True)

        def peer() -> object:
            logits = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
            p, x = (logits / 0.1).softmax(-1), torch.full((1, 8, 1, length), 1 / length)
            for _ in range(5):
                x = x @ p
            return x

        return _arms(ours, peer)

    return build


def _plain_merge(keys: Tensor, x: Tensor, sizes: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """One ToMe round of plain torch operators: class token first, sizes as weights, kept even tokens then odd ones."""
    metric = F.normalize(keys.mean(1), dim=-1)
    cosine = metric[:, ::2] @ metric[:, 1::2].mT
    cosine[:, 0] = -torch.inf
    best, partner = cosine.max(-1)
    order = best.argsort(dim=-1, descending=True)
    gone, stay = order[:, :r], order[:, r:].sort(1).values
    into = partner.gather(1, gone)
    weighted = x * sizes[..., None]

    def merged(t: Tensor) -> Tensor:
        even, odd, width = t[:, ::2], t[:, 1::2], (-1, -1, t.shape[2])
        moved = even.gather(1, gone[..., None].expand(width))
        odd = odd.scatter_add(1, into[..., None].expand(width), moved)
        return torch.cat([even.gather(1, stay[..., None].expand(width)), odd], 1)

    total = merged(sizes[..., None])
    return merged(weighted) / total, total[..., 0]


def _merge(length: int, width: int, heads: int, r: int, backward: bool) -> Callable[[], dict[Arm, Work]]:
    """Mean of the attention keys over heads, matching, size-weighted merge; B 8, D 64."""

    def build() -> dict[Arm, Work]:
        keys = _heads(8, heads, length)[1]
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(8, length, width, generator=generator).requires_grad_(backward)
        sizes = torch.randint(1, 4, (8, length), generator=generator).float()
        upstream = torch.randn(8, length - r, width, generator=generator)

        def ours() -> object:
            out, total = ops.merge_tokens(x, sizes, ops.bipartite_match(keys, r))
            return torch.autograd.grad(out, x, upstream) if backward else (out, total)

        def peer() -> object:
            out, total = _plain_merge(keys, x, sizes, r)
            return torch.autograd.grad(out, x, upstream) if backward else (out, total)

        return _arms(ours, peer)

    return build


def _select(length: int, width: int) -> Callable[[], dict[Arm, Work]]:
    """The best half of the tokens in their order, and their rows; B 8."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(length)
        scores, x = torch.randn(8, length, generator=generator), torch.randn(8, length, width, generator=generator)

        def ours() -> object:
            return ops.gather_tokens(x, ops.select_top(scores, length // 2).indices)

        def peer() -> object:
            index = scores.topk(length // 2, dim=1).indices.sort(1).values
            return x.gather(1, index[..., None].expand(-1, -1, width))

        return _arms(ours, peer)

    return build


def _partials(parts: int, length: int) -> Callable[[], dict[Arm, Work]]:
    """Merge of partial attention results [2, 8, N, 64], forward and backward."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(length)
        outs = [torch.randn(2, length, 8, 64, generator=generator).transpose(1, 2).requires_grad_() for _ in range(parts)]
        lses = [torch.randn(2, 8, length, generator=generator).requires_grad_() for _ in range(parts)]
        upstream = torch.randn(2, length, 8, 64, generator=generator).transpose(1, 2)

        def ours() -> object:
            return torch.autograd.grad(ops.merge_attention(*zip(outs, lses))[0], [*outs, *lses], upstream)

        def peer() -> object:
            stacked = torch.stack(lses)
            shares = (stacked - torch.logsumexp(stacked, 0)).exp()
            out = torch.zeros_like(outs[0])
            for share, part in zip(shares, outs):
                out = out + share[..., None] * part
            return torch.autograd.grad(out, [*outs, *lses], upstream)

        return _arms(ours, peer)

    return build


TOKEN_CASES = (
    *(
        Case(f"statistics/received/{'causal' if causal else 'dense'}/{length}", "torch, the matrix stored",
             _received(causal, length), account=_over_forward(length))
        for causal in (False, True) for length in (1024, 4096)
    ),
    Case("statistics/pagerank/2048", "torch, the matrix stored", _pagerank(2048)),
    Case("statistics/merge-partials/4096", "torch", _partials(4, 4096)),
    *(
        Case(f"tokens/tome/{length}/{'forward+backward' if backward else 'forward'}", "torch, plain ToMe",
             _merge(length, width, heads, r, backward), 2.0 if length == 577 and not backward else None)
        for length, width, heads, r in ((197, 768, 12, 16), (577, 1024, 16, 144)) for backward in (False, True)
    ),
    Case("tokens/select-gather/577", "torch topk, sort, gather", _select(577, 1024)),
)
"""Attention statistics and token reduction."""
