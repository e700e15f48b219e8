"""One part of a model to one ONNX graph file."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vlm.config.errors import RunFailed
from vlm.types.export import ExportPart

OPSETS = range(18, 25)
_LOGGERS = ("torch.onnx", "torch.onnx._internal", "torch.export", "onnxscript", "onnx_ir")


def export_part(name: str, part: ExportPart, path: Path, *, opset: int) -> None:
    """Write a part's graph, its dynamic axes named. Weights beyond 2 GB go to a data file beside it.

    Raises RunFailed naming the part when torch cannot export it.
    """
    axes: dict[str, torch.export.Dim] = {}
    for dims in part.dynamic.values():
        for axis in dims.values():
            # At least 1: an empty batch is answered by the runtime without running the graph. A cache may be empty.
            axes.setdefault(axis, torch.export.Dim(axis, min=0 if axis.startswith("past") else 1))
    shapes = [{position: axes[axis] for position, axis in part.dynamic.get(given, {}).items()} for given in part.inputs]
    with quiet():
        try:
            program = torch.onnx.export(
                part.module.eval(),
                tuple(part.inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(part.inputs),
                output_names=list(part.outputs),
                dynamic_shapes=_nested(part, shapes),
                verbose=False,
            )
        except Exception as error:  # the exporter raises many types, all with long reports
            reason = str(error.__cause__ or error).strip().splitlines()
            raise RunFailed(
                f"torch could not export the {name} graph: {reason[0][:300] if reason else type(error).__name__}",
                remedy="run again with --debug for the exporter's own report",
            ) from error
        if program is None:
            raise RunFailed(f"torch gave no program for the {name} graph")
        _free_names(program.model.graph, {*part.inputs, *part.outputs})
        program.save(path, include_initializers=True)


def _nested(part: ExportPart, shapes: list[dict[int, Any]]) -> tuple[Any, ...]:
    """The shapes as the module's signature takes them: what goes to *arguments is a tuple of its own."""
    parameters = inspect.signature(part.module.forward).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return tuple(shapes)
    named = sum(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in parameters)
    return (*shapes[:named], tuple(shapes[named:]))


def _free_names(graph: Any, names: set[str]) -> None:
    """Rename inner values that carry the name of an input or output: torch calls every lookup `embedding`."""
    ends = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for node in graph:
        for value in node.outputs:
            if value.name in names and id(value) not in ends:
                value.name = f"{value.name}_inner"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's chatter (missing torchvision, step by step reports) from the user's terminal."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
