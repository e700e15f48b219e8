"""limber at the size of a test: one layer learns, and nothing else moves."""

import torch

from tests.presets.stand_ins import assembled, begin
from vlm.evaluation.evaluating import evaluating
from vlm.models import load_model
from vlm.models.towers import VitOptions
from vlm.models.vision_language.options import VitTowerOptions
from vlm.training.preset import load_preset
from vlm.workflows.reproduce.claim import claim_of, settled

SHAPE = set(VitTowerOptions.model_fields) & set(VitOptions.model_fields) - {"kind"}
WANTED = {"text": frozenset({"vocabulary"})}


def test_limber_frozen_parts_keep_their_bits(models, tmp_path):
    begin(tmp_path / "run", "limber", models, "train.steps=3", "evaluation.tasks=[]").train()
    after = load_model(tmp_path / "run").state_dict()
    clip, language = load_model(models["clip-tiny-objects"]).state_dict(), load_model(models["lm-tiny"]).state_dict()
    for name, tensor in language.items():
        kept = after[f"language.{name}"][: len(tensor)]  # the tokenizer gained <image>, and the embedding its row
        assert torch.equal(kept, tensor), name
    towers = {name.removeprefix("towers.main."): tensor for name, tensor in after.items() if name.startswith("towers.main.")}
    assert towers
    for name, tensor in towers.items():
        assert torch.equal(tensor, clip[f"vision.{name}"]), name


def test_limber_trains_one_linear_layer(models, tmp_path):
    with assembled(begin(tmp_path / "run", "limber", models)) as parts:
        learning = {name: p for name, p in parts.model.named_parameters() if p.requires_grad}
        width_in, width_out = parts.model.connector.width_in, parts.model.connector.width_out
        assert sum(p.numel() for p in learning.values()) == width_in * width_out + width_out
        before = {name: p.detach().clone() for name, p in learning.items()}
    begin(tmp_path / "trained", "limber", models, "train.steps=2", "evaluation.tasks=[]").train()
    after = load_model(tmp_path / "trained").state_dict()
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())


def test_limber_drops_features_in_training_alone(models, tmp_path):
    with assembled(begin(tmp_path / "run", "limber", models, "model.connector.dropout=0.5")) as parts:
        batch = next(parts.loader)
        parts.model.train()
        drawn = [parts.model.encode(batch, WANTED)["text"].vocabulary.hidden for _ in range(2)]
        assert not torch.equal(*drawn)
        with evaluating(parts.model):
            still = [parts.model.encode(batch, WANTED)["text"].vocabulary.hidden for _ in range(2)]
        assert torch.equal(*still)


def test_limber_its_baseline_is_the_same_tower_without_training(models):
    method, baseline = (settled(arm.values)[0] for arm in claim_of("limber").arms)
    assert method.start.parts == {"towers.main": "clip-tiny-objects", "language": "lm-tiny"}
    assert baseline.start.parts == {"language": "lm-tiny"}
    assert method.tuning == baseline.tuning
    assert method.train == baseline.train
    drawn, clip = baseline.model.towers["main"], load_preset("clip-tiny-objects")[0].model
    assert {"width", "image_size", "class_token", "pre_norm"} <= SHAPE
    for name in SHAPE:
        assert getattr(drawn, name) == getattr(clip.vision, name), name
    assert drawn.pictures == clip.pictures
