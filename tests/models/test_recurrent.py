"""Language models whose mixer keeps a state: the decoder loop of `test_decoder.py`, asked the same questions."""

from itertools import chain

import numpy as np
import pytest
import torch
from pydantic import ValidationError

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
from vlm.models.decoder import run_decoder
from vlm.models.directory import load_model, published_layout, save_model
from vlm.models.language import LanguageOptions, layout_of
from vlm.models.recurrent import RecurrentCache, RecurrentTrunk
from vlm.types import Batch

SIZES = [5, 1, 11, 7]
LINEAR = dict(mixer={"kind": "linear-decay"}, norm="srms", activation="identity", embed_scale=True)
SSM = dict(mixer={"kind": "ssm", "states": 4})
MIXERS = pytest.mark.parametrize("table", [
    LINEAR, LINEAR | dict(mixer={"kind": "linear-decay", "slopes": "exp8", "learned": True, "gate": False, "lrpe": (0, 2)}), SSM,
], ids=["linear-decay", "linear-decay learned", "ssm"])  # fmt: skip


@MIXERS
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_batch_mates_and_order_change_nothing(table, side):
    model, lists = language(**table), random_rows(SIZES)
    stream, result = padded_equals_alone(model, lists, side, collect=(0, 2, 4))
    assert result.hidden.keys() == {0, 2, 4}
    order_changes_nothing(model, lists, side, by_row(stream, result.x))


@MIXERS
@torch.no_grad()
def test_padding_is_never_read(table):
    model, lists = language(**table), random_rows(SIZES)
    for side in ("left", "right"):
        stream = rows_of(lists, side=side)
        x = model.tokens(stream.values)
        spoilt = x.masked_fill(~stream.mask[..., None], 1e6)
        one, other = (run_decoder(model.trunk, part, layout_of(stream), keep_cache=True) for part in (x, spoilt))
        assert torch.equal(one.x[stream.mask], other.x[stream.mask])
        assert all(torch.equal(a, b) for a, b in zip(chain(*one.cache.states), chain(*other.cache.states)))


@MIXERS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("step", [1, 3])
@torch.no_grad()
def test_cached_equals_uncached_decoding(table, side, step):
    first, last = cached_equals_uncached(language(**table), random_rows(SIZES), side, step, atol=2e-5)
    assert first.bytes == last.bytes


@MIXERS
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_ragged_pieces_are_appended_with_their_own_padding(table, side):
    pieces = [random_rows([2, 4, 1, 3], seed=6), random_rows([3, 1, 2, 2], seed=7)]
    ragged_pieces_equal_whole_rows(language(**table), random_rows(SIZES), pieces, side, atol=2e-5)


@MIXERS
@torch.no_grad()
def test_rows_of_a_cache_are_kept_repeated_and_reordered(table):
    model, lists = language(**table), random_rows(SIZES)
    cache = states(model, rows_of(lists), keep_cache=True).cache
    assert isinstance(cache, RecurrentCache)
    rows_of_a_cache_go_on(model, cache, lists)


@MIXERS
@torch.no_grad()
def test_an_empty_row_is_harmless(table):
    model = language(**table)
    after = an_empty_row_is_harmless(model)
    assert torch.allclose(after[1, 0], states(model, rows_of([[5, 6, 7, 8]])).x[0, -1], atol=1e-5)


@MIXERS
def test_packed_documents_equal_rows_and_cannot_be_continued(table):
    # LRPE sees the places of a row: those of a document begin at 0 in both forms.
    packed_equals_rows_and_is_not_continued(language(**table), random_rows([4, 6, 1, 5]))


@MIXERS
def test_later_tokens_have_no_gradient_on_earlier_outputs(table):
    model = language(**table)
    stream = rows_of(random_rows([12]))
    x = model.tokens(stream.values).detach().requires_grad_()
    run_decoder(model.trunk, x, layout_of(stream)).x[0, 5].sum().backward()
    assert (x.grad[0, 6:] == 0).all()
    assert (x.grad[0, :6] != 0).any(1).all()


@MIXERS
def test_recompute_and_autocast_train(table):
    model = language(**table).train()
    lists, gradients = random_rows(SIZES), []
    for recompute in (False, True):
        model.set_recompute(recompute)
        model.zero_grad()
        for side in ("left", "right"):
            stream = rows_of(lists, side=side)
            states(model, stream).x[stream.mask].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {n for n, _ in model.named_parameters() if not n.startswith("post_norm")}
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-5) for name in gradients[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream = rows_of(lists, side="left")
        narrow = states(model, stream).x
        with torch.no_grad():
            cache = states(model, stream, keep_cache=True).cache
            assert cache.states[0][-1].dtype == torch.float32
            states(model, rows_of([[4]] * 4), cache=cache)
    narrow.float()[stream.mask].sum().backward()
    wide = states(model, stream).x[stream.mask]
    assert (narrow[stream.mask] - wide).abs().mean() < 0.1 * wide.abs().mean()


@MIXERS
@torch.no_grad()
def test_prefill_and_advance_give_the_logits_of_encode_and_a_directory_keeps_them(table, tmp_path):
    model, lists = language(**table), random_rows(SIZES)
    for side in ("left", "right"):
        logits, cache = model.prefill(rows_of(lists, side=side), {})
        steps = [logits]
        for token in (7, 8):
            logits, cache = model.advance(torch.full((4,), token), cache)
            steps.append(logits)
        for row, values in enumerate(lists):
            batch = Batch({"text": rows_of([[*values, 7, 8]])}, ["a"], *torch.zeros(2, 1, dtype=torch.int64))
            given = model.encode(batch, {"text": frozenset({"vocabulary"})})["text"].vocabulary.logits()[0, -3:]
            assert torch.allclose(torch.stack([part[row] for part in steps]), given, atol=2e-5)
    assert published_layout(model) is None
    save_model(model, tmp_path)
    stream = rows_of(lists)
    assert torch.equal(states(load_model(tmp_path).eval(), stream).x, states(model, stream).x)


@pytest.mark.filterwarnings("ignore")
def test_only_a_mixer_that_fits_in_a_graph_is_exported():
    onnxruntime = pytest.importorskip("onnxruntime")
    model = language(**LINEAR)
    parts = model.export_parts()
    assert set(parts) == {"decoder"}
    part = parts["decoder"]
    length, batch = torch.export.Dim("length", min=2, max=64), torch.export.Dim("batch", min=1, max=8)
    program = torch.onnx.export(part.module.eval(), (part.inputs["input_ids"],), dynamo=True, verbose=False,
                                dynamic_shapes=({0: batch, 1: length},))
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = torch.tensor(random_rows([9, 9, 9]))
    with torch.no_grad():
        expected = model.run(ids)[0] @ model.head_weight.T
    got = session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=1e-4)
    with pytest.raises(RequestError, match="cannot be exported"):
        language(**SSM).export_parts()


@torch.no_grad()
def test_pictures_among_the_tokens_are_read_and_pictures_beside_them_refused():
    table = dict(width=16, depth=4, heads=4, kv_heads=2, ffn_width=24, length=64)
    model = answering(language=table | SSM)
    rows = rows_of([[2, 3, 9, 10], [2, 3, 11]])
    batch = batch_of(2, text=rows, image=pictures_of([1, 1]))
    given = model.encode(batch, {"text": frozenset({"vocabulary"})})["text"]
    logits, _ = model.prefill(rows, {"image": pictures_of([1, 1])})
    last = given.layout.mask.sum(1) - 1
    assert torch.allclose(logits, given.vocabulary.logits()[torch.arange(2), last], atol=1e-5)
    beside = answering(fusion={"kind": "cross-attention", "every": 2}, language=table | SSM)
    with pytest.raises(ValueError, match="pictures among the tokens"):
        beside.encode(batch, {"text": frozenset({"vocabulary"})})


def test_a_trunk_that_cannot_be_is_refused():
    table = dict(width=16, depth=2, heads=4, ffn_width=8, length=8)
    with pytest.raises(ValidationError, match="not a multiple"):
        LanguageOptions(**table, kv_heads=3, mixer={"kind": "linear-decay"})
    model = LanguageOptions(**table, mixer={"kind": "linear-decay"}).build(VOCABULARY)
    assert isinstance(model.trunk, RecurrentTrunk)
    with pytest.raises(ValueError, match="left to right"):
        model.trunk(torch.zeros(1, 2, 16))
