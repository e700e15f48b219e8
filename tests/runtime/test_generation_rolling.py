"""Answers that begin and end at any time are those that are written alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.tiny_generator import EOS, IMAGE, TinyGenerator, prompt_of
from vlm.config.errors import RequestError, RunFailed
from vlm.runtime.generation import Contrast, Decoding, Failed, Request, Rolling, generate

SETTINGS = [
    Decoding(max_new_tokens=9),
    Decoding(max_new_tokens=1),
    Decoding(max_new_tokens=12, stop=("ab", "c")),
    Decoding(strategy="sample", temperature=1.4, top_p=0.9, max_new_tokens=7, seed=4),
    Decoding(strategy="sample", temperature=0.8, top_k=5, repetition_penalty=1.3, max_new_tokens=20, min_new_tokens=6),
    Decoding(max_new_tokens=5, forbidden=(EOS,), allowed=(EOS, 3, 4, 5)),
]


def request(number):
    ids = [3 + (number * 7 + k) % 9 for k in range(1 + number % 5)] + [IMAGE] * (number % 2)
    return Request(prompt_of(*ids, seed=number), SETTINGS[number % len(SETTINGS)], f"key {number}")


def alone(generator, asked):
    return generate(generator, [asked.prompt], asked.decoding, keys=[asked.key])[0]


def written(events, eos_ids):
    """(ids, text, finish reason) of one row's events, as `Completion` has them."""
    last = events[-1]
    ids = tuple(e.token for e in events if e.finish_reason != "stop" or e.token not in eos_ids)
    return ids, "".join(e.text for e in events), last.finish_reason


@pytest.mark.parametrize("cached", [True, False])
@given(arrivals=st.lists(st.integers(0, 4), min_size=1, max_size=8), drops=st.sets(st.integers(0, 20), max_size=4))
def test_every_answer_is_the_one_that_is_written_alone(cached, arrivals, drops):
    generator, rolling = TinyGenerator(cached=cached), Rolling(TinyGenerator(cached=cached))
    asked, events, number = {}, {}, 0
    while arrivals or len(rolling):
        for _ in range(arrivals.pop() if arrivals else 0):
            (row,) = rolling.add([request(number)])
            asked[row], events[row] = request(number), []
            number += 1
        if len(rolling) > 2:
            rolling.drop(drops)
        before = len(rolling)
        told = rolling.step()
        assert len(told) == before
        for event in told:
            events[event.row].append(event)
        assert len(rolling) == before - sum(event.finish_reason is not None for event in told)
    assert rolling.step() == []
    for row, own in events.items():
        whole = alone(generator, asked[row])
        if own and own[-1].finish_reason is not None:
            assert written(own, generator.eos_ids) == (whole.ids, whole.text, whole.finish_reason)
        else:
            assert row in drops
            assert tuple(event.token for event in own) == whole.ids[: len(own)]


def test_prompts_that_come_together_are_read_together_and_names_are_never_used_twice():
    generator = TinyGenerator()
    rolling = Rolling(generator)
    assert rolling.add([]) == []
    assert rolling.add([request(n) for n in range(3)]) == [0, 1, 2]
    assert generator.steppers[-1].rows == [3]
    rolling.drop({0, 1, 2, 77})
    assert len(rolling) == 0
    assert rolling.step() == []
    assert rolling.add([request(4)]) == [3]


@pytest.mark.parametrize(
    ("decoding", "ids"),
    [
        (Decoding(strategy="beam"), (3,)),
        (Decoding(contrast=Contrast()), (3,)),
        (Decoding(max_new_tokens=500), (3,)),
        (Decoding(), ()),
        (Decoding(allowed=(99,)), (3,)),
    ],
)
def test_what_cannot_be_written_is_refused_and_the_others_go_on(decoding, ids):
    generator, rolling = TinyGenerator(), Rolling(TinyGenerator())
    (first,) = rolling.add([request(0)])
    events = rolling.step()
    with pytest.raises(RequestError):
        rolling.add([request(1), Request(prompt_of(*ids), decoding, "x")])
    assert len(rolling) == 1
    while len(rolling):
        events += rolling.step()
    assert {event.row for event in events} == {first}
    assert written(events, generator.eos_ids)[0] == alone(generator, request(0)).ids


class Spoilt(TinyGenerator):
    """Rows whose prompt has `token` get logits that are no numbers, once they have written two tokens."""

    def __init__(self, token):
        super().__init__()
        self.token = token

    def stepper(self):
        stepper, token = super().stepper(), self.token
        inner_start, inner_advance, inner_reorder, inner_join = stepper.start, stepper.advance, stepper.reorder, stepper.join
        stepper.bad, stepper.age = [], []

        def start(prompts):
            stepper.bad, stepper.age = [token in p.ids for p in prompts], [0] * len(prompts)
            return inner_start(prompts)

        def advance(ids):
            logits = inner_advance(ids)
            stepper.age = [age + 1 for age in stepper.age]
            logits[[bad and age >= 2 for bad, age in zip(stepper.bad, stepper.age)]] = np.nan
            return logits

        def reorder(index):
            inner_reorder(index)
            stepper.bad, stepper.age = [stepper.bad[i] for i in index], [stepper.age[i] for i in index]

        def join(other):
            inner_join(other)
            stepper.bad, stepper.age = stepper.bad + other.bad, stepper.age + other.age

        stepper.start, stepper.advance, stepper.reorder, stepper.join = start, advance, reorder, join
        return stepper


def test_a_row_without_finite_logits_ends_and_the_others_go_on():
    forever = Decoding(max_new_tokens=8, forbidden=(EOS,))
    rolling = Rolling(Spoilt(11))
    good, bad = rolling.add([Request(prompt_of(3, 4), forever, 0), Request(prompt_of(3, 11), forever, 1)])
    told = []
    while len(rolling):
        told += rolling.step()
    assert [type(t) for t in told if t.row == bad] == [type(told[0])] * 2 + [Failed]
    failed = next(t for t in told if isinstance(t, Failed))
    assert isinstance(failed.error, RunFailed)
    assert "not finite" in str(failed.error)
    tokens = tuple(t.token for t in told if t.row == good)
    assert tokens == generate(TinyGenerator(), [prompt_of(3, 4)], forever)[0].ids
