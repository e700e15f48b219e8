"""Connectors: visual tokens of a tower to positions of a language model (`[model.connector]`).

The catalogue is the union below: a new connector is one file and one entry here.
"""

from typing import Annotated

from pydantic import Field

from vlm.connectors.base import Connector
from vlm.connectors.linear import LinearOptions
from vlm.connectors.mlp import MlpOptions
from vlm.connectors.qformer import QFormerOptions
from vlm.connectors.resampler import ResamplerOptions

ConnectorOptions = Annotated[
    LinearOptions | MlpOptions | QFormerOptions | ResamplerOptions,
    Field(discriminator="kind"),
]

__all__ = [
    "Connector",
    "ConnectorOptions",
    "LinearOptions",
    "MlpOptions",
    "QFormerOptions",
    "ResamplerOptions",
]
