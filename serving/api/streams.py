"""A video's bytes or pixels while it is made: its fragment log, followed, from wherever the client wants it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from serving.api.auth import Owner
from serving.api.errors import ApiError
from serving.api.queueing import VideoQueue
from serving.api.watching import Watch, nothing_to_show, stream_headers, stream_response
from serving.jobs.fragment_log import LogFailed
from serving.jobs.storage import Storage
from serving.media.pixels import decode_fragment, describe
from serving.media.previews import jpeg

StreamFormat = Literal["fmp4", "rgb24", "jpeg"]
_BOUNDARY = "frame"
_MULTIPART = f"multipart/x-mixed-replace; boundary={_BOUNDARY}"
_FIRST_FRAGMENT_SECONDS = 3600.0
_DOCUMENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The video while it is made: fragmented MP4, bare RGB frames, or a JPEG a part.",
        "content": {
            "video/mp4": {},
            "application/octet-stream": {},
            f"multipart/x-mixed-replace; boundary={_BOUNDARY}": {},
        },
    }
}


def streams_router(storage: Storage, queue: VideoQueue) -> APIRouter:
    router = APIRouter(prefix="/v1/videos", tags=["videos"])

    @router.get("/{video_id}/stream", response_class=Response, responses=_DOCUMENT)
    async def stream_video(
        video_id: str,
        owner: Owner,
        from_fragment: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
        format: StreamFormat = "fmp4",
    ) -> Response:
        """The video from a fragment on, as often and as late as anybody likes; it goes on until the video ends."""
        watch = Watch(storage, await queue.existing(video_id, owner))
        if format == "fmp4":
            return stream_response(watch, from_fragment)
        return await _pixels_response(watch, from_fragment, format)

    return router


async def _pixels_response(watch: Watch, from_fragment: int, format: StreamFormat) -> Response:
    shown = await watch.wait_for(1, _FIRST_FRAGMENT_SECONDS)
    if not shown.entries:
        if shown.end is not None:
            raise nothing_to_show(shown.end)
        raise ApiError(503, "The video has not begun yet.", code="video_not_ready", headers={"Retry-After": "5"})
    picture = describe(await watch.init(), await watch.fragment(0))
    about = {"X-Video-Width": picture.width, "X-Video-Height": picture.height, "X-Video-Fps": picture.fps}
    headers = stream_headers(watch.video) | {name: str(value) for name, value in about.items()}
    if format == "rgb24":
        return StreamingResponse(_rgb(watch, from_fragment), media_type="application/octet-stream", headers=headers)
    return StreamingResponse(_jpegs(watch, from_fragment), media_type=_MULTIPART, headers=headers)


async def _rgb(watch: Watch, from_fragment: int) -> AsyncIterator[bytes]:
    """Frames one after another, three bytes a pixel. A failed video cuts the connection: there is no other way here."""
    init = await watch.init()
    async with aclosing(watch.entries(from_fragment)) as entries:
        async for entry in entries:
            frames = await asyncio.to_thread(decode_fragment, init, await watch.fragment(entry.index))
            for frame in frames:
                yield frame.tobytes()


async def _jpegs(watch: Watch, from_fragment: int) -> AsyncIterator[bytes]:
    """A part a frame (as cameras send them), and one of JSON when the video fails."""
    init = await watch.init()
    try:
        async with aclosing(watch.entries(from_fragment)) as entries:
            async for entry in entries:
                frames = await asyncio.to_thread(decode_fragment, init, await watch.fragment(entry.index))
                for offset, frame in enumerate(frames):
                    yield _part("image/jpeg", await asyncio.to_thread(jpeg, frame), entry.first_frame + offset)
    except LogFailed as failure:
        error = json.dumps({"error": {"code": failure.code, "message": failure.message}}).encode()
        yield _part("application/json", error, None)
    yield f"--{_BOUNDARY}--\r\n".encode()


def _part(kind: str, data: bytes, frame: int | None) -> bytes:
    lines = [f"--{_BOUNDARY}", f"Content-Type: {kind}", f"Content-Length: {len(data)}"]
    lines += [f"X-Frame: {frame}"] if frame is not None else []
    return "\r\n".join([*lines, "", ""]).encode() + data + b"\r\n"
