"""The composed schema of a preset: every top-level table, and what a stage may change.

A stage is the top level with the stage's own table merged over it, so it may change anything that a run has more than
once: data, objectives, companions, trainable patterns, rates, schedule, evaluation. What a run has once (`ONCE`) is said at
the top level, and a stage that says another is refused. A preset without stages has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from vlm.config.load import Resolved, merge_tables, resolve, validate
from vlm.config.options import Options
from vlm.data.options import DataOptions
from vlm.data.tokenizer_options import BpeTokenizer, TokenizerOptions
from vlm.evaluation import EvaluationOptions
from vlm.models import ModelOptions
from vlm.objectives import AnyObjective
from vlm.schedules import Duration, LearningRateOptions
from vlm.training.companion_options import CompanionOptions
from vlm.training.optimizer import OptimizerOptions
from vlm.tuning import TuningOptions


class MethodOptions(Options):
    """What the preset is and where it departs from its source."""

    key: str
    title: str
    command: Literal["pretrain", "finetune", "distill"] = "pretrain"
    paper: str | None = Field(None, description="title of the source")
    tags: tuple[str, ...] = Field((), description="words to find the preset by")
    departs: tuple[str, ...] = Field((), description="where it differs from the source, and why")


class StartOptions(Options):
    """Where the weights come from."""

    model: str | None = Field(None, description="model directory, run, Hugging Face directory or key of a preset to start from")
    settings: dict[str, Any] = Field(
        {}, description="laid over the settings of start.model, whose weights must still fit: attention, length"
    )
    parts: dict[str, str] = Field({}, description="part of the model -> a model of any of these kinds that its weights come from")

    @model_validator(mode="after")
    def _of_a_model(self) -> StartOptions:
        if self.settings and self.model is None:
            raise ValueError("settings change the model that start.model brings; without it, [model] says them")
        return self


class TrainOptions(Options):
    """Length, batch and safety of a stage."""

    steps: int | None = Field(None, ge=0, description="updates; wins over epochs; 0: the model stays as it starts")
    epochs: float | None = Field(None, gt=0, description="passes over the data, for sources of known length")
    batch_size: int = Field(256, gt=0, description="samples of one update over all processes and micro-batches")
    accumulate: int = Field(1, gt=0, description="micro-batches of one update in each process; exact for every objective")
    seed: int = Field(0, ge=0)
    checkpoint_every: Duration = Field(0, description="steps, share or epochs between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=0, description="newest checkpoints kept; 0: all")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast, float32 weights")
    clip: float | None = Field(None, gt=0, description="greatest norm of the gradient")
    not_finite: Literal["stop", "skip"] = Field("stop", description="what a loss that is NaN or infinite does")
    recompute: bool = Field(False, description="activation checkpointing: less memory, about a third more time")
    average: float | None = Field(None, gt=0, lt=1, description="decay of a moving average of the weights of the model; those of objectives stay the last ones")
    log_every: int = Field(1, gt=0, description="updates between lines of metrics.jsonl")
    tensorboard: bool = Field(False, description="also write TensorBoard files (needs vlm-forge[tensorboard])")


class ScaleOptions(Options):
    """How many processes share an update."""

    processes: int = Field(1, gt=0, description="processes on this machine (`-n`)")
    threads: int | None = Field(None, gt=0, description="CPU threads of a process; default: usable cores / processes")


class LoopOptions(Options):
    """Repeats stages: rounds of self-training, active learning, error-driven data."""

    rounds: int = Field(gt=0)
    body: tuple[str, ...] = Field(description="names of the stages that one round runs")
    carry: tuple[str, ...] = Field(("model",), description="what the next round starts from; the rest is made anew")
    until: str | None = Field(None, description='stop early, as "eval/name >= number"')


class TuneOptions(Options):
    """How both arms are tuned before they are compared: the same grid, on concepts held out of the training data."""

    factors: tuple[float, ...] = Field((0.33, 1.0, 3.0), description="optimizer.lr times each of these is tried; one: no tuning")
    share: float = Field(0.34, gt=0, le=1, description="share of the updates that a tuning run takes")
    dev: float = Field(0.1, gt=0, lt=1, description="share of the concepts that are held out for tuning")
    by: tuple[str, ...] = Field(
        ("concept", "caption", "txt", "text"), description="field whose equal values stay together: the first that a sample has"
    )

    @model_validator(mode="after")
    def _some_factor(self) -> TuneOptions:
        if not self.factors or min(self.factors) <= 0 or len(set(self.factors)) < len(self.factors):
            raise ValueError("factors must be distinct numbers above 0, at least one")
        return self


class ControlOptions(Options):
    """A further arm, reported beside the two and judged by no margin."""

    name: str
    preset: str | None = Field(None, description="key of its preset; default: the method's own")
    overrides: dict[str, Any] = Field({}, description="partial preset, laid over it after the claim's overrides")


class AgainstOptions(Options):
    """An arm made for one gate: the method with these settings."""

    overrides: dict[str, Any] = Field(description="partial preset, laid over the method's arm")


class GateOptions(Options):
    """A figure that must hold beside the margin: the mean over seeds, or its paired difference from another arm."""

    metric: str
    above: float | None = None
    below: float | None = None
    against: str | AgainstOptions | None = Field(None, description="an arm to compare with; default: the baseline")
    rises_by: float | None = Field(None, description="above the other arm by at least this")
    falls_by: float | None = Field(None, description="below the other arm by at least this")
    rises_less_than: float | None = Field(None, description="above the other arm by less than this")
    falls_less_than: float | None = Field(None, description="below the other arm by less than this")


class ClaimOptions(Options):
    """What `vlm reproduce` measures, written before its first result.

    Both arms are the named presets with `overrides` laid over them; the baseline gets `baseline_overrides` after that.
    """

    baseline: str = Field(description="key of the preset it is compared with; the own key for an ablation")
    metric: str = Field(description="NAME.path of a figure of the preset's evaluation tasks: retrieval.text_to_image.r@10")
    baseline_metric: str | None = Field(
        None, description="figure of the baseline, where it is another one: the same model under another evaluation task"
    )
    direction: Literal["higher", "lower"] = "higher"
    margin: float = Field(ge=0, description="difference that counts")
    tier: Literal["S", "M", "L"] = Field("S", description="minutes in all, bases aside: S 4, M 12, L 45")
    seeds: int = Field(5, ge=2, description="paired seeds, unless --seeds says another number")
    data: str | None = Field(None, description="training data of both arms; default: the preset's")
    test: str | None = Field(None, description="data that is scored and never trained on or tuned to; default: data.val")
    overrides: dict[str, Any] = Field({}, description="partial preset laid over both arms, merged like a stage")
    baseline_overrides: dict[str, Any] = Field({}, description="partial preset laid over the baseline alone")
    bases: dict[str, dict[str, Any]] = Field({}, description="settings of presets that a companion or start.model names by key")
    own_data: tuple[str, ...] = Field(
        (), description="bases that keep the data of their preset, for what the claim's data do not teach; never its test data"
    )
    tune: TuneOptions = TuneOptions()
    controls: list[ControlOptions] = []
    gates: list[GateOptions] = []


class StageSettings(Options):
    """Every table that a stage can have; the top level has them too."""

    model: ModelOptions | None = Field(None, description="architecture; left out where start.model brings it")
    start: StartOptions = StartOptions()
    tokenizer: TokenizerOptions = BpeTokenizer()
    data: DataOptions = DataOptions()
    objectives: list[AnyObjective] = []
    companions: dict[str, CompanionOptions] = {}
    tuning: TuningOptions = TuningOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: LearningRateOptions = LearningRateOptions()
    train: TrainOptions = TrainOptions()
    scale: ScaleOptions = ScaleOptions()
    evaluation: EvaluationOptions = EvaluationOptions()

    @model_validator(mode="after")
    def _distinct_names(self) -> StageSettings:
        names = [objective.name for objective in self.objectives]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two objectives are called {sorted(twice)[0]!r}; give each its own name")
        return self


class Preset(StageSettings):
    """A whole preset."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, populate_by_name=True)

    schema_: Literal[1] = Field(alias="schema")
    method: MethodOptions
    stages: list[dict[str, Any]] = Field([], description="each: a name and the tables that differ from the top level")
    loop: LoopOptions | None = None
    claim: ClaimOptions | None = None


ONCE = (
    "model", "start", "tokenizer", "scale.processes", "scale.threads", "train.keep", "train.tensorboard",
    "tuning.prompt",
)
"""What all stages of a run share: the model goes on from stage to stage, in the same processes, logs and checkpoints."""


class Stage(StageSettings):
    """One stage, fully settled."""

    name: str

    @model_validator(mode="after")
    def _can_train(self) -> Stage:
        if not self.objectives:
            raise ValueError("at least one objective is needed")
        if self.train.steps is None and self.train.epochs is None:
            raise ValueError("train.steps or train.epochs is needed")
        return self


def load_preset(
    name_or_path: str, overrides: Sequence[str] = (), search: Sequence[Path] = ()
) -> tuple[Preset, Resolved]:
    """A preset by key or path with overrides; `search` holds directories of the user's own presets.

    Raises PresetError with file, line and column.
    """
    resolved = resolve(name_or_path, overrides, search)
    preset = validate(resolved, Preset)
    stages_of(resolved)
    return preset, resolved


def stages_of(resolved: Resolved) -> list[Stage]:
    """The stages of a resolved preset in order."""
    whole = {key: value for key, value in resolved.values.items() if key in StageSettings.model_fields}
    entries = resolved.values.get("stages") or [{"name": "train"}]
    stages = []
    for index, entry in enumerate(entries):
        if "name" not in entry:
            raise resolved.error(("stages", index), f"stages[{index}] has no name", remedy='give it one, as in name = "align"')
        merged = resolved.derive(merge_tables(whole, entry), inside=("stages", index))
        stages.append(validate(merged, Stage))
    names = [stage.name for stage in stages]
    for index, stage in enumerate(stages):
        if stage.name in names[:index]:
            raise resolved.error(("stages", index, "name"), f"two stages are called {stage.name!r}", remedy="give each its own name")
        for key in ONCE:
            if _setting(stage, key) != _setting(stages[0], key):
                raise resolved.error(
                    _said(resolved, index, key),
                    f"stage {stage.name!r} says another {key} than stage {names[0]!r}, and a run has one",
                    remedy=f"say {key} at the top level, for all stages",
                )
        for companion, table in stage.companions.items():
            if table.stage is not None and table.stage not in names:
                raise resolved.error(
                    ("companions", companion, "source"),
                    f"companion {companion!r} of stage {stage.name!r} names a stage {table.stage!r} that does not exist",
                    remedy=f"stages: {', '.join(names)}",
                )
    return stages


def _setting(stage: Stage, key: str) -> Any:
    """The value at a dotted key of two parts at most."""
    table, _, field = key.partition(".")
    return getattr(getattr(stage, table), field) if field else getattr(stage, table)


def _said(resolved: Resolved, index: int, key: str) -> tuple[str | int, ...]:
    """Where one of the stages, best this one, says a key that a run has once."""
    table, _, field = key.partition(".")
    entries = resolved.values["stages"]
    for number in (index, 0):
        if table in entries[number]:
            inside = field and field in entries[number][table]
            return ("stages", number, table, field) if inside else ("stages", number, table)
    return ("stages", index)
