"""Still pictures of a finished video: a thumbnail, and a sprite sheet to scrub over."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

# As OpenAI's service answered: a WebP thumbnail, a JPEG sprite sheet.
THUMBNAIL_TYPE, SPRITE_SHEET_TYPE = "image/webp", "image/jpeg"

SPRITE_COLUMNS = 5
_MAX_TILES = 25
_MAX_TILE_SIDE = 256
_MAX_THUMBNAIL_SIDE = 512


def thumbnail(video: Path) -> bytes:
    """WebP: the frame in the middle, at most 512 pixels on its longer side. Raises `ValueError` without a frame."""
    (picture,) = _frames(video, 1, _MAX_THUMBNAIL_SIDE)
    return _encode(picture, "libwebp", "yuv420p", {"quality": "85"})


def sprite_sheet(video: Path) -> bytes:
    """JPEG: up to 25 frames at even distances, five in a row, left to right and then down, each at most 256 pixels."""
    tiles = _frames(video, _MAX_TILES, _MAX_TILE_SIDE)
    height, width, _ = tiles[0].shape
    columns = min(SPRITE_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = tile
    return jpeg(sheet)


def jpeg(picture: NDArray[np.uint8]) -> bytes:
    """Of RGB uint8 `[height, width, 3]`, with even sides."""
    return _encode(picture, "mjpeg", "yuvj420p", {"qmin": "3", "qmax": "3"})


def _frames(video: Path, most: int, max_side: int) -> list[NDArray[np.uint8]]:
    """RGB uint8 `[height, width, 3]` from the middles of `most` equal parts; fewer when the video has fewer."""
    with av.open(str(video)) as opened:
        stream = opened.streams.video[0]
        stream.thread_type = "NONE"
        total = stream.frames
        if total == 0:
            raise ValueError(f"{video} has no frames")
        count = min(most, total)
        wanted = {int((index + 0.5) * total / count) for index in range(count)}
        width, height = fitted(stream.codec_context.width, stream.codec_context.height, max_side)
        return [
            frame.reformat(width, height, "rgb24").to_ndarray()
            for index, frame in enumerate(opened.decode(stream))
            if index in wanted
        ]


def fitted(width: int, height: int, max_side: int) -> tuple[int, int]:
    """`(width, height)` with the longer side at most `max_side`, and even sides, as 4:2:0 needs them."""
    scale = min(Fraction(1), Fraction(max_side, max(width, height)))
    return max(2, int(width * scale) // 2 * 2), max(2, int(height * scale) // 2 * 2)


def _encode(picture: NDArray[np.uint8], codec: str, pixel_format: str, options: dict[str, str]) -> bytes:
    height, width, _ = picture.shape
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, pixel_format
    encoder.time_base = Fraction(1, 25)
    encoder.options = options
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format=pixel_format)
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
