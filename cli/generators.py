"""Open the writing model that a command names: a bundle without torch, anything else with it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vlm.config.errors import RequestError
from vlm.config.nearest import did_you_mean


class WritesNothing(RequestError):
    """A model that embeds was asked to write."""

    def __init__(self, path: str) -> None:
        super().__init__(
            "a dual encoder writes nothing: it embeds pictures and texts",
            where=path,
            remedy="use vlm embed or vlm predict, or give a language or vision-language model",
        )


def open_generator(path: str, *, threads: int | None = None, batch_size: int = 8, template: str | None = None) -> Any:
    """A run, a Hugging Face directory or a bundle, as a `vlm.runtime.generation.Generator`.

    template: instead of the model's own. Raises CheckpointError for a missing or damaged model, RequestError for one that
    writes nothing.
    """
    from vlm.runtime.manifest import is_bundle

    chosen = None if template is None else _template(template)
    if is_bundle(path):
        from vlm.runtime.bundle import open_any_bundle

        model: Any = open_any_bundle(path, threads=threads, batch_size=batch_size)
        if not hasattr(model, "stepper"):
            raise WritesNothing(path)
        model.stepper()  # a bundle of an earlier release cannot write: said before anything is read
    else:
        model = _torch_generator(path, threads)
    if chosen is not None:
        model.use_template(chosen)
    return model


def _template(name: str) -> Any:
    from vlm.runtime.templates import TEMPLATES, template_named

    if name not in TEMPLATES:
        raise RequestError(f"there is no template {name!r}{did_you_mean(name, TEMPLATES)}", where="--template", remedy=f"known: {', '.join(TEMPLATES)}")
    return template_named(name)


def open_served(path: str, *, threads: int | None = None, batch_size: int = 32) -> Any:
    """What a server answers with: a `Generator` where the model writes, else an `Embedder`. Raises CheckpointError."""
    try:
        return open_generator(path, threads=threads, batch_size=batch_size)
    except WritesNothing:
        from vlm.cli.encoders import open_embedder

        return open_embedder(path, threads=threads, batch_size=batch_size)


def _torch_generator(path: str, threads: int | None) -> Any:
    # By name, when they are needed: this module is imported where torch may be missing.
    if threads is not None:
        import_module("torch").set_num_threads(threads)
    directories = import_module("vlm.models.directory")
    directory = directories.find_model_directory(path)
    model = directories.load_model(directory)
    if not hasattr(model, "advance"):
        raise WritesNothing(path)
    tokenizer = import_module("vlm.data.tokenizer").Tokenizer.load(directory)
    return import_module("vlm.evaluation.generator").open_generator(model.eval(), tokenizer, name=str(path))
