"""Caption policies, and the rows of the stream `text` that they make."""

from __future__ import annotations

import json

import pytest
import torch

from tests.data.data_makers import sample, write_tar
from vlm.data import BadSample, DataOptions, Tokenizer, build_loader
from vlm.data.captions import choose, sentences
from vlm.data.options import RandomCaption, SentenceCaptions
from vlm.runtime.preprocess import Preprocess

LONG = "A red star. A blue ring stands left of it! Is it large? No. The rest is 1.5 m of grass\nand sky"


def test_sentences_end_at_marks_before_a_blank():
    assert sentences(LONG, [".", "!", "?", "\n"]) == [
        "A red star.", "A blue ring stands left of it!", "Is it large?", "No.", "The rest is 1.5 m of grass", "and sky",
    ]  # fmt: skip


def pick(policy, fields, key=0):
    return choose(fields, "auto", policy.model_dump(mode="json"), 10_000, key)


def test_k_sentences_are_drawn_without_repetition():
    policy = SentenceCaptions(k=4)
    seen = set()
    for key in range(50):
        chosen = pick(policy, {"caption": LONG}, key)
        assert len(chosen) == len(set(chosen)) == 4
        seen |= set(chosen)
    assert len(seen) == 6


def test_a_short_text_gives_fewer_rows_or_repeats():
    assert pick(SentenceCaptions(k=3), {"text": "One. Two."}).count(None) == 1
    repeated = pick(SentenceCaptions(k=3, replacement="when-short"), {"text": "One. Two."})
    assert None not in repeated
    assert set(repeated) <= {"One.", "Two."}


def test_the_raw_caption_is_slot_zero_and_sentences_come_from_all_columns():
    policy = SentenceCaptions(k=3, raw="caption", columns=("short", "long"), merge=2)
    chosen = pick(policy, {"caption": "raw words", "short": "S one. S two.", "long": ["L one.", "L two."]})
    assert chosen[0] == "raw words"
    assert set(chosen[1:]) == {"S one. S two.", "S two. L one.", "L one. L two."}
    with pytest.raises(BadSample, match="missing_text"):
        pick(policy, {"short": "S."})


def test_a_random_caption_is_one_of_its_columns():
    policy = RandomCaption(columns=("a", "b"))
    drawn = {pick(policy, {"a": "first", "b": ["second", "third"]}, key)[0] for key in range(40)}
    assert drawn == {"first", "second", "third"}
    with pytest.raises(BadSample):
        pick(policy, {"c": "x"})


def test_sentences_become_rows_told_apart_by_slot(tmp_path):
    samples = {}
    for n in range(4):
        fields = {"caption": f"raw {n}.", "long": " ".join(f"Part {i} of {n}." for i in range(n + 1))}
        samples[f"{n}"] = {"png": sample(n)["png"], "json": json.dumps(fields).encode()}
    uri = str(write_tar(tmp_path / "a.tar", samples))
    captions = {"kind": "sentences", "k": 3, "raw": "caption", "columns": ["long"]}
    options = DataOptions.model_validate({"source": uri, "captions": captions})
    tokenizer = Tokenizer.train_bpe(["Part 0 of 1. raw"], 300)
    with build_loader(options, tokenizer=tokenizer, preprocess=Preprocess(8), batch_size=4) as loader:
        first, second = next(loader), next(loader)
    stream = first["text"]
    for row, (index, slot) in enumerate(zip(stream.sample_index.tolist(), stream.slot.tolist())):
        n = first.keys[index][-1]
        text = tokenizer.decode(stream.values[row][stream.mask[row]].tolist())
        assert text == f"raw {n}." if slot == 0 else text.startswith("Part ") and text.endswith(f"of {n}.")
    counts = {first.keys[i][-1]: int((stream.sample_index == i).sum()) for i in range(4)}
    assert counts == {"0": 2, "1": 3, "2": 4, "3": 4}
    assert len(first.samples(1, 3)["text"]) == sum(int((stream.sample_index == i).sum()) for i in (1, 2))
    assert not torch.equal(first["text"].values, second["text"].values)
