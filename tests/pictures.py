"""Small pictures and clips as clients would send them."""

from __future__ import annotations

import base64
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from serving.media.frames import write_exactly

Frames = NDArray[np.uint8]


def shaded(width: int = 64, height: int = 64, shade: int = 0) -> Frames:
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([across, down, np.full_like(across, shade)], axis=-1).astype(np.uint8)


def png(picture: Frames) -> bytes:
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt = *picture.shape[:2], "rgb24"
    encoder.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def clip(folder: Path, count: int, fps: int = 16, side: int = 64) -> bytes:
    path = folder / "clip.mkv"
    write_exactly(path, (shaded(side, side, 5 * index) for index in range(count)), fps)
    data = path.read_bytes()
    path.unlink()
    return data


PICTURE = png(shaded())


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
