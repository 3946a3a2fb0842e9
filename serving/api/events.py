"""`GET /v1/videos/{id}/events`: what happens to a video, as server-sent events (HTML Living Standard, 9.2).

An event is derived from the store and the log whenever somebody asks, so any replica tells the same story, and nothing
is kept for a client that went away. Chunks have their fragment's number as `id`: a client that comes back with
`Last-Event-ID` gets those after it, and how the video stands now. A `preview` is a picture of a chunk that is denoised
and not decoded yet, made of its latents alone.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse

from serving.api.auth import Owner
from serving.api.errors import ApiError
from serving.api.queueing import VideoQueue
from serving.api.schemas import video_object
from serving.api.watching import Watch, stream_headers
from serving.jobs.estimates import Estimates
from serving.jobs.fragment_log import LogEntry, LogFailed
from serving.jobs.storage import Storage
from serving.jobs.store import VideoStatus
from serving.media.pixels import describe, preview

_PREVIEW_SIDE = 128
_LOOK_SECONDS = 0.25
_HEARTBEAT_SECONDS = 10.0
# Events that were made and not yet sent: a client that doesn't read is waited for.
_WAITING = 4
_EVENT_ID = "[0-9]{0,9}"
# Checked by hand, so that the answer names the header as it is spelt.
LastEventId = Annotated[str, Header(json_schema_extra={"pattern": f"^{_EVENT_ID}$"})]
_DOCUMENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "`queued`, `started`, `progress`, `preview`, `chunk`, and at last `completed` or `failed`.",
        "content": {"text/event-stream": {}},
    }
}


def events_router(storage: Storage, queue: VideoQueue, estimates: Estimates) -> APIRouter:
    router = APIRouter(prefix="/v1/videos", tags=["videos"])

    @router.get("/{video_id}/events", response_class=Response, responses=_DOCUMENT)
    async def video_events(video_id: str, owner: Owner, last_event_id: LastEventId = "") -> Response:
        if not re.fullmatch(_EVENT_ID, last_event_id):
            message = "Last-Event-ID must be the id of an event of this video."
            raise ApiError(400, message, param="Last-Event-ID", code="invalid_value")
        watch = Watch(storage, await queue.existing(video_id, owner))
        told = _Telling(storage, estimates, watch, int(last_event_id) + 1 if last_event_id else 0)
        return StreamingResponse(told.events(), media_type="text/event-stream", headers=stream_headers(watch.video))

    return router


class _Telling:
    """One client being told of one video."""

    def __init__(self, storage: Storage, estimates: Estimates, watch: Watch, from_fragment: int) -> None:
        self._storage, self._estimates = storage, estimates
        self._watch, self._from = watch, from_fragment
        self._events: asyncio.Queue[bytes | None] = asyncio.Queue(_WAITING)
        self._fps = 0
        self._next_preview = from_fragment

    async def events(self) -> AsyncIterator[bytes]:
        telling = asyncio.gather(self._tell_state(), self._tell_chunks())
        ending = asyncio.ensure_future(self._end(telling))
        try:
            while True:
                try:
                    async with asyncio.timeout(_HEARTBEAT_SECONDS):
                        event = await self._events.get()
                except TimeoutError:
                    yield b": still here\n\n"
                    continue
                if event is None:
                    break
                yield event
            await ending
        finally:
            telling.cancel()
            ending.cancel()
            await asyncio.gather(telling, ending, return_exceptions=True)

    async def _end(self, telling: asyncio.Future[Any]) -> None:
        """The last event, once everything else is told."""
        try:
            await telling
            video = await self._storage.videos.get(self._watch.video.id)
            if video is None or video.deleted_at is not None:
                await self._put("failed", {"error": {"code": "video_deleted", "message": "The video is gone."}})
            else:
                await self._put(video.status.value, video_object(video).model_dump(mode="json"))
        finally:
            await self._events.put(None)

    async def _tell_state(self) -> None:
        """From the queue to the end, as the store has it; what changes faster than it is read is left out."""
        attempt, told = 0, ("", 0, 0)
        while True:
            video = await self._storage.videos.get(self._watch.video.id)
            if video is None or video.deleted_at is not None or video.status.final:
                return
            if video.status is VideoStatus.QUEUED:
                attempt = 0
                state: tuple[str, int, int] = "queued", await self._estimates.videos_ahead(video), 0
                if state != told:
                    await self._put("queued", {"position": state[1]})
            else:
                if video.attempt != attempt:
                    attempt = video.attempt
                    await self._put("started", {"attempt": attempt, "started_at": video.started_at})
                    told = "progress", 0, 0
                state = "progress", video.progress, video.step
                if state != told:
                    about = {"progress": video.progress, "step": video.step, "steps": video.steps}
                    await self._put("progress", about)
                await self._tell_previews()
            told = state
            await asyncio.sleep(_LOOK_SECONDS)

    async def _tell_previews(self) -> None:
        """Of chunks that haven't been told of themselves."""
        for index, picture in await self._storage.previews.since(self._watch.video.id, self._next_preview):
            if index >= self._next_preview:
                self._next_preview = index + 1
                await self._put("preview", {"index": index, "preview": _data_url(picture)})

    async def _tell_chunks(self) -> None:
        try:
            async with aclosing(self._watch.entries(self._from)) as entries:
                async for entry in entries:
                    self._next_preview = max(self._next_preview, entry.index + 1)
                    await self._put("chunk", await self._chunk(entry), id=entry.index)
        except LogFailed:
            return  # the store says the same, and is who says it to the client

    async def _chunk(self, entry: LogEntry) -> dict[str, Any]:
        init, fragment = await self._watch.init(), await self._watch.fragment(entry.index)
        if not self._fps:
            self._fps = (await asyncio.to_thread(describe, init, fragment)).fps
        picture = await asyncio.to_thread(preview, init, fragment, _PREVIEW_SIDE)
        return {
            "index": entry.index,
            "first_frame": entry.first_frame,
            "frames": entry.frames,
            "start_seconds": entry.first_frame / self._fps,
            "seconds": entry.frames / self._fps,
            "bytes": entry.size_bytes,
            "sha256": entry.sha256,
            "preview": _data_url(picture),
        }

    async def _put(self, name: str, data: dict[str, Any], *, id: int | None = None) -> None:
        lines = [f"event: {name}", f"data: {json.dumps({'video_id': self._watch.video.id, **data})}"]
        if id is not None:
            lines.insert(0, f"id: {id}")
        await self._events.put("\n".join([*lines, "", ""]).encode())


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
