"""Models as evaluation sees them: a torch model from a directory or from memory, or a bundle without torch.

Three kinds: what embeds pictures and texts, what scores texts, what reads pictures and writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlm.config.errors import CheckpointError, RequestError
from vlm.evaluation.clips import prepared, stream_of
from vlm.evaluation.evaluating import evaluating
from vlm.evaluation.material import Floats
from vlm.evaluation.perplexity import Integers, LanguageScorer, Wide
from vlm.runtime.embedder import Embedder, Form

if TYPE_CHECKING:
    from vlm.data.tokenizer import Tokenizer
    from vlm.models import Model
    from vlm.runtime.pictures import PictureLimits
    from vlm.runtime.preprocess import Preprocess

_LOGITS = 2**25  # vocabulary logits held at a time


def _batch(name: str, stream: Any) -> Any:
    import torch

    from vlm.types import Batch

    count = int(stream.sample_index.max()) + 1 if len(stream) else 0
    zeros = torch.zeros(count, dtype=torch.int64)
    return Batch({name: stream}, [str(i) for i in range(count)], zeros, zeros)


class TorchEmbedder:
    """A model that embeds pictures and texts, with the tokenizer and preprocessing it was trained with."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        *,
        name: str = "model",
        batch: int = 64,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.name = name
        self.batch = batch
        log_scale, bias = model.temperature()
        self.scale = 1.0 if log_scale is None else float(log_scale.detach().exp())
        self.bias = 0.0 if bias is None else float(bias.detach())
        self.form: Form = "softmax" if bias is None else "sigmoid"
        self.length: int = model.options.text.length  # type: ignore[attr-defined]
        self.prompt = model.prompt

    def _embed(self, stream: Any) -> Floats:
        with evaluating(self.model) as device:
            outputs = self.model.encode(_batch("x", stream).to(device), {"x": frozenset({"embedding"})})["x"]
            embedding = outputs.embedding
            assert embedding is not None
            return embedding.float().cpu().numpy()

    def encode_image(self, pictures: Sequence[Any]) -> Floats:
        """[n, E] float32 unit rows of RGB pictures, encoded files or paths. Raises BadPicture."""
        return self.encode_pixels([self.prepare_image(picture) for picture in pictures])

    def prepare_image(self, picture: Any, limits: PictureLimits | None = None) -> NDArray[np.uint8]:
        """uint8 [3, S, S], or frames [k, 3, S, S], what `encode_pixels` takes: a queue need not hold whole pictures.

        Raises BadPicture.
        """
        return prepared(picture, self.preprocess, self.model.frames, limits)

    def encode_pixels(self, pixels: Sequence[NDArray[np.uint8]]) -> Floats:
        """[n, E] float32 unit rows of prepared pictures."""
        return _unit_rows([self._embed(stream_of(pixels[at : at + self.batch])) for at in range(0, len(pixels), self.batch)])

    def encode_patches(self, pictures: Sequence[Any]) -> Floats:
        """[n, P, E] float32 unit rows: each patch of RGB pictures in the space of the texts, in raster order.

        Raises BadPicture, and RequestError for a model that does not tell patches by place.
        """
        if "tokens" not in type(self.model).offers.get("pictures", ()):
            raise RequestError(f"a {self.model.kind} model gives no patches")
        vision = getattr(self.model.options, "vision", None)
        if self.model.frames is not None or getattr(vision, "merge", None) is not None:
            raise RequestError("the patches of this model are merged or of several frames, and have no one place")
        pixels = [self.prepare_image(picture) for picture in pictures]
        parts = []
        for at in range(0, len(pixels), self.batch):
            with evaluating(self.model) as device:
                batch = _batch("x", stream_of(pixels[at : at + self.batch])).to(device)
                tokens = self.model.encode(batch, {"x": frozenset({"tokens"})})["x"].tokens
                assert tokens is not None
                parts.append(tokens.float().cpu().numpy())
        return _unit_rows(parts)

    def encode_text(self, texts: Sequence[str]) -> Floats:
        """[n, E] float32 unit rows; a text longer than the tower is cut as in training."""
        import torch

        from vlm.types import TokenIds

        parts = []
        for start in range(0, len(texts), self.batch):
            part = list(texts[start : start + self.batch])
            ids, mask = self.tokenizer.encode(part, self.length)
            stream = TokenIds(torch.from_numpy(ids), torch.from_numpy(mask), torch.arange(len(part)))
            if self.model.triples is not None:  # each text by its own scene graph
                from vlm.data.streams.graphs import with_triples

                stream = with_triples(stream, part, self.tokenizer, *self.model.triples)
            parts.append(self._embed(stream))
        return _unit_rows(parts)


def _unit_rows(parts: list[Floats]) -> Floats:
    rows = np.concatenate(parts)
    with np.errstate(
        invalid="ignore", divide="ignore"
    ):  # rows that cannot be scaled are refused by the caller
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


class TorchLanguage:
    """A model that gives vocabulary logits of token rows, packed or not."""

    packs = True

    def __init__(self, model: Model, tokenizer: Tokenizer, *, name: str = "model") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.vocab_size = model.vocabulary.size
        self.length: int = model.options.length  # type: ignore[attr-defined]
        self.starts = tokenizer.bos_id is not None and tokenizer.ids([""])[0][:1] == [tokenizer.bos_id]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.ids(list(texts))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.tokenizer.decode([i], skip_special=False) for i in ids]

    def encode_text(self, texts: Sequence[str]) -> Floats:
        """[n, E] float32 unit rows: what the model embeds a text as; one longer than its context is cut."""
        import torch

        from vlm.types import TokenIds

        ids, mask = self.tokenizer.encode(list(texts), self.length)
        stream = TokenIds(torch.from_numpy(ids), torch.from_numpy(mask), torch.arange(len(texts)))
        with evaluating(self.model) as device:
            outputs = self.model.encode(_batch("x", stream).to(device), {"x": frozenset({"embedding"})})["x"]
            assert outputs.embedding is not None
            return _unit_rows([outputs.embedding.float().cpu().numpy()])

    def nats(self, ids: Integers, segment: Integers, scored: NDArray[np.bool_]) -> Wide:
        """See LanguageScorer. float32 logits, log-sum-exp in float64."""
        import torch

        from vlm.types import TokenIds, Vocabulary

        rows = torch.from_numpy(ids)
        stream = TokenIds(
            rows, torch.from_numpy(segment >= 0), torch.arange(len(ids)), segment=torch.from_numpy(segment)
        )
        wanted = torch.from_numpy(scored)
        target = torch.roll(rows, -1, dims=1)[wanted]
        with evaluating(self.model) as device:
            given = self.model.encode(_batch("x", stream).to(device), {"x": frozenset({"vocabulary"})})[
                "x"
            ].vocabulary
            assert given is not None
            hidden = given.hidden[wanted.to(device)]
            out = []
            step = max(1, _LOGITS // self.vocab_size)
            for start in range(0, len(hidden), step):
                part = Vocabulary(hidden[None, start : start + step], given.weight, given.bias, given.softcap)
                logits = part.logits()[0].double()
                chosen = logits.gather(1, target[start : start + step, None].to(device))[:, 0]
                out.append((logits.logsumexp(1) - chosen).cpu())
            return torch.cat(out).numpy() if out else np.zeros(0)


AnyModel = Embedder | LanguageScorer | Any
"""What embeds, what scores texts, or what writes: a `vlm.runtime.generation.Generator`."""


def of_memory(
    model: Model, tokenizer: Tokenizer | None, preprocess: Preprocess | None, *, name: str = "model", batch: int = 64
) -> AnyModel:
    """The evaluation's view of a model in memory, chosen by what it offers, not by its family.

    Raises RequestError for a model that no task can use.
    """
    offers = type(model).offers
    if "embedding" in offers.get("pictures", ()) and "tokens" not in offers:
        from vlm.evaluation.seeing import TorchVision

        if preprocess is None:
            raise RequestError("a model of pictures needs their preprocessing")
        return TorchVision(model, preprocess, name=name, batch=batch)
    if tokenizer is None:
        raise RequestError(f"a {model.kind} model needs its tokenizer")
    if "embedding" in offers.get("pictures", ()) and "embedding" in offers.get("tokens", ()):
        if preprocess is None:
            raise RequestError("a model of pictures needs their preprocessing")
        return TorchEmbedder(model, tokenizer, preprocess, name=name, batch=batch)
    if "vocabulary" in offers.get("tokens", ()) and model.preprocesses():
        from vlm.evaluation.generator import open_generator

        return open_generator(model, tokenizer, name=name)
    if "vocabulary" in offers.get("tokens", ()):
        return TorchLanguage(model, tokenizer, name=name)
    raise RequestError(f"no evaluation task can use a model of kind {model.kind!r}")


def preprocess_of(model: Model, directory: Path) -> Preprocess | None:
    """From preprocessor_config.json where there is one, else from the model's own options."""
    path = directory / "preprocessor_config.json"
    if path.is_file() and model.preprocess() is not None:
        from vlm.models.directory import read_json
        from vlm.runtime.preprocess import Preprocess

        return Preprocess.from_config(read_json(path), where=str(path))
    return model.preprocess()


def is_bundle(path: str | Path) -> bool:
    return (Path(path) / "bundle.json").is_file()


def open_model(
    path: str | Path, *, threads: int | None = None, batch: int = 64, changes: Mapping[str, Any] | None = None
) -> AnyModel:
    """The model of a run, a Hugging Face directory or a bundle, ready for evaluation on the CPU in float32.

    threads: of the CPU, all cores by default; batch: pictures or texts of one forward pass; changes: settings of the model
    that are laid over its own, see `load_model`. A bundle is opened by the runtime, without torch. Raises CheckpointError
    naming the file that is wrong, and RequestError for changes of a bundle.
    """
    path = Path(path)
    if is_bundle(path):
        if changes:
            raise RequestError("the graphs of a bundle are as they were exported", where=str(path), remedy="give its run or directory")
        from vlm.runtime import open_any_bundle

        return open_any_bundle(path, threads=threads, batch_size=batch)
    try:
        import torch
    except ImportError as error:
        raise RequestError(
            "this is not a bundle, and torch is not installed", where=str(path), remedy='pip install "vlm-forge[train]", or export it'
        ) from error  # fmt: skip
    from vlm.data.tokenizer import Tokenizer
    from vlm.models.directory import find_model_directory, load_model

    if threads is not None:
        torch.set_num_threads(threads)
    directory = find_model_directory(path)
    model = load_model(directory, changes=changes)
    reads_text = "tokens" in type(model).offers
    tokenizer = Tokenizer.load(directory) if reads_text else None
    if tokenizer is not None and tokenizer.vocab_size > model.vocabulary.size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.vocabulary.size}",
            where=str(directory),
        )
    return of_memory(model, tokenizer, preprocess_of(model, directory), name=str(path), batch=batch)


def describe_model(path: str | Path) -> dict[str, Any]:
    """What a result says of a model on disk: its path and the sha256 over its weight files."""
    path = Path(path)
    if is_bundle(path):
        files = sorted(path.rglob("*.onnx"))
        kind = "bundle"
    else:
        from vlm.models.directory import find_model_directory

        directory = find_model_directory(path)
        files = sorted(directory.glob("*.safetensors"))
        kind = "run" if directory != path else "directory"
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return {"path": str(path), "kind": kind, "sha256": digest.hexdigest()}
