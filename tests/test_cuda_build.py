"""The CUDA sources compile for sm_80, sm_90 and sm_100, without spills and within the registers that the docs state.

The bounds are those of the table in docs/kernels/cuda.md; a kernel that is missing there fails. Takes 10 to 40 s of nvcc for each
source, hence `long`; skipped without nvcc.
`python tests/test_cuda_build.py` prints the table as measured.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/kernels/cuda.md"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SOURCES = sorted((ROOT / "cpp/cuda").glob("*.cu"))


class Usage(NamedTuple):
    """What ptxas says of one kernel for one architecture."""

    kernel: str
    architecture: str
    registers: int
    spilled: int


def usage(report: str) -> list[Usage]:
    """The kernels of a `ptxas -v` report; bytes of spilled stores and loads together."""
    found = []
    for part in re.split(r"Compiling entry function ", report)[1:]:
        head = re.match(r"'(\S+)' for '(\w+)'", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if not (head and spills and registers):
            raise ValueError(f"not a report of ptxas: {part}")
        found.append(Usage(kernel_name(head[1]), head[2], int(registers[1]), int(spills[1]) + int(spills[2])))
    return found


def kernel_name(symbol: str) -> str:
    """`attention_keys_kernel<2>` of its mangled symbol: the last length-prefixed name and its integer arguments."""
    at = symbol.index("N3vlm4cuda") + len("N3vlm4cuda")
    length = re.match(r"\d+", symbol[at:])
    assert length, symbol
    start = at + len(length[0])
    name, rest = symbol[start:start + int(length[0])], symbol[start + int(length[0]):]
    if not rest.startswith("I"):
        return name
    arguments = re.findall(r"L(?:[ib]|NS0?_\d+\w+?E)(\d+)E", rest.split("EEv")[0] + "E")
    return f"{name}<{', '.join(arguments)}>"


def compile_all(source: Path) -> str:
    """The report of ptxas on one source, for all architectures."""
    with tempfile.TemporaryDirectory() as folder:
        targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
        done = subprocess.run(
            ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC", *targets, f"-I{ROOT / 'cpp'}",
             f"-I{ROOT / 'cpp/include'}", "-c", str(source), "-o", f"{folder}/out.o"],
            capture_output=True, text=True, check=False,
        )
    assert done.returncode == 0, done.stderr
    return done.stderr


def stated() -> dict[str, int]:
    """kernel -> bound on registers, from the table of the docs."""
    rows = re.findall(r"^\| `(\w+_kernel(?:<[\d, ]+>)?)` \| (\d+) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    return {kernel: int(bound) for kernel, bound in rows}


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_spills_or_takes_more_registers_than_stated(source: Path) -> None:
    found, bounds = usage(compile_all(source)), stated()
    assert {u.architecture for u in found} == set(ARCHITECTURES)
    assert [u for u in found if u.spilled] == []
    assert [u for u in found if u.registers > bounds.get(u.kernel, -1)] == []


@pytest.mark.parametrize(("symbol", "name"), [
    ("_ZN3vlm4cuda17token_rank_kernelENS0_9MatchPlanE", "token_rank_kernel"),
    ("_ZN3vlm4cuda20pair_gradient_kernelILNS_8PairLossE1ELi8EEEvNS0_12PairGradientE", "pair_gradient_kernel<1, 8>"),
    ("_ZN3vlm4cuda26vocabulary_gradient_kernelILb0ELi4EEEvNS0_18VocabularyBackwardE", "vocabulary_gradient_kernel<0, 4>"),
])
def test_kernels_are_named_with_their_arguments(symbol: str, name: str) -> None:
    assert kernel_name(symbol) == name


@pytest.mark.parametrize("planted", ["spill", "registers"])
def test_the_gate_sees_what_it_looks_for(planted: str) -> None:
    text = ("ptxas info    : Compiling entry function '_ZN3vlm4cuda21attention_keys_kernelILi2EEEvNS0_17AttentionBackwardEPKf' "
            "for 'sm_80'\n    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\nptxas info    : Used 256 registers\n")
    (found,) = usage(text)
    assert found == Usage("attention_keys_kernel<2>", "sm_80", 256, 12)
    assert (found.spilled > 0) if planted == "spill" else (found.registers > stated()[found.kernel])


if __name__ == "__main__":
    table: dict[str, dict[str, int]] = {}
    for path in SOURCES:
        for entry in usage(compile_all(path)):
            spilled = f" (SPILLS {entry.spilled})" if entry.spilled else ""
            table.setdefault(entry.kernel, {})[entry.architecture] = f"{entry.registers}{spilled}"  # type: ignore[assignment]
    bounds = stated() if PAGE.exists() else {}
    for kernel, row in sorted(table.items()):
        sys.stdout.write(f"| `{kernel}` | {bounds.get(kernel, 255)} | " + " | ".join(str(row[a]) for a in ARCHITECTURES) + " |\n")
