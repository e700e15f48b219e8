"""Attention to chosen keys in the decoder: the loop of `test_decoder.py` where queries do not see every key."""

import pytest
import torch
from pydantic import ValidationError

from tests.models.decoder_questions import (
    an_empty_row_is_harmless,
    by_row,
    packed_equals_rows_and_is_not_continued,
    padded_equals_alone,
    states,
)
from tests.models.model_makers import answering, batch_of, language, pictures_of, random_rows, rows_of
from vlm.attention import seen_keys
from vlm.config.errors import RequestError
from vlm.models.decoder import run_decoder
from vlm.models.directory import load_model, published_layout, save_model
from vlm.models.far import MemoryCache
from vlm.models.language import LanguageOptions, layout_of

SIZES = [5, 1, 31, 17]
FEW = dict(kind="hierarchical", k=4, block_q=4, block_k=1, window=3, sinks=1)
EVERY = dict(kind="hierarchical", k=100, block_q=4, block_k=2, window=3, sinks=1)
SHARED = FEW | dict(refresh=3)
MEMORY = dict(kind="block-memory", n_init=2, n_local=6, block=2, topk=1, representatives=1, chunk=3)
ABSOLUTE = MEMORY | dict(topk=100, far="absolute")
WINDOW = dict(kind="windowed", window=4, sinks=2)
KINDS = pytest.mark.parametrize("attention", [FEW, SHARED, EVERY, MEMORY, ABSOLUTE, WINDOW],
                                ids=["few", "shared", "every", "memory", "absolute", "window"])  # fmt: skip
EXACT = pytest.mark.parametrize("attention", [EVERY, EVERY | dict(refresh=3), ABSOLUTE, dict(kind="exact"), dict(kind="windowed", window=64)],
                                ids=["core_hip", "core_hip shared", "core_infllm", "plain", "wide window"])  # fmt: skip


@EXACT
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_core_hip_and_core_infllm_that_see_everything_are_the_model_itself(attention, side):
    """k of all keys; all blocks at their true distances: in the prefill and behind a cache, whatever the pieces."""
    plain, model, lists = language(), language(attention=attention), random_rows(SIZES)
    stream = rows_of(lists, side=side, extra=2)
    one, other = (states(m, stream, keep_cache=True, collect=(0, 2)) for m in (plain, model))
    assert other.hidden.keys() == {0, 2}
    for a, b in zip(by_row(stream, one.x), by_row(stream, other.x)):
        assert torch.allclose(a, b, atol=1e-5)
    caches = [one.cache, other.cache]
    for piece in (random_rows([2, 4, 1, 3], seed=6), random_rows([1] * 4, seed=7)):
        more = rows_of(piece, side=side)
        results = [states(m, more, cache=cache) for m, cache in zip((plain, model), caches)]
        caches = [result.cache for result in results]
        for a, b in zip(by_row(more, results[0].x), by_row(more, results[1].x)):
            assert torch.allclose(a, b, atol=2e-5)
        assert torch.equal(results[0].layout.position, results[1].layout.position)
        assert torch.equal(caches[0].next_position, caches[1].next_position)


@KINDS
@torch.no_grad()
def test_fewer_keys_are_another_model_only_where_rows_are_long(attention):
    plain, model, lists = language(), language(attention=attention), random_rows(SIZES)
    rows = rows_of(lists)
    apart = [not torch.allclose(a, b, atol=1e-4) for a, b in zip(by_row(rows, states(plain, rows).x), by_row(rows, states(model, rows).x))]
    assert apart == [False, False, *([attention not in (EVERY, ABSOLUTE)] * 2)]


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_batch_mates_and_order_change_nothing(attention, side):
    model = language(attention=attention)
    stream, result = padded_equals_alone(model, random_rows(SIZES), side)
    spoilt = model.tokens(stream.values).masked_fill(~stream.mask[..., None], float("nan"))
    again = run_decoder(model.trunk, spoilt, layout_of(stream))
    for one, other in zip(by_row(stream, result.x), by_row(stream, again.x), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@KINDS
@torch.no_grad()
def test_rows_of_a_cache_are_kept_repeated_and_reordered_and_stay_as_they_are(attention):
    model, lists = language(attention=attention), random_rows(SIZES)
    cache = states(model, rows_of(lists), keep_cache=True).cache
    assert isinstance(cache, MemoryCache) == (attention["kind"] == "block-memory")
    before = [t.clone() for t in cache.tensors()]
    for _ in range(2):  # the same cache may be continued twice
        grown = states(model, rows_of([[9], [10], [11]]), cache=cache.rows(torch.tensor([3, 0, 2]))).x
        for row, (source, token) in enumerate(zip((3, 0, 2), (9, 10, 11))):
            alone = states(model, rows_of([lists[source]]), keep_cache=True).cache
            assert torch.allclose(grown[row, 0], states(model, rows_of([[token]]), cache=alone).x[0, 0], atol=1e-5)
        states(model, rows_of([[9]] * 4), cache=cache)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors()))
    assert cache.bytes == sum(t.numel() * 4 for t in before)


@KINDS
@torch.no_grad()
def test_packed_documents_equal_rows_and_cannot_be_continued(attention):
    lists = random_rows([14, 6, 1, 15])
    packed_equals_rows_and_is_not_continued(language(attention=attention), lists, position=[range(len(values)) for values in lists])


@KINDS
@torch.no_grad()
def test_an_empty_row_is_harmless(attention):
    an_empty_row_is_harmless(language(attention=attention))


@KINDS
def test_a_training_step_sees_everything_unless_asked_otherwise(attention):
    plain, model, rows = language().train(), language(attention=attention).train(), rows_of(random_rows([31, 20]))
    one, other = states(plain, rows).x, states(model, rows).x
    assert torch.equal(one, other)
    other.square().sum().backward()
    if attention["kind"] == "block-memory":
        with pytest.raises(ValidationError, match="when"):
            language(attention=attention | {"when": "always"})
        return
    model = language(attention=attention | {"when": "always"}).train()
    model.zero_grad()
    other = states(model, rows).x
    assert torch.allclose(other, states(language(attention=attention), rows).x, atol=1e-5)
    other[rows.mask].square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for name, p in model.trunk.named_parameters())


@KINDS
@torch.no_grad()
def test_prefill_and_advance_write_and_a_directory_keeps_the_attention(attention, tmp_path):
    model, lists = language(attention=attention), random_rows(SIZES)
    logits, cache = model.prefill(rows_of(lists, side="left"), {})
    for row, values in enumerate(lists):
        alone, own = model.prefill(rows_of([values]), {})
        assert torch.allclose(logits[row], alone[0], atol=2e-5)
        assert torch.allclose(model.advance(torch.tensor([7] * 4), cache)[0][row], model.advance(torch.tensor([7]), own)[0][0], atol=2e-5)
    assert published_layout(model) is None  # which would see every key
    assert published_layout(language(attention={"kind": "exact"})) is not None
    save_model(model, tmp_path)
    rows = rows_of(lists)
    assert torch.equal(states(load_model(tmp_path).eval(), rows).x, states(model, rows).x)


@torch.no_grad()
def test_another_attention_is_laid_over_a_directory_that_was_trained_without(tmp_path):
    plain, lists = language(), random_rows(SIZES)
    save_model(plain, tmp_path)
    rows = rows_of(lists)
    for attention in (FEW, MEMORY, WINDOW):
        changed = load_model(tmp_path, changes={"attention": attention, "length": 4096}).eval()
        assert changed.options.length == 4096
        assert torch.equal(states(changed, rows).x, states(language(attention=attention), rows).x)
    save_model(language(attention=FEW), tmp_path / "few")
    back = load_model(tmp_path / "few", changes={"attention": {"kind": "exact"}}).eval()
    assert torch.allclose(states(back, rows).x[rows.mask], states(plain, rows).x[rows.mask], atol=1e-5)
    for changes, message in (({"attention": {"kind": "sparse"}}, "attention"), ({"depht": 3}, "depht")):
        with pytest.raises(RequestError, match=message):
            load_model(tmp_path, changes=changes)


def test_core_infllm_the_memory_takes_the_rotary_base_of_the_model():
    rows = rows_of(random_rows([31]))
    with torch.no_grad():
        models = [language(attention=ABSOLUTE, rope_theta=100.0), language(rope_theta=100.0)]
        assert torch.allclose(*(states(model, rows).x for model in models), atol=1e-5)


@torch.no_grad()
def test_pictures_among_the_tokens_are_read_and_pictures_beside_them_refused():
    table = dict(width=16, depth=4, heads=4, kv_heads=2, ffn_width=24, length=64)
    rows, pictures = rows_of([[2, 3, 9, 10], [2, 3, 11]]), pictures_of([1, 1])
    batch = batch_of(2, text=rows, image=pictures)
    for attention in (EVERY, ABSOLUTE):
        models = [answering(language=table | more) for more in ({}, {"attention": attention})]
        one, other = (m.encode(batch, {"text": frozenset({"vocabulary"})})["text"] for m in models)
        mask = one.layout.mask
        assert torch.allclose(one.vocabulary.logits()[mask], other.vocabulary.logits()[mask], atol=1e-5)
        with pytest.raises(ValidationError, match="language.attention"):
            answering(fusion={"kind": "cross-attention", "every": 2}, language=table | {"attention": attention})
        with pytest.raises(ValidationError, match="language.attention"):
            answering(tokens={"keep": {"layers": [1], "ratios": [0.5]}}, language=table | {"attention": attention})
        with pytest.raises(RequestError, match="cannot be exported"):
            models[1].export_parts()
        with pytest.raises(RequestError, match="cannot be exported"):
            models[1].language.export_parts()
    assert set(language(attention={"kind": "exact"}).export_parts()) == {"decoder", "embed", "decoder_with_past"}


@torch.no_grad()
def test_plain_attention_said_aloud_drops_positions_as_before():
    table = dict(width=16, depth=4, heads=4, kv_heads=2, ffn_width=24, length=64)
    batch = batch_of(2, text=rows_of([[2, 3, 9, 10], [2, 3, 11]]), image=pictures_of([1, 1]))
    tokens = {"keep": {"layers": [1], "ratios": [0.5]}}
    outs = [answering(tokens=tokens, language=table | {"attention": a}).encode(batch, {"text": frozenset({"vocabulary"})})["text"]
            for a in (None, {"kind": "exact"})]  # fmt: skip
    assert torch.equal(*(out.vocabulary.logits() for out in outs))


def test_a_mixer_has_no_attention_to_choose():
    with pytest.raises(ValidationError, match="stands in place of attention"):
        LanguageOptions(width=16, depth=2, heads=4, ffn_width=8, length=8, mixer={"kind": "ssm"}, attention=FEW)


def test_keys_that_a_query_sees_are_no_more_than_said():
    """Counted from the lists themselves."""
    from vlm.attention import HierarchicalOptions, WindowedOptions
    from vlm.ops import select_hierarchical

    options = HierarchicalOptions(k=12, block_q=8, block_k=4, window=5, sinks=3)
    q = torch.randn(1, 1, 200, 8)
    blocks, _ = select_hierarchical(q, q, budget=12, block_q=8, block_k=4, window=5, sinks=3)
    assert int(blocks.count.max()) * 4 <= seen_keys(options, 200) < 200
    assert seen_keys(options, 7) == 7
    assert seen_keys(options.model_copy(update={"refresh": 5}), 200) == seen_keys(options, 200) + 4
    assert seen_keys(WindowedOptions(window=4, sinks=2), 100) == 6
    assert seen_keys(None, 100) == seen_keys(WindowedOptions(), 100) == 100
