"""The report page: complete from whatever is there, loads nothing, and cannot be broken by what data say."""

import json
import re
from html.parser import HTMLParser

import pytest

from vlm.config.errors import DataError
from vlm.reporting import read_run, render, write_report

PICTURE = "data:image/webp;base64,UklGRhoAAABXRUJQVlA4TA0AAAAvAAAAEAcQERGIiP4HAA=="

PRESET = """schema = 1
[method]
key = "clip-tiny"
title = "Tiny & <b>bold</b>"
[model]
kind = "dual-encoder"
[data]
source = "pictures/*.tar"
[[objectives]]
kind = "contrastive"
[train]
batch_size = 64
"""


def retrieval(**changes):
    example = {
        "direction": "text_to_image",
        "query": "a <script>alert(1)</script> cat",
        "rank": 2,
        "found": [
            {"key": "s:1", "picture": PICTURE, "score": 0.4, "right": False},
            {"key": "s:2", "picture": "javascript:alert(1)", "score": 0.3, "right": True},
        ],
    }
    other = {
        "direction": "image_to_text",
        "key": "s:1",
        "picture": PICTURE,
        "truth": ['he said "no"'],
        "rank": 1,
        "found": [
            {"text": "right one", "score": 0.5, "right": True},
            {"text": "wrong", "score": -0.1, "right": False},
        ],
    }
    value = {"r@1": 12.5, "r@5": 40.0}
    return {
        "task": "retrieval",
        "name": "retrieval",
        "samples": 80,
        "metrics": {"image_to_text": value, "text_to_image": value},
        "intervals": {
            d: {k: {"lower": v - 5, "upper": v + 5} for k, v in value.items()}
            for d in ("image_to_text", "text_to_image")
        },
        "chance": {"image_to_text": {"r@1": 1.25, "r@5": 6.25}, "text_to_image": {"r@1": 1.25, "r@5": 6.25}},
        "details": {"image_to_text": {"queries": 80, "candidates": 70, "clusters": 30}},
        "examples": [example, other],
        "data": {"uri": "val.tar"},
        **changes,
    }


def zero_shot():
    return {
        "task": "zero-shot",
        "name": "by kind",
        "samples": 10,
        "metrics": {"top1": 60.0},
        "intervals": {"top1": {"lower": 30.0, "upper": 85.0}},
        "chance": {"top1": 50.0},
        "details": {
            "classes": 2,
            "confusion": {
                "classes": ["a", "b<i>"],
                "names": ["a", "b<i>"],
                "counts": [[3, 2], [2, 3]],
                "other": False,
            },
            "confused": [{"true": "a", "answered": "b<i>", "count": 2, "share": 0.4}],
        },
    }


def perplexity():
    return {
        "task": "perplexity",
        "name": "perplexity",
        "samples": 5,
        "metrics": {"bits_per_character": 2.1, "nats_per_token": 3.0},
        "intervals": {"bits_per_character": {"lower": 2.0, "upper": 2.2}},
        "chance": {"bits_per_character": 4.0},
        "examples": [
            {
                "key": "d1",
                "bits_per_character": 2.0,
                "tokens": ["th", "e <", "\n"],
                "bits": [1.0, 9.0, 0.1],
                "cut": True,
            }
        ],
    }


def make(root, *, results=(), steps=40, preset=PRESET, finished=True):
    root.mkdir(exist_ok=True)
    (root / "preset.toml").write_text(preset)
    (root / "environment.json").write_text(
        json.dumps({"cores": 2, "versions": {"torch": "2"}, "command": ["vlm", "pretrain", "a b"]})
    )
    lines = [
        {"step": s, "time": 2.0 * s, "train/loss": 5.0 / s, "train/lr": 1e-3 * s, "perf/samples_per_s": 100.0}
        for s in range(1, steps + 1)
    ]
    lines += [{"step": s, "time": 2.0 * s, "eval/retrieval/image_to_text/r@1": s / 2} for s in (20, 40)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "evaluation").mkdir(exist_ok=True)
    for result in results:
        (root / "evaluation" / f"{result['name']}.json").write_text(json.dumps(result))
    if finished:
        import numpy as np
        from safetensors.numpy import save_file

        (root / "model").mkdir(exist_ok=True)
        save_file(
            {"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)},
            root / "model" / "model.safetensors",
        )
    return root


class Page(HTMLParser):
    """Checks nesting, gathers text, tags and links."""

    VOID = ("meta", "img", "br", "line", "circle", "polyline")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.ids, self.links, self.sources = [], [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        if "id" in values:
            self.ids.append(values["id"])
        if "href" in values:
            self.links.append(values["href"])
        if "src" in values:
            self.sources.append(values["src"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def has(self, tag, **wanted):
        return any(t == tag and all(values.get(k) == v for k, v in wanted.items()) for t, values in self.tags)


@pytest.fixture
def full(tmp_path):
    return make(tmp_path / "run", results=[retrieval(), zero_shot()])


def test_the_page_is_well_formed_and_loads_nothing(full):
    html = render(read_run(full))
    page = Page(html)
    assert all(source.startswith("data:image/") for source in page.sources)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"url\(|@import|<script|<link|https?://", html)
    assert page.has("meta", content="default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert page.has("html", lang="en")
    assert page.has("meta", name="viewport", content="width=device-width, initial-scale=1")
    assert len(set(page.ids)) == len(page.ids)


def test_what_data_say_is_text_not_markup(full):
    html = render(read_run(full))
    page = Page(html)
    text = "".join(page.text)
    assert "a <script>alert(1)</script> cat" in text
    assert "Tiny & <b>bold</b>" in text
    assert "b<i>" in text
    assert "javascript:" not in html
    assert not page.has("script")


def test_figures_stand_beside_interval_and_chance(full):
    page = Page(render(read_run(full)))
    said = [values.get("aria-label", "") for tag, values in page.tags]
    assert "first place: 12.5, 95% interval 7.5 to 17.5, chance 1.2" in said
    assert any(label.startswith("loss: from 5.00 at update 1 to ") for label in said)
    text = "".join(page.text)
    assert "17 parameters" in text
    assert "for 40 updates of 64 samples each" in text
    assert "a taken for b<i>" in text.replace("\n", " ")


def test_examples_show_success_and_failure_with_alternative_text(full):
    page = Page(render(read_run(full)))
    pictures = [values for tag, values in page.tags if tag == "img"]
    assert len(pictures) == 2
    assert all(values["alt"] for values in pictures)
    text = "".join(page.text)
    assert "place 2" in text
    assert "found first" in text
    assert "not stored" in text


def test_a_language_run_shows_surprise_and_other_next_steps(tmp_path):
    preset = PRESET.replace("dual-encoder", "language")
    text = "".join(Page(render(read_run(make(tmp_path / "run", results=[perplexity()], preset=preset)))).text)
    assert "What surprises it" in text
    assert "the <\n …" in text
    assert "bits per character" in text
    assert "vlm predict" not in text
    assert "--task perplexity" in text


def test_an_unfinished_run_without_results_says_so(tmp_path):
    root = make(tmp_path / "run", finished=False)
    (root / "environment.json").unlink()
    record = read_run(root)
    text = "".join(Page(render(record)).text)
    assert "is being trained" in text
    assert "model/ is missing" in text
    assert "environment.json is missing" in text
    assert "--resume" in text
    assert "No evaluation is stored" in text
    assert record.summary()["finished"] is False


@pytest.mark.parametrize("kept", ["preset.toml", "metrics.jsonl", "environment.json", "evaluation"])
def test_any_single_part_is_enough_for_a_page(tmp_path, kept):
    import shutil

    root = make(tmp_path / "run", results=[retrieval()])
    for path in root.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    Page(render(read_run(root)))


def test_damaged_files_are_named_on_the_page(tmp_path):
    root = make(tmp_path / "run", results=[retrieval()])
    (root / "preset.toml").write_text("= broken")
    (root / "environment.json").write_text("[1")
    (root / "model" / "model.safetensors").write_bytes(b"\xff" * 20)
    (root / "evaluation" / "zz.json").write_text("{}")
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "train/lo')
    text = "".join(Page(render(read_run(root))).text)
    for said in (
        "preset.toml cannot be read",
        "environment.json cannot be read",
        "model.safetensors cannot be read",
        "zz.json",
        "1 lines of metrics.jsonl",
    ):
        assert said in text


def test_numbers_that_are_not_finite_do_not_break_curves(tmp_path):
    root = make(tmp_path / "run")
    with (root / "metrics.jsonl").open("a") as file:
        file.writelines(
            f'{{"step": {41 + i}, "time": 1, "train/loss": {v}}}\n'
            for i, v in enumerate(("NaN", "Infinity", "1e300"))
        )
    html = render(read_run(root))
    assert not re.search(r'points="[^"]*(nan|inf)', html)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such run"):
        read_run(tmp_path / "nothing")
    with pytest.raises(DataError, match="is no run"):
        read_run(tmp_path)


def test_the_report_is_written_where_asked(full, tmp_path):
    assert write_report(full) == full / "report.html"
    assert write_report(full, tmp_path / "deep" / "page.html").read_text().startswith("<!doctype html>")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["page.html"]


def test_time_counts_the_parts_of_a_resumed_run(tmp_path):
    root = make(tmp_path / "run", steps=2)
    lines = [{"step": s, "time": t, "train/loss": 1.0} for s, t in ((1, 10.0), (2, 20.0), (3, 4.0), (4, 9.0))]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(root).seconds == 29.0


def written(task="vqa", **changes):
    """A result of a task that reads what a model writes, as stored."""
    own = {"exact": 60.0, "color": {"exact": 80.0}, "yes_no": {"f1": 55.0}}
    blind = {"exact": 35.0, "color": {"exact": 20.0}, "yes_no": {"f1": 50.0}}
    over = {"exact": 25.0, "color": {"exact": 60.0}, "yes_no": {"f1": 5.0}}

    def around(tree, by):
        return {
            k: around(v, by) if isinstance(v, dict) else {"lower": v - by, "upper": v + by} for k, v in tree.items()
        }

    def example(i):
        return {
            "direction": task,
            "key": f"k{i}",
            "picture": PICTURE,
            "question": f"what is <b>{i}</b>?",
            "answer": "red" if i % 2 else "",
            "truth": ["red"],
            "right": bool(i % 2),
            "half": "better" if i % 2 else "worse",
            "cider": 3.25,
            "absent": [] if i % 2 else ["a <i>ghost</i>"],
            "controls": {"none": f"blind {i}", "shuffled": ""},
        }

    return {
        "task": task,
        "name": task,
        "samples": 40,
        "metrics": {**own, "none": blind, "over_none": over},
        "intervals": {**around(own, 4), "none": around(blind, 4), "over_none": around(over, 9)},
        "chance": {"exact": 30.0},
        "details": {"questions": 120, "kinds": {"color": 40}, "yes_no_questions": 50, "clusters": 8},
        "examples": [example(i) for i in range(14)],
        "data": {"uri": "val.tar"},
        **changes,
    }


def test_controls_stand_beside_the_scores(tmp_path):
    html = render(read_run(make(tmp_path / "run", results=[written()])))
    page = Page(html)
    said = [values.get("aria-label", "") for _, values in page.tags]
    assert "right: 60.0, 95% interval 56.0 to 64.0, chance 30.0, with no picture 35.0" in said
    assert "F1: 55.0, 95% interval 51.0 to 59.0, with no picture 50.0" in said
    text = "".join(page.text)
    assert "no picture 35.0 (+25.0 ✓)" in text
    # A gain whose interval holds 0 has no tick.
    assert "no picture 50.0 (+5.0)" in text
    assert "it is better than itself with no picture (+25.0; +16.0 to +34.0)" in text
    assert "40 pictures of val.tar, 120 questions, intervals over 8 concepts" in text
    assert "without a picture" in text
    # The controls have no rows of their own.
    assert sum(label.startswith("right: ") for label in said) == 2


def test_an_interval_of_the_difference_decides_the_verdict(tmp_path):
    def verdict(low, high, task="vqa", name="exact"):
        value = {name: 10.0}
        changes = {
            "metrics": {**value, "none": value, "over_none": {name: (low + high) / 2}},
            "intervals": {"over_none": {name: {"lower": low, "upper": high}}},
            "chance": {},
        }
        root = make(tmp_path / f"{task}{low}{high}", results=[written(task, **changes)])
        return "".join(Page(render(read_run(root))).text)

    assert "it is better than itself" in verdict(1, 5)
    assert "it is worse than itself" in verdict(-5, -1)
    assert "not told apart from itself" in verdict(-1, 5)
    # Fewer absent objects are better.
    assert "it is better than itself" in verdict(-5, -1, "hallucination", "absent_object_rate")


@pytest.mark.parametrize(
    ("task", "good", "bad"),
    [
        ("vqa", "✓ right", "✗ wrong"),
        ("caption", "✓ word for word · CIDEr 3.25", "worse half · CIDEr 3.25"),
        ("hallucination", "✓ nothing absent named", "✗ names what is not there"),
    ],
)
def test_ten_pictures_with_what_was_said_right_and_wrong(tmp_path, task, good, bad):
    html = render(read_run(make(tmp_path / "run", results=[written(task)])))
    page = Page(html)
    text = "".join(page.text)
    assert "What it says" in text
    assert (text.count(good), text.count(bad)) == (5, 5)
    pictures = [values for tag, values in page.tags if tag == "img"]
    assert [values["alt"] for values in pictures] == ["red"] * 10
    assert "what is <b>3</b>?" in text
    assert "blind 3" in text
    assert text.count("nothing") >= 5 + 10
    assert text.count("a <i>ghost</i>") == 5
    assert not page.has("script")


def test_cost_is_told_apart_into_counted_and_measured(tmp_path):
    result = {
        "task": "cost",
        "name": "cost",
        "samples": 8,
        "metrics": {
            "counted": {"parameters": 5_200_000, "cache_bytes": 3 * 2**20, "prefill_flops": 2.5e9},
            "measured": {"time_to_first_token": 0.0123, "mean_tokens_per_second": 40.0},
        },
        "intervals": {"measured": {"mean_tokens_per_second": {"lower": 35.0, "upper": 44.0}}},
        "details": {"positions_by_layer": [64, 32, 16]},
    }
    page = Page(render(read_run(make(tmp_path / "run", results=[result, written()]))))
    text = "".join(page.text)
    for said in ("5.2 million", "3.00 MiB", "2.5 billion", "12.3 ms", "35.0 to 44.0", "64 in the first layer, 16 in the last"):
        assert said in text
    assert page.has("div", role="img", **{"aria-label": "64, 32, 16"})
    # What it answers stands before what that costs.
    assert text.index("120 questions") < text.index("from shapes")


def test_a_vision_language_run_says_how_to_measure_it(tmp_path):
    preset = PRESET.replace("dual-encoder", "vision-language")
    text = "".join(Page(render(read_run(make(tmp_path / "run", preset=preset)))).text)
    assert "--task vqa --save" in text
    assert "--task cost" in text
    assert "vlm predict" not in text


def test_dclip_what_speaks_for_an_answer_stands_below_it(tmp_path):
    example = {
        "direction": "zero-shot",
        "key": "s:1",
        "picture": PICTURE,
        "truth": ["owl"],
        "rank": 1,
        "found": [{"text": "owl", "score": 0.5, "right": True}],
        "why": [{"text": "owl, which has <round> eyes", "score": 0.61}],
    }
    plain = {name: value for name, value in example.items() if name != "why"}
    for one, shown in ((example, True), (plain, False)):
        run = make(tmp_path / str(shown), results=[{**zero_shot(), "examples": [one]}])
        html = render(read_run(run))
        assert ("owl, which has <round> eyes" in "".join(Page(html).text)) == shown
        assert "<round>" not in html
