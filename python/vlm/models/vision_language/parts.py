"""Parts of a model that come from other models: their shapes and their tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm.config.errors import CheckpointError
from vlm.models.base import Model
from vlm.models.dual_encoder import DualEncoder, PictureOptions
from vlm.models.language import LanguageModel
from vlm.models.towers import VitOptions


def tower_of(source: Model, name: str) -> tuple[VitOptions, PictureOptions, dict[str, Tensor]]:
    """Shape, pictures and tensors (without pooling and projection) of a model's vision tower: a dual encoder's, or one
    of a vision-language model, by name or its only one. Raises ValueError for a model without it."""
    if isinstance(source, DualEncoder):
        vit, pictures, vision = source.options.vision, source.options.pictures, source.vision
        if not isinstance(vit, VitOptions):
            raise ValueError(f"its vision tower is a {vit.kind}, expected vit")
    else:
        towers: Any = getattr(source, "towers", {})
        name = name if name in towers or len(towers) != 1 else next(iter(towers))
        if name not in towers:
            raise ValueError(f"a {source.kind} model has no vision tower {name!r}")
        options = source.options.towers[name]  # type: ignore[attr-defined]
        vit, pictures, vision = options.vit(), options.pictures, towers[name]
    state = {key: t for key, t in vision.state_dict().items() if not key.startswith(("pool.", "projection."))}
    return vit, pictures, state


def language_of(source: Model) -> LanguageModel:
    """A model's language model. Raises ValueError for a model without one."""
    found = getattr(source, "language", source)
    if not isinstance(found, LanguageModel):
        raise ValueError(f"a {source.kind} model has no language model")
    return found


def connector_of(source: Model) -> nn.Module:
    """A model's connector. Raises ValueError for a model without one."""
    found = getattr(source, "connector", None)
    if not isinstance(found, nn.Module):
        raise ValueError(f"a {source.kind} model has no connector")
    return found


def language_state(source: LanguageModel, target: LanguageModel) -> dict[str, Tensor]:
    """The tensors of `source` with as many rows of ids as `target`, tied or not as `target` is.

    New rows are the mean of the old ones. Raises CheckpointError where the source's own head would be lost.
    """
    state = dict(source.state_dict())
    if target.head is not None:
        state.setdefault("head.weight", source.head_weight)
    elif source.head is not None:
        raise CheckpointError(
            "language: the source has a head of its own, and this model ties it to the embedding",
            remedy="set model.language.tie_embeddings = false",
        )
    for name in ("tokens.weight", "head.weight"):
        if name in state:
            state[name] = _more_rows(state[name], target.tokens.num_embeddings)
    return state


def _more_rows(weight: Tensor, size: int) -> Tensor:
    """weight [V, C] with the mean row repeated up to `size` rows."""
    more = size - len(weight)
    return weight if more <= 0 else torch.cat([weight, weight.mean(0, keepdim=True).expand(more, -1)])


def copy_into(module: nn.Module, state: dict[str, Tensor], part: str) -> None:
    """Copy tensors into a part. Raises CheckpointError for one that is missing, superfluous or misshapen."""
    own = module.state_dict()
    odd = sorted(own.keys() ^ state.keys())
    if odd:
        side = "the source lacks" if odd[0] in own else "this model has no"
        raise CheckpointError(f"{part}: {side} {odd[0]!r} ({len(odd)} such)", remedy="leave the part's shape open: it takes its source's")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(f"{part}: {name!r} of the source is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
