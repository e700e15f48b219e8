"""One evaluation: a model, tasks and data in; results out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from vlm.config.errors import DataError, RequestError
from vlm.evaluation.classification import ClassificationTaskOptions, LogitsOf
from vlm.evaluation.encoder import AnyModel, of_memory
from vlm.evaluation.linear_probe import LinearProbeOptions
from vlm.evaluation.localisation import LocalisationOptions, localisation
from vlm.evaluation.material import BadTally, Material, collect
from vlm.evaluation.perplexity import PerplexityOptions, perplexity
from vlm.evaluation.pictured import Pictured, collect_pictured
from vlm.evaluation.reading import EvaluationData, Reading
from vlm.evaluation.result import Result
from vlm.evaluation.text_probe import TextProbeOptions, text_probe
from vlm.evaluation.writing import WritingTask

if TYPE_CHECKING:
    from vlm.data.tokenizer import Tokenizer
    from vlm.evaluation import TaskOptions
    from vlm.evaluation.task import Needs
    from vlm.models import Model
    from vlm.runtime.generation import Generator

BAD_BUDGET = 0.01

_KINDS: dict[Needs, tuple[str, str]] = {
    "generator": ("a model that reads pictures and writes", "this one writes: try caption, vqa, hallucination or cost"),
    "classifier": ("a model with classes of its own (model.classes)", "this one has classes: try classification"),
    "pictures": ("a model of pictures and texts", "this model embeds pictures and texts: try retrieval or zero-shot"),
    "tokens": ("a language model", "this one is a language model: try perplexity or text-probe"),
}
"""What a task needs -> the model in words, and what a model of that kind can do."""


def kinds_of(model: AnyModel) -> list[Needs]:
    """What a model is to the tasks, by what it offers: one that writes may also embed."""
    offers: dict[Needs, bool] = {
        "generator": hasattr(model, "stepper"),
        "classifier": bool(getattr(model, "classes", ())) and hasattr(model, "classify"),
        "pictures": hasattr(model, "encode_image"),
        "tokens": hasattr(model, "tokenize") and hasattr(model, "nats"),
    }
    return [kind for kind, offered in offers.items() if offered]


class Session:
    """Evaluates tasks on one model; data that several tasks share is read and embedded once.

    progress: told how many pictures are embedded; written: how many answers there are, and which.
    """

    def __init__(
        self,
        model: AnyModel,
        data: str | EvaluationData | None,
        *,
        reading: Reading | None = None,
        model_info: dict[str, Any] | None = None,
        bad_budget: float = BAD_BUDGET,
        batch: int = 64,
        progress: Callable[[int], None] | None = None,
        written: Callable[[int, str], None] | None = None,
    ) -> None:
        self.model = model
        self.reading = reading or Reading()
        self.default = data
        self.model_info = model_info if model_info is not None else {"name": model.name}
        self.bad_budget = bad_budget
        self.batch = batch
        self.progress = progress
        self.written = written
        self._open: dict[str, EvaluationData] = {}
        self._materials: dict[tuple[str, int | None, int, bool], Material] = {}
        self._pictured: dict[tuple[str, int | None, int], Pictured] = {}

    def data_of(self, uri: str | None) -> EvaluationData:
        """The data of a task. Raises RequestError when there is none."""
        chosen = uri if uri is not None else self.default
        if chosen is None:
            raise RequestError("no data to evaluate on", remedy="give --data URI, or data.val in the preset")
        if isinstance(chosen, EvaluationData):
            return chosen
        if chosen not in self._open:
            self._open[chosen] = EvaluationData(chosen, self.reading if chosen == self.default else self.reading.of_all)
        return self._open[chosen]

    def material(self, data: EvaluationData, limit: int | None, seed: int, *, logits: bool = False) -> Material:
        """The data's pictures, embedded, or their logits; the same draw is run once."""
        key = (*self._draw(data, limit, seed), logits)
        if key not in self._materials:
            self._materials[key] = collect(
                LogitsOf(self.model) if logits else self.model,  # type: ignore[arg-type]
                data.items(limit, seed),
                batch=self.batch,
                bad=BadTally(self.bad_budget),
                reread=data.picture,
                progress=self.progress,
                unit_rows=not logits,
            )
        return self._materials[key]

    def pictured(self, data: EvaluationData, limit: int | None, seed: int) -> Pictured:
        """The data's pictures, prepared for a model that writes; the same draw is read once."""
        key = self._draw(data, limit, seed)
        if key not in self._pictured:
            self._pictured[key] = collect_pictured(
                cast("Generator", self.model),
                data.items(limit, seed),
                bad=BadTally(self.bad_budget),
                reread=data.picture,
                progress=self.written,
            )
        return self._pictured[key]

    @staticmethod
    def _draw(data: EvaluationData, limit: int | None, seed: int) -> tuple[str, int | None, int]:
        """What tells one draw of samples from another."""
        everything = limit is None or limit >= len(data)
        return data.uri, None if everything else limit, 0 if everything else seed

    def check(self, task: TaskOptions) -> EvaluationData:
        """The data of a task that the model can do. Raises RequestError when it cannot, DataError for data that are not there."""
        kinds = kinds_of(self.model)
        if task.needs not in kinds:
            remedy = "; ".join(_KINDS[kind][1] for kind in kinds)
            raise RequestError(f"{task.task} needs {_KINDS[task.needs][0]}", remedy=remedy or None)
        return self.data_of(task.data)

    def run(self, task: TaskOptions) -> Result:
        """One task. Raises RequestError when the model cannot do it, DataError when the data cannot."""
        data = self.check(task)
        if isinstance(task, PerplexityOptions):
            items = data.items(task.limit, task.seed)
            result = perplexity(self.model, items, task, BadTally(self.bad_budget))  # type: ignore[arg-type]
        elif isinstance(task, TextProbeOptions):
            if not hasattr(self.model, "encode_text"):
                raise RequestError("text-probe needs a model that embeds texts", remedy="evaluate the run instead of its bundle")
            train = None if task.train is None else self.data_of(task.train).items(None, task.seed)
            result = text_probe(self.model, data.items(task.limit, task.seed), train, task, BadTally(self.bad_budget))  # type: ignore[arg-type]
        elif isinstance(task, LocalisationOptions):
            items = data.items(task.limit, task.seed)
            result = localisation(self.model, items, task, BadTally(self.bad_budget), reread=data.picture, batch=self.batch)
        elif isinstance(task, WritingTask):
            samples = self.pictured(data, task.limit, task.seed)
            result = task.run(samples, self.batch)
            result = replace(result, data={"sha256": samples.fingerprint}, bad=samples.bad.as_json())
        elif isinstance(task, ClassificationTaskOptions):
            material = self.material(data, task.limit, task.seed, logits=True)
            result = replace(task.run(material), data={"sha256": material.fingerprint}, bad=material.bad.as_json())
        else:
            material = self.material(data, task.limit, task.seed)
            if isinstance(task, LinearProbeOptions):
                fitted = (
                    None if task.train is None else self.material(self.data_of(task.train), None, task.seed)
                )
                result = task.run(material, fitted)
            else:
                result = task.run(material)
            result = replace(result, data={"sha256": material.fingerprint}, bad=material.bad.as_json())
        about = {"uri": data.uri, "kind": data.source.kind, "samples": len(data), **result.data}
        options = {name: value for name, value in task.model_dump(mode="json").items() if value is not None}
        return replace(result, data=about, model=self.model_info, options=options)


def evaluate(
    model: AnyModel,
    tasks: Sequence[TaskOptions],
    data: str | EvaluationData | None,
    *,
    skip: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[Result]:
    """Results of all tasks, in order. settings: those of Session.

    skip: told of a task that the data cannot serve (no such field, too few texts), which is then left out; without
    it the DataError goes up.
    """
    session = Session(model, data, **settings)
    results = []
    for task in tasks:
        try:
            results.append(session.run(task))
        except DataError as error:
            if skip is None:
                raise
            skip(f"evaluation {task.title!r} left out: {error}")
    return results


def check_tasks(model: Model, tokenizer: Tokenizer | None, tasks: Sequence[TaskOptions], data: str | None, reading: Reading) -> None:
    """Raises RequestError or DataError for tasks that `evaluate_in_memory` would have to refuse after the training."""
    session = Session(of_memory(model, tokenizer, model.preprocess()), data, reading=reading)
    for task in tasks:
        session.check(task)


def evaluate_in_memory(
    model: Model,
    tokenizer: Tokenizer | None,
    tasks: Sequence[TaskOptions],
    data: str | EvaluationData | None,
    *,
    examples: int | None = None,
    **settings: Any,
) -> list[Result]:
    """`evaluate` of a model in memory, as training calls it: evaluation mode and float32 inside, both restored.

    examples: how many examples a task keeps that does not say its own number.
    """
    if examples is not None:
        tasks = [
            task if "examples" in task.model_fields_set else task.model_copy(update={"examples": examples}) for task in tasks
        ]
    return evaluate(of_memory(model, tokenizer, model.preprocess()), tasks, data, **settings)


def numbers_of(results: Sequence[Result]) -> dict[str, float]:
    """`eval/NAME/...` -> number, one line of metrics.jsonl."""
    return {f"eval/{name}": value for result in results for name, value in result.flat().items()}
