"""A setting that would be read by nothing is refused, with its key and what to do; so is one that a run cannot have twice."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from vlm.config.errors import PresetError, RequestError
from vlm.data.options import BadSamples, DataOptions
from vlm.decoding import GenerateOptions
from vlm.evaluation import (
    EvaluationOptions,
    LinearProbeOptions,
    PreferenceTaskOptions,
    TextProbeOptions,
    VqaOptions,
)
from vlm.models import LanguageOptions
from vlm.models.dual_encoder import DualEncoderOptions, PictureOptions
from vlm.objectives.classification import ClassificationOptions
from vlm.objectives.contrastive_options import ContrastiveFields
from vlm.objectives.distill import DistillOptions
from vlm.objectives.preference import PreferenceOptions
from vlm.objectives.sequence_align import SequenceAlignOptions
from vlm.schedules import LearningRateOptions, Ramp
from vlm.tokens.options import TokensOptions
from vlm.training.directory import RunDirectory
from vlm.training.finish import evaluation_settings
from vlm.training.optimizer import OptimizerOptions
from vlm.training.preset import load_preset, stages_of

TOY = str(Path(__file__).parent / "toy.toml")
POOL = [{"select": {"kind": "pool", "stride": 2}}]
KEEP = {"kind": "stages", "layers": [1], "ratios": [0.5]}
ARGMAX = {"kind": "argmax", "chooser": "a", "of": "answer.preferred@other", "reference_chooser": "b"}

UNREAD = [
    (OptimizerOptions, {"kind": "sgd"}, {"betas": (0.5, 0.9)}),
    (OptimizerOptions, {"kind": "sgd"}, {"eps": 1e-3}),
    (OptimizerOptions, {}, {"momentum": 0.5}),
    (LearningRateOptions, {"kind": "constant"}, {"floor": 0.1}),
    (DataOptions, {}, {"prefetch": 4}),
    (BadSamples, {"policy": "stop"}, {"budget": 0.5}),
    (DataOptions, {}, {"image": {"scale": (0.8, 1.0)}}),
    (DataOptions, {}, {"image": {"ratio": (1.0, 1.0)}}),
    (DataOptions, {"packer": {"kind": "concat"}}, {"text": {"length": 64}}),
    (ContrastiveFields, {}, {"sharpness": 5.0}),
    (ContrastiveFields, {}, {"teacher_share": 0.5}),
    (ContrastiveFields, {}, {"teacher_scale": 2.0}),
    (DistillOptions, {"target": "logits"}, {"distance": "mse"}),
    (DistillOptions, {"target": "logits"}, {"streams": ("image",)}),
    (DistillOptions, {"target": "logits"}, {"mix": 0.2}),
    (DistillOptions, {"target": "logits", "at": "visual"}, {"unit": "masked"}),
    (DistillOptions, {"target": "logits"}, {"leave_last": False}),
    (DistillOptions, {"target": "logits"}, {"source": "hidden:2"}),
    (DistillOptions, {}, {"temperature": 2.0}),
    (DistillOptions, {}, {"direction": "reverse"}),
    (DistillOptions, {"target": "relation"}, {"per": "token"}),
    (SequenceAlignOptions, {"layer": 1}, {"gamma": 0.5}),
    (PreferenceOptions, {}, {"nll_norm": "tokens"}),
    (PreferenceOptions, {"reference": None}, {"rejected": ARGMAX}),
    (ClassificationOptions, {"head": "model"}, {"normalise": False}),
    (TokensOptions, {"pre": POOL}, {"score": {"kind": "random"}}),
    (TokensOptions, {"pre": POOL}, {"select": {"kind": "threshold"}}),
    (TokensOptions, {"pre": POOL}, {"apply": {"positions": "keep"}}),
    (LinearProbeOptions, {"train": "scenes:"}, {"folds": 3}),
    (LinearProbeOptions, {"penalties": (1.0,)}, {"dev_share": 0.5}),
    (TextProbeOptions, {"train": "scenes:"}, {"folds": 3}),
    (GenerateOptions, {}, {"temperature": 0.7}),
    (GenerateOptions, {"strategy": "beam"}, {"top_p": 0.5}),
    (GenerateOptions, {"strategy": "sample"}, {"beams": 2}),
    (PreferenceTaskOptions, {}, {"max_new_tokens": 8}),
    (VqaOptions, {"max_new_tokens": 8}, {"decoding": {"max_new_tokens": 9}}),
]


def _names(values):
    for name, value in values.items():
        yield name
        if isinstance(value, dict):
            yield from _names(value)


@pytest.mark.parametrize(("schema", "base", "setting"), UNREAD, ids=lambda part: getattr(part, "__name__", str(part)))
def test_a_setting_that_nothing_reads_is_refused_by_name(schema, base, setting):
    schema.model_validate(base)
    with pytest.raises(ValidationError) as error:
        schema.model_validate({**base, **setting})
    message = str(error.value)
    assert any(name in message for name in _names(setting))
    assert "leave" in message


READ = [
    (OptimizerOptions, {"kind": "sgd", "momentum": 0.5}),
    (LearningRateOptions, {"kind": "linear", "floor": 0.1}),
    (DataOptions, {"image": {"augment": "random-resized-crop", "scale": (0.8, 1.0)}}),
    (ContrastiveFields, {"teacher": "t", "teacher_share": 0.5}),
    (DistillOptions, {"target": "logits", "direction": "js", "mix": 0.2}),
    (DistillOptions, {"target": "logits", "at": "visual", "leave_last": False}),
    (TokensOptions, {"keep": KEEP, "select": {"kind": "threshold"}}),
    (GenerateOptions, {"strategy": "beam", "beams": 2}),
    (VqaOptions, {"decoding": {"max_new_tokens": 9}}),
]


@pytest.mark.parametrize(("schema", "values"), READ, ids=lambda part: getattr(part, "__name__", None))
def test_the_same_settings_stand_where_they_are_read(schema, values):
    schema.model_validate(values)


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        (Ramp, {"start": 0.0, "end": 1.0, "shape": "geometric"}),
        (Ramp, {"start": -1.0, "end": 1.0, "shape": "geometric"}),
        (OptimizerOptions, {"betas": (0.9, 1.0)}),
        (OptimizerOptions, {"lr": float("inf")}),
        (PictureOptions, {"std": (1.0, 0.0, 1.0)}),
        (VqaOptions, {"max_new_tokens": 8, "decoding": {"min_new_tokens": 9}}),
        (LanguageOptions, {"width": 8, "depth": 1, "heads": 2, "ffn_width": 8, "length": 8, "kv_heads": 0}),
        (LanguageOptions, {"width": 8, "depth": 1, "heads": 2, "ffn_width": 8, "length": 8, "norm_eps": -1.0}),
        (LanguageOptions, {"width": 8, "depth": 1, "heads": 2, "ffn_width": 8, "length": 8, "rope_theta": 0.0}),
    ],
    ids=lambda part: getattr(part, "__name__", None),
)
def test_a_number_that_could_only_fail_later_is_refused(schema, values):
    with pytest.raises(ValidationError):
        schema.model_validate(values)


def test_two_tasks_of_one_name_are_refused():
    tasks = [{"task": "retrieval"}, {"task": "retrieval", "cutoffs": (1,)}]
    with pytest.raises(ValidationError, match="two tasks are called 'retrieval'"):
        EvaluationOptions.model_validate({"tasks": tasks})
    EvaluationOptions.model_validate({"tasks": [tasks[0], tasks[1] | {"name": "other"}]})


def test_a_table_with_kinds_that_is_no_table_is_said_to_be_none():
    with pytest.raises(ValidationError) as error:
        DualEncoderOptions.model_validate({"embed_dim": 8, "vision": [1, 2], "text": 3})
    assert {problem["loc"][0] for problem in error.value.errors()} == {"vision", "text"}
    with pytest.raises(ValidationError):
        LanguageOptions.model_validate({"width": 8, "depth": 1, "heads": 2, "ffn_width": 8, "length": 8, "attention": 3})


STAGES = '[[stages]]\nname = "one"\n[[stages]]\nname = "{}"\n{}\n'


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ("model = { embed_dim = 8 }", "model"),
        ('start = { model = "x" }', "start"),
        ("tokenizer = { vocab_size = 310 }", "tokenizer"),
        ("train = { keep = 5 }", "train.keep"),
        ("train = { tensorboard = true }", "train.tensorboard"),
        ("scale = { threads = 2 }", "scale.threads"),
        ("scale = { processes = 2 }", "scale.processes"),
    ],
)
def test_a_stage_cannot_say_another_of_what_a_run_has_once(tmp_path, table, key):
    file = tmp_path / "preset.toml"
    file.write_text(Path(TOY).read_text() + STAGES.format("two", table))
    with pytest.raises(PresetError, match=f"stage 'two' says another {key}") as error:
        load_preset(str(file))
    assert f":{len(file.read_text().splitlines())}:" in error.value.where
    assert "top level" in error.value.remedy


def test_stages_need_names_of_their_own(tmp_path):
    file = tmp_path / "preset.toml"
    file.write_text(Path(TOY).read_text() + STAGES.format("one", ""))
    with pytest.raises(PresetError, match="two stages are called 'one'"):
        load_preset(str(file))
    file.write_text(Path(TOY).read_text() + "[[stages]]\ntrain = { steps = 1 }\n")
    with pytest.raises(PresetError, match=r"stages\[0\] has no name"):
        load_preset(str(file))


def test_a_mark_at_the_start_of_a_file_is_no_part_of_it(tmp_path):
    file = tmp_path / "preset.toml"
    file.write_bytes(b"\xef\xbb\xbf" + Path(TOY).read_bytes())
    assert load_preset(str(file))[0].method.key == "toy"


def test_an_output_that_is_a_file_is_a_wrong_request(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RequestError, match="is a file"):
        RunDirectory(tmp_path / "run").refuse_used()


@pytest.mark.parametrize(("override", "budget"), [("budget=0.25", 0.25), ("policy=stop", 0.0)])
def test_evaluation_takes_the_run_at_its_word_about_bad_samples(override, budget):
    _, resolved = load_preset(TOY, [f"data.bad_samples.{override}"])
    assert evaluation_settings(stages_of(resolved)[0], print)["bad_budget"] == budget
