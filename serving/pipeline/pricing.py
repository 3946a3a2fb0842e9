"""What a video costs, before it is made."""

from __future__ import annotations

from models.bundle import Manifest
from serving.pipeline.geometry import latent_shape
from serving.pipeline.shortcuts import full_steps, guided_steps, reused_steps
from serving.pipeline.stages import VideoSpec


def work_of(manifest: Manifest, spec: VideoSpec) -> float:
    """Seconds, by the bundle's measured cost: alone on the machine that it was measured on.

    Without a measured cost, latent tokens through the denoiser: good for comparing, and for what a token takes once
    some videos are made.
    """
    _, frames, height, width = latent_shape(manifest, spec)
    chunks = -(-frames // manifest.chunk_latent_frames)
    tokens = (height // manifest.latent.patch) * (width // manifest.latent.patch)
    single, double = _calls(manifest, spec, tokens * frames)
    if manifest.rollout == "causal":
        tokens *= manifest.chunk_latent_frames
        single, double = chunks * single, chunks * double
        # Each chunk but the last takes a pass that moves the cache on, of all rows.
        if spec.guidance_scale > 1:
            double += chunks - 1
        else:
            single += chunks - 1
    else:
        tokens *= frames
    if manifest.cost is None:
        return float((single + 2 * double) * tokens * spec.best_of)
    pixels = spec.frames * spec.width * spec.height / chunks
    one, two = (manifest.cost.call_seconds(rows, tokens) for rows in (1, 2))
    return spec.best_of * (single * one + double * two) + chunks * manifest.cost.chunk_seconds(pixels)


def _calls(manifest: Manifest, spec: VideoSpec, tokens: int) -> tuple[int, int]:
    """How many calls of one row and of two the sampler's steps take, for what is denoised at a time."""
    steps = spec.num_inference_steps
    guided = [spec.guidance_scale > 1 and step for step in guided_steps(steps, spec.guidance_interval)]
    if spec.cache == spec.guidance_cache == "off":
        return steps - sum(guided), sum(guided)
    table = manifest.sampler.table(steps, spec.guidance_scale, tokens, spec.sampler)
    reused = reused_steps(table.sigmas.tolist(), spec.cache)
    boundary = manifest.experts.boundary_timestep if manifest.experts else 0.0
    full = sum(full_steps(guided, reused, (table.timesteps < boundary).tolist(), spec.guidance_cache))
    return steps - sum(reused) - full, full
