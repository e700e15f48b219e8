"""Text while it comes: characters are never halved, stop texts never shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from vlm.runtime.generation.text import AnswerText, Detokenizer, StopTexts

TEXTS = ["naïve café, 100 €", "日本語のテキスト", "👩‍👩‍👧 family 🎉🎉", "plain words and  spaces\n\n\ttabs", "\ufffd is a character too", ""]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ["plain words and spaces"] * 3,
        trainers.BpeTrainer(
            vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=["<eos>"]
        ),
    )
    return core


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama's: words with a mark for the space before them, single bytes for what has no token."""
    words = ["▁", "a", "b", "▁a", "▁b", "ab"]
    vocabulary = {"<unk>": 0} | {f"<0x{b:02X}>": 1 + b for b in range(256)} | {word: 257 + i for i, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b"), ("a", "b")], byte_fallback=True, unk_token="<unk>"))
    core.add_special_tokens([AddedToken("<eos>", special=True)])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return core


def pieces(decode, ids) -> list[str]:
    detokenizer = Detokenizer(decode)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_hold_no_half_character(byte_level, text):
    found = pieces(byte_level.decode, byte_level.encode(text).ids)
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


@given(ids=st.lists(st.integers(0, 279), max_size=30))
def test_any_tokens_of_a_byte_level_tokenizer_join_to_what_decodes_whole(byte_level, ids):
    assert "".join(pieces(byte_level.decode, ids)) == byte_level.decode(ids)


@given(words=st.lists(st.sampled_from(["▁", "a", "b", "▁a", "▁b", "ab", "<eos>", "é", "€", "🎉"]), max_size=15))
def test_tokens_with_byte_fallback_join_to_what_decodes_whole(byte_fallback, words):
    ids = []
    for word in words:
        known = byte_fallback.token_to_id(word)
        ids += [known] if known is not None else [1 + b for b in word.encode()]
    found = pieces(byte_fallback.decode, ids)
    assert "".join(found) == byte_fallback.decode(ids)
    assert not any("\ufffd" in piece for piece in found)


def test_a_character_comes_with_its_last_byte():
    detokenizer = Detokenizer(lambda ids: bytes(ids).decode("utf-8", "replace"))
    assert [detokenizer.push(b) for b in "x🎉y".encode()] == ["x", "", "", "", "🎉", "y"]


def test_a_character_without_its_end_is_given_at_the_end_only():
    detokenizer = Detokenizer(lambda ids: bytes(ids).decode("utf-8", "replace"))
    assert [detokenizer.push(b) for b in b"x\xf0\x9f"] == ["x", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_bytes_that_never_make_a_character_are_not_held_back_for_ever():
    detokenizer = Detokenizer(lambda ids: bytes(ids).decode("utf-8", "replace"))
    shown = "".join(detokenizer.push(0x80) for _ in range(100))
    assert len(shown) >= 97
    assert shown + detokenizer.finish() == "\ufffd" * 100


def test_few_ids_are_decoded_again():
    sizes = []

    def decode(ids):
        sizes.append(len(ids))
        return "".join(chr(97 + i % 26) for i in ids)

    assert "".join(pieces(decode, range(200))) == decode(range(200))
    assert max(sizes[:-1]) <= 2


def shown_with(stops, parts) -> tuple[list[str], bool]:
    matcher = StopTexts(stops)
    shown = []
    for part in parts:
        text, met = matcher.push(part)
        shown.append(text)
        if met:
            return shown, True
    return [*shown, matcher.finish()], False


def whole(stops, text) -> tuple[str, bool]:
    """Character by character: the first end of any stop text, of several the longest."""
    for end in range(1, len(text) + 1):
        if met := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, met))], True
    return text, False


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("ab", max_size=4), max_size=8),
)
def test_stop_texts_do_not_depend_on_where_tokens_begin(stops, parts):
    shown, met = shown_with(stops, parts)
    assert ("".join(shown), met) == whole(stops, "".join(parts))


def test_what_may_become_a_stop_text_is_held_back():
    assert shown_with(["STOP"], ["xS", "T", "Ay", "ST", "OP", "z"]) == (["x", "", "STAy", "", ""], True)


def test_a_fork_goes_on_alone():
    text = AnswerText(lambda ids: bytes(ids).decode("utf-8", "replace"), ["ab"])
    assert text.push(ord("a")) == ("", False)
    other = text.fork()
    assert other.push(ord("b")) == ("", True)
    assert text.push(0xC3) == ("", False)
    assert text.push(0xA9) == ("aé", False)
    assert text.finish() == ("", False)
