"""sugar at the size of a test: what its sequences are, and what their similarities are held to."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tests.presets.stand_ins import assembled, begin
from vlm.data.options import DataOptions
from vlm.objectives.slices import slices_of
from vlm.types import Context, SingleProcess, Views
from vlm.workflows.reproduce.claim import claim_of


@pytest.fixture
def parts(models, tmp_path):
    run = begin(tmp_path / "run", "sugar", models, "train.precision=float32", "train.batch_size=6")
    with assembled(run) as made:
        yield made


def prepared(parts, batch):
    """(the objective, views of the model and the teacher, the same as they are gathered)."""
    objective = parts.objectives["align"]
    teacher = parts.companions.models()["teacher"]
    with torch.no_grad():
        views = Views({"model/answer.preferred": parts.model.encode(batch, {"answer.preferred": frozenset({"hidden:2"})})["answer.preferred"]})
        for name, outputs in teacher.encode(batch, {"image": frozenset({"embedding"}), "text": frozenset({"embedding"})}).items():
            views[f"teacher/{name}"] = outputs
        return objective, views, objective.prepare(views, Context(batch, SingleProcess()))


def test_sugar_a_sequence_is_a_picture_and_its_caption(parts):
    batch = next(parts.loader)
    assert {"answer.preferred", "image", "text"} <= set(batch.streams)
    assert batch["text"].sample_index.tolist() == list(range(6))
    _, views, _ = prepared(parts, batch)
    slices = slices_of(views["model/answer.preferred"].layout)
    assert slices.mask.all()
    assert slices.visual.tolist() == [[True, False]] * 6
    # The caption alone is what the teacher reads: the tokens that the model is asked to write, as far as they fit.
    talk, plain = batch["answer.preferred"], batch["text"]
    for row in range(6):
        said = talk.values[row][talk.supervised[row] & talk.mask[row]].tolist()
        read = plain.values[row][plain.mask[row]].tolist()[1:-1]
        assert len(read) > 4
        assert said[: len(read) - 1] == read[:-1]


def test_sugar_targets_are_the_alignment_of_the_teachers_embeddings(parts):
    batch = next(parts.loader)
    objective, views, gathered = prepared(parts, batch)
    objective.options = objective.options.model_copy(update={"calibrate": False})
    view = gathered["model/answer.preferred"]
    live = view.token_mask.any(1)
    cosine = objective._taught(gathered, live, view.token_mask[live], view.tokens[live][..., -1] > 0)
    target = objective._similarities(cosine, view.token_mask[live])
    pairs = [F.normalize(views[f"teacher/{name}"].embedding.double(), dim=1) for name in ("image", "text")]
    both = torch.stack(pairs, 1)  # [6, 2, E]: the two slices of each

    def strength(a, b):
        k = ((both[a] @ both[b].T - 1) / objective.options.sigma).exp()
        k = k / (2 - k)
        start = k[0, 0]
        right, down = start * k[0, 1], start * k[1, 0]
        return math.log(k[1, 1] * (start + right + down))

    expected = [
        math.exp((strength(a, b) - 0.5 * (strength(a, a) + strength(b, b))) / 2) for a in range(6) for b in range(a + 1, 6)
    ]
    torch.testing.assert_close(target.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_sugar_learns_adapters_and_projections_and_nothing_of_the_teacher(models, tmp_path):
    run = begin(tmp_path / "run", "sugar", models, "train.precision=float32", "train.steps=2", "evaluation.tasks=[]")
    with assembled(run) as made:
        objective = made.objectives["align"]
        trained = {name for name, p in objective.named_parameters() if p.requires_grad}
        assert trained == {f"project.{kind}.{i}.{what}" for kind in ("visual", "text") for i in (0, 2) for what in ("weight", "bias")}
        own = {name for name, p in made.model.named_parameters() if p.requires_grad}
        assert own
        assert all("lora" in name.lower() and name.startswith("language.") for name in own)
        assert not any(p.requires_grad for p in made.companions.models()["teacher"].parameters())
    run.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/align"] for line in lines if "train/align" in line]
    assert len(losses) == 2
    assert all(0 <= loss <= 1 for loss in losses)


def test_sugar_the_baseline_has_neither_the_loss_nor_the_teacher():
    claim = claim_of("sugar")
    assert [o["name"] for o in claim.baseline.values["objectives"]] == ["answer"]
    assert not claim.baseline.values.get("companions")
    assert [o["name"] for o in claim.method.values["objectives"]] == ["answer", "align"]


def test_captions_beside_conversations_need_some_and_a_name_of_their_own():
    talk = {"kind": "conversation", "answer": "caption"}
    assert DataOptions.model_validate({"text": {"captions": 8}, "streams": {"talk": talk}}).text.captions == 8
    for streams in ({}, {"text": talk}):
        with pytest.raises(ValidationError, match="text.captions stand beside conversations"):
            DataOptions.model_validate({"text": {"captions": 8}, "streams": streams})
