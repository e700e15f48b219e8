"""`vlm evaluate`: the JSON contract, exit codes, and what a person sees. Drives the real command."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.cli.evaluate import TASKS
from vlm.cli.main import main
from vlm.data.tokenizer import Tokenizer
from vlm.evaluation.session import _KINDS
from vlm.models import DualEncoderOptions, LanguageOptions, save_model
from vlm.types import VocabularyLayout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a picture model, a language model, a run, pictures and texts."""
    root = tmp_path_factory.mktemp("place")
    tokenizer = Tokenizer.train_bpe(["a red circle", "a blue square", "colour 0 1 2 3"] * 3, 300)
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    vocabulary = VocabularyLayout.of_text(tokenizer.vocab_size, special)
    torch.manual_seed(0)
    vision = {"width": 16, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 8}
    dual = DualEncoderOptions(
        embed_dim=16, vision=vision, text={"width": 16, "depth": 1, "heads": 2, "length": 16}
    )
    language = LanguageOptions(width=16, depth=1, heads=2, ffn_width=32, length=32)
    for name, options in (("dual", dual), ("language", language), ("run/model", dual)):
        model = options.build(vocabulary)
        save_model(model, root / name)
        tokenizer.save(root / name)
        if model.preprocess() is not None:
            (root / name / "preprocessor_config.json").write_text(json.dumps(model.preprocess().to_config()))
    with tarfile.open(root / "val.tar", "w") as tar:
        for i in range(24):
            picture = io.BytesIO()
            Image.new("RGB", (10, 10), (10 * i, 255 - 10 * i, 99)).save(picture, "PNG")
            fields = {"caption": f"colour {i // 2}", "kind": f"k{i % 3}", "concept": i // 2}
            for extension, data in (("png", picture.getvalue()), ("json", json.dumps(fields).encode())):
                member = tarfile.TarInfo(f"{i:03d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with open(root / "text.jsonl", "w") as file:
        file.writelines(json.dumps({"text": f"a red circle and {i} squares"}) + "\n" for i in range(20))
    (root / "classes.txt").write_text("k0\nk1\nk2\n")
    (root / "run" / "preset.toml").write_text(
        f'schema = 1\n[method]\nkey = "x"\n[data]\nsource = "scenes:"\nval = "{root}/val.tar"\n'
    )
    return root


@pytest.fixture
def vlm(capsys):
    """Run a command: (exit code, stdout, stderr)."""

    def call(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return (code, *capsys.readouterr())

    return call


def evaluated(vlm, *words):
    code, out, err = vlm("evaluate", *words, "--json")
    assert code == 0, err
    assert len(out.strip().splitlines()) == 1
    return json.loads(out)


def test_retrieval_contract(vlm, place):
    found = evaluated(vlm, place / "dual", "--task", "retrieval", "--data", place / "val.tar")
    assert found["task"] == "retrieval"
    assert found["samples"] == 24
    assert set(found["metrics"]) == {"image_to_text", "text_to_image"}
    for direction in found["metrics"].values():
        assert set(direction) == {"r@1", "r@5", "r@10"}
        assert 0 <= direction["r@1"] <= direction["r@5"] <= direction["r@10"] <= 100
    for name in ("intervals", "chance"):
        assert set(found[name]) == set(found["metrics"])
    assert set(found["intervals"]["image_to_text"]["r@1"]) == {"lower", "upper"}
    assert found["details"]["image_to_text"]["clusters"] == 12
    assert found["chance"]["image_to_text"]["r@1"] == pytest.approx(100 / 12)
    assert len(found["model"]["sha256"]) == len(found["data"]["sha256"]) == 64
    assert found == evaluated(vlm, place / "dual", "--task", "retrieval", "--data", place / "val.tar")


def test_zero_shot_contract(vlm, place):
    words = (place / "dual", "--task", "zero-shot", "--data", place / "val.tar")
    by_field = evaluated(vlm, *words, "--labels-from", "kind", "--template", "a {}", "--template", "{}.")
    assert {"top1", "top5"} <= set(by_field["metrics"])
    assert by_field["options"]["templates"] == ["a {}", "{}."]
    by_file = evaluated(
        vlm, *words, "--classes", place / "classes.txt", "--labels-from", "kind", "--none-below", "0.5"
    )
    assert by_file["details"]["classes"] == 3
    assert {"coverage", "accuracy_with_none"} <= set(by_file["metrics"])


def test_linear_probe_and_perplexity_contract(vlm, place):
    probe = evaluated(
        vlm,
        place / "dual",
        "--task",
        "linear-probe",
        "--data",
        place / "val.tar",
        "--labels-from",
        "kind",
        "--train",
        place / "val.tar",
    )
    assert set(probe["metrics"]) == {"top1"}
    assert probe["details"]["train"]["samples"] == 24
    words = evaluated(vlm, place / "language", "--task", "perplexity", "--data", place / "text.jsonl")
    assert {"bits_per_character", "bits_per_token", "nats_per_token", "perplexity"} <= set(words["metrics"])
    assert words["metrics"]["bits_per_token"] == pytest.approx(
        words["metrics"]["nats_per_token"] / np.log(2), rel=1e-4
    )


def test_a_run_brings_its_own_data_and_keeps_results(vlm, place):
    code, out, err = vlm(
        "evaluate", place / "run", "--task", "retrieval", "--save", "--output", place / "result.json"
    )
    assert code == 0
    assert "val.tar (the run's data.val)" in err
    assert "95% interval" in out
    stored = json.loads((place / "run" / "evaluation" / "retrieval.json").read_text())
    assert stored == json.loads((place / "result.json").read_text())
    assert len(stored["examples"]) == 24


def test_gates(vlm, place):
    words = ("evaluate", place / "dual", "--task", "retrieval", "--data", place / "val.tar")
    assert vlm(*words, "--gate", "image_to_text/r@10>=0")[0] == 0
    code, out, err = vlm(*words, "--gate", "image_to_text/r@1>=101", "--json")
    assert code == 5
    assert json.loads(out)["task"] == "retrieval"
    assert "gate missed" in err
    assert vlm(*words, "--gate", "nonsense")[0] == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("{p}/dual", "--task", "retrival", "--data", "x"), 2, "retrival"),
        (("{p}/dual", "--task", "zero-shot", "--data", "{p}/val.tar"), 2, "--labels-from"),
        (
            ("{p}/dual", "--task", "retrieval", "--data", "{p}/val.tar", "--none-below", "0.5"),
            2,
            "--none-below does not go with",
        ),
        (
            (
                "{p}/dual",
                "--task",
                "zero-shot",
                "--data",
                "{p}/val.tar",
                "--labels-from",
                "kind",
                "--template",
                "x",
            ),
            2,
            "--template",
        ),
        (("{p}/dual", "--task", "perplexity", "--data", "{p}/text.jsonl"), 2, "needs a language model"),
        (("{p}/dual", "--task", "vqa", "--data", "scenes:?n=2"), 2, "vqa needs a model that reads pictures and writes"),
        (("{p}/dual", "--task", "retrieval", "--data", "x", "--prompt", "x"), 2, "--prompt does not go with --task retrieval"),
        (("{p}/dual", "--task", "cost", "--data", "x", "--questions-from", "x"), 2, "--questions-from does not go with"),
        (("{p}/dual", "--task", "vqa", "--data", "x", "--prompt", "x"), 2, "must hold {} exactly once"),
        (("{p}/dual", "--task", "vqa", "--data", "x", "--control", "off", "--control", "none"), 2, "--control off"),
        (("{p}/dual", "--task", "cost", "--data", "x", "--control", "none"), 2, "--control"),
        (("{p}/dual", "--task", "retrieval"), 2, "--data URI"),
        (("{p}/dual", "--task", "retrieval", "--data", "{p}/val.tar", "--save"), 2, "--save needs a run"),
        (("{p}/none", "--task", "retrieval", "--data", "{p}/val.tar"), 3, "no such model directory"),
        (("{p}/dual", "--task", "retrieval", "--data", "{p}/none.tar"), 3, "none.tar"),
        (
            ("{p}/dual", "--task", "zero-shot", "--data", "{p}/val.tar", "--labels-from", "colour"),
            3,
            "'colour'",
        ),
        (
            ("{p}/dual", "--task", "zero-shot", "--data", "{p}/val.tar", "--classes", "{p}/none.txt"),
            3,
            "none.txt: cannot be read: No such file or directory",
        ),
        (("{p}/dual", "--task", "retrieval", "--data", "{p}/val.tar", "--output", "{p}"), 2, "is a directory, expected a file"),
        (("{p}/dual", "--task", "retrieval", "--data", "{p}/val.tar", "--output", "/proc/none/x.json"), 1, "cannot be written"),
        (("{p}/dual", "--task", "retrieval", "--data", "{p}/none-*.tar"), 3, "relative paths start at"),
    ],
)
def test_exit_codes_and_messages(vlm, place, words, code, message):
    found, out, err = vlm("evaluate", *(word.replace("{p}", str(place)) for word in words))
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_a_bad_sample_past_the_budget_is_exit_3(vlm, place, tmp_path):
    (tmp_path / "cat").mkdir()
    for i in range(9):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / "cat" / f"{i}.png")
    (tmp_path / "cat" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    words = (
        "evaluate",
        place / "dual",
        "--task",
        "linear-probe",
        "--data",
        tmp_path,
        "--train",
        place / "val.tar",
    )
    code, _, err = vlm(*words)
    assert code == 3
    assert "1 of 10 samples are bad" in err
    assert "bad.png" in err or "bad" in err


@pytest.fixture
def writer(place, tmp_path, monkeypatch):
    """(a run whose model is one that writes, its data): the command opens a model whose answers are known."""
    from tests.evaluation.colour_generator import ColourGenerator, colour_shard

    monkeypatch.setattr("vlm.evaluation.encoder.open_model", lambda path, **_: ColourGenerator({"blue": "green"}))
    return place / "run", colour_shard(tmp_path / "val.tar")


def test_writing_tasks_and_their_options(vlm, writer):
    run, uri = writer
    words = (run, "--task", "vqa", "--data", uri)
    found = evaluated(vlm, *words)
    assert found["metrics"]["color"]["exact"] == 75
    assert {"none", "shuffled", "over_none", "over_shuffled"} <= set(found["metrics"])
    found = evaluated(vlm, *words, "--control", "none", "--limit", 12, "--max-new-tokens", 3, "--prompt", "{} the")
    assert "shuffled" not in found["metrics"]
    assert found["samples"] == 12
    assert found["options"]["max_new_tokens"] == 3
    assert set(evaluated(vlm, *words, "--control", "off")["metrics"]) == {"exact", "color", "exists", "yes_no"}
    assert vlm("evaluate", *words, "--questions-from", "absent")[0] == 3
    assert vlm("evaluate", *words, "--gate", "lower:over_none.color.exact>=0")[0] == 0
    assert vlm("evaluate", *words, "--gate", "over_none.color.exact>=90")[0] == 5
    caption = evaluated(vlm, run, "--task", "caption", "--data", uri, "--prompt", "describe", "--max-new-tokens", 5)
    assert {"cider", "bleu_4", "rouge_l", "nats_per_token", "none"} <= set(caption["metrics"])
    cost = evaluated(vlm, run, "--task", "cost", "--data", uri, "--prompt", "describe", "--limit", 2)
    assert cost["metrics"]["measured"]["tokens_per_second"] > 0
    code, out, _ = vlm("evaluate", *words)
    assert code == 0
    assert "gain over none" in out


def test_a_saved_result_is_on_the_page(vlm, writer):
    run, uri = writer
    for task in ("vqa", "caption"):
        words = ("--prompt", "describe") if task == "caption" else ()
        code, _, err = vlm("evaluate", run, "--task", task, "--data", uri, "--save", "--max-new-tokens", 6, *words)
        assert code == 0, err
    assert vlm("report", run)[0] == 0
    page = (run / "report.html").read_text()
    assert "What it says" in page
    assert page.count("spoken") > 20


def test_a_language_model_is_asked_in_another_way_by_overrides(vlm, place):
    def bits(*overrides):
        code, out, _ = vlm("evaluate", place / "language", *overrides, "--task", "perplexity", "--data", place / "text.jsonl", "--json")
        assert code == 0
        found = json.loads(out)
        return found["metrics"]["bits_per_character"], found["model"].get("changes")

    plain, changes = bits()
    assert changes is None
    everything, changes = bits("model.attention.kind=hierarchical", "model.attention.k=100")
    assert everything == pytest.approx(plain, abs=1e-5)
    assert changes == {"attention": {"kind": "hierarchical", "k": 100}}
    few, _ = bits("model.attention.n_local=2", "model.attention.kind=block-memory", "model.attention.chunk=1", "model.attention.n_init=0",
                  "model.attention.topk=0", "model.attention.block=1")  # fmt: skip
    window, _ = bits("model.attention.kind=windowed", "model.attention.window=2")
    assert few == pytest.approx(window, abs=1e-5)
    assert window != pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(("words", "told"), [
    (("data.val=x",), "no setting of the model"),
    (("model.attention.kind=sparse",), "known kinds: "),
    (("model.attention.kind=hierarchical", "model.attention.k=-1"), "model.attention.k: "),
    (("model.width=8",), "expected (286, 8)"),
    (("model.depht=2",), "unknown key 'depht' in [model]; did you mean 'depth'"),
    (("model.attention.window=2",), "[model.attention]"),
])
def test_overrides_that_make_no_model_are_refused(vlm, place, words, told):
    code, _, err = vlm("evaluate", place / "language", *words, "--task", "perplexity", "--data", place / "text.jsonl")
    assert code != 0
    assert told in err


def test_figures_of_a_changed_model_are_not_stored_in_its_run(vlm, place):
    code, _, err = vlm("evaluate", place / "run", "model.embed_dim=8", "--task", "retrieval", "--save")
    assert code == 2
    assert "--save" in err


def test_the_tasks_that_an_error_suggests_are_tasks_of_the_command():
    suggested = {word.strip(",") for _, remedy in _KINDS.values() for word in remedy.split("try ")[1].replace(" or ", " ").split()}
    assert suggested <= set(TASKS)
    assert "text-probe" in suggested


def test_a_text_probe_of_a_language_model(vlm, place):
    found = evaluated(vlm, place / "language", "--task", "text-probe", "--data", "scenes:?n=40", "--labels-from", "shape")
    assert set(found["metrics"]) == {"top1"}
    assert found["details"]["labels_from"] == "shape"
