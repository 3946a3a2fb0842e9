"""The Wan family as export sees it: its graphs, what is dynamic in them, where they are tried, and its pipeline.

Wan 2.1 and 2.2: one transformer, or the two of A14B; a VAE with or without residual shortcuts and 2x2 patches. TI2V-5B
has one timestep for each token (`expand_timesteps`); its graph takes one for each latent frame, so that a video can
begin with a picture: a frame that is clean and at timestep 0. The causal VAE streams exactly, see `models.wan`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import WanPipeline
from diffusers.loaders import WanLoraLoaderMixin
from numpy.typing import NDArray
from torch import Tensor
from torch.export import Dim

from models.bundle import ExpertsInfo, FamilyName, GraphName, LatentInfo, SamplerInfo
from models.families import Plan, Take, UnsupportedCheckpointError
from models.graph import MOST, Feeds, Graph, multiple
from models.wan import DecoderFirst, DecoderNext, Denoiser, TextEncoder, WanCheckpoint
from models.wan_causal import CausalDenoiser
from models.wan_weights import load_weights
from models.window import ContextWindow

# Latent frames, height and width.
Size = tuple[int, int, int]


class WanFamily:
    """A `WanPipeline` checkpoint; see `models.families.Family`."""

    name: FamilyName = "wan"
    lora_loader = WanLoraLoaderMixin

    def __init__(self, checkpoint: WanCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.tokenizer, self.scheduler = checkpoint.tokenizer, checkpoint.scheduler
        self.geometry = Geometry.probe(checkpoint)
        config = checkpoint.transformer.config
        if int(config.in_channels) != self.geometry.channels:
            raise UnsupportedCheckpointError(
                "The denoiser and the VAE differ in their latent channels: no text-to-video."
            )
        self.latent = LatentInfo(
            channels=self.geometry.channels,
            spatial=self.geometry.spatial,
            temporal=self.geometry.temporal,
            patch=int(config.patch_size[1]),
        )
        self.text_dim = int(config.text_dim)
        self.experts: ExpertsInfo | None = None
        if checkpoint.boundary_ratio is not None:
            trained = int(self.scheduler.get("num_train_timesteps", 1000))
            self.experts = ExpertsInfo(boundary_timestep=checkpoint.boundary_ratio * trained)

    @classmethod
    def open(cls, path: Path, plan: Plan) -> WanFamily:
        checkpoint = WanCheckpoint.load(path, lazily=plan.lazily and plan.weights is None)
        if plan.weights is not None:
            load_weights(checkpoint.transformer, plan.weights)
        return cls(checkpoint)

    @property
    def transformers(self) -> dict[str, Any]:
        both = {"transformer": self.checkpoint.transformer, "transformer_2": self.checkpoint.transformer_2}
        return {name: transformer for name, transformer in both.items() if transformer is not None}

    def graphs(self, plan: Plan) -> tuple[Graph, ...]:
        checkpoint, config = self.checkpoint, self.checkpoint.transformer.config
        tokens = plan.max_tokens

        def attention(frames: int, height: int, width: int) -> int:
            sequence = frames * height * width // self.latent.patch**2
            return 4 * sequence * (2 * int(config.num_attention_heads) * sequence + 64 * self.cache_size()[1])

        def decoding(_: int, height: int, width: int) -> int:
            cells = sum(
                c * s * s for c, s in zip(self.geometry.cache_channels, self.geometry.cache_scales, strict=True)
            )
            return 4 * height * width * 12 * cells

        largest = plan.largest(self.latent, attention)
        denoisers: tuple[Graph, ...]
        if plan.window is None:
            denoisers = (denoiser(checkpoint, tokens, largest),)
            if checkpoint.transformer_2 is not None:
                stored = {"transformer": checkpoint.stored["transformer_2"]} if checkpoint.stored else {}
                second = replace(checkpoint, transformer=checkpoint.transformer_2, stored=stored)
                denoisers = (*denoisers, denoiser(second, tokens, largest, "denoiser_2"))
        elif checkpoint.transformer_2 is not None:
            raise UnsupportedCheckpointError("A causal rollout over two transformers is not supported.")
        else:
            chunk = plan.window.cached_frames + plan.window.chunk_frames
            limit = plan.largest(self.latent, lambda _, height, width: attention(chunk, height, width))
            denoisers = (causal_denoiser(checkpoint, plan, plan.window, limit[1:]),)
        _, height, width = plan.largest(self.latent, decoding)
        return (
            text_encoder(checkpoint, tokens),
            *denoisers,
            *decoders(checkpoint, self.geometry, (height, width)),
        )

    def cache_size(self) -> tuple[int, int]:
        config = self.checkpoint.transformer.config
        return int(config.num_layers), int(config.num_attention_heads * config.attention_head_dim)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.checkpoint.vae
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        pixels: Tensor = vae.decode(latents * std + mean).sample
        return pixels

    def make(self, take: Take) -> NDArray[np.float32]:
        checkpoint = self.checkpoint
        pipeline = WanPipeline(
            tokenizer=transformers.AutoTokenizer.from_pretrained(checkpoint.tokenizer.parent, local_files_only=True),
            text_encoder=checkpoint.text_encoder,
            vae=checkpoint.vae,
            scheduler=_scheduler(self.scheduler, take.sampler),
            transformer=checkpoint.transformer,
            transformer_2=checkpoint.transformer_2,
            boundary_ratio=checkpoint.boundary_ratio,
        )
        pipeline.set_progress_bar_config(disable=True)
        frames: NDArray[np.float32] = pipeline(
            take.prompt,
            negative_prompt="",
            width=take.size[0],
            height=take.size[1],
            num_frames=take.frames,
            num_inference_steps=take.steps,
            guidance_scale=take.guidance_scale,
            latents=take.noise,
            max_sequence_length=take.max_tokens,
            output_type="np",
        ).frames[0]
        return frames


def _scheduler(config: dict[str, Any], sampler: SamplerInfo) -> Any:
    """The checkpoint's own, unless `rushes.json` chose another."""
    euler = sampler.name == "euler"
    kind = diffusers.FlowMatchEulerDiscreteScheduler if euler else diffusers.UniPCMultistepScheduler
    shift = {"shift" if euler else "flow_shift": sampler.shift}
    if config.get("_class_name") == kind.__name__:
        # What the table doesn't know must show in the proof, so only the shift is put in.
        return kind.from_config(config | shift)
    flow = {} if euler else {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return kind(num_train_timesteps=sampler.num_train_timesteps, **flow, **shift)


@dataclass(frozen=True)
class Geometry:
    """What the decoder does to sizes, read off its outputs instead of trusting the config."""

    channels: int
    spatial: int
    temporal: int
    cache_channels: tuple[int, ...]
    cache_scales: tuple[int, ...]

    @classmethod
    def probe(cls, checkpoint: WanCheckpoint) -> Geometry:
        channels = int(checkpoint.vae.config.z_dim)
        latents = torch.zeros(1, channels, 1, 2, 2)
        with torch.no_grad():
            _, pixels, *caches = DecoderFirst(checkpoint.vae)(latents)
            following = DecoderNext(checkpoint.vae)(latents, *caches)[1]
        return cls(
            channels=channels,
            spatial=pixels.shape[-1] // 2,
            temporal=following.shape[2],
            cache_channels=tuple(cache.shape[1] for cache in caches),
            cache_scales=tuple(cache.shape[-1] // 2 for cache in caches),
        )


def text_encoder(checkpoint: WanCheckpoint, max_tokens: int) -> Graph:
    vocabulary = int(checkpoint.text_encoder.config.vocab_size)
    random = torch.Generator().manual_seed(1)

    def feeds(lengths: Sequence[int], tokens: int) -> Feeds:
        mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
        return {"input_ids": torch.randint(2, vocabulary, mask.shape, generator=random) * mask, "attention_mask": mask}

    shape = {0: Dim("batch", min=1, max=1024), 1: Dim("tokens", min=1, max=max(2, max_tokens))}
    return Graph(
        name="text_encoder",
        module=TextEncoder(checkpoint.text_encoder),
        example=feeds([5, min(8, max_tokens)], min(8, max_tokens)),
        outputs=("hidden_states",),
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
        weights="text_encoder.weights",
        cases=(
            feeds([1], max_tokens),
            feeds([3, max_tokens, 1], max_tokens),
            feeds([min(4, max_tokens), 5], 5),
            feeds([1], 1),
        ),
        stored=checkpoint.stored.get("text_encoder"),
    )


def denoiser(checkpoint: WanCheckpoint, max_tokens: int, largest: Size, name: GraphName = "denoiser") -> Graph:
    config = checkpoint.transformer.config
    dim, channels = int(config.text_dim), int(config.in_channels)
    patch_frames, patch_height, patch_width = config.patch_size
    random, by_frame = torch.Generator().manual_seed(2), checkpoint.expand_timesteps
    if by_frame and patch_frames != 1:
        raise UnsupportedCheckpointError("One timestep a frame needs patches of one latent frame.")

    def feeds(batch: int, frames: int, rows: int, columns: int, tokens: int) -> Feeds:
        size = (frames * patch_frames, rows * patch_height, columns * patch_width)
        steps = torch.rand((batch, size[0]) if by_frame else (batch,), generator=random) * 1000
        if by_frame:
            steps[::2, 0] = 0.0  # as when the first frame is given
        return {
            "latents": torch.randn(batch, channels, *size, generator=random),
            "timestep": steps,
            "encoder_hidden_states": torch.randn(batch, tokens, dim, generator=random),
        }

    batch, longest = Dim("batch", min=1, max=1024), int(config.rope_max_seq_len)
    most_frames, most_rows, most_columns = (
        min(math.ceil(size / patch), longest) for size, patch in zip(largest, config.patch_size, strict=True)
    )
    frames = multiple(patch_frames, "frames", longest)
    return Graph(
        name=name,
        module=(module := Denoiser(checkpoint.transformer, by_frame=by_frame)),
        example=feeds(2, 3, 3, 2, min(8, max_tokens)),
        outputs=("velocity",),
        dynamic_shapes={
            "latents": {
                0: batch,
                2: frames,
                3: multiple(patch_height, "rows", longest),
                4: multiple(patch_width, "columns", longest),
            },
            "timestep": {0: batch, 1: frames} if by_frame else {0: batch},
            "encoder_hidden_states": {0: batch, 1: Dim("tokens", min=1, max=MOST)},
        },
        weights=f"{name}.weights",
        cases=(
            feeds(1, 1, 2, 2, max_tokens),
            feeds(3, 4, 1, 3, max_tokens),
            feeds(2, 9, 4, 4, max_tokens),
            feeds(1, 5, 3, 5, max_tokens),
            feeds(1, most_frames, most_rows, most_columns, max_tokens),
        ),
        exportable=module.exportable(),
        stored=checkpoint.stored.get("transformer"),
    )


def causal_denoiser(checkpoint: WanCheckpoint, plan: Plan, window: ContextWindow, largest: tuple[int, ...]) -> Graph:
    """The denoiser of one chunk over a cache, tried up to `largest` height and width.

    Raises `UnsupportedCheckpointError` for a window that the checkpoint can't have.
    """
    config = checkpoint.transformer.config
    dim, channels = int(config.text_dim), int(config.in_channels)
    _, patch_height, patch_width = config.patch_size
    module, max_tokens = CausalDenoiser(checkpoint.transformer, window, plan.positions), plan.max_tokens
    random = torch.Generator().manual_seed(5)

    def feeds(written: Sequence[int], frames: int, rows: int, columns: int, tokens: int) -> Feeds:
        batch = len(written)
        latents = torch.randn(batch, channels, frames, rows * patch_height, columns * patch_width, generator=random)
        return {
            "latents": latents,
            "timestep": torch.rand(batch, generator=random) * 1000,
            "encoder_hidden_states": torch.randn(batch, tokens, dim, generator=random),
            "cache": torch.randn(module.empty_cache(batch, latents).shape, generator=random),
            "write_index": torch.tensor(written),
        }

    batch, longest = Dim("batch", min=1, max=1024), int(config.rope_max_seq_len)
    rows, columns = (Dim(name, min=1, max=longest) for name in ("rows", "columns"))
    full, most = window.capacity, window.chunk_frames
    return Graph(
        name="denoiser",
        module=module,
        example=feeds([full, 2], min(2, most), 3, 2, min(8, max_tokens)),
        outputs=("velocity", "chunk_cache"),
        dynamic_shapes={
            "latents": {
                0: batch,
                2: Dim("frames", min=1, max=most) if most > 1 else None,
                3: patch_height * rows if patch_height > 1 else rows,
                4: patch_width * columns if patch_width > 1 else columns,
            },
            "timestep": {0: batch},
            "encoder_hidden_states": {0: batch, 1: Dim("tokens", min=1, max=MOST)},
            "cache": {0: batch, 4: rows, 5: columns},
            "write_index": {0: batch},
        },
        weights="denoiser.weights",
        # An empty cache, one that is partly filled, one just full, and rings that have gone round, far and farther.
        cases=(
            feeds([0], most, 2, 2, max_tokens),
            feeds([1, full - 1, full], 1, 1, 3, max_tokens),
            feeds([full + 1, 0, full + 2, 3], most, 4, 4, max_tokens),
            feeds([100_000], most, 3, 5, max_tokens),
            feeds([full], most, largest[0] // patch_height, largest[1] // patch_width, max_tokens),
        ),
        stored=checkpoint.stored.get("transformer"),
    )


def decoders(checkpoint: WanCheckpoint, geometry: Geometry, largest: tuple[int, int]) -> tuple[Graph, Graph]:
    """`decoder_first` and `decoder_next`, tried up to `largest` height and width; they share one weight file."""
    random = torch.Generator().manual_seed(3)
    numbers = [f"{index:02}" for index in range(len(geometry.cache_scales))]

    def latents(batch: int, frames: int, height: int, width: int) -> Tensor:
        return torch.randn(batch, geometry.channels, frames, height, width, generator=random)

    def cached(batch: int, frames: int, height: int, width: int) -> Feeds:
        caches = {
            f"cache_{number}": torch.randn(batch, channels, 2, height * scale, width * scale, generator=random)
            for number, channels, scale in zip(numbers, geometry.cache_channels, geometry.cache_scales, strict=True)
        }
        return {"latents": latents(batch, frames, height, width), **caches}

    batch, height, width = (Dim(name, min=1, max=MOST) for name in ("batch", "height", "width"))
    cell = {0: batch, 3: height, 4: width}
    first = Graph(
        name="decoder_first",
        module=DecoderFirst(checkpoint.vae),
        example={"latents": latents(2, 1, 3, 4)},
        outputs=("frames", "pixels", *(f"cache_{number}" for number in numbers)),
        dynamic_shapes={"latents": cell},
        weights="decoder.weights",
        cases=tuple(
            {"latents": latents(*shape)} for shape in [(1, 1, 4, 4), (3, 1, 2, 5), (1, 1, 1, 1), (1, 1, *largest)]
        ),
    )
    following = Graph(
        name="decoder_next",
        module=DecoderNext(checkpoint.vae),
        example=cached(2, 3, 3, 4),
        outputs=("frames", "pixels", *(f"next_cache_{number}" for number in numbers)),
        dynamic_shapes={
            "latents": cell | {2: Dim("frames", min=1, max=MOST)},
            "caches": tuple(
                {0: batch, 3: height * scale if scale > 1 else height, 4: width * scale if scale > 1 else width}
                for scale in geometry.cache_scales
            ),
        },
        weights="decoder.weights",
        cases=tuple(cached(*shape) for shape in [(1, 1, 4, 4), (3, 2, 2, 5), (1, 4, 1, 3), (1, 1, *largest)]),
    )
    return first, following
