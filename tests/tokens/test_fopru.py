"""FoPru: visual tokens chosen by the attention inside the vision tower, before the decoder."""

import pytest
import torch

from tests.models.model_makers import answering, logits_of, pictures_of
from tests.tokens.oracle import probabilities
from tests.tokens.rows import TOWERS, batch, check_cached_decoding, equal_bits, reducing
from vlm.ops import select_top
from vlm.tokens.pre import PreStepOptions, TowerAttentionOptions, TowerView, best_rows, row_varies_more

COLUMN_ONLY = {"main": TOWERS["main"] | {"class_token": False}}


def step(select="top-k", ratio=0.5, partial=None, **score):
    chosen = {"kind": select, "ratio": ratio} | ({} if partial is None else {"partial": partial})
    return [{"score": {"kind": "attention-received"} | score, "select": chosen}]


def model_of(towers=None, **changes):
    return answering(towers=towers or TOWERS, tokens={"pre": step(**changes)}, length=96)


def view_of(model, layer, pixels):
    """(what the tower's block reads, the map of its attention over all keys [P, H, N, N] by loops)."""
    tower = model.towers["main"]
    x = tower.trunk(tower.stem(pixels), collect=(layer,))[1][layer]
    block = tower.trunk.blocks[layer]
    y = block.norm1(x)
    p = probabilities(block.attention.queries(y), block.attention.keys(y))
    return TowerView(x, block, int(tower.class_token is not None)), p


def pixels(count=3):
    return pictures_of([count], size=32).values


@torch.no_grad()
def test_fopru_column_sums_are_the_column_means_of_the_map_and_rows_what_the_class_leaves():
    model = model_of()
    view, p = view_of(model, 1, pixels())
    column, row = TowerAttentionOptions(exclude_class=True).both(view)
    patches = p[:, :, 1:, 1:].mean(1)
    assert torch.allclose(column.double(), patches.mean(1), atol=1e-7)
    assert torch.allclose(row.double(), patches.mean(2), atol=1e-7)
    to_class = p[:, :, 1:, 0].mean(1)
    assert torch.allclose(row.double(), (1 - to_class) / 16, atol=1e-7)
    assert torch.allclose(column.double().sum(1), 1 - to_class.mean(1), atol=1e-6)
    only = TowerAttentionOptions(query="class").both(view)[0]
    assert torch.allclose(only.double(), p[:, :, 0, 1:].mean(1), atol=1e-7)


@torch.no_grad()
def test_fopru_of_a_full_softmax_the_column_always_wins():
    with_class, without = model_of(), model_of(towers=COLUMN_ONLY)
    for model, options in ((without, TowerAttentionOptions()), (with_class, TowerAttentionOptions(exclude_class=False))):
        view, _ = view_of(model, 1, pixels())
        column, row = options.both(view)
        assert row.var(1).max() == 0
        assert not row_varies_more(column, row).any()
        assert torch.equal(options.score(view), column)
        if model is without:
            assert torch.allclose(column.sum(1), torch.ones(3), atol=1e-6)
    noisy = torch.full((1, 16), 1 / 16) + 1e-9 * torch.randn(1, 16)
    assert not row_varies_more(torch.full((1, 16), 1 / 16), noisy).any()  # rounding never wins
    assert row_varies_more(torch.full((1, 16), 1 / 16), torch.arange(16.0)[None] / 100).all()


@torch.no_grad()
def test_fopru_reads_the_block_before_the_last_of_the_tower():
    model, full = model_of(layer=-2), reducing(None)
    view, _ = view_of(full, 1, full.pixel_norms["main"](pixels()))  # blocks 0, 1, 2: the penultimate
    score = TowerAttentionOptions().score(view)
    tokens = full.visual_tokens({"main": full.pixel_norms["main"](pixels())})[0]
    got, mask = model.visual_tokens({"main": model.pixel_norms["main"](pixels())})
    assert mask is None
    for picture in range(3):
        best = sorted(sorted(range(16), key=lambda j: (-float(score[picture, j]), j))[:8])
        assert torch.equal(got[picture], tokens[picture, best])
    assert torch.equal(model_of(layer=2).visual_tokens({"main": model.pixel_norms["main"](pixels())})[0], got)
    other = model_of(layer=-1).visual_tokens({"main": model.pixel_norms["main"](pixels())})[0]
    assert not torch.equal(other, got)


@torch.no_grad()
def test_fopru_ratio_1_is_the_identity():
    full = reducing(None)
    for select in ("top-k", "rows"):
        assert equal_bits(model_of(select=select, ratio=1.0), full)


def test_fopru_kept_indices_strictly_increase_and_rows_keep_what_constant_rows_rank():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 4, generator=generator)
    constant = rows[:, :, None].expand(-1, -1, 6).flatten(1)
    for count in (1, 5, 6, 13, 24):
        by_rank, by_rows = select_top(constant, count).indices, best_rows(constant, count, 6)
        assert torch.equal(by_rank, by_rows)
        assert (by_rank.diff(dim=1) > 0).all()
    score = torch.rand(5, 24, generator=generator)
    assert (best_rows(score, 13, 6).diff(dim=1) > 0).all()
    whole = best_rows(score, 12, 6)
    best = score.unflatten(1, (4, 6)).sum(-1).topk(2).indices.sort().values
    assert torch.equal(whole, (best[:, :, None] * 6 + torch.arange(6)).flatten(1))


def test_fopru_a_row_that_would_exceed_the_share_is_cut_or_left_out():
    def count(ratio, partial):
        return PreStepOptions.model_validate(step("rows", ratio, partial)[0]).count(16, 4)

    assert [count(r, "cut") for r in (0.05, 0.4, 0.5, 0.99)] == [1, 6, 8, 16]
    assert [count(r, "drop") for r in (0.05, 0.4, 0.5, 0.99)] == [4, 4, 8, 16]
    assert PreStepOptions.model_validate(step(ratio=0.29)[0]).count(100) == 29


@pytest.mark.parametrize("changes", [{}, {"select": "rows"}, {"axis": "row"}, {"axis": "column"}, {"query": "class", "axis": "column"}])
@torch.no_grad()
def test_fopru_cached_decoding_equals_recomputing(changes):
    lengths = check_cached_decoding(model_of(**changes))
    assert lengths == [[12, 4, 20, 10]] * 4  # 8 of 16 a picture, in every layer alike


@torch.no_grad()
def test_fopru_kept_tokens_stand_at_consecutive_positions_before_the_decoder():
    _, layout = logits_of(model_of(), batch())
    for row in range(4):
        assert layout.position[row, layout.mask[row]].tolist() == list(range(int(layout.mask[row].sum())))


@torch.no_grad()
def test_fopru_works_beside_the_row_too():
    cross = {"kind": "cross-attention", "every": 2}
    model = answering(cross, towers=TOWERS, tokens={"pre": step()}, length=96)
    assert model.picture_tokens == 8
    check_cached_decoding(model)


@pytest.mark.parametrize(
    ("tokens", "changes", "said"),
    [
        ({"pre": step(layer=-4)}, {}, "of a tower of 3 blocks"),
        ({"pre": step(layer=-1)}, {"towers": {"main": TOWERS["main"] | {"layer": -2}}}, "read before that block"),
        ({"pre": step(query="class", axis="row")}, {}, "one number"),
        ({"pre": step(query="class")}, {"towers": COLUMN_ONLY}, "no class token"),
        ({"pre": step()}, {"towers": {"main": TOWERS["main"] | {"merge": {"remove": {"kind": "constant", "r": 2}}}}}, "tokens are merged"),
        ({"pre": step()}, {"towers": {"main": TOWERS["main"] | {"drop_class": False}}}, "patches alone"),
        ({"pre": step()}, {"connector": {"kind": "linear", "tokens": 4}}, "connector makes 4 tokens of 16"),
        ({"pre": step() + step()}, {}, "only the first step"),
        ({"pre": [{"select": {"kind": "top-k", "ratio": 0.5}}]}, {}, "needs a score"),
        ({"pre": [{"select": {"kind": "bipartite"}}]}, {}, "goes with apply"),
        ({}, {}, "nothing is dropped"),
    ],
)
def test_fopru_what_cannot_be_read_is_refused(tokens, changes, said):
    with pytest.raises(ValueError, match=said):
        answering(**{"towers": TOWERS, "tokens": tokens, "length": 96} | changes)
