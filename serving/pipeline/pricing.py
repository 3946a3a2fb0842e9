"""What a video costs, before it is made."""

from __future__ import annotations

from models.bundle import Manifest
from serving.pipeline.geometry import latent_shape
from serving.pipeline.stages import VideoSpec


def work_of(manifest: Manifest, spec: VideoSpec) -> float:
    """Seconds, by the bundle's measured cost: alone on the machine that it was measured on.

    Without a measured cost, latent tokens through the denoiser: good for comparing, and for what a token takes once
    some videos are made.
    """
    _, frames, height, width = latent_shape(manifest, spec)
    rows = 2 if spec.guidance_scale > 1 else 1
    chunks = -(-frames // manifest.chunk_latent_frames)
    tokens, calls = (height // manifest.latent.patch) * (width // manifest.latent.patch), spec.num_inference_steps
    if manifest.rollout == "causal":
        # Each chunk takes the steps and, but for the last, a pass that moves the cache on.
        tokens, calls = tokens * manifest.chunk_latent_frames, chunks * (spec.num_inference_steps + 1) - 1
    else:
        tokens *= frames
    if manifest.cost is None:
        return float(rows * tokens * calls * spec.best_of)
    pixels = spec.frames * spec.width * spec.height / chunks
    denoising = calls * spec.best_of * manifest.cost.call_seconds(rows, tokens)
    return denoising + chunks * manifest.cost.chunk_seconds(pixels)
