"""Bad samples: each kind by its reason, the policies, the budget, the quarantine file."""

from __future__ import annotations

import json

import pytest

from tests.data.data_makers import sample, write_tar
from tests.runtime.picture_makers import BAD, GOOD
from vlm.config.errors import DataError, ExitCode
from vlm.data import DataOptions, Tokenizer, build_loader, open_source
from vlm.data.check import check
from vlm.runtime.preprocess import Preprocess

PRE = Preprocess(16)
GOOD_COUNT = 60


def with_text(text: bytes) -> dict[str, bytes]:
    return {"png": sample(0)["png"], "txt": text}


def with_json(raw: bytes) -> dict[str, bytes]:
    return {"png": sample(0)["png"], "json": raw}


MAKERS = {
    **{
        f"picture-{name}": ({"jpg": make(), "txt": b"words"}, reasons)
        for name, (make, reasons) in BAD.items()
    },
    "empty-caption": (with_text(b""), {"empty_text"}),
    "blank-caption": (with_text(b" \n\t "), {"empty_text"}),
    "nul-in-text": (with_text(b"a\0b"), {"bad_text"}),
    "latin-1-text": (with_text("größe".encode("latin-1")), {"bad_encoding"}),
    "lone-surrogate": (with_json(b'{"caption": "x \\ud800 y"}'), {"bad_text"}),
    "number-as-caption": (with_json(b'{"caption": 7}'), {"missing_text"}),
    "no-caption": (with_json(b'{"heading": "x"}'), {"missing_text"}),
    "json-cut": (with_json(b'{"caption": "x'), {"bad_json"}),
    "json-list": (with_json(b"[1, 2]"), {"bad_json"}),
    "json-deep": (with_json(b"[" * 100_000), {"bad_json"}),
    "json-not-utf-8": (with_json(b'{"caption": "\xff"}'), {"bad_encoding"}),
    "text-too-long": (with_text(b"x" * 5000), {"text_too_long"}),
    "text-alone": ({"txt": b"words"}, {"missing_image"}),
    "picture-alone": ({"png": sample(0)["png"]}, {"missing_text"}),
}


def options_of(uri, **table):
    return DataOptions.model_validate({"source": uri, "val": uri, "max_text": 2000, **table})


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_bpe(["a red thing"], 300)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    """Good samples, every good picture format, and one bad sample of each kind."""
    samples = {f"good-{n}": sample(n) for n in range(GOOD_COUNT)}
    samples |= {f"fine-{name}": {"jpg": make(), "txt": b"words"} for name, make in GOOD.items()}
    samples |= {f"bad-{name}": members for name, (members, _) in MAKERS.items()}
    return str(write_tar(tmp_path_factory.mktemp("bad") / "shard.tar", samples))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_bad_kind_is_counted_and_quarantined_by_its_reason(every_kind, tokenizer, tmp_path, workers):
    options = options_of(every_kind, bad_samples={"budget": 1.0}, workers=workers)
    source = open_source(every_kind)
    with build_loader(
        options, tokenizer=tokenizer, preprocess=PRE, batch_size=GOOD_COUNT + len(GOOD), quarantine=tmp_path
    ) as loader:
        batch = next(loader)
        report = loader.report()
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    found = {line["key"].removeprefix("bad-"): line["reason"] for line in lines}
    assert set(batch.keys) <= {source.key(i) for i in range(len(source)) if "bad-" not in source.key(i)}
    assert len(set(batch.keys)) == GOOD_COUNT + len(GOOD)
    assert report["read"] <= len(source)
    assert report["bad"] == len(found) == sum(report["reasons"].values())
    for name, reason in found.items():
        assert reason in MAKERS[name][1], name


def test_check_finds_exactly_the_bad_ones(every_kind):
    result = check(open_source(every_kind), options_of(every_kind))
    assert result["samples"] == GOOD_COUNT + len(GOOD) + len(MAKERS)
    assert result["bad"] == len(MAKERS)
    assert not result["within_budget"]
    named = {entry["key"].partition(":")[2] for entry in result["first_bad"]}
    assert all(name.startswith("bad-") for name in named)
    expected: dict[str, int] = {}
    for _, reasons in MAKERS.values():
        if len(reasons) == 1:
            expected[next(iter(reasons))] = expected.get(next(iter(reasons)), 0) + 1
    for reason, count in expected.items():
        assert result["reasons"][reason] >= count


@pytest.mark.parametrize("name", MAKERS)
def test_the_stop_policy_names_the_first_one(name, tmp_path, tokenizer):
    uri = str(write_tar(tmp_path / "shard.tar", {"one": sample(1), "wrong": MAKERS[name][0]}))
    options = options_of(uri, bad_samples={"policy": "stop"})
    with (
        build_loader(options, tokenizer=tokenizer, preprocess=PRE, batch_size=2) as loader,
        pytest.raises(DataError) as caught,
    ):
        next(loader)
    caught.match("shard.tar:wrong")
    assert caught.value.exit_code == ExitCode.WRONG_DATA
    assert any(reason in str(caught.value) for reason in MAKERS[name][1])


@pytest.mark.parametrize(("bad", "stops"), [(1, False), (2, False), (3, True)])
def test_the_budget_is_a_share_of_the_epoch(tmp_path, tokenizer, bad, stops):
    samples = {f"{n}": sample(n) for n in range(100 - bad)} | {f"bad{n}": with_text(b"") for n in range(bad)}
    uri = str(write_tar(tmp_path / "shard.tar", samples))
    options = options_of(uri, bad_samples={"budget": 0.02})
    with build_loader(options, tokenizer=tokenizer, preprocess=PRE, batch_size=10) as loader:
        if stops:
            with pytest.raises(
                DataError, match=r"3 of 100 samples are bad .the budget is 2.00% of an epoch, 2"
            ):
                [next(loader) for _ in range(10)]
        else:
            [next(loader) for _ in range(30)]
            assert loader.report()["reasons"] == {"empty_text": loader.report()["bad"]}
            assert loader.report()["bad"] in (3 * bad, 4 * bad)


def test_data_without_one_good_sample_end_in_an_error(tmp_path, tokenizer):
    uri = str(write_tar(tmp_path / "shard.tar", {f"bad{n}": with_text(b"") for n in range(5)}))
    options = options_of(uri, bad_samples={"budget": 1.0})
    with (
        build_loader(options, tokenizer=tokenizer, preprocess=PRE, batch_size=2) as loader,
        pytest.raises(DataError, match="5 of 5 samples are bad"),
    ):
        next(loader)


def test_a_resumed_run_does_not_write_its_quarantine_twice(tmp_path, tokenizer):
    samples = {f"{n}": sample(n) for n in range(10)} | {"bad": with_text(b"")}
    uri = str(write_tar(tmp_path / "shard.tar", samples))
    options = options_of(uri, bad_samples={"budget": 0.2})
    for _ in range(2):
        with build_loader(
            options, tokenizer=tokenizer, preprocess=PRE, batch_size=10, quarantine=tmp_path
        ) as loader:
            [next(loader) for _ in range(4)]
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1


def test_limits_of_the_options_hold(tmp_path, tokenizer):
    uri = str(write_tar(tmp_path / "shard.tar", {"one": sample(1)}))
    for table, reason in [
        ({"max_pixels": 255}, "too_many_pixels"),
        ({"max_bytes": 100}, "too_many_bytes"),
        ({"max_text": 5}, "text_too_long"),
    ]:
        options = options_of(uri, **{"max_text": 2000, **table})
        with (
            build_loader(options, tokenizer=tokenizer, preprocess=PRE, batch_size=1) as loader,
            pytest.raises(DataError, match=reason),
        ):
            next(loader)


def test_a_sample_without_the_group_or_label_field_is_bad(tmp_path, tokenizer):
    uri = str(write_tar(tmp_path / "shard.tar", {"one": sample(1), "two": with_text(b"words")}))
    for table in ({"group_by": "category"}, {"label": "category"}):
        options = options_of(uri, bad_samples={"budget": 0.5}, **table)
        with build_loader(options, tokenizer=tokenizer, preprocess=PRE, batch_size=4) as loader:
            batch = next(loader)
        assert set(batch.keys) == {"shard.tar:one"}
        assert loader.report()["reasons"] == {"missing_field": loader.report()["bad"]}
