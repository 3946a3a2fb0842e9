"""Reading the frames of videos and pictures, as a model wants them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from numpy.typing import NDArray

# In frames: a container's clock is coarse.
_SLACK = 0.25
# More frames a second are no video that anybody means: a small file can stand for millions that show at one time.
_MOST_FPS = 1000
# Files that hold pictures, and none that name other files or URLs to read them from, such as playlists.
_FORMATS = (
    "matroska,mov,avi,mpegts,mpeg,flv,ogg,asf,mxf,ivf,h264,hevc,m4v,gif,apng,avif,png_pipe,jpeg_pipe,webp_pipe,"
    "bmp_pipe,tiff_pipe,jpegxl_pipe,ppm_pipe"
)
# What is larger is no video or picture that anybody means: a small file can stand for gigabytes.
_MAX_PIXELS = 1 << 26


class UnreadableError(OSError):
    """A file that is no video or picture, or a broken one."""


def read_frames(path: Path, *, fps: int, width: int, height: int) -> Iterator[NDArray[np.uint8]]:
    """RGB frames `[height, width, 3]`, scaled to cover the size and cut at the edges, repeated or left out to give
    `fps` frames a second.

    Raises `UnreadableError`.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        began = float((stream.start_time or 0) * (stream.time_base or 0))
        due, at, shown = 0, 0.0, None
        for number, frame in enumerate(container.decode(stream)):
            at = ((frame.time or 0.0) - began) * fps
            if number > _MOST_FPS * (1 + max(at, 0.0) / fps):
                raise UnreadableError(f"it has more than {_MOST_FPS} frames a second")
            while shown is not None and due < at - _SLACK:
                yield _covering(shown, width, height)
                due += 1
            shown = frame
        if shown is None:
            raise UnreadableError("it has no frames")
        if due <= at + _SLACK:
            yield _covering(shown, width, height)


def read_all(path: Path, width: int, height: int, count: int) -> NDArray[np.uint8]:
    """The first `count` frames `[count, height, width, 3]` of a file of this very size. Raises `UnreadableError`."""
    with _opened(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), count)]
    if len(frames) < count or frames[0].shape != (height, width, 3):
        found = f"{len(frames)} frames of {frames[0].shape[1]}x{frames[0].shape[0]}" if frames else "no frames"
        raise UnreadableError(f"it has {found} instead of {count} of {width}x{height}")
    return np.stack(frames)


def middle_frame(path: Path, *, max_seconds: float, max_side: int) -> NDArray[np.uint8]:
    """The RGB frame in the middle of a video, upright, scaled down until no side is longer than `max_side`.

    Raises `UnreadableError`, also for a video that is longer than `max_seconds`.
    """
    with _opened(path) as container:
        count = 0
        for frame in container.decode(video=0):
            count += 1
            if (frame.time or 0.0) > max_seconds or count > max_seconds * _MOST_FPS:
                raise UnreadableError(f"it is longer than {max_seconds:g} seconds")
    with _opened(path) as container:
        for frame in islice(container.decode(video=0), count // 2, None):
            shape = (frame.width, frame.height)
            across, down = shape[::-1] if frame.rotation % 180 else shape
            scale = min(1.0, max_side / max(shape))
            return _covering(frame, max(1, round(across * scale)), max(1, round(down * scale)))
    raise UnreadableError("it has no frames")


def write_exactly(path: Path, frames: Iterator[NDArray[np.uint8]], fps: int) -> int:
    """Write RGB frames so that `read_all` gives back every bit of them (FFV1); how many there were.

    The same frames make the same file: Matroska's random ids are left out.
    """
    count = 0
    with av.open(str(path), "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream("ffv1", rate=Fraction(fps))
                stream.height, stream.width, stream.pix_fmt = frame.shape[0], frame.shape[1], "bgr0"
            packets = stream.encode(VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0"))
            container.mux(packets)
            count += 1
        if stream is not None:
            container.mux(stream.encode(None))
    return count


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    try:
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        with av.open(str(path), options=options) as container:
            if not container.streams.video:
                raise UnreadableError("it has no picture in it")
            codec: Any = container.streams.video[0].codec_context
            if codec.width * codec.height > _MAX_PIXELS:
                raise UnreadableError(f"its {codec.width}x{codec.height} pixels are too many")
            codec.options = {"max_pixels": str(_MAX_PIXELS)}  # a later frame may be larger than the first
            yield container
    except av.FFmpegError as error:
        reason = str(error.strerror or error).partition(":")[0]
        raise UnreadableError(f"it can't be read as a video or a picture ({reason})") from error


def _covering(frame: VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
    """The frame upright, scaled until it covers the size, its middle."""
    turned = frame.rotation % 180 != 0
    across, down = (frame.height, frame.width) if turned else (frame.width, frame.height)
    scale = max(width / across, height / down)
    scaled = max(width, round(across * scale)), max(height, round(down * scale))
    picture = frame.to_ndarray(
        format="rgb24", width=scaled[1] if turned else scaled[0], height=scaled[0] if turned else scaled[1]
    )
    picture = np.rot90(picture, round(frame.rotation / 90))
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return np.ascontiguousarray(picture[top : top + height, left : left + width])
