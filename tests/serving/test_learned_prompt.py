"""A bundle with a learned prompt, of both text towers: it says what the model says, and the server asks with the prompt."""

import json

import httpx
import pytest

from tests.bundle_fixtures import model_directory
from tests.serving.loopback_server import running
from tests.serving.test_api import data_uri
from vlm.config.errors import CheckpointError
from vlm.data.tokenizer import Tokenizer
from vlm.evaluation.encoder import open_model
from vlm.export import export_bundle
from vlm.export.drawings import drawn_picture
from vlm.models import load_model, save_model
from vlm.runtime import open_bundle
from vlm.runtime.prompt import LearnedPrompt
from vlm.tuning import PromptOptions, with_prompt

LABELS = ["red circle", "blue square", "nothing"]


@pytest.fixture(scope="module", params=[("clip", "end"), ("siglip", "middle")], ids="-".join)
def prompted(request, tmp_path_factory):
    """(model directory, its bundle)"""
    name, position = request.param
    start = model_directory(name)
    options = PromptOptions.model_validate({"length": 5, "position": position, "init": {"kind": "normal", "std": 0.5}})
    model, tokenizer = with_prompt(load_model(start), Tokenizer.load(start), options, [], seed=3)
    folder = tmp_path_factory.mktemp("prompted")
    save_model(model, folder / "model")
    tokenizer.save(folder / "model")
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(model.preprocess().to_config()))
    export_bundle(load_model(folder / "model"), folder / "model", folder / "bundle")
    return folder / "model", folder / "bundle"


def test_a_bundle_embeds_learned_texts_as_the_model_does(prompted):
    model, bundle = open_model(prompted[0]), open_bundle(prompted[1])
    assert model.prompt == bundle.prompt
    texts = [model.prompt.text(label) for label in LABELS] + LABELS
    assert (model.encode_text(texts) * bundle.encode_text(texts)).sum(1) == pytest.approx(1, abs=1e-5)


def test_the_server_writes_labels_with_the_prompt_unless_a_template_is_given(prompted):
    bundle, picture = open_bundle(prompted[1]), drawn_picture(70, 41, 5)
    with running(bundle) as address:
        for template, texts in ((None, [bundle.prompt.text(label) for label in LABELS]), ("a {}", [f"a {label}" for label in LABELS])):
            body = {"image": data_uri(picture), "labels": LABELS, **({} if template is None else {"template": template})}
            answer = httpx.post(f"{address}/v1/classify", json=body).json()
            found = {entry["label"]: entry["score"] for entry in answer["data"]}
            wanted = bundle.score([picture], texts)[0]
            assert [found[label] for label in LABELS] == pytest.approx(wanted.tolist(), abs=1e-4)


@pytest.mark.parametrize("value", [3, {}, {"length": "a"}, {"length": True, "position": "end", "ending": ".", "classes": []}])
def test_a_manifest_that_describes_no_prompt_is_refused(value):
    with pytest.raises(CheckpointError, match="describes no learned prompt"):
        LearnedPrompt.from_json(value, "bundle.json")
    assert LearnedPrompt.from_json(None, "bundle.json") is None
    assert LearnedPrompt.from_json(LearnedPrompt(2, "front", "", ("a",)).to_json(), "") == LearnedPrompt(2, "front", "", ("a",))
