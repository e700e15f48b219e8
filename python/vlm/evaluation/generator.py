"""A torch model that writes, as the decoding loop sees it: prompts to logits, token by token.

n rows, V vocabulary, S side of the model's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm.config.errors import RequestError
from vlm.evaluation.evaluating import evaluating

if TYPE_CHECKING:
    import torch

    from vlm.data.tokenizer import Tokenizer
    from vlm.evaluation.flops import GeneratorShape
    from vlm.models import LanguageModel, Model, VisionLanguageModel
    from vlm.models.decoder import Cache
    from vlm.runtime.chat import Message, Template
    from vlm.runtime.generation import Negatives, Prompt
    from vlm.runtime.pictures import PictureLimits
    from vlm.runtime.preprocess import Preprocess
    from vlm.runtime.tiled import TiledPicture
    from vlm.types import Pictures, TokenIds

Floats = NDArray[np.float32]
Prepared = Mapping[str, np.ndarray]
"""Picture stream -> one prepared picture, uint8 [3, S, S]; a `TiledPicture`, whose arrays are [k, 3, S, S], of a model
that reads tiles."""


class Asked(Protocol):
    """What is read of a prompt."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def pictures(self) -> Mapping[str, Sequence[np.ndarray]]: ...
    @property
    def places(self) -> Sequence[tuple[int, int, int]]: ...
    @property
    def tags(self) -> frozenset[int]: ...


class TorchStepper:
    """Rows of prompts of a torch model with their cache, advanced token by token. float32 logits, evaluation mode."""

    def __init__(self, model: LanguageModel | VisionLanguageModel) -> None:
        self.model = model
        self.vocab_size = language_part(model).tokens.num_embeddings
        self._cache: Cache | None = None

    def start(self, prompts: Sequence[Asked]) -> Floats:
        """Logits float32 [n, V] after each prompt. Raises ValueError for an empty prompt, for none at all, and for
        placeholders and pictures that do not agree."""
        if not prompts:
            raise ValueError("the stepper was given no prompt")
        text, _ = rows_of([list(prompt.ids) for prompt in prompts], tags=[prompt.tags for prompt in prompts])
        with evaluating(self.model) as device:
            pictures = {name: stream.map(lambda t: t.to(device)) for name, stream in pictures_of(prompts).items()}
            moved: Any = text.map(lambda t: t.to(device))
            logits, self._cache = self.model.prefill(moved, pictures)  # type: ignore[arg-type]
            return _numbers(logits)

    def advance(self, ids: np.ndarray) -> Floats:
        """One more token a row, [n] int64 -> logits float32 [n, V]. Raises RuntimeError before `start`."""
        import torch

        cache = self._started()
        with evaluating(self.model) as device:
            given = torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)).to(device)
            logits, self._cache = self.model.advance(given, cache)
            return _numbers(logits)

    def reorder(self, index: np.ndarray) -> None:
        """Rows kept, repeated or dropped: index [m] int64."""
        import torch

        cache = self._started()
        with torch.no_grad():
            at = torch.from_numpy(np.ascontiguousarray(index, dtype=np.int64))
            self._cache = cache.rows(at.to(cache.next_position.device))

    def join(self, other: TorchStepper) -> None:
        """The rows of another stepper of the same model come behind its own. Raises RuntimeError before `start` of either."""
        import torch

        mine, its = self._started(), other._started()
        with torch.no_grad():
            self._cache = mine.joined(its)  # type: ignore[arg-type]  # caches of one model are of one kind

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that are held."""
        return 0 if self._cache is None else self._cache.bytes

    def _started(self) -> Cache:
        if self._cache is None:
            raise RuntimeError("the stepper has no rows yet: call start first")
        return self._cache


class TorchGenerator:
    """A language or vision-language model with its tokenizer and template.

    length: positions of prompt and answer together. batch: rows of one forward pass of `nats`.
    """

    def __init__(
        self,
        model: LanguageModel | VisionLanguageModel,
        tokenizer: Tokenizer,
        template: Template,
        *,
        name: str = "model",
        batch: int = 16,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.name = name
        self.batch = batch
        self.length: int = model.options.length
        self.image_id = model.vocabulary.special.get("image")
        self.eos_ids: frozenset[int] = _ends(template, tokenizer)

    def use_template(self, template: Template) -> None:
        """Write messages by another template, whose own end then ends an answer too."""
        self.template, self.eos_ids = template, _ends(template, self.tokenizer)

    @property
    def framing(self) -> Preprocess | None:
        """How the first picture stream resizes and crops; None for a model that reads none."""
        return next(iter(self.model.preprocesses().values()), None)

    def prepare_image(self, picture: Any, limits: PictureLimits | None = None) -> dict[str, NDArray[np.uint8]] | TiledPicture:
        """One picture as each picture stream of the model wants it, uint8 [3, S, S]; cut into its tiles [k, 3, S, S] where
        the model reads tiles. Raises BadPicture."""
        from vlm.runtime.pictures import DEFAULT_LIMITS, as_rgb

        rgb = as_rgb(picture, limits or DEFAULT_LIMITS)
        if self.model.tiling is not None:
            from vlm.runtime.tiled import cut_picture

            return cut_picture(rgb, self.model.tiling, self.model.preprocesses())
        return {name: preprocess.to_array(rgb) for name, preprocess in self.model.preprocesses().items()}

    def prompt(self, messages: Sequence[Message], pictures: Sequence[Prepared] = ()) -> Prompt:
        """The prompt of a conversation; pictures that no message places go where the template puts them.

        Raises DataError for a conversation that the template cannot write, and ValueError when a model that reads tiles is
        given a picture that `prepare_image` did not cut.
        """
        from vlm.runtime.generation import Prompt
        from vlm.runtime.pieces import TAG, PieceIds, encode_pieces
        from vlm.runtime.tiled import laid_out

        placed = self.template.with_pictures(messages, len(pictures))
        special = () if self.image_id is None else (self.image_id,)
        ids_of = PieceIds(self.tokenizer._core, special)
        pieces = self.template.pieces(placed, answer=False)
        pieces, places, rows = laid_out(pieces, pictures, self.model.preprocesses(), self.model.tiling)
        ids, role, _ = encode_pieces(pieces, ids_of, self.image_id, self.tokenizer.bos_id, self.tokenizer.eos_id)
        return Prompt(tuple(ids), rows, tuple(places), frozenset(at for at, own in enumerate(role) if own == TAG))

    def positions(self, prompt: Asked) -> int:
        """Positions of a prompt after its pictures are expanded."""
        from vlm.runtime.tiled import row_positions

        cost = self.model.picture_positions or 1
        return row_positions(prompt.ids, self.image_id, cost, prompt.places, prompt.tags, apart=self.model.tiles_apart)

    def stepper(self) -> TorchStepper:
        return TorchStepper(self.model)

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text; special tokens have none."""
        return self.tokenizer.decode(ids)

    @property
    def negatives(self) -> Negatives | None:
        """How contrastive decoding makes its negative prompts; None for a model without pictures."""
        from vlm.runtime.generation import Negatives

        return None if self.image_id is None else Negatives(self.image_id, self.tokenizer.pad_id)

    def answer_ids(self, text: str) -> list[int]:
        """The tokens of an answer as the template writes it, the one that ends it included."""
        from vlm.runtime.pieces import ANSWER, Piece, PieceIds, encode_pieces

        special = () if self.image_id is None else (self.image_id,)
        pieces = [Piece("text", self.template.answer_lead + text, ANSWER, True), self.template.end_piece]
        ids_of = PieceIds(self.tokenizer._core, special)
        return encode_pieces(pieces, ids_of, self.image_id, self.tokenizer.bos_id, self.tokenizer.eos_id)[0]

    def nats(self, prompts: Sequence[Asked], answers: Sequence[Sequence[int] | str]) -> list[NDArray[np.float64]]:
        """-log p of each token of each answer after its prompt, the answer's own tokens given: float64 [len(answer)].

        An answer is ids, or text that becomes ids as in `answer_ids`. float32 logits, log-sum-exp in float64. No ids
        give an empty row.
        """
        rows = [self.answer_ids(answer) if isinstance(answer, str) else list(answer) for answer in answers]
        out: list[NDArray[np.float64]] = []
        for start in range(0, len(prompts), self.batch):
            part = prompts[start : start + self.batch]
            out += self._nats(part, rows[start : start + len(part)])
        return out

    def shape(self) -> GeneratorShape:
        """Parameters of each part, towers and decoder. Gated cross blocks count as parameters alone."""
        from vlm.evaluation.flops import GeneratorShape, TowerShape, TrunkShape

        model: Any = self.model
        language = language_part(self.model)
        count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        towers, seen = {}, {}
        if language is not model:
            weights = sum(p.numel() for p in model.connector.parameters() if p.dim() >= 2)
            for number, (name, stream) in enumerate(model.options.picture_streams().items()):
                tower = model.options.towers[name]
                vit = tower.vit()
                trunk = TrunkShape.of(vit.trunk().model_copy(update={"depth": tower.stop}))
                positions = vit.patches + vit.class_token
                # One connector reads the towers' tokens together: it is counted with the first.
                pairs = () if vit.plan is None else vit.plan.pairs[: tower.stop]
                towers[stream] = TowerShape(trunk, positions, 3 * vit.patch_size**2, 0 if number else weights, pairs)
                seen[stream] = 0 if number else model.picture_tokens
        else:
            count = {"language": sum(p.numel() for p in model.parameters())}
        decoder = TrunkShape.of(language.options.trunk())
        return GeneratorShape({k: v for k, v in count.items() if v}, towers, seen, decoder, language.tokens.num_embeddings)

    def kept(self, prompt: Asked) -> list[int]:
        """[L] positions that each layer of the decoder reads of a prompt, after its pictures are expanded."""
        from vlm.models.cache import DecoderCache

        stepper = self.stepper()
        stepper.start([prompt])
        cache = stepper._started()
        if not isinstance(cache, DecoderCache):  # which keeps states of them, but has read all
            return [int(n) for n in cache.next_position[0]]
        return [int(layer.mask.sum()) for layer in cache.layers]

    def _nats(self, prompts: Sequence[Asked], answers: Sequence[Sequence[int]]) -> list[NDArray[np.float64]]:
        import torch

        from vlm.types import Batch, Vocabulary

        text, answered = rows_of([list(p.ids) for p in prompts], [list(a) for a in answers], [p.tags for p in prompts])
        count = len(prompts)
        zeros = torch.zeros(count, dtype=torch.int64)
        streams: dict[str, Any] = {"text": text, **pictures_of(prompts)}
        batch = Batch(streams, [f"prompt {i}" for i in range(count)], torch.arange(count), zeros)
        with evaluating(self.model) as device:
            output = self.model.encode(batch.to(device), {"text": frozenset({"vocabulary"})})["text"]
            vocabulary, layout = output.vocabulary, output.layout
            assert vocabulary is not None
            assert layout is not None
            # The label of a position is its own token: its logits are those of the position before.
            chosen = layout.label[:, 1:] >= 0
            hidden = vocabulary.hidden[:, :-1][chosen]
            target = layout.label[:, 1:][chosen]
            parts = []
            step = max(1, 2**25 // len(vocabulary.weight))
            for begin in range(0, len(hidden), step):
                given = Vocabulary(hidden[None, begin : begin + step], vocabulary.weight, vocabulary.bias, vocabulary.softcap)
                logits = given.logits()[0].double()
                parts.append(logits.logsumexp(1) - logits.gather(1, target[begin : begin + step, None])[:, 0])
            flat = torch.cat(parts).cpu().numpy() if parts else np.zeros(0)
        return np.split(flat, np.cumsum(answered)[:-1])


def open_generator(model: Model, tokenizer: Tokenizer, *, name: str = "model") -> TorchGenerator:
    """A model with the template that its options name.

    Raises DataError for a template that is not known, RequestError for a model that writes nothing.
    """
    from vlm.models import LanguageModel, VisionLanguageModel
    from vlm.runtime.templates import template_named

    if not isinstance(model, LanguageModel | VisionLanguageModel):
        raise RequestError(f"a {model.kind} model writes no text", remedy="give a language model or a vision-language model")
    return TorchGenerator(model, tokenizer, template_named(getattr(model.options, "template", "plain")), name=name)


def language_part(model: LanguageModel | VisionLanguageModel) -> LanguageModel:
    """The language model, by itself or inside."""
    found: Any = model
    inner: LanguageModel = getattr(found, "language", found)
    return inner


def rows_of(
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]] | None = None,
    tags: Sequence[frozenset[int]] | None = None,
) -> tuple[TokenIds, list[int]]:
    """Right-padded rows of prompts, and of their answers behind them; and how many tokens each answer has.

    All of a prompt is instruction but its tags, indices of ids; the answer is supervised. Raises ValueError for an empty prompt:
    nothing would predict the token after it.
    """
    import torch

    from vlm.types import TokenIds
    from vlm.types.batch import Role

    answers = [[] for _ in prompts] if answers is None else answers
    sizes = [(len(p), len(a)) for p, a in zip(prompts, answers, strict=True)]
    for row, (size, _) in enumerate(sizes):
        if not size:
            raise ValueError(f"prompt {row} is empty: a row needs at least one token, such as bos")
    shape = (len(prompts), max((p + a for p, a in sizes), default=0))
    ids, role = torch.zeros(shape, dtype=torch.int64), torch.full(shape, int(Role.CONTEXT))
    mask, supervised = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, answer, (start, more)) in enumerate(zip(prompts, answers, sizes)):
        ids[row, : start + more] = torch.tensor(prompt + answer, dtype=torch.int64)
        mask[row, : start + more] = True
        role[row, :start], role[row, start : start + more] = int(Role.INSTRUCTION), int(Role.ANSWER)
        supervised[row, start : start + more] = True
        if tags is not None and tags[row]:
            role[row, torch.tensor(sorted(tags[row]))] = int(Role.TAG)
    stream = TokenIds(ids, mask, torch.arange(len(prompts)), supervised=supervised, role=role)
    return stream, [more for _, more in sizes]


def pictures_of(prompts: Sequence[Asked]) -> dict[str, Pictures]:
    """The prompts' pictures by stream, in order; streams that no prompt has are left out.

    Where a prompt says the places of its tiles, so must all that have pictures. Raises ValueError.
    """
    import torch

    from vlm.types import Pictures

    out = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt.pictures):
        rows = [(row, slot, p) for row, prompt in enumerate(prompts) for slot, p in enumerate(prompt.pictures.get(name, ()))]
        if rows:
            index, slots, values = zip(*rows)
            place = None
            if any(prompt.places for prompt in prompts):
                places = [at for prompt in prompts if prompt.pictures.get(name) for at in prompt.places]
                if len(places) != len(rows):
                    raise ValueError(f"{len(rows)} rows of pictures in {name!r}, places of {len(places)}")
                slots = tuple(number for number, _, _ in places)
                place = torch.tensor([(0, row, column) for _, row, column in places])
            stacked = torch.from_numpy(np.stack(values))
            mask = torch.ones(len(rows), dtype=torch.bool)
            out[name] = Pictures(stacked, mask, torch.tensor(index), torch.tensor(slots), place)
    return out


def _ends(template: Template, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer: those of the tokenizer, and what the template writes after one where it is one token."""
    from vlm.runtime.pieces import PieceIds

    return tokenizer.end_ids | template.end_ids(PieceIds(tokenizer._core), tokenizer.eos_id)


def _numbers(logits: torch.Tensor) -> Floats:
    return logits.float().cpu().numpy()
