"""The tower of clips. n frames, B clips, T frames of the longest, N tokens of a frame, P patches, E width of the vector."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.models.towers import VisionTransformer
from vlm.models.video.clips import Clips
from vlm.models.video.options import DividedOptions, MessageTokenOptions, VideoOptions
from vlm.models.video.temporal import Divided, Integration, MessageToken
from vlm.types import Outputs, Pictures
from vlm.types.outputs import layers_of


class VideoTower(VisionTransformer):
    """Frames [n, 3, S, S], already normalised, to one vector of each clip [B, E].

    The tensors of the frames' own tower have the names of a `vit`. A picture alone is a clip of one frame.
    """

    def __init__(self, options: VideoOptions, embed_dim: int, *, project: bool = True) -> None:
        super().__init__(options.vit(), embed_dim, project=project)
        self.video = options
        shape, temporal = options.trunk(), options.temporal
        self.across: nn.ModuleList | None = None
        self.frame_position: nn.Parameter | None = None
        if isinstance(temporal, MessageTokenOptions):
            self.across = nn.ModuleList(MessageToken(shape) for _ in range(options.depth))
        elif isinstance(temporal, DividedOptions):
            self.across = nn.ModuleList(Divided(shape, zero_init=temporal.zero_init) for _ in range(options.depth))
            if temporal.positions:
                self.frame_position = nn.Parameter(torch.zeros(options.frames, options.width))
        width = embed_dim if project else options.width
        layers = options.integration.layers
        self.integration = Integration(options.integration, width, options.frames, shape) if layers else None

    def forward(
        self, pixels: Tensor, collect: Collection[int] = (), clips: Clips | None = None
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """pixels [n, 3, S, S] -> (tokens of the frames before pooling [n, N, C], vectors of the clips in the embedding's space
        [B, E], hidden states of the frames). clips: which rows belong together; None: each is a clip of its own."""
        clips = Clips.single(pixels) if clips is None else clips
        x, hidden = self.frames(self.stem(pixels), clips, collect)
        x, pooled = self.pooled_frames(x)
        vectors = self.project(pooled)
        return x, clips.mean(clips.gather(vectors)) if self.integration is None else self.integration(vectors, clips), hidden

    def frames(self, x: Tensor, clips: Clips, collect: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """x [n, N, C] of `stem` through all blocks."""
        if self.frame_position is not None:
            x = x + self.frame_position[clips.number][:, None]
        if self.across is None:
            return self.trunk(x, collect=collect)
        hidden = {0: x} if 0 in collect else {}
        for layer, (block, across) in enumerate(zip(self.trunk.blocks, self.across), start=1):
            if self.trunk.recompute and torch.is_grad_enabled():
                x = checkpoint(across, block, x, clips, use_reentrant=False)
            else:
                x = across(block, x, clips)
            if layer in collect:
                hidden[layer] = x
        return x, hidden

    def pooled_frames(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, N, C] after the blocks -> (tokens as `patch_tokens` takes them, vectors of the frames [n, C])."""
        if self.options.pool == "cls":
            return x, self.post_norm(x[:, 0])
        x = self.post_norm(x)
        return x, x.mean(1) if self.pool is None else self.pool(x)

    def embed(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S], each a clip of one frame, -> [n, E], not normalised."""
        return self(pixels)[1]

    def outputs(self, stream: Pictures, pixels: Tensor, fields: frozenset[str]) -> Outputs:
        """What a model says of a stream of frames: one row a clip.

        embedding [B, E], also where logits are asked for; tokens [B, T P, E] and hidden states [B, T N, C] frame by frame, zeros where a clip is shorter.
        """
        clips = Clips.of(stream, self.video.frames)
        if not clips.whole:
            pixels = torch.where(stream.mask[:, None, None, None], pixels, 0.0)
        x, vector, hidden = self(pixels, layers_of(fields), clips)
        tokens = clips.gather(self.patch_tokens(x)) if "tokens" in fields else None
        return Outputs(
            sample_index=clips.sample_index,
            mask=clips.mask.any(1),
            embedding=vector if fields & {"embedding", "logits"} else None,
            tokens=None if tokens is None else tokens.flatten(1, 2),
            token_mask=None if tokens is None else clips.mask[..., None].expand(tokens.shape[:3]).flatten(1, 2),
            hidden={layer: clips.gather(h).flatten(1, 2) for layer, h in hidden.items()},
        )
