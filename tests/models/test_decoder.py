"""The decoder loop: cached and uncached passes are one function, whatever the padding."""

import pytest
import torch

from tests.models.decoder_questions import (
    an_empty_row_is_harmless,
    by_row,
    cached_equals_uncached,
    order_changes_nothing,
    packed_equals_rows_and_is_not_continued,
    padded_equals_alone,
    ragged_pieces_equal_whole_rows,
    rows_of_a_cache_go_on,
    states,
)
from tests.models.model_makers import VOCABULARY, language, random_rows, rows_of
from vlm.models.decoder import run_decoder
from vlm.models.language import LanguageOptions, layout_of
from vlm.types import Batch, Layout, TokenIds

SIZES = [5, 1, 11, 7]


@pytest.mark.parametrize("rope", [10000.0, 500.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_a_pass_without_padding_on_the_left_is_the_trunk_bit_for_bit(rope, kv_heads):
    model = language(rope_theta=rope, kv_heads=kv_heads)
    stream = rows_of(random_rows(SIZES))
    result = states(model, stream, collect=(0, 2, 4))
    expected, hidden = model.trunk(
        model.tokens(stream.values), causal=True, position=layout_of(stream).position, collect=(0, 2, 4)
    )
    assert torch.equal(result.x, expected)
    assert result.hidden.keys() == hidden.keys()
    assert all(torch.equal(result.hidden[layer], hidden[layer]) for layer in hidden)
    assert result.cache is None
    assert result.layouts == {}


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_batch_mates_and_order_change_nothing(side):
    model, lists = language(), random_rows(SIZES)
    stream, result = padded_equals_alone(model, lists, side)
    order_changes_nothing(model, lists, side, by_row(stream, result.x))


@torch.no_grad()
def test_padding_is_never_attended():
    model, lists = language(), random_rows(SIZES)
    for side in ("left", "right"):
        stream = rows_of(lists, side=side)
        x = model.tokens(stream.values)
        spoilt = x.masked_fill(~stream.mask[..., None], 1e6)
        layout = layout_of(stream)
        one, other = run_decoder(model.trunk, x, layout).x, run_decoder(model.trunk, spoilt, layout).x
        assert torch.equal(one[stream.mask], other[stream.mask])
        cached = [run_decoder(model.trunk, part, layout, keep_cache=True).cache for part in (x, spoilt)]
        step = Layout.of_tokens(torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2, dtype=torch.bool), torch.arange(4))
        new = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(1))
        one, other = (run_decoder(model.trunk, new, step, cache=cache).x for cache in cached)
        assert torch.equal(one, other)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("step", [1, 3])
@torch.no_grad()
def test_cached_equals_uncached_decoding(side, step):
    _, cache = cached_equals_uncached(language(), random_rows(SIZES), side, step)
    assert cache.bytes == 2 * 4 * 4 * 2 * 4 * (12 + 6) * 4


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_ragged_pieces_are_appended_with_their_own_padding(side):
    pieces = [random_rows([2, 4, 1, 3], seed=6), random_rows([3, 1, 2, 2], seed=7)]
    ragged_pieces_equal_whole_rows(language(), random_rows(SIZES), pieces, side)


@torch.no_grad()
def test_rows_of_a_cache_are_kept_repeated_and_reordered():
    model, lists = language(), random_rows(SIZES)
    rows_of_a_cache_go_on(model, states(model, rows_of(lists), keep_cache=True).cache, lists)


@torch.no_grad()
def test_an_empty_row_is_harmless():
    model = language()
    after = an_empty_row_is_harmless(model)
    assert torch.allclose(after[1, 0], states(model, rows_of([[5, 6, 7, 8]])).x[0, -1], atol=1e-5)


def test_packed_documents_equal_rows_and_cannot_be_continued():
    packed_equals_rows_and_is_not_continued(language(), random_rows([4, 6, 1]))


def test_recompute_and_autocast_train():
    model = language().train()
    lists = random_rows(SIZES)
    gradients = []
    for recompute in (False, True):
        model.set_recompute(recompute)
        model.zero_grad()
        for side in ("left", "right"):
            stream = rows_of(lists, side=side)
            states(model, stream).x[stream.mask].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-5) for name in gradients[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream = rows_of(lists, side="left")
        narrow = states(model, stream).x
        with torch.no_grad():
            cache = states(model, stream, keep_cache=True).cache
            assert cache.layers[0].keys.dtype == torch.bfloat16
            states(model, rows_of([[4]] * 4), cache=cache)
    narrow.float()[stream.mask].sum().backward()
    wide = states(model, stream).x
    assert (narrow - wide)[stream.mask].abs().max() < 0.1


@torch.no_grad()
def test_prefill_and_advance_give_the_logits_of_encode():
    model, lists = language(), random_rows(SIZES)
    for side in ("left", "right"):
        stream = rows_of(lists, side=side)
        logits, cache = model.prefill(stream, {})
        steps = [logits]
        for token in (7, 8):
            logits, cache = model.advance(torch.full((4,), token), cache)
            steps.append(logits)
        for row, values in enumerate(lists):
            whole = rows_of([[*values, 7, 8]])
            batch = Batch({"text": whole}, ["a"], torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
            given = model.encode(batch, {"text": frozenset({"vocabulary"})})["text"].vocabulary.logits()[0, -3:]
            assert torch.allclose(torch.stack([part[row] for part in steps]), given, atol=1e-5)


def test_query_biases_are_an_option_of_their_own():
    table = dict(width=8, depth=1, heads=2, ffn_width=8, length=8)
    names = {n for n, _ in LanguageOptions(**table, qkv_bias=True).build(VOCABULARY).named_parameters() if "bias" in n}
    assert names == {f"trunk.blocks.0.attention.{part}.bias" for part in "qkv"}
    assert not any("bias" in n for n, _ in LanguageOptions(**table).build(VOCABULARY).named_parameters())
    plain = LanguageOptions(**table, bias=True).build(VOCABULARY)
    assert {f"trunk.blocks.0.attention.{part}.bias" for part in ("q", "out")} <= {n for n, _ in plain.named_parameters()}
    assert isinstance(rows_of([[1]]), TokenIds)
