"""Model families. The catalogue is the union below: a new family is one file and one entry here."""

from typing import Annotated

from pydantic import Field

from vlm.models.base import Model
from vlm.models.directory import load_model, save_model
from vlm.models.dual_encoder import DualEncoder, DualEncoderOptions
from vlm.models.language import LanguageModel, LanguageOptions

ModelOptions = Annotated[DualEncoderOptions | LanguageOptions, Field(discriminator="kind")]

__all__ = [
    "DualEncoder",
    "DualEncoderOptions",
    "LanguageModel",
    "LanguageOptions",
    "Model",
    "ModelOptions",
    "load_model",
    "save_model",
]
