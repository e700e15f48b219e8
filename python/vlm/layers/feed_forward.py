"""The feed-forward layer of a block."""

from __future__ import annotations

from torch import Tensor, nn

from vlm.layers.activations import activation_of
from vlm.layers.options import TrunkOptions


class FeedForward(nn.Module):
    """Two or three linear layers around an activation."""

    def __init__(self, options: TrunkOptions) -> None:
        super().__init__()
        self.gate = nn.Linear(options.width, options.ffn_width, bias=options.bias) if options.ffn == "gated" else None
        self.up = nn.Linear(options.width, options.ffn_width, bias=options.bias)
        self.down = nn.Linear(options.ffn_width, options.width, bias=options.bias)
        self.activation = activation_of(options.activation)

    def initialise(self, width: int, depth: int) -> None:
        """Depth-scaled normal initialisation of the CLIP paper's text tower."""
        for wide in (self.up, self.gate):
            if wide is not None:
                nn.init.normal_(wide.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.down.weight, std=width**-0.5 * (2 * depth) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))
