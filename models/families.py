"""The seam between `export` and the model families: what a checkpoint says of itself, whatever made it.

A family is one file here (Wan, the oldest, has its modules, its graphs and its causal view in files of their own).
`open_checkpoint` chooses by the class that the checkpoint's `model_index.json` names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.bundle import ExpertsInfo, FamilyName, ImageInfo, LatentInfo, LimitsInfo, Positions, SamplerInfo
from models.graph import Graph
from models.window import ContextWindow


class UnsupportedCheckpointError(ValueError):
    """The directory is no checkpoint of any family, or of a kind that is not served."""


class Decoding(NamedTuple):
    """How a VAE that denoises while it decodes is asked (LTX from 0.9.1 on): where it begins, and with what noise."""

    timestep: float = 0.05
    noise_scale: float = 0.025


DECODING = Decoding()


@dataclass(frozen=True)
class Plan:
    """How a checkpoint is going to be served, as far as its graphs depend on it.

    `window` is there for a causal rollout; `weights` is a file whose weights take the place of the transformer's.
    `lazily` says that nothing is going to be run, so that large weights may stay on disk.
    """

    max_tokens: int
    fps: int
    chunk_latent_frames: int
    limits: LimitsInfo
    window: ContextWindow | None = None
    positions: Positions = "window"
    weights: Path | None = None
    lazily: bool = False
    decoding: Decoding = DECODING

    def largest(self, latent: LatentInfo, cost: Callable[[int, int, int], int]) -> tuple[int, int, int]:
        """Latent frames, height and width of the largest video within the limits that costs at most `MEMORY_BYTES`.

        What doesn't fit is halved, in time first, as often as it takes: a graph is tried as far as memory allows.
        """
        cell = latent.spatial * latent.patch
        side = -(-self.limits.max_side // cell) * latent.patch
        frames = 1 + -(-self.limits.max_seconds * self.fps // latent.temporal)
        while cost(frames, side, side) > MEMORY_BYTES and (frames > 1 or side > latent.patch):
            if frames > 1:
                frames = max(1, frames // 2)
            else:
                side = max(1, side // latent.patch // 2) * latent.patch
        return frames, side, side


@dataclass(frozen=True)
class Defaults:
    """How a family is served unless `rushes.json` says otherwise: what its authors' pipelines do."""

    max_tokens: int
    fps: int
    chunk_latent_frames: int
    num_inference_steps: int
    guidance_scale: float
    limits: LimitsInfo


# The text's length is part of these models: padding is seen by them, or becomes keys of its own.
WAN = Defaults(
    max_tokens=512,
    fps=16,
    chunk_latent_frames=3,
    num_inference_steps=50,
    guidance_scale=5.0,
    limits=LimitsInfo(
        default_size=(832, 480), min_side=256, max_side=1280, size_multiple=32, default_seconds=5, max_seconds=5
    ),
)
# A chunk as long as the longest video, since LTX's VAE decodes exactly only in one go.
LTX = Defaults(
    max_tokens=128,
    fps=25,
    chunk_latent_frames=33,
    num_inference_steps=50,
    guidance_scale=3.0,
    limits=LimitsInfo(
        default_size=(704, 480), min_side=256, max_side=1280, size_multiple=32, default_seconds=5, max_seconds=10
    ),
)
# 2B and 5B. Chunks are whole pairs of latent frames, and what the VAE was trained with is one pair.
COGVIDEOX = Defaults(
    max_tokens=226,
    fps=8,
    chunk_latent_frames=2,
    num_inference_steps=50,
    guidance_scale=6.0,
    limits=LimitsInfo(
        default_size=(720, 480), min_side=256, max_side=1360, size_multiple=16, default_seconds=6, max_seconds=10
    ),
)


def defaults_of(path: Path) -> Defaults | None:
    """The defaults for the checkpoint in this directory; None if it is of no family."""
    try:
        index = read_index(path)
    except UnsupportedCheckpointError:
        return None
    wan = replace(WAN, fps=24) if index.get("expand_timesteps") else WAN  # TI2V-5B
    known = {"WanPipeline": wan, "WanImageToVideoPipeline": wan, "LTXPipeline": LTX, "CogVideoXPipeline": COGVIDEOX}
    defaults = known.get(str(index.get("_class_name")))
    return _cogvideox(path) if defaults is COGVIDEOX else defaults


def _cogvideox(path: Path) -> Defaults:
    """1.5 has patches in time, twice the frame rate and a text length of its own."""
    try:
        config = json.loads((path / "transformer" / "config.json").read_text())
        tokens = int(config.get("max_text_seq_length", COGVIDEOX.max_tokens))
        return replace(COGVIDEOX, max_tokens=tokens, fps=16 if config.get("patch_size_t") else COGVIDEOX.fps)
    except (OSError, ValueError, AttributeError):
        return COGVIDEOX  # what is wrong with it is said when it is opened


# What one call of a proof may take, estimated; torch and ONNX Runtime are not in it at the same time.
MEMORY_BYTES = 1 << 29


@dataclass(frozen=True)
class Take:
    """One short video to be made twice: `noise` `[1, channels, frames, height, width]` is where both begin, and for a
    model that needs one a `picture` `[height, width, 3]`.

    `fresh` is what a sampler that adds noise adds after a step, `[channels, frames, height, width]`, and after the last
    one what a decoder that takes noise is given.
    """

    prompt: str
    noise: Tensor
    steps: int
    guidance_scale: float
    sampler: SamplerInfo
    max_tokens: int
    fps: int
    size: tuple[int, int]
    frames: int
    fresh: Callable[[int], Tensor]
    picture: NDArray[np.uint8] | None = None


class Family(Protocol):
    """One checkpoint, its parts in fp32 on the CPU."""

    name: FamilyName
    tokenizer: Path
    scheduler: dict[str, Any]
    latent: LatentInfo
    text_dim: int
    experts: ExpertsInfo | None
    image: ImageInfo | None
    lora_loader: Any

    @property
    def transformers(self) -> dict[str, Any]:
        """The denoisers by diffusers' names for them; `lora_loader` is diffusers' mixin that reads LoRAs for them."""

    def graphs(self, plan: Plan) -> tuple[Graph, ...]:
        """Every graph of the bundle. Raises `UnsupportedCheckpointError` for a plan that it can't follow."""

    def cache_size(self) -> tuple[int, int]:
        """Layers and width of the key/value cache of a causal rollout."""

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents to pixels `[batch, 3, frames, height, width]` in [-1, 1], in one go, by the checkpoint."""

    def make(self, take: Take) -> NDArray[np.float32]:
        """The take by diffusers' pipeline, `[frames, height, width, 3]` in [0, 1]."""


def open_checkpoint(path: Path, plan: Plan) -> Family:
    """Load a diffusers directory. Raises `UnsupportedCheckpointError`, or `OSError` for a part that can't be read."""
    from models.cogvideox_graphs import CogVideoXFamily
    from models.ltx import LtxFamily
    from models.wan_family import WanFamily

    openers: dict[str, Callable[[Path, Plan], Family]] = {
        "WanPipeline": WanFamily.open,
        "WanImageToVideoPipeline": WanFamily.open,
        "LTXPipeline": LtxFamily.open,
        "CogVideoXPipeline": CogVideoXFamily.open,
    }
    kind = read_index(path).get("_class_name")
    if kind not in openers:
        raise UnsupportedCheckpointError(f"{path} holds a {kind}, but only {', '.join(openers)} are supported.")
    return openers[kind](path, plan)


def read_index(path: Path) -> dict[str, Any]:
    """`model_index.json`. Raises `UnsupportedCheckpointError`."""
    try:
        index = json.loads((path / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedCheckpointError(f"{path} has no readable model_index.json.") from error
    if not isinstance(index, dict):
        raise UnsupportedCheckpointError(f"{path} has a model_index.json that holds no object.")
    return index


def fast_tokenizer(path: Path) -> Path:
    """`tokenizer/tokenizer.json`. Raises `UnsupportedCheckpointError`."""
    tokenizer = path / "tokenizer" / "tokenizer.json"
    if not tokenizer.is_file():
        raise UnsupportedCheckpointError(f"{path} has no tokenizer/tokenizer.json: save the fast tokenizer.")
    return tokenizer
