"""The Swin tower. B pictures, S their side, C channels of the first stage, K = C 2^(stages - 1) of the last, P its positions."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.models.swin.blocks import PatchMerging, SwinBlock
from vlm.models.swin.options import StageShape, SwinOptions


class SwinStage(nn.Module):
    """Blocks of one width, every second one shifted; then the map is halved, but after the last stage."""

    def __init__(self, options: SwinOptions, shape: StageShape, *, drops: list[float], first: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(options, shape, shift=shape.shift if number % 2 else 0, drop=drop) for number, drop in enumerate(drops)
        )
        every = options.main_norm_every
        self.main_norms = nn.ModuleDict(
            {
                str(number): nn.LayerNorm(shape.width, eps=options.norm_eps)
                for number in range(shape.depth)
                if every and (first + number + 1) % every == 0
            }
        )
        self.merge = None if last else PatchMerging(shape.width)


class SwinTower(nn.Module):
    """Pictures [B, 3, S, S], already normalised, to pooled vectors [B, E] and tokens [B, P, E]. Any S; the windows stay."""

    def __init__(self, options: SwinOptions, embed_dim: int, *, project: bool = True) -> None:
        super().__init__()
        self.options = options
        c, p = options.width, options.patch_size
        self.patch = nn.Linear(3 * p * p, c)
        self.patch_norm = nn.LayerNorm(c)
        self.mask_token = nn.Parameter(torch.zeros(c)) if options.mask_token else None
        total = sum(options.depths)
        drops = [options.drop_path * i / max(1, total - 1) for i in range(total)]
        shapes = options.stages
        stages, first = [], 0
        for shape in shapes:
            stages.append(SwinStage(options, shape, drops=drops[first : first + shape.depth], first=first, last=shape is shapes[-1]))
            first += shape.depth
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(options.out_width, eps=options.norm_eps)
        self.projection = nn.Linear(options.out_width, embed_dim, bias=False) if project else None
        self.recompute = False
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith((".position.hidden", ".position.out")):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=self.options.out_width**-0.5)

    def forward(
        self, pixels: Tensor, collect: Collection[int] = (), masked: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """pixels [B, 3, S, S] -> (tokens after the final norm [B, P, K], pooled [B, K], hidden states).

        masked: bool [B, g, g], squares of the picture that are hidden: their patches become the mask token. Hidden
        state 0 is the input of the first block, l the output of block l counted over all stages, [B, H W, channels].
        Raises ValueError for a mask without a mask token, or one that does not fall on patches.
        """
        x = self.stem(pixels, masked)
        hidden = {0: x.flatten(1, 2)} if 0 in collect else {}
        layer = 0
        for stage in self.stages:
            assert isinstance(stage, SwinStage)
            for number, block in enumerate(stage.blocks):
                if self.recompute and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
                if str(number) in stage.main_norms:
                    x = stage.main_norms[str(number)](x)
                layer += 1
                if layer in collect:
                    hidden[layer] = x.flatten(1, 2)
            x = x if stage.merge is None else stage.merge(x)
        x = self.norm(x.flatten(1, 2))
        return x, x.mean(1), hidden

    def stem(self, pixels: Tensor, masked: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] -> [B, H, W, C], the picture padded with zeros to whole patches."""
        p = self.options.patch_size
        if pixels.shape[2] % p or pixels.shape[3] % p:
            pixels = F.pad(pixels, (0, -pixels.shape[3] % p, 0, -pixels.shape[2] % p))
        b, channels, h, w = pixels.shape
        x = pixels.reshape(b, channels, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        x = self.patch_norm(self.patch(x.reshape(b, h // p, w // p, channels * p * p)))
        if masked is None:
            return x
        if self.mask_token is None:
            raise ValueError("masked pictures need model.tower.mask_token = true")
        if masked.ndim != 3 or x.shape[1] % masked.shape[1] or x.shape[2] % masked.shape[2]:
            raise ValueError(f"a mask {tuple(masked.shape)} does not fall on the {x.shape[1]} x {x.shape[2]} patches of a picture")
        squares = masked.repeat_interleave(x.shape[1] // masked.shape[1], 1).repeat_interleave(x.shape[2] // masked.shape[2], 2)
        return torch.where(squares[..., None], self.mask_token.to(x.dtype), x)

    def project(self, x: Tensor) -> Tensor:
        return x if self.projection is None else self.projection(x)

    def embed(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, E], not normalised."""
        return self.project(self(pixels)[1])

    def patch_tokens(self, x: Tensor) -> Tensor:
        """Tokens of the tower's output in the embedding's space: [B, P, K] -> [B, P, E]."""
        return self.project(x)
