"""What a video's size in pixels and frames is in latents."""

from __future__ import annotations

import math

from models.bundle import Manifest
from serving.pipeline.stages import VideoSpec


def latent_shape(manifest: Manifest, spec: VideoSpec) -> tuple[int, int, int, int]:
    """`(channels, frames, height, width)`, rounded up to what the denoiser can patch; the decoder crops the rest."""
    latent = manifest.latent

    def side(pixels: int) -> int:
        return -(-pixels // (latent.spatial * latent.patch)) * latent.patch

    frames = 1 + -(-(spec.frames - 1) // latent.temporal)
    return latent.channels, frames, side(spec.height), side(spec.width)


def first_frame(manifest: Manifest, chunk: int) -> int:
    """The video frame that a chunk starts with: the first latent frame is one frame, each later one `temporal`."""
    latents = chunk * manifest.chunk_latent_frames + (manifest.latent.lead if chunk else 0)
    return 1 + (latents - 1) * manifest.latent.temporal if latents else 0


def chunk_from(manifest: Manifest, seconds: float) -> int:
    """The first chunk that begins at this time or later."""
    if seconds <= 0:
        return 0
    # Rounded, or a frame's own time in floating point might fall behind the frame.
    latents = 1 + math.ceil((round(seconds * manifest.fps, 6) - 1) / manifest.latent.temporal)
    return math.ceil(latents / manifest.chunk_latent_frames)
