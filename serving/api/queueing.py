"""The last step of every request that makes a video: into the queue, and the answer."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Annotated, Protocol

from fastapi import Header, Request, Response

from serving.api.auth import may_see
from serving.api.beginnings import Beginnings
from serving.api.creation import idempotency
from serving.api.errors import ApiError
from serving.api.schemas import CreateVideoRequest, RemixVideoRequest, VideoObject, video_object
from serving.api.watching import Watch, stream_response
from serving.jobs.estimates import Estimates
from serving.jobs.keys import LimitReached
from serving.jobs.storage import Storage
from serving.jobs.store import IdempotencyConflict, Video, VideoNotFound
from serving.jobs.video import is_video_id
from serving.tracing import beginning

# For the OpenAPI document: it is read from the request where it is needed, and checked there.
IdempotencyKey = Annotated[
    str | None, Header(json_schema_extra={"minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"})
]
# Paths whose bodies may hold a video or a picture.
TAKE_FILES = ("/v1/videos", "/v1/videos/edits", "/v1/videos/extensions", "/v1/videos/characters")
_POLL_UNKNOWN_MS, _POLL_SOONEST_MS, _POLL_LATEST_MS = 1000, 250, 10_000


class Wake(Protocol):
    """Tells the runners that the store has news; they hear of it anyway, only later."""

    async def __call__(self, video_id: str | None = None) -> None:
        """Of a new video, or that this one is to stop."""


class VideoQueue:
    """What the routers that make videos, or look for one, share."""

    def __init__(self, storage: Storage, wake: Wake, beginnings: Beginnings, estimates: Estimates) -> None:
        self._storage, self._wake, self._beginnings = storage, wake, beginnings
        self._estimates = estimates

    async def existing(self, video_id: str, owner: str | None, param: str = "video_id") -> Video:
        """Raises `ApiError` (404) for a video that isn't there, or isn't this owner's to see."""
        video = await self._storage.videos.get(video_id) if is_video_id(video_id) else None
        if video is None or video.deleted_at is not None or not may_see(owner, video.owner):
            raise not_found(video_id, param)
        return video

    async def shown(self, video: Video, response: Response) -> VideoObject:
        """The answer's body; `response` gets the header that says when to ask again."""
        if video.status.final:
            return video_object(video)
        left = await self._estimates.seconds_left(video)
        response.headers["openai-poll-after-ms"] = str(_poll_after_ms(left))
        return video_object(video, estimated_seconds_left=left)

    async def cancel(self, video_id: str) -> Video:
        """Stop a video, if it hasn't ended. Raises `ApiError` (404) when somebody deleted it meanwhile."""
        return await self._stopped(video_id, self._storage.videos.request_cancel)

    async def delete(self, video_id: str) -> Video:
        """As `cancel`, and it is hidden from now on."""
        return await self._stopped(video_id, self._storage.videos.delete)

    async def _stopped(self, video_id: str, stop: Callable[[str], Awaitable[Video]]) -> Video:
        try:
            video = await stop(video_id)
        except VideoNotFound:
            raise not_found(video_id) from None
        if not video.status.final:
            await self._wake(video_id)
        return video

    async def put(
        self,
        request: Request,
        response: Response,
        video: Video,
        body: CreateVideoRequest | RemixVideoRequest,
        source: str,
    ) -> Response | VideoObject:
        """Put a checked video into the queue; what it begins from is kept already, and goes again if it isn't taken."""
        created = None
        try:
            key = idempotency(request.headers.get("idempotency-key"), body, source)
            with beginning(video.id, request.headers, model=video.model):
                created = await self._storage.videos.create(video, key)
        except IdempotencyConflict:
            message = "This Idempotency-Key was used for another request."
            raise ApiError(409, message, param="Idempotency-Key", code="idempotency_conflict") from None
        except LimitReached as error:
            headers = {"Retry-After": str(math.ceil(max(1.0, error.retry_seconds)))}
            raise ApiError(429, error.message, code="rate_limit_exceeded", headers=headers) from None
        finally:
            if source and (created is None or created.id != video.id):
                await self._beginnings.discard(video)
        await self._wake()
        if not body.stream:
            return await self.shown(created, response)
        return stream_response(Watch(self._storage, created))


def not_found(video_id: str, param: str = "video_id") -> ApiError:
    return ApiError(404, f"There is no video {video_id[:64]!r}.", param=param, code="video_not_found")


def _poll_after_ms(seconds_left: float | None) -> int:
    """When to ask again: about when it should be done, but soon enough to show progress."""
    if seconds_left is None:
        return _POLL_UNKNOWN_MS
    return round(min(_POLL_LATEST_MS, max(_POLL_SOONEST_MS, 1000 * seconds_left)))
