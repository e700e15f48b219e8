"""Writing tensors: one safetensors file, whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_NUMBER = re.compile(r"os error (\d+)")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors beside `path`, then rename.

    Raises OSError naming the path, also where safetensors tells of it in words alone; nothing is left then, and what stood
    under the name before stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(dict(tensors), partial, metadata=None if metadata is None else dict(metadata))
        os.replace(partial, path)
    except SafetensorError as error:
        number = _NUMBER.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
