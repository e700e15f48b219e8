"""Mixtures: exact shares, own epochs, an order computed without walking; samples kept by a field."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.data_makers import Ranks, write_shards, write_tar, write_texts
from tests.data.data_makers import sample as good
from tests.data.talk_makers import PRE, TOKENIZER, loader_of, talk, write_talks
from vlm.config.errors import DataError
from vlm.data import DataOptions, build_loader, open_source, source_texts
from vlm.data.loader import open_split
from vlm.data.mixture import MixedOrder, Mixture, quotas
from vlm.data.tokenizer_options import BpeTokenizer, build_tokenizer


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    return {
        "pairs": {"source": write_shards(root / "pairs", 24, 2), "weight": 3},
        "scenes": {"source": "scenes:?n=10&size=16", "weight": 1},
    }


def sources_of(keys):
    return Counter(key.split("/")[0] for key in keys)


def options_of(mixture, **rest):
    return DataOptions.model_validate({"mixture": mixture, "text": {"length": 24}, **rest})


def loader(mixture, *, batch_size=16, communicator=None, quarantine=None, **rest):
    return build_loader(
        options_of(mixture, **rest),
        tokenizer=TOKENIZER,
        preprocess=PRE,
        batch_size=batch_size,
        seed=5,
        communicator=communicator,
        quarantine=quarantine,
    )


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_quotas_are_the_shares_to_four_digits(weights):
    total = sum(weights)
    found = quotas([w / total for w in weights])
    assert min(found) >= 1
    assert sum(found) >= 64
    if min(weights) / total > 1e-3:
        for weight, quota in zip(weights, found):
            assert quota / sum(found) == pytest.approx(weight / total, abs=4e-4)


def test_every_block_holds_the_exact_shares_and_each_source_its_own_epochs(mixed):
    mixture = Mixture(options_of(mixed))
    assert mixture.quotas == [48, 16]
    order = MixedOrder(mixture, 1)
    walk = [order.at(p) for p in range(64 * 6)]
    for block in range(6):
        part = walk[64 * block : 64 * (block + 1)]
        assert Counter(mixture.place(i)[0] for _, i in part) == {0: 48, 1: 16}
    for source, size in ((0, 24), (1, 10)):
        own = [(epoch, mixture.place(i)[1]) for epoch, i in walk if mixture.place(i)[0] == source]
        for epoch in range(len(own) // size):
            passed = own[epoch * size : (epoch + 1) * size]
            assert {e for e, _ in passed} == {epoch}
            assert sorted(i for _, i in passed) == list(range(size))
    assert [mixture.place(i)[0] for _, i in walk[:64]] != [mixture.place(i)[0] for _, i in walk[64:128]]


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=8))
def test_a_position_needs_no_walk(positions):
    mixture = Mixture(options_of({"a": {"source": "scenes:?n=7", "weight": 0.3}, "b": {"source": "scenes:?n=5&seed=1", "weight": 0.7}}))
    order = MixedOrder(mixture, 2)
    once = [order.at(p) for p in positions]
    assert [MixedOrder(mixture, 2).at(p) for p in positions] == once
    assert [order.at(p) for p in reversed(positions)] == once[::-1]


def test_batches_workers_and_resume(mixed):
    with loader(mixed) as one, loader(mixed, workers=2) as two:
        for _ in range(3):
            a, b = next(one), next(two)
            assert list(a.keys) == list(b.keys)
            for name in a:
                assert torch.equal(a[name].values, b[name].values)
        state = json.loads(json.dumps(one.state_dict()))
        rest = [next(one) for _ in range(5)]
        report = one.report()
    with loader(mixed) as again:
        again.load_state_dict(state)
        for batch in rest:
            assert list(next(again).keys) == list(batch.keys)
        assert {k: v for k, v in again.report().items() if k != "waited"} == {k: v for k, v in report.items() if k != "waited"}
    assert sources_of(k for b in rest for k in b.keys).keys() == {"pairs", "scenes"}
    assert report["mixture"]["pairs"]["read"] == 96
    assert report["mixture"]["pairs"]["share"] == pytest.approx(0.75)
    assert report["mixture"]["scenes"]["epoch"] == 3
    other = {**mixed, "pairs": {**mixed["pairs"], "weight": 1}}
    with loader(other) as changed, pytest.raises(DataError, match="data changed"):
        changed.load_state_dict(state)


def test_ranks_share_the_same_order(mixed):
    def work(communicator):
        with loader(mixed, communicator=communicator) as own:
            return [list(next(own).keys) for _ in range(3)]

    with loader(mixed) as alone:
        whole = [sorted(next(alone).keys) for _ in range(3)]
    parts = Ranks(2).run(work)
    assert [sorted(k for part in parts for k in part[step]) for step in range(3)] == whole


def test_each_source_has_its_own_budget_and_names_its_bad_samples(mixed, tmp_path):
    spoilt = {f"{n}": good(n) for n in range(10)}
    spoilt["3"]["png"] = b""
    mixture = {**mixed, "odd": {"source": str(write_tar(tmp_path / "odd.tar", spoilt)), "weight": 1}}
    with loader(mixture, bad_samples={"budget": 0.15}, quarantine=tmp_path) as own:
        for _ in range(6):
            next(own)
        report = own.report()
    assert report["mixture"]["odd"]["reasons"] == {"empty": report["bad"]}
    assert json.loads((tmp_path / "quarantine.jsonl").read_text()) == {"shard": "odd/odd.tar", "key": "3", "reason": "empty", "detail": ""}
    with loader(mixture, bad_samples={"budget": 0.05}) as own, pytest.raises(DataError, match="1 of 10 samples are bad"):
        for _ in range(20):
            next(own)


def test_each_source_has_its_own_columns_and_streams(mixed, tmp_path):
    talks = write_talks(tmp_path, [talk(n) for n in range(6)])
    mixture = {
        "talks": {"source": talks, "streams": {"text": {"kind": "conversation"}}},
        "scenes": {"source": "scenes:?n=10&size=16", "streams": {"text": {"kind": "conversation", "questions": {"kinds": ["count"]}}}},
        "named": {"source": "scenes:?n=10&size=16&seed=1", "columns": {"text": "name"}, "streams": {"text": {"kind": "conversation", "answer": "auto"}}},
    }
    with loader_of(None, {}, mixture=mixture, batch_size=66) as own:
        batch = next(own)
    assert sources_of(batch.keys) == {"talks": 22, "scenes": 22, "named": 22}
    names = {f"named/{open_source('scenes:?n=10&size=16&seed=1').key(i)}": open_source("scenes:?n=10&size=16&seed=1").read(i).fields["name"] for i in range(10)}
    for row, key in enumerate(batch.keys):
        said = TOKENIZER.decode(batch["text"].values[row][batch["text"].mask[row]].tolist())
        if key.startswith("talks/"):
            assert "what is thing 0?" in said
        elif key.startswith("scenes/"):
            assert said.startswith("how many objects")
        else:
            assert said == names[key]


def test_samples_per_epoch_is_the_sum(mixed):
    with loader(mixed) as own:
        assert own.samples_per_epoch == 34


def test_the_tokenizer_reads_all_sources_in_proportion(mixed, tmp_path):
    options = options_of(mixed)
    source = open_split(options, "train")
    texts = list(source_texts(source, options, limit=16))
    things = sum("thing number" in text for text in texts)
    assert (things, len(texts) - things) == (12, 4)
    tokenizer = build_tokenizer(BpeTokenizer(vocab_size=300), options, source)
    assert len(tokenizer.ids(["thing number"], add_special=False)[0]) < 12


def test_text_alone_is_mixed_in_packed_rows(tmp_path):
    mixture = {
        "one": {"source": write_texts(tmp_path / "one", 20), "weight": 1},
        "two": {"source": write_texts(tmp_path / "two", 30), "weight": 1, "columns": {"text": "text"}},
    }
    options = DataOptions.model_validate({"mixture": mixture, "packer": {"kind": "document", "length": 4096}})
    with build_loader(options, tokenizer=TOKENIZER, batch_size=64) as own:
        keys = list(next(own).keys)
        state = own.state_dict()
        rest = list(next(own).keys)
    assert sources_of(keys) == {"one": 32, "two": 32}
    with build_loader(options, tokenizer=TOKENIZER, batch_size=64) as own:
        own.load_state_dict(state)
        assert list(next(own).keys) == rest


def test_where_keeps_samples_by_field():
    options = DataOptions.model_validate({"source": "scenes:?n=60&size=8", "where": {"shape": ["c*", "star"], "count": "2"}})
    source = open_split(options, "train")
    fields = [source.read(i).fields for i in range(len(source))]
    whole = open_source("scenes:?n=60&size=8")
    expected = [i for i in range(60) if (f := whole.read(i).fields)["count"] == 2 and (f["shape"][0] == "c" or f["shape"] == "star")]
    assert [source.key(i) for i in range(len(source))] == [whole.key(i) for i in expected]
    assert all(f["count"] == 2 for f in fields)
    assert source.describe()["of"] == 60
    with build_loader(options, preprocess=PRE, batch_size=4) as own:
        assert len(next(own)) == 4
    with pytest.raises(DataError, match="none of the 60 samples has shape"):
        open_split(options.model_copy(update={"where": {"shape": "x"}}), "train")
    part = options_of({"a": {"source": "scenes:?n=60&size=8", "where": {"shape": "star"}}, "b": {"source": "scenes:?n=5&size=8&seed=2"}})
    assert {f["shape"] for i in range(len(Mixture(part).sources[0])) for f in [Mixture(part).sources[0].read(i).fields]} == {"star"}
