"""The LTX-Video family: T5, a transformer over packed latents, and a VAE whose decoder is not causal.

Every decoded frame depends on latents after it, so decoding in chunks can't be exact. Here each chunk is decoded behind
the last `CONTEXT` latents before it, and without those after it: `LatentInfo.streaming` is `overlapped`, and the bundle
says what the seams cost. A bundle whose `chunk_latent_frames` hold the longest video has none.

From 0.9.1 on the VAE denoises while it decodes: it is given latents with a little noise and a timestep. Both settings
are part of the graphs (`decoding` in `rushes.json`), and the noise is an input, `noise`, shaped like the latents.

Two contracts of serving are kept by wrapping. It has one tensor of text: masked tokens are zero in it, and the denoiser
takes its mask from there (LTX gives masked keys -10000, so what they hold doesn't matter). And LTX's RoPE counts in
seconds and pixels: the bundle's frame rate is part of its graph.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
from diffusers.loaders import LTXVideoLoraLoaderMixin
from diffusers.pipelines.ltx import pipeline_ltx
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from models.bundle import ExpertsInfo, FamilyName, ImageInfo, LatentInfo
from models.families import Decoding, Plan, Take, UnsupportedCheckpointError, fast_tokenizer, read_index
from models.graph import MOST, Feeds, Graph, padded_text_encoder
from models.wan import check_same_batch

# Latent frames before a chunk that its decoding sees.
CONTEXT = 2


class LtxFamily:
    """An `LTXPipeline` checkpoint; see `models.families.Family`."""

    name: FamilyName = "ltx"
    experts: ExpertsInfo | None = None
    image: ImageInfo | None = None
    lora_loader = LTXVideoLoraLoaderMixin

    def __init__(
        self,
        text_encoder: Any,
        transformer: Any,
        vae: Any,
        scheduler: dict[str, Any],
        tokenizer: Path,
        decoding: Decoding,
    ) -> None:
        self.decoding = decoding
        self.text_encoder, self.transformer, self.vae = text_encoder, transformer, vae
        self.scheduler, self.tokenizer = scheduler, tokenizer
        self.latent = LatentInfo(
            channels=int(vae.config.latent_channels),
            spatial=int(vae.spatial_compression_ratio),
            temporal=int(vae.temporal_compression_ratio),
            patch=1,
            streaming="overlapped",
        )
        self.text_dim = int(transformer.config.caption_channels)

    @classmethod
    def open(cls, path: Path, plan: Plan) -> LtxFamily:
        index, tokenizer = read_index(path), fast_tokenizer(path)
        if plan.window is not None or plan.weights is not None:
            raise UnsupportedCheckpointError(f"{path} is LTX: there is no causal rollout of it.")
        if (index.get("text_encoder") or [None, None])[1] != "T5EncoderModel":
            raise UnsupportedCheckpointError(f"{path} must have a T5EncoderModel as its text encoder.")
        transformers.utils.logging.disable_progress_bar()
        local: dict[str, Any] = {"local_files_only": True, "torch_dtype": torch.float32}
        vae = AutoencoderKLLTXVideo.from_pretrained(path / "vae", **local).eval()
        transformer = LTXVideoTransformer3DModel.from_pretrained(path / "transformer", **local).eval()
        if any(vae.config.decoder_inject_noise):
            raise UnsupportedCheckpointError(
                f"{path} has a VAE that draws noise in its layers (`decoder_inject_noise`), so it never decodes the "
                "same: use a version of LTX without."
            )
        if vae.config.decoder_causal or transformer.config.patch_size != 1 or transformer.config.patch_size_t != 1:
            raise UnsupportedCheckpointError(f"{path} has a causal decoder or patches, which no published LTX has.")
        if transformer.config.in_channels != vae.config.latent_channels:
            raise UnsupportedCheckpointError(
                "The denoiser and the VAE differ in their latent channels: no text-to-video."
            )
        text_encoder = transformers.T5EncoderModel.from_pretrained(
            path / "text_encoder", dtype=torch.float32, local_files_only=True
        )
        scheduler = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
        return cls(text_encoder.eval(), transformer, vae, scheduler, tokenizer, plan.decoding)

    @property
    def transformers(self) -> dict[str, Any]:
        return {"transformer": self.transformer}

    def cache_size(self) -> tuple[int, int]:
        raise UnsupportedCheckpointError("LTX has no causal rollout.")

    def graphs(self, plan: Plan) -> tuple[Graph, ...]:
        config = self.transformer.config
        heads = int(config.num_attention_heads)
        width = heads * int(config.attention_head_dim)
        seconds_per_latent = self.latent.temporal / plan.fps

        def attention(frames: int, height: int, columns: int) -> int:
            sequence = frames * height * columns
            return 4 * sequence * (2 * heads * sequence + 64 * width)

        def decoding(_: int, height: int, columns: int) -> int:
            pixels = (CONTEXT + 2) * self.latent.temporal * height * columns * self.latent.spatial**2
            return 4 * pixels * 4 * int(self.vae.config.decoder_block_out_channels[0])

        most, (_, *cells) = plan.largest(self.latent, attention), plan.largest(self.latent, decoding)
        return (
            padded_text_encoder(TextEncoder(self.text_encoder), self.text_encoder, plan.max_tokens),
            self._denoiser(plan.max_tokens, seconds_per_latent, most),
            *self._decoders((cells[0], cells[1])),
        )

    def decode(self, latents: Tensor) -> Tensor:
        decoder = _Decoder(self.vae, *self.decoding)
        noised = bool(self.vae.config.timestep_conditioning)
        timestep = torch.full((len(latents),), self.decoding.timestep) if noised else None
        prepared = decoder.prepared(latents, torch.zeros_like(latents) if noised else None)
        pixels: Tensor = self.vae.decode(prepared, timestep, return_dict=False)[0]
        return pixels

    def make(self, take: Take) -> NDArray[np.float32]:
        pipeline = LTXPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(self.scheduler),
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=transformers.AutoTokenizer.from_pretrained(self.tokenizer.parent, local_files_only=True),
            transformer=self.transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        # The only noise that is drawn when latents are given is the decoder's.
        with mock.patch.object(pipeline_ltx, "randn_tensor", return_value=take.fresh(take.steps).unsqueeze(0)):
            frames: NDArray[np.float32] = pipeline(
                take.prompt,
                negative_prompt="",
                width=take.size[0],
                height=take.size[1],
                num_frames=take.frames,
                frame_rate=take.fps,
                num_inference_steps=take.steps,
                guidance_scale=take.guidance_scale,
                latents=LTXPipeline._pack_latents(take.noise),
                max_sequence_length=take.max_tokens,
                decode_timestep=self.decoding.timestep,
                decode_noise_scale=self.decoding.noise_scale,
                output_type="np",
            ).frames[0]
        return frames

    def _denoiser(self, max_tokens: int, seconds_per_latent: float, most: tuple[int, int, int]) -> Graph:
        random = torch.Generator().manual_seed(2)

        def feeds(batch: int, frames: int, rows: int, columns: int) -> Feeds:
            text = torch.randn(batch, max_tokens, self.text_dim, generator=random)
            # Row after row a longer prompt; the rest is padding.
            lengths = torch.arange(batch).unsqueeze(1) * 3 + 2
            return {
                "latents": torch.randn(batch, self.latent.channels, frames, rows, columns, generator=random),
                "timestep": torch.rand(batch, generator=random) * 1000,
                "encoder_hidden_states": text * (torch.arange(max_tokens) < lengths).unsqueeze(-1),
            }

        batch = Dim("batch", min=1, max=1024)
        sizes = {2 + axis: Dim(name, min=1, max=MOST) for axis, name in enumerate(("frames", "rows", "columns"))}
        return Graph(
            name="denoiser",
            module=Denoiser(self.transformer, seconds_per_latent, self.latent.spatial),
            example=feeds(2, 3, 4, 2),
            outputs=("velocity",),
            dynamic_shapes={
                "latents": {0: batch, **sizes},
                "timestep": {0: batch},
                "encoder_hidden_states": {0: batch},
            },
            weights="denoiser.weights",
            cases=(feeds(1, 1, 2, 2), feeds(3, 4, 1, 3), feeds(2, 9, 4, 4), feeds(1, 5, 3, 5), feeds(1, *most)),
        )

    def _decoders(self, largest: tuple[int, int]) -> tuple[Graph, Graph]:
        random = torch.Generator().manual_seed(3)
        batch, height, width = (Dim(name, min=1, max=MOST) for name in ("batch", "height", "width"))
        cell: dict[int, object] = {0: batch, 3: height, 4: width}
        noised = bool(self.vae.config.timestep_conditioning)
        latents = {**cell, 2: Dim("frames", min=1, max=MOST)}
        noise = {"noise": latents} if noised else {}

        def feeds(batch: int, frames: int, rows: int, columns: int, cached: bool) -> Feeds:
            size = (batch, self.latent.channels)
            new = torch.randn(*size, frames, rows, columns, generator=random)
            given = {"latents": new}
            if cached:
                given["cache_00"] = torch.randn(*size, CONTEXT, rows, columns, generator=random)
            if noised:
                given["noise"] = torch.randn(new.shape, generator=random)
            return given

        shapes = [(1, 1, 4, 4), (3, 2, 2, 5), (1, 4, 1, 3), (1, 1, *largest)]
        first = Graph(
            name="decoder_first",
            module=DecoderFirst(self.vae, *self.decoding),
            example=feeds(2, 3, 3, 4, False),
            outputs=("frames", "pixels", "cache_00"),
            dynamic_shapes={"latents": latents} | noise,
            weights="decoder.weights",
            cases=tuple(feeds(*shape, False) for shape in shapes),
        )
        following = Graph(
            name="decoder_next",
            module=DecoderNext(self.vae, *self.decoding),
            example=feeds(2, 3, 3, 4, True),
            outputs=("frames", "pixels", "next_cache_00"),
            dynamic_shapes={"latents": latents, "cache_00": cell} | noise,
            weights="decoder.weights",
            cases=tuple(feeds(*shape, True) for shape in shapes),
        )
        return first, following


class TextEncoder(nn.Module):
    """`input_ids`, `attention_mask` int64 `[batch, max_tokens]` to `hidden_states`, zero if masked.

    T5 itself is given no mask, as `LTXPipeline` gives it none.
    """

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        check_same_batch(input_ids, attention_mask)
        states: Tensor = self.text_encoder(input_ids).last_hidden_state
        return states * attention_mask.unsqueeze(-1).to(states.dtype)


class Denoiser(nn.Module):
    """`latents` `[batch, channels, frames, height, width]`, `timestep` `[batch]` in 0..1000 and `encoder_hidden_states`
    `[batch, max_tokens, dim]`, zero where masked, to `velocity` like the latents.
    """

    def __init__(self, transformer: Any, seconds_per_latent: float, pixels_per_latent: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.scale = (seconds_per_latent, float(pixels_per_latent), float(pixels_per_latent))

    def forward(self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        check_same_batch(latents, timestep, encoder_hidden_states)
        size = latents.shape[2:]
        axes = [torch.arange(n, dtype=torch.float32) * scale for n, scale in zip(size, self.scale, strict=True)]
        # Coordinates given from outside: diffusers' own are scaled in place, which ONNX would make a ScatterND of.
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).unsqueeze(0)
        mask = (encoder_hidden_states != 0).any(dim=-1).to(latents.dtype)
        velocity: Tensor = self.transformer(
            hidden_states=latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            encoder_attention_mask=mask,
            video_coords=coordinates,
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).unflatten(2, size)  # type: ignore[no-untyped-call, no-any-return]


class _Decoder(nn.Module):
    """`timestep` and `noise_scale` are for a VAE that denoises while it decodes, which is then given `noise`, too."""

    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any, timestep: float, noise_scale: float) -> None:
        super().__init__()
        self.vae = vae
        self.timestep, self.noise_scale = timestep, noise_scale
        self.temporal = int(vae.temporal_compression_ratio)
        shape = (1, -1, 1, 1, 1)
        scale = float(vae.config.scaling_factor)
        self.register_buffer("mean", vae.latents_mean.detach().clone().view(shape), persistent=False)
        self.register_buffer("std", vae.latents_std.detach().clone().view(shape) / scale, persistent=False)

    def prepared(self, latents: Tensor, noise: Tensor | None) -> Tensor:
        """What the VAE is given."""
        latents = latents * self.std + self.mean
        if noise is None:
            return latents
        check_same_batch(latents, noise)
        return (1 - self.noise_scale) * latents + self.noise_scale * noise

    def decode(self, latents: Tensor) -> Tensor:
        timestep = torch.full((latents.shape[0],), self.timestep) if self.vae.config.timestep_conditioning else None
        pixels: Tensor = self.vae.decoder(latents, timestep)
        return pixels.clamp(-1.0, 1.0)

    def out(self, pixels: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The cast is the last operation: TensorRT takes uint8 nowhere else.
        frames = ((pixels.permute(0, 2, 3, 4, 1) + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)
        return frames, pixels, seen[:, :, -CONTEXT:]


class DecoderFirst(_Decoder):
    """The first chunk, `t` latents, to `frames` uint8 `[batch, 1 + 8 (t - 1), H, W, 3]`, `pixels`, and the cache."""

    def forward(self, latents: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        prepared = self.prepared(latents, noise)
        padded = torch.cat([prepared[:, :, :1]] * CONTEXT + [prepared], dim=2)
        return self.out(self.decode(prepared), padded)


class DecoderNext(_Decoder):
    """`t` more latents behind `cache_00`, the last `CONTEXT` of them, to `8 t` frames, `pixels`, and the next cache."""

    def forward(self, latents: Tensor, cache_00: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        check_same_batch(latents, cache_00)
        seen = torch.cat([cache_00, self.prepared(latents, noise)], dim=2)
        before = 1 + self.temporal * (CONTEXT - 1)
        return self.out(self.decode(seen)[:, :, before:], seen)
