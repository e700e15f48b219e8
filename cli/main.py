"""Entry point of the `vlm` command: finds a subcommand without importing the others, and turns errors into exit codes.

Importing this module costs click and nothing else; a subcommand's module is imported when it runs.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click

from vlm.config.errors import ExitCode, OutOfMemory, RequestError, RunFailed, VlmError
from vlm.config.nearest import did_you_mean

COMMANDS: dict[str, tuple[str, str]] = {
    "pretrain": ("vlm.cli.train:pretrain", "Train a model from scratch by a preset."),
    "finetune": ("vlm.cli.train:finetune", "Train a model further: fully, in parts, or through adapters."),
    "distill": ("vlm.cli.train:distill", "Train a student from a teacher."),
    "evaluate": (
        "vlm.cli.evaluate:command",
        "Measure a model: retrieval, zero-shot, probes, perplexity, captions, answers, cost.",
    ),
    "reproduce": (
        "vlm.cli.reproduce:command",
        "Measure a preset's claim against its baseline, with intervals.",
    ),
    "embed": ("vlm.cli.embed:command", "Embed pictures or texts, one JSON line each."),
    "search": ("vlm.cli.search:command", "Find pictures by text or picture in an index made by embed."),
    "predict": ("vlm.cli.predict:command", "Classify pictures among labels that you name."),
    "generate": ("vlm.cli.generate:command", "Answer prompts about pictures, or continue texts."),
    "tokens": ("vlm.cli.tokens:group", "Search how many visual tokens a model needs; sweep score against speed."),
    "soup": ("vlm.cli.soup:command", "Average the weights of models, or go between two."),
    "export": ("vlm.cli.export:command", "Write an ONNX bundle and prove that it equals the model."),
    "serve": ("vlm.cli.serve:command", "Serve a model or bundle over HTTP."),
    "data": ("vlm.cli.data:group", "Check and inspect data."),
    "presets": ("vlm.cli.presets:group", "List, show, compare, check and explain presets."),
    "runs": ("vlm.cli.runs:group", "List and compare runs."),
    "report": ("vlm.cli.report:command", "Write the HTML report of a run."),
    "bench": ("vlm.cli.bench:command", "Measure the operators against their peers."),
    "doctor": ("vlm.cli.doctor:command", "Check this installation and machine."),
    "completion": ("vlm.cli.completion:command", "Print the completion script of a shell."),
}
"""name -> (module:attribute, short help), in the order of `--help`. The short help says what the command's own does."""

EPILOG = """\b
Exit codes:
  0    done
  1    the run failed
  2    the request or the preset was wrong
  3    the data was wrong or missing
  4    out of memory
  5    a parity or evaluation gate failed
  130  interrupted (143: terminated), after a checkpoint where there is a run

Results go to stdout (--json: machine-readable), logs to stderr, and - is stdin or stdout.
"""

TRAIN_PACKAGES = frozenset(
    {
        "torch",
        "transformers",
        "peft",
        "onnx",
        "onnxscript",
        "onnx_ir",
        "tqdm",
        "matplotlib",
        "accelerate",
        "huggingface_hub",
    }
)
"""Import names that come with `vlm-forge[train]`."""

BROKEN_PIPE = 141
"""What a shell reports for a program ended by SIGPIPE."""


class LazyGroup(click.Group):
    """A group that knows its subcommands by `COMMANDS` and imports one only to run it."""

    def __init__(self, *arguments: Any, lazy: dict[str, tuple[str, str]], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        module_name, _, attribute = self.lazy[cmd_name][0].partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name == module_name:
                raise RequestError(f"`vlm {cmd_name}` is not part of this installation") from error
            raise
        command: click.Command = getattr(module, attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = str(args[0])
        if name not in self.lazy and not name.startswith("-"):
            raise click.UsageError(f"there is no command {name!r}{did_you_mean(name, self.lazy)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in self.lazy.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=short)
            for name, (_, short) in self.lazy.items()
            if name.startswith(incomplete)
        ]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]


def _print_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from vlm import __version__

        click.echo(f"vlm {__version__}")
        ctx.exit()


@click.command(
    cls=LazyGroup, lazy=COMMANDS, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version.",
)
def cli(debug: bool) -> None:
    """Pretrain, finetune, distill, evaluate, export and serve vision-language models from TOML presets."""


def run() -> None:
    """The console command: runs `sys.argv` and leaves with its exit code."""
    threads_that_sleep()
    streams_that_are_there()
    sys.exit(main())


def streams_that_are_there() -> None:
    """Python has None for a stream that the shell closed (`>&-`): what is written goes nowhere then, what is read is empty."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for the whole process


def threads_that_sleep() -> None:
    """Lets torch's threads (GNU OpenMP) sleep soon when they wait for one another, unless the user said how they wait.

    They spin for milliseconds otherwise: no gain on a free machine (the same step, 0.83 s), but beside other work each holds the core that
    the other needs (87 s instead of 19). OpenMP reads this when it is loaded and takes it from the environment alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command line (default: `sys.argv[1:]`) and returns its exit code; messages go to stderr."""
    words = list(sys.argv[1:] if args is None else args)
    debug = _wants_debug(words)  # before click takes words from the list
    try:
        if os.environ.get("_VLM_COMPLETE"):  # the shell asks for completions; click's own protocol
            cli.main(args=words, prog_name="vlm")
        code = _invoke(words)
        sys.stdout.flush()
    except BrokenPipeError:
        return _after_broken_pipe()
    except BaseException as error:
        return _failed(error, debug=debug)
    return code


def _invoke(words: list[str]) -> int:
    try:
        with cli.make_context("vlm", words) as context:
            cli.invoke(context)
    except click.exceptions.Exit as leave:
        return int(leave.exit_code)
    return int(ExitCode.DONE)


def _wants_debug(words: Sequence[str]) -> bool:
    """`--debug` before the subcommand; an argument of that name further on belongs to it."""
    for word in words:
        if not word.startswith("-"):
            return False
        if word == "--debug":
            return True
    return False


def _failed(error: BaseException, *, debug: bool) -> int:
    """Says what went wrong and returns the exit code. The cause is shown with a traceback under --debug only."""
    if isinstance(error, SystemExit):
        return (
            error.code
            if isinstance(error.code, int)
            else int(ExitCode.DONE if error.code is None else ExitCode.RUN_FAILED)
        )
    if debug and not isinstance(error, click.ClickException | click.exceptions.Abort):
        import traceback

        traceback.print_exception(error)
    with suppress(BrokenPipeError):
        if isinstance(error, click.ClickException):
            error.show()
            return int(error.exit_code)
        if isinstance(error, KeyboardInterrupt | click.exceptions.Abort):
            click.echo("interrupted", err=True)
            return int(ExitCode.INTERRUPTED)
        known = as_vlm_error(error)
        if known is not None:
            click.echo(f"error: {known}", err=True)
            return int(known.exit_code)
        click.echo(
            f"error: {type(error).__name__}: {error}\n  a fault of vlm: `vlm --debug ...` shows where",
            err=True,
        )
    return int(ExitCode.RUN_FAILED)


def as_vlm_error(error: BaseException) -> VlmError | None:
    """The error as one of ours: missing packages and spent memory have a meaning and a remedy; None for others."""
    if isinstance(error, VlmError):
        return error
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in TRAIN_PACKAGES:
        return RequestError(
            f"this needs {error.name}, which is not installed", remedy="pip install 'vlm-forge[train]'"
        )
    if _is_disk_full(error):
        return RunFailed(
            "the disk is full",
            where=getattr(error, "filename", None),
            remedy="make room or choose another --output; vlm pretrain --resume DIR continues a run from its last whole checkpoint",
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return RunFailed(error.strerror, where=os.fsdecode(error.filename) if not isinstance(error.filename, int) else None)
    if isinstance(error, OSError) and error.errno in (errno.EFBIG, errno.EIO, errno.EROFS):
        return RunFailed(f"cannot be written: {os.strerror(error.errno)}")
    if _is_out_of_memory(error):
        return OutOfMemory(
            str(error).strip().partition("\n")[0] or "memory ran out",
            remedy="make train.batch_size smaller or train.accumulate larger, or set train.recompute=true",
        )
    return None


def _is_disk_full(error: BaseException) -> bool:
    """ENOSPC, a quota that is used up, or a SafetensorError that tells of the former in words only."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__name__ == "SafetensorError" and f"(os error {errno.ENOSPC})" in str(error)


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    kinds: tuple[type[BaseException], ...] = (MemoryError,)
    if torch is not None and hasattr(torch, "OutOfMemoryError"):
        kinds = (*kinds, torch.OutOfMemoryError)
    if isinstance(error, kinds):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _after_broken_pipe() -> int:
    """The reader has gone (`vlm ... | head`): say nothing, and keep Python from complaining at exit."""
    with suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
    return BROKEN_PIPE
