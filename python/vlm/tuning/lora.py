"""Low-rank adapters through `peft`, saved in its own format and merged for the published layout. Source: peft-review."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from vlm.config.errors import RequestError
from vlm.config.options import Options
from vlm.types.tensor_file import save_tensors

ADAPTER = "default"


class LoraOptions(Options):
    """W + (alpha / r) B A on the linear layers that match."""

    target: tuple[str, ...] = Field(("*.attention.q", "*.attention.v"), description="shell patterns over linear layers")
    r: int = Field(8, gt=0, description="rank")
    alpha: float = Field(16.0, gt=0, description="scale; the update is alpha / r times B A")
    dropout: float = Field(0.0, ge=0, lt=1)


def add_lora(model: nn.Module, options: LoraOptions) -> None:
    """Put adapters on every linear layer that matches; B starts at 0, so the function is unchanged.

    Raises RequestError when nothing matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in linear if any(fnmatchcase(name, pattern) for pattern in options.target)]
    if not chosen:
        raise RequestError(
            f"lora.target {list(options.target)} matches no linear layer", remedy=f"layers are called like {', '.join(linear[:4])}"
        )
    config = LoraConfig(
        r=options.r, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=chosen  # type: ignore[arg-type]
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")}


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the names it had without adapters, each update added to its weight."""
    layers = _lora_layers(model)
    state = model.state_dict()
    if not layers:
        return state
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner in layers:
            delta = layers[owner].get_delta_weight(ADAPTER) if leaf == "weight" else 0
            out[f"{owner}.{leaf}"] = (tensor + delta).detach()
        else:
            out[name] = tensor
    return out


def plain_name(name: str) -> str:
    """The name that a tensor of a model with adapters has in the model without."""
    return name.replace(".base_layer.", ".")


def load_merged(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a model, which may have adapters, from a state without them; its own adapters then add nothing (B is 0)."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            if ".lora_" not in name:
                tensor.copy_(state[plain_name(name)])
            elif ".lora_B." in name:
                tensor.zero_()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it is without its adapters, for the time of the block; which parameters learn is as before after it."""
    layers = list(_lora_layers(model).values())
    learns = {parameter: parameter.requires_grad for layer in layers for parameter in layer.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in learns.items():
            parameter.requires_grad_(flag)


def has_adapters(model: nn.Module) -> bool:
    return bool(_lora_layers(model))


def lora_files(model: nn.Module, options: LoraOptions, directory: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, the trainable form beside the merged model."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            tensors["base_model.model." + name.replace(f".{ADAPTER}.", ".")] = tensor.detach().to(torch.float32).contiguous()
    config = {
        "peft_type": "LORA",
        "r": options.r,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": sorted(_lora_layers(model)),
        "bias": "none",
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
