"""Settings of the whole suite."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors gain nothing from threads, and spinning threads of several processes lose much."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
