"""ExportPart: one graph of a bundle, as a model describes it to the exporter."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class ExportPart:
    """module: takes `inputs` in their order and returns the tensors named in `outputs`.

    inputs: example tensors by graph input name. dynamic: input name -> {axis: name} of the axes that may vary.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
