"""CogVideoX as export sees it: its graphs, what is dynamic in them, where they are tried, and its pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.schedulers import scheduling_dpm_cogvideox
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from models.bundle import ExpertsInfo, FamilyName, GraphName, ImageInfo, LatentInfo
from models.cogvideox import CACHE_FRAMES, GROUP, LEAD, DecoderFirst, DecoderNext, Denoiser, TextEncoder
from models.families import Plan, Take, UnsupportedCheckpointError, fast_tokenizer, read_index
from models.graph import MOST, Feeds, Graph, multiple, padded_text_encoder

# Patches a side that the table of positions has, at least.
_LEAST_GRID = 16


class CogVideoXFamily:
    """A `CogVideoXPipeline` checkpoint; see `models.families.Family`."""

    name: FamilyName = "cogvideox"
    experts: ExpertsInfo | None = None
    image: ImageInfo | None = None
    lora_loader = CogVideoXLoraLoaderMixin

    def __init__(
        self, text_encoder: Any, transformer: Any, vae: Any, scheduler: dict[str, Any], tokenizer: Path
    ) -> None:
        self.text_encoder, self.transformer, self.vae = text_encoder, transformer, vae
        self.scheduler, self.tokenizer = scheduler, tokenizer
        self.latent = LatentInfo(
            channels=int(vae.config.latent_channels),
            spatial=2 ** (len(vae.config.block_out_channels) - 1),
            temporal=int(vae.config.temporal_compression_ratio),
            patch=int(transformer.config.patch_size),
            patch_frames=int(transformer.config.patch_size_t or 1),
            group=GROUP,
        )
        self.text_dim = int(transformer.config.text_embed_dim)

    @classmethod
    def open(cls, path: Path, plan: Plan) -> CogVideoXFamily:
        index, tokenizer = read_index(path), fast_tokenizer(path)
        if plan.window is not None or plan.weights is not None:
            raise UnsupportedCheckpointError(f"{path} is CogVideoX: there is no causal rollout of it.")
        if plan.chunk_latent_frames % GROUP:
            raise UnsupportedCheckpointError(
                f"{path} decodes two latent frames at a time: `chunk_latent_frames` must be even."
            )
        if (index.get("text_encoder") or [None, None])[1] != "T5EncoderModel":
            raise UnsupportedCheckpointError(f"{path} must have a T5EncoderModel as its text encoder.")
        transformers.utils.logging.disable_progress_bar()
        local: dict[str, Any] = {"local_files_only": True, "torch_dtype": torch.float32}
        vae = AutoencoderKLCogVideoX.from_pretrained(path / "vae", **local).eval()
        transformer = CogVideoXTransformer3DModel.from_pretrained(path / "transformer", **local).eval()
        config = transformer.config
        if config.in_channels != vae.config.latent_channels or config.ofs_embed_dim is not None:
            raise UnsupportedCheckpointError(f"{path} needs an image as input; only text-to-video is supported.")
        if config.use_learned_positional_embeddings:
            raise UnsupportedCheckpointError(f"{path} has learned positions, which no text-to-video CogVideoX has.")
        if (
            plan.fps // vae.config.temporal_compression_ratio
        ) % GROUP or plan.fps % vae.config.temporal_compression_ratio:
            raise UnsupportedCheckpointError(
                f"{path} decodes {GROUP * vae.config.temporal_compression_ratio:g} frames at a time: `fps` must be a "
                "multiple of that."
            )
        text_encoder = transformers.T5EncoderModel.from_pretrained(
            path / "text_encoder", dtype=torch.float32, local_files_only=True
        )
        scheduler = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
        return cls(text_encoder.eval(), transformer, vae, scheduler, tokenizer)

    @property
    def transformers(self) -> dict[str, Any]:
        return {"transformer": self.transformer}

    def cache_size(self) -> tuple[int, int]:
        raise UnsupportedCheckpointError("CogVideoX has no causal rollout.")

    def graphs(self, plan: Plan) -> tuple[Graph, ...]:
        config, latent = self.transformer.config, self.latent
        heads = int(config.num_attention_heads)
        width = heads * int(config.attention_head_dim)

        def attention(frames: int, height: int, columns: int) -> int:
            sequence = plan.max_tokens + frames * height * columns // latent.patch**2 // latent.patch_frames
            return 4 * sequence * (2 * heads * sequence + 64 * width)

        def decoding(_: int, height: int, columns: int) -> int:
            pixels = (GROUP + LEAD) * latent.temporal * height * columns * latent.spatial**2
            return 4 * pixels * 8 * int(self.vae.config.block_out_channels[0])

        most, (_, *cells) = plan.largest(latent, attention), plan.largest(latent, decoding)
        side = max(_LEAST_GRID, -(-plan.limits.max_side // (latent.spatial * latent.patch)))
        if config.use_rotary_positional_embeddings and config.patch_size_t is not None:
            # 1.5 doesn't scale its grid: there are no positions beyond the one that it was trained with.
            side = min(side, min(config.sample_height, config.sample_width) // latent.patch)
        return (
            padded_text_encoder(TextEncoder(self.text_encoder), self.text_encoder, plan.max_tokens),
            self._denoiser(plan.max_tokens, most, side),
            *self._decoders((cells[0], cells[1])),
        )

    def decode(self, latents: Tensor) -> Tensor:
        # Unlike Wan's VAE this one doesn't cut its output off; the pipeline does that.
        pixels: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor).sample.clamp(-1, 1)
        return pixels

    def make(self, take: Take) -> NDArray[np.float32]:
        kind = getattr(diffusers, str(self.scheduler.get("_class_name")))
        pipeline = CogVideoXPipeline(
            tokenizer=transformers.AutoTokenizer.from_pretrained(self.tokenizer.parent, local_files_only=True),
            text_encoder=self.text_encoder,
            vae=self.vae,
            transformer=self.transformer,
            scheduler=kind.from_config(self.scheduler),
        )
        pipeline.set_progress_bar_config(disable=True)
        with _drawing(pipeline.scheduler, take):
            frames: NDArray[np.float32] = pipeline(
                take.prompt,
                negative_prompt="",
                width=take.size[0],
                height=take.size[1],
                num_frames=take.frames,
                num_inference_steps=take.steps,
                guidance_scale=take.guidance_scale,
                latents=take.noise.transpose(1, 2),
                max_sequence_length=take.max_tokens,
                output_type="np",
            ).frames[0]
        return frames

    def _denoiser(self, max_tokens: int, most: tuple[int, int, int], side: int) -> Graph:
        random = torch.Generator().manual_seed(2)
        patch, in_time = self.latent.patch, self.latent.patch_frames

        def feeds(batch: int, frames: int, rows: int, columns: int) -> Feeds:
            size = (frames * in_time, rows * patch, columns * patch)
            return {
                "latents": torch.randn(batch, self.latent.channels, *size, generator=random),
                "timestep": torch.randint(0, 1000, (batch,), generator=random).float(),
                "encoder_hidden_states": torch.randn(batch, max_tokens, self.text_dim, generator=random),
            }

        batch = Dim("batch", min=1, max=1024)
        module = Denoiser(self.transformer, side)
        return Graph(
            name="denoiser",
            module=module,
            example=feeds(2, 3, 3, 2),
            outputs=("velocity",),
            dynamic_shapes={
                "latents": {
                    0: batch,
                    2: multiple(in_time, "frames", MOST),
                    3: multiple(patch, "rows", side),
                    4: multiple(patch, "columns", side),
                },
                "timestep": {0: batch},
                "encoder_hidden_states": {0: batch},
            },
            weights="denoiser.weights",
            cases=(
                feeds(1, 1, 2, 2),
                feeds(3, 4, 1, 3),
                feeds(2, 9, 4, 4),
                feeds(1, 5, 3, 5),
                feeds(1, max(1, most[0] // in_time), most[1] // patch, most[2] // patch),
            ),
            exportable=module.exportable(),
        )

    def _decoders(self, largest: tuple[int, int]) -> tuple[Graph, Graph]:
        random = torch.Generator().manual_seed(3)
        first, following = DecoderFirst(self.vae), DecoderNext(self.vae)

        def latents(batch: int, frames: int, height: int, width: int) -> Tensor:
            return torch.randn(batch, self.latent.channels, frames, height, width, generator=random)

        with torch.no_grad():
            probed = first(latents(1, GROUP + LEAD, 2, 2))[2:]
        numbers = [f"{index:02}" for index in range(len(probed))]
        scales = [cache.shape[-1] // 2 for cache in probed]

        def cached(batch: int, pairs: int, height: int, width: int) -> Feeds:
            caches = {
                f"cache_{number}": torch.randn(
                    batch, cache.shape[1], CACHE_FRAMES, height * scale, width * scale, generator=random
                )
                for number, cache, scale in zip(numbers, probed, scales, strict=True)
            }
            return {"latents": latents(batch, GROUP * pairs, height, width), **caches}

        batch, height, width = (Dim(name, min=1, max=MOST) for name in ("batch", "height", "width"))
        cell = {0: batch, 3: height, 4: width}
        sizes = [(1, 4, 4), (3, 2, 5), (1, 1, 1), (1, *largest)]

        def graph(name: GraphName, module: nn.Module, cache: str, **rest: Any) -> Graph:
            outputs = ("frames", "pixels", *(f"{cache}_{number}" for number in numbers))
            return Graph(name=name, module=module, outputs=outputs, weights="decoder.weights", **rest)

        return (
            graph(
                "decoder_first",
                first,
                "cache",
                example={"latents": latents(2, GROUP + LEAD, 3, 4)},
                dynamic_shapes={"latents": cell},
                cases=tuple({"latents": latents(n, GROUP + LEAD, *size)} for n, *size in sizes),
            ),
            graph(
                "decoder_next",
                following,
                "next_cache",
                example=cached(2, 2, 3, 4),
                dynamic_shapes={
                    "latents": cell | {2: multiple(GROUP, "pairs", MOST)},
                    "caches": tuple(
                        {0: batch, 3: height * scale if scale > 1 else height, 4: width * scale if scale > 1 else width}
                        for scale in scales
                    ),
                },
                cases=tuple(cached(*shape) for shape in [(1, 1, 4, 4), (3, 3, 2, 5), (1, 4, 1, 3), (1, 1, *largest)]),
            ),
        )


@contextmanager
def _drawing(scheduler: Any, take: Take) -> Iterator[None]:
    """Within, the DPM scheduler's fresh noise is the take's: it draws its own and has no way to be given any."""
    step, drawn = scheduler.step, 0

    def counted(*given: Any, **more: Any) -> Any:
        nonlocal drawn
        noise = take.fresh(drawn).transpose(0, 1).unsqueeze(0)
        drawn += 1
        with mock.patch.object(scheduling_dpm_cogvideox, "randn_tensor", return_value=noise):
            return step(*given, **more)

    if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
        scheduler.step = counted
    yield
