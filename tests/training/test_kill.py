"""kill -9 at any moment, then --resume: the same bits as an uninterrupted run. Ranks and signals, through the command."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.training.test_resume import TOY, digest

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*arguments):
    return [sys.executable, "-m", "vlm", *map(str, arguments)]


def run(*arguments, check=True):
    done = subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert not check or done.returncode == 0, done.stderr
    return done


def jsonl(folder):
    """A JSON-lines set of 100 little pictures."""
    folder.mkdir()
    draw = random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for i in range(100):
            color = tuple(draw.randrange(256) for _ in range(3))
            Image.new("RGB", (20, 16), color).save(folder / f"{i}.png")
            file.write(json.dumps({"image": f"{i}.png", "text": f"colour {color[0] // 64} {color[1] // 64} {color[2] // 64}"}) + "\n")
    return str(folder / "data.jsonl")


def tar(folder):
    """The same as two tar shards."""
    import io
    import tarfile

    source = Path(jsonl(folder)).parent
    lines = [json.loads(line) for line in (source / "data.jsonl").read_text().splitlines()]
    for shard in range(2):
        with tarfile.open(folder / f"shard-{shard:05d}.tar", "w") as archive:
            for i, line in enumerate(lines[shard * 50 : shard * 50 + 50]):
                for name, data in ((f"{i:06d}.png", (source / line["image"]).read_bytes()), (f"{i:06d}.txt", line["text"].encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return str(folder / "shard-{00000..00001}.tar")


FORMATS = {"scenes": lambda folder: "scenes:?n=100&size=16", "jsonl": jsonl, "tar": tar}


def settings(uri, workers, *more):
    return [TOY, "--data", uri, f"data.workers={workers}", "train.steps=30", "train.checkpoint_every=4", "train.keep=2",
            "scale.threads=1", *more]  # fmt: skip


def wait_for(path, process, deadline=60):
    end = time.monotonic() + deadline
    while not path.exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)


def killed_run(output, arguments, moments):
    """Start, kill -9 at each moment (seconds after the first metrics, or "save": while a checkpoint is being written),
    resume, until it ends."""
    first = True
    for moment in [*moments, None]:
        words = ["pretrain", *arguments, "--output", output] if first else ["pretrain", "--resume", output]
        process = subprocess.Popen(command(*words, "--no-report"), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        first = False
        if moment is None:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
            return
        wait_for(output / "metrics.jsonl", process)
        if moment == "save":
            folder, end = output / "checkpoints", time.monotonic() + 30
            while time.monotonic() < end and process.poll() is None and not (folder.is_dir() and any(folder.glob(".*.partial"))):
                pass
        else:
            time.sleep(moment)
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", list(FORMATS))
def test_kill_and_resume_ends_with_the_same_bits(tmp_path, kind):
    draw = random.Random(kind)
    workers, moment = {"scenes": (0, "save"), "jsonl": (2, draw.uniform(0, 0.6)), "tar": (2, "save")}[kind]
    arguments = settings(FORMATS[kind](tmp_path / "data"), workers, "train.accumulate=2")
    run("pretrain", *arguments, "--output", tmp_path / "whole", "--no-report")
    killed_run(tmp_path / "killed", arguments, [moment])
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", list(FORMATS))
def test_five_kills_for_each_format_and_number_of_workers(tmp_path, kind, workers):
    draw = random.Random(f"{kind}{workers}")
    arguments = settings(FORMATS[kind](tmp_path / "data"), workers, "train.accumulate=2")
    run("pretrain", *arguments, "--output", tmp_path / "whole", "--no-report")
    killed_run(tmp_path / "killed", arguments, [draw.uniform(0, 0.5), "save", *(draw.uniform(0, 0.8) for _ in range(3))])
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_two_processes_follow_one(tmp_path):
    arguments = [TOY, "train.steps=20", "scale.threads=1"]
    run("pretrain", *arguments, "--output", tmp_path / "one", "--no-report")
    run("pretrain", *arguments, "-n", 2, "--output", tmp_path / "two", "--no-report")
    one, two = (digest(tmp_path / name)[1] for name in ("one", "two"))
    assert len(one) == len(two) == 20
    for a, b in zip(one, two, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-5)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_exactly(tmp_path, number, code):
    arguments = [TOY, "train.steps=60", "train.checkpoint_every=0", "scale.threads=1"]
    process = subprocess.Popen(
        command("pretrain", *arguments, "--output", tmp_path / "run", "--no-report"), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").stat().st_size:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "--resume" in errors
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*/COMPLETE"))) == 1
    run("pretrain", "--resume", tmp_path / "run", "--no-report")
    run("pretrain", *arguments, "--output", tmp_path / "whole", "--no-report")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_a_dead_rank_ends_the_job_with_its_name(tmp_path):
    arguments = [TOY, "train.steps=100000", "scale.threads=1", "-n", "2", "--no-report"]
    train = command("pretrain", *arguments, "--output", tmp_path / "run")
    process = subprocess.Popen(train, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "rank" in errors
