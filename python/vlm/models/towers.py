"""Vision and text towers of dual encoders, in the published CLIP and SigLIP shapes and between.

B pictures or texts, P patches, T tokens, C width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlm.config.options import Options
from vlm.layers import Activation, Attention, FeedForward, Trunk, TrunkOptions
from vlm.models.context import Context, ContextOptions
from vlm.models.merging import Merged, run_merging
from vlm.models.mix_style import MixStyleOptions, drawn_mix
from vlm.tokens import MergePlan, TowerMergeOptions


class TowerOptions(Options):
    """What both towers have."""

    width: int = Field(gt=0, description="channels")
    depth: int = Field(gt=0, description="number of blocks")
    heads: int = Field(gt=0, description="attention heads")
    ffn_ratio: float = Field(4.0, gt=0, description="feed-forward width over width")
    activation: Activation = "gelu"
    norm_eps: float = Field(1e-5, gt=0)

    @property
    def ffn_width(self) -> int:
        return round(self.width * self.ffn_ratio)

    def trunk(self) -> TrunkOptions:
        return TrunkOptions(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            ffn_width=self.ffn_width,
            activation=self.activation,
            norm_eps=self.norm_eps,
        )


class VitOptions(TowerOptions):
    """A vision transformer over square patches."""

    kind: Literal["vit"] = "vit"
    image_size: int = Field(gt=0, description="side of the picture in pixels")
    patch_size: int = Field(gt=0, description="side of a patch in pixels")
    drop_remainder: bool = Field(False, description="leave out pixels at the right and the bottom that fill no patch, instead of refusing them")
    class_token: bool = Field(True, description="prepend a learned token")
    patch_bias: bool = Field(False, description="bias in the patch embedding")
    pre_norm: bool = Field(True, description="layer norm before the first block")
    pool: Literal["cls", "mean", "attention"] = Field("cls", description="how tokens become one vector")
    mix_style: MixStyleOptions | None = Field(None, description="in training, look like other pictures of the batch; none: off")
    merge: TowerMergeOptions | None = Field(None, description="merge similar tokens between layers; none: keep all")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def plan(self) -> MergePlan | None:
        """What each layer merges."""
        if self.merge is None:
            return None
        return self.merge.plan(self.depth, self.patches + self.class_token, class_token=self.class_token)

    def left(self, layers: int) -> int:
        """Tokens after so many layers, the class token included."""
        tokens = self.patches + self.class_token
        return tokens if self.plan is None else self.plan.left(tokens, layers)

    @model_validator(mode="after")
    def _class_token_stays(self) -> VitOptions:
        if self.merge is not None and self.class_token and self.merge.match.protect == 0:
            raise ValueError("merge.match.protect is 0: the class token would be merged")
        return self


class TextOptions(TowerOptions):
    """A text transformer with learned positions."""

    kind: Literal["transformer"] = "transformer"
    length: int = Field(gt=0, description="greatest number of tokens T")
    vocab_size: int | None = Field(None, gt=0, description="number of token ids; default: the tokenizer's")
    attention: Literal["causal", "bidirectional"] = "causal"
    mask_padding: bool = Field(True, description="bidirectional only: padding is not attended to")
    pool: Literal["eos", "last", "mean", "cls"] = Field("eos", description="how tokens become one vector")
    projection_bias: bool = Field(False, description="bias in the projection to the embedding")
    eos_id: int | None = Field(None, description="id at which pool = eos reads; default: the tokenizer's")
    prompt: ContextOptions | None = Field(None, description="learned vectors at its input; written by tuning.prompt")


TextTowerOptions = Annotated[TextOptions, Field()]


class AttentionPool(nn.Module):
    """One learned query attends all tokens, then a residual feed-forward layer (SigLIP's pooling head)."""

    def __init__(self, options: TrunkOptions) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, options.width) * options.width**-0.5)
        self.attention = Attention(options)
        self.norm = nn.LayerNorm(options.width, eps=options.norm_eps)
        self.ffn = FeedForward(options)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, C]; bias [B, 1, 1, N] is added to the logits."""
        y = self.attention(self.probe.expand(x.shape[0], -1, -1), context=x, bias=bias)
        return (y + self.ffn(self.norm(y)))[:, 0]


class VisionTransformer(nn.Module):
    """Pictures [B, 3, S, S], already normalised, to pooled vectors [B, E] and patch tokens [B, P, E]."""

    def __init__(self, options: VitOptions, embed_dim: int, *, project: bool = True) -> None:
        super().__init__()
        if options.image_size % options.patch_size and not (options.drop_remainder and options.patches):
            raise ValueError(f"image_size {options.image_size} is no multiple of patch_size {options.patch_size}")
        self.options = options
        c, p = options.width, options.patch_size
        self.patch = nn.Linear(3 * p * p, c, bias=options.patch_bias)
        self.class_token = nn.Parameter(torch.randn(c) * c**-0.5) if options.class_token else None
        self.position = nn.Parameter(torch.randn(options.patches + options.class_token, c) * c**-0.5)
        self.pre_norm = nn.LayerNorm(c, eps=options.norm_eps) if options.pre_norm else None
        self.trunk = Trunk(options.trunk())
        self.post_norm = nn.LayerNorm(c, eps=options.norm_eps)
        self.pool = AttentionPool(options.trunk()) if options.pool == "attention" else None
        self.projection = nn.Linear(c, embed_dim, bias=False) if project else None
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=c**-0.5)

    def patches(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, 3 p p], patches in raster order, each in the channel-row-column order of a
        convolution's weight."""
        p = self.options.patch_size
        if self.options.drop_remainder:  # as a convolution without padding does
            pixels = pixels[..., : pixels.shape[-2] // p * p, : pixels.shape[-1] // p * p]
        b, channels, h, w = pixels.shape
        x = pixels.reshape(b, channels, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(b, (h // p) * (w // p), channels * p * p)

    def forward(self, pixels: Tensor, collect: Collection[int] = ()) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """pixels [B, 3, S, S] -> (tokens before pooling [B, N, C], pooled [B, C], hidden states)."""
        run = self.run(self.stem(pixels), collect=collect)
        x = run.x
        if self.options.pool == "cls":
            return x, self.post_norm(x[:, 0]), run.hidden
        x = self.post_norm(x)
        if self.pool is not None:
            return x, self.pool(x, run.bias), run.hidden
        return x, x.mean(1) if run.sizes is None else (x * run.sizes[..., None]).sum(1) / run.sizes.sum(1, keepdim=True), run.hidden

    def run(self, x: Tensor, *, collect: Collection[int] = (), stop: int | None = None) -> Merged:
        """x [B, N, C] of `stem` through the first `stop` blocks, all if not given; pairs are merged where the options say so."""
        plan, merge = self.options.plan, self.options.merge
        if plan is None or (merge is not None and merge.when == "inference" and self.training):
            x, hidden = self.trunk(x, collect=collect, stop=stop)
            return Merged(x, hidden)
        return run_merging(self.trunk, x, plan, collect=collect, stop=stop)

    def stem(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, S, S] -> what the first block reads, [B, N, C]."""
        x = self.patch(self.patches(pixels))
        if self.training and self.options.mix_style is not None and len(x):
            x = drawn_mix(x, self.options.mix_style)
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self.position
        return x if self.pre_norm is None else self.pre_norm(x)

    def project(self, x: Tensor) -> Tensor:
        return x if self.projection is None else self.projection(x)

    def embed(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, E], not normalised."""
        return self.project(self(pixels)[1])

    def patch_tokens(self, x: Tensor) -> Tensor:
        """Patch tokens of the trunk's output in the embedding's space: [B, N, C] -> [B, P, E].

        They pass the same final norm and projection as the pooled token (dreamlip).
        """
        x = x[:, 1:] if self.class_token is not None else x
        return self.project(self.post_norm(x) if self.options.pool == "cls" else x)


class TextTransformer(nn.Module):
    """Token ids [B, T] to pooled vectors [B, E] and token vectors [B, T, E]."""

    def __init__(self, options: TextOptions, embed_dim: int) -> None:
        super().__init__()
        if options.vocab_size is None:
            raise ValueError("the text tower needs vocab_size, from the preset or the tokenizer")
        if options.pool == "eos" and options.eos_id is None:
            raise ValueError('pool = "eos" needs eos_id, from the preset or the tokenizer')
        self.options = options
        self.tokens = nn.Embedding(options.vocab_size, options.width)
        self.prompt = None if options.prompt is None else Context(options.prompt, options.width, options.eos_id)
        self.position = nn.Parameter(torch.randn(options.length, options.width) * 0.01)
        self.trunk = Trunk(options.trunk())
        self.post_norm = nn.LayerNorm(options.width, eps=options.norm_eps)
        self.projection = nn.Linear(options.width, embed_dim, bias=options.projection_bias)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.projection.weight, std=options.width**-0.5)

    def forward(
        self, ids: Tensor, mask: Tensor | None, collect: Collection[int] = ()
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """ids [B, T], mask [B, T] or None -> (tokens after the final norm [B, T, C], pooled [B, C], hidden)."""
        options = self.options
        x = self.embedded(ids) + self.position[: ids.shape[1]]
        causal = options.attention == "causal"
        # Right padding is invisible to a causal tower up to the token it pools at, so no mask is needed there.
        key_mask = mask if (not causal and options.mask_padding) else None
        x, hidden = self.trunk(x, causal=causal, key_mask=key_mask, collect=collect)
        x = self.post_norm(x)
        return x, self.pooled(x, ids if self.prompt is None else self.prompt.without(ids), mask), hidden

    def embedded(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, C], before positions are added: the vectors of ids, and of a learned prompt where it stands."""
        if self.prompt is None:
            return self.tokens(ids)
        return self.prompt(self.tokens(self.prompt.without(ids)), ids)

    def pooled(self, x: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        """One vector a row, [B, C]."""
        pool = self.options.pool
        if pool == "eos":
            if self.options.eos_id == 2:  # published CLIP configurations mean "the greatest id", see transformers
                at = ids.to(torch.int32).argmax(dim=-1)
            else:
                at = torch.eq(ids, self.options.eos_id).to(torch.int32).argmax(dim=-1)  # type: ignore[arg-type]
            return x.gather(1, at[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
        if pool == "mean":
            if mask is None:
                return x.mean(1)
            share = mask.to(x.dtype) / mask.sum(1, keepdim=True).clamp(min=1).to(x.dtype)
            return (share[:, None] @ x)[:, 0]
        return x[:, -1] if pool == "last" else x[:, 0]

    def embed(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T] -> [B, E], not normalised."""
        return self.projection(self(ids, mask)[1])


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine similarity of rows, [B, E] and [B', E] -> [B, B'], in float32."""
    return F.normalize(x.float(), dim=-1) @ F.normalize(y.float(), dim=-1).T
