"""coop at the size of a test: the words around a name learn, and nothing else moves."""

import json

import pytest
import torch

from tests.presets.stand_ins import assembled, begin, quiet
from tests.presets.test_claims import shrunk
from vlm.config.errors import PresetError, RequestError
from vlm.models import load_model
from vlm.schedules import rate_factor
from vlm.training.preset import load_preset
from vlm.tuning.prompt import CONTEXT
from vlm.types import Role
from vlm.workflows.reproduce.claim import claim_of
from vlm.workflows.reproduce.unit import Unit, train_unit

SHORT = ["train.epochs=!delete", "train.steps=3", "optimizer.lr=1.0", "evaluation.tasks=[]"]


def test_coop_frozen_weights_keep_their_bits_and_the_vectors_move(models, tmp_path):
    with assembled(begin(tmp_path / "first", "coop", models)) as parts:
        assert [name for name, p in parts.model.named_parameters() if p.requires_grad] == [CONTEXT]
        assert list(parts.optimizer.named) == [CONTEXT]
        first = parts.model.get_parameter(CONTEXT).detach().clone()
    begin(tmp_path / "run", "coop", models, *SHORT).train()
    before, after = load_model(models["clip-tiny-objects"]).state_dict(), load_model(tmp_path / "run").state_dict()
    assert set(after) - set(before) == {CONTEXT}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not torch.equal(after[CONTEXT], first)


def test_coop_a_batch_holds_every_class_once_and_the_same_shots(models, tmp_path):
    with assembled(begin(tmp_path / "run", "coop", models, "data.sampler.k=2")) as parts:
        batches = [next(parts.loader) for _ in range(8)]
        classes = parts.loader.classes()["category"]
        assert len({key for batch in batches for key in batch.keys}) <= 2 * len(classes)
        for batch in batches:
            texts = batch["classes"]
            assert texts.sample_index.tolist() == list(range(len(classes)))
            assert ((texts.role == Role.LEARNED).sum(1) == 4).all()
            assert torch.equal(texts.values, batches[0]["classes"].values)


def test_coop_each_seed_draws_other_shots_and_vectors(models, tmp_path):
    drawn = []
    for seed in (0, 1):
        with assembled(begin(tmp_path / str(seed), "coop", models, "data.sampler.k=1", f"train.seed={seed}")) as parts:
            keys = {key for _ in range(4) for key in next(parts.loader).keys}
            drawn.append((keys, parts.model.get_parameter(CONTEXT).detach().clone()))
    assert drawn[0][0] != drawn[1][0]
    assert not torch.equal(drawn[0][1], drawn[1][1])


def test_coop_its_claim_compares_two_figures_of_one_run(models, tmp_path):
    claim = claim_of("coop")
    method, baseline = claim.arms[:2]
    assert method.values == baseline.values
    assert [arm.name for arm in claim.arms[2:]] == ["1 shot", "1 shot, vectors of each class"]
    assert "split=test" in claim.test
    assert "split" not in claim.train
    values = shrunk(method.values)
    values["data"] = {**values["data"], "source": "scenes:?n=96&objects=1"}
    values["tuning"]["prompt"]["length"] = 4
    tasks = tuple(task.model_copy(update={"limit": 6, "resamples": 100}) for task in claim.tasks)
    unit = Unit(method.name, "seed", 0, values, None, "scenes:?n=24&objects=1&split=test", None, tasks)
    figures = train_unit(unit, tmp_path / "unit", models, note=quiet)["figures"]
    assert {claim.metric_of(method.name), claim.metric_of(baseline.name)} == {"learned.top1", "hand.top1"} <= set(figures)


def test_coop_and_its_schedule_are_the_published_ones():
    preset = load_preset("coop")[0]
    assert (preset.optimizer.kind, preset.optimizer.lr, preset.train.epochs, preset.train.batch_size) == ("sgd", 2e-3, 200, 32)
    assert preset.schedule.warmup_factor * preset.optimizer.lr == 1e-5
    assert preset.tuning.prompt.length == 16
    run = {"total": 800, "batch_size": 32, "samples": 128}
    rates = [preset.optimizer.lr * rate_factor(preset.schedule, step, **run) for step in (0, 3, 4, 402, 799)]
    assert rates[:3] == pytest.approx([1e-5, 1e-5, 2e-3])  # one epoch is four updates
    assert rates[3] == pytest.approx(1e-3)
    assert 0 < rates[4] < 1e-7


def test_dclip_trains_nothing_and_its_claim_compares_descriptors_with_names(models, tmp_path):
    few = ["evaluation.tasks.described.limit=12", "evaluation.tasks.described.resamples=100"]
    result = begin(tmp_path / "run", "dclip", models, *few).train()
    assert result.steps == 0
    before, after = load_model(models["clip-tiny-objects"]).state_dict(), load_model(tmp_path / "run").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    figures = result.evaluations[0]["metrics"]
    assert {"top1", "names", "random-words", "other-class", "over_names"} <= set(figures)
    claim = claim_of("dclip")
    assert claim.arms[0].values == claim.arms[1].values
    assert [claim.metric_of(arm.name) for arm in claim.arms] == ["described.top1", "described.names.top1"]
    assert [gate.metric for gate in claim.options.gates] == ["described.over_random-words.top1", "described.over_other-class.top1"]


def test_coop_recomputed_activations_give_the_same_vectors(models, tmp_path):
    trained = []
    for name in ("false", "true"):
        begin(tmp_path / name, "coop", models, *SHORT, f"train.recompute={name}").train()
        trained.append(load_model(tmp_path / name).state_dict()[CONTEXT])
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-7)


def test_coop_pictures_that_a_cache_keeps_teach_the_same(models, tmp_path):
    """The picture tower is frozen, so a picture is embedded once, whatever the epochs."""
    kept = ["data.image.flip=false", "data.sampler.k=1"]
    cached = [*kept, 'companions.eyes={source="model", cache=true}', "objectives.classification.by=eyes"]
    trained, losses = [], []
    for name, settings in (("plain", kept), ("cached", cached)):
        begin(tmp_path / name, "coop", models, *SHORT, "train.steps=6", *settings).train()
        trained.append(load_model(tmp_path / name).state_dict()[CONTEXT])
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-4)
    assert list((tmp_path / "cached" / "cache").rglob("*.safetensors"))
    with pytest.raises(RequestError, match="draws another crop or side every time"):
        begin(tmp_path / "flipped", "coop", models, *SHORT, *cached, "data.image.flip=true").train()


def test_a_head_of_its_own_reads_kept_pictures(models, tmp_path):
    kept = ['companions.eyes={source="model", cache=true}', "objectives.classification.by=eyes", "train.steps=2", "evaluation.tasks=[]"]
    begin(tmp_path / "run", "linear-probe", models, *kept).train()
    assert list((tmp_path / "run" / "cache").rglob("*.safetensors"))
    with pytest.raises(RequestError, match=r"needs \[companions.nobody\]"):
        begin(tmp_path / "other", "linear-probe", models, "objectives.classification.by=nobody", "train.steps=2").train()


def test_coop_beside_adapters_of_the_picture_tower(models, tmp_path):
    lora = 'tuning.lora={target=["vision.*.attention.q"], r=2}'
    with assembled(begin(tmp_path / "first", "coop", models, lora)) as parts:
        learning = [name for name, p in parts.model.named_parameters() if p.requires_grad]
    assert CONTEXT in learning
    assert len(learning) > 1
    assert all(name == CONTEXT or ".lora_" in name for name in learning)
    begin(tmp_path / "run", "coop", models, *SHORT, lora).train()
    before, after = load_model(models["clip-tiny-objects"]).state_dict(), load_model(tmp_path / "run").state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert moved
    assert all(name.startswith("vision.") and name.endswith("attention.q.weight") for name in moved)


def test_coop_a_stage_cannot_have_a_prompt_of_its_own():
    stages = 'stages=[{name="a", tuning={prompt={length=2}}}, {name="b"}]'
    with pytest.raises(PresetError, match=r"says another tuning.prompt than stage 'a'"):
        load_preset("coop", [stages])
