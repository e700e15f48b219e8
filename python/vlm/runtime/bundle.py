"""Open and run a bundle with numpy, onnxruntime, tokenizers and Pillow alone.

n rows, E embedding width, S side of the model's input.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from vlm.config.errors import CheckpointError, GateFailed
from vlm.runtime.embedder import Form, Picture, normalise, scores
from vlm.runtime.language import LanguageBundle
from vlm.runtime.manifest import MANIFEST, Manifest, golden_of, inside, read_manifest, verify_files
from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits, as_rgb
from vlm.runtime.prompt import LearnedPrompt
from vlm.runtime.session import CPU, open_graph
from vlm.runtime.tokens import BundleTokenizer
from vlm.runtime.vision import VisionBundle
from vlm.runtime.vision_language import VisionLanguageBundle


class Bundle:
    """A dual encoder's bundle: an `Embedder` (and `PreparingEmbedder`) over onnxruntime."""

    kind = "dual-encoder"

    def __init__(self, directory: Path, manifest: Manifest, *, threads: int | None, batch_size: int, providers: Sequence[str]) -> None:
        where = str(directory / MANIFEST)
        self.directory, self.manifest, self.name = directory, manifest, manifest.name
        self.batch_size = batch_size
        self.width = manifest.count("embedding", "width", where)
        self.scale = float(manifest.require("embedding", "scale", (int, float), where))
        self.bias = float(manifest.require("embedding", "bias", (int, float), where))
        form = manifest.require("embedding", "form", str, where)
        if form not in ("softmax", "sigmoid"):
            raise CheckpointError(f"embedding.form is {form!r}, expected softmax or sigmoid", where=where)
        self.form: Form = cast(Form, form)
        self.tokenizer = BundleTokenizer(
            directory,
            length=manifest.count("text", "length", where),
            fixed=manifest.require("text", "fixed_length", bool, where),
        )
        self.prompt = LearnedPrompt.from_json((manifest.data.get("text") or {}).get("prompt"), where)
        self._sessions = {
            name: open_graph(directory, manifest, name, threads, providers if name != "preprocess" else (CPU,))
            for name in ("preprocess", "vision", "text")
        }
        self._text_inputs = {i.name for i in self._sessions["text"].get_inputs()}

    def prepare_image(self, picture: Picture, limits: PictureLimits = DEFAULT_LIMITS) -> np.ndarray:
        """float32 [3, S, S], normalised, by the bundle's own preprocessing graph. Raises BadPicture."""
        rgb = as_rgb(picture, limits)
        return cast(np.ndarray, self._sessions["preprocess"].run(["pixel_values"], {"picture": np.asarray(rgb)})[0])

    def encode_pixels(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Prepared pictures [3, S, S] to [n, E] float32, unit length."""
        out = [np.zeros((0, self.width), np.float32)]
        for start in range(0, len(pixels), self.batch_size):
            batch = np.stack(list(pixels[start : start + self.batch_size]))
            out.append(normalise(self._sessions["vision"].run(["embedding"], {"pixel_values": batch})[0]))
        return np.concatenate(out)

    def encode_image(self, pictures: Sequence[Picture]) -> np.ndarray:
        """[n, E] float32, unit length. Raises BadPicture for the first picture that is refused."""
        out = [np.zeros((0, self.width), np.float32)]
        for start in range(0, len(pictures), self.batch_size):
            out.append(self.encode_pixels([self.prepare_image(p) for p in pictures[start : start + self.batch_size]]))
        return np.concatenate(out)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """[n, E] float32, unit length. A text beyond the model's length is cut. Raises DataError for invalid Unicode."""
        rows = self.tokenizer.rows(texts)
        out = np.zeros((len(rows), self.width), np.float32)
        # Texts of like length together need less padding.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            ids, mask = self.tokenizer.pad([rows[i] for i in chosen])
            given = {"input_ids": ids, "attention_mask": mask}
            feed = {name: value for name, value in given.items() if name in self._text_inputs}
            out[chosen] = normalise(self._sessions["text"].run(["embedding"], feed)[0])
        return out

    def count_tokens(self, text: str) -> int:
        """Tokens that the model reads of a text."""
        return len(self.tokenizer.rows([text])[0])

    def score(self, pictures: Sequence[Picture], texts: Sequence[str]) -> np.ndarray:
        """scale * cosine + bias of every picture with every text: float32 [n, m]."""
        return scores(self, self.encode_image(pictures), self.encode_text(texts))

    def self_test(self) -> float:
        """Embed the golden pictures and texts and compare with what the training framework gave.

        Returns the lowest cosine. Raises GateFailed when it is below the bundle's stated tolerance.
        """
        limit = self.manifest.tolerance("cosine", 0.9999, str(self.directory / MANIFEST))
        lowest = 1.0
        with golden_of(self.directory) as golden:
            images = self.encode_image([inside(self.directory, f"golden/{name}") for name in golden["pictures"]])
            texts = self.encode_text(golden["texts"])
            for got, wanted in ((images, golden["image_embeddings"]), (texts, golden["text_embeddings"])):
                lowest = min(lowest, float((got * np.asarray(wanted, np.float32)).sum(-1).min(initial=1.0)))
        if not lowest >= limit:
            raise GateFailed(f"the golden vectors are reproduced to cosine {lowest:.6f}, expected {limit}", where=str(self.directory))
        return lowest


AnyBundle = Bundle | LanguageBundle | VisionBundle | VisionLanguageBundle


def open_any_bundle(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    batch_size: int = 32,
    verify: bool = True,
    providers: Sequence[str] = (CPU,),
) -> AnyBundle:
    """A bundle of any kind; see `open_bundle`."""
    directory = Path(path)
    manifest = read_manifest(directory)
    if verify:
        verify_files(directory, manifest)
    options: Any = {"threads": threads, "batch_size": batch_size, "providers": providers}
    for kind in (Bundle, LanguageBundle, VisionBundle, VisionLanguageBundle):
        if manifest.kind == kind.kind:
            opened: AnyBundle = kind(directory, manifest, **options)
            return opened
    raise CheckpointError(f"kind {manifest.kind!r} is not known to this release", where=str(directory / MANIFEST))


def open_bundle(path: str | os.PathLike[str], **options: Any) -> Bundle:
    """The bundle of a dual encoder, ready to embed.

    threads: of one operator; None lets onnxruntime choose. batch_size: rows of one call. verify: compare every file
    with its sha256 in bundle.json. providers: onnxruntime's names, in order of preference.
    Raises CheckpointError when the bundle is missing, altered or of another schema or kind.
    """
    bundle = open_any_bundle(path, **options)
    if not isinstance(bundle, Bundle):
        raise CheckpointError(f"a {bundle.kind} bundle embeds no pictures", where=str(path), remedy="give the bundle of a dual encoder")
    return bundle
