"""A picture of latents: what is denoised can be seen before it is decoded, small and without its details."""

from __future__ import annotations

import av
import numpy as np
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from models.bundle import PreviewInfo
from serving.media.previews import fitted, jpeg

_MAX_SIDE = 128


def latent_preview(latents: NDArray[np.float32], colours: PreviewInfo) -> bytes:
    """JPEG of the first frame of normalised latents `[channels, frames, height, width]`, up to 128 pixels a side."""
    picture = latents[:, 0].transpose(1, 2, 0) @ np.array(colours.factors) + np.array(colours.bias)
    pixels = np.ascontiguousarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
    height, width, _ = pixels.shape
    scale = max(1, _MAX_SIDE // max(width, height))
    larger = fitted(width * scale, height * scale, _MAX_SIDE)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return jpeg(frame.reformat(*larger, "rgb24", interpolation=Interpolation.BICUBIC).to_ndarray())
