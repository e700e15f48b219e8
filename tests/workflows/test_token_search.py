"""The search for how many visual tokens each layer reads: the exact checks of vision-token-search, and the command."""

import itertools
import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.answering_fixtures import answering_model
from tests.models.model_makers import answering
from tests.tokens.rows import equal_bits, reducing
from tests.tokens.test_tome import encoder, merge, pixels
from vlm.cli.main import main
from vlm.cli.tokens import task_of
from vlm.config.errors import DataError, RequestError
from vlm.evaluation.reading import Reading
from vlm.models import load_model
from vlm.workflows.token_search.changed import with_settings
from vlm.workflows.token_search.gaussian import Process, matern52, maximise
from vlm.workflows.token_search.run import calibration, with_keep
from vlm.workflows.token_search.search import CurveOptions, GreedyOptions, curve, greedy, table_of
from vlm.workflows.token_search.sweep import Curve, read_curve


def needing(*need, calls=None):
    """A score that grows until every layer reads what it needs."""

    def score(table):
        if calls is not None:
            assert table not in calls
            calls.append(table)
        return float(100 - sum(max(0, wanted - read) * 3 for wanted, read in zip(need, table)))

    return score


def exhaustive(score, depth, tokens, tolerance):
    """Of all tables that never rise and lose no more, the one of the fewest tokens."""
    full = score((tokens,) * depth)
    tables = [t for t in itertools.product(range(tokens, -1, -1), repeat=depth - 1) if list(t) == sorted(t, reverse=True)]
    good = [(tokens, *t) for t in tables if score((tokens, *t)) >= full - tolerance]
    return min(good, key=sum)


@pytest.mark.parametrize("inner", ["bisect", "bayes"])
@settings(max_examples=15, deadline=None)
@given(need=st.lists(st.integers(0, 8), min_size=3, max_size=3).map(lambda n: sorted(n, reverse=True)))
def test_vision_token_search_greedy_equals_exhaustive_search_of_four_layers(inner, need):
    calls = []
    found = greedy(needing(8, *need, calls=calls), 4, 8, GreedyOptions(inner=inner, tolerance=0.0))
    assert found.table == exhaustive(needing(8, *need), 4, 8, 0.0) == (8, *need)
    assert (found.score, found.full) == (100.0, 100.0)
    assert all(list(table) == sorted(table, reverse=True) for table in calls)  # nested, and none is asked for twice
    if inner == "bisect":
        assert len(calls) <= 1 + 3 * 4


def test_vision_token_search_tolerance_is_spent_once_and_layers_may_be_grouped():
    found = greedy(needing(8, 6, 4, 2), 4, 8, GreedyOptions(tolerance=3.0))
    assert found.score >= 97.0
    assert found.full == 100.0
    assert greedy(needing(8, 6, 6, 2, 1), 5, 8, GreedyOptions(tolerance=0.0, group=2)).table == (8, 6, 6, 2, 2)
    assert greedy(needing(8, 6, 4, 2), 4, 8, GreedyOptions(tolerance=0.0, least=5)).table == (8, 6, 5, 5)
    many = greedy(needing(576, 300, 200, 77), 4, 576, GreedyOptions(inner="bayes", tolerance=0.0, evaluations=25))
    assert list(many.table) == sorted(many.table, reverse=True)
    assert many.score == 100.0  # never below what is wanted, if a few tokens more


def test_vision_token_search_the_curve_keeps_its_budget_and_finds_the_steepness():
    wanted = table_of(8, 64, 1.7, 0.4)
    calls = []

    def score(table):
        assert table not in calls
        calls.append(table)
        return -float(np.abs(np.subtract(table, wanted)).sum())

    found = curve(score, 8, 64, CurveOptions(budget=0.4, evaluations=25))
    assert found.score >= -6
    assert abs(found.k - 1.7) < 0.5
    assert len(calls) <= 26
    for table in calls[:-1]:
        assert table[0] == 64
        assert 0.4 * 64 - 1 <= sum(table) / 8 <= 0.4 * 64 + 1e-6 or table == (64,) * 8
    calls.clear()
    near = curve(score, 8, 64, CurveOptions(budget=0.4, evaluations=4), like=wanted)
    assert near.score == 0.0  # the first k is the one whose curve is most like
    with pytest.raises(ValueError, match="out of reach"):
        curve(score, 8, 64, CurveOptions(budget=0.1))


def test_vision_token_search_the_process_passes_through_what_it_was_shown():
    places, values = np.array([0.0, 0.3, 1.0]), np.array([1.0, 3.0, -2.0])
    process = Process.of(places, values, noise=1e-6)
    mean, deviation = process.at(places)
    assert np.allclose(mean, values, atol=1e-6)
    assert np.allclose(deviation, 0, atol=1e-3)
    far = process.at(np.array([0.65]))[1][0]
    assert far > 10 * deviation.max()
    covariance = matern52(places, places, 0.3)
    assert np.allclose(covariance, covariance.T)
    assert np.linalg.eigvalsh(covariance).min() > 0
    assert matern52(np.array([0.0]), np.array([0.3]), 0.3)[0, 0] == pytest.approx((1 + 5**0.5 + 5 / 3) * np.exp(-(5**0.5)))
    # the expected gain is the mean of what exceeds the best, by drawing
    x = np.array([0.5])
    m, s = process.at(x)
    drawn = np.random.default_rng(0).normal(m[0], s[0], 400_000)
    assert process.improvement(x, 2.0)[0] == pytest.approx(np.clip(drawn - 2.0, 0, None).mean(), rel=0.02)
    flat = Process.of(np.array([0.5]), np.array([4.0]))
    assert np.isfinite(flat.improvement(np.linspace(0, 1, 5), 4.0)).all()


def test_vision_token_search_few_measurements_find_the_top_of_a_hill():
    places = np.linspace(0, 1, 200)
    seen = maximise(lambda i: -((places[i] - 0.37) ** 2), places, first=[0, 199], evaluations=12)
    assert abs(places[max(seen, key=seen.get)] - 0.37) < 0.02
    assert len(seen) <= 12


def test_vision_token_search_never_reads_the_test_split():
    with pytest.raises(DataError, match="a search is tuning"):
        calibration("scenes:?n=10&split=test", Reading(), None)
    with pytest.raises(DataError, match="a search is tuning"):
        calibration("scenes:?n=10&split=val", Reading(), "scenes:?n=10&split=val")
    assert len(calibration("scenes:?n=10&split=val", Reading(), "scenes:?n=10&split=test")) == 10


@torch.no_grad()
def test_other_settings_of_the_same_weights():
    full = reducing(None)
    dropping = with_settings(full, {"tokens.keep": {"kind": "constant", "ratio": 0.5}})
    assert equal_bits(dropping, reducing({"keep": {"kind": "constant", "ratio": 0.5}}))
    assert equal_bits(with_settings(dropping, {"tokens": None}), full)
    assert equal_bits(with_keep(full, (16, 16, 16, 16)), full)
    assert with_keep(full, (16, 12, 3, 0)).options.tokens.plan(4).read(16, 4) == [16, 12, 3, 0]
    fopru = reducing({"pre": [{"score": {"kind": "norm"}, "select": {"kind": "top-k", "ratio": 0.5}}]})
    assert with_settings(fopru, {"tokens.pre.0.select.ratio": 0.25}).picture_tokens == 4
    kept = with_keep(fopru, (8, 4, 2, 1)).options.tokens
    assert (kept.pre[0].select.ratio, kept.apply.positions, kept.score.norm) == (0.5, "keep", "previous-layer")
    tower = encoder(merge(3))
    none = with_settings(tower, {"vision.merge.remove.r": 0})
    assert torch.equal(none.vision(pixels())[1], encoder().vision(pixels())[1])
    for settings_, said in (
        ({"tokens.pre.3": {}}, "no entry 3"),
        ({"language.width": 32}, "changes weights"),
        ({"length.deep": 1}, "has nothing inside"),
        ({"tokens.keep": {"kind": "constant", "ratio": 2}}, "less than or equal to 1"),
        ({"tokens.keep": {"kind": "table", "ratios": [1, 0.5]}}, "has 2 entries"),
    ):
        with pytest.raises(RequestError, match=said):
            with_settings(answering(length=96) if "pre" not in str(settings_) else fopru, settings_)


def search(output, *more):
    model = answering_model("prefix").parent
    given = ["--data", "scenes:?n=12&split=val", "--limit", "3", "--threads", "1", "--output", str(output)]
    return main(["tokens", "search", str(model), *given, *more])


def test_vision_token_search_command_goes_on_where_it_ended(tmp_path, capsys):
    output = tmp_path / "keep"
    assert search(output, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["table"][0] == report["tokens"] == 4
    assert report["table"] == sorted(report["table"], reverse=True)
    lines = (output / "scores.jsonl").read_text().splitlines()
    assert len(lines) == report["tables_scored"] >= 2
    assert report["score"] >= report["full_score"] - 0.5
    model = load_model(output / "model")
    assert model.options.tokens.keep.ratios == [n / 4 for n in report["table"]]
    assert "[model.tokens]\nkeep = " in (output / "keep.toml").read_text()
    # an interrupted one measures only what is missing: here a line that was cut off
    (output / "scores.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:9])
    (output / "search.json").unlink()
    assert search(output, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again == report
    more = (output / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["table"] for line in more] == [json.loads(line)["table"] for line in lines]
    assert search(output, "--tolerance", "9") == 2
    assert "holds another search" in capsys.readouterr().err
    assert search(tmp_path / "other", "--kind", "sigmoid") == 2
    assert "needs --budget" in capsys.readouterr().err
    assert search(tmp_path / "other", "--budget", "0.5") == 2
    assert "does not go with" in capsys.readouterr().err


def test_sweep_writes_the_score_and_speed_of_every_arm_of_every_curve(tmp_path, capsys):
    model = answering_model("aim").parent
    given = ["--vary", "tokens.pre.0.select.keep=1.0,0.5,0.25", "--vary", "half inside: tokens.keep={kind='constant',ratio=0.5}"]
    data = ["--data", "scenes:?n=12&split=val", "--limit", "3", "--threads", "1"]
    more = ["--repeats", "2", "--batch", "4", "--output", str(tmp_path / "sweep")]
    assert main(["tokens", "sweep", str(model), *given, *data, *more, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["rows"]
    assert [row["value"] for row in rows] == [1.0, 0.5, 0.25, {"kind": "constant", "ratio": 0.5}]
    assert [row["curve"] for row in rows] == ["tokens.pre.0.select.keep"] * 3 + ["half inside"]
    assert rows[0]["speed_ratio"] == 1.0
    assert all(row["pictures_per_second"] > 0 and row["lower"] <= row["score"] <= row["upper"] for row in rows)
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == report
    chart = ElementTree.parse(tmp_path / "sweep" / "sweep.svg").getroot()
    assert len(chart.findall("{*}circle")) == 4
    assert len(chart.findall("{*}polyline")) == 2
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert page.count("<svg") == 1
    assert "tokens.pre.0.select.keep" in page
    assert "half inside" in page


def test_the_score_asks_as_the_run_does(tmp_path):
    tasks = '[[evaluation.tasks]]\nname = "captions"\ntask = "caption"\nprompt = "what is this?"\nlimit = 300\ncontrols = ["none"]\n'
    (tmp_path / "preset.toml").write_text(tasks, encoding="utf-8")
    given = {"limit": 5, "seed": 1}
    for name in ("captions", "caption"):
        task = task_of(tmp_path, {"task": name, **given})
        assert (task.task, task.prompt, task.limit, task.seed, task.controls) == ("caption", "what is this?", 5, 1, ())
    assert task_of(tmp_path / "elsewhere", {"task": "caption", **given}).prompt != "what is this?"
    with pytest.raises(RequestError, match="--task captoin"):
        task_of(tmp_path, {"task": "captoin", **given})


def test_sweep_refuses_what_is_no_curve():
    assert read_curve("a half: tokens.keep.ratio=0.5") == Curve("a half", "tokens.keep.ratio", [0.5])
    assert read_curve("vision.merge={remove={r=8}}, {remove={r=4}}").values == [{"remove": {"r": 8}}, {"remove": {"r": 4}}]
    for text in ("tokens.keep.ratio", "=0.5", "tokens.keep.ratio=half"):
        with pytest.raises(RequestError, match="--vary"):
            read_curve(text)
