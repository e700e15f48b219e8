"""Questions about pictures with short answers: exact match, yes-no figures, and what is left without the picture.

n samples, q questions, S statistics of a question. Sources: limber (shuffled control), debias-lvlm (yes-no figures,
calibration error, calibrated answers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from vlm.evaluation.controlled import MAIN, Figures, controlled, put, ratio
from vlm.evaluation.pictured import Pictured
from vlm.evaluation.result import Result
from vlm.evaluation.text_metrics import (
    YES_NO_COUNTED,
    YES_NO_FIGURES,
    calibration_error,
    exact,
    normalise_answer,
    said_yes,
    yes_no_of,
    yes_no_statistics,
)
from vlm.evaluation.thumbnail import thumbnails
from vlm.evaluation.writing import (
    Ask,
    Integers,
    WritingTask,
    arms_of,
    balanced,
    filled,
    need,
    one_place,
    texts_at,
    written,
)
from vlm.evaluation.yes_no import calibrated_yes, yes_confidence

if TYPE_CHECKING:
    from vlm.runtime.generation import Calibration

Floats = NDArray[np.float64]

_RESERVED = frozenset({"exact", "yes_no", "shuffled", "none", "over_shuffled", "over_none"})
"""Names in the figures that no kind may take."""


class VqaOptions(WritingTask):
    """Percent of questions answered right after the normalisation of answers, by kind where questions have one.

    With `decoding.calibrate` a question whose answer is yes or no is answered by the likelier of the two after the
    correction; other questions are written as ever.
    """

    closed: ClassVar[bool] = True
    task: Literal["vqa"] = "vqa"
    max_new_tokens: int = Field(8, ge=1, description="longest answer in tokens")
    prompt: str = Field("{}", description="what the user says, with {} for the question")
    questions_from: str = Field(
        "questions", description="field with a list of questions, each with question, answer and perhaps kind"
    )
    question: str = Field("question", description="field with the one question of a sample without such a list")
    answer: str = Field("answer", description="field with its answer, or several that are all right")
    ask: str | None = Field(None, description="one question for all samples, in place of the question field")
    draw: Literal["all", "one"] = Field("all", description="every question, or one drawn for each sample")
    balance: Literal["yes-no", "answers"] | None = Field(
        None,
        description="within each kind keep as many yes as no (yes-no), or every answer as often as its rarest (answers)",
    )
    calibration: bool = Field(
        False, description="also the calibration error of yes and no by their probabilities as the first token"
    )

    def calibrated(self) -> Calibration | None:
        """The correction that `decoding.calibrate` asks for."""
        from vlm.decoding import GenerateOptions

        given = GenerateOptions.model_validate(self.decoding).calibrate
        return None if given is None else given.to_runtime()

    @field_validator("prompt")
    @classmethod
    def _one(cls, value: str) -> str:
        return one_place(value)

    def run(self, samples: Pictured, batch: int) -> Result:
        return vqa(samples, self, batch)


@dataclass(frozen=True)
class Question:
    """sample: its number; answers: the right ones; kind: '' where questions have none."""

    sample: int
    text: str
    answers: tuple[str, ...]
    kind: str


def _kind(value: Any) -> str:
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in value) if isinstance(value, str) else ""
    return f"kind-{name}" if name in _RESERVED else name


def questions_of(samples: Pictured, options: VqaOptions) -> list[Question]:
    """All questions of the samples, in order. One without a question or an answer is left out."""
    out = []
    for number, fields in enumerate(samples.fields):
        listed = None if options.ask is not None else fields.get(options.questions_from)
        entries: Sequence[Any] = listed if isinstance(listed, list) else [fields]
        names = ("question", "answer") if isinstance(listed, list) else (options.question, options.answer)
        for entry in entries:
            if not isinstance(entry, Mapping):
                continue
            asked = (options.ask,) if options.ask is not None else texts_at(entry, [names[0]])
            answers = texts_at(entry, [names[1]]) or texts_at(entry, ["answers"])
            if asked and answers:
                out.append(Question(number, asked[0], answers, _kind(entry.get("kind"))))
    return out


def drawn(questions: Sequence[Question], seed: int) -> list[Question]:
    """One question of each sample, by the seed and the sample's number."""
    by_sample: dict[int, list[Question]] = {}
    for question in questions:
        by_sample.setdefault(question.sample, []).append(question)
    return [own[int(np.random.default_rng([seed, 8, number]).integers(len(own)))] for number, own in by_sample.items()]


def balance(questions: Sequence[Question], how: Literal["yes-no", "answers"], seed: int) -> list[Question]:
    """A seeded draw in which, within each kind, answers are equally frequent; in the order given.

    yes-no: only questions answered yes or no are thinned, and a kind that has only one of the two loses them.
    """
    groups: dict[str, dict[str, list[int]]] = {}
    kept: list[int] = []
    for i, question in enumerate(questions):
        said = normalise_answer(question.answers[0])
        if how == "yes-no" and said not in ("yes", "no"):
            kept.append(i)
        else:
            groups.setdefault(question.kind, {}).setdefault(said, []).append(i)
    generator = np.random.default_rng([seed, 9])
    for answers in groups.values():
        least = 0 if how == "yes-no" and len(answers) < 2 else min(map(len, answers.values()))
        for places in answers.values():
            kept += generator.choice(places, size=least, replace=False).tolist()
    return [questions[i] for i in sorted(kept)]


def _is_yes_no(question: Question) -> bool:
    return all(normalise_answer(answer) in ("yes", "no") for answer in question.answers)


def vqa_statistics(questions: Sequence[Question], answers: Sequence[str], kinds: Sequence[str]) -> Floats:
    """[q, 2 + 2 K + 5] right and 1; for each kind right and 1; the five of yes and no. Only a question's own columns
    are not 0; their sums are what `vqa_figures` reads."""
    out = np.zeros((len(questions), 2 + 2 * len(kinds) + 5))
    place = {kind: 2 + 2 * k for k, kind in enumerate(kinds)}
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        right = exact(answer, question.answers)
        out[i, :2] = right, 1
        if question.kind in place:
            out[i, place[question.kind] : place[question.kind] + 2] = right, 1
        if _is_yes_no(question):
            true = normalise_answer(question.answers[0]) == "yes"
            out[i, -5:] = yes_no_statistics([said_yes(answer)], [true])[0]
    return out


def vqa_figures(kinds: Sequence[str], yes_no: bool) -> Figures:
    """exact, KIND/exact of each kind, and yes_no/... where questions are answered yes or no."""
    paths = ["exact", *(f"{kind}/exact" for kind in kinds)]
    counted: list[tuple[int, ...] | None] = [(1 + 2 * k,) for k in range(len(paths))]
    columns = 2 * len(paths)
    if yes_no:
        paths += [f"yes_no/{name}" for name in YES_NO_FIGURES]
        counted += [c and tuple(columns + k for k in c) for c in YES_NO_COUNTED]

    def of(sums: Floats) -> Floats:
        parts = [ratio(sums[..., k], sums[..., k + 1]) for k in range(0, columns, 2)]
        if yes_no:
            figures = yes_no_of(sums[..., columns:])
            figures = np.where(sums[..., columns:].sum(-1, keepdims=True) > 0, figures, np.nan)
            parts += [figures[..., k] for k in range(len(YES_NO_FIGURES))]
        return np.stack(parts, axis=-1)

    return Figures(tuple(paths), of, (100.0,) * len(paths), tuple(counted))


def vqa(samples: Pictured, options: VqaOptions, batch: int) -> Result:
    """Intervals draw concepts (or samples) with all their questions. Raises DataError when there is no question.

    chance: always the most frequent answer of the question's kind; for F1, always yes.
    """
    questions = questions_of(samples, options)
    need(
        len(questions),
        f"no question with an answer in {options.questions_from!r} or {options.question!r} and {options.answer!r}",
        "name the field with: --questions-from FIELD, or question and answer in the preset",
    )
    if options.balance is not None:
        questions = balance(questions, options.balance, options.seed)
        need(len(questions), f"no question that balance = {options.balance!r} leaves", "leave balance out")
    if options.draw == "one":
        questions = drawn(questions, options.seed)
    kinds = [kind for kind in dict.fromkeys(q.kind for q in questions) if kind]
    yes_no = np.array([_is_yes_no(question) for question in questions])
    asks = [Ask(question.sample, filled(options.prompt, question.text)) for question in questions]
    arms, permutes = arms_of(samples, options.controls, options.seed)
    calibrated = _calibrated(samples, asks, np.flatnonzero(yes_no), arms, options, batch)
    answers = _answers(samples, asks, arms, options, batch, np.flatnonzero(yes_no), calibrated)
    statistics = {arm: vqa_statistics(questions, texts, kinds) for arm, texts in answers.items()}
    figures = vqa_figures(kinds, bool(yes_no.any()))
    concepts = samples.concepts()
    # Questions of one picture are no independent evidence: without a concept the sample is the cluster.
    clusters = [(0, c) if (c := concepts[q.sample]) is not None else (1, q.sample) for q in questions]
    found = controlled(
        statistics, figures, clusters=clusters, resamples=options.resamples, seed=options.seed
    )
    details: dict[str, Any] = {
        "questions": len(questions),
        "kinds": dict(Counter(q.kind for q in questions if q.kind)),
        "yes_no_questions": int(yes_no.sum()),
        "clusters": found.clusters,
        "empty": sum(not text for text in answers[MAIN]),
    }
    if "shuffled" in arms:
        details["shuffled"] = "permutation" if permutes else "drawn with replacement: one concept has over half"
    if options.calibration and yes_no.any():
        for arm, shown in arms.items():
            value = _calibration(samples, questions, asks, np.flatnonzero(yes_no), shown, batch, calibrated.get(arm))
            put(found.metrics, f"{arm}/yes_no/calibration_error" if arm else "yes_no/calibration_error", value)
    right = statistics[MAIN][:, 0] > 0
    return Result(
        task="vqa",
        name=options.title,
        samples=len({q.sample for q in questions}),
        metrics=found.metrics,
        intervals=found.intervals,
        chance=_chance(questions, figures, kinds),
        details=details,
        examples=_examples(samples, questions, answers, right, options),
    )


def _calibrated(
    samples: Pictured,
    asks: Sequence[Ask],
    closed: Integers,
    arms: Mapping[str, Integers | None],
    options: VqaOptions,
    batch: int,
) -> dict[str, Floats]:
    """arm -> the corrected probability of yes of each yes-no question; {} without `decoding.calibrate`."""
    calibration = options.calibrated()
    if calibration is None or not len(closed):
        return {}
    chosen = [asks[i] for i in closed]
    return {arm: calibrated_yes(samples, chosen, shown, calibration, batch) for arm, shown in arms.items()}


def _answers(
    samples: Pictured,
    asks: Sequence[Ask],
    arms: Mapping[str, Integers | None],
    options: VqaOptions,
    batch: int,
    closed: Integers,
    calibrated: Mapping[str, Floats],
) -> dict[str, list[str]]:
    """arm -> the answer to each question: yes or no by the corrected probability where there is one, else written."""
    if not calibrated:
        return written(samples, asks, arms, options.settings(), batch)
    # The whole list is written, that keys of draws, and so open answers, are those of the plain task.
    open_ = len(closed) < len(asks)
    answers = written(samples, asks, arms, options.settings(), batch) if open_ else {arm: [""] * len(asks) for arm in arms}
    for arm, yes in calibrated.items():
        for place, value in zip(closed.tolist(), yes.tolist()):
            answers[arm][place] = "yes" if value > 0.5 else "no"
    return answers


def _calibration(
    samples: Pictured,
    questions: Sequence[Question],
    asks: Sequence[Ask],
    chosen: Integers,
    shown: Integers | None,
    batch: int,
    corrected: Floats | None = None,
) -> float:
    """Percent: |confidence in the likelier of yes and no - share right|, over ten bins. corrected: p(yes), if calibrated."""
    yes = yes_confidence(samples, [asks[i] for i in chosen], shown, batch) if corrected is None else corrected
    true = np.array([normalise_answer(questions[i].answers[0]) == "yes" for i in chosen])
    return round(100 * calibration_error(np.maximum(yes, 1 - yes), (yes > 0.5) == true), 6)  # of a tie the answer is no


def _chance(questions: Sequence[Question], figures: Figures, kinds: Sequence[str]) -> dict[str, Any]:
    by_kind: dict[str, Counter[str]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, Counter()).update({normalise_answer(a) for a in question.answers})
    most = {kind: counts.most_common(1)[0][0] for kind, counts in by_kind.items()}
    sums = vqa_statistics(questions, [most[q.kind] for q in questions], kinds).sum(0)
    out: dict[str, Any] = {}
    for path, value in zip(figures.paths, figures.of(sums).tolist()):
        if not path.startswith("yes_no/") or path == "yes_no/accuracy":
            put(out, path, round(100 * value, 6))
    always = vqa_statistics(questions, ["yes"] * len(questions), kinds).sum(0)
    for path, value in zip(figures.paths, figures.of(always).tolist()):
        if path == "yes_no/f1":
            put(out, path, round(100 * value, 6))
    return out


def _examples(
    samples: Pictured,
    questions: Sequence[Question],
    answers: dict[str, list[str]],
    right: NDArray[np.bool_],
    options: VqaOptions,
) -> list[dict[str, Any]]:
    """As many right as wrong, in turns, each the first of a seeded shuffle; one question a picture."""
    first: dict[int, int] = {}
    order = np.random.default_rng([options.seed, 10]).permutation(len(questions))
    # A picture stands for its rarer outcome, or the few failures of a good model would be hidden by successes.
    rarer = bool(right.mean() < 0.5)
    for i in sorted(order.tolist(), key=lambda i: bool(right[i]) != rarer):
        first.setdefault(questions[i].sample, i)
    pool = np.array(sorted(first.values()), dtype=np.int64)
    chosen = [int(pool[place]) for place in balanced(right[pool], options.examples, options.seed)]
    small = thumbnails(samples.pictures(questions[i].sample for i in chosen))
    return [
        {
            "direction": "vqa",
            "key": samples.keys[questions[i].sample],
            "picture": small.get(questions[i].sample),
            "kind": questions[i].kind,
            "question": questions[i].text,
            "answer": answers[MAIN][i],
            "truth": list(questions[i].answers),
            "right": bool(right[i]),
            "controls": {arm: texts[i] for arm, texts in answers.items() if arm},
        }
        for i in chosen
    ]
