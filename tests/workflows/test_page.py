"""docs/methods.md is what the presets and the stored results say."""

from pathlib import Path

import pytest

from vlm.config.catalogue import list_presets
from vlm.workflows.reproduce.page import block, interval, methods_page
from vlm.workflows.reproduce.store import Results

ROOT = Path(__file__).parents[2]

ANSWER = {
    "key": "siglip-tiny",
    "verdict": "fails",
    "metric": "retrieval.text_to_image.r@10",
    "direction": "higher",
    "margin": 2.0,
    "method": {"name": "siglip-tiny", "mean": 10.0, "values": [9.0, 11.0], "lr": 3e-4, "at_edge": True},
    "baseline": {"name": "clip-tiny", "mean": 12.0, "values": [12.0, 12.0], "lr": 1e-3, "at_edge": False},
    "difference": {"mean": -2.0, "lower": -14.7, "upper": 10.7},
    "controls": [],
    "gates": [{"metric": "retrieval.x", "mean": 1.0, "against": "clip-tiny", "rise": 0.5, "held": False}],
    "seeds": [0, 1],
    "data": "real",
    "train": "a",
    "test": "b",
    "tier": "M",
    "seconds": 5.0,
    "tier_seconds": 720,
    "command": "vlm reproduce siglip-tiny --seeds 2",
    "measured": ["abc123", "def456"],
    "finished": "2026-01-01T00:00:00Z",
    "units": ["1"],
}


def test_the_committed_page_is_the_generated_one():
    generated = methods_page(Results(ROOT / "results"))
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == generated, "run: vlm reproduce --write-docs"


def test_every_preset_has_one_row(tmp_path):
    page = methods_page(Results(tmp_path))
    for entry in list_presets():
        assert page.count(f"| **{entry.key}**:") == 1
    assert "not yet run" in page


def test_a_failure_is_shown_with_figures_command_seeds_and_commit(tmp_path):
    results = Results(tmp_path)
    results.add_verdict("siglip-tiny", ANSWER)
    row = next(line for line in methods_page(results).splitlines() if line.startswith("| siglip-tiny |"))
    for words in ("fails", "retrieval.x against clip-tiny: +0.50, **missed**", "10.00 (9.00, 11.00)", "12.00", "-2.00 [-14.70, 10.70]", "| 2 |", ANSWER["command"], "abc123, def456"):
        assert words in row


def test_drawn_scenes_are_labelled_and_give_way_to_real_data(tmp_path):
    results = Results(tmp_path)
    results.add_verdict("siglip-tiny", {**ANSWER, "data": "builtin", "verdict": "holds", "units": ["2"]})
    assert "holds (on drawn scenes, not the claim's data)" in methods_page(results)
    results.add_verdict("siglip-tiny", ANSWER)
    assert "(on drawn scenes" not in methods_page(results)


def test_checks_of_the_rig_are_on_the_page(tmp_path):
    results = Results(tmp_path)
    side = {"difference": ANSWER["difference"], "verdict": "holds", "seeds": [0, 1]}
    verdict = {"claim": "x", "ok": False, "planted": side, "self": side, "data": "real", "command": "c", "measured": ["m"], "units": []}
    results.add_verdict("rig-x", verdict)
    assert "**not as it must be**" in methods_page(results)


def test_the_block_for_the_terminal_says_what_was_found():
    text = block(ANSWER)
    for words in ("siglip-tiny: FAILS", "by 2 or more", "(at the edge of the grid)", "-2.00 [-14.70, 10.70]", "missed", "tier M"):
        assert words in text
    assert text.count("at the edge") == 1


@pytest.mark.parametrize("unbounded", [None, float("inf")])
def test_one_seed_has_no_interval(unbounded):
    assert interval({"mean": 1.0, "lower": unbounded, "upper": unbounded}) == "+1.00 [no interval]"
