"""Bundles of models that drop or merge: the same tokens as torch, and a clear word where there is no graph."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

from tests.answering_fixtures import answering_bundle, answering_model, bundle_of, random_prompts, torch_of
from tests.models.model_makers import answering, pictures_of
from tests.tokens.rows import TOWERS, asked, batch, reducing
from tests.tokens.test_parts import SCORES
from tests.tokens.test_tome import encoder, merge
from vlm.config.errors import RequestError
from vlm.export.graphs import export_part
from vlm.models import load_model
from vlm.models.reduced_graphs import PrefillGraph
from vlm.models.vision_language.graphs import drops_of
from vlm.runtime.generation import Decoding, generate

DROPS = {"aim": {"1": 5, "2": 2}, "fopru": {"1": 5, "2": 3}, "tome": {"1": 5}}


@pytest.mark.parametrize("kind", ["aim", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("fopru", "tome"))])
def test_core_select_a_bundle_writes_the_tokens_of_torch(kind):
    bundle, report = answering_bundle(kind)
    about = json.loads((bundle / "bundle.json").read_text())
    assert about["decoder"]["drops"] == DROPS[kind]
    assert about["decoder"]["renumber"] == (kind != "aim")
    assert about["pictures"]["tokens"] == {"aim": 8, "fopru": 11, "tome": 16 - 6}[kind]
    assert report["greatest_difference"] < 1e-4
    ours, theirs = bundle_of(kind), torch_of(kind)
    mine, yours = random_prompts(ours, theirs, 9, 5, same_pixels=True)
    wanted = generate(theirs, yours, Decoding(max_new_tokens=8), batch_size=3)
    for rows in (1, 3):
        assert generate(ours, mine, Decoding(max_new_tokens=8), batch_size=rows) == wanted
    assert len({answer.ids for answer in wanted}) > 4
    for prompt, other in zip(mine, yours):  # and the layers hold as much
        stepper = ours.stepper()
        stepper.start([prompt])
        held = [value.numpy().shape[2] for value in stepper._cache[::2]]
        assert held == theirs.kept(other)
    assert ours.self_test() < 1e-3


@pytest.mark.parametrize("score", [s for s in SCORES if s["kind"] != "random"], ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_core_select_the_graph_of_every_score_keeps_what_the_model_keeps(score, side):
    tokens = {"score": score, "keep": {"kind": "stages", "layers": [1, 3], "ratios": [0.5, 0.2]}}
    model = reducing(tokens)
    given = batch(asked(0, side=side))
    output = model.encode(given, {"text": frozenset({"hidden:0", "hidden:2", "vocabulary"})})["text"]
    before, middle, after = output.layout_of(0), output.layout_of(2), output.layout
    graph = PrefillGraph(model.language, drops_of(model), model.options.tokens.score, renumber=True)
    places = [torch.arange(layout.mask.shape[1]) for layout in (middle, after)]
    out = graph(output.hidden[0], before.mask.long(), before.position, before.picture, *places)
    logits, keys, masks = out[0], out[1:9:2], out[9:]
    assert [key.shape[2] for key in keys] == [before.mask.shape[1], *[len(places[0])] * 2, len(places[1])]
    assert torch.equal(masks[0].bool(), middle.mask)
    assert torch.equal(masks[1].bool(), after.mask)
    theirs, cache = model.prefill(asked(0, side=side), {"image": given["image"]})
    assert torch.allclose(logits, theirs, atol=1e-5)
    for key, layer, layout in zip(keys, cache.layers, (before, middle, middle, after)):
        assert torch.allclose(key.transpose(1, 2)[layout.mask], layer.keys.transpose(1, 2)[layout.mask], atol=1e-5)


def test_core_tome_the_graph_of_a_merging_tower_is_the_tower(tmp_path):
    part = encoder(merge(3)).export_parts()["vision"]
    export_part("vision", part, tmp_path / "vision.onnx", opset=18)
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx")
    pixels = pictures_of([5], size=32, seed=8).values
    with torch.no_grad():
        wanted = part.module(pixels).numpy()
    assert np.allclose(session.run(None, {"pixel_values": pixels.numpy()})[0], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ({"pre": [{"score": {"kind": "norm"}, "select": {"kind": "threshold"}}]}, "another number of positions"),
        ({"keep": {"kind": "constant", "ratio": 0.5}, "select": {"kind": "threshold"}}, "another number of positions"),
        ({"keep": {"kind": "constant", "ratio": 0.5}, "score": {"kind": "random"}}, "a random order"),
    ],
)
def test_core_select_what_has_no_graph_is_refused(tokens, said):
    with pytest.raises(RequestError, match=said):
        reducing(tokens).export_parts()


def test_a_schedule_that_keeps_all_exports_as_a_model_that_drops_nothing():
    model = answering(towers=TOWERS, tokens={"keep": {"kind": "constant", "ratio": 1.0}}, length=96)
    assert set(model.export_parts()) == {"vision", "embed", "decoder"}


def test_a_saved_model_reads_its_parts_back():
    model = load_model(answering_model("aim"))
    assert model.options.tokens.pre[0].select.keep == 0.5
    assert model.options.tokens.keep.kind == "linear"
    assert load_model(answering_model("tome")).options.towers["main"].merge.remove.r == 3
