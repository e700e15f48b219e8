"""The decoder as graphs where visual positions are dropped between layers. Sources: pyramiddrop, aim, vision-token-search.

b rows, s positions, K kept ones, C width, G key and value heads, D head width. A stage is the layers between two drops;
all its layers hold as many positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm.models.graphs import (
    LOWEST,
    Decoder,
    Rotary,
    cache_names,
    causal_bias,
    extend,
    kept_example,
    last_logits,
    new_inputs,
)
from vlm.tokens.score_options import AttentionFromRowsOptions, View
from vlm.types.export import ExportPart

if TYPE_CHECKING:
    from vlm.tokens.score_options import DecoderScore


class PrefillGraph(nn.Module):
    """Prompts of which visual positions are dropped by a score, that of the attention of the last text unless said.

    (inputs_embeds [b, s, C], attention_mask [b, s] int64, position_ids [b, s], picture_ids [b, s] int64: number of the
    picture of a visual position in its row, -1 elsewhere, and for each drop `kept.N` [K] int64, 0 to K - 1: as many
    places as any row keeps) -> (logits [b, V] after each prompt, present keys and values [b, G, K, D] of each layer,
    present_mask.N [b, K] int64 of each stage after a drop). Kept positions stand left. A picture has `counts` positions
    after a drop, of equal scores the lower ones; all where no text follows it.
    """

    def __init__(self, language: Decoder, counts: dict[int, int], score: DecoderScore | None = None, *, renumber: bool) -> None:
        """counts: layer after which is dropped -> visual positions that a picture keeps."""
        super().__init__()
        self.language, self.counts, self.renumber = language, dict(counts), renumber
        self.score = AttentionFromRowsOptions() if score is None else score

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, picture_ids: Tensor, *kept: Tensor
    ) -> tuple[Tensor, ...]:
        blocks: Any = self.language.trunk.blocks
        x, valid, position, picture = inputs_embeds, attention_mask > 0, position_ids, picture_ids
        bias, rotary = causal_bias(attention_mask, 0, x.shape[1])[0], self.language.trunk.rotary(position)
        present, masks, number = [], [attention_mask], numbers(picture)
        for layer, block in enumerate(blocks, start=1):
            before = x
            x, keys, values = extend(block, x, None, None, bias, rotary)
            present += [keys, values]
            if layer not in self.counts:
                continue
            if isinstance(self.score, AttentionFromRowsOptions):
                looking, read = (blocks[layer], x) if self.score.norm == "next-layer" else (block, before)
                score, seen = attention_of_last_text(looking, read, valid, picture, rotary)
            else:
                scope = up_to_last_text(valid, picture)[1]
                score = self.score.score(View(x, before, block, blocks[layer], rotary, scope, number, valid & (picture < 0)))
                seen = scope & (picture >= 0)
            keep = valid & ~(seen & (rank(score, seen, picture) >= self.counts[layer]))
            index, stays = first_places(keep, kept[len(masks) - 1])
            x = torch.where(stays[..., None], x.gather(1, index[..., None].expand(-1, -1, x.shape[2])), 0.0)
            valid, picture = stays, torch.where(stays, picture.gather(1, index), -1)
            number = number.gather(1, index)
            counted = stays.to(torch.int64).cumsum(1) - 1
            position = torch.where(stays, counted if self.renumber else position.gather(1, index), 0)
            masks.append(stays.to(torch.int64))
            bias, rotary = causal_bias(masks[-1], 0, x.shape[1])[0], self.language.trunk.rotary(position)
        return (last_logits(self.language, x, valid), *present, *masks[1:])


class DecodeGraph(nn.Module):
    """New positions behind caches whose stages hold different numbers of positions.

    (inputs_embeds [b, s, C]; for each stage attention_mask.N [b, p_N + s] int64 and position_ids.N [b, s]; past keys and
    values [b, G, p_N, D] of each layer) -> (logits [b, V] at the last valid position, present keys and values).
    """

    def __init__(self, language: Decoder, stages: list[int]) -> None:
        """stages: the stage of each layer."""
        super().__init__()
        self.language, self.stages = language, stages

    def forward(self, inputs_embeds: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        blocks: Any = self.language.trunk.blocks
        count = self.stages[-1] + 1
        past = rest[2 * count :]
        x, present, valid = inputs_embeds, [], None
        scenes = []
        for stage in range(count):
            first = self.stages.index(stage)
            bias, valid = causal_bias(rest[2 * stage], past[2 * first].shape[2], x.shape[1])
            scenes.append((bias, self.language.trunk.rotary(rest[2 * stage + 1])))
        for number, block in enumerate(blocks):
            bias, rotary = scenes[self.stages[number]]
            x, keys, values = extend(block, x, past[2 * number], past[2 * number + 1], bias, rotary)
            present += [keys, values]
        assert valid is not None
        return (last_logits(self.language, x, valid), *present)


def attention_of_last_text(block: Any, x: Tensor, valid: Tensor, picture: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """(scores [b, s], visual positions that are judged [b, s] bool): the attention `block` would pay from the last text.

    softmax(q k^T / sqrt(D)) over the prefix of the last position of text, mean over heads. What stands behind it is not
    judged, nor is anything in a row without text.
    """
    at, sees = up_to_last_text(valid, picture)
    attention = block.attention
    y = block.norm1(x)
    keys = attention.keys(y, rotary)
    queries = attention.queries(y, rotary)
    chosen = at.clamp(min=0)[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
    q = queries.gather(2, chosen)
    repeat = attention.heads // attention.kv_heads
    if repeat > 1:
        keys = keys[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(keys.shape[0], -1, keys.shape[2], keys.shape[3])
    logits = q @ keys.transpose(-1, -2) * attention.head_width**-0.5
    weights = torch.where(sees[:, None, None], logits, LOWEST).softmax(-1).mean(1)[:, 0]
    return weights, sees & (picture >= 0)


def up_to_last_text(valid: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
    """(place of the last position of text [b, 1], -1 without one; valid positions up to it [b, s] bool)."""
    place = torch.arange(valid.shape[1], device=valid.device)
    text = valid & (picture < 0)
    at = (text.to(torch.int64) * (place + 1)).amax(1, keepdim=True) - 1
    return at, valid & (place <= at)


def numbers(picture: Tensor) -> Tensor:
    """[b, s]: the number of a visual position in its picture, which stands in one piece; anything elsewhere."""
    place = torch.arange(picture.shape[1], device=picture.device)
    same = (picture[:, :, None] == picture[:, None, :]) & (place[None, None, :] < place[None, :, None])
    return same.to(torch.int64).sum(-1)


def rank(score: Tensor, judged: Tensor, picture: Tensor) -> Tensor:
    """[b, s]: how many judged positions of the same picture come before each, by score and then by place."""
    place = torch.arange(score.shape[1], device=score.device)
    mine, other = score[:, :, None], score[:, None, :]
    before = (other > mine) | ((other == mine) & (place[None, None, :] < place[None, :, None]))
    before = before & (picture[:, :, None] == picture[:, None, :]) & judged[:, None, :]
    return before.to(torch.int64).sum(-1)


def first_places(keep: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """(index [b, K] of the true positions of keep [b, s], ascending; which of those are real [b, K]). places: 0 to K - 1."""
    size = keep.shape[1]
    place = torch.arange(size, device=keep.device)
    order = torch.where(keep, place, place + size).sort(dim=1).values.index_select(1, places)
    real = order < size
    return torch.where(real, order, order - size), real


# The parts of a bundle


def stages_of(depth: int, drops: list[int]) -> list[int]:
    """The stage of each layer."""
    return [sum(layer > drop for drop in drops) for layer in range(1, depth + 1)]


def prefill_part(language: Decoder, counts: dict[int, int], score: DecoderScore | None = None, *, renumber: bool) -> ExportPart:
    """`prefill`: prompts with the selection inside."""
    inputs, dynamic = new_inputs(language, new=8, total=8)
    dynamic["attention_mask"] = {0: "batch", 1: "length"}
    inputs["picture_ids"] = torch.tensor([[-1, 0, 0, 0, 0, -1, -1, -1]] * 2)
    dynamic["picture_ids"] = {0: "batch", 1: "length"}
    for number in range(1, len(counts) + 1):
        inputs[f"kept.{number}"], dynamic[f"kept.{number}"] = torch.arange(8 - number), {0: f"kept_{number}"}
    masks = [f"present_mask.{number}" for number in range(1, len(counts) + 1)]
    outputs = ["logits", *cache_names(language.options.depth, "present"), *masks]
    return ExportPart(PrefillGraph(language, counts, score, renumber=renumber), inputs, dynamic, outputs)


def decode_part(language: Decoder, counts: dict[int, int]) -> ExportPart:
    """`decode`: new positions behind the caches that `prefill` left."""
    depth = language.options.depth
    stages = stages_of(depth, list(counts))
    first, axes = new_inputs(language, new=2, total=2)
    inputs, dynamic = {"inputs_embeds": first["inputs_embeds"]}, {"inputs_embeds": axes["inputs_embeds"]}
    size = {stage: 9 - stage for stage in range(len(counts) + 1)}
    for stage, past in size.items():
        inputs[f"attention_mask.{stage}"] = torch.ones(2, past + 2, dtype=torch.int64)
        dynamic[f"attention_mask.{stage}"] = {0: "batch", 1: f"total_{stage}"}
        inputs[f"position_ids.{stage}"] = torch.arange(past, past + 2).expand(2, -1).contiguous()
        dynamic[f"position_ids.{stage}"] = {0: "batch", 1: "length"}
    for number, name in enumerate(cache_names(depth, "past_key_values")):
        stage = stages[number // 2]
        inputs[name], dynamic[name] = kept_example(language, size[stage]), {0: "batch", 2: f"past_{stage}"}
    return ExportPart(DecodeGraph(language, stages), inputs, dynamic, ["logits", *cache_names(depth, "present")])
