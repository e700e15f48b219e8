"""Publish a directory at once or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vlm.config.errors import RequestError, RunFailed
from vlm.runtime.manifest import MANIFEST


def check_target(output: Path) -> None:
    """Raises RequestError when the output would overwrite something that is not a bundle."""
    if output.is_symlink():
        raise RequestError("is a link", where=str(output), remedy="give the directory itself")
    if output.exists() and not output.is_dir():
        raise RequestError("exists and is not a directory", where=str(output), remedy="choose another --output")
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise RequestError(
            "the directory is not empty and holds no bundle", where=str(output), remedy="choose another --output, or empty it"
        )


@contextlib.contextmanager
def publishing(output: Path) -> Iterator[Path]:
    """A temporary sibling of `output`, which takes its name when the block ends well and vanishes when it does not.

    An older bundle under that name is replaced. Raises RequestError for an unsuitable target, RunFailed when the
    place cannot be written.
    """
    output = output.absolute()
    check_target(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise RunFailed(f"cannot be written: {error.strerror}", where=str(output), remedy="choose another --output") from error
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        for file in [*temporary.rglob("*"), temporary]:
            _flush(file)
        check_target(output)
        _swap(temporary, output)
        _flush(output.parent)
    except OSError as error:
        raise RunFailed(f"cannot be written: {error.strerror or error}", where=str(output)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, output: Path) -> None:
    if not output.exists():
        os.rename(temporary, output)
        return
    # A directory cannot be renamed over a full one: the old bundle steps aside first, and back if that fails.
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    os.rename(output, old / "bundle")
    try:
        os.rename(temporary, output)
    except OSError:
        os.rename(old / "bundle", output)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
