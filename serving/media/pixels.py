"""Fragments back to pixels: for machines that want frames, and for small pictures of what is in one."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from serving.media.previews import fitted, jpeg

# As the fragments are tagged.
_FROM = {"src_colorspace": Colorspace.ITU709, "src_color_range": ColorRange.MPEG}


@dataclass(frozen=True, slots=True)
class Picture:
    """What all frames of a video have in common."""

    width: int
    height: int
    fps: int


def describe(init: bytes, fragment: bytes) -> Picture:
    """Of a video's init segment and one of its fragments."""
    with _opened(init, fragment) as container:
        stream = container.streams.video[0]
        return Picture(stream.codec_context.width, stream.codec_context.height, round(stream.average_rate or 0))


def decode_fragment(init: bytes, fragment: bytes) -> NDArray[np.uint8]:
    """All its frames, RGB uint8 `[n, height, width, 3]`."""
    with _opened(init, fragment) as container:
        frames = container.decode(video=0)
        return np.stack([frame.reformat(format="rgb24", **_FROM).to_ndarray() for frame in frames])


def preview(init: bytes, fragment: bytes, max_side: int) -> bytes:
    """JPEG of a fragment's first frame, at most `max_side` pixels on its longer side."""
    with _opened(init, fragment) as container:
        frame = next(container.decode(video=0))
        width, height = fitted(frame.width, frame.height, max_side)
        return jpeg(frame.reformat(width, height, "rgb24", **_FROM).to_ndarray())


def _opened(init: bytes, fragment: bytes) -> Any:
    container = av.open(io.BytesIO(init + fragment), format="mp4")
    # A thread for each core would cost more than the few frames of a fragment.
    container.streams.video[0].thread_type = "NONE"
    return container
