"""Fixtures of the operator tests: one thread unless a test says otherwise, and every instruction-set level."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vlm.ops.backend import core


@pytest.fixture(autouse=True)
def _two_threads_and_a_seed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level in turn; skipped where this machine lacks it."""
    native = core()
    if request.param not in native.supported_levels():
        pytest.skip(f"{request.param} does not run here")
    before = native.active_level()
    native.set_level(request.param)
    yield request.param
    native.set_level(before)
