"""The Wan family as export sees it: a checkpoint's graphs, its geometry, and its pipeline.

Wan 2.1 and 2.2: one transformer, or the two of A14B; a VAE with or without residual shortcuts and 2x2 patches. TI2V-5B
has one timestep for each token (`expand_timesteps`); its graph takes one for each latent frame, so that a video can
begin with a picture: a frame that is clean and at timestep 0. The image-to-video models of 2.1 and A14B take their
picture as channels beside the latents, see `models.pictures`. The causal VAE streams exactly, see `models.wan`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.loaders import WanLoraLoaderMixin
from numpy.typing import NDArray
from torch import Tensor

from models.bundle import ExpertsInfo, FamilyName, ImageInfo, LatentInfo, SamplerInfo
from models.families import Plan, Take, UnsupportedCheckpointError
from models.graph import Graph
from models.wan import WanCheckpoint
from models.wan_graphs import Geometry, causal_denoiser, decoders, denoiser, image_encoder, text_encoder
from models.wan_weights import load_weights


class WanFamily:
    """A `WanPipeline` or `WanImageToVideoPipeline` checkpoint; see `models.families.Family`."""

    name: FamilyName = "wan"
    lora_loader = WanLoraLoaderMixin

    def __init__(self, checkpoint: WanCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.tokenizer, self.scheduler = checkpoint.tokenizer, checkpoint.scheduler
        self.geometry = Geometry.probe(checkpoint)
        config, geometry = checkpoint.transformer.config, self.geometry
        known = (geometry.channels, geometry.channels + geometry.temporal + geometry.channels)
        if int(config.in_channels) not in known or int(config.out_channels) != geometry.channels:
            raise UnsupportedCheckpointError(
                f"The denoiser takes {config.in_channels} channels; with this VAE it must be {known[0]}, or with a "
                f"picture {known[1]}."
            )
        self.pictured = int(config.in_channels) == known[1]
        self.image: ImageInfo | None = None
        if checkpoint.image_encoder is not None:
            self.image = ImageInfo(side=_side(checkpoint))
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
            mask = self.geometry.temporal if self.pictured else 0
            denoisers = (denoiser(checkpoint, tokens, largest, mask=mask),)
            if checkpoint.transformer_2 is not None:
                stored = {"transformer": checkpoint.stored["transformer_2"]} if checkpoint.stored else {}
                second = replace(checkpoint, transformer=checkpoint.transformer_2, stored=stored)
                denoisers = (*denoisers, denoiser(second, tokens, largest, "denoiser_2", mask=mask))
        elif checkpoint.transformer_2 is not None:
            raise UnsupportedCheckpointError("A causal rollout over two transformers is not supported.")
        elif self.pictured:
            raise UnsupportedCheckpointError("A causal rollout of a picture's channels is not supported.")
        else:
            chunk = plan.window.cached_frames + plan.window.chunk_frames
            limit = plan.largest(self.latent, lambda _, height, width: attention(chunk, height, width))
            denoisers = (causal_denoiser(checkpoint, plan, plan.window, limit[1:]),)
        _, height, width = plan.largest(self.latent, decoding)
        return (
            text_encoder(checkpoint, tokens),
            *denoisers,
            *decoders(checkpoint, self.geometry, (height, width)),
            *([image_encoder(checkpoint, self.image.side)] if self.image is not None else ()),
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
        pictured = {} if take.picture is None else {"image": PIL.Image.fromarray(take.picture)}
        seen = (
            {"image_encoder": checkpoint.image_encoder, "image_processor": _processor(checkpoint)}
            if take.picture is not None
            else {}
        )
        pipeline = (WanPipeline if take.picture is None else WanImageToVideoPipeline)(
            tokenizer=transformers.AutoTokenizer.from_pretrained(checkpoint.tokenizer.parent, local_files_only=True),
            text_encoder=checkpoint.text_encoder,
            vae=checkpoint.vae,
            scheduler=_scheduler(self.scheduler, take.sampler),
            transformer=checkpoint.transformer,
            transformer_2=checkpoint.transformer_2,
            boundary_ratio=checkpoint.boundary_ratio,
            **seen,
        )
        pipeline.set_progress_bar_config(disable=True)
        frames: NDArray[np.float32] = pipeline(
            prompt=take.prompt,
            negative_prompt="",
            **pictured,
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


def _side(checkpoint: WanCheckpoint) -> int:
    """Of the square that the image encoder takes. Raises `UnsupportedCheckpointError` for what isn't prepared here."""
    processor, side = checkpoint.image_processor, int(checkpoint.image_encoder.config.image_size)  # type: ignore[union-attr]
    wanted = {"crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}, "resample": 3}
    for key, value in wanted.items():
        if processor.get(key, value) != value:
            raise UnsupportedCheckpointError(f"The image processor's `{key}` must be {value}, not {processor[key]}.")
    return side


def _processor(checkpoint: WanCheckpoint) -> Any:
    if checkpoint.image_encoder is None:
        return None
    return transformers.CLIPImageProcessor.from_dict(checkpoint.image_processor)


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
