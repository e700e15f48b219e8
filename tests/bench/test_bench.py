"""`vlm bench`: its rows, its selection, its table, and that its memory figures mean something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from vlm.bench import run as bench_run
from vlm.bench.cases import CASES, Case
from vlm.bench.table import markdown, verdict
from vlm.cli.bench import command

ROW_KEYS = {"case", "native_ms", "dispatched_ms", "peer", "peer_ms", "ratio", "native_ratio", "target", "ours_peak_mb",
            "peer_peak_mb"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "BUDGET_SECONDS", 0.0)


def test_names_are_unique_and_every_target_has_a_peer() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(case.runs_peer for case in CASES if case.target is not None)


def test_json_is_an_array_of_rows() -> None:
    threads = torch.get_num_threads()
    result = CliRunner().invoke(command, ["attention/dense/256/forward", "--json", "--no-memory", "--threads", "2"])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["case"] for row in rows] == ["attention/dense/256/forward", "attention/dense/256/forward+backward"]
    assert set(rows[0]) >= ROW_KEYS
    assert rows[0]["ratio"] == pytest.approx(rows[0]["peer_ms"] / rows[0]["dispatched_ms"], rel=0.01)


def test_the_list_may_be_json() -> None:
    result = CliRunner().invoke(command, ["attention/dense/256", "--list", "--json"])
    assert json.loads(result.stdout) == ["attention/dense/256/forward", "attention/dense/256/forward+backward"]


def test_a_peer_that_needs_too_much_memory_is_not_run() -> None:
    def peer() -> object:
        raise AssertionError("must not run")

    case = Case("x", "y", lambda: {"native": int, "dispatched": int, "peer": peer}, peer_bytes=10**12)
    row = bench_run.measure(case, torch.get_num_threads(), with_memory=False)
    assert row["peer_ms"] is None
    assert row["ratio"] is None


def test_a_case_without_a_kernel_is_judged_by_what_is_dispatched() -> None:
    account = {"target": 3.0, "cache_bytes": 7, "shares": {"tower": 0.25}}
    case = Case("whole", "y", lambda: {"dispatched": int, "peer": int, "part": int}, native=False, account=lambda times: account)
    row = bench_run.measure(case, torch.get_num_threads(), with_memory=False)
    assert set(row) >= ROW_KEYS
    assert (row["native_ms"], row["native_ratio"], row["target"]) == (None, None, 3.0)
    assert row["details"] == {"cache_bytes": 7, "shares": {"tower": 0.25}}
    assert account["target"] == 3.0
    assert verdict(row | {"ratio": 3.5}) == "met"
    assert verdict(row | {"ratio": 2.5, "native_ratio": 9.0}) == "missed"
    assert "- whole: cache_bytes 7, shares (tower 0.25)" in markdown([row])


def test_memory_that_would_be_hidden_is_not_measured_and_the_row_says_why() -> None:
    case = Case("hidden", "y", lambda: {"dispatched": int, "peer": int}, native=False, memory="hidden by x")
    row = bench_run.measure(case, torch.get_num_threads())  # a process for its memory would not find this case
    assert (row["ours_peak_mb"], row["peer_peak_mb"]) == (None, None)
    assert "- hidden: memory_not_measured hidden by x" in markdown([row])


def test_an_unknown_case_is_an_error_with_a_remedy() -> None:
    result = CliRunner().invoke(command, ["nothing-like-this"])
    assert result.exit_code != 0
    assert "vlm bench --list" in str(result.exception)


def test_the_table_says_met_or_missed() -> None:
    row = dict.fromkeys(ROW_KEYS) | {"case": "a", "native_ms": 1.0, "dispatched_ms": 1.0, "target": 2.0}
    assert verdict(row | {"native_ratio": 2.5}) == "met"
    assert verdict(row | {"native_ratio": 1.9}) == "missed"
    assert verdict(row) == ""
    assert "2 (missed)" in markdown([row | {"native_ratio": 1.9, "ratio": 1.9, "peer_ms": 1.9}])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak counter")
def test_the_contrastive_losses_never_hold_all_pairs() -> None:
    """4096 x 4096 logits are 64 MiB; the kernel stays far below, and the counter does see the peer's."""
    script = """
import torch
from vlm.bench.cases import Case, contrastive
from vlm.bench.memory import peak_here
torch.set_num_threads(2)
case = Case("probe", "", contrastive("softmax", 4096, width=32))
print(peak_here(case, "native"), peak_here(case, "peer"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ours, peer = map(float, done.stdout.split())
    assert ours < 16
    assert peer > 120
