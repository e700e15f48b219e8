"""Open and run a bundle with numpy, onnxruntime, tokenizers and Pillow alone.

n rows, E embedding width, S side of the model's input, T tokens, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from PIL import Image

from vlm.config.errors import CheckpointError, GateFailed
from vlm.runtime import pictures as _pictures
from vlm.runtime.embedder import Form, Picture, normalise, scores
from vlm.runtime.manifest import MANIFEST, Manifest, inside, read_json, read_manifest, verify_files
from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits
from vlm.runtime.session import CPU, open_session
from vlm.runtime.tokens import BundleTokenizer

GOLDEN = "golden/golden.json"


class Bundle:
    """A dual encoder's bundle: an `Embedder` (and `PreparingEmbedder`) over onnxruntime."""

    kind = "dual-encoder"

    def __init__(self, directory: Path, manifest: Manifest, *, threads: int | None, batch_size: int, providers: Sequence[str]) -> None:
        where = str(directory / MANIFEST)
        self.directory, self.manifest, self.name = directory, manifest, manifest.name
        self.batch_size = batch_size
        self.width: int = manifest.require("embedding", "width", int, where)
        self.scale = float(manifest.require("embedding", "scale", (int, float), where))
        self.bias = float(manifest.require("embedding", "bias", (int, float), where))
        form = manifest.require("embedding", "form", str, where)
        if form not in ("softmax", "sigmoid"):
            raise CheckpointError(f"embedding.form is {form!r}, expected softmax or sigmoid", where=where)
        self.form: Form = cast(Form, form)
        self.tokenizer = BundleTokenizer(
            directory,
            length=manifest.require("text", "length", int, where),
            fixed=manifest.require("text", "fixed_length", bool, where),
        )
        self._sessions = {
            name: _graph(directory, manifest, name, threads, providers if name != "preprocess" else (CPU,))
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
        golden = read_json(inside(self.directory, GOLDEN))
        limit = float((self.manifest.data.get("tolerance") or {}).get("cosine", 0.9999))
        images = self.encode_image([inside(self.directory, f"golden/{name}") for name in golden["pictures"]])
        texts = self.encode_text(golden["texts"])
        lowest = 1.0
        for got, wanted in ((images, golden["image_embeddings"]), (texts, golden["text_embeddings"])):
            lowest = min(lowest, float((got * np.asarray(wanted, np.float32)).sum(-1).min(initial=1.0)))
        if not lowest >= limit:
            raise GateFailed(f"the golden vectors are reproduced to cosine {lowest:.6f}, expected {limit}", where=str(self.directory))
        return lowest


class LanguageBundle:
    """A decoder's bundle: ids to logits, and what perplexity needs of a language model.

    length: greatest number of positions; packs: several documents may share a row; starts: a document begins with a
    token that is given, not predicted.
    """

    kind = "language"
    packs = False

    def __init__(self, directory: Path, manifest: Manifest, *, threads: int | None, providers: Sequence[str]) -> None:
        where = str(directory / MANIFEST)
        self.directory, self.manifest, self.name = directory, manifest, manifest.name
        self.length: int = manifest.require("text", "length", int, where)
        self.vocab_size: int = manifest.require("text", "vocab_size", int, where)
        self.starts: bool = manifest.require("text", "starts", bool, where)
        self.tokenizer = BundleTokenizer(directory, length=self.length, fixed=False)
        self._session = _graph(directory, manifest, "decoder", threads, providers)

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        """Right-padded ids int64 [n, T] to float32 [n, T, V]."""
        return cast(np.ndarray, self._session.run(["logits"], {"input_ids": np.asarray(input_ids, np.int64)})[0])

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, special tokens included, not cut."""
        return self.tokenizer.whole_rows(texts)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as text."""
        return self.tokenizer.pieces(ids)

    def nats(self, ids: np.ndarray, segment: np.ndarray, scored: np.ndarray) -> np.ndarray:
        """-log p of the token after each scored position, float64 [scored.sum()] in row order.

        ids, segment, scored [n, T]; segment -1 is padding. One document a row: raises ValueError for packed rows.
        """
        if segment.size and segment.max() > 0:
            raise ValueError("this graph takes one document a row")
        out = []
        for row, wanted in zip(ids, scored):
            at = np.flatnonzero(wanted)
            if len(at):
                logits = self.logits(row[None])[0, at].astype(np.float64)
                top = logits.max(axis=1)
                total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
                out.append(total - logits[np.arange(len(at)), row[at + 1]])
        return np.concatenate(out) if out else np.zeros(0)

    def self_test(self) -> float:
        """Compare the last logits of the golden texts with what the training framework gave.

        Returns the greatest difference over the largest logit. Raises GateFailed above the bundle's tolerance.
        """
        golden = read_json(inside(self.directory, GOLDEN))
        limit = float((self.manifest.data.get("tolerance") or {}).get("max_abs", 1e-3))
        worst = 0.0
        for text, ids, wanted in zip(golden["texts"], golden["ids"], golden["last_logits"]):
            if self.tokenizer.rows([text])[0] != ids:
                raise GateFailed(f"the golden text {text!r} gives other ids", where=str(self.directory))
            expected = np.asarray(wanted, np.float32)
            got = self.logits(np.asarray([ids]))[0, -1]
            worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
        if not worst <= limit:
            raise GateFailed(f"the golden logits are reproduced to {worst:.2e}, expected {limit:.0e}", where=str(self.directory))
        return worst


def open_any_bundle(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    batch_size: int = 32,
    verify: bool = True,
    providers: Sequence[str] = (CPU,),
) -> Bundle | LanguageBundle:
    """A bundle of either kind; see `open_bundle`."""
    directory = Path(path)
    manifest = read_manifest(directory)
    if verify:
        verify_files(directory, manifest)
    if manifest.kind == Bundle.kind:
        return Bundle(directory, manifest, threads=threads, batch_size=batch_size, providers=providers)
    if manifest.kind == LanguageBundle.kind:
        return LanguageBundle(directory, manifest, threads=threads, providers=providers)
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


def _graph(directory: Path, manifest: Manifest, name: str, threads: int | None, providers: Sequence[str]) -> onnxruntime.InferenceSession:
    if name not in manifest.graphs:
        raise CheckpointError(f"graph {name!r} is missing", where=str(directory / MANIFEST))
    return open_session(inside(directory, manifest.graphs[name]["path"]), threads=threads, providers=providers)


def as_rgb(picture: Picture, limits: PictureLimits = DEFAULT_LIMITS) -> Image.Image:
    """An upright RGB picture from bytes, a path or a Pillow picture. Raises BadPicture."""
    if isinstance(picture, Image.Image):
        return _pictures._to_rgb(_pictures._upright(picture))
    return _pictures.decode_picture(picture, limits)
