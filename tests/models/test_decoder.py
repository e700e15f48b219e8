"""The decoder loop: cached and uncached passes are one function, whatever the padding."""

from dataclasses import replace
from itertools import chain

import pytest
import torch

from tests.models.model_makers import VOCABULARY, language, random_rows, rows_of
from vlm.models.decoder import run_decoder
from vlm.models.language import LanguageOptions, layout_of
from vlm.types import Batch, Layout, TokenIds

SIZES = [5, 1, 11, 7]


def states(model, stream, **named):
    return run_decoder(model.trunk, model.tokens(stream.values), layout_of(stream), **named)


def by_row(stream, x):
    return [x[row, stream.mask[row]] for row in range(len(stream))]


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
    stream = rows_of(lists, side=side, extra=3)
    padded = by_row(stream, states(model, stream).x)
    for row, values in enumerate(lists):
        alone = states(model, rows_of([values])).x[0]
        assert torch.allclose(padded[row], alone, atol=1e-5)
    turned = rows_of(lists[::-1], side=side)
    for one, other in zip(padded, by_row(turned, states(model, turned).x)[::-1]):
        assert torch.allclose(one, other, atol=1e-5)


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
    model, lists = language(), random_rows(SIZES)
    more = random_rows([6] * len(SIZES), seed=5)
    stream = rows_of(lists, side=side, extra=1)
    cache = states(model, stream, keep_cache=True).cache
    for start in range(0, 6, step):
        part = rows_of([row[start : start + step] for row in more])
        result = states(model, part, cache=cache)
        cache = result.cache
        for row, values in enumerate(lists):
            whole = states(model, rows_of([values + more[row][: start + step]])).x[0, -step:]
            assert torch.allclose(result.x[row], whole, atol=1e-5)
        assert result.layout.position[:, -1].tolist() == [size + start + step - 1 for size in SIZES]
    assert cache.next_position.tolist() == [[size + 6] * 4 for size in SIZES]
    assert cache.bytes == 2 * 4 * 4 * 2 * 4 * (12 + 6) * 4


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_ragged_pieces_are_appended_with_their_own_padding(side):
    model, lists = language(), random_rows(SIZES)
    pieces = [random_rows([2, 4, 1, 3], seed=6), random_rows([3, 1, 2, 2], seed=7)]
    cache = states(model, rows_of(lists), keep_cache=True).cache
    read = [list(values) for values in lists]
    for piece in pieces:
        stream = rows_of(piece, side=side)
        result = states(model, stream, cache=cache)
        cache = result.cache
        for row, got in enumerate(by_row(stream, result.x)):
            read[row] += piece[row]
            whole = states(model, rows_of([read[row]])).x[0, -len(piece[row]) :]
            assert torch.allclose(got, whole, atol=1e-5)
    assert cache.next_position[:, 0].tolist() == [len(values) for values in read]


@torch.no_grad()
def test_rows_of_a_cache_are_kept_repeated_and_reordered():
    model, lists = language(), random_rows(SIZES)
    cache = states(model, rows_of(lists), keep_cache=True).cache
    index = torch.tensor([3, 0, 0])
    grown = states(model, rows_of([[9], [10], [11]]), cache=cache.rows(index)).x
    for row, (source, token) in enumerate(zip(index.tolist(), (9, 10, 11))):
        alone = states(model, rows_of([lists[source] + [token]])).x[0, -1]
        assert torch.allclose(grown[row, 0], alone, atol=1e-5)


@torch.no_grad()
def test_an_empty_row_is_harmless():
    model, lists = language(), [[], [5, 6, 7]]
    result = states(model, rows_of(lists), keep_cache=True)
    assert torch.isfinite(result.x).all()
    assert result.cache.next_position[:, 0].tolist() == [0, 3]
    after = states(model, rows_of([[8], [8]]), cache=result.cache).x
    assert torch.allclose(after[0, 0], states(model, rows_of([[8]])).x[0, 0], atol=1e-5)
    assert torch.allclose(after[1, 0], states(model, rows_of([[5, 6, 7, 8]])).x[0, -1], atol=1e-5)


def test_packed_documents_equal_rows_and_cannot_be_continued():
    model, lists = language(), random_rows([4, 6, 1])
    joined = list(chain(*lists))
    segment = list(chain(*([number] * len(values) for number, values in enumerate(lists))))
    stream = rows_of([joined], extra=2, segment=[segment])
    stream = replace(stream, segment=torch.where(stream.mask, stream.segment, -1))
    together = states(model, stream).x[0]
    start = 0
    for values in lists:
        assert torch.allclose(together[start : start + len(values)], states(model, rows_of([values])).x[0], atol=1e-5)
        start += len(values)
    with pytest.raises(ValueError, match="packs several documents"):
        states(model, stream, keep_cache=True)
    cache = states(model, rows_of([lists[0]]), keep_cache=True).cache
    with pytest.raises(ValueError, match="packed documents cannot be appended"):
        states(model, stream, cache=cache)


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
