"""Objectives. The catalogue is the union below: a new objective is one file and one entry here."""

from typing import Annotated

from pydantic import Field

from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.objectives.classification import ClassificationOptions
from vlm.objectives.contrastive import ContrastiveOptions
from vlm.objectives.distill import DistillOptions
from vlm.objectives.grouping import GroupingOptions
from vlm.objectives.keep_ratio import KeepRatioOptions
from vlm.objectives.masked_pixels import MaskedPixelsOptions
from vlm.objectives.preference import PreferenceOptions
from vlm.objectives.ranking import RankingOptions
from vlm.objectives.replaced_token import ReplacedTokenOptions
from vlm.objectives.sequence_align import SequenceAlignOptions
from vlm.objectives.token_ce import TokenCrossEntropyOptions

AnyObjective = Annotated[
    ClassificationOptions
    | ContrastiveOptions
    | DistillOptions
    | GroupingOptions
    | KeepRatioOptions
    | MaskedPixelsOptions
    | PreferenceOptions
    | RankingOptions
    | ReplacedTokenOptions
    | SequenceAlignOptions
    | TokenCrossEntropyOptions,
    Field(discriminator="kind"),
]

__all__ = [
    "AnyObjective",
    "BuildContext",
    "ClassificationOptions",
    "ContrastiveOptions",
    "DistillOptions",
    "GroupingOptions",
    "KeepRatioOptions",
    "MaskedPixelsOptions",
    "Objective",
    "ObjectiveOptions",
    "PreferenceOptions",
    "RankingOptions",
    "ReplacedTokenOptions",
    "SequenceAlignOptions",
    "TokenCrossEntropyOptions",
]
