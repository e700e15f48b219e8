"""Streams of numbers and of token weights: what a preset says, what the batch holds, what is refused and named."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from tests.data.data_makers import sample, write_tar
from tests.data.talk_makers import PRE, TOKENIZER, loader_of, write_talks
from vlm.cli.main import main
from vlm.config.errors import DataError
from vlm.data import DataOptions, build_loader
from vlm.data.samples import BadSample
from vlm.data.streams.number_options import NumberStream, TokenWeights
from vlm.data.streams.numbers import Numbers, Weights, number_of

LINES = [
    {"quality": 0.25, "caption": ["a red thing", "a green thing", "a circle"], "fit": [0.1, 0.2, 0.3]},
    {"quality": "0.5", "caption": ["a thing"], "fit": [1]},
    {"caption": ["a red circle", "yes"], "fit": [0, 0.5]},
    {"quality": 1, "caption": "no picture", "fit": 0.75},
]


def write_lines(folder, lines=LINES, name="pairs.jsonl"):
    entries = [{"image": f"{n}.png", "id": n, **line} for n, line in enumerate(lines)]
    return write_talks(folder, entries, name)


def batch_of(source, streams, **table):
    with loader_of(source, streams, batch_size=table.pop("batch_size", 4), **table) as loader:
        return next(loader)


def by_row(batch, name):
    """Row of the file (from 0) -> the numbers of its rows, None where masked."""
    stream, out = batch[name], {}
    for value, mask, i in zip(stream.values.tolist(), stream.mask.tolist(), stream.sample_index.tolist()):
        out.setdefault(int(batch.keys[i].rsplit(":", 1)[1]) - 1, []).append(round(value, 6) if mask else None)
    return out


def test_one_number_a_sample_scaled_and_filled_in(tmp_path):
    noise = {"kind": "numbers", "column": "quality", "missing": 0.75, "scale": -1, "offset": 1}
    batch = batch_of(write_lines(tmp_path), {"noise": noise})
    assert by_row(batch, "noise") == {0: [0.75], 1: [0.5], 2: [0.25], 3: [0.0]}
    assert batch["noise"].values.dtype == torch.float32
    parts = batch.split(2)
    assert torch.equal(torch.cat([part["noise"].values for part in parts]), batch["noise"].values)


@pytest.mark.parametrize("workers", [0, 1])
def test_numbers_stand_beside_the_captions_that_were_drawn(tmp_path, workers):
    fit = {"fit": {"kind": "numbers", "column": "fit", "each": "caption"}}
    source = write_lines(tmp_path)
    batch = batch_of(source, fit, captions={"kind": "several", "k": 2}, workers=workers)
    assert torch.equal(batch["fit"].sample_index, batch["text"].sample_index)
    assert torch.equal(batch["fit"].slot, batch["text"].slot)
    texts = [TOKENIZER.decode(ids[mask].tolist()) for ids, mask in zip(batch["text"].values, batch["text"].mask)]
    for text, number, i in zip(texts, batch["fit"].values.tolist(), batch["fit"].sample_index.tolist()):
        line = LINES[int(batch.keys[i].rsplit(":", 1)[1]) - 1]
        captions = line["caption"] if isinstance(line["caption"], list) else [line["caption"]]
        listed = line["fit"] if isinstance(line["fit"], list) else [line["fit"]]
        assert number == pytest.approx(dict(zip(captions, listed))[text])
    counts = torch.bincount(batch["text"].sample_index).tolist()
    assert sorted(counts) == [1, 1, 2, 2]
    drawn = {tuple(by_row(batch_of(source, fit, captions={"kind": "several", "k": 2}, seed=s), "fit")[0]) for s in range(8)}
    assert drawn <= {(0.1, 0.2), (0.1, 0.3), (0.2, 0.3)}
    assert len(drawn) > 1
    first = batch_of(source, fit)
    assert by_row(first, "fit") == {0: [0.1], 1: [1.0], 2: [0.0], 3: [0.75]}
    assert first["fit"].slot is None


def test_a_member_of_a_tar_is_a_number(tmp_path):
    samples = {f"{n}": {**sample(n), "quality.txt": f"0.{n}\n".encode()} for n in range(4)}
    source = write_tar(tmp_path / "a.tar", samples)
    batch = batch_of(str(source), {"quality": {"kind": "numbers", "column": "quality.txt"}})
    assert {key.rsplit(":", 1)[1]: round(v, 3) for key, v in zip(batch.keys, batch["quality"].values.tolist())} == {
        "0": 0.0, "1": 0.1, "2": 0.2, "3": 0.3,
    }


def test_a_part_of_a_mixture_without_the_stream_is_masked(tmp_path):
    stream = {"kind": "numbers", "column": "quality", "missing": 1.0}
    parts = {
        "files": {"source": write_lines(tmp_path), "streams": {"quality": stream}},
        "drawn": {"source": "scenes:?n=4"},
    }
    options = DataOptions.model_validate({"mixture": parts})
    with build_loader(options, preprocess=PRE, tokenizer=TOKENIZER, batch_size=8) as loader:
        batch = next(loader)
    known = ["jsonl" in batch.keys[i] for i in batch["quality"].sample_index.tolist()]
    assert batch["quality"].mask.tolist() == known
    assert 0 < sum(known) < 8


BAD = [
    (1.5, "quality: '1.5', expected a number from 0 to 1"),
    ("good", "quality: 'good', expected a number"),
    (True, "'True'"),
    ("nan", "'nan'"),
    ([0.5], "'[0.5]'"),
    (10**400, "expected a number"),
]


@pytest.mark.parametrize(("value", "words"), BAD)
def test_what_is_no_number_of_the_range_is_told(value, words):
    with pytest.raises(BadSample) as caught:
        Numbers({"q": NumberStream(column="quality")}, {}).make({"quality": value}, 0, [])
    assert caught.value.reason == "bad_number"
    assert words in caught.value.detail


def test_lists_that_do_not_fit_the_captions_are_told():
    maker = Numbers({"fit": NumberStream(column="fit", each="caption")}, {})
    with pytest.raises(BadSample, match="2 numbers for 3 captions"):
        maker.make({"fit": [0, 1]}, 3, [0])
    with pytest.raises(BadSample, match=r"fit\[1\]"):
        maker.make({"fit": [0, None]}, 2, [0])
    assert number_of(" 1e-1 ", "x", 0, 1) == 0.1


def preset_of(folder, data):
    path = folder / "own.toml"
    path.write_text('schema = 1\nextends = "clip-tiny"\n' + data)
    return path


def test_check_names_file_and_row(tmp_path, capsys):
    lines = [*LINES, {"quality": "much", "caption": "a", "fit": 1}, {"quality": 0.5, "caption": ["a", "b"], "fit": [1]}]
    write_lines(tmp_path, lines)
    preset = preset_of(tmp_path, f'''
[data]
source = "{tmp_path}/pairs.jsonl"
[data.captions]
kind = "several"
[data.streams.quality]
kind = "numbers"
column = "quality"
[data.streams.fit]
kind = "numbers"
column = "fit"
each = "caption"
''')
    assert main(["data", "check", "--preset", str(preset), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    bad = {entry["key"]: (entry["reason"], entry["detail"]) for entry in report["first_bad"]}
    assert bad == {
        "pairs.jsonl:3": ("missing_field", "quality"),
        "pairs.jsonl:5": ("bad_number", "quality: 'much', expected a number from 0 to 1"),
        "pairs.jsonl:6": ("bad_number", "fit: 1 numbers for 2 captions"),
    }
    assert report["numbers"] == {
        "quality": {"count": 3, "min": 0.25, "mean": 0.583333, "max": 1.0},
        "fit": {"count": 5, "min": 0.1, "mean": 0.47, "max": 1.0},
    }
    main(["data", "check", "--preset", str(preset)])
    assert "numbers of quality: 3, 0.25..1, mean 0.583333" in capsys.readouterr().out


TALK = {
    "conversations": [
        {"from": "human", "value": "what is it?"},
        {"from": "gpt", "value": "a red circle", "weight": 0.5, "marks": [{"text": "red", "weight": 3}]},
        {"from": "human", "value": "is it green?"},
        {"from": "gpt", "value": "no", "marks": [{"start": 0, "end": 2, "weight": 0}]},
    ],
    "trust": 2,
}


def told(batch, name="weights", of="text", row=0):
    """(text of a supervised token, its weight); weights of all others must be 0."""
    ids, weights = batch[of], batch[name]
    assert weights.values.shape == ids.values.shape
    assert torch.equal(weights.mask, ids.mask)
    assert torch.equal(weights.sample_index, ids.sample_index)
    assert not weights.values[~ids.supervised].any()
    chosen = ids.supervised[row]
    decode = lambda i: TOKENIZER.decode([i], skip_special=False)  # noqa: E731
    return [(decode(i), w) for i, w in zip(ids.values[row][chosen].tolist(), weights.values[row][chosen].tolist())]


@pytest.mark.parametrize("template", ["plain", "vicuna"])
def test_answers_spans_and_samples_weigh_tokens(tmp_path, template):
    source = write_lines(tmp_path, [TALK])
    weights = {"kind": "token-weights", "column": "trust", "answer": "weight", "spans": "marks", "end": 0.25}
    batch = batch_of(
        source, {"text": {"kind": "conversation"}, "weights": weights}, batch_size=1, text={"length": 300, "template": template}
    )
    found = told(batch)
    ends = [n for n, (text, _) in enumerate(found) if text == "</s>"]
    first, second = found[: ends[0]], found[ends[0] + 1 : ends[1]]
    assert "".join(text for text, _ in first).strip() == "a red circle"
    red = [(text, w) for text, w in first if w != 1.0]
    assert "".join(text for text, _ in red).strip() == "red"
    assert {w for _, w in red} == {2 * 0.5 * 3}
    assert {w for text, w in second if text.strip()} == {0.0}
    assert [found[n][1] for n in ends[:2]] == [2 * 0.5 * 0.25, 2 * 0.25]


def test_words_weigh_where_the_data_have_no_weights():
    stream = {"kind": "conversation", "answer": "caption"}
    words = {"kind": "token-weights", "words": {"red": 4.0, "circle": 2.0}, "rest": 0.5}
    batch = batch_of("scenes:?n=64", {"text": stream, "weights": words}, batch_size=64, text={"length": 300})
    seen = set()
    for row in range(64):
        found = told(batch, row=row)
        text = "".join(part for part, _ in found[:-1])
        heavy = "".join(part for part, w in found if w == 4.0)
        assert heavy.split() == [word for word in text.replace(",", " ").split() if word == "red"]
        seen |= {w for _, w in found}
    assert seen == {4.0, 2.0, 0.5}


def test_questions_bring_the_weight_of_their_answer(tmp_path):
    entry = {"questions": [{"question": f"what is {w}?", "answer": w, "weight": n} for n, w in enumerate(("red", "green", "circle"))]}
    streams = {"text": {"kind": "conversation", "questions": {"turns": 3}}, "weights": {"kind": "token-weights", "answer": "weight"}}
    found = told(batch_of(write_lines(tmp_path, [entry]), streams, batch_size=1, text={"length": 300}))
    by_answer, inside, said = {}, set(), ""
    for text, weight in found:
        if text == "</s>":
            by_answer[said.strip()], said = inside | {weight}, ""
            inside = set()
        else:
            said, inside = said + text, inside | {weight}
    assert by_answer == {"red": {0.0}, "green": {1.0}, "circle": {2.0}}


def test_a_cut_answer_keeps_the_weights_of_what_is_left(tmp_path):
    source = write_lines(tmp_path, [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "red " * 40}]}])
    streams = {"text": {"kind": "conversation"}, "weights": {"kind": "token-weights", "words": {"red": 2.0}, "end": 9.0}}
    batch = batch_of(source, streams, batch_size=1, text={"length": 24})
    assert {weight for text, weight in told(batch) if text.strip()} == {2.0}


def test_packed_documents_are_weighed(tmp_path):
    lines = [{"text": f"a red thing number {n}", "weight": n / 4, "marks": [{"text": "red", "weight": 2}]} for n in range(5)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = {"kind": "token-weights", "column": "weight", "spans": "marks", "end": 0.0}
    table = {"source": str(path), "packer": {"kind": "concat", "length": 16}, "streams": {"weights": weights}}
    for packer in ("concat", "document"):
        table["packer"]["kind"] = packer
        with build_loader(DataOptions.model_validate(table), tokenizer=TOKENIZER, batch_size=6) as loader:
            batch = next(loader)
        text, numbers = batch["text"], batch["weights"]
        assert torch.equal(numbers.mask, text.mask)
        assert not numbers.values[~text.mask].any()
        assert not numbers.values[text.values == TOKENIZER.eos_id].any()
        assert {round(v, 3) for v in numbers.values[text.mask].tolist()} <= {0, 0.25, 0.5, 0.75, 1, 1.5, 2}
        assert len(set(numbers.values[text.mask].tolist())) > 4


def test_packed_conversations_join_their_weights(tmp_path):
    source = write_lines(tmp_path, [TALK | {"trust": n + 1} for n in range(6)])
    streams = {"text": {"kind": "conversation"}, "weights": {"kind": "token-weights", "column": "trust"}}
    with loader_of(source, streams, batch_size=2, packer={"kind": "concat", "length": 120}) as loader:
        batch = next(loader)
    text, weights = batch["text"], batch["weights"]
    assert int(text.segment.max()) > 0
    for row in range(2):
        for part in range(int(text.segment[row].max()) + 1):
            inside = (text.segment[row] == part) & text.supervised[row]
            assert len(set(weights.values[row][inside].tolist())) == 1
    assert len(set(weights.values[text.supervised].tolist())) > 1


SPANS = [
    ([{"text": "blue", "weight": 1}], "'blue' is not in the text"),
    ([{"start": 3, "end": 99, "weight": 1}], "expected a part of 0..12"),
    ([{"start": 3, "end": 4}], "expected { text, weight }"),
    ("red", "expected a list"),
    ([{"text": "red", "weight": -1}], "marks[0].weight: '-1', expected a number from 0 to 100"),
]


@pytest.mark.parametrize(("spans", "words"), SPANS)
def test_spans_that_do_not_fit_are_told(spans, words):
    maker = Weights({"w": TokenWeights(spans="marks")}, {})
    with pytest.raises(BadSample) as caught:
        maker.make("w", {}, ["a red circle"], [{"marks": spans}])
    assert words in caught.value.detail


def test_check_names_the_conversation_with_a_wrong_weight(tmp_path, capsys):
    wrong = json.loads(json.dumps(TALK))
    wrong["conversations"][1]["weight"] = "heavy"
    write_lines(tmp_path, [TALK, wrong])
    preset = preset_of(tmp_path, f'''
[data]
source = "{tmp_path}/pairs.jsonl"
[data.streams.text]
kind = "conversation"
[data.streams.weights]
kind = "token-weights"
answer = "weight"
''')
    assert main(["data", "check", "--preset", str(preset), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["first_bad"] == [
        {"key": "pairs.jsonl:2", "reason": "bad_number", "detail": "weight: 'heavy', expected a number from 0 to 100"}
    ]


REFUSED = [
    ({"text": {"kind": "numbers", "column": "a"}}, {}, "numbers cannot have this name"),
    ({"a": {"kind": "numbers", "column": "a", "low": 2}}, {}, "low is 2"),
    ({"a": {"kind": "numbers", "column": "a", "missing": 2}}, {}, "missing is 2"),
    ({"a": {"kind": "numbers", "column": "a", "each": "caption"}}, {"captions": {"kind": "sentences"}}, "each = caption wants"),
    ({"a": {"kind": "token-weights", "rest": 0.5}}, {}, "is no conversation stream"),
    ({"text": {"kind": "conversation"}, "a": {"kind": "token-weights"}}, {}, "say nothing"),
    ({"text": {"kind": "conversation"}, "a": {"kind": "token-weights", "words": {"a": -1}}}, {}, "expected a word and a weight"),
    ({"a": {"kind": "token-weights", "answer": "w"}}, {"packer": {"kind": "concat"}}, "a document has no answer"),
]


@pytest.mark.parametrize(("streams", "table", "words"), REFUSED)
def test_tables_that_cannot_be_are_refused(streams, table, words):
    with pytest.raises(ValidationError, match=words):
        DataOptions.model_validate({"streams": streams, **table})


def test_a_packed_row_has_no_number(tmp_path):
    streams = {"q": {"kind": "numbers", "column": "q"}}
    table = {"source": write_lines(tmp_path), "packer": {"kind": "concat", "length": 16}, "streams": streams}
    with pytest.raises(DataError, match="no number of its own"):
        build_loader(DataOptions.model_validate(table), tokenizer=TOKENIZER, batch_size=2)
