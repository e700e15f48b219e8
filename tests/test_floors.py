"""Imports go only downward, never in a circle; some floors stay free of heavy packages.

All imports count, those inside functions and those for type checkers too: what is imported late is still needed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    {"config"},
    {"types"},
    {"ops"},
    {"attention", "tokens", "data"},
    {"layers"},
    {"connectors", "models", "objectives", "tuning", "schedules", "decoding"},
    {"evaluation"},
    {"training"},
    {"workflows", "export", "serving", "reporting"},
    {"cli"},
]

APART = {"runtime": ("vlm.config.errors",), "bench": None, "presets": ()}
"""Packages beside the house: what of vlm they may import besides themselves, None for anything."""

RUNTIME_PACKAGES = {"numpy", "onnxruntime", "tokenizers", "PIL"}
CONFIG_PACKAGES = {"pydantic", "pydantic_core", "typing_extensions", "tomli"}
HEAVY = {"torch", "transformers", "peft", "onnx", "onnxscript", "onnxruntime", "matplotlib", "fastapi", "uvicorn"}


@dataclass(frozen=True)
class Import:
    """One import: which module, at which line, whether it runs when the file is imported, whether for types only."""

    target: str
    line: int
    at_import: bool
    for_types: bool


def sources() -> dict[str, Path]:
    """module -> file, of the library and the packages laid into it."""
    found = {}
    for folder, package in ((ROOT / "python/vlm", "vlm"), (ROOT / "cli", "vlm.cli"), (ROOT / "bench", "vlm.bench")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join([package, *parts])] = path
    return found


def imports_of(module: str, text: str, modules: Mapping[str, object], package: bool) -> Iterator[Import]:
    """Every import of a file; `from a import b` is an import of `a.b` where that is a module."""

    def visit(node: ast.AST, late: bool, typed: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                for name in child.names:
                    yield Import(name.name, child.lineno, not late, typed)
            elif isinstance(child, ast.ImportFrom):
                base = absolute(child)
                for name in child.names:
                    whole = f"{base}.{name.name}"
                    yield Import(whole if whole in modules else base, child.lineno, not late, typed)
            elif isinstance(child, ast.Call) and is_import_call(child):
                yield Import(child.args[0].value, child.lineno, not late, typed)  # type: ignore[attr-defined]
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                yield from visit(ast.Module(child.body, []), late, True)
                yield from visit(ast.Module(child.orelse, []), late, typed)
                continue
            yield from visit(child, inside, typed)

    def absolute(node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        above = parts[: len(parts) - node.level + package]
        return ".".join([*above, *([node.module] if node.module else [])])

    yield from visit(ast.parse(text), False, False)


def is_import_call(node: ast.Call) -> bool:
    """`import_module("...")` with the name written out."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return (
        name == "import_module"
        and bool(node.args)
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    )


def floor_of(module: str) -> int | None:
    """The number of a module's floor, None for the root and for packages apart."""
    part = module.split(".")[1] if module.count(".") else ""
    return next((number for number, names in enumerate(FLOORS) if part in names), None)


def upward(graph: Mapping[str, list[Import]]) -> list[str]:
    """Imports that go up, or into or out of a package apart where that is not allowed."""
    wrong = []
    for module, found in graph.items():
        part = module.split(".")[1] if module.count(".") else ""
        for entry in found:
            if not entry.target.startswith("vlm.") or entry.target in ("vlm._native", "vlm._native_cuda"):
                continue
            inner = entry.target.split(".")[1]
            here, there = floor_of(module), floor_of(entry.target)
            if part in APART:
                allowed = APART[part]
                bad = allowed is not None and inner != part and entry.target not in allowed
            elif part == '__main__':
                bad = False
            elif not part:  # the root offers names of the whole house, late
                bad = entry.at_import
            elif inner in APART:
                bad = inner == "bench" and part != "cli"
            else:
                bad = here is None or there is None or there > here
            if bad:
                wrong.append(f"{module}:{entry.line} imports {entry.target}")
    return wrong


def circles(graph: Mapping[str, list[Import]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle; to name a type alone ties no modules."""
    return loops(
        {
            module: {e.target for e in found if e.target in graph and e.target not in (module, "vlm") and not e.for_types}
            for module, found in graph.items()
            if module != "vlm"
        }
    )


def package_circles(graph: Mapping[str, list[Import]]) -> list[list[str]]:
    """Groups of packages that import each other in a circle, whatever their floor: here to name a type counts too."""
    edges: dict[str, set[str]] = {module.split(".")[1]: set() for module in graph if module.count(".")}
    for module, found in graph.items():
        if module.count("."):
            package = module.split(".")[1]
            edges[package] |= {e.target.split(".")[1] for e in found if e.target in graph and e.target.count(".")} - {package}
    return loops(edges)


def loops(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of names that reach each other (strongly connected components of more than one, by Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def connect(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in edges[name]:
            if target not in index:
                connect(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            at = stack.index(name)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(sorted(group))

    for name in edges:
        if name not in index:
            connect(name)
    return found


def foreign(graph: Mapping[str, list[Import]], prefix: str) -> dict[str, set[str]]:
    """Top-level names of packages, neither ours nor Python's, that the modules below `prefix` import."""
    out: dict[str, set[str]] = {}
    for module, found in graph.items():
        if module == prefix or module.startswith(prefix + "."):
            names = {entry.target.split(".")[0] for entry in found} - {"vlm", ""} - set(sys.stdlib_module_names)
            out[module] = names
    return out


@pytest.fixture(scope="module")
def graph() -> dict[str, list[Import]]:
    files = sources()
    return {
        module: list(imports_of(module, path.read_text("utf-8"), files, path.name == "__init__.py"))
        for module, path in files.items()
    }


def test_every_package_has_a_floor(graph):
    homeless = {m.split(".")[1] for m, path in sources().items() if m.count(".") and path.parent.name != "vlm"}
    assert homeless - set().union(*FLOORS) - set(APART) == set()


def test_imports_go_only_downward(graph):
    assert upward(graph) == []


def test_there_are_no_circles(graph):
    assert circles(graph) == []


def test_there_are_no_circles_of_packages(graph):
    assert package_circles(graph) == []


def test_the_runtime_needs_numpy_onnxruntime_tokenizers_and_pillow_alone(graph):
    assert {m: extra for m, names in foreign(graph, "vlm.runtime").items() if (extra := names - RUNTIME_PACKAGES)} == {}


def test_config_needs_pydantic_alone(graph):
    assert {m: extra for m, names in foreign(graph, "vlm.config").items() if (extra := names - CONFIG_PACKAGES)} == {}


def test_no_command_imports_a_heavy_package_before_it_runs(graph):
    early = {
        f"{module}:{entry.line} {entry.target}"
        for module, found in graph.items()
        if module.startswith("vlm.cli")
        for entry in found
        if entry.at_import and entry.target.split(".")[0] in HEAVY
    }
    assert early == set()


def test_training_names_no_model_family(graph):
    families = {m for m in graph if m.startswith("vlm.models.") and m.count(".") == 2} - {
        "vlm.models.base",
        "vlm.models.catalogue",
        "vlm.models.directory",
    }
    named = {
        f"{module}:{entry.line} {entry.target}"
        for module, found in graph.items()
        if module.startswith("vlm.training")
        for entry in found
        if entry.target in families
    }
    assert named == set()


def made(**files: str) -> dict[str, list[Import]]:
    """A graph of made-up modules: `training_run` stands for `vlm.training.run`."""
    texts = {"vlm." + name.replace("_", "."): text for name, text in files.items()}
    return {module: list(imports_of(module, text, texts, False)) for module, text in texts.items()}


@pytest.mark.parametrize(
    "text",
    [
        "import vlm.training.run",
        "from vlm.training import run",
        "from vlm.training.run import Run",
        "def f():\n    from vlm.training import run",
        "class A:\n    def f(self):\n        return [__import__ for _ in ()], importlib.import_module('vlm.training.run')",
        "if TYPE_CHECKING:\n    from vlm.training.run import Run",
        "try:\n    from ..training import run\nexcept ImportError:\n    pass",
    ],
)
def test_an_import_upward_is_found_wherever_it_stands(text):
    graph = made(models_base=text, training_run="import vlm.models.base")
    assert [line.split(" imports ")[0].split(":")[0] for line in upward(graph)] == ["vlm.models.base"]


@pytest.mark.parametrize(
    ("module", "text", "allowed"),
    [
        ("runtime_session", "from vlm.config.errors import DataError", True),
        ("runtime_session", "from vlm.config.load import resolve", False),
        ("runtime_session", "import vlm.types", False),
        ("data_loader", "from vlm.runtime.preprocess import resize", True),
        ("config_load", "from vlm.types import Batch", False),
        ("data_loader", "from vlm.ops import attention", True),
        ("data_loader", "from vlm.tokens import drop", True),
        ("cli_bench", "import vlm.bench.run", True),
        ("training_run", "import vlm.bench.run", False),
        ("nowhere_a", "import vlm.types", False),
    ],
)
def test_what_each_floor_may_import(module, text, allowed):
    assert (upward(made(**{module: text})) == []) is allowed


def test_a_circle_is_found_even_through_a_late_import():
    graph = made(
        models_a="import vlm.models.b",
        models_b="def f():\n    import vlm.models.c",
        models_c="from vlm.models.a import x",
        models_d="import vlm.models.a",
    )
    assert circles(graph) == [["vlm.models.a", "vlm.models.b", "vlm.models.c"]]


@pytest.mark.parametrize("back", ["import vlm.models.a", "def f():\n    import vlm.models.a", "if TYPE_CHECKING:\n    import vlm.models.a"])
def test_a_circle_of_packages_is_found_where_its_modules_form_none(back):
    graph = made(models_a="import vlm.data.a", models_b="import vlm.connectors.a", connectors_a="", connectors_b=back, data_a="")
    assert circles(graph) == []
    assert package_circles(graph) == [["connectors", "models"]]


def test_two_that_only_name_each_others_types_are_no_circle():
    assert circles(made(models_a="import vlm.models.b", models_b="if TYPE_CHECKING:\n    import vlm.models.a")) == []
