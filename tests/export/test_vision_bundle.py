"""The bundle of a vision model: with and without a head, through the runtime and the command line."""

import json

import numpy as np
import pytest
import torch

from vlm.cli.main import main
from vlm.config.errors import RequestError
from vlm.evaluation.encoder import open_model
from vlm.export import export_bundle
from vlm.models import VisionOptions, save_model
from vlm.models.swin import SwinOptions
from vlm.runtime import open_any_bundle
from vlm.types import VocabularyLayout


@pytest.fixture(scope="module", params=[("cat", "dog", "hat"), ()], ids=["head", "plain"])
def exported(request, tmp_path_factory):
    """(classes, model directory, bundle) of a model with weights of no meaning, its map padded at both stages."""
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    tower = SwinOptions(image_size=36, width=12, depths=(2, 1), heads=(2, 2), window=4, norm_zero_init=False)
    model = VisionOptions(tower=tower, classes=request.param).build(VocabularyLayout({}, {})).eval()
    save_model(model, folder / "model")
    export_bundle(model, folder / "model", folder / "bundle")
    return request.param, folder / "model", folder / "bundle"


def test_the_bundle_gives_what_the_model_gives(exported):
    classes, directory, bundle = exported
    ours, theirs = open_any_bundle(bundle), open_model(directory)
    pictures = sorted((bundle / "golden").glob("*.png"))
    assert (ours.encode_image(pictures) * theirs.encode_image(pictures)).sum(-1).min() > 0.9999
    assert ours.classes == theirs.classes == classes
    assert ours.self_test() > 0.9999
    if classes:
        np.testing.assert_allclose(ours.classify(pictures), theirs.classify(pictures), atol=1e-2)
    else:
        with pytest.raises(RequestError, match="no classes"):
            ours.classify(pictures)
    with pytest.raises(RequestError, match="reads no texts"):
        ours.encode_text(["a cat"])


def test_predict_and_embed_take_it(exported, capsys):
    classes, directory, bundle = exported
    picture = str(bundle / "golden" / "picture-0.png")
    for model in (directory, bundle):
        assert main(["embed", str(model), "--images", str(bundle / "golden")]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {len(line["embedding"]) for line in lines} == {24}
        code = main(["predict", str(model), picture, "--json"])
        out = capsys.readouterr().out
        if classes:
            answer = json.loads(out)
            assert (code, answer["head"]) == (0, "model")
            assert {entry["label"] for entry in answer["predictions"]} == set(classes)
            assert sum(entry["probability"] for entry in answer["predictions"]) == pytest.approx(1)
        else:
            assert code == 2
