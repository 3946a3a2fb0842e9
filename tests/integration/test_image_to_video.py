"""A video that begins with a picture is what diffusers' image-to-video pipeline makes of it (Wan 2.2 TI2V-5B)."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from pipelines import opened_pipeline
from transformers import AutoTokenizer, UMT5EncoderModel

from export.proof import LEAST_PSNR, compare
from models.bundle import Bundle
from serving.pipeline.request import make_spec
from serving.pipeline.sessions import _Noise
from serving.pipeline.stages import DenoiseRequest, EncodedSource, LatentChunk

# Exporting takes most of a minute of a free core, and this machine may be busy.
pytestmark = pytest.mark.timeout(900)

SIDE, STEPS, SCALE, SEED = 64, 4, 3.0, 7


def reference(checkpoint: Path, picture: np.ndarray, noise: np.ndarray, frames: int) -> WanImageToVideoPipeline:
    pipeline = WanImageToVideoPipeline(
        tokenizer=AutoTokenizer.from_pretrained(checkpoint / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(checkpoint / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(checkpoint / "vae"),
        scheduler=UniPCMultistepScheduler.from_pretrained(checkpoint / "scheduler"),
        transformer=WanTransformer3DModel.from_pretrained(checkpoint / "transformer"),
        expand_timesteps=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PIL.Image.fromarray(picture),
        prompt="a red ball",
        negative_prompt="",
        height=SIDE,
        width=SIDE,
        num_frames=frames,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=torch.from_numpy(noise),
        max_sequence_length=64,
        output_type="latent",
    ).frames


async def test_a_picture_is_where_the_video_begins(tiny_bundle: Bundle, tiny_checkpoint: Path) -> None:
    manifest = tiny_bundle.manifest
    assert manifest.timesteps_by_frame
    picture = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    spec = make_spec(
        manifest,
        "a red ball",
        seed=SEED,
        seconds=1,
        size=f"{SIDE}x{SIDE}",
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        rewrite_prompt=False,
    )
    spec = replace(spec, source="picture", source_frames=1)
    async with opened_pipeline(tiny_bundle) as pipeline:
        assert pipeline.encoder is not None
        given = await pipeline.encoder.encode_frames(picture[None])
        texts = [await pipeline.text_encoder.encode(prompt) for prompt in ("a red ball", "")]
        request = DenoiseRequest("video", spec, texts[0], texts[1], source=EncodedSource(given))
        async with aclosing(pipeline.denoiser.denoise(request)) as events:
            chunks = [event.latents async for event in events if isinstance(event, LatentChunk)]
    made = np.concatenate(chunks, axis=1)
    noise = _Noise(SEED).draw(made.shape)[None]
    expected = reference(tiny_checkpoint, picture, noise, spec.frames).numpy()[0]
    assert np.abs(made[:, 0] - given[:, 0]).max() == 0
    assert np.abs(made - expected).max() <= 1e-3

    vae = AutoencoderKLWan.from_pretrained(tiny_checkpoint / "vae")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))

    def frames(latents: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            pixels = vae.decode(torch.from_numpy(latents)[None] * std + mean).sample[0].clamp(-1, 1)
        return ((pixels.permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()

    assert min(compare(frames(made), frames(expected))) >= LEAST_PSNR
    # Another picture makes another video, all through.
    other = replace(request, source=EncodedSource(np.flip(given, axis=2).copy()))
    async with opened_pipeline(tiny_bundle) as pipeline, aclosing(pipeline.denoiser.denoise(other)) as events:
        flipped = [event.latents async for event in events if isinstance(event, LatentChunk)]
    assert np.abs(np.concatenate(flipped, axis=1) - made)[:, -1].max() > 1e-2
