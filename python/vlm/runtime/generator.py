"""A bundle that writes, as the decoding loop sees it: conversations to prompts, prompts to logits.

n rows, V vocabulary, S side of the model's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from PIL import Image

from vlm.config.errors import CheckpointError, DataError, GateFailed
from vlm.runtime.chat import Message, Template
from vlm.runtime.decoder import DecoderGraphs
from vlm.runtime.generation import Negatives, Prompt
from vlm.runtime.manifest import MANIFEST, REMEDY, Manifest, golden_of, inside
from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits, as_rgb
from vlm.runtime.pieces import ANSWER, TAG, Piece, PieceIds, encode_pieces
from vlm.runtime.preprocess import Preprocess, Resize
from vlm.runtime.session import CPU, open_graph
from vlm.runtime.stepper import BundleStepper
from vlm.runtime.tiled import TiledPicture, laid_out, row_positions
from vlm.runtime.tiling import Tiling
from vlm.runtime.tokens import BundleTokenizer

if TYPE_CHECKING:
    from vlm.runtime.embedder import Picture

MOST_SIDE = 4096
"""Greatest side of a tile in pixels that a bundle may ask for."""
Prepared = Mapping[str, np.ndarray]
"""Picture stream -> one prepared picture, float32 [3, S, S]; of a model that reads tiles a `TiledPicture`, [k, 3, S, S]."""


class BundleGenerator:
    """A `Generator` over onnxruntime. Base of the bundles that write; `decoder` names the graph with a cache.

    length: positions of prompt and answer together; batch_size: rows of one call of `nats`.
    """

    kind = ""
    decoder = "decoder"

    def __init__(
        self, directory: Path, manifest: Manifest, *, threads: int | None, batch_size: int = 32, providers: Sequence[str] = (CPU,)
    ) -> None:
        self.where = where = str(directory / MANIFEST)
        self.directory, self.manifest, self.name, self.batch_size = directory, manifest, manifest.name, batch_size
        self.length = manifest.count("text", "length", where)
        self.vocab_size = manifest.count("text", "vocab_size", where)
        self.tokenizer = BundleTokenizer(directory, length=self.length, fixed=False)
        self.template = _template(manifest, where)
        special = {name: _id(manifest, name, self.vocab_size, where) for name in ("bos_id", "eos_id", "pad_id", "image_id")}
        self._bos_id, self._eos_id, self._pad_id = special["bos_id"], special["eos_id"], special["pad_id"]
        self.image_id = special["image_id"]
        self.eos_ids = frozenset(_ids(manifest.data["text"].get("eos_ids", []), self.vocab_size, where))
        self._streams = _streams(manifest, where)
        decoder = manifest.data.get("decoder")
        self._apart = isinstance(decoder, dict) and bool(decoder.get("apart", False))
        self._tiling = _tiling(manifest, where)
        self._preprocess = {
            stream: open_graph(directory, manifest, entry["graph"], threads, (CPU,)) for stream, entry in self._streams.items()
        }
        self._ids_of = PieceIds(self.tokenizer.core, () if self.image_id is None else (self.image_id,))
        self._options: Any = {"threads": threads, "providers": providers}
        self._graphs: DecoderGraphs | None = None  # opened when first needed: scoring does without

    @property
    def writes(self) -> bool:
        """Whether the bundle has the graphs to write with; those of earlier releases had none."""
        return "decoder" in self.manifest.data

    def prepare_image(self, picture: Picture, limits: PictureLimits = DEFAULT_LIMITS) -> dict[str, np.ndarray] | TiledPicture:
        """Picture stream -> float32 [3, S, S], normalised, by the bundle's own preprocessing graphs; cut into its tiles
        [k, 3, S, S] where the model reads tiles. Raises BadPicture."""
        rgb = as_rgb(picture, limits)
        if self._tiling is None:
            return {stream: self._pixels(stream, rgb) for stream in self._preprocess}
        grid = self._tiling.grid(*rgb.size)
        streams = {}
        for stream, entry in self._streams.items():
            # A piece has the side of its tower already: the graph's own resizing leaves it as it is.
            pieces = self._tiling.pieces(rgb, grid, entry["size"], Image.Resampling(entry["resampling"]))
            streams[stream] = np.stack([self._pixels(stream, piece.picture) for piece in pieces])
        return TiledPicture(streams, tuple(self._tiling.places_of(grid)), tuple(self._tiling.tags_of(grid)))

    def use_template(self, template: Template) -> None:
        """Write messages by another template, whose own end then ends an answer too."""
        self.template, self.eos_ids = template, self.eos_ids | template.end_ids(self._ids_of, self._eos_id)

    @property
    def framing(self) -> Preprocess | None:
        """How the first picture stream resizes and crops; None where there is none, or the bundle is too old to say."""
        entry = next(iter(self._streams.values()), {})
        size = entry.get("size")
        resize: Resize | None = next((kind for kind in get_args(Resize) if kind == entry.get("resize")), None)
        return Preprocess(size, resize) if isinstance(size, int) and size > 0 and resize is not None else None

    def _pixels(self, stream: str, rgb: Image.Image) -> np.ndarray:
        out: np.ndarray = self._preprocess[stream].run(["pixel_values"], {"picture": np.asarray(rgb)})[0]
        return out

    def prompt(self, messages: Sequence[Message], pictures: Sequence[Prepared] = ()) -> Prompt:
        """The prompt of a conversation; pictures that no message places go where the template puts them.

        Raises DataError for a conversation that the template cannot write, and for pictures of a model that reads none;
        ValueError when a model that reads tiles is given a picture that `prepare_image` did not cut.
        """
        if pictures and not self._streams:
            raise DataError(f"{self.name} is a language model and reads no pictures")
        pieces = self.template.pieces(self.template.with_pictures(messages, len(pictures)), answer=False)
        pieces, places, rows = laid_out(pieces, pictures, self._streams, self._tiling)
        ids, role, _ = encode_pieces(pieces, self._ids_of, self.image_id, self._bos_id, self._eos_id)
        return Prompt(tuple(ids), rows, tuple(places), frozenset(at for at, own in enumerate(role) if own == TAG))

    def positions(self, prompt: Prompt) -> int:
        """Positions of a prompt after its pictures are expanded."""
        return row_positions(prompt.ids, self.image_id, self._picture_positions, prompt.places, prompt.tags, apart=self._apart)

    def stepper(self) -> BundleStepper:
        """A stepper without rows. Raises CheckpointError for a bundle that was exported without the graphs it needs."""
        if not self.writes:
            raise CheckpointError("this bundle has no decoder with a cache", where=str(self.directory), remedy=REMEDY)
        if self._graphs is None:
            self._graphs = self._open_graphs()
        return BundleStepper(self._graphs)

    def visual_tokens(self, pictures: Sequence[Prepared]) -> np.ndarray:
        """Prepared pictures to visual tokens float32 [n, K, C], as the decoder reads them; n counts tiles where there are."""
        if self._tiling is not None:
            counts = [len(next(iter(picture.values()))) for picture in pictures]
            pictures = [{name: picture[name][i] for name in picture} for picture, k in zip(pictures, counts) for i in range(k)]
        return self.stepper().graphs.visual(pictures)

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text; special tokens have none."""
        return self.tokenizer.decode(ids)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text as a message holds it."""
        return len(self._ids_of(text))

    @property
    def negatives(self) -> Negatives | None:
        """How contrastive decoding makes its negative prompts; None for a model without pictures."""
        return None if self.image_id is None else Negatives(self.image_id, self._pad_id)

    def answer_ids(self, text: str) -> list[int]:
        """The tokens of an answer as the template writes it, the one that ends it included."""
        pieces = [Piece("text", self.template.answer_lead + text, ANSWER, True), self.template.end_piece]
        return encode_pieces(pieces, self._ids_of, self.image_id, self._bos_id, self._eos_id)[0]

    def nats(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int] | str]) -> list[np.ndarray]:
        """-log p of each token of each answer after its prompt, the answer's own tokens given: float64 [len(answer)].

        An answer is ids, or text that becomes ids as in `answer_ids`. No ids give an empty row.
        """
        rows = [self.answer_ids(answer) if isinstance(answer, str) else list(answer) for answer in answers]
        return [nats for nats, _ in self._forced(prompts, rows)]

    def _forced(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, list[int]]]:
        """For each answer, read token by token: (-log p of each token, the likeliest token in its place)."""
        out: list[tuple[list[float], list[int]]] = [([], []) for _ in answers]
        for start in range(0, len(prompts), self.batch_size):
            alive = np.array([i for i in range(start, min(start + self.batch_size, len(prompts))) if len(answers[i])], np.int64)
            if not len(alive):
                continue
            stepper = self.stepper()
            logits = stepper.start([prompts[i] for i in alive])
            step = 0
            while True:
                tokens = np.array([answers[i][step] for i in alive], np.int64)
                wide = logits.astype(np.float64)
                top = wide.max(axis=1)
                nats = top + np.log(np.exp(wide - top[:, None]).sum(axis=1)) - wide[np.arange(len(alive)), tokens]
                for i, value, best in zip(alive, nats, logits.argmax(axis=1)):
                    out[i][0].append(float(value))
                    out[i][1].append(int(best))
                step += 1
                left = np.flatnonzero([len(answers[i]) > step for i in alive])
                if not len(left):
                    break
                if len(left) < len(alive):
                    stepper.reorder(left)
                    alive, tokens = alive[left], tokens[left]
                logits = stepper.advance(tokens)
        return [(np.array(nats), best) for nats, best in out]

    def self_test(self) -> float:
        """Answer the golden prompts, together, and compare with what the training framework gave.

        Returns the greatest difference of a token's -log p. Raises GateFailed above the bundle's tolerance, and for other
        tokens.
        """
        limit = self.manifest.tolerance("nats", 1e-2, self.where)
        with golden_of(self.directory) as golden:
            worst = self._compare(golden["prompts"])
        if not worst <= limit:
            raise GateFailed(f"the golden answers are reproduced to {worst:.2e} nats, expected {limit:.0e}", where=str(self.directory))
        return worst

    def golden_prompt(self, case: Any) -> Prompt:
        """The prompt of an entry of the golden answers, from its text and pictures."""
        shown = [self.prepare_image(inside(self.directory, f"golden/{name}")) for name in case["pictures"]]
        return self.prompt([Message("user", (case["text"],))], shown)

    def _compare(self, cases: Sequence[Any]) -> float:
        """The greatest difference of a golden token's -log p. Raises GateFailed for other ids or tokens."""
        prompts = []
        for case in cases:
            prompts.append(self.golden_prompt(case))
            if list(prompts[-1].ids) != case["ids"]:
                raise GateFailed(f"the golden prompt {case['text']!r} gives other ids", where=str(self.directory))
        worst = 0.0
        for case, (nats, best) in zip(cases, self._forced(prompts, [case["answer"] for case in cases])):
            if best != case["answer"]:
                raise GateFailed(f"the golden prompt {case['text']!r} gets another answer", where=str(self.directory))
            worst = max(worst, float(np.abs(nats - np.asarray(case["nats"])).max(initial=0.0)))
        return worst

    def _open_graphs(self) -> DecoderGraphs:
        return DecoderGraphs(
            self.directory, self.manifest, self.decoder, pixels={name: entry["input"] for name, entry in self._streams.items()},
            tokens=self._picture("tokens"), image_id=self.image_id if self._streams else None, length=self.length,
            vocab_size=self.vocab_size, **self._options,
        )  # fmt: skip

    @property
    def _picture_positions(self) -> int:
        return self._picture("positions")

    def _picture(self, key: str) -> int:
        if not self._streams:
            return 1
        return self.manifest.count("pictures", key, self.where)


def _template(manifest: Manifest, where: str) -> Template:
    given = manifest.data.get("template", {"name": "plain"})
    try:
        if not isinstance(given, dict):
            raise DataError("template is no table")
        return Template.from_dict(given)
    except DataError as error:
        raise CheckpointError(error.message, where=where, remedy=REMEDY) from error


def _ids(values: Any, vocab_size: int, where: str) -> list[int]:
    good = isinstance(values, list) and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in values)
    if not good:
        raise CheckpointError("a special id is not in the vocabulary", where=where, remedy=REMEDY)
    return list(values)


def _id(manifest: Manifest, name: str, vocab_size: int, where: str) -> int | None:
    value = manifest.data["text"].get(name)
    return None if value is None else _ids([value], vocab_size, where)[0]


def _tiling(manifest: Manifest, where: str) -> Tiling | None:
    """How pictures are cut, None where they are not. Raises CheckpointError."""
    pictures = manifest.data.get("pictures")
    given = pictures.get("tiling") if isinstance(pictures, dict) else None
    if given is None:
        return None
    kinds = {field.name: int if field.name in ("side", "max_tiles") else str for field in fields(Tiling)}
    if not isinstance(given, dict) or any(type(given.get(name)) is not kind for name, kind in kinds.items()):
        raise CheckpointError("pictures.tiling is incomplete or of the wrong type", where=where, remedy=REMEDY)
    sizes = [(entry.get("size"), entry.get("resampling")) for entry in _streams(manifest, where).values()]
    good = all(type(size) is int and 1 <= size <= MOST_SIDE and how in set(Image.Resampling) for size, how in sizes)
    if not good:
        raise CheckpointError("pictures.streams gives no size or resampling of the tiles", where=where, remedy=REMEDY)
    try:
        if given["side"] > MOST_SIDE:
            raise ValueError(f"side is {given['side']}, expected at most {MOST_SIDE}")
        return Tiling(**{name: given[name] for name in kinds})
    except ValueError as error:
        raise CheckpointError(f"pictures.tiling: {error}", where=where, remedy=REMEDY) from error


def _streams(manifest: Manifest, where: str) -> dict[str, dict[str, Any]]:
    """Picture stream -> {graph, input, size, resampling}: its preprocessing graph and what it feeds."""
    pictures = manifest.data.get("pictures")
    if pictures is None:
        return {}
    streams = pictures.get("streams") if isinstance(pictures, dict) else None
    good = isinstance(streams, dict) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("graph", "input")) for entry in streams.values()
    )
    if not good:
        raise CheckpointError("pictures.streams is missing or of the wrong type", where=where, remedy=REMEDY)
    assert isinstance(streams, dict)
    return streams
