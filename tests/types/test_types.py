"""Invariants of the central types."""

import pytest
import torch

from vlm.types import Batch, Layout, Pictures, Request, TokenIds, VocabularyLayout
from vlm.types.layout import IGNORE
from vlm.types.outputs import split_key, wanted_of
from vlm.types.state import join_tree, split_tree
from vlm.types.vocabulary import Span


def layout(lengths=(5, 3), width=6):
    ids = torch.arange(len(lengths) * width).reshape(len(lengths), width)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return Layout.of_tokens(ids, mask, torch.arange(len(lengths)))


def test_positions_restart_with_every_packed_document():
    segment = torch.tensor([[0, 0, 1, 1, 1, -1]])
    ids = torch.arange(6)[None]
    out = Layout.of_tokens(ids, segment >= 0, torch.zeros(1, dtype=torch.int64), segment=segment)
    assert out.position[0, :5].tolist() == [0, 1, 0, 1, 2]
    assert out.label[0, 5] == IGNORE


def test_gather_pads_rows_that_keep_different_numbers_of_positions():
    out = layout().gather(torch.tensor([[0, 2, 4], [1, -1, -1]]), renumber=True)
    assert out.mask.tolist() == [[True, True, True], [True, False, False]]
    assert out.position.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert out.kept[0].tolist() == [0, 2, 4]
    assert out.segment[1].tolist() == [0, -1, -1]
    assert out.label[1].tolist() == [7, IGNORE, IGNORE]


def test_gather_of_everything_changes_nothing():
    before = layout()
    after = before.gather(torch.arange(6).expand(2, -1), renumber=True)
    assert torch.equal(before.label, after.label)
    assert torch.equal(before.position[before.mask], after.position[after.mask])


def batch(n=5):
    index = torch.arange(n)
    captions = torch.arange(n).repeat_interleave(2)
    ids = torch.arange(2 * n * 3).reshape(2 * n, 3)
    streams = {
        "image": Pictures(torch.rand(n, 3, 2, 2), torch.ones(n, dtype=torch.bool), index),
        "text": TokenIds(ids, torch.ones_like(ids, dtype=torch.bool), captions, slot=torch.arange(2).repeat(n)),
    }
    shared = {"classes": TokenIds(ids[:3], torch.ones(3, 3, dtype=torch.bool), torch.arange(3))}
    return Batch(streams, [str(i) for i in range(n)], index, index * 0, shared=shared)


def test_splitting_keeps_rows_with_their_samples_and_shared_streams_whole():
    parts = batch().split(2)
    assert [len(part) for part in parts] == [3, 2]
    assert parts[1]["text"].sample_index.tolist() == [0, 0, 1, 1]
    assert parts[1]["text"].slot.tolist() == [0, 1, 0, 1]
    assert torch.equal(torch.cat([p["text"].values for p in parts]), batch()["text"].values)
    assert all(len(part["classes"]) == 3 for part in parts)


def test_a_stream_with_a_wrong_mask_is_refused():
    with pytest.raises(ValueError, match="expected torch.bool"):
        Pictures(torch.rand(2, 3, 4, 4), torch.ones(2), torch.arange(2))
    with pytest.raises(ValueError, match="sample_index"):
        Pictures(torch.rand(2, 3, 4, 4), torch.ones(2, dtype=torch.bool), torch.arange(3))


def test_an_unknown_stream_names_those_there_are():
    with pytest.raises(KeyError, match="classes, image, text"):
        batch()["caption"]


def test_requests_parse_and_print_alike():
    for text in ("model/image.embedding", "reference/image.noisy.vocabulary", "teacher/text.hidden:4"):
        assert str(Request.parse(text)) == text
    for text in ("image.embedding", "model/image", "model/image.hidden", "model/image.embedding:3", "model/image.pixels"):
        with pytest.raises(ValueError, match="request|layer"):
            Request.parse(text)


def test_povid_a_request_names_the_picture_stream_with_which_a_text_is_read():
    request = Request.parse("reference/answer.preferred@image.noisy.vocabulary")
    assert (request.companion, request.stream, request.context) == ("reference", "answer.preferred", "image.noisy")
    assert (request.field, request.layer) == ("vocabulary", None)
    assert (request.key, request.view) == ("answer.preferred@image.noisy", "reference/answer.preferred@image.noisy")
    assert str(request) == "reference/answer.preferred@image.noisy.vocabulary"
    deep = Request.parse("model/text.masked@image.hidden:12")
    assert (deep.context, deep.layer, deep.wanted, str(deep)) == ("image", 12, "hidden:12", "model/text.masked@image.hidden:12")
    plain = Request.parse("model/answer.preferred.vocabulary")
    assert plain.context is None
    assert sorted([request, deep, plain]) == sorted([plain, request, deep]) == [plain, deep, request]
    assert wanted_of([request, plain, deep, Request.parse("model/text.masked@image.vocabulary")], "model") == {
        "answer.preferred": {"vocabulary"},
        "text.masked@image": {"hidden:12", "vocabulary"},
    }
    assert split_key("a.b@c.d") == ("a.b", "c.d")
    assert split_key("a.b") == ("a.b", None)


@pytest.mark.parametrize(
    "text",
    ["model/@image.vocabulary", "model/text@.vocabulary", "model/a@b@c.vocabulary", "model/.vocabulary", "model/t.hidden:x"],
)
def test_a_context_or_layer_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="no request|no number"):
        Request.parse(text)


def test_vocabulary_spans_must_tile_the_ids():
    vocabulary = VocabularyLayout.of_text(10, {"eos": 3}).extend("image", 4)
    assert vocabulary.size == 14
    assert vocabulary.owner(12) == "image"
    assert vocabulary.allowed("image", special=("eos",)).nonzero().flatten().tolist() == [3, 10, 11, 12, 13]
    codes = torch.tensor([0, 3])
    assert torch.equal(vocabulary.to_local(vocabulary.from_local(codes, "image"), "image"), codes)
    with pytest.raises(ValueError, match="expected to begin at 10"):
        VocabularyLayout({"text": Span(0, 10), "image": Span(11, 12)})


def test_a_state_tree_survives_the_round_trip_and_refuses_what_it_cannot_hold():
    tree = {"a": {"b": torch.arange(3), "c": [1, "x", None]}, "d": 1.5}
    tensors, plain = split_tree(tree)
    again = join_tree(tensors, plain)
    assert torch.equal(again["a"]["b"], tree["a"]["b"])
    assert again["a"]["c"] == [1, "x", None]
    with pytest.raises(TypeError, match="'a/b' holds a set"):
        split_tree({"a": {"b": {1}}})


def test_renumbering_counts_in_each_document_whatever_the_padding():
    segment = torch.tensor([[-1, 0, 0, 1, 1, 1]])
    ids = torch.arange(6)[None]
    before = Layout.of_tokens(ids, segment >= 0, torch.zeros(1, dtype=torch.int64), segment=segment)
    after = before.gather(torch.tensor([[0, 2, 3, 5]]), renumber=True)
    assert after.position.tolist() == [[0, 0, 0, 1]]
    assert after.mask.tolist() == [[False, True, True, True]]


def test_a_state_tree_refuses_keys_that_would_collide():
    with pytest.raises(TypeError, match="'a/b'"):
        split_tree({"a/b": torch.zeros(1)})
    with pytest.raises(TypeError, match="0"):
        split_tree({0: torch.zeros(1)})
    shared = torch.zeros(2)
    tensors, plain = split_tree({"a": shared, "b": shared})
    assert len(tensors) == 1
    assert join_tree(tensors, plain)["b"] is tensors["a"]
