"""How an attempt's video does against the clock: what its viewers feel, as measurements."""

from __future__ import annotations

import time
from collections.abc import Callable

from serving.jobs.video import Video
from serving.metrics import CHUNK_INTERVAL, DEADLINES, FIRST_CHUNK, REALTIME_FACTOR, VIDEOS_ENDED


class Timing:
    """Of one attempt, which begins now. Times are seconds since the epoch, as the store's are."""

    def __init__(self, video: Video, frames: int, clock: Callable[[], float] = time.time) -> None:
        self._model, self._created_at = video.model, video.created_at
        self._seconds, self._frames = float(video.seconds), frames
        self._clock = clock
        self._began_at = clock()
        self._first_at: float | None = None
        self._last_at: float | None = None

    def chunk(self, first_frame: int) -> None:
        """One that begins with this frame can be seen from now on.

        A player that began with the first one needs it when it has played all before. Of a video whose first chunk
        another attempt made, nobody knows when that was.
        """
        now = self._clock()
        if first_frame == 0:
            self._first_at = now
            FIRST_CHUNK.observe(max(0.0, now - self._created_at), model=self._model)
        if self._first_at is not None:
            needed_at = self._first_at + self._seconds * first_frame / self._frames
            DEADLINES.add(model=self._model, deadline="met" if now <= needed_at else "missed")
        if self._last_at is not None:
            CHUNK_INTERVAL.observe(now - self._last_at, model=self._model)
        self._last_at = now

    def ended(self, outcome: str) -> None:
        """The attempt is over; `outcome` is one of those that `VIDEOS_ENDED` declares."""
        VIDEOS_ENDED.add(model=self._model, outcome=outcome)
        if outcome == "completed" and self._seconds:
            REALTIME_FACTOR.observe((self._clock() - self._began_at) / self._seconds, model=self._model)
