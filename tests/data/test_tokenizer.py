"""Tokenizer: training, saving, equality with transformers, conventions of published directories."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from vlm.config.errors import DataError
from vlm.data.tokenizer import Tokenizer

TEXTS = [
    f"a {c} {s} number {n}"
    for n, (c, s) in enumerate((c, s) for c in ("red", "blue") for s in ("star", "ring"))
] * 5
HARD = ["", " ", "ünïcödé 日本語 🌶️", "tab\tand\nnewline", "x" * 300, "a red star"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_bpe(TEXTS, 320)


def test_training_is_repeatable_and_every_text_survives(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    Tokenizer.train_bpe(iter(TEXTS), 320).save(tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_text() == (tmp_path / "b/tokenizer.json").read_text()
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.vocab_size <= 320
    for text, ids in zip(HARD, tokenizer.ids(HARD)):
        assert tokenizer.decode(ids) == text


def test_encode_pads_masks_and_keeps_eos(tokenizer):
    ids, mask = tokenizer.encode(["a red star", "x" * 300, ""], 8)
    assert ids.dtype == np.int64
    assert mask.dtype == bool
    assert ids[1, 0] == tokenizer.bos_id
    assert ids[1, -1] == tokenizer.eos_id
    assert mask[1].all()
    assert ids[2].tolist() == [2, 1] + [0] * 6
    assert mask.sum(1)[2] == 2
    plain, _ = tokenizer.encode(["a red star"], 8, add_special=False)
    assert tokenizer.bos_id not in plain


def test_transformers_encodes_the_same_ids(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for length in (3, 8, 40):
        ids, mask = tokenizer.encode(HARD + TEXTS, length)
        out = theirs(
            HARD + TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="np"
        )
        assert np.array_equal(out["input_ids"], ids)
        assert np.array_equal(out["attention_mask"].astype(bool), mask)
    again = Tokenizer.load(tmp_path)
    assert np.array_equal(again.encode(HARD, 8)[0], tokenizer.encode(HARD, 8)[0])


def published(folder, config, post=None, normal=None):
    """A directory as it is published: a word-level vocabulary stands for the real one."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "</s>": 2, "a": 3, "red": 4, "star": 5, "<unk>": 6}
    core = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(["<|startoftext|>", "<|endoftext|>", "</s>"])
    core.post_processor = post
    core.enable_truncation(5)
    core.enable_padding(length=9)
    folder.mkdir(exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def test_the_clip_convention_pads_with_eos_but_the_mask_tells(tmp_path):
    post = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)],
    )
    config = {
        "bos_token": {"content": "<|startoftext|>"},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 77,
    }
    tokenizer = published(tmp_path, config, post)
    ids, mask = tokenizer.encode(["a red star", "a red star a red star"], 7)
    assert ids.tolist() == [[0, 3, 4, 5, 1, 1, 1], [0, 3, 4, 5, 3, 4, 1]]
    assert mask.sum(1).tolist() == [5, 7]
    assert tokenizer.max_length == 77


def test_the_siglip_convention_has_eos_alone(tmp_path):
    post = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer = published(tmp_path, {"eos_token": "</s>", "pad_token": "</s>", "padding_side": "right"}, post)
    ids, _ = tokenizer.encode(["a red", "a red star a"], 4)
    assert ids.tolist() == [[3, 4, 2, 2], [3, 4, 5, 2]]
    assert tokenizer.bos_id is None


def test_left_padding_is_read_from_the_configuration(tmp_path):
    tokenizer = published(tmp_path, {"eos_token": "</s>", "padding_side": "left"})
    ids, mask = tokenizer.encode(["a red"], 4)
    assert ids.tolist() == [[2, 2, 3, 4]]
    assert mask.tolist() == [[False, False, True, True]]


def test_tokenizers_agree_where_texts_have_the_same_ids():
    words = ["a red star above a blue ring", "two green squares"] * 3
    one, again = (Tokenizer.train_bpe(words, 300) for _ in range(2))
    other = Tokenizer.train_bpe([text[::-1] for text in words], 300)
    assert one.agrees(again)
    assert one.agrees(one.with_special(["<image>"]))
    assert one.with_special(["<image>"]).agrees(one)
    assert not one.with_special(["<image>", "<box>"]).agrees(one.with_special(["<box>", "<image>"]))
    assert other.vocab_size == one.vocab_size
    assert not one.agrees(other)


def test_what_cannot_be_read_is_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(DataError, match="slow tokenizers"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(DataError, match=r"tokenizer.json"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nothing>"}')
    with pytest.raises(DataError, match="<nothing>"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="vocab_size"):
        Tokenizer.train_bpe(TEXTS, 100)


def test_the_ends_that_a_published_model_names_are_read_and_stay(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).end_ids == {tokenizer.eos_id}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, 9]}))
    assert Tokenizer.load(tmp_path).end_ids == {tokenizer.eos_id, 9}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 12]}))
    read = Tokenizer.load(tmp_path)
    assert read.end_ids == {tokenizer.eos_id, 11, 12}
    assert read.eos_id == tokenizer.eos_id
    read.save(tmp_path / "run")  # a run has no generation_config.json
    assert Tokenizer.load(tmp_path / "run").end_ids == read.end_ids
    assert Tokenizer.load(tmp_path / "run").with_special(["<x>"]).end_ids == read.end_ids
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert Tokenizer.load(tmp_path).end_ids == {tokenizer.eos_id, 9}
    for wrong in ('{"eos_token_id": "</s>"}', '{"eos_token_id": [1, true]}', '{"eos_token_id": -1}', "no json"):
        (tmp_path / "generation_config.json").write_text(wrong)
        with pytest.raises(DataError, match=r"generation_config\.json"):
            Tokenizer.load(tmp_path)
