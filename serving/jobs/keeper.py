"""Keeps a video's checkpoint among the artifacts while it is made, and finds it again.

A write never holds the video up: pieces are put in the background, in order. One that can't be put is tried again for a
while; what is missing at the end is made again by the next attempt.

Two attempts may for a moment write at once, which an object store has no lock against. That is why an attempt looks at
its fence before each write, and why it does no harm if it is overtaken after that: whoever writes a piece under the
same name for the same identity writes the same bytes, or a sampler's state that is as good.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from tenacity import retry_if_not_exception_type, stop_after_delay, wait_exponential
from tenacity.asyncio import AsyncRetrying

from serving.jobs.artifacts import Artifacts, checkpoint_key
from serving.jobs.checkpoint import BadPiece, Checkpoint, Piece, pack, unpack
from serving.jobs.video import StaleFence

_log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 60.0
# How long an attempt that ends waits for what is still to be put.
_LAST_SECONDS = 10.0

_T = TypeVar("_T")
_Place = tuple[int, int | None]  # candidate, and the chunk's index or None for the sampler's state


class Keeper:
    """One attempt's view of one video's checkpoint. `identity` is all that determines the latents."""

    def __init__(self, artifacts: Artifacts, video_id: str, identity: str, check_fence: Callable[[], None]) -> None:
        """`check_fence` raises `StaleFence`, or `OSError` when the video is gone altogether."""
        self._artifacts, self._video_id, self._identity = artifacts, video_id, identity
        self._check_fence = check_fence
        self._waiting: deque[tuple[_Place, Piece]] = deque()
        self._work = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None
        self._closing = False
        self.kept = 0
        """How many pieces this attempt has added."""

    async def begun(self, candidate: int) -> Checkpoint:
        """What an earlier attempt kept. A piece that can't be trusted ends it: nothing behind it is looked at."""
        found = Checkpoint()
        while not found.whole and (piece := await self._read((candidate, len(found.chunks)))) is not None:
            found = found.with_chunk(piece.array, last=piece.last)
        if not found.whole and (state := await self._read((candidate, None))) is not None:
            found = found.with_state(state.number, state.array)
        if found.chunks or found.step:
            _log.info("%s: goes on after %d chunks and step %d", self._video_id, len(found.chunks), found.step)
        return found

    def keep_chunk(self, candidate: int, chunk: Piece) -> None:
        self._put_soon((candidate, chunk.number), chunk)

    def keep_state(self, candidate: int, state: Piece) -> None:
        # One that still waits is out of date.
        self._waiting = deque(item for item in self._waiting if item[0] != (candidate, None))
        self._put_soon((candidate, None), state)

    async def close(self, *, flush: bool = True) -> None:
        """Put what still waits, for some seconds at most, unless nobody will want it."""
        self._closing = True
        if not flush:
            self._waiting.clear()
        self._work.set()
        if self._writing is not None:
            await asyncio.wait({self._writing}, timeout=_LAST_SECONDS)
            self._writing.cancel()
            with suppress(asyncio.CancelledError):
                await self._writing

    def _put_soon(self, place: _Place, piece: Piece) -> None:
        self._waiting.append((place, piece))
        self._work.set()
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all())

    async def _write_all(self) -> None:
        while True:
            while self._waiting:
                place, piece = self._waiting.popleft()
                try:
                    await self._write(place, piece)
                except StaleFence:
                    return
                except Exception:
                    _log.warning("%s: a part of its checkpoint is missing", self._video_id, exc_info=True)
            if self._closing:
                return
            self._work.clear()
            await self._work.wait()

    async def _write(self, place: _Place, piece: Piece) -> None:
        await self._patiently(self._put, place, piece)
        self.kept += 1

    def _put(self, place: _Place, piece: Piece) -> None:
        data = pack(piece, self._identity)
        self._check_fence()
        self._artifacts.put_bytes(self._key(place), data)

    async def _read(self, place: _Place) -> Piece | None:
        try:
            piece = unpack(await self._patiently(self._artifacts.get_bytes, self._key(place)), self._identity)
            if place[1] not in (None, piece.number):
                raise BadPiece(f"it is number {piece.number}")
        except FileNotFoundError:
            return None
        except Exception as error:  # a BadPiece, or a file store that stays away
            _log.warning("%s: %s is not used: %s", self._video_id, self._key(place), error)
            return None
        return piece

    async def _patiently(self, work: Callable[..., _T], *args: Any) -> _T:
        """Call it in a thread, for a minute if need be. A file that isn't there is an answer."""
        retried = retry_if_not_exception_type((StaleFence, FileNotFoundError, asyncio.CancelledError))
        waits = wait_exponential(multiplier=0.2, max=5)
        retrying = AsyncRetrying(retry=retried, stop=stop_after_delay(_PATIENCE_SECONDS), wait=waits, reraise=True)
        return await retrying(self._artifacts.in_thread, work, *args)

    def _key(self, place: _Place) -> str:
        candidate, chunk = place
        name = "state" if chunk is None else f"{chunk:08d}"
        return f"{checkpoint_key(self._video_id)}/{candidate}-{name}"
