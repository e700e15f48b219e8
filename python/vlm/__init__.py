"""vlm: pretrain, finetune, distill, evaluate, export and serve vision-language models."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    # Read when asked for: importlib.metadata would be a third of the start-up time of the command.
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vlm-forge")
    except PackageNotFoundError:  # a source tree on the path that was never installed
        return "0.0.0"
