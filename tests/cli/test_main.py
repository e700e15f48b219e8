"""The contract of the command line: exit codes, streams, suggestions, start-up."""

import json
import os
import subprocess
import sys
import time

import click
import pytest

from vlm.cli import main as cli_main
from vlm.cli import output
from vlm.config.errors import (
    CheckpointError,
    DataError,
    ExitCode,
    GateFailed,
    OutOfMemory,
    PresetError,
    RequestError,
    RunFailed,
)

HEAVY = ("torch", "numpy", "pydantic", "transformers", "onnxruntime", "fastapi", "PIL")


def vlm(*words, **options):
    """The console command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vlm", *words], capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture
def command(monkeypatch):
    """Puts a command called `trial` into the table, with this body."""

    def put(body):
        trial = click.Command("trial", callback=body)
        real = cli_main.LazyGroup.get_command
        monkeypatch.setitem(cli_main.COMMANDS, "trial", ("nowhere:trial", "for a test"))
        monkeypatch.setattr(
            cli_main.LazyGroup, "get_command", lambda self, ctx, name: trial if name == "trial" else real(self, ctx, name)
        )

    return put


def raises(error):
    def body():
        raise error

    return body


def test_help_lists_every_command_and_every_exit_code(capsys):
    assert cli_main.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in cli_main.COMMANDS:
        assert f"\n  {name} " in text
    for code in ExitCode:
        assert str(int(code)) in text


def test_help_imports_nothing_heavy_and_no_subcommand():
    code = (
        "import sys; from vlm.cli.main import main; code = main(['--help']); "
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]; "
        "own = [m for m in sys.modules if m.startswith('vlm.cli.') and m != 'vlm.cli.main']; "
        "print(code, heavy, own, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "0 [] []"


@pytest.mark.parametrize("name", cli_main.COMMANDS)
def test_help_of_each_command_is_quick_in_imports(name):
    code = (
        f"import sys; from vlm.cli.main import main; code = main([{name!r}, '--help']); "
        "print(code, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "0 False"  # torch comes with the work, not with the help
    assert "Usage: vlm " in done.stdout


@pytest.mark.parametrize("name", cli_main.COMMANDS)
def test_each_command_of_the_table_is_there_and_has_a_help_text(name):
    context = click.Context(cli_main.cli, info_name="vlm")
    command = cli_main.cli.get_command(context, name)
    assert command is not None
    assert (command.help or "").strip()
    assert cli_main.COMMANDS[name][1].endswith(".")


def test_the_version_is_printed(capsys):
    assert cli_main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vlm ")


@pytest.mark.parametrize("words", [[], ["pretran"], ["--debg"], ["presets", "shw"], ["presets", "list", "--jsn"]])
def test_a_wrong_request_exits_with_2(words, capsys):
    assert cli_main.main(words) == 2
    captured = capsys.readouterr()
    assert "Usage: vlm" in captured.out + captured.err


@pytest.mark.parametrize(
    ("words", "near"),
    [(["pretran"], "'pretrain'"), (["servr"], "'serve'"), (["--debg"], "--debug"), (["presets", "list", "--jsn"], "--json")],
)
def test_a_misspelt_command_or_option_is_answered_with_the_nearest(words, near, capsys):
    assert cli_main.main(words) == 2
    captured = capsys.readouterr()
    assert "did you mean" in captured.err.lower()
    assert near in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunFailed("m"), 1),
        (RequestError("m"), 2),
        (PresetError("m", where="x.toml:3:4"), 2),
        (DataError("m", where="a.jsonl:7"), 3),
        (CheckpointError("m"), 3),
        (OutOfMemory("m"), 4),
        (MemoryError("m"), 4),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 4),
        (GateFailed("m"), 5),
        (KeyboardInterrupt(), 130),
        (SystemExit(143), 143),
        (SystemExit(None), 0),
        (click.Abort(), 130),
        (ValueError("m"), 1),
    ],
)
def test_each_error_has_its_exit_code_and_no_traceback(command, capsys, error, code):
    command(raises(error))
    assert cli_main.main(["trial"]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_torchs_own_out_of_memory_is_one(command, capsys):
    torch = pytest.importorskip("torch")
    command(raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")))
    assert cli_main.main(["trial"]) == ExitCode.OUT_OF_MEMORY
    error = capsys.readouterr().err
    assert "CUDA out of memory. Tried to allocate 3 GiB\n" in error
    assert "train.batch_size" in error


def test_an_error_names_place_cause_and_remedy(command, capsys):
    command(raises(PresetError("unknown key 'x'", where="p.toml:3:4", remedy="say y")))
    cli_main.main(["trial"])
    assert capsys.readouterr().err == "error: p.toml:3:4: unknown key 'x'\n  say y\n"


@pytest.mark.parametrize("error", [RunFailed("inside"), ValueError("inside")])
def test_debug_shows_the_traceback(command, capsys, error):
    command(raises(error))
    assert cli_main.main(["--debug", "trial"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_training_package_is_answered_with_the_pip_command(command, capsys):
    command(raises(ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")))
    assert cli_main.main(["trial"]) == 2
    assert "pip install 'vlm-forge[train]'" in capsys.readouterr().err


def test_a_missing_module_of_another_kind_is_a_fault(command, capsys):
    command(raises(ModuleNotFoundError("No module named 'vlm.nonsense'", name="vlm.nonsense")))
    assert cli_main.main(["trial"]) == 1
    assert "pip install" not in capsys.readouterr().err


def test_a_command_whose_module_is_not_there_breaks_no_other(monkeypatch, capsys):
    monkeypatch.setitem(cli_main.COMMANDS, "absent", ("vlm.cli.absent:command", "not written"))
    assert cli_main.main(["--help"]) == 0
    assert cli_main.main(["absent"]) == 2
    assert "`vlm absent` is not part of this installation" in capsys.readouterr().err


def test_a_reader_that_leaves_early_ends_the_command_quietly():
    code = "import sys; sys.argv = ['vlm', 'presets', 'show', 'clip', '--resolved']; from vlm.cli.main import run; run()"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert done.returncode == cli_main.BROKEN_PIPE
    assert done.stderr == b""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_the_shell_closed_is_no_fault(closed):
    line = f"exec {sys.executable} -m vlm presets show clip-tiny {closed}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("schema = 1" in done.stdout) == (closed != ">&-")


def test_json_goes_to_stdout_alone():
    done = vlm("presets", "list", "--json")
    assert done.returncode == 0
    assert {"key", "title", "command"} <= set(json.loads(done.stdout)[0])
    assert done.stderr == ""


def test_it_runs_without_a_home_a_terminal_or_a_locale(tmp_path):
    folder = tmp_path / "räume mit leer"
    folder.mkdir()
    (folder / "mein.toml").write_text("schema = 1\nx = 'ü'\n", encoding="utf-8")
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": "/nonexistent"}
    done = vlm("presets", "show", str(folder / "mein.toml"), "--json", env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["values"] == {"schema": 1, "x": "ü"}
    done = vlm("presets", "show", str(folder / "nein.toml"), env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "no preset file" in done.stderr


def test_start_up_is_measured_by_imports_not_by_the_clock():
    """A clock on a shared machine proves nothing; this bounds what --help loads, and prints the time for a reader."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vlm", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    print(f"vlm --help with import timing: {time.perf_counter() - begin:.3f} s")
    assert len(done.stderr.splitlines()) < 260


@pytest.mark.parametrize(
    ("environment", "terminal", "expected"),
    [
        ({}, True, (True, True)),
        ({}, False, (False, False)),
        ({"NO_COLOR": "1"}, True, (False, True)),
        ({"NO_COLOR": ""}, True, (True, True)),
        ({"TERM": "dumb"}, True, (False, False)),
        ({"CI": "true"}, True, (True, False)),
    ],
)
def test_colour_and_bars_are_for_terminals(monkeypatch, environment, terminal, expected):
    for name in ("NO_COLOR", "TERM", "CI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert (output.colour(), output.wants_bar()) == expected


def test_json_says_numbers_that_are_not_finite_as_null(capsys):
    output.echo_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": ("x", None, True)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": ["x", None, True]}


def test_json_takes_arrays_and_any_file_name(capsys):
    numpy = pytest.importorskip("numpy")
    output.echo_json({"a": numpy.arange(3), "b": numpy.float32(0.5), "name": "caf\udce9.jpg"}, line=True)
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text) == {"a": [0, 1, 2], "b": 0.5, "name": "caf\udce9.jpg"}


def test_what_is_no_json_is_an_error():
    with pytest.raises(TypeError, match="object is no JSON value"):
        output.echo_json({"a": object()})


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_sleep_when_they_wait_unless_the_user_says_otherwise(given, spins):
    program = "import os, sys\nfrom vlm.cli import main\nmain.main = lambda: print(os.environ.get('GOMP_SPINCOUNT')) or 0\nmain.run()"
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=clean | given)
    assert done.stdout.strip() == str(spins), done.stderr
