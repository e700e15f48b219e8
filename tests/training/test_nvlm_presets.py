"""The presets of nvlm: stages without and with tiles, text alone mixed in, gates that are not decayed, claims."""

from __future__ import annotations

import pytest
import torch

from tests.models.model_makers import answering
from vlm.data import Tokenizer, build_loader
from vlm.models import VisionLanguageOptions
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.tiling import THUMBNAIL
from vlm.training.optimizer import NamedOptimizer, OptimizerOptions
from vlm.training.preset import load_preset, stages_of
from vlm.types import Role
from vlm.workflows.reproduce.claim import claim_of, settled

FORMS = {"nvlm": "prefix", "nvlm-x": "cross-attention", "nvlm-h": "hybrid"}
TOKENIZER = Tokenizer.train_bpe(["what is the digit at position 3? a large red circle is on the left"] * 3, 300, ["<image>"])


def batch_of(stage, options, size=32):
    data = stage.data.model_copy(update={"text": stage.data.text.model_copy(update={"length": options.length})})
    tiling = options.tiler.build(64)
    with build_loader(
        data,
        tokenizer=TOKENIZER,
        preprocess=Preprocess(64, "squash"),
        batch_size=size,
        picture_positions=16,
        tiling=tiling,
        tiles_apart=options.fusion.kind == "hybrid",
    ) as loader:
        batch = next(loader)
        assert loader.report()["bad"] == 0
    return batch


@pytest.mark.parametrize("key", FORMS)
def test_nvlm_stages(key):
    _, resolved = load_preset(key)
    align, instruct = stages_of(resolved)
    options = instruct.model
    assert isinstance(options, VisionLanguageOptions)
    assert (options.fusion.kind, options.tiler.tags, options.tiler.thumbnail) == (FORMS[key], "text-1d", "last")
    new = ("connector.*",) if key == "nvlm" else ("connector.*", "cross.*")
    assert align.tuning.train == new
    assert instruct.tuning.train == (*new, "language.*")  # never the tower
    assert options.connector.depth == (1 if key == "nvlm-x" else 2)
    whole = batch_of(align, options)
    assert {tuple(place) for place in whole["image"].place.tolist()} == {(0, *THUMBNAIL)}
    mixed = batch_of(instruct, options)
    counts = torch.bincount(mixed["image"].sample_index, minlength=len(mixed)).tolist()
    assert set(counts) == {0, 3}  # text alone; two tiles and a thumbnail
    assert 4 <= counts.count(0) <= 16
    tagged = (mixed["text"].role == int(Role.TAG)).any(1).tolist()
    assert tagged == [count > 0 for count in counts]


@pytest.mark.parametrize("key", FORMS)
def test_nvlm_claims_compare_tags_with_none_and_nothing_else(key):
    claim = claim_of(key)
    assert len(claim.arms) == 2
    stages = [stages_of(settled(arm.values)[1]) for arm in claim.arms]
    for with_tags, without in zip(*stages):
        assert (with_tags.model.tiler.tags, without.model.tiler.tags) == ("text-1d", "none")
        assert not any(pattern.startswith(("tower", "*")) for pattern in with_tags.tuning.train)
        same = without.model.model_copy(update={"tiler": with_tags.model.tiler})
        assert without.model_copy(update={"model": same}) == with_tags
        assert with_tags.data.source == "digits:?n=40000"
        assert not with_tags.data.mixture
    assert [stage.name for stage in stages[0]] == ["align", "questions"]


def test_nvlm_gates_are_not_decayed():
    model = answering({"kind": "cross-attention", "every": 2}, tiler={})
    optimizer = NamedOptimizer(OptimizerOptions(weight_decay=0.1), dict(model.named_parameters()), ())
    decayed = [name for (_, decay), names in optimizer.groups.items() if decay for name in names]
    gates = [name for name, _ in model.named_parameters() if name.endswith("gate")]
    assert len(gates) == 4
    assert not set(gates) & set(decayed)
    assert any(name.startswith("cross.") for name in decayed)
