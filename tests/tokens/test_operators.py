"""The operators that token reduction calls, against loops in float64, and that they export together."""

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokens.oracle import probabilities, tome, walk
from vlm.export.graphs import export_part
from vlm.ops import (
    attention_column_sums,
    attention_pagerank,
    bipartite_match,
    gather_tokens,
    merge_tokens,
    select_top,
    unmerge_tokens,
)
from vlm.types.export import ExportPart


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "m", "groups"), [(1, 1, 4), (5, 7, 2), (7, 5, 1), (13, 13, 4)])
@pytest.mark.parametrize("alignment", ["bottom-right", "top-left"])
def test_fopru_column_sums_are_those_of_the_map(n, m, groups, alignment):
    q, k = drawn(2, 4, n, 6), drawn(2, groups, m, 6, seed=1)
    mask = torch.rand(2, m, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[1] = False  # a row without any key
    weights = drawn(2, 4, n, seed=3)
    for causal in (False, True):
        p = probabilities(q, k, causal=causal, alignment=alignment, key_mask=mask, temperature=0.5)
        dirty = torch.where(mask[:, None, :, None], k, torch.nan)
        got = attention_column_sums(q, dirty, causal=causal, alignment=alignment, key_mask=mask, weights=weights, temperature=0.5)
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), torch.einsum("bhi,bhij->bhj", weights.double(), p), atol=1e-5)
        assert not got[:, :, ~mask[0]][0].any()
    lse = (q.double() @ k.repeat_interleave(4 // groups, 1).double().transpose(-1, -2) * 6**-0.5).logsumexp(-1)
    whole = attention_column_sums(q.double(), k.double())
    assert torch.allclose(attention_column_sums(q.double(), k.double(), lse=lse), whole, atol=1e-12)
    assert torch.allclose(whole.sum(-1), torch.full((2, 4), float(n), dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 7, 16, 17])
@pytest.mark.parametrize("damping", [0.0, 0.15])
def test_aim_pagerank_is_the_walk_and_every_step_sums_to_one(n, damping):
    q, k = drawn(3, 4, n, 5), drawn(3, 2, n, 5, seed=1)
    mask = torch.ones(3, n, dtype=torch.bool)
    mask[0, : n // 2] = n < 2  # padding on the left, on the right, nowhere
    mask[1, (n + 1) // 2 :] = False
    p = probabilities(q, k, causal=True, key_mask=mask, temperature=0.1)
    p = p * mask[:, None, :, None]  # padding asks nothing
    for iterations in (1, 2, 5):
        got = attention_pagerank(q, k, temperature=0.1, iterations=iterations, damping=damping, causal=True, key_mask=mask)
        assert torch.allclose(got.double(), walk(p, mask, iterations, damping), atol=1e-4)
        assert torch.allclose(got.sum(-1), torch.ones(3, 4), atol=1e-5)
        assert not got.masked_select(~mask[:, None].expand_as(got)).any()
    one = attention_pagerank(q.double(), k.double(), iterations=1, causal=True)
    assert torch.allclose(one, probabilities(q, k, causal=True).mean(2), atol=1e-12)  # the column means


def test_aim_a_causal_walk_that_goes_on_ends_on_the_first_position():
    q, k = drawn(1, 2, 9, 4), drawn(1, 2, 9, 4, seed=1)
    first = [float(attention_pagerank(q, k, iterations=t, causal=True)[0, :, 0].min()) for t in (1, 5, 50, 500)]
    assert first == sorted(first)
    assert first[-1] > 0.999


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20), r=st.integers(0, 12), protect=st.integers(0, 2), weighting=st.sampled_from(["size", "mean"]),
    seed=st.integers(0, 99),
)
def test_core_tome_merging_is_that_of_loops(n, r, protect, weighting, seed):
    x, metric = drawn(2, n, 3, seed=seed).double(), drawn(2, n, 4, seed=seed + 1).double()
    sizes = 1.0 + torch.randint(0, 4, (2, n), generator=torch.Generator().manual_seed(seed)).double()
    most = max(0, n - protect) // 2
    if r > most:
        with pytest.raises(ValueError, match=f"expected 0 to {most}"):
            bipartite_match(metric, r, protect)
        r = most
    matching = bipartite_match(metric, r, protect)
    merged, counted = merge_tokens(x, sizes, matching, weighting)
    assert merged.shape == (2, n - r, 3)
    places = matching.assign
    for row in range(2):
        expected, count, sets = tome(x[row], metric[row], sizes[row], r, protect, weighting)
        if not r:
            assert torch.equal(unmerge_tokens(merged, matching)[row], x[row])
            continue
        assert torch.allclose(merged[row], expected, atol=1e-12)
        assert torch.allclose(counted[row], count)
        assert [next(i for i, s in enumerate(sets) if token in s) for token in range(n)] == places[row].tolist()


def test_core_tome_sums_and_sizes_are_conserved_over_layers():
    x, sizes = drawn(3, 33, 5).double(), torch.ones(3, 33, dtype=torch.float64)
    before = x.sum(1)
    for r in (8, 6, 3, 5):
        x, sizes = merge_tokens(x, sizes, bipartite_match(x, r), "size")
        assert torch.allclose((sizes[..., None] * x).sum(1), before, atol=1e-10)
        assert torch.equal(sizes.sum(1), torch.full((3,), 33.0, dtype=torch.float64))
    assert x.shape[1] == 33 - 22


def test_core_tome_duplicates_with_proportional_attention_are_the_unmerged_attention():
    """Keys that count log(size) more are those keys so many times."""
    half = drawn(2, 8, 6).double()
    twice = torch.stack([half, half], dim=2).flatten(1, 2)  # every token beside its copy
    merged, sizes = merge_tokens(twice, None, bipartite_match(twice, 8, 0), "size")
    assert torch.allclose(merged, half, atol=1e-15)
    assert torch.equal(sizes, torch.full((2, 8), 2.0, dtype=torch.float64))
    odd = torch.cat([twice, half[:, :1] * 0.5], dim=1)  # and one token that has none
    kept = torch.cat([merged, half[:, :1] * 0.5], dim=1)
    bias = torch.cat([sizes, torch.ones(2, 1, dtype=torch.float64)], dim=1).log()
    q = drawn(2, 5, 6, seed=4).double()
    whole = (q @ odd.transpose(1, 2)).softmax(-1) @ odd
    short = (q @ kept.transpose(1, 2) + bias[:, None]).softmax(-1) @ kept
    assert torch.allclose(short, whole, atol=1e-14)


def test_core_tome_unmerge_of_equal_tokens_gives_them_back():
    x = drawn(2, 6, 4).repeat_interleave(2, 1)
    matching = bipartite_match(x, 6, 0)
    merged, _ = merge_tokens(x, None, matching)
    assert torch.allclose(unmerge_tokens(merged, matching), x, atol=1e-6)


def test_core_tome_ties_go_to_the_lowest_index_and_nan_is_least():
    x = torch.ones(1, 8, 2)
    matching = bipartite_match(x, 2, 1)
    assert matching.source.tolist() == [[2, 4]]  # tokens 2 and 4; the class token 0 is protected
    assert matching.target.tolist() == [[1, 1]]
    assert matching.kept.tolist() == [[0, 6, 1, 3, 5, 7]]
    x[0, 2] = torch.nan
    assert bipartite_match(x, 2, 1).source.tolist() == [[4, 6]]


def test_core_tome_gradients_are_the_weights_and_sizes_carry_none():
    x = drawn(1, 6, 3).double().requires_grad_()
    sizes = torch.tensor([[1.0, 2, 3, 4, 5, 6]], dtype=torch.float64, requires_grad=True)
    matching = bipartite_match(x, 2, 0)
    assert torch.autograd.gradcheck(lambda x: merge_tokens(x, sizes.detach(), matching)[0], (x,))
    merged, _ = merge_tokens(x, sizes.detach(), matching)
    merged.sum().backward()
    sizes = sizes.detach()
    pairs = list(zip(matching.source[0].tolist(), matching.target[0].tolist()))
    for source, target in pairs:
        total = float(sizes[0, [*(s for s, t in pairs if t == target), target]].sum())
        assert torch.allclose(x.grad[0, source], torch.full((3,), float(sizes[0, source]) / total, dtype=torch.float64))


@pytest.mark.parametrize("order", ["sources-first", "position", "similarity"])
def test_core_tome_orders_are_of_the_same_tokens(order):
    x = drawn(3, 11, 4)
    first, other = bipartite_match(x, 4, 1), bipartite_match(x[:, None], 4, 1, order=order)
    merged, sizes = merge_tokens(x, None, first)
    again, same = merge_tokens(x, None, other)
    assert torch.equal(unmerge_tokens(again, other), unmerge_tokens(merged, first))
    assert torch.equal(same.sort().values, sizes.sort().values)
    if order == "position":
        assert (other.kept.diff(dim=1) > 0).all()
    unit = torch.nn.functional.normalize(x, dim=-1)
    best = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).amax(-1)
    for row in range(3):  # the class token leads, though it has no partner
        even = [t for t in other.kept[row].tolist() if t % 2 == 0]
        if order == "similarity":
            assert even == [0, *sorted((t for t in even if t), key=lambda t: -float(best[row, t // 2]))]


def test_core_tome_plain_mean_differs_from_the_mean_by_size():
    x, sizes = torch.tensor([[[0.0], [3.0]]]), torch.tensor([[1.0, 2.0]])
    matching = bipartite_match(torch.ones(1, 2, 1), 1, 0)
    assert merge_tokens(x, sizes, matching, "size")[0].item() == 2.0
    assert merge_tokens(x, sizes, matching, "mean")[0].item() == 1.5


def test_core_select_top_ascends_and_takes_the_lower_of_equals():
    score = torch.tensor([[1.0, 3, 3, torch.nan, 3, 2], [0, 0, 0, 0, 0, 0]])
    for k, expected in ((0, [[], []]), (1, [[1], [0]]), (2, [[1, 2], [0, 1]]), (4, [[1, 2, 4, 5], [0, 1, 2, 3]])):
        assert select_top(score, k).indices.tolist() == expected
    assert select_top(score, 6).indices.tolist() == [list(range(6))] * 2  # keeping all is the identity
    assert select_top(score, 5).indices.tolist()[0] == [0, 1, 2, 4, 5]


def test_core_select_gather_then_scatter_back_restores_what_was_kept():
    x = drawn(2, 5, 3).requires_grad_()
    index = torch.tensor([[0, 2, 4], [1, 3, -1]])
    taken = gather_tokens(x, index)
    assert not taken[1, 2].any()
    back = torch.zeros_like(x).scatter(1, index.clamp(min=0)[..., None].expand(-1, -1, 3), taken.masked_fill((index < 0)[..., None], 0))
    assert torch.equal(back[0, [0, 2, 4]], x[0, [0, 2, 4]])
    taken.sum().backward()
    assert x.grad[..., 0].tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]


class _All(torch.nn.Module):
    def forward(self, x):
        heads = x[:, None]
        column = attention_column_sums(heads, heads)[:, 0]
        rank = attention_pagerank(heads, heads, temperature=0.5, causal=True)[:, 0]
        matching = bipartite_match(x, 3)
        merged, sizes = merge_tokens(x, None, matching)
        back = unmerge_tokens(merged, matching)
        return column, rank, merged, sizes, back, gather_tokens(x, select_top(rank, 4).indices)


def test_the_operators_export(tmp_path):
    x, other = drawn(2, 11, 4), drawn(5, 11, 4, seed=9)
    names = ["column", "rank", "merged", "sizes", "back", "taken"]
    export_part("all", ExportPart(_All(), {"x": x}, {"x": {0: "batch"}}, names), tmp_path / "all.onnx", opset=18)
    session = onnxruntime.InferenceSession(tmp_path / "all.onnx")
    for name, got, wanted in zip(names, session.run(names, {"x": other.numpy()}), _All()(other), strict=True):
        assert torch.allclose(torch.from_numpy(got), wanted, atol=1e-5), name
