"""Caption policies, and the rows of the stream `text` that they make."""

from __future__ import annotations

import json

import pytest
import torch

from tests.data.data_makers import sample, write_tar
from vlm.data import BadSample, DataOptions, Tokenizer, build_loader
from vlm.data.captions import choose, sentences
from vlm.data.options import CaptionsByLength, MixedCaptions, RandomCaption, SentenceCaptions
from vlm.data.samples import Sample
from vlm.data.texts import texts_of
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


def test_dreamlip_the_last_sentence_is_drawn_as_often_as_the_first():
    policy = SentenceCaptions(k=2)
    drawn = [text for key in range(600) for text in pick(policy, {"text": "One. Two. Three. Four."}, key)]
    counts = {name: drawn.count(name) for name in ("One.", "Two.", "Three.", "Four.")}
    assert sum(counts.values()) == 1200
    assert all(abs(count - 300) < 4 * 150**0.5 for count in counts.values())  # 600 draws of probability 1/2


def test_dreamlip_one_key_is_one_draw_and_no_sentence_leaves_the_raw_caption_alone():
    policy = SentenceCaptions(k=3, raw="caption", columns=("long",))
    fields = {"caption": "raw", "long": LONG}
    assert pick(policy, fields, 7) == pick(policy, fields, 7)
    assert len({tuple(pick(policy, fields, key)) for key in range(20)}) > 10
    for empty in ("...", [], None):
        assert pick(policy, {"caption": "raw", "long": empty}) == ["raw", None, None, None]
    assert pick(policy, {"caption": "raw"}) == ["raw", None, None, None]
    with pytest.raises(BadSample, match="no sentence"):
        pick(SentenceCaptions(columns=("long",)), {"long": "..."})


def test_realsyn_fields_are_mixed_by_their_weights_and_entries_alike():
    policy = MixedCaptions(weights={"real": 3.0, "made": 1.0})
    fields = {"real": ["r1", "r2", "r3"], "made": "m"}
    drawn = [pick(policy, fields, key)[0] for key in range(2000)]
    for text, share in (("m", 0.25), ("r1", 0.25), ("r2", 0.25), ("r3", 0.25)):
        assert abs(drawn.count(text) - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5
    assert {pick(policy, {"made": "m"}, key)[0] for key in range(20)} == {"m"}  # the other field's share goes to it
    with pytest.raises(BadSample, match="none of real, made"):
        pick(policy, {"text": "x"})
    with pytest.raises(ValueError, match="above 0"):
        MixedCaptions(weights={"real": 0.0})


def test_vladva_texts_are_taken_by_their_length():
    policy = CaptionsByLength(columns=("short", "long"), least=2, most=4)
    fields = {"short": ["one", "two words", "just three words"], "long": "a text of six words here"}
    assert {pick(policy, fields, key)[0] for key in range(60)} == {"two words", "just three words"}
    assert pick(policy, {"long": ["a b c d e f", "a b c d e"]}) == ["a b c d e"]  # the nearest
    assert pick(policy, {"short": "one", "long": "a b c d e"}) == ["one"]  # equally near: the first
    with pytest.raises(BadSample, match="no text of 2 to 4 words"):
        pick(CaptionsByLength(least=2, most=4, otherwise="refuse"), {"text": "one"})
    with pytest.raises(BadSample, match="no text"):
        pick(policy, {"text": "two words"})
    with pytest.raises(ValueError, match="least <= most"):
        CaptionsByLength(least=5, most=4)


def test_a_tokenizer_reads_every_text_that_a_policy_may_take():
    fields = {"text": "t", "real": ["r1", "r2"], "made": "m"}
    for captions in ({"kind": "mix", "weights": {"real": 1, "made": 1}}, {"kind": "length", "columns": ["real", "made"]}):
        options = DataOptions.model_validate({"source": "scenes:?n=1", "captions": captions})
        assert list(texts_of(Sample("k", fields), options)) == ["t", "r1", "r2", "m"]


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
