"""The search on a trained model: tables are scored by an evaluation task on calibration data, every score is kept on disk.

The output directory has `search.json` (settings and what was found), `scores.jsonl` (a line a table), `keep.toml` (the table
for a preset) and `model/` (the model with the table).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.config.errors import DataError, RequestError
from vlm.config.writing import toml_value
from vlm.evaluation.material import BadTally
from vlm.evaluation.pictured import Pictured, collect_pictured
from vlm.evaluation.reading import EvaluationData, Reading
from vlm.evaluation.result import Result, flatten, write_json, write_text
from vlm.evaluation.session import BAD_BUDGET
from vlm.evaluation.writing import WritingTask
from vlm.workflows.token_search.changed import with_settings
from vlm.workflows.token_search.search import CurveOptions, Found, SearchOptions, Table, curve, greedy

if TYPE_CHECKING:
    from vlm.evaluation import TaskOptions
    from vlm.evaluation.generator import TorchGenerator

SCHEMA = 1
STANDARD = {
    "score": {"kind": "attention-from-rows", "rows": "last-instruction", "norm": "previous-layer"},
    "apply": {"kind": "gather", "positions": "keep"},
}
"""How tokens are ranked where the model does not say."""


def calibration(uri: str, reading: Reading, forbidden: str | None) -> EvaluationData:
    """The data that tables are scored on. Raises DataError for a test split: the search would be tuned to it."""
    data = EvaluationData(uri, reading)
    if data.source.describe().get("split") == "test" or uri == forbidden:
        raise DataError("is the test data, and a search is tuning", where=uri, remedy="give --data of the training or validation split")
    return data


class Scorer:
    """The score of a table: a figure of an evaluation task, on the same samples each time; kept in a file of lines."""

    def __init__(
        self,
        generator: TorchGenerator,
        data: EvaluationData,
        task: TaskOptions,
        metric: str,
        file: Path,
        *,
        batch: int = 64,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.generator, self.data, self.task, self.metric, self.file = generator, data, task, metric, file
        self.batch, self.note = batch, note
        self.known: dict[Table, float] = {}
        self.measured = 0
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            entries = [_entry(line) for line in lines]
            self.known = {entry[0]: entry[1] for entry in entries if entry is not None}
            if None in entries:  # a line that was cut off is measured anew
                write_text(file, "".join(line + "\n" for line, entry in zip(lines, entries) if entry is not None))
        if not isinstance(task, WritingTask):
            raise RequestError(f"{task.task} scores no answers", remedy="take a task of models that write: vqa, caption, hallucination")
        self._samples: Pictured | None = None

    def __call__(self, table: Table) -> float:
        """Raises RequestError for a metric that the task has not."""
        if table in self.known:
            return self.known[table]
        begin = time.perf_counter()
        model: Any = with_keep(self.generator.model, table)
        own = type(self.generator)(
            model, self.generator.tokenizer, self.generator.template, name=self.generator.name, batch=self.generator.batch
        )
        if self._samples is None:  # read once, the same for every table
            self._samples = collect_pictured(
                own, self.data.items(self.task.limit, self.task.seed), bad=BadTally(BAD_BUDGET), reread=self.data.picture
            )
        assert isinstance(self.task, WritingTask)
        value = figure(self.task.run(replace(self._samples, generator=own), self.batch), self.metric)
        self.known[table] = value
        self.measured += 1
        line = {"table": list(table), "score": value, "seconds": round(time.perf_counter() - begin, 3)}
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
        self.note(f"{value:.4g} with {' '.join(map(str, table))}")
        return value


def figure(result: Result, metric: str) -> float:
    """One number of a result, by its path. Raises RequestError naming those that there are."""
    found = dict(flatten(result.metrics))
    if metric not in found:
        raise RequestError(f"{result.task} has no figure {metric!r}", remedy=f"its figures: {', '.join(found)}")
    return found[metric]


def _entry(line: str) -> tuple[Table, float] | None:
    try:
        entry = json.loads(line)
        return tuple(int(n) for n in entry["table"]), float(entry["score"])
    except (ValueError, KeyError, TypeError):
        return None


def with_keep(model: Any, table: Table) -> Any:
    """The model with a table of counts in place of its schedule; what it says of scores stays."""
    tokens = table[0]
    given = model.options.tokens
    settings: dict[str, Any] = {"tokens.keep": {"kind": "table", "ratios": ratios(table)}}
    if given is None or given.keep is None:
        settings = {f"tokens.{name}": value for name, value in STANDARD.items()} | settings
    made: Any = with_settings(model, settings)
    if made.picture_tokens != tokens:
        raise RequestError(f"the table begins with {tokens}, and a picture has {made.picture_tokens} visual tokens")
    return made


def ratios(table: Table) -> list[float]:
    """The table as shares of the first layer's count."""
    return [count / table[0] for count in table]


def run_search(
    generator: TorchGenerator,
    data: EvaluationData,
    task: TaskOptions,
    metric: str,
    options: SearchOptions,
    output: Path,
    *,
    like: Table | None = None,
    batch: int = 64,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Search, and write what was found. The same call goes on where an interrupted one ended, and asks for no table twice.

    Raises RequestError for a model that reads no pictures in its row, and for an output of another search.
    """
    model: Any = generator.model
    if getattr(model, "picture_positions", None) is None:
        raise RequestError("a search needs a model whose pictures stand in the row: fusion prefix")
    depth, tokens = len(model.language.trunk.blocks), model.picture_tokens
    settings = {
        "schema": SCHEMA,
        "options": options.model_dump(mode="json"),
        "task": task.model_dump(mode="json"),
        "metric": metric,
        "data": data.uri,
        "layers": depth,
        "tokens": tokens,
        "like": None if like is None else list(like),
        "model": _fingerprint(model),
    }
    output.mkdir(parents=True, exist_ok=True)
    begun = output / "settings.json"
    if begun.is_file():
        if json.loads(begun.read_text(encoding="utf-8")) != settings:
            raise RequestError("holds another search", where=str(output), remedy="give another --output, or the same settings to go on")
    else:
        write_json(begun, settings)
    score = Scorer(generator, data, task, metric, output / "scores.jsonl", batch=batch, note=note)
    try:
        if isinstance(options, CurveOptions):
            found = curve(score, depth, tokens, options, like)
        else:
            found = greedy(score, depth, tokens, options)
    except ValueError as error:
        raise RequestError(str(error)) from error
    report = _report(found, settings, score)
    write_json(output / "search.json", report)
    write_text(output / "keep.toml", keep_toml(found.table, model))
    _save(generator, found.table, output / "model")
    return report


def _report(found: Found, settings: Mapping[str, Any], score: Scorer) -> dict[str, Any]:
    from vlm.evaluation.flops import TrunkShape, prefill_flops

    model: Any = score.generator.model
    shape = TrunkShape.of(model.language.options.trunk())
    full = prefill_flops(shape, [found.table[0]] * len(found.table))
    return {
        **settings,
        "table": list(found.table),
        "ratios": ratios(found.table),
        "k": found.k,
        "score": found.score,
        "full_score": found.full,
        "mean_share": round(sum(found.table) / len(found.table) / found.table[0], 6),
        "share_of_flops": round(prefill_flops(shape, list(found.table)) / full, 6),  # of visual positions alone
        "tables_scored": len(score.known),
    }


def keep_toml(table: Table, model: Any) -> str:
    """A partial preset: the table, to be laid over one of the same depth."""
    keep = {"kind": "table", "ratios": ratios(table)}
    return (
        f"# Of {table[0]} visual tokens the layers read {', '.join(map(str, table))}.\n"
        f"[model.tokens]\nkeep = {toml_value(keep)}\n"
    )


def _fingerprint(model: Any) -> str:
    """sha256 of weights and options."""
    digest = hashlib.sha256(model.options.model_dump_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def _save(generator: TorchGenerator, table: Table, directory: Path) -> None:
    from vlm.models.directory import save_model
    from vlm.runtime.chat_jinja import jinja_of

    save_model(with_keep(generator.model, table), directory, template=jinja_of(generator.template))
    generator.tokenizer.save(directory)
