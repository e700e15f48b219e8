"""A selective state-space layer as a mixer: `mixer = { kind = "ssm" }`. Source: tokenunify (the layer is Mamba's).

n rows, S positions, C width, I inner channels, K width of the convolution.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlm import ops
from vlm.attention.mixer import MixerCost, MixerShape, Places, State
from vlm.config.options import Options
from vlm.ops.linear_decay_reference import runs_of


class SsmOptions(Options):
    """A causal convolution by channel, a selective scan, a gate; linear in length."""

    kind: Literal["ssm"] = "ssm"
    states: int = Field(16, gt=0, description="numbers that each inner channel keeps")
    expand: int = Field(2, gt=0, description="inner channels for each channel")
    convolution: int = Field(4, ge=1, description="positions that the convolution sees")
    step_rank: int | None = Field(None, gt=0, description="width through which the steps are made; default: C / 16")

    @property
    def exports(self) -> bool:
        """Whether a graph of whole rows can be exported: in standard operators the scan needs memory of [S, S, I, states]."""
        return False

    def cost(self, shape: MixerShape) -> MixerCost:
        """Of I = expand C inner channels: projections 2 C 2 I in, 2 I (R + 2 S) and 2 R I for the steps, 2 I C out; the
        convolution 2 I K; the scan 6 I S: it decays a state, adds to it and reads it."""
        inner, rank = self.expand * shape.width, self.step_rank or max(1, shape.width // 16)
        projections = 2 * shape.width * inner + inner * (rank + 2 * self.states) + rank * inner + inner * shape.width
        flops = 2 * projections + 2 * inner * self.convolution + 6 * inner * self.states
        return MixerCost(flops, inner * (self.convolution - 1 + self.states))

    def build(self, shape: MixerShape) -> SelectiveScan:
        return SelectiveScan(self, shape)


class SelectiveScan(nn.Module):
    """The state is the last K - 1 inputs of the convolution [n, K - 1, I] and the scan's [n, I, states] in float32."""

    def __init__(self, options: SsmOptions, shape: MixerShape) -> None:
        super().__init__()
        self.options = options
        inner, rank = options.expand * shape.width, options.step_rank or max(1, shape.width // 16)
        self.inner, self.rank = inner, rank
        self.enter = nn.Linear(shape.width, 2 * inner, bias=False)
        self.taps = nn.Parameter(torch.empty(inner, options.convolution))
        self.taps_bias = nn.Parameter(torch.zeros(inner))
        self.choose = nn.Linear(inner, rank + 2 * options.states, bias=False)
        self.step = nn.Linear(rank, inner)
        self.log_rate = nn.Parameter(torch.arange(1, options.states + 1).float().log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, shape.width, bias=False)
        nn.init.normal_(self.enter.weight, std=shape.width**-0.5)
        nn.init.uniform_(self.taps, -(options.convolution**-0.5), options.convolution**-0.5)
        nn.init.normal_(self.choose.weight, std=inner**-0.5)
        nn.init.uniform_(self.step.weight, -(rank**-0.5), rank**-0.5)
        # Steps between 0.001 and 0.1, even in their logarithm.
        steps = torch.exp(torch.rand(inner) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        with torch.no_grad():
            self.step.bias.copy_(steps + torch.log(-torch.expm1(-steps)))
        nn.init.normal_(self.out.weight, std=inner**-0.5 * (2 * shape.depth) ** -0.5)

    def forward(self, x: Tensor, places: Places, state: State | None) -> tuple[Tensor, State]:
        """See `vlm.attention.mixer.Mixer`."""
        inside, gate = self.enter(x).chunk(2, -1)
        mask, segment, back = places.mask, places.segment, None
        if mask is not None:  # what exists moves to the front, so that the convolution sees neighbours only
            order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
            back = torch.argsort(order, dim=1)
            inside, mask = _along(inside, order), mask.gather(1, order)
            segment = None if segment is None else segment.gather(1, order)
        mixed, tail = self._convolve(inside, mask, segment, None if state is None else state[0])
        mixed = F.silu(mixed)
        rank, b, c = self.choose(mixed).split([self.rank, self.options.states, self.options.states], -1)
        mixed, last = ops.ssm_scan(mixed, self.step(rank), -self.log_rate.float().exp(), b, c, self.skip,
                                   state=None if state is None else state[1], key_mask=mask, segment=segment)
        mixed = mixed if back is None else _along(mixed, back)
        return self.out(mixed * F.silu(gate)), (tail, last)

    def _convolve(self, x: Tensor, mask: Tensor | None, segment: Tensor | None, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each channel by itself over the last K positions of its document: (x, the inputs that the next position sees)."""
        before, length = self.options.convolution - 1, x.shape[1]
        tail = x.new_zeros(x.shape[0], before, self.inner) if tail is None else tail.to(x.dtype)
        reach = torch.cat([tail, x], 1)
        run = None if segment is None else F.pad(runs_of(segment, mask), (before, 0))
        out = self.taps_bias.to(x.dtype)
        for tap in range(before + 1):
            seen = reach[:, tap : tap + length]
            if run is not None:
                seen = seen * (run[:, tap : tap + length] == run[:, before:])[..., None]
            out = out + seen * self.taps[:, tap].to(x.dtype)
        if mask is None:
            return out, reach[:, length:]
        place = mask.sum(1, keepdim=True) + torch.arange(before, device=x.device)
        return out, _along(reach, place)


def _along(x: Tensor, index: Tensor) -> Tensor:
    """x [n, S, I] at positions [n, T]"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
