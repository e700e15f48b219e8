"""The loop over a small recurrent model: batches, ends, limits, sampling, the second branch."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.tiny_generator import EOS, IMAGE, PIECES, UNKNOWN, TinyGenerator, TinyModel, prompt_of
from vlm.config.errors import RequestError, RunFailed
from vlm.runtime.generation import (
    Branches,
    Contrast,
    Decoding,
    Generator,
    Negatives,
    Prompt,
    Stepper,
    generate,
    stream,
    with_unknown,
    without_pictures,
)
from vlm.runtime.generation.draws import row_key, uniform
from vlm.runtime.generation.logits import softmax

PROMPTS = [
    prompt_of(IMAGE, 3, 4, seed=1),
    prompt_of(5),
    prompt_of(3, IMAGE, 6, IMAGE, 5, seed=2),
    prompt_of(4, 4, 3),
    prompt_of(IMAGE, 6, seed=3),
]
NEGATIVES = Negatives(IMAGE, UNKNOWN, lambda prompt: {k: [np.full_like(p, 0.2) for p in v] for k, v in prompt.pictures.items()})
EVERY = {
    "greedy": Decoding(max_new_tokens=12),
    "sampled": Decoding("sample", temperature=0.8, top_k=9, top_p=0.95, min_p=0.01, max_new_tokens=12, seed=4),
    "penalised": Decoding("sample", repetition_penalty=1.4, forbidden=(7, 8), min_new_tokens=3, max_new_tokens=12, seed=5),
    "stopped": Decoding("sample", stop=("ab", "STOP", "é"), max_new_tokens=12, seed=6),
    "contrasted": Decoding("sample", contrast=Contrast("none+unk", 1.0, 0.1), max_new_tokens=12, seed=7),
    "greedy contrasted": Decoding(contrast=Contrast("mean-image", 0.5, 0.05), max_new_tokens=12),
    "beams": Decoding("beam", beams=3, max_new_tokens=8),
    "beams contrasted": Decoding("beam", beams=3, max_new_tokens=8, stop=("b",), contrast=Contrast("unk"), early_stopping=False),
}
every = pytest.mark.parametrize("decoding", EVERY.values(), ids=EVERY)


def run(decoding, prompts=PROMPTS, generator=None, **kwargs):
    generator = generator or TinyGenerator()
    return generate(generator, prompts, decoding, negatives=NEGATIVES if decoding.contrast else None, **kwargs)


def test_the_test_classes_fulfil_the_protocols():
    assert isinstance(TinyGenerator(), Generator)
    assert isinstance(TinyGenerator().stepper(), Stepper)


@every
def test_debias_lvlm_cached_equals_recomputed(decoding):
    cached, recomputed = run(decoding), run(decoding, generator=TinyGenerator(cached=False))
    assert [(c.ids, c.text, c.finish_reason) for c in cached] == [(c.ids, c.text, c.finish_reason) for c in recomputed]
    assert len({c.ids for c in cached}) > 1


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(EVERY)),
    rows=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=7),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 3),
)
def test_any_batch_and_order_gives_the_same_answers(name, rows, batch_size, seed):
    generator = TinyGenerator(TinyModel(seed))
    alone = [run(EVERY[name], [PROMPTS[r]], generator, keys=[f"row {r}"])[0] for r in range(len(PROMPTS))]
    together = run(EVERY[name], [PROMPTS[r] for r in rows], generator, keys=[f"row {r}" for r in rows], batch_size=batch_size)
    assert together == [alone[r] for r in rows]


@every
def test_events_join_to_the_completions(decoding):
    generator = TinyGenerator()
    events = list(stream(generator, PROMPTS, decoding, negatives=NEGATIVES))
    for row, completion in enumerate(run(decoding)):
        mine = [e for e in events if e.row == row]
        assert [e.finish_reason for e in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == completion.finish_reason
        assert "".join(e.text for e in mine) == completion.text
        ids = [e.token for e in mine]
        assert tuple(ids[:-1] if ids[-1] == EOS else ids) == completion.ids
        assert len(ids) <= decoding.max_new_tokens
        text = generator.text(ids)
        assert text.startswith(completion.text) if decoding.stop else text == completion.text
        assert not any(stop in completion.text for stop in decoding.stop)


def test_greedy_is_the_argmax_of_each_step_read_anew():
    model = TinyModel()
    for prompt, completion in zip(PROMPTS, run(EVERY["greedy"])):
        ids: list[int] = []
        while len(ids) < 12 and (token := int(model.logits(model.read(prompt, ids)).argmax())) != EOS:
            ids.append(token)
        assert completion.ids == tuple(ids)
        assert completion.finish_reason == ("length" if len(ids) == 12 else "stop")


def test_temperature_0_samples_the_argmax():
    assert [c.ids for c in run(Decoding("sample", temperature=0.0, max_new_tokens=12))] == [c.ids for c in run(EVERY["greedy"])]


def test_sampled_tokens_have_the_probabilities_of_the_model():
    model = TinyModel()
    prompt = PROMPTS[0]
    completions = run(Decoding("sample", max_new_tokens=1, seed=1), [prompt] * 4000)
    counts = np.bincount([c.ids[0] if c.ids else EOS for c in completions], minlength=model.vocab_size)
    expected = 4000 * softmax(model.logits(model.read(prompt)))[0]
    likely = expected > 5
    assert likely.sum() > 3
    statistic = ((counts - expected) ** 2 / expected)[likely].sum()
    # Mean and variance of chi-square are its degrees of freedom and twice them: five deviations.
    assert statistic < likely.sum() + 5 * math.sqrt(2 * likely.sum())


def test_another_seed_or_key_gives_other_draws_and_the_same_gives_the_same():
    prompts = [PROMPTS[0]] * 6
    first = [c.ids for c in run(EVERY["sampled"], prompts)]
    assert first == [c.ids for c in run(EVERY["sampled"], prompts)]
    assert len(set(first)) > 3
    assert first != [c.ids for c in run(EVERY["sampled"], prompts, keys="abcdef")]


def test_rows_that_ended_are_computed_no_more():
    generator = TinyGenerator()
    completions = run(EVERY["greedy"], generator=generator)
    lengths = [len(c.ids) + (c.finish_reason == "stop") for c in completions]
    assert len(set(lengths)) > 1
    # A row is computed once for its prompt and once for each token but its last.
    assert generator.steppers[0].rows == [sum(n > step for n in lengths) for step in range(max(lengths))]


def test_no_end_before_min_new_tokens():
    model = TinyModel()
    model.O[:] = 0  # every token is as likely as any other
    generator = TinyGenerator(model)
    free = Decoding("sample", allowed=(EOS, 3), max_new_tokens=9, seed=2)
    assert min(len(c.ids) for c in run(free, [PROMPTS[1]] * 20, generator)) < 5
    bound = Decoding("sample", allowed=(EOS, 3), min_new_tokens=5, max_new_tokens=9, seed=2)
    lengths = [len(c.ids) for c in run(bound, [PROMPTS[1]] * 20, generator)]
    assert min(lengths) == 5
    assert max(lengths) > 5


def test_only_allowed_tokens_and_no_forbidden_one():
    completions = run(Decoding("sample", allowed=(3, 4, 5), forbidden=(4,), max_new_tokens=12), PROMPTS * 5)
    assert set().union(*(c.ids for c in completions)) == {3, 5}


def test_the_cut_off_cannot_leave_a_row_without_tokens_that_are_allowed():
    greatest = {int(i) for p in PROMPTS for i in [TinyModel().logits(TinyModel().read(p)).argmax()]}
    decoding = Decoding("sample", forbidden=tuple(greatest), contrast=Contrast("unk", 1.0, 1.0), max_new_tokens=5)
    assert not any(set(c.ids) & greatest for c in run(decoding))


def test_repetition_penalty_reads_prompt_and_answer():
    free = run(Decoding(max_new_tokens=20, forbidden=(EOS,)))
    bound = run(Decoding(max_new_tokens=20, forbidden=(EOS,), repetition_penalty=1e6))
    assert sum(len(set(c.ids)) for c in bound) > sum(len(set(c.ids)) for c in free)
    for prompt, completion in zip(PROMPTS, bound):
        positive = TinyModel().logits(TinyModel().read(prompt))[0] > 0
        fresh = positive & ~np.isin(np.arange(len(positive)), [*prompt.ids, EOS])
        assert not fresh.any() or completion.ids[0] not in prompt.ids


# The second branch


@pytest.mark.parametrize("negative", ["none", "unk", "none+unk", "mean-image"])
def test_debias_lvlm_alpha_0_and_beta_to_0_is_plain_sampling(negative):
    plain = Decoding("sample", temperature=0.9, top_p=0.95, max_new_tokens=12, seed=11)
    for beta in (0.0, 1e-300):
        contrasted = Decoding("sample", temperature=0.9, top_p=0.95, max_new_tokens=12, seed=11, contrast=Contrast(negative, 0.0, beta))
        assert run(contrasted) == run(plain)


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
def test_debias_lvlm_beta_1_keeps_only_the_original_argmax(strategy):
    decoding = Decoding(strategy, max_new_tokens=12, contrast=Contrast("none", 2.0, 1.0))
    assert [c.ids for c in run(decoding)] == [c.ids for c in run(EVERY["greedy"])]


@pytest.mark.parametrize("negative", ["none", "unk", "none+unk", "noise-image"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 7.0])
def test_debias_lvlm_equal_branches_decode_as_one(negative, alpha):
    prompts = [prompt_of(3, 4), prompt_of(5)]
    decoding = Decoding("sample", max_new_tokens=12, seed=3, contrast=Contrast(negative, alpha, 0.0))
    assert run(decoding, prompts) == run(Decoding("sample", max_new_tokens=12, seed=3), prompts)


def test_debias_lvlm_each_step_is_the_contrast_of_two_readings_of_the_same_tokens():
    model, alpha, beta = TinyModel(), 1.5, 0.05
    decoding = Decoding("sample", max_new_tokens=12, seed=9, temperature=0.7, contrast=Contrast("none+unk", alpha, beta))
    for number, (prompt, completion) in enumerate(zip(PROMPTS, run(decoding))):
        key, ids = row_key(9, number), list(completion.ids)
        for step, token in enumerate([*ids, EOS][:12]):
            seen = ids[:step]
            given_logits, none, unk = (
                model.logits(model.read(p, seen))[0].astype(np.float64)
                for p in (prompt, without_pictures(prompt, IMAGE), with_unknown(prompt, IMAGE, UNKNOWN))
            )
            mixed = (1 + alpha) * given_logits - alpha * (none + unk) / 2
            mixed[given_logits < given_logits.max() + math.log(beta)] = -np.inf
            share = np.cumsum(softmax(mixed / 0.7))
            u = uniform(key, step)
            assert (share[token - 1] if token else 0) - 1e-5 <= u <= share[token] + 1e-5


def test_debias_lvlm_every_branch_has_its_own_stepper_and_is_reordered_alike():
    generator = TinyGenerator()
    run(EVERY["contrasted"], generator=generator)
    rows = [s.rows for s in generator.steppers]
    assert len(rows) == 3
    assert rows[0] == rows[1] == rows[2]
    assert len(set(rows[0])) > 1


def test_a_strong_contrast_changes_answers():
    assert run(Decoding(max_new_tokens=12)) != run(Decoding(max_new_tokens=12, contrast=Contrast("none", 5.0, 0.0)))


def test_negative_prompts():
    prompt = prompt_of(3, IMAGE, 4, IMAGE)
    assert without_pictures(prompt, IMAGE).ids == (3, 4)
    assert with_unknown(prompt, IMAGE, UNKNOWN).ids == (3, UNKNOWN, 4, UNKNOWN)
    assert not without_pictures(prompt, IMAGE).pictures
    assert not with_unknown(prompt, IMAGE, UNKNOWN).pictures
    assert [p.ids for p in NEGATIVES.of(prompt, "none+unk")] == [(3, 4), (3, UNKNOWN, 4, UNKNOWN)]
    other = NEGATIVES.of(prompt, "noise-image")[0]
    assert other.ids == prompt.ids
    assert [float(p.mean()) for p in other.pictures["image"]] == pytest.approx([0.2, 0.2])
    assert len(prompt.pictures["image"]) == 2


@pytest.mark.parametrize(
    ("negatives", "negative", "prompt", "message"),
    [
        (None, "none", prompt_of(3), "placeholder of pictures"),
        (Negatives(IMAGE), "unk", prompt_of(3), "unknown or padding token"),
        (Negatives(IMAGE), "mean-image", prompt_of(3), "needs other pictures"),
        (Negatives(IMAGE, UNKNOWN, lambda prompt: {}), "noise-image", prompt_of(IMAGE, 3), "not as many"),
        (Negatives(IMAGE), "none", prompt_of(IMAGE), "nothing is left"),
    ],
)
def test_a_contrast_that_cannot_be_made_is_refused_before_any_work(negatives, negative, prompt, message):
    generator = TinyGenerator()
    with pytest.raises(RequestError, match=message):
        stream(generator, [prompt], Decoding(contrast=Contrast(negative), max_new_tokens=2), negatives=negatives)
    assert generator.steppers == []


# Limits and ends


def test_prompt_and_answer_must_fit_and_the_error_names_the_prompt():
    generator = TinyGenerator(length=10)
    prompts = [prompt_of(3), prompt_of(IMAGE, 3, 4)]
    assert len(generate(generator, prompts, Decoding(max_new_tokens=5))) == 2
    made = len(generator.steppers)
    with pytest.raises(RequestError, match=r"prompt 1: takes 5 positions and the answer up to 6, but tiny has 10(?s:.*)at most 5"):
        stream(generator, prompts, Decoding(max_new_tokens=6))
    assert len(generator.steppers) == made


def test_negative_prompts_must_fit_too():
    # Told that 3 is the placeholder and 0 the unknown token, the negative prompt has two pictures and is the longer one.
    generator = TinyGenerator(length=7)
    decoding = Decoding(max_new_tokens=4, contrast=Contrast("unk"))
    with pytest.raises(RequestError, match="prompt 0: takes 7"):
        generate(generator, [prompt_of(3, 3, 4)], decoding, negatives=Negatives(3, IMAGE))


def test_an_empty_prompt_is_refused():
    with pytest.raises(RequestError, match="prompt 0: has no tokens"):
        generate(TinyGenerator(), [Prompt(())], Decoding())


def test_keys_must_be_as_many_as_prompts():
    with pytest.raises(RequestError, match="1 keys for 2 prompts"):
        generate(TinyGenerator(), PROMPTS[:2], Decoding(), keys=[1])


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
def test_no_prompts_give_no_answers(strategy):
    assert generate(TinyGenerator(), [], Decoding(strategy)) == []


class Fixed:
    """A model that says the given tokens whatever it reads."""

    vocab_size = len(PIECES)

    def __init__(self, said):
        self.said, self.at = said, 0

    def start(self, prompts):
        self.n = len(prompts)
        return self.next()

    def next(self):
        out = np.zeros((self.n, self.vocab_size), np.float32)
        out[:, self.said[self.at]] = 9
        self.at += 1
        return out

    def advance(self, ids):
        return self.next()

    def reorder(self, index):
        self.n = len(index)


class FixedGenerator(TinyGenerator):
    def __init__(self, said):
        super().__init__()
        self.said = said

    def stepper(self):
        return Fixed(self.said)


E1, E2, STOP, A, B, AB = 7, 8, 12, 3, 4, 6


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
@pytest.mark.parametrize(
    ("said", "stop", "ids", "text", "reason"),
    [
        ([A, EOS, B], (), (A,), "a", "stop"),
        ([A, B, A], (), (A, B, A), "aba", "length"),
        ([EOS], (), (), "", "stop"),
        ([E1, E2, A], (), (E1, E2, A), "éa", "length"),
        ([A, B, E1], (), (A, B, E1), "ab\ufffd", "length"),
        ([E1, EOS], (), (E1,), "\ufffd", "stop"),
        ([A, B, A], ("ba",), (A, B, A), "a", "stop"),
        ([A, B, A], ("bab",), (A, B, A), "aba", "length"),
        ([A, B, EOS], ("abc",), (A, B), "ab", "stop"),
        ([AB, A, A], ("b",), (AB,), "a", "stop"),
        ([A, E1, E2], ("é",), (A, E1, E2), "a", "stop"),
        ([STOP, A, A], ("STOP",), (STOP,), "", "stop"),
        ([A, B, E1], ("\ufffd",), (A, B, E1), "ab", "stop"),
    ],
)
def test_ends(strategy, said, stop, ids, text, reason):
    decoding = Decoding(strategy, beams=1, temperature=0.01, max_new_tokens=3, stop=stop)
    (completion,) = generate(FixedGenerator(said), [prompt_of(3)], decoding)
    assert (completion.ids, completion.text, completion.finish_reason) == (ids, text, reason)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
def test_logits_that_are_not_finite_fail_the_run(strategy, value):
    model = TinyModel()
    model.O[0, 3] = value
    with pytest.raises(RunFailed, match="not finite"):
        generate(TinyGenerator(model), PROMPTS, Decoding(strategy))


def test_logits_of_another_shape_fail_the_run():
    stepper = TinyGenerator().stepper()
    stepper.vocab_size += 1
    with pytest.raises(RunFailed, match="shape"):
        Branches([stepper]).start([PROMPTS])


@pytest.mark.parametrize(
    ("decoding", "message"),
    [
        (Decoding(forbidden=(99,)), "token 99 is not in the vocabulary of 13"),
        (Decoding(allowed=(3,), forbidden=(3,)), "no token is allowed"),
        (Decoding(allowed=(EOS,), min_new_tokens=1), "no token is allowed"),
    ],
)
def test_impossible_vocabulary_masks(decoding, message):
    with pytest.raises(RequestError, match=message):
        stream(TinyGenerator(), PROMPTS, decoding)


@pytest.mark.parametrize(
    "bad",
    [
        {"strategy": "best"},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"beams": 0},
        {"length_penalty": math.inf},
        {"max_new_tokens": 0},
        {"min_new_tokens": 65},
        {"stop": ("",)},
        {"stop": "END"},
        {"allowed": ()},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(bad):
    with pytest.raises(RequestError, match=rf"decoding\.{next(iter(bad))}: "):
        Decoding(**bad)


@pytest.mark.parametrize("bad", [{"negative": "all"}, {"alpha": math.nan}, {"beta": -0.1}, {"beta": 1.1}], ids=str)
def test_contrasts_out_of_range_are_refused_by_name(bad):
    with pytest.raises(RequestError, match=rf"decoding\.contrast\.{next(iter(bad))}: "):
        Contrast(**bad)


def test_generation_needs_neither_torch_nor_pydantic_nor_onnxruntime():
    script = """
import sys
import vlm.runtime.generation
heavy = {"torch", "pydantic", "onnxruntime", "transformers"} & {name.partition(".")[0] for name in sys.modules}
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
