"""The bundle: a directory that holds one servable model, described by `bundle.json`.

Only this file knows the manifest's shape. It is read by serving, which has no torch, and written by `export`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

FORMAT = 1
MANIFEST = "bundle.json"

GraphName = Literal["text_encoder", "denoiser", "decoder_first", "decoder_next"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileInfo(_Strict):
    """One file of the bundle, by path relative to the bundle's directory."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class TensorInfo(_Strict):
    """A graph's input or output: dtype by numpy name; a string dimension is dynamic."""

    name: str
    dtype: Literal["float32", "float16", "int64", "uint8"]
    shape: tuple[int | str, ...]


class GraphInfo(_Strict):
    """One ONNX graph; `parity` is its largest absolute error against torch per output, over `verified_shapes`."""

    file: str = Field(description="The ONNX file; its weights may lie in an external data file beside it.")
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    parity: dict[str, float] = {}
    verified_shapes: tuple[dict[str, tuple[int, ...]], ...] = ()


class TextInfo(_Strict):
    """How a prompt becomes the denoiser's `encoder_hidden_states` `[batch, max_tokens, dim]`."""

    tokenizer: str = Field(description="A `tokenizers` JSON file.")
    max_tokens: PositiveInt
    dim: PositiveInt


class LatentInfo(_Strict):
    """Latent geometry `[batch, channels, frames, height, width]` and its normalisation.

    A video of F frames has `1 + (F - 1) / temporal` latent frames. The denoiser works on normalised latents; the decoder
    graphs undo the normalisation themselves, so serving never needs the means.
    """

    channels: PositiveInt
    spatial: PositiveInt = Field(description="Pixels per latent cell, both ways.")
    temporal: PositiveInt = Field(description="Video frames per latent frame after the first.")
    patch: PositiveInt = Field(description="The denoiser needs latent height and width to be multiples of this.")


class SamplerInfo(_Strict):
    """Default sampler settings; see `models.samplers`."""

    name: Literal["euler", "unipc"] = "unipc"
    shift: float = Field(gt=0)
    num_train_timesteps: PositiveInt = 1000
    num_inference_steps: PositiveInt = 20
    guidance_scale: float = Field(ge=1)


class LimitsInfo(_Strict):
    """What a request may ask for. Sizes are pixels and must be multiples of `size_multiple`."""

    default_size: tuple[PositiveInt, PositiveInt] = Field(description="width, height")
    min_side: PositiveInt
    max_side: PositiveInt
    size_multiple: PositiveInt
    default_seconds: PositiveInt
    max_seconds: PositiveInt
    max_steps: PositiveInt = 100
    max_prompt_characters: PositiveInt = 4000


class Manifest(_Strict):
    """`bundle.json`."""

    format: Literal[1] = FORMAT
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    family: Literal["wan"]
    rollout: Literal["bidirectional", "causal"]
    fps: PositiveInt
    chunk_latent_frames: PositiveInt = Field(description="Latent frames in one decoded chunk.")
    text: TextInfo
    latent: LatentInfo
    sampler: SamplerInfo
    limits: LimitsInfo
    graphs: dict[GraphName, GraphInfo]
    files: dict[str, FileInfo] = Field(description="Every file of the bundle but the manifest itself.")
    versions: dict[str, str] = Field(description="Library versions that made the bundle.")
