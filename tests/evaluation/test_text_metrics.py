"""Text metrics against numbers worked out by hand and against slow, independent implementations."""

import itertools
import math
import random

import numpy as np
import pytest

from vlm.evaluation.text_metrics import (
    Cider,
    ObjectNames,
    absent_rate,
    bleu,
    bleu_of,
    bleu_statistics,
    calibration_error,
    cider,
    exact,
    hallucination_statistics,
    ngrams,
    normalise_answer,
    rouge_l,
    said_yes,
    words,
    yes_no_of,
    yes_no_statistics,
)
from vlm.evaluation.text_metrics.rouge import common_length

VOCABULARY = ["a", "red", "blue", "circle", "square", "above", "on", "the", "small"]


def made(count, seed=0, most=9):
    """Random candidates and 1..3 references each, some empty."""
    draw = random.Random(seed)

    def text():
        return " ".join(draw.choice(VOCABULARY) for _ in range(draw.randrange(most)))

    return [text() for _ in range(count)], [[text() for _ in range(draw.randint(1, 3))] for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog's Ball, 2 m!", ["a", "dog", "s", "ball", "2", "m"]),
        ("", []),
        (" ,.; ", []),
        ("Ein Märchen—schön", ["ein", "märchen", "schön"]),
        ("Ma\u0308rchen", ["märchen"]),
        ("赤い車car2台", ["赤", "い", "車", "car2", "台"]),
        ("가방 하나", ["가방", "하나"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("ＡＢ　１", ["ab", "1"]),
        ("می‌روم", ["میروم"]),
    ],
)
def test_words_of_several_scripts(text, expected):
    assert words(text) == expected


def test_ascii_takes_the_same_way_as_everything_else():
    draw = random.Random(1)
    for _ in range(200):
        text = "".join(draw.choice("aB 9.,'-_\n\x1f") for _ in range(12))
        assert words(text + "é")[:-1] == words(text)[: len(words(text + "é")) - 1]


def test_ngrams_counts_every_run():
    assert ngrams(["a", "b", "a", "b"], 2) == {("a",): 2, ("b",): 2, ("a", "b"): 2, ("b", "a"): 1}
    assert ngrams([], 4) == {}


def brute_cider(candidates, references, sigma=6.0):
    """Dense vectors over all n-grams of the set, one order at a time."""
    split = [text.split() for text in candidates]
    refs = [[text.split() for text in texts] for texts in references]

    def runs(tokens, n):
        return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    out = np.zeros(len(candidates))
    for n in (1, 2, 3, 4):
        names = sorted({g for t in split for g in runs(t, n)} | {g for ts in refs for t in ts for g in runs(t, n)})
        held = np.array([sum(any(g in runs(t, n) for t in texts) for texts in refs) for g in names], float)
        idf = np.log(len(refs)) - np.log(np.maximum(held, 1))
        for i, tokens in enumerate(split):
            c = np.array([runs(tokens, n).count(g) for g in names], float) * idf
            for reference in refs[i]:
                r = np.array([runs(reference, n).count(g) for g in names], float) * idf
                norm = np.linalg.norm(c) * np.linalg.norm(r)
                if norm > 0:
                    near = math.exp(-((len(tokens) - len(reference)) ** 2) / (2 * sigma**2))
                    out[i] += 10 / 4 / len(refs[i]) * near * (np.minimum(c, r) @ r) / norm
    return out


@pytest.mark.parametrize("seed", range(4))
def test_cider_is_the_dense_computation(seed):
    candidates, references = made(13, seed)
    np.testing.assert_allclose(cider(candidates, references), brute_cider(candidates, references), atol=1e-12)


def test_cider_by_hand():
    # Two samples, words of one sample each: idf is ln 2 everywhere but for "a", which both hold (idf 0).
    references = [["a red circle"], ["a blue square"]]
    # A perfect candidate of 3 words: orders 1, 2, 3 have cosine 1, order 4 none: 10 * 3/4.
    assert cider(["a red circle", "x"], references).tolist() == pytest.approx([7.5, 0])
    # "red circle": unigrams 1; bigrams: 1 of 2, (a red) is missing: 1/sqrt(2); trigrams 0; one word shorter.
    expected = 10 / 4 * (1 + 1 / math.sqrt(2)) * math.exp(-1 / 72)
    assert cider(["red circle", ""], references).tolist() == pytest.approx([expected, 0])


def test_cider_gives_nothing_for_repeating_a_rare_word():
    references = [["red circle"], ["blue square"]]
    once, twice = (cider([text, ""], references)[0] for text in ("red", "red red red red"))
    assert once > twice > 0


def test_cider_of_one_sample_is_zero_and_frequencies_stay_those_of_the_references():
    assert cider(["a b c d"], [["a b c d"]]).tolist() == [0]
    scorer = Cider([["a b c d e"], ["f g h i j"]])
    first = scorer.scores(["a b c d e", "nothing"])
    assert scorer.scores(["a b c d e", "f g h i j"])[0] == first[0] == pytest.approx(10)
    with pytest.raises(ValueError, match="zip"):
        scorer.scores(["only one"])


def brute_bleu(candidates, references):
    matched, total, length, wanted = [0] * 4, [0] * 4, 0, 0
    for text, texts in zip(candidates, references):
        tokens, split = text.split(), [t.split() for t in texts]
        length += len(tokens)
        wanted += sorted((len(t) for t in split), key=lambda n: (abs(n - len(tokens)), n))[0]
        for n in (1, 2, 3, 4):
            ours = [tokens[i : i + n] for i in range(len(tokens) - n + 1)]
            theirs = [[t[i : i + n] for i in range(len(t) - n + 1)] for t in split]
            total[n - 1] += len(ours)
            for gram in [g for i, g in enumerate(ours) if g not in ours[:i]]:
                matched[n - 1] += min(ours.count(gram), max(t.count(gram) for t in theirs))
    out = []
    for n in (1, 2, 3, 4):
        if 0 in matched[:n]:
            out.append(0.0)
            continue
        mean = math.prod(m / t for m, t in zip(matched[:n], total[:n])) ** (1 / n)
        out.append(mean * (1 if length >= wanted else math.exp(1 - wanted / length)))
    return out


@pytest.mark.parametrize("seed", range(6))
def test_bleu_is_the_plain_count(seed):
    candidates, references = made(11, seed)
    np.testing.assert_allclose(bleu(candidates, references), brute_bleu(candidates, references), atol=1e-12)


def test_bleu_by_hand():
    # The classic: "the" seven times matches the reference that has it twice.
    statistics = bleu_statistics(["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]])
    assert statistics[0].tolist() == [2, 0, 0, 0, 7, 6, 5, 4, 7, 7]
    assert bleu(["the the the the the the the"], [["the cat is on the mat"]]).tolist() == pytest.approx([2 / 7, 0, 0, 0])
    assert bleu(["a b c d"], [["a b c d"]]).tolist() == pytest.approx([1, 1, 1, 1])
    # Half as long as the reference: exp(1 - 2).
    assert bleu(["a b c d"], [["a b c d e f g h"]]).tolist() == pytest.approx([math.exp(-1)] * 4)
    # Of 2 and 6 words, both two away from 4, the shorter counts: no penalty.
    assert bleu(["a b c d"], [["a b", "a b c d e f"]])[3] == pytest.approx(1)
    assert bleu([""], [["a"]]).tolist() == [0, 0, 0, 0]


def test_bleu_of_many_sums_at_once():
    statistics = bleu_statistics(*made(9, 3))
    stacked = np.stack([statistics.sum(0), statistics[:4].sum(0)])
    np.testing.assert_array_equal(bleu_of(stacked)[1], bleu_of(statistics[:4].sum(0)))


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_common_subsequence_by_trying_all(seed):
    draw = random.Random(seed)
    a, b = ([draw.choice("xyz") for _ in range(draw.randrange(8))] for _ in range(2))

    def within(part, whole):
        rest = iter(whole)
        return all(x in rest for x in part)

    best = max(
        len(chosen)
        for size in range(len(a) + 1)
        for chosen in itertools.combinations(a, size)
        if within(chosen, b)
    )
    assert common_length(a, b) == best == common_length(b, a)


def test_rouge_by_hand():
    # Subsequence "a circle": precision 2/2, recall 2/3.
    p, r = 1.0, 2 / 3
    expected = (1 + 1.44) * p * r / (r + 1.44 * p)
    assert rouge_l(["a circle"], [["a red circle"]]).tolist() == pytest.approx([expected])
    # Precision and recall are each the best over the references, as in the COCO tool.
    p, r = 2 / 2, 1 / 1
    assert rouge_l(["a circle"], [["a red circle", "circle"]])[0] == pytest.approx((2.44) * p * r / (r + 1.44 * p))
    assert rouge_l(["", "x", "a"], [["a"], ["a"], [""]]).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two  cats.", "2 cats"),
        ("a", "a"),
        ("the A", "the a"),
        ("don't", "dont"),
        ("1,000.5 m", "1000.5 m"),
        ("1,00", "1 00"),
        ("yes.", "yes"),
        ("red/blue", "red blue"),
        ("None", "0"),
        ("-3 °C", "-3 c"),
        ("well-known", "well known"),
        ("Zwölf Äpfel", "zwölf äpfel"),
        ("...", ""),
    ],
)
def test_answers_are_compared_without_case_articles_and_punctuation(text, expected):
    assert normalise_answer(text) == expected
    assert normalise_answer(normalise_answer(text)) == expected


def test_exact_asks_for_one_of_the_references():
    assert exact("Three.", ["two", "3"])
    assert not exact("thirty", ["3"])
    assert not exact("", ["yes"])


def test_debias_lvlm_yes_no_figures_by_hand():
    said = [said_yes(text) for text in ("Yes, it is.", "yes", "no", "No!", "maybe", "", "yes")]
    assert said == ["yes", "yes", "no", "no", "other", "other", "yes"]
    sums = yes_no_statistics(said, [True, False, True, False, True, False, True]).sum(0)
    assert sums.tolist() == [2, 1, 1, 2, 1]
    precision, recall = 2 / 3, 2 / 4
    expected = [3 / 7, precision, recall, 2 * precision * recall / (precision + recall), 3 / 7]
    assert yes_no_of(sums).tolist() == pytest.approx(expected)
    assert yes_no_of(np.zeros((2, 5))).tolist() == [[0] * 5] * 2


def test_debias_lvlm_calibration_error():
    sure = np.array([0.95, 0.95, 0.55, 0.55])
    right = np.array([True, False, True, True])
    # Upper bin: said 0.95, was 0.5; lower bin: said 0.55, was 1.0.
    assert calibration_error(sure, right) == pytest.approx(0.45)
    draw = np.random.default_rng(0)
    honest = draw.random(200_000)
    assert calibration_error(honest, draw.random(200_000) < honest) < 0.01
    # Brute force, bin by bin.
    right = draw.random(50) < 0.5
    by_bin = sum(
        abs((honest[:50] - right)[(honest[:50] > low / 10) & (honest[:50] <= (low + 1) / 10)].sum()) for low in range(10)
    )
    assert calibration_error(honest[:50], right) == pytest.approx(by_bin / 50)
    assert calibration_error(np.zeros(0), np.zeros(0, bool)) == 0


def test_povid_objects_named_and_absent():
    names = ObjectNames.of(["circle", "red circle", "puppy", "cross", "ring"], {"puppy": ["little dog"]})
    assert names.named("A red circle and two circles, crosses near little dogs") == ["red circle", "circle", "cross", "puppy"]
    assert names.named("puppies in spring") == ["puppy"]
    assert names.named("") == ObjectNames.of(["..."]).named("...") == []
    named = [["red circle", "ring", "ring"], [], ["cross"]]
    shown = [{"red circle"}, {"ring"}, {"cross"}]
    assert absent_rate(named, shown) == pytest.approx(2 / 4)
    assert hallucination_statistics(named, shown).tolist() == [[2, 3, 1, 1, 1], [0, 0, 0, 1, 0], [0, 1, 0, 1, 1]]
    assert absent_rate([[]], [set()]) == 0
