"""Weights that stay on disk while their model is traced: what lets a checkpoint be exported that memory can't hold.

A traced graph needs the weights' shapes and nothing else, so the large ones are stood in for by tensors that repeat one
row and take no memory, and each is read when it is written into the bundle. What is held at any time is one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# Smaller weights are read at once: optimisers of graphs look at what is in them.
LARGE = 1 << 14


@dataclass(frozen=True)
class Stored:
    """The safetensors files that hold a part's weights, by the weights' names, and which placeholder is for which.

    A placeholder is known by its address, since an exporter may turn and rename a weight, but has no need to copy it.
    """

    files: Mapping[str, Path]
    places: Mapping[int, str] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """One weight in fp32."""
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name).float()  # type: ignore[no-any-return]

    def find(self, array: NDArray[Any]) -> tuple[str, NDArray[Any]] | None:
        """The name and values of the weight that `array` is the placeholder of, or None if it is none.

        Raises `ValueError` if it was changed in other ways than by turning it.
        """
        name = self.places.get(int(array.__array_interface__["data"][0]))
        if name is None:
            return None
        values: NDArray[Any] = self.read(name).numpy()
        if array.ndim == 2 and array.strides[1] == 0:
            values = values.T
        if values.shape != array.shape or 0 not in array.strides:
            raise ValueError(
                f"the weight {name} is {list(values.shape)} and stands in the graph as {list(array.shape)}"
            )
        return name, values

    @classmethod
    def of(cls, folder: Path) -> Stored:
        """All weights in a folder of diffusers' or transformers'. Raises `OSError` where there are none, or broken."""
        files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    files |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise OSError(f"{path} can't be read: {error}") from error
        for index in folder.glob("*.safetensors.index.json"):
            missing = json.loads(index.read_text())["weight_map"].keys() - files.keys()
            if missing:
                raise OSError(f"{folder} lacks the weight {min(missing)}, which {index.name} names.")
        if not files:
            raise OSError(f"{folder} holds no safetensors files.")
        return cls(files)


def skeleton(build: Callable[[], Any], folder: Path) -> tuple[Any, Stored]:
    """The module that `build` makes, with placeholders for its large weights, and where these are.

    Raises `OSError` for a folder that doesn't hold them all.
    """
    stored = Stored.of(folder)
    with init_empty_weights(include_buffers=False):
        module: Any = build()
    tie = getattr(module, "tie_weights", lambda: None)
    tie()
    places: dict[int, str] = {}
    for name, empty in list(module.named_parameters()):
        owner, _, own = name.rpartition(".")
        if name not in stored.files:
            raise OSError(f"{folder} lacks the weight {name}.")
        large = empty.numel() >= LARGE and empty.dim() > 1 and empty.shape[0] > 1
        value = _placeholder(empty.shape) if large else stored.read(name)
        if value.shape != empty.shape:
            raise OSError(f"{folder} has {name} as {list(value.shape)} instead of {list(empty.shape)}.")
        if large:
            places[value.data_ptr()] = name
        setattr(module.get_submodule(owner), own, nn.Parameter(value, requires_grad=False))
    tie()
    return module.eval(), replace(stored, places=places)


def _placeholder(shape: torch.Size) -> Tensor:
    # Random, since equal weights might be made one.
    return torch.randn(shape[1:]).expand(shape)
