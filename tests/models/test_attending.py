"""Language models whose attention has a mask: padding, packing, caches that roll, and the formulas of lm-infinite."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from tests.models.decoder_questions import (
    packed_rows,
    padded_equals_alone,
    ragged_pieces_equal_whole_rows,
    rows_of_a_cache_go_on,
    states,
)
from tests.models.model_makers import (
    VOCABULARY,
    answering,
    batch_of,
    language,
    pictures_of,
    random_rows,
    rows_of,
)
from vlm.config.errors import RequestError
from vlm.layers import rotary_tables, rotate
from vlm.models.attending import AttendingCache, AttendingTrunk
from vlm.models.decoder import run_decoder
from vlm.models.directory import load_model, published_layout, save_model
from vlm.models.language import LanguageOptions, layout_of

SIZES = [5, 1, 19, 8]
LAMBDA = {"kind": "lambda", "window": 5, "sinks": 2}
INFINITE = dict(attention={"mask": [LAMBDA], "distance_cap": 5})
ROLLING = dict(attention={"mask": [LAMBDA], "distance_cap": 5, "cache": "rolling"})
TABLES = {
    "lm-infinite": INFINITE,
    "lm-infinite rolling": ROLLING,
    "lambda rolling": dict(attention={"mask": [LAMBDA], "cache": "rolling"}),
    "lambda alibi rolling": dict(attention={"mask": [LAMBDA], "bias": {"kind": "alibi", "cap": 5}, "cache": "rolling"}),
    "window t5 cosine": dict(attention={"mask": [{"kind": "window", "size": 4}], "bias": {"kind": "t5", "buckets": 8, "max_distance": 9,
                                        "bidirectional": False}, "score": "cosine", "softcap": 9.0, "cache": "rolling"}),
    "symmetric global": dict(attention={"mask": [{"kind": "window-symmetric", "size": 6}], "global_tokens": 2}),
}
KINDS = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
ENCODER = dict(causal=False, attention={"mask": [{"kind": "window-symmetric", "size": 6}], "global_tokens": 1, "global_projections": True})


def weights_of(model, **table):
    """A model of other options with the weights of `model`."""
    other = language(**table)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("table", [*TABLES.values(), ENCODER], ids=[*TABLES, "encoder"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing_and_is_never_read(table, side):
    model = language(**table)
    stream, result = padded_equals_alone(model, random_rows(SIZES), side, atol=2e-5, collect=(0, 2, 4))
    assert result.hidden.keys() == {0, 2, 4}
    x = model.tokens(stream.values).masked_fill(~stream.mask[..., None], 1e6)
    assert torch.equal(run_decoder(model.trunk, x, layout_of(stream)).x[stream.mask], result.x[stream.mask])


@KINDS
@torch.no_grad()
def test_padding_inside_a_row_moves_no_window(table):
    model, values = language(**table), random_rows([14])[0]
    stream = rows_of([values], extra=4)
    order = [0, 1, 14, 2, 3, 4, 15, 16, *range(5, 12), 17, 12, 13]
    holed = replace(stream, values=stream.values[:, order], mask=stream.mask[:, order])
    position = (holed.mask.cumsum(1) - 1).clamp(min=0)
    result = states(model, replace(holed, position=position), keep_cache=True)
    assert torch.allclose(result.x[holed.mask], states(model, rows_of([values])).x[0], atol=2e-5)
    after = states(model, rows_of([[7]]), cache=result.cache).x
    assert torch.allclose(after[0, 0], states(model, rows_of([[*values, 7]])).x[0, -1], atol=2e-5)


@pytest.mark.parametrize("table", [*TABLES.values(), ENCODER], ids=[*TABLES, "encoder"])
def test_packed_documents_equal_rows_in_value_and_gradient(table):
    model, lists = language(**table), random_rows([9, 13, 1, 12])
    stream, apart = packed_rows(lists), rows_of(lists)
    together, single = states(model, stream).x[0, : sum(map(len, lists))], states(model, apart).x[apart.mask]
    assert torch.allclose(together, single, atol=2e-5)
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(3))
    parameters = list(model.trunk.parameters())
    one, other = (torch.autograd.grad((x * weights).sum(), parameters, allow_unused=True) for x in (together, single))
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="packs several documents|continues nothing"):
        states(model, stream, keep_cache=True)


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("step", [1, 7])
@torch.no_grad()
def test_core_lm_infinite_cached_equals_uncached_decoding(table, side, step):
    model, lists = language(**table), random_rows(SIZES)
    more = random_rows([42] * len(SIZES), seed=5)
    cache = states(model, rows_of(lists, side=side, extra=1), keep_cache=True).cache
    assert isinstance(cache, AttendingCache)
    whole = states(model, rows_of([values + more[row] for row, values in enumerate(lists)]))
    for start in range(0, 42, step):
        result = states(model, rows_of([row[start : start + step] for row in more]), cache=cache)
        cache = result.cache
        for row, values in enumerate(lists):
            place = len(values) + start
            assert torch.allclose(result.x[row], whole.x[row, place : place + step], atol=5e-5)
    assert cache.next_position.tolist() == [[size + 42] * 4 for size in SIZES]
    kept = max(layer.keys.shape[2] for layer in cache.layers)
    assert kept <= 5 - 1 + 32 + 7 if table["attention"].get("cache") == "rolling" else kept == max(SIZES) + 1 + 42


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_ragged_pieces_are_appended_with_their_own_padding(table, side):
    model, pieces = language(**table), [random_rows([2, 4, 1, 3], seed=6), random_rows([8, 0, 2, 5], seed=7)]
    cache, read = ragged_pieces_equal_whole_rows(model, random_rows([0, 1, 9, 4]), pieces, side, atol=5e-5)
    rows_of_a_cache_go_on(model, cache, read, atol=5e-5)


@torch.no_grad()
def test_core_lm_infinite_is_full_attention_bit_for_bit_up_to_the_window():
    table = dict(attention={"mask": [LAMBDA | {"window": 19}], "distance_cap": 19})
    model, stream = language(**table), rows_of(random_rows(SIZES))
    plain = weights_of(model)
    assert not isinstance(plain.trunk, AttendingTrunk)
    assert torch.equal(states(model, stream).x[stream.mask], states(plain, stream).x[stream.mask])
    longer = rows_of(random_rows([27]))
    assert not torch.allclose(states(model, longer).x[:, -1], states(plain, longer).x[:, -1], atol=1e-4)


@torch.no_grad()
def test_core_lm_infinite_equals_the_keys_gathered_query_by_query():
    model = language(**INFINITE, kv_heads=4).double()
    stream = rows_of(random_rows([23]))
    x, window, sinks = model.tokens(stream.values), 5, 2
    for block in model.trunk.blocks:
        y = block.norm1(x)
        q, k, v = block.attention.queries(y), *block.attention.keys_values(y)
        rows = []
        for i in range(23):
            keys = [j for j in range(i + 1) if i - j < window or j < sinks]
            turns = rotary_tables(torch.tensor([[min(i - j, window) for j in keys]]), 4, 10000.0)
            looking = rotate(q[:, :, i : i + 1].expand(-1, -1, len(keys), -1), turns)
            weights = ((looking * k[:, :, keys]).sum(-1) * 4**-0.5).softmax(-1)
            rows.append((weights[..., None] * v[:, :, keys]).sum(2))
        x = block.finish(x, torch.stack(rows, 2))
    assert torch.allclose(states(model, stream).x, x, atol=1e-5)


@torch.no_grad()
def test_core_lm_infinite_without_sinks_is_a_sliding_window():
    capped = language(attention={"mask": [LAMBDA | {"sinks": 0}], "distance_cap": 5})
    window = weights_of(capped, attention={"mask": [{"kind": "window", "size": 5}]})
    stream = rows_of(random_rows(SIZES))
    assert torch.equal(states(capped, stream).x, states(window, stream).x)


@torch.no_grad()
def test_core_budget_longformer_wide_window_is_dense_attention_with_equal_projections():
    wide = dict(causal=False, attention={"mask": [{"kind": "window-symmetric", "size": 64}], "global_tokens": 1, "global_projections": True})
    model = language(**wide)
    for block in model.trunk.blocks:
        for name in ("q", "k", "v"):
            getattr(block.global_attention, name).load_state_dict(getattr(block.attention, name).state_dict())
    dense = language(causal=False)
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "global_attention" not in k})
    stream = rows_of(random_rows(SIZES))
    assert torch.allclose(states(model, stream).x[stream.mask], states(dense, stream).x[stream.mask], atol=2e-5)


@torch.no_grad()
def test_core_budget_longformer_equals_dense_attention_under_its_mask():
    model = language(**ENCODER, kv_heads=4).double()
    stream = rows_of(random_rows([21]))
    x, places = model.tokens(stream.values), torch.arange(21)
    allow = (places[:, None] - places).abs() <= 3
    allow[:, 0] = allow[0] = True
    turns = rotary_tables(places[None], 4, 10000.0)
    for block in model.trunk.blocks:
        y = block.norm1(x)

        def seen(own, y=y):
            q, (k, v) = own.queries(y, turns), own.keys_values(y, turns)
            return (q @ k.transpose(2, 3) * 4**-0.5).masked_fill(~allow, -torch.inf).softmax(-1) @ v

        mixed = seen(block.attention)
        mixed[:, :, 0] = seen(block.global_attention)[:, :, 0]
        x = block.finish(x, mixed)
    assert torch.allclose(states(model, stream).x, x, atol=1e-5)


@torch.no_grad()
def test_a_model_with_pictures_keeps_the_mask_of_its_language_model():
    small = dict(width=16, depth=4, heads=4, kv_heads=2, ffn_width=24, length=64)
    model = answering(language=small | ROLLING)
    assert isinstance(model.language.trunk, AttendingTrunk)
    with pytest.raises(RequestError, match="under a mask"):
        model.export_parts()
    rows = rows_of([[2, 3, 5, 6], [2, 7, 8, 9, 3, 4]])
    logits, cache = model.prefill(rows, {"image": pictures_of([1, 1])})
    assert isinstance(cache, AttendingCache)
    for token in (9, 12):
        logits, cache = model.advance(torch.tensor([token, token + 1]), cache)
    longer = rows_of([[2, 3, 5, 6, 9, 12], [2, 7, 8, 9, 3, 4, 10, 13]])
    batch = batch_of(2, text=longer, image=pictures_of([1, 1]))
    out = model.encode(batch, {"text": frozenset({"vocabulary"})})["text"]
    for row in range(2):
        assert torch.allclose(logits[row], out.vocabulary.logits()[row][out.layout.mask[row]][-1], atol=5e-5)


def test_recomputed_activations_give_the_same_gradients():
    stream, found = rows_of(random_rows(SIZES)), []
    for recompute in (False, True):
        model = language(**INFINITE).train()
        model.set_recompute(recompute)
        states(model, stream).x.square().sum().backward()
        found.append([p.grad for p in model.trunk.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@torch.no_grad()
def test_models_are_saved_and_read_again_and_are_no_llama(tmp_path):
    for number, table in enumerate((ROLLING, ENCODER)):
        model = language(**table)
        save_model(model, tmp_path / str(number))
        again = load_model(tmp_path / str(number)).eval()
        stream = rows_of(random_rows(SIZES))
        assert again.options == model.options
        assert torch.equal(states(model, stream).x, states(again, stream).x)
        assert published_layout(model) is None
        with pytest.raises(RequestError, match="cannot be exported"):
            model.export_parts()


@torch.no_grad()
def test_options_that_hide_nothing_are_no_options():
    plain, bare = language(), language(attention={"kind": "exact", "mask": [{"kind": "causal"}]})
    assert not isinstance(bare.trunk, AttendingTrunk)
    assert plain.state_dict().keys() == bare.state_dict().keys()
    assert set(bare.export_parts()) == set(plain.export_parts())
    assert published_layout(bare).__class__ is published_layout(plain).__class__
    assert published_layout(plain) is not None


@torch.no_grad()
def test_an_encoder_sees_later_tokens_and_writes_nothing():
    model = language(causal=False)
    one, other = (states(model, rows_of([[5, 6, last]])).x for last in (7, 8))
    assert not torch.allclose(one[0, 0], other[0, 0], atol=1e-4)
    with pytest.raises(ValueError, match="continues nothing"):
        model.prefill(rows_of([[5, 6]]), {})


@pytest.mark.parametrize(("attention", "message"), [
    ({"mask": [LAMBDA], "distance_cap": 4}, "equals its window"),
    ({"mask": [LAMBDA], "distance_cap": 5, "bias": {"kind": "alibi"}}, "bias.cap"),
    ({"mask": [LAMBDA, {"kind": "window", "size": 3}]}, "one window at most"),
    ({"mask": [{"kind": "block-causal", "size": 3}]}, "block-causal"),
    ({"mask": [LAMBDA], "global_tokens": 1}, "sinks"),
    ({"cache": "rolling"}, "causal window"),
    ({"mask": [{"kind": "window", "size": 3, "causal": False}], "cache": "rolling"}, "causal window"),
    ({"global_projections": True}, "without global_tokens"),
    ({"global_tokens": 1, "global_projections": True}, "encoders"),
    ({"alignment": "top-left"}, "bottom-right"),
])  # fmt: skip
def test_impossible_options_say_why(attention, message):
    with pytest.raises(ValidationError, match=message):
        LanguageOptions(width=16, depth=1, heads=4, ffn_width=24, length=64, vocab_size=VOCABULARY.size, attention=attention)
