"""Run a bundle without torch: numpy, onnxruntime, tokenizers and Pillow only."""

from vlm.runtime.bundle import Bundle, LanguageBundle, open_any_bundle, open_bundle
from vlm.runtime.embedder import Embedder, Picture, PreparingEmbedder, probabilities, scores
from vlm.runtime.manifest import is_bundle

__all__ = [
    "Bundle",
    "Embedder",
    "LanguageBundle",
    "Picture",
    "PreparingEmbedder",
    "is_bundle",
    "open_any_bundle",
    "open_bundle",
    "probabilities",
    "scores",
]
