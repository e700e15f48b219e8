"""Bundles of models that write: every graph at other shapes, whole prompts, and that a wrong one is never published."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.answering_fixtures import answering_bundle, answering_model, golden_of, tokenizer, torch_of
from tests.bundle_fixtures import exported
from tests.models.model_makers import answering
from vlm.cli.main import main
from vlm.config.errors import GateFailed
from vlm.export import export_bundle
from vlm.export.cache_parity import SHAPES, check_cached, has_cache
from vlm.export.parity import Tolerance, require
from vlm.models import load_model
from vlm.models.graphs import DecoderGraph
from vlm.models.reduced_graphs import PrefillGraph, rank, stages_of
from vlm.runtime import open_any_bundle
from vlm.runtime.chat import Message
from vlm.runtime.generation import Decoding, generate
from vlm.tokens import KeepPlan

KINDS = ["prefix", "cross", "drop", "tiles"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_graph_equals_the_model_at_every_shape(kind):
    _, report = answering_bundle(kind)
    cases = {(c["part"], c["case"]) for c in report["parity"]}
    decoder = "decode" if kind == "drop" else "decoder"
    for batch, new, past in SHAPES:
        for side in ("none", "left", "right") if batch > 1 else ("none",):
            assert (f"{decoder}.logits", f"batch {batch}, {new} behind {past}, padding {side}") in cases
    assert {("vision.visual_tokens", f"batch {b}") for b in (1, 2, 5)} <= cases
    assert ("picture", "99 x 801") in cases
    prompts = [case for part, case in cases if part == "prompt.logits"]
    assert {case.split()[0] for case in prompts} == {"1", "2", "3"}
    assert report["least_cosine"] > 0.9999
    assert report["greatest_difference"] < 1e-4


def test_the_decoder_of_a_language_model_has_a_cache_beside_the_whole_graph():
    bundle, report = exported("language")
    about = json.loads((bundle / "bundle.json").read_text())
    assert set(about["graphs"]) == {"decoder", "embed", "decoder_with_past"}
    assert about["decoder"] == {"layers": 1, "width": 32, "kv_heads": 2, "head_width": 16}
    assert about["template"]["name"] == "plain"
    assert about["text"]["eos_ids"] == [about["text"]["eos_id"]]
    assert any(c["part"] == "prompt.logits" for c in report["parity"])
    assert all(case["pictures"] == [] for case in golden_of(bundle)["prompts"])


@pytest.mark.parametrize(
    ("kind", "graphs"),
    [("prefix", {"decoder"}), ("cross", {"decoder", "cross", "preprocess.fine"}), ("drop", {"prefill", "decode"})],
)
def test_bundle_says_all_that_a_program_needs(kind, graphs):
    bundle, _ = answering_bundle(kind)
    about = json.loads((bundle / "bundle.json").read_text())
    assert set(about["graphs"]) == graphs | {"preprocess", "vision", "embed"}
    assert about["text"]["image_id"] == tokenizer().token_to_id("<image>")
    assert about["text"]["eos_ids"] == sorted(torch_of(kind).eos_ids)
    assert about["pictures"]["tokens"] == 4
    assert about["pictures"]["positions"] == (1 if kind == "cross" else 4)
    assert about["template"] == torch_of(kind).template.to_dict()
    if kind == "drop":
        assert about["decoder"]["drops"] == {"1": 2, "2": 1}
    golden = golden_of(bundle)["prompts"]
    assert [len(case["pictures"]) for case in golden] == [1, 0, 2, 1]
    assert any(len(case["answer"]) > 3 for case in golden)
    assert open_any_bundle(bundle).self_test() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_example_answers_as_the_runtime_does(kind):
    bundle, _ = answering_bundle(kind)
    script = bundle / "example.py"
    absent = ("torch", "transformers", "onnx", *(["vlm"] if kind == "prefix" else []))
    blocked = (
        "import sys, runpy\n"
        "class Block:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name.partition('.')[0] in {absent}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        f"sys.argv = [{str(script)!r}, {str(bundle / 'golden/picture-0-0.png')!r}, 'a blue star', '7']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    opened = open_any_bundle(bundle, threads=1)
    shown = [opened.prepare_image(bundle / "golden/picture-0-0.png")]
    answer = generate(opened, [opened.prompt([Message("user", ("a blue star",))], shown)], Decoding(max_new_tokens=7))[0]
    assert done.stdout.decode("utf-8", "replace").replace("\r", "\n").strip() == answer.text.replace("\r", "\n").strip()


def test_the_card_names_graphs_and_use(prefix_bundle):
    card = (prefix_bundle / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "`past_key_values.0.key` float [batch, 2, past, 6]" in card
    assert "past_key_values.1" not in card
    assert "a picture takes 4" in card
    assert "template `chatml`" in card


class _Forgetful(torch.nn.Module):
    """Looks right at the traced shape: positions are counted from the traced number."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs_embeds, attention_mask, position_ids, *past):
        return self.inner(inputs_embeds, attention_mask, position_ids * 0 + 3, *past)


def test_a_decoder_that_says_otherwise_than_the_model_is_refused_with_exit_5(capsys, tmp_path, monkeypatch):
    """Graph and module agree here: only whole prompts, read by the model itself, tell."""
    model = load_model(answering_model("prefix"))
    parts = model.export_parts()
    right = parts["decoder"]
    parts["decoder"] = type(right)(_Forgetful(right.module), right.inputs, right.dynamic, right.outputs)
    monkeypatch.setattr(type(model), "export_parts", lambda self: parts)
    assert main(["export", str(answering_model("prefix")), "--output", str(tmp_path / "bundle")]) == 5
    said = capsys.readouterr().err
    assert "prompt.logits differs from the model" in said
    assert "nothing was published" in said
    assert not list(tmp_path.iterdir())


def test_check_cached_finds_a_graph_of_other_weights(prefix_bundle):
    part = load_model(answering_model("prefix")).export_parts()["decoder"]
    assert has_cache(part)
    require(check_cached("decoder", part, prefix_bundle / "onnx/decoder.onnx"), Tolerance())
    with torch.no_grad():
        next(part.module.parameters()).add_(0.1)
        part.module.language.trunk.blocks[1].attention.k.weight.add_(0.1)
    with pytest.raises(GateFailed, match="decoder"):
        require(check_cached("decoder", part, prefix_bundle / "onnx/decoder.onnx"), Tolerance())


@pytest.mark.long
@pytest.mark.parametrize("kind", ["prefix", "drop"])
def test_opset_23_with_fused_attention(kind, tmp_path):
    directory = answering_model(kind)
    export_bundle(load_model(directory), directory, tmp_path / "bundle", opset=23)
    assert open_any_bundle(tmp_path / "bundle").self_test() < 1e-3


def test_pyramiddrop_rank_counts_the_better_of_the_same_picture():
    score = torch.tensor([[0.5, 0.2, 0.2, 0.9, 0.2, 0.1]])
    picture = torch.tensor([[0, 0, 0, 1, 1, -1]])
    judged = torch.tensor([[True, True, True, True, True, False]])
    assert rank(score, judged, picture)[0, :5].tolist() == [0, 1, 2, 0, 1]
    judged[0, 0] = False  # stands behind the question
    assert rank(score, judged, picture)[0, 1:5].tolist() == [0, 1, 0, 1]


def test_pyramiddrop_keeping_all_gives_the_logits_without_dropping():
    model = answering(shake=0.3)
    x, picture = torch.randn(2, 9, 16), torch.tensor([[-1, 0, 0, 0, 0, -1, -1, -1, -1], [-1, -1, -1, 0, 0, 0, 0, -1, -1]])
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :2] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    empty = [torch.zeros(2, 2, 0, 4)] * 8
    wanted = DecoderGraph(model.language)(x, mask, position, *empty)[0]
    all_places = [torch.arange(9)] * 2
    for renumber in (True, False):
        graph = PrefillGraph(model.language, {1: 4, 3: 4}, renumber=renumber)
        assert torch.allclose(graph(x, mask, position, picture, *all_places)[0], wanted, atol=1e-5)
        fewer = PrefillGraph(model.language, {1: 2, 3: 0}, renumber=renumber)
        logits, *rest = fewer(x, mask, position, picture, torch.arange(7), torch.arange(5))
        assert not torch.allclose(logits, wanted, atol=1e-3)
        assert [m.sum(1).tolist() for m in rest[-2:]] == [[7, 5], [5, 3]]


def test_pyramiddrop_counts_floor_the_original_number():
    from fractions import Fraction

    assert KeepPlan({8: Fraction("0.29"), 16: Fraction("0.125")}).counts(100) == {8: 29, 16: 12}
    assert stages_of(5, [1, 3]) == [0, 1, 1, 2, 2]
