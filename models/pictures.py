"""How a picture is put before a model that makes videos of one (Wan 2.1 and A14B image-to-video). Without torch.

The denoiser's `condition` `[temporal + channels, frames, height, width]` is a mask, 1 where a frame is given, and the
latents of a video that shows the picture and then grey. Wan 2.1 also sees the picture through CLIP.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What is 0 between -1 and 1.
GREY = 127.5
# The slope of the cubic that PIL resizes with.
_CUBIC = -0.5
_FIXED = 1 << 22

Pixels = NDArray[np.uint8]


def with_grey(picture: Pixels, frames: int) -> Iterator[NDArray[Any]]:
    """The frames `[height, width, 3]` of the video whose latents are the condition."""
    return chain([picture], repeat(np.full(picture.shape, GREY, np.float32), frames - 1))


def condition_of(latents: NDArray[np.float32], temporal: int) -> NDArray[np.float32]:
    """The condition, of the latents `[channels, frames, height, width]` of `with_grey`."""
    mask = np.zeros((temporal, *latents.shape[1:]), np.float32)
    mask[:, 0] = 1
    return np.concatenate([mask, latents])


def looked_at(picture: Pixels, side: int) -> Pixels:
    """The square `[side, side, 3]` that CLIP gets of a picture `[height, width, 3]`: its shorter side scaled to `side`,
    and the middle of the longer one.

    As `CLIPImageProcessor` makes it by PIL's bicubic filter, bit for bit where PIL too begins with the rows.
    """
    height, width, _ = picture.shape
    shorter = min(height, width)
    tall, wide = int(side * height / shorter), int(side * width / shorter)
    across = _rounded(np.einsum("ow,hwc->hoc", _weights(width, wide), picture))
    scaled = _rounded(np.einsum("oh,hwc->owc", _weights(height, tall), across))
    top, left = (tall - side) // 2, (wide - side) // 2
    return scaled[top : top + side, left : left + side]


def _weights(size: int, wanted: int) -> NDArray[np.float64]:
    """`[wanted, size]`: what each new pixel takes of each old one; when shrinking the cubic spans as much more."""
    scale = size / wanted
    spread = max(1.0, scale)
    centres = (np.arange(wanted) + 0.5) * scale
    # As PIL counts them: from the first to the last pixel whose middle may be within the cubic.
    first = np.maximum(0, np.floor(centres - 2 * spread + 0.5))
    last = np.minimum(size, np.floor(centres + 2 * spread + 0.5))
    pixels = np.arange(size)
    there = (pixels >= first[:, None]) & (pixels < last[:, None])
    x = np.abs((pixels + 0.5 - centres[:, None]) / spread)
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _CUBIC
    weights = np.where(there, np.where(x < 1, near, np.where(x < 2, far, 0)), 0)
    # In PIL's fixed point.
    fixed: NDArray[np.float64] = np.rint(weights / weights.sum(axis=1, keepdims=True) * _FIXED) / _FIXED
    return fixed


def _rounded(values: NDArray[np.float64]) -> Pixels:
    rounded: Pixels = np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)
    return rounded
