"""From a preset's claim to arms that differ by what the claim says and by nothing else."""

from pathlib import Path

import pytest

from vlm.config.catalogue import list_presets
from vlm.config.errors import DataError, PresetError, RequestError
from vlm.config.load import resolve
from vlm.training.preset import stages_of
from vlm.workflows.reproduce.claim import (
    BUILTIN,
    BUILTIN_TEST,
    BUILTIN_TRAIN,
    claim_of,
    presets_with_claims,
    settled,
    trained_on,
    with_length,
    with_rate,
    with_seed,
)
from vlm.workflows.reproduce.unit import sources_of

CLAIMS = presets_with_claims([entry.key for entry in list_presets()])


def test_some_presets_make_claims():
    assert {"siglip-tiny", "clip-tiny-distill"} <= set(CLAIMS)


@pytest.mark.parametrize("key", CLAIMS)
def test_every_claim_of_a_preset_can_be_measured(key):
    """Both arms are presets that train, and the metric is one of a task that the method's preset has."""
    claim = claim_of(key)
    assert claim.method.name == key
    assert claim.tasks
    for arm in claim.arms:
        preset, resolved = settled(arm.values)
        assert {uri for stage in stages_of(resolved) for uri in sources_of(stage)} == {claim.train}
        assert preset.claim is None
        assert not preset.evaluation.tasks  # scored by the rig, on the test data, not inside the run
    assert claim.test != claim.train


def test_overrides_reach_both_arms_and_the_baselines_own_come_after(make_claim):
    more = "baseline_overrides = { train = { steps = 3, seed = 9 } }"
    claim = claim_of(make_claim(steps=6, more=more))
    method, baseline = (settled(arm.values)[0] for arm in claim.arms)
    assert (method.train.steps, baseline.train.steps) == (6, 3)
    assert (method.train.seed, baseline.train.seed) == (0, 9)
    assert method.model.vision.width == baseline.model.vision.width == 32
    assert method.objectives[0].form == "sigmoid"
    assert baseline.objectives[0].form == "softmax"


def test_an_ablation_names_its_own_key(make_claim, tmp_path):
    more = f'baseline = "{(tmp_path / "toy.toml").as_posix()}"\nbaseline_overrides = {{ model = {{ log_scale = 0.0 }} }}'
    path = make_claim(more=more)
    own = claim_of(path)
    assert own.method.name == "toy-siglip-tiny"
    assert own.baseline.name != own.method.name
    assert settled(own.baseline.values)[0].model.log_scale == 0.0
    assert settled(own.method.values)[0].model.log_scale != 0.0


def test_the_baseline_may_be_another_figure_of_the_same_model(make_claim, tmp_path):
    more = f'baseline = "{(tmp_path / "toy.toml").as_posix()}"\nbaseline_metric = "retrieval.text_to_image.r@10"'
    claim = claim_of(make_claim(more=more))
    assert claim.baseline.name == "toy-siglip-tiny (retrieval.text_to_image.r@10)"
    assert claim.baseline.values == claim.method.values
    assert claim.metric_of(claim.method.name) == "retrieval.image_to_text.r@10"
    assert claim.metric_of(claim.baseline.name) == "retrieval.text_to_image.r@10"
    with pytest.raises(RequestError, match=r"reads 'nothing\.at\.all', which no evaluation task gives"):
        claim_of(make_claim(more=more.replace("retrieval.text_to_image.r@10", "nothing.at.all")))


def test_training_data_of_a_claim_take_the_place_of_every_source():
    values = {
        "data": {"val": "v"},
        "stages": [
            {
                "name": "a", "evaluation": {"every": 1},
                "data": {"mixture": {"x": {"source": "old", "weight": 2.0}, "y": {"source": "other"}}},
            },
            {"name": "b", "data": {"source": "old"}},
        ],
    }
    out = trained_on(values, "new")
    assert out["stages"] == [
        {"name": "a", "data": {"mixture": {"x": {"source": "new", "weight": 2.0}, "y": {"source": "new"}}}},
        {"name": "b", "data": {"source": "new"}},
    ]
    assert out["data"] == {}  # every stage has its own: one at the top would stand beside the mixture
    assert trained_on({**values, "stages": [*values["stages"], {"name": "c"}]}, "new")["data"] == {"source": "new"}
    assert trained_on({"data": {"mixture": {"x": {"source": "old"}}}}, "new")["data"] == {"mixture": {"x": {"source": "new"}}}
    assert trained_on({"stages": [{"name": "a"}]}, "new")["data"] == {"source": "new"}
    assert trained_on(values, None)["stages"][0]["data"] == values["stages"][0]["data"]


def test_controls_and_gates_are_further_arms(make_claim):
    more = """
controls = [{ name = "short", overrides = { train = { steps = 1 } } }, { name = "student", preset = "clip-tiny-student" }]
gates = [
  { metric = "retrieval.text_to_image.r@1", above = 0.0 },
  { metric = "retrieval.text_to_image.r@1", against = "short", rises_by = 0.0 },
  { metric = "retrieval.text_to_image.r@1", against = { overrides = { train = { steps = 2 } } }, falls_less_than = 50.0 },
]"""
    claim = claim_of(make_claim(more=more))
    assert [arm.name for arm in claim.arms[2:]] == ["short", "student", "gate-2"]
    assert settled(claim.arms[2].values)[0].train.steps == 1
    assert settled(claim.arms[3].values)[0].objectives[0].form == "softmax"
    assert settled(claim.arms[4].values)[0].train.steps == 2


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ('baseline_overrides = { train = { stepz = 3 } }', PresetError, "stepz"),
        ('gates = [{ metric = "retrieval.x", against = "nobody", rises_by = 1.0 }]', RequestError, "nobody"),
        ('gates = [{ metric = "perplexity.bits", above = 1.0 }]', RequestError, "no evaluation task gives"),
        ('controls = [{ name = "clip-tiny" }]', RequestError, "twice"),
        ('baseline = "clip-tinny"', PresetError, "clip-tiny"),
    ],
)
def test_a_wrong_claim_is_one_clear_error(make_claim, more, error, words):
    with pytest.raises(error, match=words):
        claim_of(make_claim(more=more))


def test_a_preset_without_a_claim_says_so():
    with pytest.raises(RequestError, match="makes no claim"):
        claim_of("clip-tiny")


def test_absent_data_are_named_with_the_way_out(make_claim, pictures):
    path = Path(make_claim())
    path.write_text(path.read_text().replace(f"{pictures.as_posix()}/train.jsonl", "nowhere/train-*.tar"))
    with pytest.raises(DataError, match=r"nowhere/train-\*\.tar") as caught:
        claim_of(str(path)).check_data()
    assert caught.value.exit_code == 3
    assert "--data builtin" in caught.value.remedy


def test_builtin_data_take_the_place_of_both(make_claim):
    claim = claim_of(make_claim(), BUILTIN)
    assert (claim.data, claim.train, claim.test) == (BUILTIN, BUILTIN_TRAIN, BUILTIN_TEST)
    claim.check_data()


STAGED = {
    "schema": 1,
    "train": {"steps": 100},
    "optimizer": {"lr": 0.5},
    "stages": [{"name": "a", "train": {"steps": 10}}, {"name": "b", "optimizer": {"lr": 0.25}}, {"name": "c", "train": {"epochs": 2.0}}],
}


def test_lengths_shrink_in_every_stage():
    short = with_length(STAGED, 0.34)
    assert short["train"]["steps"] == 34
    assert [stage.get("train") for stage in short["stages"]] == [{"steps": 3}, None, {"epochs": 0.68}]
    assert with_length({"train": {"steps": 1}}, 0.1)["train"]["steps"] == 1
    assert with_length({"train": {"steps": 0}}, 0.5)["train"]["steps"] == 0  # the model as it starts stays that
    assert STAGED["train"]["steps"] == 100


def test_rates_are_multiplied_where_they_are_set_and_where_they_are_the_default():
    values = claim_of("siglip-tiny").method.values
    assert settled(with_rate(values, 3.0))[0].optimizer.lr == pytest.approx(3 * settled(values)[0].optimizer.lr)
    bare = {name: table for name, table in values.items() if name != "optimizer"}
    default = settled(bare)[0].optimizer.lr
    assert settled(with_rate(bare, 3.0))[0].optimizer.lr == pytest.approx(3 * default)
    staged = {**values, "stages": [{"name": "a", "optimizer": {"lr": 0.25}}, {"name": "b"}]}
    assert with_rate(staged, 2.0)["stages"][0]["optimizer"]["lr"] == 0.5


def test_a_seed_changes_the_seed_alone():
    values = claim_of("siglip-tiny").method.values
    seeded = with_seed(values, 7)
    assert seeded["train"].pop("seed") == 7
    assert seeded == values


def test_the_claims_of_presets_name_their_data_and_a_baseline():
    """Real data, or drawn scenes of two splits, which share no composition."""
    for key in CLAIMS:
        claim = resolve(key).values["claim"]
        if claim["data"].startswith(("scenes:", "digits:", "clips:")):
            assert "split" not in claim["data"]
            assert claim["test"].startswith(("scenes:", "digits:", "clips:"))
            assert "split=test" in claim["test"]
        else:
            assert claim["data"].startswith("data/")
            assert claim["test"].startswith("data/")
        assert claim["margin"] > 0
