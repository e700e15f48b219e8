"""ONNX bundles: export, parity check, publish."""

from vlm.export.bundle import export_bundle
from vlm.export.parity import Tolerance

__all__ = ["Tolerance", "export_bundle"]
