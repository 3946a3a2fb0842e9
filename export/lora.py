"""LoRA adapters (arXiv 2106.09685): their files, and how they are merged into the weights before these are exported.

Layouts are told apart by diffusers' own loaders, which know what Wan's, LTX's and CogVideoX's trainers write; peft's
own files (`adapter_model.safetensors` beside `adapter_config.json`) are read here. Every layer that a file names must
be there: diffusers only warns of one that isn't, and half of an adapter looks like a bad adapter.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from export.onnx import ExportError
from models.bundle import AdapterInfo, sha256_of

_METADATA = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A|lora_B)(\.default)?\.(?P<kind>weight|bias)")
_UNKNOWN = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", ".lokr_": "LoKr", ".hada_": "LoHa"}


@dataclass(frozen=True)
class Adapter:
    """A file, how much of it is added, and which transformer it is for, unless its names say so."""

    path: Path
    scale: float = 1.0
    part: str = "transformer"

    @classmethod
    def parse(cls, text: str) -> Adapter:
        """`[PART=]PATH[:SCALE]`. Raises `ExportError`."""
        part, separator, rest = text.partition("=")
        if not separator or part not in ("transformer", "transformer_2"):
            part, rest = "transformer", text
        path, separator, scale = rest.rpartition(":")
        if not separator:
            path, scale = rest, "1"
        try:
            value = float(scale)
        except ValueError:
            path, value = rest, 1.0
        if not math.isfinite(value) or not path:
            raise ExportError(f"--lora must be a path and a number, like style.safetensors:0.8, not {text}.")
        return cls(Path(path), value, part)


@dataclass(frozen=True)
class Layer:
    """What an adapter adds to a layer: `strength * up @ down` to its weight, and `strength * bias` to its bias.

    `up` is `[out, rank]`, and `down` `[rank, in]` where the layer is linear.
    """

    part: str
    name: str
    module: Any
    down: Tensor
    up: Tensor
    bias: Tensor | None
    strength: float


def merge(adapter: Adapter, transformers: Mapping[str, nn.Module], loader: Any) -> AdapterInfo:
    """Add an adapter to the weights of the transformers that it names; `loader` is diffusers' mixin for the family.

    Raises `ExportError`; then nothing was changed.
    """
    layers, info = read_layers(adapter, transformers, loader)
    for layer in layers:
        _add(layer)
    return info


def read_layers(
    adapter: Adapter, transformers: Mapping[str, nn.Module], loader: Any
) -> tuple[list[Layer], AdapterInfo]:
    """An adapter's layers, each beside the module that it is for. Raises `ExportError`."""
    path = adapter.path / "adapter_model.safetensors" if adapter.path.is_dir() else adapter.path
    raw, config = _read(path)
    for mark, kind in _UNKNOWN.items():
        if any(mark in name for name in raw):
            raise ExportError(f"{path} is a {kind} adapter: only LoRA is known.")
    layers = _layers(_named(raw, path, adapter.part, loader), path)
    found = []
    for (part, layer), parts in layers.items():
        module = _module(transformers.get(part), layer)
        if module is None:
            known = [name for name in layers if _module(transformers.get(name[0]), name[1]) is not None]
            there = f"{len(known)} of its {len(layers)} layers are there"
            raise ExportError(f"{path} has the layer {layer}, which the {part} hasn't; {there}.")
        _check(parts, module, f"{path}'s {layer}")
        found.append(
            Layer(
                part=part,
                name=layer,
                module=module,
                down=parts["lora_A.weight"].flatten(1),
                up=parts["lora_B.weight"].flatten(1),
                bias=parts.get("lora_B.bias"),
                strength=adapter.scale * _strength(config, part, layer, parts),
            )
        )
    return found, AdapterInfo(name=path.name, sha256=sha256_of(path), scale=adapter.scale)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and what is said of them, by keys such as `transformer.lora_alpha`."""
    try:
        with safe_open(path, framework="pt") as file:
            raw = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            told = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        beside = path.with_name("adapter_config.json")
        if beside.is_file():
            told = {f"transformer.{key}": value for key, value in json.loads(beside.read_text()).items()} | told
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"{path} can't be read as a LoRA: {reason}") from error
    if not raw or not isinstance(told, dict):
        raise ExportError(f"{path} can't be read as a LoRA: it is empty, or its metadata is no object.")
    return raw, told


def _named(raw: dict[str, Tensor], path: Path, part: str, loader: Any) -> dict[str, Tensor]:
    """Names as in diffusers: `transformer.<layer>.lora_A.weight`."""
    if any(name.startswith(_PEFT_PREFIX) for name in raw):
        raw = {f"transformer.{name.removeprefix(_PEFT_PREFIX)}": value for name, value in raw.items()}
    try:
        named: dict[str, Tensor] = loader.lora_state_dict(dict(raw))
        if not any("lora_A" in name for name in named):
            named = convert_unet_state_dict_to_peft(named)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"{path} is of a layout that is not known: {reason}") from error
    if not any(re.match(r"transformer(_2)?\.", name) for name in named):
        named = {f"transformer.{name}": value for name, value in named.items()}
    return {re.sub(r"^transformer\.", f"{part}.", name): value for name, value in named.items()}


def _layers(named: Mapping[str, Tensor], path: Path) -> dict[tuple[str, str], dict[str, Tensor]]:
    """By transformer and layer: `lora_A.weight`, `lora_B.weight`, and perhaps `lora_B.bias` and `alpha`."""
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in named.items():
        part, _, rest = name.partition(".")
        if rest.endswith(".alpha"):
            layers.setdefault((part, rest.removesuffix(".alpha")), {})["alpha"] = value
            continue
        match = _PART.fullmatch(rest)
        if match is None:
            raise ExportError(f"{path} has {name}, which is no part of a LoRA.")
        layers.setdefault((part, match["layer"]), {})[f"{match['part']}.{match['kind']}"] = value
    for (_, layer), parts in layers.items():
        if not {"lora_A.weight", "lora_B.weight"} <= parts.keys():
            raise ExportError(f"{path} has only {', '.join(sorted(parts))} of the layer {layer}.")
    return layers


def _module(transformer: nn.Module | None, layer: str) -> Any | None:
    if transformer is None:
        return None
    try:
        module = transformer.get_submodule(layer)
    except AttributeError:
        return None
    return module if isinstance(getattr(module, "weight", None), Tensor) else None


def _strength(config: Mapping[str, Any], part: str, layer: str, parts: Mapping[str, Tensor]) -> float:
    """`alpha / rank`, or over its root for rank-stabilised ones; 1 if nothing is said."""
    rank = parts["lora_A.weight"].shape[0]
    alpha = parts["alpha"].item() if "alpha" in parts else config.get(f"{part}.lora_alpha", rank)
    for pattern, value in (config.get(f"{part}.alpha_pattern") or {}).items():
        # As peft does: a name's end, or with a caret all of it.
        if re.fullmatch(rf"(.*\.)?({pattern})" if not pattern.startswith("^") else pattern, layer):
            alpha = value
    return float(alpha) / (math.sqrt(rank) if config.get(f"{part}.use_rslora") else rank)


def _check(parts: Mapping[str, Tensor], module: Any, what: str) -> None:
    """Raises `ExportError` where the parts are of another shape than the layer."""
    down, up, weight = parts["lora_A.weight"], parts["lora_B.weight"], module.weight
    fits = (
        up.dim() > 1
        and up.shape[1] == down.shape[0]
        and (up.shape[0], down.flatten(1).shape[1]) == (weight.shape[0], weight[:1].numel())
    )
    if not fits:
        raise ExportError(f"{what} is {list(up.shape)} x {list(down.shape)}, and the weight is {list(weight.shape)}.")
    bias = parts.get("lora_B.bias")
    if bias is not None and (module.bias is None or bias.shape != module.bias.shape):
        raise ExportError(f"{what} has a bias that the layer has no place for.")


@torch.no_grad()
def _add(layer: Layer) -> None:
    module = layer.module
    module.weight += layer.strength * (layer.up @ layer.down).view(module.weight.shape)
    if layer.bias is not None:
        module.bias += layer.strength * layer.bias
