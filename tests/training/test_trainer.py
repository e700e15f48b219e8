"""Small parts of the loop: how often, and what an interrupt is."""

import signal
import subprocess
import sys
import time

import pytest

from vlm.config.errors import RequestError
from vlm.schedules import interval_in_steps
from vlm.training import trainer
from vlm.training.trainer import Signals


@pytest.mark.parametrize(("length", "steps"), [
    (0, 0), ("0%", 0), ("0 epochs", 0), (7, 7), ("1%", 1), ("5%", 2), ("10 samples", 1), ("0.1 epochs", 1), ("1_000 samples", 31),
])  # fmt: skip
def test_a_short_time_between_checkpoints_is_not_never(length, steps):
    assert interval_in_steps(length, total=40, batch_size=32, samples=100) == steps


def test_an_epoch_of_packed_rows_is_no_length():
    with pytest.raises(RequestError, match=r"'1 epochs' needs a source of known length[\s\S]*share"):
        interval_in_steps("1 epochs", total=40, batch_size=32, samples=None)


def test_an_interrupt_that_comes_twice_at_once_is_one(monkeypatch):
    """A terminal sends it to every rank, and the process that started the ranks passes it on."""
    now = [100.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    signals = Signals()
    signals._note(signal.SIGINT, None)
    now[0] += 0.05
    signals._note(signal.SIGINT, None)
    assert signals.number == signal.SIGINT
    now[0] += 2
    with pytest.raises(KeyboardInterrupt):
        signals._note(signal.SIGINT, None)


WAITS = """
import sys, time
from datetime import timedelta
from vlm.training import communicators
communicators.TIMEOUT = timedelta(seconds=2)
with communicators.joined() as group:
    if group.rank == 0:
        time.sleep(5)
    group.barrier()
    assert [n for (n,) in group.gather_numbers([group.rank])] == [0, 1]
"""


def test_a_barrier_waits_for_a_rank_that_works_alone_for_long(tmp_path):
    """Evaluation and tokenizers are the work of rank 0; the others must not take it for lost."""
    import os

    common = os.environ | {"WORLD_SIZE": "2", "VLM_RENDEZVOUS": (tmp_path / "meet").as_uri(), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", WAITS], env=common | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    started = time.monotonic()
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    assert time.monotonic() - started >= 5
