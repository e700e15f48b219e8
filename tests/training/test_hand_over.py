"""From stage to stage: what is carried, what is renewed, and that a run stopped inside any stage ends with the same bits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.training.test_resume import TOY, begin, digest, finish
from vlm.config.errors import CheckpointError, PresetError, RequestError
from vlm.training import run as module
from vlm.training.carry import Carried
from vlm.training.companions import Companions
from vlm.training.optimizer import NamedOptimizer, OptimizerOptions
from vlm.training.plan import make_plan
from vlm.training.preset import load_preset
from vlm.training.trainer import Cursor, Trainer


def distil(teacher, **more):
    return {"name": f"from-{teacher}", "kind": "distill", "teacher": teacher} | more


def stages(*tables):
    return "stages=[" + ", ".join(_toml(table) for table in tables) + "]"


def _toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_toml(item)}' for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def first(**more):
    return {"name": "first", "train": {"steps": 4}} | more


def second(**more):
    return {"name": "second", "train": {"steps": 4}, "optimizer": {"lr": 1e-4}} | more


LORA = 'tuning.lora={r=2, target=["*.attention.q", "*.attention.v"]}'
LIVE = {"source": "model", "update": {"kind": "live"}}
OFF = {"source": "model", "adapter": "off"}
EMA = {"source": "model", "update": {"kind": "ema", "decay": 0.9}}
THREE = {"source": "model", "update": {"kind": "three-way", "decay": 0.8, "with": "previous"}}

CASES = {
    "live": [stages(first(), second(companions={"online": LIVE}, objectives=[distil("online", target="similarity")]))],
    "adapter-off": [
        LORA,
        stages(
            first(companions={"base": OFF}, objectives=[distil("base")]),
            second(companions={"base": OFF, "online": LIVE}, objectives=[distil("base"), distil("online", target="similarity")]),
        ),
    ],
    "three-way": [
        stages(
            first(companions={"momentum": EMA, "previous": {"source": "model"}}, objectives=[distil("momentum")]),
            second(companions={"momentum": THREE, "previous": {"source": "model"}}, objectives=[distil("momentum")]),
        ),
    ],
    "of-a-stage": [stages(first(), second(companions={"before": {"source": "stage:first"}}, objectives=[distil("before")]))],
    "of-a-stage-moving": [
        stages(first(), second(companions={"before": EMA | {"source": "stage:first"}}, objectives=[distil("before")]))
    ],
    "of-a-stage-with-adapters": [
        LORA,
        stages(first(), second(companions={"before": {"source": "stage:first"}}, objectives=[distil("before")])),
    ],
    "once-a-run": [
        stages(
            first(companions={"anchor": EMA | {"refresh": "run"}}, objectives=[distil("anchor")]),
            {"name": "between", "train": {"steps": 4}, "optimizer": {"kind": "sgd"}},
            second(companions={"anchor": EMA | {"refresh": "run"}}, objectives=[distil("anchor")]),
        ),
    ],
    "once-a-run-with-adapters": [
        LORA,
        stages(
            first(companions={"anchor": {"source": "model", "refresh": "run"}}, objectives=[distil("anchor")]),
            second(companions={"anchor": {"source": "model", "refresh": "run"}}, objectives=[distil("anchor")]),
        ),
    ],
    "own-temperature": [
        "objectives.contrastive.temperature=own",
        stages(first(), second(optimizer={"lr": 1e-4, "reset": True}), {"name": "third", "train": {"steps": 4}}),
    ],
    "average": ["train.average=0.9", stages(first(), second())],
}


@pytest.mark.parametrize("settings", list(CASES.values()), ids=list(CASES))
def test_resume_inside_any_stage_is_bit_exact(tmp_path, settings):
    begin(tmp_path / "whole", *settings, "train.checkpoint_every=2").train()
    expected = digest(tmp_path / "whole")
    updates = len(expected[1])
    assert updates in (8, 12)
    for step in (6,) if updates == 8 else (6, 10):
        work = tmp_path / "work"
        shutil.copytree(tmp_path / "whole", work)
        for path in (work / "checkpoints").iterdir():
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        assert (work / "checkpoints" / f"step-{step}").is_dir()
        finish(work)
        assert digest(work) == expected, f"from step {step}"
        shutil.rmtree(work)


def watched(monkeypatch, output, *settings):
    """The parts of each stage as it begins (states copied), and as it ends."""
    begins, ends = [], []
    run = Trainer.run

    def spying(self):
        begins.append(_state(self.parts))
        run(self)
        ends.append(_state(self.parts))

    monkeypatch.setattr(Trainer, "run", spying)
    begin(output, *settings).train()
    return begins, ends


def _state(parts):
    copy = lambda tree: {k: v.detach().clone() for k, v in tree.items()}  # noqa: E731
    return {
        "model": copy(parts.model.state_dict()),
        "objectives": copy(parts.objectives.state_dict()),
        "optimizer": {n: copy(slots) for n, slots in parts.optimizer.state_dict().items()},
        "companions": {n: copy(m.model.state_dict()) for n, m in parts.companions.members.items()},
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_ctp_objectives_keep_their_state_and_the_optimiser_its_moments(tmp_path, monkeypatch):
    tables = stages(first(), second(), {"name": "third", "train": {"steps": 2}, "optimizer": {"reset": True}})
    begins, ends = watched(monkeypatch, tmp_path / "run", "objectives.contrastive.temperature=own", tables)
    assert float(begins[1]["objectives"]["contrastive.log_scale"]) != float(begins[0]["objectives"]["contrastive.log_scale"])
    for before, after in ((0, 1), (1, 2)):
        assert same(ends[before]["objectives"], begins[after]["objectives"])
        assert same(ends[before]["model"], begins[after]["model"])
    assert ends[0]["optimizer"].keys() == begins[1]["optimizer"].keys()
    for name, slots in ends[0]["optimizer"].items():
        assert same(slots, begins[1]["optimizer"][name])
    assert "objectives.contrastive.log_scale" in begins[1]["optimizer"]
    assert any(bool(slots) for slots in ends[1]["optimizer"].values())
    assert not any(begins[2]["optimizer"].values())  # reset


def test_ctp_copies_are_taken_anew_when_a_task_begins(tmp_path, monkeypatch):
    tables = stages(
        first(companions={"momentum": EMA}, objectives=[distil("momentum")]),
        second(companions={"momentum": THREE, "previous": {"source": "model"}}, objectives=[distil("momentum")]),
    )
    begins, ends = watched(monkeypatch, tmp_path / "run", tables)
    assert set(ends[0]["companions"]) == {"momentum"}
    assert not same(ends[0]["companions"]["momentum"], ends[0]["model"])
    assert same(begins[1]["companions"]["momentum"], begins[1]["model"])
    assert same(begins[1]["companions"]["previous"], ends[0]["model"])
    assert same(ends[1]["companions"]["previous"], ends[0]["model"])
    assert not same(ends[1]["companions"]["momentum"], ends[1]["model"])


def test_a_copy_for_the_run_is_that_of_the_first_stage_that_has_it(tmp_path, monkeypatch):
    anchor = {"companions": {"anchor": EMA | {"refresh": "run"}}, "objectives": [distil("anchor")]}
    begins, ends = watched(monkeypatch, tmp_path / "run", stages(first(**anchor), {"name": "x", "train": {"steps": 2}}, second(**anchor)))
    assert same(begins[0]["companions"]["anchor"], begins[0]["model"])
    assert not ends[1]["companions"]
    assert same(begins[2]["companions"]["anchor"], ends[0]["companions"]["anchor"])


def test_povid_adapters_end_with_their_stage_and_the_reference_is_its_end(tmp_path, monkeypatch):
    online = {"companions": {"base": OFF}, "objectives": [distil("base")]}
    begins, ends = watched(monkeypatch, tmp_path / "run", LORA, stages(first(**online), second(**online)))
    lora_b = [name for name in begins[1]["model"] if ".lora_B." in name]
    assert lora_b
    assert any(ends[0]["model"][name].any() for name in lora_b)
    for name in lora_b:
        assert not begins[1]["model"][name].any()  # new adapters add nothing
        base = name.partition(".lora_B.")[0]
        delta = 8.0 * ends[0]["model"][name] @ ends[0]["model"][name.replace("lora_B", "lora_A")]  # alpha / r = 16 / 2
        weights = [state["model"][f"{base}.base_layer.weight"] for state in (ends[0], begins[1], ends[1])]
        assert torch.allclose(weights[1], weights[0] + delta, atol=1e-6)
        assert torch.equal(weights[2], weights[1])
    assert not any(slots for name, slots in begins[1]["optimizer"].items() if ".lora_" in name)


def test_the_weights_of_a_stage_are_checked_when_they_are_read(tmp_path):
    output = tmp_path / "run"
    tables = stages(first(), second(companions={"before": {"source": "stage:first"}}, objectives=[distil("before")]))
    begin(output, tables, "train.checkpoint_every=2").train()
    path = output / "stages" / "0.safetensors"
    assert set(load_file(path)) == set(load_file(output / "checkpoints" / "step-6" / "model.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    shutil.rmtree(output / "checkpoints" / "step-8")
    with pytest.raises(CheckpointError, match=r"'before'.*altered"):
        finish(output)


def test_a_stage_that_no_one_names_leaves_no_weights(tmp_path):
    begin(tmp_path / "run", stages(first(), second())).train()
    assert not (tmp_path / "run" / "stages").exists()


def test_a_stage_that_cannot_have_been_run_is_refused(tmp_path):
    with pytest.raises(PresetError, match=r"'before' of stage 'first' names a stage 'frist'[\s\S]*first, second"):
        load_preset(TOY, [stages(first(companions={"before": {"source": "stage:frist"}}), second())])
    run = begin(tmp_path / "run", stages(first(companions={"before": {"source": "stage:second"}}, objectives=[distil("before")]), second()))
    with pytest.raises(RequestError, match="'second' has not been run when stage 'first' begins"):
        run.train()
    assert not (tmp_path / "run").exists()


def parameters(**shapes):
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}


def used(options, named):
    optimizer = NamedOptimizer(options, named, [])
    for parameter in named.values():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step(1.0)
    return optimizer


def test_moments_go_to_parameters_of_the_same_name_and_shape_only():
    carried, options = Carried(), OptimizerOptions()
    old = used(options, parameters(kept=(2, 3), reshaped=(2, 3), gone=(2,), lora=(1,)) | {"x.base_layer.w": nn.Parameter(torch.ones(2))})
    carried.take(nn.ModuleDict(), Companions(), old)
    new = NamedOptimizer(options, parameters(kept=(2, 3), reshaped=(3, 2), fresh=(2,)) | {"x.w": nn.Parameter(torch.ones(2))}, [])
    carried.give(nn.ModuleDict(), Companions(), new)
    state = new.state_dict()
    assert {name for name, slots in state.items() if slots} == {"kept", "x.w"}
    assert torch.equal(state["kept"]["exp_avg"], old.state_dict()["kept"]["exp_avg"])
    assert float(state["kept"]["step"]) == 1
    for parameter in new.named.values():
        parameter.grad = torch.ones_like(parameter)
    new.step(1.0)  # parameters with and without moments step together
    assert float(new.state_dict()["kept"]["step"]) == 2
    assert float(old.state_dict()["kept"]["step"]) == 1


@pytest.mark.parametrize("after", [OptimizerOptions(reset=True), OptimizerOptions(kind="sgd")])
def test_another_optimiser_begins_without_moments(after):
    carried = Carried()
    carried.take(nn.ModuleDict(), Companions(), used(OptimizerOptions(), parameters(kept=(2,))))
    new = NamedOptimizer(after, parameters(kept=(2,)), [])
    carried.give(nn.ModuleDict(), Companions(), new)
    assert not new.state_dict()["kept"]


class Queue(nn.Module):
    def __init__(self, size, word="new"):
        super().__init__()
        self.register_buffer("rows", torch.zeros(size))
        self.register_buffer("place", torch.tensor(0))
        self.word = word

    def get_extra_state(self):
        return {"word": self.word}

    def set_extra_state(self, state):
        self.word = state["word"]


def test_ctp_a_queue_is_not_emptied_and_survives_a_stage_without_it():
    carried, optimizer = Carried(), NamedOptimizer(OptimizerOptions(), parameters(x=(1,)), [])
    queue = Queue(3, "old")
    queue.rows += torch.arange(3)
    queue.place += 2
    carried.take(nn.ModuleDict({"queue": queue}), Companions(), optimizer)
    queue.rows.zero_()
    carried.give(nn.ModuleDict({"other": Queue(3)}), Companions(), optimizer)
    again = Carried()
    again.load_state_dict(carried.state_dict())  # as a checkpoint of the stage without it keeps it
    again.take(nn.ModuleDict({"other": Queue(3)}), Companions(), optimizer)
    renewed, longer = Queue(3), Queue(4)
    again.give(nn.ModuleDict({"queue": renewed}), Companions(), optimizer)
    assert renewed.rows.tolist() == [0, 1, 2]
    assert int(renewed.place) == 2
    assert renewed.word == "old"
    assert "queue" not in again.objectives  # it is the stage's from here on
    again.take(nn.ModuleDict({"queue": renewed}), Companions(), optimizer)
    again.give(nn.ModuleDict({"queue": longer}), Companions(), optimizer)
    assert longer.rows.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("settings", list(CASES.values()), ids=list(CASES))
def test_every_stage_can_be_planned_before_anything_is_run(tmp_path, settings):
    preset, resolved = load_preset(TOY, ["scale.threads=1", *settings])
    run = module.Run(module.RunDirectory(tmp_path), preset, resolved, note=lambda text: None)
    for index, stage in enumerate(run.stages):
        parts = run.assemble(stage, Cursor(stage=index), initial=True, rehearse=True)
        before = {name: t.clone() for name, t in parts.model.state_dict().items()}
        plan = make_plan(parts, str(tmp_path))
        parts.loader.close()
        assert plan.seconds > 0
        assert same(before, parts.model.state_dict())
        own = sum(p.numel() for m in parts.companions.members.values() if not m.live for p in m.model.parameters())
        assert plan.memory.get("companions", 0) == 4 * own
