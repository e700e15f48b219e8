"""What a contract promises, as checks that the tests of the CPU core and of the CUDA kernels share."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops.contracts import Contract, narrow, results
from tests.ops.oracle import Recorder
from vlm import ops


def passes_opcheck(contract: Contract) -> None:
    """torch's own check of every operator, on the first call that is made of it."""
    leaves = [t.requires_grad_(contract.trains) for t in narrow(contract, contract.usual)]
    with Recorder() as recorder, ops.backend("native"):
        contract.call(*leaves)
    for operator, arguments in recorder.calls.items():
        torch.library.opcheck(operator, arguments)
    assert {operator._schema.name.removeprefix("vlm::") for operator in recorder.calls} == set(contract.operators)


def compiles(contract: Contract) -> None:
    """One graph, forward and backward, gives the same."""
    inputs = narrow(contract, contract.usual)
    compiled = torch.compile(contract.call, fullgraph=True, backend="aot_eager")
    for got, expected in zip(results(contract, inputs, "native", call=compiled), results(contract, inputs, "native"), strict=True):
        torch.testing.assert_close(got, expected)


def leaves_empty_rows_alone(contract: Contract, backend: ops.Backend) -> None:
    """What may not be read changes no bit even as NaN, rows of which nothing is left hold what they must, gradients there are 0."""
    if isinstance(contract.masked, str):
        pytest.skip(contract.masked)
    case = contract.masked()
    inputs = [t.float() for t in case.inputs]
    clean, dirty = ([t if gone is None else torch.where(gone, filling, t) for t, gone in zip(inputs, case.dead)]
                    for filling in (0.0, math.nan))
    found = results(contract, clean, backend, call=case.call)
    for place, (a, b) in enumerate(zip(found, results(contract, dirty, backend, call=case.call))):
        assert torch.equal(a, b), place
    for output, empty in zip(found, case.empty):
        if empty is not None:
            where, value = empty
            assert (output[where.expand_as(output)] == value).all()
        assert not output.isnan().any()
    if contract.trains:
        gradients = found[len(case.empty):]
        assert all(g.isfinite().all() for g in gradients)
        for wheres in (case.dead, case.still):
            for gradient, gone in zip(gradients, wheres):
                assert gone is None or gradient.numel() == 0 or not gradient[gone.expand_as(gradient)].any()
