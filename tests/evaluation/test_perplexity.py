"""Bits per character: known models, packing, windows, boundaries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm.config.errors import DataError, RunFailed
from vlm.evaluation.encoder import TorchLanguage
from vlm.evaluation.material import Item
from vlm.evaluation.perplexity import PerplexityOptions, document_nats, packed, perplexity, windows_of
from vlm.models import LanguageOptions
from vlm.types import VocabularyLayout


class Letters:
    """One id a character: a..z are 3..28."""

    bos_id, eos_id, vocab_size = 1, 2, 29

    def ids(self, texts):
        return [[1, *(ord(c) - ord("a") + 3 for c in text), 2] for text in texts]

    def decode(self, ids, *, skip_special=True):
        return "".join(chr(i - 3 + ord("a")) if i > 2 else f"<{i}>" for i in ids)


@pytest.fixture
def language():
    torch.manual_seed(0)
    options = LanguageOptions(width=32, depth=2, heads=2, ffn_width=48, length=16)
    return TorchLanguage(options.build(VocabularyLayout.of_text(29, {"bos": 1, "eos": 2})), Letters())


def items(*texts):
    return [Item(f"k{i}", (text,), {}) for i, text in enumerate(texts)]


def test_uniform_model_needs_log2_of_the_vocabulary(language):
    with torch.no_grad():
        language.model.tokens.weight.zero_()
    result = perplexity(language, items("abc", "hello", "z" * 40), PerplexityOptions())
    tokens, characters = 4 + 6 + 41, 3 + 5 + 40
    assert result.metrics["bits_per_token"] == pytest.approx(math.log2(29), abs=1e-5)
    assert result.metrics["nats_per_token"] == pytest.approx(math.log(29), abs=1e-5)
    assert result.metrics["perplexity"] == pytest.approx(29, abs=1e-3)
    assert result.metrics["bits_per_character"] == pytest.approx(
        math.log2(29) * tokens / characters, abs=1e-5
    )
    assert result.metrics["bits_per_character"] == pytest.approx(
        result.chance["bits_per_character"], abs=1e-5
    )
    assert result.details["tokens"] == tokens
    assert result.samples == 3


def test_bytes_and_characters_differ_where_text_is_not_ascii(language):
    class Accents(Letters):
        def ids(self, texts):
            return [[1, 5, 6, 2] for _ in texts]

    language.tokenizer = Accents()
    result = perplexity(language, items("éé"), PerplexityOptions())
    assert result.metrics["bits_per_character"] == pytest.approx(
        2 * result.metrics["bits_per_byte"], rel=1e-5
    )


def by_hand(model, document):
    """-log p of each token after the first, one document alone, no packing."""
    with torch.no_grad():
        hidden, _ = model.run(torch.tensor([document[:-1]]))
        logp = torch.log_softmax(hidden[0].double() @ model.head_weight.double().T, dim=1)
    return -logp[torch.arange(len(document) - 1), torch.tensor(document[1:])].numpy()


def test_packed_documents_score_as_if_alone(language):
    generator = np.random.default_rng(0)
    documents = [[1, *generator.integers(3, 29, n).tolist(), 2] for n in (0, 1, 2, 3, 5, 8, 14, 4, 1)]
    together = document_nats(language, documents, batch_tokens=32)
    for document, found in zip(documents, together):
        np.testing.assert_allclose(found, by_hand(language.model, document), atol=2e-5)


def test_long_documents_are_scored_once_with_enough_context(language):
    document = [1, *np.random.default_rng(1).integers(3, 29, 60).tolist(), 2]
    found = document_nats(language, [document], stride=4)[0]
    assert np.isfinite(found).all()
    assert len(found) == 61
    np.testing.assert_allclose(found[:15], by_hand(language.model, document[:16]), atol=2e-5)
    # The last token is read in a window of the 16 last tokens.
    assert found[-1] == pytest.approx(by_hand(language.model, document[-16:])[-1], abs=2e-5)


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(2, 12), st.integers(1, 11), st.booleans())
def test_windows_cover_each_token_once_and_rows_fit(lengths, length, stride, several):
    stride = min(stride, length - 1)
    windows = list(windows_of(lengths, length, stride))
    seen = {(w.document, t) for w in windows for t in range(w.first, w.stop)}
    assert seen == {(d, t) for d, n in enumerate(lengths) for t in range(1, n)}
    assert sum(w.stop - w.first for w in windows) == len(seen)
    for w in windows:
        assert w.stop - w.start <= length
        assert w.first > w.start
        assert w.start == 0 or w.first - w.start >= length - stride
    rows = packed(windows, length, several)
    assert sorted((w.document, w.start) for row in rows for w in row) == [
        (w.document, w.start) for w in windows
    ]
    assert all(sum(w.stop - w.start for w in row) <= length for row in rows)
    assert several or all(len(row) == 1 for row in rows)


def test_a_tokenizer_without_opening_token_is_charged_for_the_first(language):
    class Bare(Letters):
        bos_id = None

        def ids(self, texts):
            return [[ord(c) - ord("a") + 3 for c in text] for text in texts]

    with torch.no_grad():
        language.model.tokens.weight.zero_()
    bare = TorchLanguage(language.model, Bare())
    result = perplexity(bare, items("abcd"), PerplexityOptions())
    assert result.metrics["bits_per_character"] == pytest.approx(math.log2(29), abs=1e-5)
    assert result.details["first_token"] == "charged as a uniform guess"


def test_empty_documents_are_counted_and_named(language):
    texts = [f"text{'abcdefghij'[i % 10]}" for i in range(100)]
    result = perplexity(language, items(*texts, "   "), PerplexityOptions())
    assert result.bad["count"] == 1
    assert result.bad["first"] == ["k100: missing_text: the sample has no text"]
    with pytest.raises(DataError, match="2 of 3 samples are bad"):
        perplexity(language, items("abc", "", ""), PerplexityOptions())
    with pytest.raises(DataError, match="missing_text"):
        perplexity(language, items("abc"), PerplexityOptions(field="body"))


def test_a_broken_model_is_an_error_not_a_number(language):
    with torch.no_grad():
        language.model.tokens.weight.fill_(torch.nan)
    with pytest.raises(RunFailed, match="not finite"):
        perplexity(language, items("abc"), PerplexityOptions())


def test_examples_show_the_bits_of_tokens(language):
    result = perplexity(language, items("abc", "de"), PerplexityOptions(examples=2))
    example = next(e for e in result.examples if e["key"] == "k0")
    assert example["tokens"] == ["a", "b", "c", "<2>"]
    assert len(example["bits"]) == 4


def test_evaluation_leaves_the_models_mode_alone(language):
    language.model.train()
    perplexity(language, items("abc"), PerplexityOptions())
    assert language.model.training
