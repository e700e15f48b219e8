"""Settings of the whole suite."""

import pytest

# Questions shared by several test files say what differs, as the tests themselves do.
pytest.register_assert_rewrite("tests.models.decoder_questions")


def pytest_addoption(parser):
    parser.addoption("--cuda-emulation", help="for tests/ops/test_cuda_operators.py: the module _native_cuda_emulated, built if not given; or "
                     "'none' for the installed kernels on a GPU")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors gain nothing from threads, and spinning threads of several processes lose much."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
