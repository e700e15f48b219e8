"""debias-lvlm at the size of a test: what the two ways of asking do to one model."""

import numpy as np
import pytest
import torch

from tests.presets.stand_ins import begin
from vlm.config.errors import RequestError
from vlm.data.sources.uri import open_source
from vlm.data.tokenizer import Tokenizer
from vlm.evaluation import CaptionOptions, HallucinationOptions, VqaOptions, evaluate_in_memory
from vlm.evaluation.encoder import of_memory
from vlm.evaluation.session import Session
from vlm.evaluation.writing import Ask
from vlm.evaluation.yes_no import calibrated_yes, label_forms, yes_confidence
from vlm.models import load_model
from vlm.models.directory import find_model_directory
from vlm.runtime.generation import Calibration
from vlm.workflows.reproduce.claim import claim_of
from vlm.workflows.reproduce.measure import Measure
from vlm.workflows.reproduce.store import Results
from vlm.workflows.reproduce.workspace import Workspace

DATA = "scenes:?n=24&split=val"


@pytest.fixture(scope="module")
def opened(models):
    """A model of no meaning, and its pictures."""
    model, tokenizer = load_model(models["vlm-tiny"]), _tokenizer(models["vlm-tiny"])
    session = Session(of_memory(model, tokenizer, model.preprocess()), DATA)
    return session, session.pictured(session.data_of(None), None, 0)


def _tokenizer(folder):
    return Tokenizer.load(find_model_directory(str(folder)))


def asks(samples):
    return [Ask(i, f"is there a red {shape}?") for i in range(len(samples)) for shape in ("circle", "ring")]


def test_debias_lvlm_without_a_picture_the_calibrated_answer_is_uniform(opened):
    """p = p_cf: what is left is what the picture adds, and there is none."""
    samples = opened[1]
    for scope in ("question", "dataset"):
        yes = calibrated_yes(samples, asks(samples)[:6], None, Calibration("none", eps=1e-9, scope=scope), 4)
        if scope == "question":
            assert yes == pytest.approx(np.full(6, 0.5), abs=1e-6)
    assert yes_confidence(samples, asks(samples)[:6], None, 4) != pytest.approx(np.full(6, 0.5), abs=1e-6)


@pytest.mark.parametrize("mode", ["diagonal", "identity"])
@pytest.mark.parametrize("scope", ["question", "dataset"])
def test_debias_lvlm_calibration_is_the_formula_whatever_the_batch(opened, mode, scope):
    samples, eps = opened[1], 1e-4
    own = np.arange(len(samples))
    given, free = (yes_confidence(samples, asks(samples), shown, 64) for shown in (own, None))
    p, q = np.stack([given, 1 - given], 1), np.stack([free, 1 - free], 1)
    if scope == "dataset":
        q = np.repeat(q.mean(0, keepdims=True), len(q), 0)
    raw = p / (q + eps) if mode == "diagonal" else np.exp(p - q - eps)
    expected = raw[:, 0] / raw.sum(1)
    for batch in (64, 7):
        found = calibrated_yes(samples, asks(samples), own, Calibration("none", mode, eps, scope), batch)
        assert found == pytest.approx(expected, abs=1e-5)


def test_debias_lvlm_words_of_several_tokens_are_told_by_their_first(opened):
    samples = opened[1]
    size = samples.generator.stepper().vocab_size
    forms = label_forms(samples, size)
    assert [samples.generator.text(ids[:1].tolist()).strip() for ids in forms] == ["y", "n"]
    lead = samples.generator.template
    try:
        samples.generator.template = type(lead)(**{**lead.__dict__, "answer_lead": " ~"})
        with pytest.raises(RequestError, match="yes and no begin with the same token"):
            label_forms(samples, size)
    finally:
        samples.generator.template = lead


def test_debias_lvlm_contrast_of_strength_0_writes_what_sampling_writes(models):
    model, tokenizer = load_model(models["vlm-tiny"]), _tokenizer(models["vlm-tiny"])

    def answers(**decoding):
        given = {"strategy": "sample", "temperature": 0.7, "max_new_tokens": 6, **decoding}
        task = CaptionOptions(controls=(), decoding=given, examples=12, limit=12, likelihood=False, resamples=100)
        [result] = evaluate_in_memory(model, tokenizer, [task], DATA)
        return [example["answer"] for example in result.examples]

    plain = answers()
    assert answers(contrast={"alpha": 0.0, "beta": 0.0}) == plain
    assert answers(contrast={"alpha": 4.0, "beta": 0.0}) != plain


def test_debias_lvlm_calibrated_answers_are_those_of_the_task(opened):
    session = opened[0]
    decoding = {"calibrate": {"content_free": "none"}}
    result = session.run(VqaOptions(controls=("none",), decoding=decoding, calibration=True, examples=24, resamples=100))
    closed = [e for e in result.examples if set(e["truth"]) <= {"yes", "no"}]
    assert closed
    assert {e["answer"] for e in closed} <= {"yes", "no"}
    assert result.metrics["yes_no"]["calibration_error"] != result.metrics["none"]["yes_no"]["calibration_error"]


@pytest.mark.parametrize("task", [CaptionOptions, HallucinationOptions])
def test_debias_lvlm_open_answers_cannot_be_calibrated(task):
    with pytest.raises(ValueError, match="calibrate corrects answers of a closed set"):
        task(decoding={"calibrate": {}})


def test_debias_lvlm_its_claim_trains_one_model_and_asks_it_twice(tmp_path):
    claim = claim_of("debias-lvlm")
    assert [claim.metric_of(arm.name) for arm in claim.arms] == ["calibrated.yes_no.accuracy", "plain.yes_no.accuracy"]
    measure = Measure(claim, Workspace(tmp_path / "store", Results(tmp_path / "results"), "vlm reproduce debias-lvlm"))
    method, baseline = (measure.seed_unit(arm, 3, 1.0) for arm in claim.arms)
    assert method.key == baseline.key
    assert {task.title for task in method.tasks} == {"plain", "calibrated"}
    assert [unit.phase for unit, _ in measure.plan()].count("seed") == claim.options.seeds
    assert not any(measure.tuning_units(arm) for arm in claim.arms)


def test_debias_lvlm_a_model_of_ones_own_is_asked_and_not_trained(models, tmp_path):
    tasks = [f"evaluation.tasks.{name}.limit=6" for name in ("plain", "calibrated", "sampled", "contrasted")]
    result = begin(tmp_path / "run", "debias-lvlm", models, "train.steps=0", *tasks).train()
    assert result.steps == 0
    assert {one["name"] for one in result.evaluations} == {"plain", "calibrated", "sampled", "contrasted"}
    made, given = load_model(tmp_path / "run").state_dict(), load_model(models["vlm-tiny"]).state_dict()
    assert made.keys() == given.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in given.items())


def test_debias_lvlm_scenes_are_answered_by_yes_as_often_as_asked():
    def shares(uri):
        source = open_source(uri)
        asked = [q for i in range(len(source)) for q in source.read(i).fields["questions"] if q["kind"] in ("exists", "relation")]
        return np.mean([q["answer"] == "yes" for q in asked]), asked

    skewed, _ = shares("scenes:?n=600&yes=75")
    assert skewed == pytest.approx(0.75, abs=0.04)
    assert shares("scenes:?n=50&yes=100")[0] == 1
    assert shares("scenes:?n=50&yes=0")[0] == 0
    assert shares("scenes:?n=50&yes=50")[1] == shares("scenes:?n=50")[1]
