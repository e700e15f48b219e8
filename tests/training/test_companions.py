"""Companions: what each kind is, how it follows the model, and that it never disturbs the model itself."""

import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from tests.training.test_engine import VOCABULARY, encoder, engine_of, gradients, pairs
from vlm.config.errors import CheckpointError, RequestError
from vlm.models import LanguageOptions, save_model
from vlm.objectives import ContrastiveOptions, DistillOptions
from vlm.training.companion_options import CompanionOptions
from vlm.training.companion_sources import CompanionSources
from vlm.training.companions import Companion, Companions, evaluating
from vlm.training.engine import Clock, Engine, Weighted
from vlm.tuning import LoraOptions, adapters_off, add_lora, load_merged, merged_state
from vlm.types import Context, Outputs, Request, SingleProcess, Views

EMBEDDING = Request.parse("model/text.embedding")


def options(**table):
    return CompanionOptions.model_validate(table)


def made(model, tables, *, asked=None, kept=None, notes=None):
    sources = CompanionSources({name: options(**table) for name, table in tables.items()}, model, None, kept or {})
    asked = list(tables) if asked is None else asked
    requests = {"objective": [Request.parse(f"{name}/text.embedding") for name in asked]}
    return sources.companions(requests, (notes if notes is not None else []).append)


class Noisy(torch.nn.Module):
    """Dropout before another module."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.dropout = inner, torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.inner(self.dropout(x))

    @property
    def weight(self):
        return self.inner.weight


def with_dropout(model):
    model.vision.patch = Noisy(model.vision.patch)
    model.text.projection = Noisy(model.text.projection)
    return model


def embeddings(views, who):
    return torch.cat([views[f"{who}/image"].embedding, views[f"{who}/text"].embedding])


REQUESTS = [Request.parse(f"{who}/{stream}.embedding") for who in ("online",) for stream in ("image", "text")]


def test_povid_a_live_companion_is_the_model_without_dropout_and_without_gradient():
    model = with_dropout(encoder()).train()
    model.vision.patch.inner.eval()  # a module that was in evaluation mode stays there
    companions = made(model, {"online": {"source": "model", "update": {"kind": "live"}}})
    assert companions.models()["online"] is model
    found = embeddings(companions.views(pairs(4), REQUESTS), "online")
    again = embeddings(companions.views(pairs(4), REQUESTS), "online")
    assert torch.equal(found, again)
    assert not found.requires_grad
    assert [m.training for m in model.modules()].count(False) == 1
    with evaluating(model), torch.no_grad():
        plain = model.encode(pairs(4), {"image": frozenset({"embedding"}), "text": frozenset({"embedding"})})
    assert torch.equal(found, torch.cat([plain["image"].embedding, plain["text"].embedding]))
    with torch.no_grad():
        model.vision.patch.inner.weight += 1
    assert not torch.equal(embeddings(companions.views(pairs(4), REQUESTS), "online"), found)  # it follows at once
    assert companions.state_dict() == {}


def test_povid_without_its_adapter_the_model_is_the_base_and_learns_as_before():
    model = encoder()
    batch = pairs(4)
    with torch.no_grad():
        base = model.encode(batch, {"text": frozenset({"embedding"})})["text"].embedding
    add_lora(model, LoraOptions(r=2))
    model.double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    companions = made(model, {"online": {"source": "model", "adapter": "off"}})
    assert torch.equal(companions.views(batch, REQUESTS)["online/text"].embedding, base)  # zero adapters
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.3
        tuned = model.encode(batch, {"text": frozenset({"embedding"})})["text"].embedding
    assert not torch.allclose(tuned, base)
    assert torch.equal(companions.views(batch, REQUESTS)["online/text"].embedding, base)
    with torch.no_grad():
        assert torch.equal(model.encode(batch, {"text": frozenset({"embedding"})})["text"].embedding, tuned)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learns
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learns


def test_an_adapter_that_is_not_there_cannot_be_switched_off():
    with pytest.raises(RequestError, match=r"'online'.*no adapters"):
        made(encoder(), {"online": {"source": "model", "adapter": "off"}})


def distilled(model, companions):
    """A batch-scope and a sample-scope objective beside the contrastive one, with a live teacher."""
    entries = [
        ContrastiveOptions(),
        DistillOptions(teacher="online", target="similarity", name="rows"),
        DistillOptions(teacher="online", name="feature"),
    ]
    return engine_of(model, entries, companions=companions)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_live_companion_does_not_disturb_the_models_draws(adapter):
    """With dropout on, cutting the update into micro-batches of the same draws gives the gradients of a plain update, and
    those of the model alone are what they are without the companion."""

    def build(live):
        model = with_dropout(encoder()).train()
        if adapter:
            torch.manual_seed(3)
            add_lora(model, LoraOptions(r=2, dropout=0.3))
            model.double()
        table = {"source": "model", "adapter": "off"} if adapter else {"source": "model", "update": {"kind": "live"}}
        return model, made(model, {"online": table}) if live else Companions()

    batches = pairs(6).split(3)
    model, companions = build(True)
    engine = distilled(model, companions)
    first = engine.update(batches, Clock(2, 10))
    second_model, second_companions = build(True)
    second = distilled(second_model, second_companions)
    assert first.losses == second.update(batches, Clock(2, 10)).losses
    for a, b in zip(gradients(engine), gradients(second), strict=True):
        assert torch.equal(a, b)
    alone_model, _ = build(False)
    alone = engine_of(alone_model, [ContrastiveOptions()]).update(batches, Clock(2, 10))
    assert alone.losses["contrastive"] == first.losses["contrastive"]
    # The exact gradient of the whole update with the draws that each micro-batch has, by plain autograd.
    whole_model, whole_companions = build(True)
    whole = distilled(whole_model, whole_companions)
    views = [whole._views(batch, Clock(2, 10), index) for index, batch in enumerate(batches)]
    joined = Views()
    for key in views[0]:
        parts = [view[key] for view in views]
        index = torch.cat([p.sample_index + 2 * i for i, p in enumerate(parts)])
        joined[key] = Outputs(
            index, torch.cat([p.mask for p in parts]), torch.cat([p.embedding for p in parts]),
            log_scale=whole_model.scale(), bias=whole_model.bias,
        )  # fmt: skip
    context = Context(batch=pairs(6), communicator=SingleProcess(), step=2, progress=0.2, draw_seed=0)
    loss = sum(t.total() / t.weights.sum() for t in (o.objective(joined, context) for o in whole.objectives))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(first.loss, abs=1e-6)
    for a, b in zip(gradients(engine), gradients(whole), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_live_companions_compute_in_the_models_precision():
    model = encoder().float()
    companions = made(model, {"online": {"source": "model", "update": {"kind": "live"}}})
    requests = [Request.parse(f"{who}/text.embedding") for who in ("model", "online")]
    entry = Weighted("none", _Asks(requests), 1.0)
    engine = Engine(model, [entry], companions, SingleProcess(), seed=0, precision="bfloat16")
    views = engine._views(pairs(3), Clock(0, 1), 0)
    assert torch.equal(views["model/text"].embedding, views["online/text"].embedding)


class _Asks(torch.nn.Module):
    scope, reads = "sample", ()

    def __init__(self, requests):
        super().__init__()
        self.requires = tuple(requests)


def moved(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for number, parameter in enumerate(other.parameters()):
            parameter += 0.1 * (number + 1)
    return other


THREE_WAY = {
    "momentum": {"source": "model", "update": {"kind": "three-way", "decay": 0.9, "with": "previous"}},
    "previous": {"source": "model"},
}


def test_ctp_three_way_update_moves_to_the_middle_of_model_and_reference():
    start = encoder()
    companions = made(start, THREE_WAY, asked=["momentum"])  # what it moves with is made too
    now = moved(start)
    companions.after_step(now)
    for key, tensor in companions.models()["momentum"].state_dict().items():
        m, theta, reference = (start.state_dict()[key], now.state_dict()[key], start.state_dict()[key])
        assert torch.allclose(tensor, 0.9 * m + 0.05 * theta + 0.05 * reference, atol=1e-12)
        assert torch.equal(companions.models()["previous"].state_dict()[key], reference)


def test_ctp_three_way_update_with_an_equal_reference_is_the_ordinary_average():
    start = encoder()
    companions = made(start, THREE_WAY)
    now = moved(start)
    companions.models()["previous"].load_state_dict(now.state_dict())
    plain = made(start, {"momentum": {"source": "model", "update": {"kind": "ema", "decay": 0.9}}})
    for _ in range(3):
        companions.after_step(now)
        plain.after_step(now)
    for key, tensor in plain.models()["momentum"].state_dict().items():
        assert torch.allclose(companions.models()["momentum"].state_dict()[key], tensor, atol=1e-12)


def test_ctp_at_a_tasks_start_nothing_is_to_be_distilled():
    model = encoder()
    companions = made(model, {"previous": {"source": "model"}})
    engine = engine_of(model, [DistillOptions(teacher="previous", target="similarity")], companions=companions)
    assert engine.update([pairs(6)], Clock(0, 10)).loss == pytest.approx(0.0, abs=1e-6)
    assert all(p.grad is None for p in companions.models()["previous"].parameters())


@pytest.mark.parametrize(
    "previous", [None, {"source": "model", "update": {"kind": "live"}}, {"source": "model", "update": {"kind": "ema"}}]
)
def test_a_three_way_update_needs_a_frozen_third(previous):
    tables = {"momentum": THREE_WAY["momentum"]} | ({"previous": previous} if previous else {})
    with pytest.raises(RequestError, match="'previous', which is no frozen companion"):
        made(encoder(), tables)


def test_a_companion_that_moves_must_have_the_models_shape(tmp_path):
    save_model(encoder(embed_dim=24).float(), tmp_path)
    with pytest.raises(RequestError, match=r"'momentum' cannot follow the model"):
        made(encoder(), {"momentum": {"source": str(tmp_path), "update": {"kind": "ema"}}})


def test_only_companions_that_an_objective_asks_for_are_made():
    notes = []
    tables = {"teacher": {"source": "/no/such/model"}, "momentum": {"source": "model"}}
    assert set(made(encoder(), tables, asked=["momentum"], notes=notes).members) == {"momentum"}
    assert "'teacher'" in notes[0]
    with pytest.raises(CheckpointError, match="'teacher': no such model"):
        made(encoder(), tables)
    with pytest.raises(RequestError, match=r"'objective' asks for reference/text.embedding"):
        made(encoder(), {}, asked=["reference"])


def test_making_companions_draws_nothing(tmp_path):
    save_model(encoder().float(), tmp_path)
    model = encoder()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    made(model, {"teacher": {"source": str(tmp_path)}, "copy": {"source": "model"}})
    assert torch.equal(torch.rand(3), expected)


def test_a_copy_for_the_whole_run_keeps_its_weights_whatever_adapters_the_stage_has():
    first = encoder()
    kept = {"anchor": {name: t.clone() for name, t in first.state_dict().items()}}
    now = moved(first)
    add_lora(now, LoraOptions(r=2))
    now.double()
    table = {"anchor": {"source": "model", "refresh": "run"}}
    anchor = made(now, table, kept=kept).models()["anchor"]
    state = merged_state(anchor)
    assert all(torch.equal(state[name], tensor) for name, tensor in kept["anchor"].items())
    with torch.no_grad():
        for parameter in anchor.parameters():
            parameter += 1
    load_merged(anchor, kept["anchor"])
    assert all(torch.equal(merged_state(anchor)[name], tensor) for name, tensor in kept["anchor"].items())
    fresh = made(now, {"anchor": {"source": "model"}}, kept=kept).models()["anchor"]
    assert not torch.equal(merged_state(fresh)["log_scale"], kept["anchor"]["log_scale"])


@pytest.mark.parametrize(
    "table",
    [
        {"source": "dir", "update": {"kind": "live"}},
        {"source": "dir", "adapter": "off"},
        {"source": "model", "adapter": "off", "update": {"kind": "ema"}},
        {"source": "dir", "refresh": "run"},
        {"source": "model", "refresh": "run", "update": {"kind": "live"}},
        {"source": "model", "cache": True, "update": {"kind": "ema"}},
        {"source": "model", "cache": True, "adapter": "off"},
        {"source": "model", "update": {"kind": "three-way"}},
        {"source": "model", "update": {"kind": "sometimes"}},
        {"source": "model", "adapter": "on"},
    ],
)
def test_impossible_tables_are_refused(table):
    with pytest.raises(ValidationError):
        options(**table)


def test_a_cache_serves_one_row_a_sample_only(tmp_path):
    """A sample's rows share its id: several of them are encoded anew instead of being mixed up."""
    batch = pairs(4)
    text = batch["text"]
    several = batch.with_streams({"text": replace(text, sample_index=torch.tensor([0, 0, 1, 3]), slot=torch.tensor([0, 1, 0, 0]))})
    member = Companion("teacher", encoder().float(), None, cache_folder=tmp_path)
    companions = Companions([member])
    requests = [Request.parse("teacher/text.embedding")]
    expected = companions.views(several, requests)["teacher/text"].embedding
    assert torch.equal(companions.views(several, requests)["teacher/text"].embedding, expected)
    assert len(member.cache) == 0
    companions.views(batch, requests)
    assert len(member.cache) == 4
    assert torch.equal(companions.views(several, requests)["teacher/text"].embedding, expected)


def test_a_language_model_may_be_its_own_reference():
    torch.manual_seed(0)
    model = LanguageOptions(width=16, depth=1, heads=2, ffn_width=24, length=9).build(VOCABULARY)
    companions = made(model, {"online": {"source": "model", "update": {"kind": "live"}}})
    views = companions.views(pairs(3), [Request.parse("online/text.vocabulary")])
    assert views["online/text"].vocabulary.hidden.shape[0] == 3
