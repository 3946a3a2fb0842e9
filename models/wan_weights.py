"""Transformer weights from outside diffusers: the state dicts of Wan's own code, and of what is fine-tuned with it.

Self-Forcing, CausVid and LongLive publish one file with the generator's weights under `generator_ema` or `generator`,
each named as in Wan's repository behind prefixes of the classes and wrappers that it was trained in. The architecture
is Wan's, so the weights go onto the same `WanTransformer3DModel`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from models.families import UnsupportedCheckpointError

# The averaged weights first: they are what these projects sample with.
FOLDERS = ("generator_ema", "generator", "model", "state_dict")
WRAPPERS = re.compile(r"(^|(?<=\.))(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "generator.", "model.")


def load_weights(transformer: Any, path: Path) -> None:
    """Put a file's weights in place of the transformer's, every one of them. Raises `UnsupportedCheckpointError`."""
    try:
        weights = to_diffusers(_read(path))
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedCheckpointError(f"{path} can't be read as a state dict: {reason}") from error
    wanted = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    wrong = [
        *(f"lacks {name}" for name in wanted if name not in weights),
        *(f"has {name}, which the transformer hasn't" for name in weights if name not in wanted),
        *(
            f"has {name} as {list(value.shape)} instead of {list(wanted[name])}"
            for name, value in weights.items()
            if name in wanted and tuple(value.shape) != wanted[name]
        ),
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UnsupportedCheckpointError(f"{path} does not fit the transformer beside it: it {wrong[0]}{more}.")
    transformer.load_state_dict(weights)


def to_diffusers(raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names as in `WanTransformer3DModel`, from either naming and below any prefix."""
    for folder in FOLDERS:
        if isinstance(raw.get(folder), Mapping):
            raw = raw[folder]
            break
    weights = {_bare(name): value for name, value in raw.items() if isinstance(value, Tensor)}
    if not any(name.startswith("condition_embedder.") for name in weights):
        weights = convert_wan_transformer_to_diffusers(weights)
    return {name: value.float() for name, value in weights.items()}


def _bare(name: str) -> str:
    name = WRAPPERS.sub("", name)
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        loaded: dict[str, Tensor] = safetensors.torch.load_file(path)
        return loaded
    raw = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(raw, Mapping):
        raise ValueError(f"it holds a {type(raw).__name__}")
    return {str(key): value for key, value in raw.items()}
