"""LoRAs that requests name: low-rank branches beside the weights, and an input that says how much of each a row gets.

What is traced is the transformer with `y + ((x A^T) * scale) B^T` at each layer that one of them changes, all of its
LoRAs side by side, so that rows with different ones share a call. At a scale of 0 a branch adds exactly 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from export.lora import Adapter, Layer, read_layers
from export.onnx import ExportError
from models.bundle import NamedLoraInfo
from models.graph import Graph

SCALES = "lora_scales"
_NAME = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})=(?P<file>.+)", re.DOTALL)
_GRAPHS = {"denoiser": "transformer", "denoiser_2": "transformer_2"}


@dataclass(frozen=True)
class NamedLora:
    """A LoRA by the name that requests use; of two experts, each may have a file of its own."""

    name: str
    adapters: tuple[Adapter, ...]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> tuple[NamedLora, ...]:
        """Each `NAME=[PART=]PATH[:SCALE]`; what has the same name belongs together. Raises `ExportError`."""
        found: dict[str, tuple[Adapter, ...]] = {}
        for text in texts:
            match = _NAME.fullmatch(text)
            if match is None:
                raise ExportError(f"--named-lora must be like style=style.safetensors:0.8, not {text}.")
            found[match["name"]] = (*found.get(match["name"], ()), Adapter.parse(match["file"]))
        return tuple(cls(name, adapters) for name, adapters in found.items())


class Branches:
    """The branches of one transformer, and the scales `[batch, loras]` of the call that runs; None: as it was."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.scales: Tensor | None = None

    def add(self, module: nn.Module, layers: Sequence[tuple[int, Layer]]) -> None:
        """Put the branches of one layer beside it, each with the number of its LoRA."""
        owners = torch.tensor([number for number, layer in layers for _ in range(len(layer.down))])
        module.register_buffer("lora_owners", owners, persistent=False)
        module.register_buffer("lora_down", torch.cat([layer.down for _, layer in layers]), persistent=False)
        up = torch.cat([layer.strength * layer.up for _, layer in layers], dim=1)
        module.register_buffer("lora_up", up, persistent=False)
        module.register_forward_hook(self._branch)

    def _branch(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.scales is None:
            return output
        low = F.linear(inputs[0], module.lora_down)
        # The batch is the outermost dimension everywhere, be there chunks or tokens flattened into it or not.
        low = low.reshape(self.scales.shape[0], -1, low.shape[-1])
        low = low * self.scales.index_select(1, module.lora_owners).unsqueeze(1)
        return output + F.linear(low, module.lora_up).reshape(output.shape)


def attach(
    loras: Sequence[NamedLora], transformers: Mapping[str, nn.Module], loader: Any
) -> tuple[tuple[NamedLoraInfo, ...], dict[str, Branches]]:
    """Put the branches into the transformers, which go on doing what they did; returns those that have some.

    `loader` is diffusers' mixin for the family. Raises `ExportError`; then nothing was changed.
    """
    infos: list[NamedLoraInfo] = []
    by_layer: dict[tuple[str, str], list[tuple[int, Layer]]] = {}
    for number, lora in enumerate(loras):
        files = []
        for adapter in lora.adapters:
            layers, info = read_layers(adapter, transformers, loader)
            files.append(info)
            for layer in layers:
                _check(layer, lora.name)
                by_layer.setdefault((layer.part, layer.name), []).append((number, layer))
        infos.append(NamedLoraInfo(name=lora.name, files=tuple(files)))
    branches: dict[str, Branches] = {}
    for (part, _), found in by_layer.items():
        branches.setdefault(part, Branches(len(loras))).add(found[0][1].module, found)
    return tuple(infos), branches


def switched(graph: Graph, branches: Mapping[str, Branches]) -> Graph:
    """A denoiser's graph with the scales as its first input; any other one as it is.

    It is tried with rows that have none of them, and with rows that have several at once.
    """
    found = branches.get(_GRAPHS.get(graph.name, ""))
    if found is None:
        return graph
    random = torch.Generator().manual_seed(6)

    def scaled(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch = len(next(iter(feeds.values())))
        scales = 2 * torch.rand(batch, found.count, generator=random) - 1
        scales[1::2] = 0.0
        return {SCALES: scales, **feeds}

    first = next(iter(graph.example))
    return replace(
        graph,
        module=_Switched(graph.module, found),
        example=scaled(graph.example),
        cases=tuple(scaled(feeds) for feeds in graph.cases),
        dynamic_shapes={
            SCALES: {0: graph.dynamic_shapes[first][0]},
            "inputs": tuple(graph.dynamic_shapes[name] for name in graph.example),
        },
    )


class _Switched(nn.Module):
    def __init__(self, module: nn.Module, branches: Branches) -> None:
        super().__init__()
        self.module = module
        self.branches = branches

    def forward(self, lora_scales: Tensor, *inputs: Tensor) -> Any:
        torch._check(lora_scales.shape[0] == inputs[0].shape[0])  # type: ignore[no-untyped-call]
        self.branches.scales = lora_scales
        try:
            return self.module(*inputs)
        finally:
            self.branches.scales = None


def _check(layer: Layer, name: str) -> None:
    if not isinstance(layer.module, nn.Linear):
        kind = type(layer.module).__name__
        raise ExportError(f"{name} changes {layer.name}, a {kind}: only what is linear can be switched; use --lora.")
    if layer.bias is not None:
        raise ExportError(f"{name} changes the bias of {layer.name}, which can't be switched; use --lora.")
