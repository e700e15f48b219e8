"""The operators on CUDA kernels, run for real on the CPU: the module `vlm._native_cuda` built over the emulation takes the place
of the compiled one, and tensors of the CPU go the ways of those of a GPU. Addresses, strides, types, saved tensors, gradients.

Building the module takes about a minute, hence `long`; `--cuda-emulation PATH` names one that is there (ctest does).
`--cuda-emulation none` takes the installed kernels and the GPU instead, which nobody has done yet.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import contracts, promises
from tests.ops.contracts import CONTRACTS, Contract, Masked, narrow, results, spread
from tests.ops.oracle import Recorder, error, run
from vlm import ops
from vlm.ops import masks
from vlm.ops.cuda_core import cuda_kernels, installed_cuda_kernels

ROOT = Path(__file__).parents[2]
NAME = "_native_cuda_emulated"

pytestmark = pytest.mark.long


def built(folder: Path) -> Path:
    """The module, built by CMake as the tests of the kernels are."""
    pybind11 = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True).stdout.strip()
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DVLM_BUILD_PYTHON=OFF", "-DVLM_CUDA=OFF", "-DVLM_CUDA_EMULATION_MODULE=ON",
               f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
    for command in (["cmake", "-S", str(ROOT), "-B", str(folder), *options],
                    ["cmake", "--build", str(folder), "--target", NAME]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.rglob(f"{NAME}*{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    return path


@pytest.fixture(scope="module")
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    given = request.config.getoption("--cuda-emulation")
    if given == "none":
        kernels = installed_cuda_kernels()
        assert kernels, "vlm._native_cuda is not built"
        return kernels.module
    path = Path(given or built(tmp_path_factory.mktemp("emulation")))
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec
    assert spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(autouse=True)
def _on_the_kernels(module: Any) -> Iterator[None]:
    with cuda_kernels(module), torch.device(module.device_type):
        yield


# ---- what all operators promise, see contracts.py; calls without what the kernels leave to the twin


def attend_program(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
    return ops.attention(q, k, v, mask=contracts.program(q, k), bias=ops.Alibi(slopes), return_lse=True)


def program_masked() -> Masked:
    case = contracts.program_masked()
    mask = masks.MaskProgram(masks.Causal(), masks.Segments(torch.tensor([[1, 1, 1, 1, 9, 9]]), torch.tensor([[1, 1, 1, 1, 2, 2]])),
                             masks.KeyPadding(torch.tensor([4])))
    return replace(case, call=lambda q, k, v: ops.attention(q, k, v, mask=mask, return_lse=True))


def softmax_pairs(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    return ops.contrastive_softmax(x, y, s, groups_x=torch.arange(len(x)) // 2, groups_y=torch.arange(len(y)) // 2)


def sigmoid_pairs(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return ops.contrastive_sigmoid(x, y, s, b, row_offset=1)


def column_sums(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    options: dict[str, Any] = {"causal": True, "key_mask": contracts.lengths(k.shape[0], k.shape[2]), "temperature": 0.7,
                               "mask": masks.Window(40), "bias": ops.Alibi(torch.linspace(0.01, 0.2, q.shape[1]))}
    lse = ops.attention_lse(q, k, **options)
    return lse, ops.attention_column_sums(q, k, weights=torch.arange(q.shape[2]) % 3 / 2, **options)


def columns_masked() -> Masked:
    case = contracts.statistics_masked()
    mask = torch.tensor([[True] * 4, [False] * 4])
    rows = torch.zeros(2, 1, 6, dtype=torch.bool)
    rows[:, :, :2] = rows[1] = True

    def call(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"causal": True, "key_mask": mask}
        return ops.attention_lse(q, k, **options), ops.attention_column_sums(q, k, **options)

    return replace(case, call=call, empty=[(rows, -math.inf), (~mask[:, None], 0.0)])


def decay(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    return ops.linear_decay(q, k, v, rate, state=state)


def small(contract: Contract, large: tuple[int, ...], **changes: Any) -> Contract:
    return replace(contract, large=large, **changes)


KERNELS: dict[str, Contract] = {
    "attention": small(CONTRACTS["attention"], (2, 4, 2, 70, 90, 24, 17)),
    "attention, wide": small(CONTRACTS["attention"], (1, 2, 1, 20, 40, 200, 136), sizes=()),
    "attention, program": small(CONTRACTS["attention, program"], (2, 4, 2, 70, 90, 24, 17), call=attend_program,
                                make=lambda *shape: contracts.heads_and_slopes(*shape)[:4], masked=program_masked),
    "attention, packed": small(CONTRACTS["attention, packed"], (101, 4, 2, 24)),
    "statistics": small(CONTRACTS["statistics"], (2, 4, 2, 70, 90, 24), call=column_sums, masked=columns_masked,
                        operators=("attention_row_statistics", "attention_column_sums")),
    "tokens": small(CONTRACTS["tokens"], (2, 91, 40)),
    "contrastive_softmax": small(CONTRACTS["contrastive_softmax"], (90, 70, 40), operators=("pair_loss_cuda",), call=softmax_pairs),
    "contrastive_sigmoid": small(CONTRACTS["contrastive_sigmoid"], (90, 70, 40), operators=("pair_loss_cuda",), call=sigmoid_pairs,
                                 masked="every pair of rows counts"),
    "linear_cross_entropy": small(CONTRACTS["linear_cross_entropy"], (70, 40, 90), operators=("linear_cross_entropy_cuda",)),
    "linear_decay": small(CONTRACTS["linear_decay"], (2, 3, 150, 24, 17), call=decay, masked="positions always exist"),
}
every = pytest.mark.parametrize("contract", KERNELS.values(), ids=KERNELS.keys())


def near(contract: Contract, got: list[Tensor], inputs: list[Tensor], what: str) -> None:
    exact = results(contract, inputs, "torch", torch.float64)
    for place, (a, b) in enumerate(zip(got, exact, strict=True)):
        if b.numel() == 0:  # torch gives no gradient at all to what nothing was made of
            assert not a.any()
            continue
        found = error(a, b)
        assert found <= (1e-3 if place in contract.loose else 2e-5), f"{what}, result {place}: error {found:.1e}"


@every
def test_values_and_gradients_are_those_of_the_float64_twin(contract: Contract) -> None:
    """And it is the kernels that compute them, through the operators named in the contract."""
    for shape in (contract.large, *contract.sizes):
        inputs = contract.make(*shape)
        with Recorder() as recorder:
            got = results(contract, inputs, "native")
        assert {operator._schema.name.removeprefix("vlm::") for operator in recorder.calls} == set(contract.operators)
        near(contract, got, [t.float().double() for t in inputs], str(shape))


@every
def test_strides_do_not_change_the_bits(contract: Contract) -> None:
    inputs = narrow(contract, contract.large)
    expected = results(contract, inputs, "native")
    for turned in (False, True):
        for a, b in zip(results(contract, [spread(t, turned) for t in inputs], "native"), expected, strict=True):
            assert torch.equal(a, b)


@every
def test_rows_of_which_nothing_is_left(contract: Contract) -> None:
    promises.leaves_empty_rows_alone(contract, "native")


@every
def test_passes_opcheck(contract: Contract) -> None:
    promises.passes_opcheck(contract)


@every
def test_compiles_as_one_graph_forward_and_backward(contract: Contract) -> None:
    promises.compiles(contract)


@every
def test_an_exported_graph_holds_the_twin(contract: Contract) -> None:
    class Whole(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return contract.call(*inputs)

    program = torch.export.export(Whole(), tuple(narrow(contract, contract.usual)))
    assert "vlm" not in {str(node.target).split(".")[0] for node in program.graph.nodes}


# ---- types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["attention", "attention, program", "attention, wide", "tokens", "linear_decay", "contrastive_softmax"])
def test_half_types_keep_their_type_and_the_error_of_their_rounding(name: str, dtype: torch.dtype) -> None:
    contract = KERNELS[name]
    inputs = [t.to(dtype).double() for t in contract.make(*contract.large)]
    exact = results(contract, inputs, "torch", torch.float64)
    for place, (a, b) in enumerate(zip(results(contract, inputs, "native", dtype), exact, strict=True)):
        assert error(a, b) <= (0.03 if dtype == torch.bfloat16 else 4e-3), place
    outputs = contract.call(*(t.to(dtype) for t in inputs))
    kept = {"contrastive_softmax": torch.float32}.get(name, dtype)
    assert outputs[0].dtype == kept


def heads(n: int, m: int, d: int, v: int, dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) for t in contracts.heads(1, 2, 1, n, m, d, v)[:3]]


class Spy:
    """A module that writes down which of its functions are called, and with what."""

    def __init__(self, module: Any) -> None:
        self.module, self.calls = module, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.module, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append((name, named))
            return found(*arguments, **named)

        return call

    def halves(self) -> dict[str, bool]:
        """By attention kernel: whether it ran on bfloat16."""
        return {name: named.get("extras", {}).get("half", False)
                for name, named in self.calls if name in ("attention_forward", "attention_backward")}


@pytest.mark.parametrize(("width", "bias_trains", "expected"), [
    (64, False, (True, True)),  # both on tensor cores
    (64, True, (True, False)),  # the gradient of a bias is made in float32
    (136, False, (False, False)),  # wide heads are float32
], ids=["plain", "bias", "wide"])
def test_bfloat16_runs_on_tensor_cores_where_it_can(module: Any, width: int, bias_trains: bool, expected: tuple[bool, bool]) -> None:
    spy = Spy(module)
    q, k, v = (t.requires_grad_() for t in heads(40, 50, width, 20, torch.bfloat16))
    bias = torch.randn(1, 2, 1, 50).requires_grad_(bias_trains)
    with cuda_kernels(spy):
        out = ops.attention(q, k, v, bias=bias)
        out.float().square().sum().backward()
    assert spy.halves() == dict(zip(("attention_forward", "attention_backward"), expected))
    assert out.dtype == q.grad.dtype == torch.bfloat16  # type: ignore[union-attr]

    wide = [t.detach().double().requires_grad_() for t in (q, k, v, bias)]
    with ops.backend("torch"):
        ops.attention(*wide[:3], bias=wide[3]).square().sum().backward()
    for got, exact in zip((q, k, v, bias), wide):
        assert got.grad is None or error(got.grad, exact.grad) <= 0.03  # type: ignore[arg-type]


def test_rows_of_bfloat16_that_start_anywhere_are_laid_out_first() -> None:
    for gap in (0, 1, 3, 8):
        q, k, v = (torch.cat([t, torch.full((*t.shape[:3], gap), math.nan)], 3).bfloat16()[..., :t.shape[3]]
                   for t in heads(20, 30, 20, 12, torch.float32))
        with ops.backend("torch"):
            exact = ops.attention(q.double(), k.double(), v.double())
        assert error(ops.attention(q, k, v), exact) <= 0.02


# ---- masks and biases: every kind reaches the kernels


def programs() -> dict[str, Any]:
    return {
        "causal": masks.Causal, "window": lambda: masks.Window(9), "both sides": lambda: masks.Window(9, causal=False),
        "symmetric": lambda: masks.SymmetricWindow(12), "lambda": lambda: masks.Lambda(12, 2),
        "blocks causal": lambda: masks.BlockCausal(8), "prefix": lambda: masks.Prefix(torch.tensor([7])),
        "dense": lambda: masks.Dense(torch.rand(1, 2, 40, 50) < 0.5), "padding": lambda: masks.KeyPadding(torch.tensor([33])),
        "rows": lambda: masks.Rows(torch.stack([torch.arange(40), torch.arange(40) + 9], 1)[None]),
        "spans": lambda: masks.Spans(torch.arange(40)[None] // 9 % 3 - 1, torch.arange(50)[None] // 9 % 3 - 1),
        "tags": lambda: masks.TileTags(torch.arange(40)[None] % 3, torch.arange(50)[None] % 3),
        "listed blocks": lambda: masks.BlockList(torch.tensor([[[[0, 2], [1, 3], [3, 0]]]]), torch.tensor([[[1, 2, 2]]]), 16, 13),
        "segments": lambda: masks.Segments(torch.arange(40)[None] // 9, torch.arange(50)[None] // 9),
        "global": lambda: masks.MaskProgram(masks.Window(9), masks.GlobalTokens(torch.arange(40)[None] % 11 == 3,
                                                                               torch.arange(50)[None] % 13 == 2)),
    }


@pytest.mark.parametrize("name", programs())
def test_mask_programs(name: str) -> None:
    mask = programs()[name]()
    inputs = [t.double() for t in heads(40, 50, 16, 8, torch.float32)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return ops.attention(q, k, v, mask=mask, return_lse=True)

    for a, b in zip(run(call, inputs, "native", torch.float32), run(call, inputs, "torch", torch.float64), strict=True):
        assert error(a, b) <= 2e-5


@pytest.mark.parametrize("kind", ["alibi", "buckets", "grid", "keys", "one number"])
def test_biases_and_their_gradients(kind: str) -> None:
    q, k, v = (t.double() for t in heads(48, 48, 16, 8, torch.float32))
    table = {"alibi": torch.rand(2), "buckets": torch.randn(32, 2), "grid": torch.randn(11 * 15, 2), "keys": torch.randn(1, 48),
             "one number": torch.randn(1, 2, 48, 1)}[kind].double()
    make: Any = {"alibi": ops.Alibi, "buckets": ops.BucketBias, "grid": lambda t: ops.GridBias(t, 6, 8), "keys": ops.KeyBias,
                 "one number": lambda t: t}[kind]

    def call(*t: Tensor) -> tuple[Tensor, ...]:
        return ops.attention(*t[:3], bias=make(t[3]), return_lse=True)

    inputs = [q, k, v, table]
    for a, b in zip(run(call, inputs, "native", torch.float32), run(call, inputs, "torch", torch.float64), strict=True):
        assert error(a, b) <= 3e-5


@pytest.mark.parametrize("name", ["attention_pagerank", "attention_focus", "attention_columns"])
def test_statistics_made_of_column_sums(name: str) -> None:
    q, k = narrow(KERNELS["statistics"], (2, 4, 2, 30, 30, 8))
    own: dict[str, dict[str, Any]] = {"attention_pagerank": {"damping": 0.1}, "attention_focus": {"leading": 2},
                                      "attention_columns": {"columns": torch.tensor([3, 7])}}

    def found(backend: ops.Backend, dtype: torch.dtype) -> Tensor:
        with ops.backend(backend):
            result = getattr(ops, name)(q.to(dtype), k.to(dtype), temperature=0.5, mask=masks.Causal(), **own[name])
        return result.score if name == "attention_focus" else result

    assert error(found("native", torch.float32), found("torch", torch.float64)) <= 2e-5


@pytest.mark.parametrize("gone", [False, True], ids=["all", "some ignored"])
def test_cross_entropy_with_weights_of_tokens_and_allowed_ids(gone: bool) -> None:
    labels, allowed = torch.arange(31) % 13, torch.arange(20) < 13
    if gone:
        labels[::3] = -100
    weights = torch.rand(31)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = ops.linear_cross_entropy(hidden, weight, labels, bias=bias, smoothing=0.1, z_loss=1e-3, allowed=allowed,
                                         token_weights=weights)
        return found.loss, found.log_p.detach(), found.lse.detach()

    inputs = contracts.vocabulary(31, 7, 20)
    for a, b in zip(run(call, inputs, "native", torch.float32), run(call, inputs, "torch", torch.float64), strict=True):
        assert error(a, b) <= 2e-5


# ---- what the kernels leave to the twin


def refused() -> dict[str, Any]:
    q, k, v = heads(6, 7, 8, 8, torch.float32)
    wide = heads(6, 7, 264, 8, torch.float32)
    x, y, s = narrow(CONTRACTS["contrastive_softmax"], (6, 5, 8))
    hidden, weight, _ = narrow(CONTRACTS["linear_cross_entropy"], (6, 5, 9))
    rows = narrow(CONTRACTS["linear_decay"], (1, 2, 9, 4, 6))
    nine = masks.MaskProgram(*(masks.Window(5 + i) for i in range(9)))
    return {
        "softcap": lambda: ops.attention(q, k, v, softcap=3.0), "dropout": lambda: ops.attention(q, k, v, dropout=(0.3, 7)),
        "cosine": lambda: ops.attention(q, k, v, score="cosine", temperature=torch.ones(2)),
        "widths over 256": lambda: ops.attention(*wide), "nine atoms": lambda: ops.attention(q, k, v, mask=nine),
        "float64": lambda: ops.attention(q.double(), k.double(), v.double()),
        "statistics with a soft cap": lambda: ops.attention_column_sums(q, k, softcap=2.0),
        "smoothed targets": lambda: ops.contrastive_softmax(x, y, s, smoothing=0.1)[0],
        "weighted negatives": lambda: ops.contrastive_sigmoid(x, y, s, s, negative_weight=0.5)[0],
        "half products": lambda: ops.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), torch.arange(6)).loss,
        "padding in linear attention": lambda: ops.linear_decay(*rows[:4], key_mask=torch.ones(1, 9, dtype=torch.bool))[0],
        "merging": lambda: ops.merge_attention((q, q[..., 0]), (q, q[..., 1]))[0],
    }


@pytest.mark.parametrize("name", refused())
def test_what_the_kernels_do_not_take(name: str, module: Any) -> None:
    """Falls back to the twin by itself, and raises under `backend("native")`."""
    call, spy = refused()[name], Spy(module)
    with cuda_kernels(spy):
        with ops.backend("torch"):
            expected = call()
        torch.testing.assert_close(call(), expected)
        with pytest.raises(ValueError, match="CUDA kernels do not take"), ops.backend("native"):
            call()
    assert not [called for called, _ in spy.calls if "shared_bytes" not in called]


def test_a_device_of_little_shared_memory_takes_the_twin(module: Any) -> None:
    class Small(Spy):
        def device_shared_bytes(self, device: int) -> int:
            return 99 * 1024

    with cuda_kernels(Small(module)):
        narrow_heads, wide_heads = heads(6, 7, 64, 8, torch.float32), heads(6, 7, 128, 8, torch.float32)
        with ops.backend("native"):
            ops.attention(*narrow_heads)
            with pytest.raises(ValueError, match="CUDA kernels do not take"):
                ops.attention(*wide_heads)


def test_bad_sizes_are_refused_by_the_module(module: Any) -> None:
    with pytest.raises(ValueError, match="at most 256"):
        module.attention_shared_bytes((1, 1, 1, 1, 1, 300, 64))
    with pytest.raises(ValueError, match="at most 128"):
        module.linear_scan_shared_bytes(129)
    with pytest.raises(ValueError, match="negative"):
        module.token_match_workspace((1, 1, -3, 4))
