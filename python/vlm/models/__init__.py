"""Model families; `catalogue.py` lists them."""

from vlm.models.base import Model
from vlm.models.catalogue import ModelOptions
from vlm.models.directory import load_model, save_model
from vlm.models.dual_encoder import DualEncoder, DualEncoderOptions
from vlm.models.language import LanguageModel, LanguageOptions
from vlm.models.vision import VisionModel, VisionOptions
from vlm.models.vision_language import VisionLanguageModel, VisionLanguageOptions

__all__ = [
    "DualEncoder",
    "DualEncoderOptions",
    "LanguageModel",
    "LanguageOptions",
    "Model",
    "ModelOptions",
    "VisionLanguageModel",
    "VisionLanguageOptions",
    "VisionModel",
    "VisionOptions",
    "load_model",
    "save_model",
]
