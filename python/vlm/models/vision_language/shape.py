"""What a model that reads pictures and answers is made of, and what its parts ask of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from vlm.attention import sees_all
from vlm.config.options import Options
from vlm.connectors import ConnectorOptions
from vlm.models.base import Model
from vlm.models.dual_encoder import PictureOptions
from vlm.models.language import LanguageOptions
from vlm.models.vision_language.options import FusionOptions, PrefixOptions, VitTowerOptions
from vlm.models.vision_language.parts import connector_of, language_of, tower_of
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.templates import TEMPLATES
from vlm.tokens import TokensOptions, TowerScore
from vlm.tokens.tiler import TilerOptions
from vlm.types import VocabularyLayout

IMAGE = "<image>"
"""The token that stands for a picture; the vocabulary calls its id `image`."""


class VisionLanguageShape(Options):
    """The options of the family, and whether its parts fit together; `VisionLanguageOptions` also builds the model."""

    kind: Literal["vision-language"] = "vision-language"
    towers: dict[str, Annotated[VitTowerOptions, Field()]] = Field(min_length=1, description="name -> vision tower")
    connector: ConnectorOptions = Field(description="from the towers' tokens to the language model's width")
    language: LanguageOptions | None = Field(None, description="the language model; default: the part's")
    fusion: FusionOptions = PrefixOptions()
    tiler: TilerOptions | None = Field(None, description="cut large pictures into tiles; none: a picture is one square")
    tokens: TokensOptions | None = Field(None, description="drop or merge visual positions; none: keep all")
    template: str = Field("plain", description="how messages become text: plain, vicuna, llama3 or chatml")
    length: int = Field(gt=0, description="greatest number of positions of a row, pictures expanded")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for name in self.towers:
            if not name.isidentifier():
                raise ValueError(f"towers.{name}: a name is made of letters, digits and _")
        if self.template not in TEMPLATES:
            raise ValueError(f"unknown template {self.template!r}, expected one of {', '.join(TEMPLATES)}")
        if not any(tower.is_open for tower in self.towers.values()):
            self.grid  # noqa: B018  refuses towers that do not fit
            self._check_pre()
        if self.language is not None:
            self._check_depth(self.language)
        if self.tokens is not None and self.tokens.keep is not None and self.fusion.kind != "prefix":
            left = "tiles beside the row" if self.fusion.kind == "hybrid" else "no visual positions to drop"
            raise ValueError(f'tokens: with fusion "{self.fusion.kind}" there are {left}')
        if self.fusion.kind == "hybrid" and (self.tiler is None or self.tiler.thumbnail == "none"):
            raise ValueError('fusion "hybrid" needs a tiler with thumbnails: they stand in the row, the tiles beside it')
        return self

    def _check_depth(self, language: LanguageOptions) -> None:
        if not isinstance(self.fusion, PrefixOptions) and self.fusion.every > language.depth:
            raise ValueError(f"fusion.every is {self.fusion.every} for {language.depth} blocks: no gated block would stand")
        if self.tokens is not None:
            self.tokens.plan(language.depth)
        drops = self.tokens is not None and self.tokens.keep is not None
        if language.attention is not None and not sees_all(language.attention) and (drops or self.fusion.kind != "prefix"):
            raise ValueError(f'language.attention "{language.attention.kind}" works with fusion "prefix" and without tokens.keep')

    def _check_pre(self) -> None:
        """Raises ValueError where the steps before the decoder cannot read the first tower."""
        if self.tokens is None or not self.tokens.pre:
            return
        (name, tower), step = next(iter(self.towers.items())), self.tokens.pre[0]
        if isinstance(step.score, TowerScore):
            if step.score.block(tower.vit().depth) >= tower.stop:
                raise ValueError(f"tokens.pre.0.score.layer is {step.score.layer}: towers.{name} is read before that block")
            if tower.merge is not None:
                raise ValueError(f"tokens.pre.0.score reads towers.{name}, whose tokens are merged: its attention is not of patches")
            if getattr(step.score, "query", "patches") == "class" and not tower.class_token:
                raise ValueError(f'tokens.pre.0.score.query is "class": towers.{name} has no class token')
        if step.needs_grid and self.grid is None:
            raise ValueError("tokens.pre.0 needs the towers' patches alone: set drop_class = true, without merge")

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the tokens that the connector reads; None where a class token is among them.

        Raises ValueError when the towers' tokens do not lie on one grid.
        """
        shapes = {name: (tower.grid, tower.tokens) for name, tower in self.towers.items()}
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{name} {grid[0]} x {grid[1]} ({tokens} tokens)" for name, (grid, tokens) in shapes.items())
            raise ValueError(f"the towers' tokens do not lie on one grid: {told}")
        grid, tokens = next(iter(shapes.values()))
        return grid if tokens == grid[0] * grid[1] else None

    @property
    def text_length(self) -> int:
        """Greatest number of positions of a row."""
        return self.length

    @property
    def text_part(self) -> str | None:
        """The part whose tokenizer a run takes, where that part is given."""
        return "language"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """What the tokenizer must have beside its own."""
        return (IMAGE,)

    @property
    def part_names(self) -> str:
        return ", ".join(["language", "connector", *(f"towers.{name}" for name in self.towers)])

    def picture_streams(self, context: str = "image") -> dict[str, str]:
        """Tower -> the picture stream that it reads."""
        return {name: context if number == 0 else f"{context}.{name}" for number, name in enumerate(self.towers)}

    def with_parts(self, parts: Mapping[str, Model]) -> Self:
        """The options with the shapes of parts from other models, by name of the part: `towers.NAME`, `language`.

        Raises ValueError for a name that is no part and for a model that has no such part.
        """
        towers, language, connector = dict(self.towers), self.language, self.connector
        for name, source in parts.items():
            head, _, tower = name.partition(".")
            if head == "towers" and tower in towers:
                towers[tower] = towers[tower].of_part(*tower_of(source, tower)[:2])
            elif name == "language":
                # The tokenizer may know more ids than the source: `filled` gives them rows.
                language = language_of(source).options if language is None else language
            elif name == "connector":
                connector_of(source)
                connector = source.options.connector  # type: ignore[attr-defined]
            else:
                raise ValueError(f"a vision-language model has no part {name!r} (its parts: {self.part_names})")
        changed: dict[str, Any] = {"towers": towers, "language": language, "connector": connector}
        return type(self).model_validate({name: getattr(self, name) for name in type(self).model_fields} | changed)

    def filled(self, vocabulary: VocabularyLayout) -> Self:
        """The options with what only the tokenizer knows. Raises ValueError while a part is open."""
        if self.language is None:
            raise ValueError('the model has no language model: give [model.language], or "language" in [start.parts]')
        for name, tower in self.towers.items():
            if tower.is_open:
                raise ValueError(f'towers.{name} has no shape: give it, or "towers.{name}" in [start.parts]')
        size = max(self.language.vocab_size or 0, vocabulary.size)
        return self.model_copy(update={"language": self.language.model_copy(update={"vocab_size": size})})

    def with_preprocess(self, preprocess: Preprocess) -> Self:
        """The options with a directory's own preprocessing, of the first tower."""
        name, tower = next(iter(self.towers.items()))
        if preprocess.size != tower.vit().image_size:
            raise ValueError(f"pictures of {preprocess.size} pixels for a tower of {tower.image_size}")
        own = PictureOptions(
            resize=preprocess.resize, interpolation=preprocess.interpolation, mean=preprocess.mean, std=preprocess.std
        )
        return self.model_copy(update={"towers": {**self.towers, name: tower.model_copy(update={"pictures": own})}})
