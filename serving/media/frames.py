"""Reading a video's frames, as a model wants them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

# In frames: a container's clock is coarse.
_SLACK = 0.25


def read_frames(path: Path, *, fps: int, width: int, height: int) -> Iterator[NDArray[np.uint8]]:
    """RGB frames `[height, width, 3]`, scaled to the size, repeated or left out to give `fps` frames a second.

    Raises `OSError` for a file that is no video.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise OSError(f"{path} has no video stream")
            stream = container.streams.video[0]
            began = float((stream.start_time or 0) * (stream.time_base or 0))
            due, at, shown = 0, 0.0, None
            for frame in container.decode(stream):
                at = ((frame.time or 0.0) - began) * fps
                while shown is not None and due < at - _SLACK:
                    yield shown.to_ndarray(format="rgb24", width=width, height=height)
                    due += 1
                shown = frame
            if shown is None:
                raise OSError(f"{path} has no frames")
            if due <= at + _SLACK:
                yield shown.to_ndarray(format="rgb24", width=width, height=height)
    except av.FFmpegError as error:
        raise OSError(f"{path} can't be read as a video: {error}") from error
