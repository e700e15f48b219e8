"""The `vision-language` family: pictures and texts to the vocabulary of a language model.

n rows of text, T tokens, S positions after the expansion, P rows of pictures, K visual tokens of a picture, C width,
V vocabulary. Sources: limber, infmllm, nvlm, pyramiddrop, povid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm.config.errors import RequestError
from vlm.models.base import Model, PixelNorm
from vlm.models.cross import Cross, GatedCrossBlock
from vlm.models.decoder import Cache, DecoderResult, run_decoder
from vlm.models.language import LanguageModel, layout_of
from vlm.models.towers import VisionTransformer
from vlm.models.vision_language.expand import (
    Visual,
    announced,
    beside,
    divided,
    expand,
    kept_share,
    mean_of_samples,
    place_pictures,
)
from vlm.models.vision_language.graphs import export_parts
from vlm.models.vision_language.options import CrossAttentionOptions, HybridOptions
from vlm.models.vision_language.parts import connector_of, copy_into, language_of, language_state, tower_of
from vlm.models.vision_language.shape import VisionLanguageShape
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.tiling import Tiling
from vlm.tokens import TokensOptions, TowerScore, TowerView, learned_steps, run_steps
from vlm.types import Batch, Outputs, Pictures, TokenIds, VocabularyLayout
from vlm.types.batch import Role
from vlm.types.export import ExportPart
from vlm.types.layout import Layout
from vlm.types.outputs import Wanted, layers_of


class VisionLanguageOptions(VisionLanguageShape):
    """Towers, a connector, a language model, and how they meet.

    Several towers read pictures of one sample; their tokens are laid side by side along the channels, so their grids
    must agree. The first one reads the stream `image`, the others `image.NAME`.
    """

    def build(self, vocabulary: VocabularyLayout) -> VisionLanguageModel:
        return VisionLanguageModel(self.filled(vocabulary), vocabulary)


class VisionLanguageModel(Model):
    """Texts read with pictures. `text` is read with the stream `image`, `text@NAME` with the stream NAME."""

    kind: ClassVar[str] = "vision-language"
    offers: ClassVar[dict[str, frozenset[str]]] = {"tokens": frozenset({"vocabulary", "hidden", "statistics"})}
    takes_context: ClassVar[bool] = True

    def __init__(self, options: VisionLanguageOptions, vocabulary: VocabularyLayout) -> None:
        super().__init__()
        if "image" not in vocabulary.special:
            raise ValueError("the vocabulary has no special token `image`: the tokenizer needs <image>")
        if options.language is None:
            raise ValueError("the options name no language model")
        self.options: VisionLanguageOptions = options
        self.vocabulary = vocabulary
        self.pixel_norms = nn.ModuleDict(
            {name: PixelNorm(tower.pictures.mean, tower.pictures.std) for name, tower in options.towers.items()}
        )
        self.towers = nn.ModuleDict({name: VisionTransformer(t.vit(), 1, project=False) for name, t in options.towers.items()})
        width = sum(tower.vit().width for tower in options.towers.values())
        self.connector = options.connector.build(width, options.language.width, options.grid)
        if options.tokens is not None and options.tokens.pre and options.tokens.pre[0].needs_grid:
            read = next(iter(options.towers.values())).tokens
            if self.connector.count(read) != read:
                raise ValueError(f"tokens.pre.0 reads patches, and the connector makes {self.connector.count(read)} tokens of {read}")
        self.reducers = learned_steps([] if options.tokens is None else options.tokens.pre, options.language.width)
        self.language = LanguageModel(options.language, vocabulary)
        self.cross = nn.ModuleDict()
        if isinstance(options.fusion, CrossAttentionOptions | HybridOptions):
            every, trunk = options.fusion.every, options.language.trunk()
            self.cross = nn.ModuleDict(
                {str(layer): GatedCrossBlock(trunk) for layer in range(every, options.language.depth + 1, every)}
            )

    # What it reads

    def preprocesses(self) -> dict[str, Preprocess]:
        streams = self.options.picture_streams()
        made = {streams[name]: tower.preprocess() for name, tower in self.options.towers.items()}
        if self.options.tiler is None:
            return made
        return {name: replace(preprocess, resize="squash") for name, preprocess in made.items()}

    @property
    def tiling(self) -> Tiling | None:
        """How pictures are cut, by the side of the first tower; every piece is squashed to the side of each tower."""
        tiler, tower = self.options.tiler, next(iter(self.options.towers.values()))
        return None if tiler is None else tiler.build(tower.vit().image_size)

    def preprocess(self) -> Preprocess:
        """How pictures of the stream `image` are prepared."""
        return self.preprocesses()["image"]

    @property
    def picture_tokens(self) -> int:
        """K: visual tokens of one row of pictures, after the connector and the steps of `tokens.pre`; with a threshold the most."""
        tower = next(iter(self.options.towers.values()))
        count = int(self.connector.count(tower.tokens))
        return count if self.options.tokens is None else self.options.tokens.left(count)

    @property
    def picture_positions(self) -> int | None:
        """Positions that the placeholder of one row of pictures becomes; None where it stays one token."""
        return None if self.options.fusion.kind == "cross-attention" else self.picture_tokens

    @property
    def training_positions(self) -> int | None:
        reduces = self.options.tokens is not None or any(tower.merge is not None for tower in self.options.towers.values())
        if self.picture_positions is None or not reduces:
            return self.picture_positions
        tower = next(iter(self.options.towers.values()))
        merges = tower.merge is not None and tower.merge.when == "always"
        read = tower.tokens if merges else tower.model_copy(update={"merge": None}).tokens
        count, tokens = int(self.connector.count(read)), self.options.tokens
        return count if tokens is None or tokens.when == "inference" else tokens.left(count)

    @property
    def tiles_apart(self) -> bool:
        return self.options.fusion.kind == "hybrid"

    @property
    def _reduction(self) -> TokensOptions | None:
        """What holds in the mode that the model is in."""
        tokens = self.options.tokens
        return None if tokens is not None and tokens.when == "inference" and self.training else tokens

    # Pictures

    def visual_tokens(self, pixels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """tower -> pixels [P, 3, S, S], normalised, to (visual tokens [P, K, C], mask [P, K] or None)."""
        return self._visual_tokens(pixels)[:2]

    def _visual_tokens(self, pixels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same, and the penalty of the share that learned steps keep [P], None without such a step."""
        parts: list[Tensor] = []
        pre = [] if self._reduction is None else self._reduction.pre
        view: TowerView | None = None
        for name, tower in self.options.towers.items():
            vision = self.towers[name]
            assert isinstance(vision, VisionTransformer)
            score = pre[0].score if pre and not parts else None  # the first tower's attention
            block = score.block(len(vision.trunk.blocks)) if isinstance(score, TowerScore) else None
            run = vision.run(vision.stem(pixels[name]), collect=() if block is None else (block,), stop=tower.stop)
            if block is not None:
                looking: Any = vision.trunk.blocks[block]
                view = TowerView(run.hidden[block], looking, int(tower.class_token))
            x = vision.post_norm(run.x) if tower.norm else run.x
            parts.append(x[:, 1:] if tower.class_token and tower.drop_class else x)
        out: tuple[Tensor, Tensor | None] = self.connector(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0], None)
        return run_steps(pre, self.reducers, *out, view, None if self.options.grid is None else self.options.grid[1])

    def _visual(self, streams: Mapping[str, Pictures], samples: int) -> Visual:
        """streams: tower -> its pictures, rows of all corresponding; a tower without a stream: no pictures."""
        weight = self.language.tokens.weight
        missing = [name for name in self.options.towers if name not in streams]
        if missing and len(missing) < len(self.options.towers):
            raise KeyError(f"the pictures of tower {missing[0]!r} are missing")
        if missing or not len(next(iter(streams.values()))):
            return Visual.none(samples, weight.shape[1], weight)
        first = streams[next(iter(self.options.towers))]
        for name, stream in streams.items():
            if not torch.equal(stream.sample_index, first.sample_index):
                raise ValueError(f"the pictures of tower {name!r} are not those of the first tower, row by row")
        pixels = {name: self.pixel_norms[name](stream.values) for name, stream in streams.items()}
        tokens, mask, penalty = self._visual_tokens(pixels)
        visual = Visual.of(tokens, mask, first, samples)
        return visual if penalty is None else replace(visual, penalty=mean_of_samples(penalty, first, samples))

    def _visual_of_batch(self, batch: Batch, context: str) -> Visual:
        names = self.options.picture_streams(context)
        streams = {}
        for tower, name in names.items():
            if name in batch:
                stream = batch[name]
                if not isinstance(stream, Pictures):
                    raise TypeError(f"the context of a text is pictures, stream {name!r} is {type(stream).__name__}")
                streams[tower] = stream
        return self._visual(streams, len(batch))

    # Texts

    def encode(self, batch: Batch, wanted: Wanted) -> dict[str, Outputs]:
        """Outputs by `stream[@context]`: `vocabulary`, `hidden:L` and `statistics`, with the layout of the expanded row.

        Pictures of one context are encoded once. Statistics: `kept_share` [n], share of a row's picture positions that
        reach the last layer, 1 without pictures; with a learned step `ratio_penalty` [n], see keep-ratio. Raises KeyError for a context that the batch lacks, ValueError naming
        the sample whose placeholders and pictures do not agree.
        """
        seen: dict[str | None, Visual] = {}
        out = {}
        for key, fields in wanted.items():
            name, at, context = key.partition("@")
            stream = batch[name]
            if not isinstance(stream, TokenIds):
                raise TypeError(f"a vision-language model reads tokens with pictures, stream {name!r} is {type(stream).__name__}")
            if at:
                batch[context]  # a context that was asked for by name must be there
            context = context or "image"
            shared = name in batch.shared
            source = None if shared else context
            if source not in seen:
                rows = int(stream.sample_index.max()) + 1 if len(stream) else 0
                weight = self.language.tokens.weight
                seen[source] = (
                    self._visual_of_batch(batch, context) if source is not None else Visual.none(rows, weight.shape[1], weight)
                )
            keys = [str(owner) for owner in range(len(seen[source].rows[0]))] if shared else batch.keys
            result, before = self._read(stream, seen[source], keys, name, context, fields)
            penalty = seen[source].penalty
            if shared:
                del seen[source]  # owners of another shared stream are others
            output = self.language.outputs(result, stream, fields)
            if "statistics" in fields:
                found = {"kept_share": kept_share(before, result.layout)}
                if penalty is not None:
                    found["ratio_penalty"] = penalty[stream.sample_index]
                output = replace(output, statistics=found)
            out[key] = output
        return out

    def _read(
        self,
        stream: TokenIds,
        visual: Visual,
        keys: Sequence[str],
        name: str,
        context: str,
        fields: frozenset[str],
        *,
        keep_cache: bool = False,
    ) -> tuple[DecoderResult, Layout]:
        places = place_pictures(stream, self.vocabulary.special["image"], visual, keys=keys, name=name, context=context)
        x, media, cross, reducer = self.language.tokens(stream.values), None, None, None
        if self.options.fusion.kind == "cross-attention":
            layout, media = beside(layout_of(stream), places, visual, announced(stream, places))
        elif self.options.fusion.kind == "hybrid":
            x, layout, media = divided(stream, x, places, visual, announced(stream, places))
        else:
            x, layout = expand(stream, x, places, visual)
            if self._reduction is not None:
                reducer = self._reduction.reducer(layout, len(self.language.trunk.blocks))
        if media is not None:
            blocks = {int(layer): block for layer, block in self.cross.items() if isinstance(block, GatedCrossBlock)}
            cross = Cross(blocks, media)
        result = run_decoder(
            self.language.trunk, x, layout, keep_cache=keep_cache, reducer=reducer, cross=cross, collect=layers_of(fields)
        )
        return result, layout

    def prefill(self, text: TokenIds, pictures: Mapping[str, Pictures]) -> tuple[Tensor, Cache]:
        """Prompts and their pictures (picture stream -> rows) to (logits [n, V] of the token after each, the cache)."""
        samples = len(text)
        if text.role is None:  # all of a bare prompt is instruction
            text = replace(text, role=torch.where(text.mask, int(Role.INSTRUCTION), int(Role.CONTEXT)))
        names = self.options.picture_streams()
        visual = self._visual({tower: pictures[name] for tower, name in names.items() if name in pictures}, samples)
        keys = [f"prompt {row}" for row in range(samples)]
        result, _ = self._read(text, visual, keys, "prompt", "image", frozenset(), keep_cache=True)
        assert result.cache is not None
        return self.language.last_logits(result), result.cache

    def advance(self, ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """One more token a row, ids [n] -> (logits [n, V], the longer cache)."""
        return self.language.advance(ids, cache)

    def export_parts(self) -> dict[str, ExportPart]:
        return export_parts(self)

    # Parts from other models

    def take_part(self, name: str, source: Model) -> None:
        """Copy the weights of a part: `towers.NAME` from a dual encoder or a model of this family, `language` from a
        language model or one of this family, `connector` from one of this family.

        A language model with fewer ids gives the new ones the mean of its rows. Raises RequestError where there is no
        such part, CheckpointError for a tensor that is missing or misshapen.
        """
        head, _, tower = name.partition(".")
        if head == "towers" and tower in self.towers:
            mine: nn.Module = self.towers[tower]
        elif name in ("language", "connector"):
            mine = getattr(self, name)
        else:
            raise RequestError(f"a vision-language model has no part {name!r}", remedy=f"its parts: {self.options.part_names}")
        try:
            if head == "towers":
                state = tower_of(source, tower)[2]
            elif name == "language":
                state = language_state(language_of(source), self.language)
            else:
                state = connector_of(source).state_dict()
        except ValueError as error:
            raise RequestError(f"{name}: {error}") from error
        copy_into(mine, state, name)
