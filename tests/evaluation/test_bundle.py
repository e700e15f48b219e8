"""A bundle is evaluated by the same tasks and gives the same figures as the model it was made from."""

import json

import numpy as np
import pytest

from tests.bundle_fixtures import exported, model_directory
from vlm.evaluation import PerplexityOptions, RetrievalOptions, ZeroShotOptions, evaluate
from vlm.evaluation.encoder import describe_model, open_model


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_figures_of_bundle_and_model_agree(name):
    tasks = [RetrievalOptions(), ZeroShotOptions(labels_from="name", none_below=0.1)]
    uri = "scenes:?n=40&split=val&size=32"
    model, bundle = open_model(model_directory(name)), open_model(exported(name)[0])
    assert type(model) is not type(bundle)
    assert (model.form, bundle.form) == ("softmax" if name == "clip" else "sigmoid",) * 2
    ours, theirs = evaluate(model, tasks, uri), evaluate(bundle, tasks, uri)
    for a, b in zip(ours, theirs):
        assert a.data == b.data
        assert a.chance == b.chance
        # Preprocessing in the graph differs by single steps of 255, so a near tie may fall the other way.
        for x, y in zip(a.flat().values(), b.flat().values()):
            assert x == pytest.approx(y, abs=5.1)
    assert describe_model(exported(name)[0])["kind"] == "bundle"


def test_bits_per_character_of_bundle_and_model_agree(tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = [f"a red circle on {i} blue squares " * (1 + i % 5) for i in range(12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = [
        evaluate(open_model(directory), [PerplexityOptions()], str(path))[0]
        for directory in (model_directory("language"), exported("language")[0])
    ]
    assert found[0].details == found[1].details
    np.testing.assert_allclose(
        found[0].metrics["bits_per_character"], found[1].metrics["bits_per_character"], rtol=1e-4
    )
