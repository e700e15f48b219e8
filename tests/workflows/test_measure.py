"""A claim from end to end, on pictures that train in seconds: units, tuning, bases, resuming, budget."""

import json

import pytest

from vlm.config.errors import DataError, ExitCode, PresetError, RequestError, RunFailed
from vlm.data.sources.uri import open_source
from vlm.training.preset import GateOptions, load_preset
from vlm.training.run import Run
from vlm.training.trainer import Interrupted, Trainer
from vlm.workflows.carve import is_held_out
from vlm.workflows.reproduce import unit as units
from vlm.workflows.reproduce.budget import measure_all, measured, seconds_of, stalest_first
from vlm.workflows.reproduce.claim import claim_of
from vlm.workflows.reproduce.measure import Measure, best_factor, gate_holds
from vlm.workflows.reproduce.page import claim_text
from vlm.workflows.reproduce.workspace import BudgetSpent


def phases(workspace, claim):
    return [unit["phase"] for unit in workspace.results.read(claim.key).units.values()]


def test_a_claim_from_tuning_to_verdict_and_nothing_is_done_twice(make_claim, make_workspace, tmp_path):
    claim = claim_of(make_claim(factors=(0.5, 2.0)))
    first = make_workspace()
    answer = measured(claim, first)
    assert first.trained == 8  # two arms: two factors and two seeds each
    assert sorted(phases(first, claim)) == ["seed"] * 4 + ["tune"] * 4
    assert answer["verdict"] in ("holds", "fails", "not seen", "underpowered")
    low, mean, high = (answer["difference"][name] for name in ("lower", "mean", "upper"))
    assert low <= mean <= high
    assert mean == pytest.approx(answer["method"]["mean"] - answer["baseline"]["mean"])
    for side in (answer["method"], answer["baseline"]):
        assert len(side["values"]) == 2
        assert set(side["tuning"]) == {"0.5", "2"}
        assert side["lr"] == pytest.approx(3e-3 * float(max(side["tuning"], key=side["tuning"].get)))
        assert side["at_edge"]
    again = make_workspace()
    repeated = measured(claim, again)
    assert again.trained == 0
    for name in ("verdict", "method", "baseline", "difference", "units", "seeds"):
        assert repeated[name] == pytest.approx(answer[name], abs=1e-5) if name == "difference" else repeated[name] == answer[name]
    third = make_workspace()
    measured(claim, third, seeds=3)
    assert third.trained == 2  # one seed more, both arms
    assert not list((tmp_path / "store" / "units").glob("*/model"))  # figures are kept, runs are not
    stored = json.loads((tmp_path / "results" / f"{claim.key}.json").read_text())
    for unit in stored["units"]:
        assert {"command", "commit", "seed", "figures", "intervals", "seconds", "machine", "finished"} <= set(unit)
        bounds = unit["intervals"]["retrieval.image_to_text.r@10"]
        assert bounds[0] <= unit["figures"]["retrieval.image_to_text.r@10"] <= bounds[1]


def test_tuning_is_the_same_for_both_arms_and_blind_to_the_test_data(make_claim, make_workspace):
    claim = claim_of(make_claim(factors=(0.5, 1.0, 2.0), steps=8))
    measure = Measure(claim, make_workspace())
    grids = [measure.tuning_units(arm) for arm in claim.arms]
    for grid in grids:
        assert [unit.factor for unit in grid] == [0.5, 1.0, 2.0]
        for unit in grid:
            assert unit.stages[0].train.steps == 4
            assert unit.test == claim.train
            assert unit.test_part.held_out
            assert not unit.part.held_out
            assert unit.seed not in range(1000)
    assert [u.seed for u in grids[0]] == [u.seed for u in grids[1]]
    assert [u.stages[0].optimizer.lr for u in grids[0]] == [u.stages[0].optimizer.lr for u in grids[1]]
    final = measure.seed_unit(claim.method, 0, 1.0)
    assert (final.part, final.test, final.test_part) == (None, claim.test, None)


def test_no_update_of_a_tuning_run_sees_the_dev_part(make_claim, make_workspace, monkeypatch, tmp_path, pictures):
    claim = claim_of(make_claim(factors=(1.0, 2.0), steps=40))
    unit = Measure(claim, make_workspace()).tuning_units(claim.method)[0]
    seen: set[str] = set()
    original = Trainer.run

    def spying(self):
        loader = self.parts.loader
        step = type(loader).__next__
        monkeypatch.setattr(type(loader), "__next__", lambda own: _told(step(own), seen))
        original(self)

    monkeypatch.setattr(Trainer, "run", spying)
    units.train_unit(unit, tmp_path / "store" / "units" / "one", {})
    rows = (pictures / "train.jsonl").read_text().splitlines()
    source = open_source(claim.train)
    concept_of = {source.key(i): json.loads(row)["concept"] for i, row in enumerate(rows)}
    concepts = {concept_of[key] for key in seen}
    assert len(seen) > 100
    assert len(concepts) > 20
    assert not [concept for concept in concepts if is_held_out(concept, claim.options.tune.dev)]


def _told(batch, seen):
    seen.update(str(sample) for sample in batch.keys)
    return batch


def test_paired_seeds_share_data_and_order(make_claim, make_workspace):
    claim = claim_of(make_claim())
    measure = Measure(claim, make_workspace())
    for seed in (0, 1):
        stages = [measure.seed_unit(arm, seed, 1.0).stages[0] for arm in claim.arms]
        assert {stage.train.seed for stage in stages} == {seed}
        assert len({stage.data.model_dump_json() for stage in stages}) == 1


def test_a_key_depends_on_what_the_figures_depend_on(make_claim, make_workspace, pictures):
    measure = Measure(claim_of(make_claim()), make_workspace())
    claim = measure.claim
    key = measure.seed_unit(claim.method, 0, 1.0).key
    assert measure.seed_unit(claim.method, 0, 1.0).key == key
    assert measure.seed_unit(claim.method, 1, 1.0).key != key
    assert measure.seed_unit(claim.method, 0, 2.0).key != key
    assert measure.seed_unit(claim.baseline, 0, 1.0).key != key
    longer = Measure(claim_of(make_claim("other", steps=5)), make_workspace())
    assert longer.seed_unit(longer.claim.method, 0, 1.0).key != key
    same = Measure(claim_of(make_claim("judged", margin=7.0)), make_workspace())
    assert same.seed_unit(same.claim.method, 0, 1.0).key == key  # the margin judges figures and makes none


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves metrics.jsonl open, as if killed
def test_an_interrupted_unit_goes_on_and_ends_with_the_same_figures(make_claim, make_workspace, monkeypatch, tmp_path):
    claim = claim_of(make_claim(steps=6))
    workspace = make_workspace()
    unit = Measure(claim, workspace).seed_unit(claim.method, 0, 1.0)
    whole = units.train_unit(unit, tmp_path / "apart" / "units" / "whole", {})
    save = Trainer.save

    def dying(self):
        save(self)
        if self.cursor.step == 4:
            raise Interrupted(ExitCode.INTERRUPTED)

    monkeypatch.setattr(Trainer, "save", dying)
    with pytest.raises(Interrupted):
        workspace.unit(claim.key, unit)
    assert workspace.state(unit) == "begun"
    monkeypatch.setattr(Trainer, "save", save)
    record = make_workspace().unit(claim.key, unit)
    assert record["resumed"]
    assert not whole["resumed"]
    assert record["figures"] == whole["figures"]


def test_a_half_made_run_directory_is_begun_anew(make_claim, make_workspace):
    claim = claim_of(make_claim())
    workspace = make_workspace()
    unit = Measure(claim, workspace).seed_unit(claim.method, 0, 1.0)
    folder = workspace.folder(unit)
    folder.mkdir(parents=True)
    (folder / "preset.toml").write_text("schema = ")
    assert workspace.state(unit) == "to do"
    assert not workspace.unit(claim.key, unit)["resumed"]


def test_claims_share_equal_units(make_claim, make_workspace):
    first, second = claim_of(make_claim("first")), claim_of(make_claim("second", margin=9.0))
    second = type(second)(**{**second.__dict__, "key": "second"})
    workspace = make_workspace()
    measured(first, workspace)
    trained = workspace.trained
    measured(second, workspace)
    assert workspace.trained == trained
    assert workspace.results.read("second").units.keys() == workspace.results.read(first.key).units.keys()


DISTILL = """
[claim.bases.clip-tiny]
model.embed_dim = 48
model.vision = { width = 32, depth = 1, heads = 1, image_size = 16, patch_size = 8 }
model.text = { width = 32, depth = 1, heads = 1, length = 8 }
train = { steps = 3, batch_size = 32 }
scale = { threads = 1 }
"""


def test_a_teacher_named_by_key_is_made_once_and_serves_every_unit(make_claim, make_workspace, tmp_path):
    path = make_claim(extends="clip-tiny-distill", factors=(0.5, 1.0))
    with open(path, "a") as file:
        file.write(DISTILL)
    claim = claim_of(path)
    workspace = make_workspace()
    measured(claim, workspace)
    assert phases(workspace, claim).count("base") == 1
    bases = list((tmp_path / "store" / "bases").glob("*/model/model.safetensors"))
    assert len(bases) == 1
    assert list((tmp_path / "store" / "cache").rglob("*.safetensors"))  # its embeddings are kept for all of them
    method, baseline = (Measure(claim, workspace).seed_unit(arm, 0, 1.0) for arm in claim.arms)
    assert set(method.bases) == {"clip-tiny"}
    assert method.bases["clip-tiny"].stages[0].model.embed_dim == 48
    assert not method.bases["clip-tiny"].part.held_out  # the teacher has seen neither the dev part nor the test data
    assert not baseline.bases


PART = """
[claim.overrides.start.parts]
vision = "siglip-tiny"

[claim.bases.siglip-tiny]
model.embed_dim = 32
model.vision = { width = 32, depth = 1, heads = 1, image_size = 16, patch_size = 8 }
model.text = { width = 48, depth = 1, heads = 1, length = 8 }
train = { steps = 3, batch_size = 32 }
scale = { threads = 1 }
"""


def test_a_part_named_by_key_is_a_base_too(make_claim, make_workspace, tmp_path):
    path = make_claim(extends="siglip-tiny")
    with open(path, "a") as file:
        file.write(PART)
    claim = claim_of(path)
    workspace = make_workspace()
    unit = Measure(claim, workspace).seed_unit(claim.method, 0, 1.0)
    assert set(unit.bases) == {"siglip-tiny"}
    workspace.unit(claim.key, unit)
    assert phases(workspace, claim) == ["base", "seed"]
    assert len(list((tmp_path / "store" / "bases").glob("*/model/model.safetensors"))) == 1


def test_a_base_keeps_its_own_data_where_the_claim_says_so(make_claim, make_workspace):
    def source_of(more):
        claim = claim_of(make_claim(extends="clip-tiny-distill", more=more))
        unit = Measure(claim, make_workspace()).seed_unit(claim.method, 0, 1.0)
        return unit.bases["clip-tiny"].stages[0].data.source, claim.train

    own, train = source_of('own_data = ["clip-tiny"]')
    assert own == load_preset("clip-tiny")[0].data.source != train
    replaced, train = source_of("")
    assert replaced == train
    with pytest.raises(PresetError, match="clip-tony"):
        source_of('own_data = ["clip-tony"]')


def test_a_directory_as_teacher_stays_a_directory(make_claim, make_workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip-tiny").mkdir()
    claim = claim_of(make_claim(extends="clip-tiny-distill"))
    assert not Measure(claim, make_workspace()).seed_unit(claim.method, 0, 1.0).bases


def test_two_figures_of_one_model_are_trained_for_once(make_claim, make_workspace, tmp_path):
    more = f'baseline = "{(tmp_path / "toy.toml").as_posix()}"\nbaseline_metric = "retrieval.text_to_image.r@10"'
    claim = claim_of(make_claim(more=more))
    workspace = make_workspace()
    answer = measured(claim, workspace)
    assert workspace.trained == 2  # a unit a seed
    stored = workspace.results.read(claim.key).units.values()
    for side, metric in (("method", "retrieval.image_to_text.r@10"), ("baseline", "retrieval.text_to_image.r@10")):
        assert sorted(answer[side]["values"]) == sorted(unit["figures"][metric] for unit in stored)
    assert answer["baseline_metric"] == "retrieval.text_to_image.r@10"
    assert "retrieval.text_to_image.r@10 of" in claim_text({**claim.options.model_dump(), "baseline": claim.key})


def test_the_budget_stops_before_a_unit_that_would_not_end_in_time(make_claim, make_workspace):
    claim = claim_of(make_claim())
    now = [0.0]
    workspace = make_workspace(deadline=400.0, clock=lambda: now[0])
    measure = Measure(claim, workspace)
    workspace.unit(claim.key, measure.seed_unit(claim.method, 0, 1.0), expected=300.0)
    now[0] = 399.99
    with pytest.raises(BudgetSpent, match="more than the budget leaves"):
        workspace.unit(claim.key, measure.seed_unit(claim.method, 1, 1.0), expected=300.0)
    workspace.unit(claim.key, measure.seed_unit(claim.method, 0, 1.0))  # what is stored costs nothing
    assert workspace.trained == 1


def test_what_was_never_measured_comes_first_then_the_stalest(make_claim, make_workspace):
    base = claim_of(make_claim())
    never, old, new, current = (type(base)(**{**base.__dict__, "key": name}) for name in ("never", "old", "new", "current"))
    workspace = make_workspace()
    for name, day in (("old", "01"), ("new", "02")):
        workspace.results.add_verdict(name, {"data": "real", "finished": f"2026-01-{day}", "units": [name]})
    measured(current, workspace)
    stale = claim_of(make_claim("longer", steps=5))
    never, old, new = (type(base)(**{**stale.__dict__, "key": name}) for name in ("never", "old", "new"))
    assert [claim.key for claim in stalest_first([new, current, old, never], workspace)] == ["never", "old", "new"]


def test_a_claim_without_its_data_does_not_keep_the_others_from_being_measured(make_claim, make_workspace):
    claim = claim_of(make_claim())
    lost = type(claim)(**{**claim.__dict__, "key": "lost", "train": "nowhere/*.tar"})
    workspace = make_workspace()
    found = []
    with pytest.raises(DataError, match="nowhere"):
        found.extend(measure_all([lost, claim], workspace))
    assert [answer["key"] for answer in found] == [claim.key]


TEXT = """\
schema = 1
extends = "lm-tiny"

[method]
key = "toy-lm"

[claim]
baseline = "lm-tiny"
baseline_overrides = { train = { steps = 1 } }
metric = "perplexity.bits_per_character"
direction = "lower"
margin = 0.01
data = "scenes:?n=120"
test = "scenes:?n=20&split=test"
tune = { factors = [1.0] }

[claim.overrides]
model = { width = 32, depth = 1, heads = 2, kv_heads = 1, ffn_width = 64, length = 32 }
data = { packer = { length = 32 } }
train = { steps = 4, batch_size = 8 }
scale = { threads = 1 }
"""


def test_a_language_models_claim_is_measured_by_the_same_means(make_workspace, tmp_path):
    (tmp_path / "toy-lm.toml").write_text(TEXT)
    answer = measured(claim_of(str(tmp_path / "toy-lm.toml")), make_workspace(), seeds=2)
    assert answer["difference"]["mean"] == pytest.approx(answer["baseline"]["mean"] - answer["method"]["mean"])
    assert answer["difference"]["mean"] > 0  # four updates leave fewer bits than one


@pytest.mark.parametrize(("text", "seconds"), [("150m", 9000), ("90s", 90), ("1h30m", 5400), ("0.5h", 1800)])
def test_lengths_of_time(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "150", "m", "1d", "5 m"])
def test_what_is_no_length_of_time_is_refused(text):
    with pytest.raises(RequestError, match="no length of time"):
        seconds_of(text)


def test_the_best_factor_and_ties():
    assert best_factor({0.33: 1.0, 1.0: 2.0, 3.0: 3.0}, "higher") == 3.0
    assert best_factor({0.33: 1.0, 1.0: 2.0, 3.0: 3.0}, "lower") == 0.33
    assert best_factor({0.33: 2.0, 1.0: 2.0, 3.0: 2.0}, "higher") == 1.0


@pytest.mark.parametrize(
    ("gate", "mean", "rise", "held"),
    [
        ({"above": 1.0}, 1.0, 0.0, False), ({"above": 1.0}, 1.1, 0.0, True),
        ({"below": 1.0}, 1.0, 0.0, False), ({"below": 1.0}, 0.9, 0.0, True),
        ({"rises_by": 1.0}, 0.0, 1.0, True), ({"rises_by": 1.0}, 0.0, 0.9, False),
        ({"falls_by": 1.0}, 0.0, -1.0, True), ({"falls_by": 1.0}, 0.0, 1.0, False),
        ({"rises_less_than": 1.0}, 0.0, 1.0, False), ({"rises_less_than": 1.0}, 0.0, -5.0, True),
        ({"falls_less_than": 1.0}, 0.0, -1.0, False), ({"falls_less_than": 1.0}, 0.0, -0.9, True),
        ({"above": 0.0, "falls_less_than": 1.0}, 1.0, -2.0, False),
    ],
)  # fmt: skip
def test_gates(gate, mean, rise, held):
    assert gate_holds(GateOptions(metric="x", **gate), mean, rise) is held


def test_a_missed_gate_takes_the_verdict(make_claim, make_workspace):
    gates = 'gates = [{ metric = "retrieval.image_to_text.r@1", above = 100.0 }]\ndirection = "higher"'
    claim = claim_of(make_claim(more=gates))
    measurement = Measure(claim, make_workspace()).run()
    answer = measurement.to_json("x")
    assert [gate["held"] for gate in answer["gates"]] == [False]
    assert answer["verdict"] != "holds"
    sure = type(measurement)(**{**measurement.__dict__, "figures": {claim.method.name: [90.0, 91.0], claim.baseline.name: [1.0, 2.0]}})
    assert sure.difference.verdict(claim.options.margin) == "holds"
    assert sure.to_json("x")["verdict"] == "fails"


def test_a_metric_that_the_task_does_not_give_is_named(make_claim, make_workspace):
    claim = claim_of(make_claim())
    options = claim.options.model_copy(update={"metric": "retrieval.image_to_text.r@11"})
    with pytest.raises(RequestError, match=r"r@11.*\n.*r@10"):
        Measure(type(claim)(**{**claim.__dict__, "options": options}), make_workspace(), seeds=1).run()


def test_a_run_that_diverges_is_no_result(make_claim, make_workspace, monkeypatch):
    claim = claim_of(make_claim())
    monkeypatch.setattr(units, "evaluate_in_memory", lambda *a, **k: [_Result()])
    workspace = make_workspace()
    with pytest.raises(RunFailed, match="not a number"):
        workspace.unit(claim.key, Measure(claim, workspace).seed_unit(claim.method, 0, 1.0))
    assert not workspace.results.read(claim.key).units


class _Result:
    name, intervals = "retrieval", {}

    def flat(self):
        return {"retrieval/r@1": float("nan")}


def test_the_models_of_a_unit_are_ordinary_runs(make_claim, make_workspace, tmp_path):
    """A unit's directory holds a preset that vlm itself would run."""
    claim = claim_of(make_claim())
    unit = Measure(claim, make_workspace()).seed_unit(claim.method, 0, 1.0)
    folder = tmp_path / "store" / "units" / "kept"
    units.train_unit(unit, folder, {}, keep=True)
    preset, _ = load_preset(str(folder))
    assert preset.train.seed == 0
    assert Run.resume(folder, note=lambda text: None).train().steps == 4
