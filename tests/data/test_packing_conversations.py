"""Packed conversations: whole samples in each row, pictures at their width, exact resume at any moment."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.data_makers import Ranks
from tests.data.talk_makers import IMAGE_ID, PRE, TOKENIZER, loader_of, talk, write_talks
from vlm.config.errors import DataError
from vlm.types import Layout

STREAMS = {"text": {"kind": "conversation", "text_only": True}}
COST = 5
LENGTH = 120


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return write_talks(tmp_path_factory.mktemp("talks"), [talk(n, pictures=n * 5 % 3, turns=1 + n % 2) for n in range(23)])


def packed(uri, kind="document", *, batch_size=2, **rest):
    packer = {"kind": kind, "length": LENGTH}
    return loader_of(uri, STREAMS, packer=packer, picture_positions=COST, batch_size=batch_size, **rest)


def equal(one, two):
    assert list(one.keys) == list(two.keys)
    assert torch.equal(one.draws, two.draws)
    for name in one:
        for field in ("values", "mask", "sample_index", "slot", "role", "supervised", "segment", "position"):
            left, right = getattr(one[name], field, None), getattr(two[name], field, None)
            assert (left is None and right is None) or torch.equal(left, right), (name, field)


@pytest.mark.parametrize("kind", ["document", "concat"])
def test_rows_hold_whole_samples_with_their_pictures_and_are_as_full_as_the_order_allows(uri, kind):
    with loader_of(uri, STREAMS, batch_size=23, text={"length": LENGTH}, picture_positions=COST) as loader:
        batch = next(loader)
    alone = []
    for i in range(23):
        ids = batch["text"].values[i][batch["text"].mask[i]].tolist()
        own = batch["image"].values[batch["image"].sample_index == i]
        alone.append((ids, own))
    at = 0
    with packed(uri, kind, batch_size=3) as loader:
        while at < 23:
            batch = next(loader)
            text, image = batch["text"], batch["image"]
            for row in range(len(batch)):
                pictures = image.values[image.sample_index == row]
                assert image.slot[image.sample_index == row].tolist() == list(range(len(pictures)))
                positions = 0
                segments = int(text.segment[row].max()) + 1
                for segment in range(segments):
                    chosen = text.segment[row] == segment
                    if at == 23:
                        break
                    ids, own = alone[at]
                    assert text.values[row][chosen].tolist() == ids
                    assert text.position[row][chosen].tolist() == list(range(len(ids)))
                    assert torch.equal(pictures[: len(own)], own)
                    pictures = pictures[len(own) :]
                    positions += len(ids) + len(own) * (COST - 1)
                    at += 1
                else:
                    assert not len(pictures)
                    if at < 23:  # the next one would not have fitted
                        assert positions + len(alone[at][0]) + len(alone[at][1]) * (COST - 1) > LENGTH
                assert positions <= LENGTH
                assert (text.segment[row] == -1).equal(~text.mask[row])
                assert batch.keys[row].endswith(f" +{segments - 1}") or segments == 1
                assert torch.equal(text.supervised[row] & ~text.mask[row], torch.zeros_like(text.mask[row]))
    layout = Layout.of_tokens(text.values, text.mask, text.sample_index, segment=text.segment)
    assert torch.equal(layout.position[text.mask], text.position[text.mask])


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(saved=st.integers(0, 8), batch_size=st.integers(1, 5), workers=st.sampled_from([0, 0, 0, 2]))
def test_resume_in_the_middle_of_a_packed_epoch_is_exact(uri, saved, batch_size, workers):
    with packed(uri, batch_size=batch_size) as loader:
        for _ in range(saved):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
        rest = [next(loader) for _ in range(3)]
        end, report = loader.state_dict(), loader.report()
    with packed(uri, batch_size=batch_size, workers=workers) as loader:
        loader.load_state_dict(state)
        for batch in rest:
            equal(batch, next(loader))
        assert loader.state_dict() == end
        assert loader.report()["read"] == report["read"]
        loader.load_state_dict(state)
        equal(rest[0], next(loader))


@pytest.mark.parametrize("size", [2, 3])
def test_rows_are_the_same_at_any_world_size(uri, size):
    def work(communicator):
        with packed(uri, batch_size=4, communicator=communicator) as loader:
            return [next(loader) for _ in range(4)], loader.state_dict()

    with packed(uri, batch_size=4) as loader:
        alone = [next(loader) for _ in range(4)]
        state = loader.state_dict()
    parts = Ranks(size).run(work)
    for step, whole in enumerate(alone):
        keys = [(key, int(draw)) for part, _ in parts for key, draw in zip(part[step].keys, part[step].draws)]
        assert sorted(keys) == sorted(zip(whole.keys, whole.draws.tolist()))
    assert all(own == state for _, own in parts)


def test_a_sample_that_cannot_fit_is_refused_by_its_key(tmp_path):
    entries = [talk(n) for n in range(4)]
    entries[2]["conversations"][0]["value"] = "<image>" + "thing " * 200
    uri = write_talks(tmp_path, entries)
    with packed(uri, batch_size=4, quarantine=tmp_path) as loader:
        next(loader)
        assert loader.report()["reasons"]["too_long"] >= 1
    line = json.loads((tmp_path / "quarantine.jsonl").read_text())
    assert (line["shard"], line["key"], line["reason"]) == ("talks.jsonl", "3", "too_long")


def test_a_picture_counts_at_its_width(tmp_path):
    uri = write_talks(tmp_path, [talk(n, pictures=2) for n in range(8)])

    def samples(cost):
        packer = {"kind": "document", "length": 200}
        with loader_of(uri, STREAMS, packer=packer, picture_positions=cost, batch_size=1) as loader:
            return int(next(loader)["text"].segment.max()) + 1

    assert samples(1) > samples(20) >= samples(60) == 1


def test_what_cannot_be_packed_is_refused(uri):
    two = {"a": {"kind": "conversation"}, "b": {"kind": "conversation"}}
    packer = {"kind": "document", "length": 64}
    with pytest.raises(DataError, match="text alone, found a, b"):
        loader_of(uri, two, packer=packer)
    with pytest.raises(DataError, match="no label"):
        loader_of(uri, STREAMS, packer=packer, label="id")
    with pytest.raises(DataError, match="text-only models"):
        loader_of(uri, {}, packer=packer)
    assert (PRE.size, IMAGE_ID) == (16, TOKENIZER.token_to_id("<image>"))
