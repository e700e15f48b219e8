"""The loader: exact order and resume with any number of workers and ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.data_makers import Ranks, sample, write_pairs, write_shards, write_tar
from vlm.config.errors import DataError, RunFailed
from vlm.data import DataOptions, Tokenizer, build_loader, open_source, source_texts
from vlm.runtime.preprocess import Preprocess
from vlm.types.state import join_tree, split_tree

PRE = Preprocess(16, "squash", "bilinear")
AUGMENT = {"augment": "random-resized-crop", "flip": True}


@pytest.fixture(scope="module")
def uris(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {
        "tar": write_shards(root / "shards", 40),
        "jsonl": write_pairs(root / "pairs", 40),
        "scenes": "scenes:?n=40&size=16",
    }


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_bpe(["a red thing", "a green thing number 12"], 300)


def loader_of(uri, tokenizer, *, batch_size=8, seed=3, communicator=None, quarantine=None, **table):
    table = {"image": AUGMENT, "group_by": "text", "text": {"length": 12}, **table}
    options = DataOptions.model_validate({"source": uri, **table})
    return build_loader(
        options,
        tokenizer=tokenizer,
        preprocess=PRE,
        batch_size=batch_size,
        seed=seed,
        communicator=communicator,
        quarantine=quarantine,
    )


def assert_equal(one, two):
    assert list(one.keys) == list(two.keys)
    assert torch.equal(one.draws, two.draws)
    assert torch.equal(one.epoch, two.epoch)
    assert set(one) == set(two)
    for name in one:
        for field in ("values", "mask", "sample_index"):
            assert torch.equal(getattr(one[name], field), getattr(two[name], field)), (name, field)


def take(loader, count):
    return [next(loader) for _ in range(count)]


def test_streams_have_their_types(uris, tokenizer):
    with loader_of(uris["tar"], tokenizer, label="category") as loader:
        batch = next(loader)
        classes = loader.classes()
    assert batch["image"].values.shape == (8, 3, 16, 16)
    assert batch["image"].values.dtype == torch.uint8
    assert batch["text"].values.shape == (8, 12)
    assert batch["text"].slot is None
    assert classes == {"category": ["blue", "green", "red"]}
    numbers = [int(key[-6:]) for key in batch.keys]
    expected = [classes["category"].index(("red", "green", "blue")[n % 3]) for n in numbers]
    assert batch["label"].values.tolist() == expected
    assert loader.samples_per_epoch == 40


def test_an_epoch_holds_every_sample_once_and_the_next_another_order(uris, tokenizer):
    with loader_of(uris["tar"], tokenizer) as loader:
        first = [key for batch in take(loader, 5) for key in batch.keys]
        second = [key for batch in take(loader, 5) for key in batch.keys]
    source = open_source(uris["tar"])
    everything = sorted(source.key(i) for i in range(40))
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert first != everything


def test_batches_run_across_the_end_of_an_epoch(uris, tokenizer):
    with loader_of(uris["tar"], tokenizer, batch_size=24) as loader:
        batches = take(loader, 2)
    assert batches[1].epoch.tolist() == [0] * 16 + [1] * 8


def test_the_order_does_not_depend_on_where_the_data_lies(uris, tokenizer, tmp_path):
    moved = write_shards(tmp_path / "elsewhere" / "deeper", 40)
    with loader_of(uris["tar"], tokenizer) as one, loader_of(moved, tokenizer) as two:
        for _ in range(6):
            assert_equal(next(one), next(two))


def test_seeds_give_different_orders_and_views(uris, tokenizer):
    with loader_of(uris["tar"], tokenizer) as one, loader_of(uris["tar"], tokenizer, seed=4) as two:
        assert list(next(one).keys) != list(next(two).keys)


def test_a_view_belongs_to_the_sample_and_epoch_whatever_the_batch(uris, tokenizer):
    with loader_of(uris["tar"], tokenizer) as one, loader_of(uris["tar"], tokenizer, batch_size=20) as two:
        views = {k: v for b in take(one, 5) for k, v in zip(b.keys, b["image"].values)}
        for batch in take(two, 2):
            for key, view in zip(batch.keys, batch["image"].values):
                assert torch.equal(views[key], view)
        later = {k: v for b in take(one, 5) for k, v in zip(b.keys, b["image"].values)}
    assert sum(torch.equal(views[key], later[key]) for key in views) < 5


@pytest.mark.parametrize("kind", ["tar", "jsonl", "scenes"])
def test_workers_change_nothing(kind, uris, tokenizer):
    with loader_of(uris[kind], tokenizer) as one, loader_of(uris[kind], tokenizer, workers=2) as two:
        for _ in range(11):
            assert_equal(next(one), next(two))


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["tar", "jsonl", "scenes"]),
    steps=st.integers(1, 12),
    saved=st.integers(0, 11),
    batch_size=st.integers(1, 50),
    workers=st.sampled_from([(0, 0), (0, 0), (0, 0), (0, 2), (2, 0)]),
)
def test_resume_is_exact_at_any_step(uris, tokenizer, kind, steps, saved, batch_size, workers):
    saved = min(saved, steps)
    with loader_of(uris[kind], tokenizer, batch_size=batch_size, workers=workers[0]) as loader:
        take(loader, saved)
        tensors, plain = split_tree(loader.state_dict())
        rest = take(loader, steps - saved)
        end = loader.state_dict()
    state = join_tree(tensors, json.loads(json.dumps(plain)))
    with loader_of(uris[kind], tokenizer, batch_size=batch_size, workers=workers[1]) as loader:
        loader.load_state_dict(state)
        for batch in rest:
            assert_equal(batch, next(loader))
        assert loader.state_dict() == end


def test_a_loader_can_be_set_back(uris, tokenizer):
    for workers in (0, 2):
        with loader_of(uris["tar"], tokenizer, workers=workers) as loader:
            take(loader, 2)
            state = loader.state_dict()
            once = take(loader, 5)
            loader.load_state_dict(state)
            for one, two in zip(once, take(loader, 5)):
                assert_equal(one, two)


def test_the_state_is_small(uris, tokenizer):
    with loader_of(uris["tar"], tokenizer, workers=2) as loader:
        take(loader, 3)
        assert len(json.dumps(loader.state_dict())) < 400


def test_a_state_of_other_data_or_another_seed_is_refused(uris, tokenizer):
    with loader_of(uris["tar"], tokenizer) as loader:
        state = loader.state_dict()
    with loader_of(uris["jsonl"], tokenizer) as loader, pytest.raises(DataError, match="data changed"):
        loader.load_state_dict(state)
    with loader_of(uris["tar"], tokenizer, seed=9) as loader, pytest.raises(DataError, match="seed 3"):
        loader.load_state_dict(state)


def poisoned(folder, count=40, bad=(3, 11, 12, 30)):
    """The good shards with some samples spoilt, and the same shards without them."""
    for name in ("with", "without"):
        (folder / name).mkdir()
    for shard in range(2):
        numbers = range(shard * count // 2, (shard + 1) * count // 2)
        samples = {f"{n:06}": sample(n) for n in numbers}
        clean = {key: members for key, members in samples.items() if int(key) not in bad}
        for n in set(bad) & set(numbers):
            samples[f"{n:06}"]["png"] = samples[f"{n:06}"]["png"][: 100 + n]
        write_tar(folder / "with" / f"{shard}.tar", samples)
        write_tar(folder / "without" / f"{shard}.tar", clean)
    return str(folder / "with" / "*.tar"), str(folder / "without" / "*.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_bad_samples_equals_a_run_without_them(tmp_path, tokenizer, workers):
    dirty, clean = poisoned(tmp_path)
    lenient = {"budget": 0.2}
    with (
        loader_of(dirty, tokenizer, bad_samples=lenient, workers=workers, quarantine=tmp_path) as one,
        loader_of(clean, tokenizer) as two,
    ):
        for _ in range(10):
            assert_equal(next(one), next(two))
        report = one.report()
    assert report["bad"] == sum(report["reasons"].values())
    assert report["read"] - report["bad"] == 80
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == ["000003", "000011", "000012", "000030"]
    assert {line["shard"] for line in lines} == {"0.tar", "1.tar"}


@pytest.mark.parametrize("size", [2, 4])
def test_the_global_batches_are_the_same_at_any_world_size(tmp_path, tokenizer, size):
    dirty, _ = poisoned(tmp_path)
    lenient = {"budget": 0.2}

    def work(communicator):
        with loader_of(
            dirty, tokenizer, communicator=communicator, bad_samples=lenient, quarantine=tmp_path
        ) as loader:
            return take(loader, 9), loader.state_dict(), loader.report()

    with loader_of(dirty, tokenizer, bad_samples=lenient) as loader:
        alone = take(loader, 9)
        state, report = loader.state_dict(), loader.report()
    parts = Ranks(size).run(work)
    for step, whole in enumerate(alone):
        rows = {k: v for part, _, _ in parts for k, v in zip(part[step].keys, part[step]["image"].values)}
        assert sorted(rows) == sorted(whole.keys)
        for key, row in zip(whole.keys, whole["image"].values):
            assert torch.equal(rows[key], row)
        for part, _, _ in parts:
            assert list(part[step].keys) == [key for key in whole.keys if key in set(part[step].keys)]
            assert abs(len(part[step]) - 8 / size) <= 2
    for _, own_state, own_report in parts:
        assert own_state == state
        assert own_report["reasons"] == report["reasons"]
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 4


def test_a_run_saved_on_four_ranks_goes_on_on_two(uris, tokenizer):
    def until(communicator):
        with loader_of(uris["tar"], tokenizer, communicator=communicator) as loader:
            take(loader, 3)
            return loader.state_dict()

    states = Ranks(4).run(until)
    assert all(state == states[0] for state in states)

    def after(communicator):
        with loader_of(uris["tar"], tokenizer, communicator=communicator) as loader:
            loader.load_state_dict(states[0])
            return take(loader, 4)

    parts = Ranks(2).run(after)
    with loader_of(uris["tar"], tokenizer) as loader:
        whole = take(loader, 7)[3:]
    for step in range(4):
        assert sorted(k for part in parts for k in part[step].keys) == sorted(whole[step].keys)


def test_fewer_samples_than_ranks_gives_some_ranks_empty_batches(uris, tokenizer):
    def work(communicator):
        with loader_of(uris["tar"], tokenizer, batch_size=2, communicator=communicator) as loader:
            return [len(batch) for batch in take(loader, 3)]

    assert [sum(step) for step in zip(*Ranks(4).run(work))] == [2, 2, 2]


def test_all_ranks_stop_together_past_the_budget(tmp_path, tokenizer):
    dirty, _ = poisoned(tmp_path)

    def work(communicator):
        with loader_of(dirty, tokenizer, communicator=communicator) as loader:
            with pytest.raises(DataError, match="samples are bad"):
                take(loader, 10)
            return loader.report()["waited"]

    assert len(Ranks(2).run(work)) == 2


def test_a_dead_worker_is_an_error_and_no_hang(uris, tokenizer):
    with loader_of(uris["tar"], tokenizer, workers=2) as loader:
        next(loader)
        started = time.monotonic()
        victim = loader._decoder._workers[0].process
        victim.send_signal(signal.SIGKILL)
        with pytest.raises(RunFailed, match="data worker 0 ended .killed by signal 9"):
            take(loader, 50)
        assert time.monotonic() - started < 10


def test_close_leaves_no_process_and_no_thread(uris, tokenizer):
    import threading

    before = threading.active_count()
    loader = loader_of(uris["tar"], tokenizer, workers=2)
    pids = [worker.process.pid for worker in loader._decoder._workers]
    next(loader)
    loader.close()
    loader.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert threading.active_count() == before


_PARENT = """
import sys, time
sys.path.insert(0, sys.argv[2])
from vlm.data import DataOptions, build_loader
from vlm.runtime.preprocess import Preprocess
loader = build_loader(DataOptions(source=sys.argv[1], workers=2), preprocess=Preprocess(16), batch_size=8)
next(loader)
print(*[w.process.pid for w in loader._decoder._workers], flush=True)
time.sleep(60)
"""


def test_workers_end_with_a_killed_parent_and_ignore_interrupts(uris):
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, uris["tar"], ""], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert all(_alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_do_not_import_torch():
    code = (
        "import sys, vlm.data.worker, vlm.data.decode, vlm.data.scenes.reader; print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_workers_import_nothing_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    with build_loader(DataOptions(source="scenes:?n=8", workers=1), preprocess=PRE, batch_size=4) as loader:
        assert len(next(loader)) == 4


def test_pictures_without_text_and_text_without_pictures(uris, tokenizer):
    options = DataOptions(source=uris["tar"])
    with build_loader(options, preprocess=PRE, batch_size=4) as loader:
        assert set(next(loader)) == {"image"}
    with build_loader(options, tokenizer=tokenizer, batch_size=4) as loader:
        assert set(next(loader)) == {"text"}


def test_texts_are_found_without_decoding(uris):
    options = DataOptions(source=uris["tar"])
    assert len(list(source_texts(open_source(uris["tar"]), options))) == 40
    assert len(list(source_texts(open_source(uris["tar"]), options, limit=10))) == 10


@pytest.mark.real_data
def test_real_pictures_load_with_and_without_workers():
    if not os.path.exists("data/emoji/val-00000.tar"):
        pytest.skip("data/emoji is not here")
    options = DataOptions(source="data/emoji/val-*.tar", group_by="text", label="category")
    with (
        build_loader(options, preprocess=PRE, batch_size=128, seed=1) as one,
        build_loader(
            options.model_copy(update={"workers": 2}), preprocess=PRE, batch_size=128, seed=1
        ) as two,
    ):
        for _ in range(10):
            left, right = next(one), next(two)
            assert_equal(left, right)
        assert one.report()["bad"] == 0
        assert np.unique(left["group"].values.numpy()).size < 128
