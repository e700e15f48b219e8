"""The card of a run's model says what was done, and no more than is known."""

from __future__ import annotations

import json
import re
import tomllib

import pytest

from vlm.cli.main import main
from vlm.config.errors import DataError
from vlm.evaluation.result import read_result
from vlm.evaluation.table import rows_of
from vlm.reporting import read_run, render_card, write_card
from vlm.reporting.model_card import MARK

SMALL = ["train.steps=2", "train.batch_size=8", "model.vision.depth=1", "model.text.depth=1", "data.source=scenes:?n=64",
         "data.val=scenes:?n=24&split=val", "--no-report"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("card") / "run"
    assert main(["pretrain", "clip-tiny", *SMALL, "--output", str(output)]) == 0
    return output


def test_a_run_leaves_a_card_that_says_what_it_did(run):
    text = (run / "model" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: zero-shot-image-classification\ntags:\n- vlm-forge\n- clip-tiny\n---\n")
    assert "Learning Transferable Visual Models From Natural Language Supervision" in text
    assert "| data | scenes:?n=64 |" in text
    assert "| updates | 2 |" in text
    assert 'CLIPModel.from_pretrained("MODEL")' in text
    for name in ("retrieval", "zero-shot", "zero-shot-color"):
        for metric, value, *_ in rows_of(read_result(run / "evaluation" / f"{name}.json")):
            assert f"| {name} | {' '.join(metric.split())} | {value} |" in text
    command = json.loads((run / "environment.json").read_text())["command"]
    assert " ".join(command[1:3]) in text
    assert str(run.parent.parent) not in text.replace(str(run), ""), "no path but what the user gave"


def test_the_preset_in_the_card_is_the_run_s_own(run, tmp_path):
    text = (run / "model" / "README.md").read_text()
    block = re.search(r"```toml\n(.*?)\n```", text, re.DOTALL)[1]
    assert tomllib.loads(block) == tomllib.loads((run / "preset.toml").read_text())
    (tmp_path / "preset.toml").write_text(block)
    assert main(["presets", "check", str(tmp_path / "preset.toml")]) == 0


def test_a_card_by_another_hand_is_left_alone_and_ours_is_brought_up_to_date(run, tmp_path):
    path = run / "model" / "README.md"
    ours = path.read_text()
    try:
        path.write_text("my own words")
        assert write_card(run) is None
        assert path.read_text() == "my own words"
        path.write_text(f"old\n{MARK}\n")
        assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
        assert path.read_text() == ours
    finally:
        path.write_text(ours)


def test_what_is_missing_is_left_out(tmp_path):
    with pytest.raises(DataError):
        write_card(tmp_path / "nothing")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "preset.toml").write_text('[method]\ntitle = "a <b>bold</b>\\ntitle"\n[model]\nkind = "unheard"\n')
    assert write_card(tmp_path / "run") is None
    text = render_card(read_run(tmp_path / "run"))
    assert "# a &lt;b>bold&lt;/b> title\n" in text
    assert "Nothing was measured." in text
    assert "pipeline_tag" not in text
    assert "None" not in text
