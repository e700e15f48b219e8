"""`vlm doctor` tries things; it finds what is broken, and works without torch."""

import json
import subprocess
import sys
import types

import pytest

from vlm.cli import doctor
from vlm.cli.doctor import Check
from vlm.cli.main import main


def test_the_report_has_facts_and_checks(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "run_checks", lambda: [Check("a", "ok", "fine"), Check("b", "note", "so so", "try c")])
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["usable_cores"] >= 1
    assert report["memory_bytes"] >= report["memory_free_bytes"] > 0
    assert report["versions"]["numpy"]
    assert report["checks"][1] == {"name": "b", "state": "note", "detail": "so so", "remedy": "try c"}


def test_something_broken_exits_with_1_and_names_the_remedy(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "run_checks", lambda: [Check("a", "broken", "gone", "bring it back")])
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "BROKEN  a: gone" in text
    assert "bring it back" in text


def test_a_check_that_fails_to_run_is_a_finding(monkeypatch):
    def check_trial():
        raise OSError("no way")

    (found,) = doctor._guarded(check_trial)
    assert (found.name, found.state) == ("trial", "broken")
    assert "no way" in found.detail


def test_every_provider_that_is_listed_is_tried(capfd):
    runtime = pytest.importorskip("onnxruntime")
    found = {check.name: check for check in doctor.check_onnxruntime()}
    assert found["onnxruntime CPU"].state == "ok"
    assert len(found) == len(runtime.get_available_providers())
    assert all(check.state in ("ok", "note") for check in found.values())
    assert capfd.readouterr() == ("", "")


def test_a_provider_that_computes_wrongly_is_not_usable():
    class Session:
        def __init__(self, *arguments, providers):
            self.get_providers = lambda: providers

        def run(self, names, feeds):
            return [feeds["x"] * 3]

    class Runtime:
        InferenceSession = Session

        @staticmethod
        def SessionOptions():
            return type("Options", (), {})()

    usable, why = doctor._try_provider(Runtime, "OddExecutionProvider")
    assert not usable
    assert "[4.5, -6.0] where [3.0, -4.0] is right" in why


def test_two_onnxruntimes_at_once_are_broken(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    (found,) = doctor.check_onnxruntime()
    assert found.state == "broken"
    assert "pip uninstall" in found.remedy


def test_each_operator_is_reported_and_a_wrong_one_is_broken(monkeypatch):
    ops = pytest.importorskip("vlm.ops")
    results = [
        ops.OperatorCheck("attention", "avx2", True, 1e-6),
        ops.OperatorCheck("attention", "portable", False, 0.5),
    ]
    monkeypatch.setattr(ops, "self_test", lambda: results)
    good, bad = doctor.check_operators()
    assert (good.name, good.state) == ("attention at avx2", "ok")
    assert (bad.name, bad.state, bad.detail) == ("attention at portable", "broken", "largest error 5.0e-01")


def test_every_operator_of_this_build_passes_at_every_level_of_this_machine():
    pytest.importorskip("torch")
    native = pytest.importorskip("vlm._native")
    found = doctor.check_operators()
    assert {check.state for check in found} == {"ok"}
    assert {check.name.rpartition(" at ")[2] for check in found} == set(native.supported_levels())


def test_the_native_core_names_its_level():
    pytest.importorskip("vlm._native")
    (found,) = doctor.check_native()
    assert found.state == "ok"
    assert "level " in found.detail


def test_it_says_whether_the_cuda_kernels_are_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "vlm._native_cuda", None)  # as where they were not built
    absent, wanted = doctor._check_cuda_kernels(usable=False), doctor._check_cuda_kernels(usable=True)
    assert (absent.state, absent.remedy) == ("note", None)
    assert (wanted.state, "VLM_CUDA=ON" in wanted.remedy) == ("note", True)
    assert "not built" in wanted.detail
    built = types.SimpleNamespace(device_shared_bytes=lambda device: 99 << 10)
    monkeypatch.setitem(sys.modules, "vlm._native_cuda", built)
    assert doctor._check_cuda_kernels(usable=False).detail == "built, but there is no usable device"
    assert doctor._check_cuda_kernels(usable=True).state == "ok"


def test_without_torch_the_runtime_is_still_checked():
    code = (
        "import sys, importlib.abc\n"
        "class NoTorch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.partition('.')[0] == 'torch': raise ModuleNotFoundError(name, name='torch')\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from vlm.cli.main import main; sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    report = json.loads(done.stdout)
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states["torch"] == "note"
    assert states["onnxruntime CPU"] == "ok"
    assert done.returncode == (0 if report["ok"] else 1)
    assert "broken" not in states.values()


