"""What every operator of the native core promises, checked for all of them: see `contracts.py`.

torch's own checks, one graph under torch.compile, the twin under torch.export and in onnxruntime, the same bits for any number
of threads and any strides, an error of at most twice that of torch, rows of which nothing is left, and sizes of 0, 1 and primes.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import warnings
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

import vlm.ops
from tests.ops import promises
from tests.ops.contracts import CONTRACTS, Contract, narrow, results, spread
from vlm import ops

every = pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS.keys())
inside_operators = {"vocabulary_rows.py", "self_check.py", "backend.py"}
"""Modules whose kernels are steps within the operators of other modules, and the one that calls settings of the core."""


def test_every_operator_has_a_contract() -> None:
    for module in pkgutil.iter_modules(vlm.ops.__path__):
        importlib.import_module(f"vlm.ops.{module.name}")
    found = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vlm::")}
    here = {name.removeprefix("vlm::") for name in found
            if any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CPU", "CompositeExplicitAutograd"))}
    here = {name for name in here if "_cuda" not in name}  # held to theirs in test_cuda_operators.py
    assert {name for name in here if not name.endswith("_backward")} == {name for c in CONTRACTS.values() for name in c.operators}
    trained = {name for c in CONTRACTS.values() if c.trains for name in c.operators}
    assert {name.removesuffix("_backward") for name in here if name.endswith("_backward")} <= trained


def test_kernels_are_called_within_torch_operators() -> None:
    """Else torch.compile breaks the graph there."""
    for path in Path(next(iter(vlm.ops.__path__))).glob("*.py"):
        source = path.read_text()
        calls = set(re.findall(r"core\(\)\.(\w+)\(", source))
        assert not calls or "torch.library.custom_op" in source or path.name in inside_operators, (path.name, calls)


@every
def test_passes_opcheck(contract: Contract) -> None:
    promises.passes_opcheck(contract)


@every
def test_compiles_as_one_graph_forward_and_backward(contract: Contract) -> None:
    promises.compiles(contract)


class Graph(torch.nn.Module):
    """Every operator one after the other, each on inputs of its own: one export for all costs half of one for each."""

    def __init__(self) -> None:
        super().__init__()
        given = [narrow(c, c.usual) for c in CONTRACTS.values()]
        self.inputs = tuple(itertools.chain.from_iterable(given))
        ends = [0, *itertools.accumulate(len(inputs) for inputs in given)]
        self.steps = [(c.call, slice(*own)) for c, own in zip(CONTRACTS.values(), itertools.pairwise(ends))]

    def forward(self, *inputs: Tensor) -> list[tuple[Tensor, ...]]:
        return [call(*inputs[own]) for call, own in self.steps]


Exported = tuple[torch.export.ExportedProgram, Graph, list[tuple[Tensor, ...]]]


@pytest.fixture(scope="module")
def exported() -> Exported:
    """The graph of all twins, and what the native core gives."""
    torch.manual_seed(0)
    graph = Graph().eval()
    with torch.no_grad():
        program = torch.export.export(graph, graph.inputs)
        with ops.backend("native"):
            return program, graph, graph(*graph.inputs)


def test_exports_the_twins(exported: Exported) -> None:
    program, graph, expected = exported
    assert "vlm" not in {str(node.target).split(".")[0] for node in program.graph.nodes}
    compare(program.module()(*graph.inputs), expected)


def test_the_twins_run_in_onnxruntime(exported: Exported, tmp_path: Path) -> None:
    program, graph, expected = exported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter uses what its own torch deprecates
        torch.onnx.export(program, f=tmp_path / "all.onnx", dynamo=True, verbose=False, optimize=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # what cannot be folded is said once a node
    session = onnxruntime.InferenceSession(tmp_path / "all.onnx", options, providers=["CPUExecutionProvider"])
    found = iter(session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), graph.inputs)}))
    compare([tuple(torch.from_numpy(next(found)) for _ in outputs) for outputs in expected], expected)
    assert next(found, None) is None


def compare(found: list[tuple[Tensor, ...]], expected: list[tuple[Tensor, ...]]) -> None:
    for name, outputs, wanted in zip(CONTRACTS, found, expected, strict=True):
        for a, b in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}")


def bits(contract: Contract, one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other):
        if contract.same_bits:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every
def test_bits_do_not_depend_on_the_thread_count(contract: Contract) -> None:
    inputs, found = narrow(contract, contract.large), []
    for threads in (1, 2, 3) if contract.same_bits else (1, 2):
        torch.set_num_threads(threads)
        found.append(results(contract, inputs, "native"))
    for other in found[1:]:
        bits(contract, found[0], other)


@every
def test_strides_do_not_change_the_bits(contract: Contract) -> None:
    inputs = narrow(contract, contract.large)
    expected = results(contract, inputs, "native")
    for turned in (False, True):
        given = [spread(t, turned) for t in inputs]
        assert not any(t.is_contiguous() for t in given if t.ndim)
        bits(contract, results(contract, given, "native"), expected)


def distance(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact| over all entries that are finite: steadier than the worst of them."""
    assert torch.equal(got.isinf(), exact.isinf())
    there = exact.isfinite()
    got, exact = got[there].double(), exact[there].double()
    return float((got - exact).norm() / exact.norm().clamp(min=1e-3))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_error_is_at_most_twice_that_of_torch_in_the_same_type(contract: Contract, dtype: torch.dtype) -> None:
    inputs = [t.to(dtype).double() for t in contract.make(*contract.large)]
    exact = results(contract, inputs, "torch", torch.float64)
    ours, theirs = (results(contract, inputs, backend, dtype) for backend in ("native", "torch"))
    left, slack = (1e-5, 1e-7) if dtype == torch.float32 else (1e-2, 1e-3)
    for place, (mine, other, wanted) in enumerate(zip(ours, theirs, exact)):
        limit = left if place in contract.loose else 2 * distance(other, wanted) + slack
        assert distance(mine, wanted) <= limit, place


@every
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_rows_of_which_nothing_is_left(contract: Contract, backend: ops.Backend) -> None:
    promises.leaves_empty_rows_alone(contract, backend)


@every
def test_sizes_of_0_and_1_and_primes(contract: Contract) -> None:
    for shape in contract.sizes:
        inputs = contract.make(*shape)
        exact, got = results(contract, inputs, "torch", torch.float64), results(contract, inputs, "native")
        for place, (a, b) in enumerate(zip(got, exact)):
            if b.numel() == 0:  # torch gives no gradient at all to what nothing was made of
                assert not a.any()
                continue
            limit = 2e-3 if place in contract.loose else 1e-5
            torch.testing.assert_close(a.double(), b.double(), rtol=limit, atol=limit, msg=lambda m, at=(shape, place): f"{at}: {m}")
