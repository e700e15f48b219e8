"""The catalogue of model families: a new family is one file and one entry here."""

from typing import Annotated

from pydantic import Field

from vlm.models.dual_encoder import DualEncoderOptions
from vlm.models.language import LanguageOptions
from vlm.models.vision import VisionOptions
from vlm.models.vision_language import VisionLanguageOptions

ModelOptions = Annotated[
    DualEncoderOptions
    | LanguageOptions
    | VisionLanguageOptions
    | VisionOptions,
    Field(discriminator="kind"),
]
