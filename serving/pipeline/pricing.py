"""What a video costs, before it is made."""

from __future__ import annotations

from models.bundle import Manifest
from serving.pipeline.geometry import latent_shape
from serving.pipeline.shortcuts import guided_steps, reused_steps
from serving.pipeline.stages import VideoSpec


def work_of(manifest: Manifest, spec: VideoSpec) -> float:
    """Seconds, by the bundle's measured cost: alone on the machine that it was measured on.

    Without a measured cost, latent tokens through the denoiser: good for comparing, and for what a token takes once
    some videos are made.
    """
    _, frames, height, width = latent_shape(manifest, spec)
    chunks = -(-frames // manifest.chunk_latent_frames)
    tokens = (height // manifest.latent.patch) * (width // manifest.latent.patch)
    calls = asked = _steps_asked(manifest, spec, tokens * frames)
    if manifest.rollout == "causal":
        # Each chunk takes the steps and, but for the last, a pass that moves the cache on.
        tokens, calls = tokens * manifest.chunk_latent_frames, chunks * (asked + 1) - 1
    else:
        tokens *= frames
    guided = 0.0
    if spec.guidance_scale > 1:
        guided = sum(guided_steps(spec.num_inference_steps, spec.guidance_interval)) / spec.num_inference_steps
    if manifest.cost is None:
        return float((1 + guided) * tokens * calls * spec.best_of)
    pixels = spec.frames * spec.width * spec.height / chunks
    one, two = (manifest.cost.call_seconds(rows, tokens) for rows in (1, 2))
    denoising = calls * spec.best_of * (guided * two + (1 - guided) * one)
    return denoising + chunks * manifest.cost.chunk_seconds(pixels)


def _steps_asked(manifest: Manifest, spec: VideoSpec, tokens: int) -> int:
    steps = spec.num_inference_steps
    if spec.cache == "off":
        return steps
    table = manifest.sampler.table(steps, spec.guidance_scale, tokens, spec.sampler)
    return steps - sum(reused_steps(table.sigmas.tolist(), spec.cache))
