"""Beam search against every sequence, against a plain search that reads each beam anew, and against greedy decoding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.tiny_generator import EOS, IMAGE, UNKNOWN, TinyGenerator, TinyModel, prompt_of
from vlm.runtime.generation import Contrast, Decoding, Negatives, Prompt, generate, stream
from vlm.runtime.generation.beam import _ranked
from vlm.runtime.generation.logits import log_softmax

PROMPTS = [prompt_of(IMAGE, 3, 4, seed=1), prompt_of(5), prompt_of(3, IMAGE, 6, seed=2), prompt_of(4, 4, 3)]


class Markov:
    """A table of logits by the last token; its own generator of one vocabulary of 4, token 0 ends."""

    name, template, length, eos_ids, vocab_size = "markov", None, 32, frozenset({0}), 4

    def __init__(self, seed: int) -> None:
        self.table = (2 * np.random.default_rng(seed).normal(size=(4, 4))).astype(np.float32)

    def positions(self, prompt):
        return len(prompt.ids)

    def text(self, ids):
        return "".join("_abc"[i] for i in ids if i)

    def stepper(self):
        return MarkovStepper(self.table)


class MarkovStepper:
    vocab_size = 4

    def __init__(self, table):
        self.table = table

    def start(self, prompts):
        self.last = np.array([p.ids[-1] for p in prompts])
        return self.table[self.last]

    def advance(self, ids):
        assert len(ids) == len(self.last)
        self.last = ids
        return self.table[ids]

    def reorder(self, index):
        self.last = self.last[index]


def best_of_all(model: Markov, first: int, longest: int, penalty: float) -> tuple[float, tuple[int, ...]]:
    log_probability = log_softmax(model.table)
    found = []
    for length in range(1, longest + 1):
        for ids in itertools.product(range(4), repeat=length):
            if 0 in ids[:-1] or (ids[-1] != 0 and length < longest):
                continue
            total = sum(log_probability[a, b] for a, b in zip((first, *ids), ids))
            found.append((total / length**penalty, ids))
    return max(found)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("penalty", [-0.5, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_with_a_beam_for_every_sequence_the_best_of_all_is_found(seed, penalty, early):
    model = Markov(seed)
    decoding = Decoding("beam", beams=4**4, length_penalty=penalty, early_stopping=early, max_new_tokens=4)
    prompts = [Prompt((i,)) for i in range(4)]
    for prompt, completion in zip(prompts, generate(model, prompts, decoding)):
        score, ids = best_of_all(model, prompt.ids[-1], 4, penalty)
        assert completion.score == pytest.approx(score, abs=1e-12)
        assert completion.ids == (ids[:-1] if ids[-1] == 0 else ids)
        assert completion.finish_reason == ("stop" if ids[-1] == 0 else "length")


def plain_search(logits, ended, d: Decoding, patient: bool) -> tuple[float, tuple[int, ...]]:
    """Lists and sorting; each beam is read anew in each step. patient: never stops before the longest answer.

    logits: tokens so far -> [V]; ended: whether these tokens are a whole answer.
    """
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, d.max_new_tokens + 1):
        grown = []
        for total, ids in live:
            row = log_softmax(logits(ids))
            grown += [(total + value, (*ids, token)) for token, value in enumerate(row)]
        grown.sort(key=lambda found: -found[0])
        ends = [ended(ids) for _, ids in grown]
        done += [(t / length**d.length_penalty, ids) for (t, ids), end in zip(grown[: d.beams], ends) if end]
        live = [one for one, end in zip(grown, ends) if not end][: d.beams]
        if d.early_stopping and len(done) >= d.beams and not patient:
            return max(done)
    return max(done + [(t / len(ids) ** d.length_penalty, ids) for t, ids in live])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sharpness=st.sampled_from([0.3, 1.5, 4.0]),
    beams=st.integers(1, 6),
    penalty=st.sampled_from([-1.0, 0.0, 0.7, 1.0, 3.0]),
    early=st.booleans(),
    stop=st.sampled_from([(), ("b",), ("ab", "?a")]),
)
def test_beams_are_those_of_a_plain_search(seed, sharpness, beams, penalty, early, stop):
    """Without early stopping the search ends early only where going on to the end gives nothing better."""
    generator = TinyGenerator(TinyModel(seed, sharpness=sharpness))
    decoding = Decoding("beam", beams=beams, length_penalty=penalty, early_stopping=early or beams == 1, max_new_tokens=6, stop=stop)
    for prompt, completion in zip(PROMPTS, generate(generator, PROMPTS, decoding)):
        score, ids = plain_search(
            lambda ids: generator.model.logits(generator.model.read(prompt, ids))[0],  # noqa: B023
            lambda ids: ids[-1] == EOS or any(one in generator.text(ids) for one in stop),
            decoding,
            patient=not decoding.early_stopping,
        )
        assert completion.score == pytest.approx(score, abs=1e-9)
        assert completion.ids == (ids[:-1] if ids[-1] == EOS else ids)


@pytest.mark.parametrize("penalty", [-1.0, -0.2, 0.0, 1.0, 3.0])
def test_without_early_stopping_nothing_better_is_missed(penalty):
    lengths = set()
    for seed in range(60):
        model = Markov(seed)
        decoding = Decoding("beam", beams=2, length_penalty=penalty, early_stopping=False, max_new_tokens=9)
        for first, completion in enumerate(generate(model, [Prompt((i,)) for i in range(4)], decoding)):
            score, _ = plain_search(
                lambda ids: model.table[(first, *ids)[-1]],  # noqa: B023
                lambda ids: ids[-1] == 0,
                decoding,
                patient=True,
            )
            assert completion.score == pytest.approx(score, abs=1e-9)
            lengths.add(len(completion.ids))
    assert len(lengths) > 1


def test_without_early_stopping_a_negative_penalty_waits_for_a_far_likelier_answer():
    model = Markov(0)
    # From 3: 1 or the end; from 1: 2, seldom the end; from 2 the end. Two poor answers are there before 1, 2 has ended.
    rows = {3: [0.06, 0.9, 0.03, 0.01], 1: [0.2, 0.005, 0.79, 0.005], 2: [0.99, 0.004, 0.003, 0.003]}
    for last, row in rows.items():
        model.table[last] = np.log(row)
    answers = {}
    for early in (True, False):
        decoding = Decoding("beam", beams=2, length_penalty=-1.0, early_stopping=early, max_new_tokens=20)
        (answers[early],) = generate(model, [Prompt((3,))], decoding)
    assert answers[True].ids == ()
    assert answers[False].ids == (1, 2)
    assert answers[False].score == pytest.approx(3 * np.log(0.9 * 0.79 * 0.99), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    settings_=st.fixed_dictionaries(
        {
            "min_new_tokens": st.integers(0, 4),
            "repetition_penalty": st.sampled_from([1.0, 1.5]),
            "forbidden": st.sampled_from([(), (3, 5)]),
            "stop": st.sampled_from([(), ("a",)]),
            "contrast": st.sampled_from([None, Contrast("none+unk"), Contrast("unk", 2.0, 0.3)]),
        }
    ),
    penalty=st.sampled_from([0.0, 1.0, 5.0]),
    early=st.booleans(),
)
def test_one_beam_is_greedy_decoding(seed, settings_, penalty, early):
    generator, negatives = TinyGenerator(TinyModel(seed)), Negatives(IMAGE, UNKNOWN)
    greedy = generate(generator, PROMPTS, Decoding(max_new_tokens=9, **settings_), negatives=negatives)
    decoding = Decoding("beam", beams=1, length_penalty=penalty, early_stopping=early, max_new_tokens=9, **settings_)
    beam = generate(generator, PROMPTS, decoding, negatives=negatives)
    assert [(c.ids, c.text, c.finish_reason) for c in beam] == [(c.ids, c.text, c.finish_reason) for c in greedy]


def test_more_beams_find_likelier_answers_somewhere():
    totals = []
    for beams in (1, 8):
        decoding = Decoding("beam", beams=beams, length_penalty=0.0, early_stopping=False, max_new_tokens=6)
        totals.append([c.score for s in range(8) for c in generate(TinyGenerator(TinyModel(s)), PROMPTS, decoding)])
    assert sum(b > a + 1e-9 for a, b in zip(*totals)) > 3


def test_a_prompt_whose_search_has_ended_takes_no_rows():
    generator = TinyGenerator()
    decoding = Decoding("beam", beams=3, max_new_tokens=12)
    alone = [len(list(stream(generator, [p], decoding))) for p in PROMPTS]
    steps = [len(s.rows) for s in generator.steppers]
    assert len(set(steps)) > 1, alone
    generator.steppers.clear()
    generate(generator, PROMPTS, decoding)
    rows = generator.steppers[0].rows
    assert rows[0] == len(PROMPTS)
    assert rows[1:] == [3 * sum(n > step for n in steps) for step in range(1, max(steps))]


def test_the_score_comes_with_the_last_event_of_each_answer():
    events = list(stream(TinyGenerator(), PROMPTS, Decoding("beam", max_new_tokens=6)))
    assert all((e.score is None) == (e.finish_reason is None) for e in events)
    assert sorted(e.row for e in events if e.finish_reason) == [0, 1, 2, 3]


@given(st.lists(st.integers(-3, 3) | st.just(float("-inf")), min_size=1, max_size=30), st.integers(1, 40))
def test_ranks_are_a_stable_sort_without_what_is_out(values, first):
    totals = np.array(values, np.float64)
    expected = [i for i in sorted(range(len(values)), key=lambda i: -totals[i]) if totals[i] > -np.inf]
    assert [int(i) for i in _ranked(totals, first)] == expected
