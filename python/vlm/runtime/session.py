"""onnxruntime sessions with the options that the toolkit uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from vlm.config.errors import CheckpointError, RequestError
from vlm.runtime.manifest import MANIFEST, Manifest, inside

CPU = "CPUExecutionProvider"
_FATAL = 4


def open_session(path: Path, *, threads: int | None = None, providers: Sequence[str] = (CPU,)) -> onnxruntime.InferenceSession:
    """A session on a graph file.

    threads: of one operator; None lets onnxruntime choose. Raises CheckpointError for a file that is no graph, and
    RequestError when a provider that was asked for is not usable on this machine.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    if threads is not None:
        options.intra_op_num_threads = threads
    # Idle threads that spin would take the cores from decoding and from the other graphs of the bundle.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exception classes share no base but Exception
        raise CheckpointError(f"onnxruntime cannot open this graph: {str(error)[:300]}", where=str(path)) from error
    # onnxruntime falls back to the CPU without an error when a provider's libraries are missing.
    missing = [name for name in providers if name not in session.get_providers()]
    if missing:
        raise RequestError(f"{missing[0]} is not usable here", remedy=f"usable: {', '.join(session.get_providers())}")
    return session


def open_graph(
    directory: Path, manifest: Manifest, name: str, threads: int | None, providers: Sequence[str] = (CPU,)
) -> onnxruntime.InferenceSession:
    """The session of a graph of a bundle. Raises CheckpointError for one that bundle.json does not list."""
    if name not in manifest.graphs:
        raise CheckpointError(f"graph {name!r} is missing", where=str(directory / MANIFEST))
    return open_session(inside(directory, manifest.graphs[name]["path"]), threads=threads, providers=providers)
