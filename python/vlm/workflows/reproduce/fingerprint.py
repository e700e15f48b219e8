"""What a finished unit depends on, as hashes: the data's content and the code of the parts.

Code: the Python modules that a run's options classes live in, the trainer, loader and evaluation, and what these import,
docstrings, comments and layout aside. Imports are not followed through the catalogues, which name every part there is: a
new method makes no old result stale. The compiled operators are left out: their tests hold them to their plain twins.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vlm.data.sources.base import Source

CORE = (
    "vlm.training.engine",
    "vlm.training.trainer",
    "vlm.training.run",
    "vlm.evaluation.session",
    "vlm.workflows.carve",
)
CATALOGUES = frozenset(
    {
        "vlm",
        "vlm.models",
        "vlm.models.catalogue",
        "vlm.objectives",
        "vlm.tuning",
        "vlm.evaluation",
        "vlm.data",
        "vlm.schedules",
        "vlm.training",
        "vlm.training.preset",
        "vlm.models.layouts",
    }
)
"""Unions of every part: neither hashed nor followed. The options they let in are hashed with their defaults filled in."""


def fingerprint_of_data(source: Source) -> str:
    """A hash of the samples' ids and, where the source is made of files, of their content."""
    digest = hashlib.sha256(f"{source.kind}\n{len(source)}\n".encode())
    digest.update(source.ids.tobytes())
    for path in getattr(source, "paths", ()):
        stat = Path(path).stat()
        digest.update(_of_file(str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns).encode())
    return digest.hexdigest()


@cache
def _of_file(path: str, size: int, changed: int) -> str:
    """The hash of a file's content, once a process for a state of the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_of_code(options: Iterable[BaseModel]) -> str:
    """A hash of the modules that these options, and the trainer, need."""
    roots = {type(part).__module__ for whole in options for part in _parts(whole)}
    modules: set[str] = set()
    waiting = [*CORE, *sorted(roots)]
    while waiting:
        name = waiting.pop()
        if name in modules or name in CATALOGUES:
            continue
        modules.add(name)
        waiting += _imports(name)
    digest = hashlib.sha256()
    for name in sorted(modules):
        digest.update(f"{name} {_code(name)}\n".encode())
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[BaseModel]:
    """Every options object in a value."""
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from _parts(getattr(value, name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)


@cache
def _tree(module: str) -> ast.Module | None:
    """The syntax tree of a module of vlm; None for what is no Python source."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


@cache
def _code(module: str) -> str:
    tree = _tree(module)
    if tree is None:
        return "compiled"
    return hashlib.sha256(normalised(tree).encode()).hexdigest()


def normalised(tree: ast.Module) -> str:
    """The code as Python reads it, without docstrings."""
    tree = ast.parse(ast.unparse(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            node.body = body or [ast.Pass()]
    return ast.unparse(tree)


@cache
def _imports(module: str) -> tuple[str, ...]:
    """The modules of vlm that a module imports."""
    tree = _tree(module)
    found: set[str] = set()
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if _is_module(inner) else node.module)
    return tuple(sorted(name for name in found if name == "vlm" or name.startswith("vlm.")))


@cache
def _is_module(name: str) -> bool:
    if not name.startswith("vlm."):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
