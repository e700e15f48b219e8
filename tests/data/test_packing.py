"""Text alone: packed rows hold every token once, in an exact, resumable order."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.data_makers import Ranks, write_texts
from vlm.config.errors import DataError
from vlm.data import DataOptions, Tokenizer, build_loader, open_source, source_texts
from vlm.data.options import DocumentPacker
from vlm.data.packing import PackedRow, append_piece
from vlm.runtime.preprocess import Preprocess
from vlm.types import Layout


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def tokenizer(uri):
    return Tokenizer.train_bpe(source_texts(open_source(uri), DataOptions(source=uri)), 300)


def loader_of(uri, tokenizer, kind="concat", *, length=16, batch_size=4, seed=1, communicator=None, **table):
    options = DataOptions.model_validate({"source": uri, "packer": {"kind": kind, "length": length}, **table})
    return build_loader(
        options, tokenizer=tokenizer, batch_size=batch_size, seed=seed, communicator=communicator
    )


def documents(uri, tokenizer):
    source = open_source(uri)
    return {source.key(i): tokenizer.ids([source.read(i).fields["text"]])[0] for i in range(len(source))}


def test_concat_rows_are_full_and_hold_the_documents_in_order(uri, tokenizer):
    expected = documents(uri, tokenizer)
    total = sum(map(len, expected.values()))
    with loader_of(uri, tokenizer) as loader:
        stream: list[int] = []
        while len(stream) < total:
            batch = next(loader)
            assert batch["text"].mask.all()
            stream += batch["text"].values.flatten().tolist()
    pieces = []
    start = 0
    for i, token in enumerate(stream[:total]):
        if token == tokenizer.eos_id:
            pieces.append(tuple(stream[start : i + 1]))
            start = i + 1
    assert sorted(pieces) == sorted(map(tuple, expected.values()))


def test_segments_and_positions_restart_with_each_document(uri, tokenizer):
    with loader_of(uri, tokenizer, length=64) as loader:
        stream = next(loader)["text"]
    layout = Layout.of_tokens(stream.values, stream.mask, stream.sample_index, segment=stream.segment)
    assert torch.equal(layout.position, stream.position)
    for ids, segment, position in zip(stream.values, stream.segment, stream.position):
        starts = [i for i in range(1, 64) if segment[i] != segment[i - 1]]
        assert all(
            ids[i] == tokenizer.bos_id and ids[i - 1] == tokenizer.eos_id and position[i] == 0 for i in starts
        )
        assert segment.tolist() == sorted(segment.tolist())


@pytest.mark.parametrize("length", [2, 3, 8, 64])
def test_document_rows_predict_every_token_but_the_first_once(uri, tokenizer, length):
    packer = DocumentPacker(length=length)
    for key, ids in documents(uri, tokenizer).items():
        rows, offset = [], 0
        while not rows or offset:
            row = PackedRow(key, 0, 0)
            offset = append_piece(row, ids, offset, packer)
            assert 0 < len(row.ids) <= length
            rows.append(row.ids)
        # The first token of a further row is context: it was predicted in the row before.
        assert all(later[0] == earlier[-1] for earlier, later in pairwise(rows))
        assert rows[0] + [token for row in rows[1:] for token in row[1:]] == ids


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["concat", "document"]),
    length=st.integers(2, 40),
    batch_size=st.integers(1, 9),
    saved=st.integers(0, 20),
    more=st.integers(1, 6),
)
def test_resume_is_exact_inside_documents(uri, tokenizer, kind, length, batch_size, saved, more):
    with loader_of(uri, tokenizer, kind, length=length, batch_size=batch_size) as loader:
        for _ in range(saved):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
        rest = [next(loader) for _ in range(more)]
    with loader_of(uri, tokenizer, kind, length=length, batch_size=batch_size) as loader:
        loader.load_state_dict(state)
        for batch in rest:
            again = next(loader)
            assert list(batch.keys) == list(again.keys)
            assert torch.equal(batch.draws, again.draws)
            for field in ("values", "mask", "segment", "position"):
                assert torch.equal(getattr(batch["text"], field), getattr(again["text"], field))


def test_rows_do_not_depend_on_the_number_of_ranks(uri, tokenizer):
    def work(communicator):
        with loader_of(uri, tokenizer, communicator=communicator) as loader:
            return [next(loader) for _ in range(5)]

    with loader_of(uri, tokenizer) as loader:
        alone = [next(loader) for _ in range(5)]
    parts = Ranks(2).run(work)
    for step, whole in enumerate(alone):
        assert torch.equal(whole["text"].values[0::2], parts[0][step]["text"].values)
        assert torch.equal(whole["text"].values[1::2], parts[1][step]["text"].values)


def test_bad_documents_are_as_if_they_were_not_there(uri, tokenizer, tmp_path):
    lines = Path(uri).read_text().splitlines()
    spoilt = [
        *lines[:10],
        "{not json",
        *lines[10:40],
        json.dumps({"text": "  "}),
        json.dumps({"text": "a\0b"}),
        *lines[40:],
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(spoilt))
    with (
        loader_of(uri, tokenizer) as one,
        loader_of(str(tmp_path / "texts.jsonl"), tokenizer, bad_samples={"budget": 0.1}) as two,
    ):
        for _ in range(40):
            assert torch.equal(next(one)["text"].values, next(two)["text"].values)
        assert two.report()["reasons"].keys() == {"bad_json", "empty_text", "bad_text"}
    strict = {"policy": "stop"}
    with (
        loader_of(str(tmp_path / "texts.jsonl"), tokenizer, bad_samples=strict, batch_size=200) as loader,
        pytest.raises(DataError, match=r"texts.jsonl:\d+: "),
    ):
        next(loader)


def test_a_packer_with_pictures_is_refused(uri, tokenizer):
    options = DataOptions.model_validate({"source": "scenes:", "packer": {"kind": "concat"}})
    with pytest.raises(DataError, match="packer"):
        build_loader(options, tokenizer=tokenizer, preprocess=Preprocess(16), batch_size=2)


def test_captions_of_pictures_can_be_packed(tokenizer):
    with loader_of("scenes:?n=50", tokenizer) as loader:
        assert next(loader)["text"].values.shape == (4, 16)
