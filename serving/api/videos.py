"""`/v1/videos`: create, watch, list, ask about, download, cancel and delete."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from serving.api.auth import Owner, may_see
from serving.api.body import read_body
from serving.api.content import file_response
from serving.api.creation import WebhookPolicy, idempotency, new_video
from serving.api.errors import ApiError
from serving.api.models import Catalog
from serving.api.schemas import (
    CreateVideoRequest,
    DeletedVideo,
    VideoList,
    VideoObject,
    parse_create,
    video_object,
)
from serving.api.streams import follow_video
from serving.jobs.artifacts import video_key
from serving.jobs.keys import LimitReached
from serving.jobs.storage import Storage
from serving.jobs.store import IdempotencyConflict, Video, VideoNotFound, VideoStatus
from serving.jobs.sweeper import Sweeper
from serving.jobs.video import is_video_id

# The body is read by hand, for it may be JSON or a form: this says so in the OpenAPI document.
_CREATE_SCHEMA = CreateVideoRequest.model_json_schema()
_CREATE_DOCUMENT = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": _CREATE_SCHEMA} for kind in ("application/json", "multipart/form-data")},
    }
}
Variant = Literal["video", "thumbnail", "spritesheet"]
_FILES: dict[Variant, tuple[str, str]] = {
    "video": ("video.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
    "spritesheet": ("spritesheet.jpg", "image/jpeg"),
}
_CONTENT_DOCUMENT = {
    200: {"description": "The file.", "content": {kind: {} for _, kind in _FILES.values()}},
    206: {"description": "The part of it that `Range` asked for."},
    304: {"description": "It is what `If-None-Match` named."},
}
_POLL_UNKNOWN_MS, _POLL_SOONEST_MS, _POLL_LATEST_MS = 1000, 250, 10_000


def videos_router(
    storage: Storage, catalog: Catalog, wake: Callable[[], Awaitable[None]], webhooks: WebhookPolicy
) -> APIRouter:
    router = APIRouter(prefix="/v1/videos", tags=["videos"])
    store, artifacts = storage.videos, storage.artifacts
    sweeper = Sweeper(store, artifacts)

    async def existing(video_id: str, owner: str | None) -> Video:
        video = await store.get(video_id) if is_video_id(video_id) else None
        if video is None or video.deleted_at is not None or not may_see(owner, video.owner):
            raise _not_found(video_id)
        return video

    async def shown(video: Video, response: Response) -> VideoObject:
        if not video.status.final:
            response.headers["openai-poll-after-ms"] = str(_poll_after_ms(await storage.estimates.seconds_left(video)))
        return video_object(video)

    @router.post("", response_model=VideoObject, openapi_extra=_CREATE_DOCUMENT)
    async def create_video(
        request: Request, response: Response, owner: Owner, idempotency_key: Annotated[str | None, Header()] = None
    ) -> Response | VideoObject:
        values, form = await read_body(request)
        body = parse_create(values, form=form)
        try:
            asked = new_video(body, catalog, webhooks, owner=owner)
            video = await store.create(asked, idempotency(idempotency_key, body))
        except IdempotencyConflict:
            message = "This Idempotency-Key was used for another request."
            raise ApiError(409, message, param="Idempotency-Key", code="idempotency_conflict") from None
        except LimitReached as error:
            headers = {"Retry-After": str(math.ceil(max(1.0, error.retry_seconds)))}
            raise ApiError(429, error.message, code="rate_limit_exceeded", headers=headers) from None
        await wake()
        if not body.stream:
            return await shown(video, response)
        # Closing this connection ends the watching, not the video.
        return StreamingResponse(
            follow_video(store, artifacts.videos_dir, video.id),
            media_type="video/mp4",
            headers={"X-Video-Id": video.id, "Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    @router.get("")
    async def list_videos(
        owner: Owner,
        limit: Annotated[int, Query(ge=0, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> VideoList:
        if after is not None and not is_video_id(after):
            raise ApiError(400, "after must be a video's id.", param="after", code="invalid_value")
        page = await store.list(owner=owner, limit=limit, order=order, after=after)
        return VideoList(
            data=[video_object(video) for video in page.videos],
            first_id=page.videos[0].id if page.videos else None,
            last_id=page.videos[-1].id if page.videos else None,
            has_more=page.has_more,
        )

    @router.get("/{video_id}")
    async def retrieve_video(video_id: str, owner: Owner, response: Response) -> VideoObject:
        return await shown(await existing(video_id, owner), response)

    @router.post("/{video_id}/cancel")
    async def cancel_video(video_id: str, owner: Owner, response: Response) -> VideoObject:
        """A queued video fails at once, a running one within a step; one that has ended stays as it is."""
        await existing(video_id, owner)
        try:
            cancelled = await store.request_cancel(video_id)
        except VideoNotFound:  # somebody deleted it meanwhile
            raise _not_found(video_id) from None
        return await shown(cancelled, response)

    @router.delete("/{video_id}")
    async def delete_video(video_id: str, owner: Owner) -> DeletedVideo:
        """Cancels it where it isn't finished. Its files go with it."""
        await existing(video_id, owner)
        try:
            deleted = await store.delete(video_id)
        except VideoNotFound:  # somebody else deleted it meanwhile
            raise _not_found(video_id) from None
        if deleted.status.final:
            await sweeper.remove(deleted)
        return DeletedVideo(id=video_id)

    @router.get("/{video_id}/content", response_class=Response, responses=_CONTENT_DOCUMENT)  # type: ignore[arg-type]
    async def download_video(request: Request, video_id: str, owner: Owner, variant: Variant = "video") -> Response:
        video = await existing(video_id, owner)
        if video.status is VideoStatus.FAILED:
            raise ApiError(400, f"The video failed: {video.error_message}", param="video_id", code="video_failed")
        if video.status is not VideoStatus.COMPLETED:
            message = f"The video is {video.status.value}; its content is there when it is completed."
            raise ApiError(400, message, param="video_id", code="video_not_ready")
        name, kind = _FILES[variant]
        file = (video.artifacts or {}).get(name)
        if file is None:
            raise ApiError(404, f"The video has no {variant}.", param="variant", code="not_found")
        suffix = name.partition(".")[2]
        return file_response(
            request,
            artifacts,
            video_key(video.id, name),
            file,
            kind=kind,
            name=f"{video.id}.{suffix}",
            made=video.completed_at or 0.0,
        )

    router.head("/{video_id}/content", include_in_schema=False)(download_video)
    return router


def _not_found(video_id: str) -> ApiError:
    return ApiError(404, f"There is no video {video_id[:64]!r}.", param="video_id", code="video_not_found")


def _poll_after_ms(seconds_left: float | None) -> int:
    """When to ask again: about when it should be done, but soon enough to show progress."""
    if seconds_left is None:
        return _POLL_UNKNOWN_MS
    return round(min(_POLL_LATEST_MS, max(_POLL_SOONEST_MS, 1000 * seconds_left)))
