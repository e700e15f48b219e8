"""Open the model that a command names: a bundle without torch, anything else with it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

from vlm.config.errors import RequestError
from vlm.runtime.embedder import Embedder, PreparingEmbedder


def open_embedder(path: str, *, threads: int | None = None, batch_size: int = 32) -> Embedder:
    """A run, a Hugging Face directory or a bundle, as what embeds pictures and texts.

    Raises CheckpointError for a missing or damaged model, RequestError for one that embeds nothing.
    """
    from vlm.runtime.manifest import is_bundle

    if is_bundle(path):
        from vlm.runtime.bundle import Bundle, VisionBundle, open_any_bundle

        bundle = open_any_bundle(path, threads=threads, batch_size=batch_size)
        if not isinstance(bundle, Bundle | VisionBundle):
            raise RequestError(
                f"a {bundle.kind} bundle embeds no pictures", where=path, remedy="give the bundle of a dual encoder or a vision model"
            )
        return bundle
    # By name, when it is needed: this module is imported where torch may be missing.
    model = import_module("vlm.evaluation.encoder").open_model(path)
    if threads is not None:
        import_module("torch").set_num_threads(threads)
    if not hasattr(model, "encode_image"):
        what = "vision-language model answers questions and" if hasattr(model, "prepare_image") else "language model"
        raise RequestError(f"a {what} embeds no pictures", where=path, remedy="give a dual encoder, or ask this one with vlm generate")
    return cast(Embedder, model)


def picture_steps(embedder: Embedder) -> tuple[Callable[[str], Any], Callable[[list[Any]], Any]]:
    """(what to do with each path alone, what to do with a batch of those): both may raise BadPicture."""
    if isinstance(embedder, PreparingEmbedder):
        return embedder.prepare_image, embedder.encode_pixels
    from vlm.runtime.pictures import decode_picture

    return decode_picture, embedder.encode_image
