"""ONNX bundles: export, parity check, int8 weights, publish."""

from vlm.export.bundle import export_bundle
from vlm.export.parity import Tolerance
from vlm.export.quantise import quantise_bundle

__all__ = ["Tolerance", "export_bundle", "quantise_bundle"]
