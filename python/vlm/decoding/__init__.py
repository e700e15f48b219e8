"""The `[decoding]` table: how a model's answers are written.

The catalogue is `DecodingOptions`: the union of the kinds below, of which there is one. A new kind is one file and one
entry here, `Annotated[GenerateOptions | ..., Field(discriminator="kind")]`.
"""

from vlm.decoding.generate import CalibrateOptions, ContrastOptions, GenerateOptions

DecodingOptions = GenerateOptions

__all__ = ["CalibrateOptions", "ContrastOptions", "DecodingOptions", "GenerateOptions"]
