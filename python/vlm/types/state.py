"""Stateful: everything mutable of a run is one tree that one checkpoint holds.

A tree is nested dicts with string keys; leaves are tensors, or what JSON can say (numbers, strings, booleans,
None, lists of these). Tensors go to safetensors, the rest to JSON: no pickle.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Tree = dict[str, Any]


@runtime_checkable
class Stateful(Protocol):
    """What can be saved and restored exactly."""

    def state_dict(self) -> Tree: ...

    def load_state_dict(self, state: Tree) -> Any: ...


def split_tree(tree: Tree) -> tuple[dict[str, Tensor], Tree]:
    """A tree as (tensors by `a/b/c` path, the same tree with each tensor replaced by {"tensor": path}).

    A tensor that stands in several places is written once. Raises TypeError that names the path of a leaf that
    neither safetensors nor JSON can hold, and of a key that is no string or holds a slash.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            name = seen.setdefault(id(node), path)
            tensors[name] = node
            return {"tensor": name}
        if isinstance(node, dict):
            for key in node:
                if not isinstance(key, str) or "/" in key:
                    raise TypeError(f"state {path!r} has the key {key!r}: expected a string without a slash")
            return {key: walk(value, f"{path}/{key}" if path else str(key)) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return [walk(value, f"{path}/{i}") for i, value in enumerate(node)]
        if node is None or isinstance(node, str | int | float | bool):
            return node
        raise TypeError(f"state {path!r} holds a {type(node).__name__}: expected a tensor or a JSON value")

    return tensors, walk(tree, "")


def join_tree(tensors: dict[str, Tensor], plain: Any) -> Any:
    """The inverse of `split_tree`."""
    if isinstance(plain, dict):
        if set(plain) == {"tensor"} and plain["tensor"] in tensors:
            return tensors[plain["tensor"]]
        return {key: join_tree(tensors, value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [join_tree(tensors, value) for value in plain]
    return plain
