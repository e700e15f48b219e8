"""`vlm doctor`: what this installation and machine can do, tried rather than asked.

A provider that onnxruntime lists as available need not be usable (the GPU wheel lists CUDA on a machine without one),
so each is given a graph to run; each native operator is compared with its plain-torch twin.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.util
import io
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import click

from vlm.cli.output import colour, echo_json, echo_result
from vlm.config.errors import ExitCode
from vlm.config.machine import usable_cores

State = Literal["ok", "note", "broken"]

PACKAGES = (
    "numpy", "onnxruntime-gpu", "onnxruntime", "tokenizers", "pillow", "safetensors", "pydantic", "click", "fastapi",
    "uvicorn", "torch", "transformers", "peft", "onnx", "onnxscript",
)  # fmt: skip

CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "neon", "asimd")

# y = x + x for x of two floats: opset 13, IR 8. Written out so that the check needs no onnx package.
_DOUBLE = base64.b64decode(
    "CAg6NQoOCgF4CgF4EgF5IgNBZGQSAWdaDwoBeBIKCggIARIECgIIAmIPCgF5EgoKCAgBEgQKAggCQgQKABAN"
)

_LITTLE_DISK = 2 << 30
_CUDA_REMEDY = "pip install . -C cmake.define.VLM_CUDA=ON, with CUDA 12.8 or newer (docs/kernels/cuda.md)"


@dataclass(frozen=True)
class Check:
    """One finding. `note`: worth knowing, nothing is broken."""

    name: str
    state: State
    detail: str
    remedy: str | None = None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check this installation and machine; exit code 1 if something is broken.

    Works without torch: then the checks of training are left out.
    """
    facts, checks = machine(), run_checks()
    broken = [check for check in checks if check.state == "broken"]
    if as_json:
        echo_json({"ok": not broken, **facts, "checks": [asdict(check) for check in checks]})
    else:
        _print(facts, checks)
    if broken:
        ctx.exit(int(ExitCode.RUN_FAILED))


def machine() -> dict[str, Any]:
    """Versions, processor, memory and disk."""
    total, free = memory()
    return {
        "vlm": _version("vlm-forge"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cpu_flags": cpu_flags(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": total,
        "memory_free_bytes": free,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "temporary_free_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def run_checks() -> list[Check]:
    """Every check, each guarded: a check that fails to run is itself a finding."""
    checks: list[Check] = []
    for check in (check_disk, check_presets, check_onnxruntime, check_native, check_torch, check_operators):
        checks += _guarded(check)
    return checks


def _guarded(check: Callable[[], Sequence[Check]]) -> Sequence[Check]:
    try:
        return check()
    except Exception as error:
        name = check.__name__.removeprefix("check_")
        return [Check(name, "broken", f"the check itself failed: {type(error).__name__}: {error}")]


def check_disk() -> list[Check]:
    """Room for a run, here and for temporary files."""
    found = []
    for name, folder in (("disk", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        state: State = "note" if free < _LITTLE_DISK else "ok"
        found.append(Check(name, state, f"{_bytes(free)} free in {folder}"))
    return found


def check_presets() -> list[Check]:
    """Whether the packaged presets can be read."""
    from vlm.config.catalogue import list_presets

    entries = list_presets()
    problems = [entry.problem for entry in entries if entry.problem]
    if problems or not entries:
        return [
            Check("presets", "broken", problems[0] if problems else "none found", "install vlm-forge again")
        ]
    return [Check("presets", "ok", f"{len(entries)} found")]


def check_onnxruntime() -> list[Check]:
    """Both packages at once overwrite each other; every listed provider gets a graph to run."""
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name) is not None]
    if len(both) == 2:
        return [
            Check(
                "onnxruntime",
                "broken",
                "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
                "pip uninstall -y onnxruntime onnxruntime-gpu, then install vlm-forge again",
            )
        ]
    runtime: Any = importlib.import_module("onnxruntime")
    found = []
    runtime.set_default_logger_severity(4)
    try:
        for name in reversed(runtime.get_available_providers()):
            usable, why = _try_provider(runtime, name)
            short = name.removesuffix("ExecutionProvider")
            if usable:
                found.append(Check(f"onnxruntime {short}", "ok", "usable"))
            elif name == "CPUExecutionProvider":
                found.append(Check(f"onnxruntime {short}", "broken", why, "install onnxruntime again"))
            else:
                found.append(Check(f"onnxruntime {short}", "note", f"listed, but not usable here: {why}"))
    finally:
        runtime.set_default_logger_severity(2)
    return found


def _try_provider(runtime: Any, name: str) -> tuple[bool, str]:
    import numpy as np

    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its fall-back to stdout
            session = runtime.InferenceSession(_DOUBLE, options, providers=[name])
        if name not in session.get_providers():
            return False, f"it falls back to {session.get_providers()[0].removesuffix('ExecutionProvider')}"
        (answer,) = session.run(None, {"x": np.array([1.5, -2.0], np.float32)})
    except Exception as error:
        return False, str(error).strip().partition("\n")[0]
    if answer.tolist() != [3.0, -4.0]:
        return False, f"it computes {answer.tolist()} where [3.0, -4.0] is right"
    return True, ""


def check_native() -> list[Check]:
    """Whether the compiled core is there, and which CPU level it took."""
    try:
        native: Any = importlib.import_module("vlm._native")
    except ImportError as error:
        return [
            Check(
                "native core", "broken", f"not importable: {error}", "pip install --force-reinstall vlm-forge"
            )
        ]
    if not hasattr(native, "active_level"):
        return [
            Check("native core", "broken", "it has no operators: an old build", "build and install again")
        ]
    levels = ", ".join(str(level) for level in native.supported_levels())
    return [Check("native core", "ok", f"level {native.active_level()} (this machine has: {levels})")]


def check_torch() -> list[Check]:
    """torch and what it can use; without it, what that means."""
    if importlib.util.find_spec("torch") is None:
        return [
            Check(
                "torch",
                "note",
                "not installed: bundles run, training does not",
                "pip install 'vlm-forge[train]'",
            )
        ]
    torch: Any = importlib.import_module("torch")
    found = [Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    usable = torch.cuda.is_available()
    if usable:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        found.append(Check("CUDA", "ok", names))
    else:
        found.append(Check("CUDA", "note", "no usable device: everything runs on the CPU"))
    return [*found, _check_cuda_kernels(usable)]


def _check_cuda_kernels(usable: bool) -> Check:
    """Whether the compiled kernels for GPUs are there; the wheel comes without them."""
    try:
        module: Any = importlib.import_module("vlm._native_cuda")
    except ModuleNotFoundError as error:
        if error.name != "vlm._native_cuda":
            return Check("CUDA kernels", "broken", f"not importable: {error}", _CUDA_REMEDY)
        on = "tensors on the device take plain torch" if usable else "nothing here would use them"
        return Check("CUDA kernels", "note", f"not built: {on}", _CUDA_REMEDY if usable else None)
    except ImportError as error:
        return Check("CUDA kernels", "broken", f"not importable: {error}", _CUDA_REMEDY)
    if not usable:
        return Check("CUDA kernels", "note", "built, but there is no usable device")
    return Check("CUDA kernels", "ok", f"blocks may ask for {_bytes(module.device_shared_bytes(0))} of shared memory")


def check_operators() -> list[Check]:
    """Each native operator against its plain-torch twin, at each CPU level of this machine."""
    if importlib.util.find_spec("torch") is None:
        return []
    ops: Any = importlib.import_module("vlm.ops")
    if not hasattr(ops, "self_test"):
        return [Check("operators", "broken", "this build has no self-test", "install vlm-forge again")]
    found = []
    for result in ops.self_test():
        state: State = "ok" if result.ok else "broken"
        remedy = None if result.ok else "report it with the output of `vlm doctor --json`"
        found.append(
            Check(
                f"{result.operator} at {result.level}", state, f"largest error {result.max_error:.1e}", remedy
            )
        )
    return found or [Check("operators", "note", "no native operator to test: everything runs in plain torch")]


def memory() -> tuple[int | None, int | None]:
    """(total, available) bytes, None where the system does not say; a container's limit counts as the total."""
    values: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0]) * 1024
    total, free = values.get("MemTotal"), values.get("MemAvailable")
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if total is None or limit < total:
            total = limit
            free = min(free, limit - used) if free is not None else limit - used
    return total, free


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instruction sets that matter to the native core."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                present = set(line.split())
                return [flag for flag in CPU_FLAGS if flag in present]
    return []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


_MARKS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "note": ("note", "yellow"),
    "broken": ("BROKEN", "red"),
}


def _print(facts: dict[str, Any], checks: Sequence[Check]) -> None:
    import sys

    echo_result(f"vlm {facts['vlm']}, Python {facts['python']}, {facts['platform']}")
    echo_result(f"{facts['processor']} ({' '.join(facts['cpu_flags'])})")
    echo_result(
        f"{facts['usable_cores']} of {facts['cores']} cores usable; memory {_bytes(facts['memory_bytes'])}, "
        f"{_bytes(facts['memory_free_bytes'])} free"
    )
    echo_result("  ".join(f"{name} {found}" for name, found in facts["versions"].items()))
    echo_result()
    coloured = colour(sys.stdout)
    for check in checks:
        word, tint = _MARKS[check.state]
        mark = word.ljust(6)
        echo_result(f"{click.style(mark, fg=tint) if coloured else mark}  {check.name}: {check.detail}")
        if check.remedy and check.state != "ok":
            echo_result(f"        {check.remedy}")
