"""`/v1/videos`: create, watch, list, ask about, download, cancel and delete."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from serving.api.auth import Owner
from serving.api.beginnings import Beginnings
from serving.api.body import opened_body
from serving.api.content import file_response
from serving.api.creation import WebhookPolicy, new_video
from serving.api.document import body_document, id_pattern
from serving.api.errors import ApiError
from serving.api.models import Catalog
from serving.api.queueing import IdempotencyKey, VideoQueue
from serving.api.schemas import CreateVideoRequest, DeletedVideo, VideoList, VideoObject, parse_create, video_object
from serving.jobs.artifacts import video_key
from serving.jobs.storage import Storage
from serving.jobs.store import VideoStatus
from serving.jobs.sweeper import Sweeper
from serving.jobs.video import is_video_id

Variant = Literal["video", "thumbnail", "spritesheet"]
_FILES: dict[Variant, tuple[str, str]] = {
    "video": ("video.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
    "spritesheet": ("spritesheet.jpg", "image/jpeg"),
}
_CONTENT_DOCUMENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file.", "content": {kind: {} for _, kind in _FILES.values()}},
    206: {"description": "The part of it that `Range` asked for."},
    304: {"description": "It is what `If-None-Match` named."},
}


def videos_router(
    storage: Storage, catalog: Catalog, webhooks: WebhookPolicy, queue: VideoQueue, beginnings: Beginnings
) -> APIRouter:
    router = APIRouter(prefix="/v1/videos", tags=["videos"])
    store, artifacts = storage.videos, storage.artifacts
    sweeper = Sweeper(store, artifacts)

    @router.post(
        "",
        response_model=VideoObject,
        openapi_extra=body_document(CreateVideoRequest, catalog, webhooks=webhooks.enabled, picture=True),
    )
    async def create_video(
        request: Request, response: Response, owner: Owner, idempotency_key: IdempotencyKey = None
    ) -> Response | VideoObject:
        async with opened_body(request) as (values, form):
            asked = values if isinstance(values, dict) else {}
            reference, characters = asked.pop("input_reference", None), asked.pop("characters", None)
            body = parse_create(values, form=form)
            begins = reference is not None or characters is not None
            video, source = new_video(body, catalog, webhooks, owner=owner, begins=begins), ""
            manifest = catalog.resolve(body.model)[1]
            if reference is not None and characters is not None:
                message = "characters can't be used together with input_reference: a video begins with one picture."
                raise ApiError(400, message, param="characters", code="invalid_value")
            if reference is not None:
                video, source = await beginnings.from_picture(video, manifest, reference, owner)
            if characters is not None:
                video, source = await beginnings.from_character(video, manifest, characters, owner)
        return await queue.put(request, response, video, body, source)

    @router.get("")
    async def list_videos(
        owner: Owner,
        limit: Annotated[int, Query(ge=0, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(json_schema_extra={"pattern": id_pattern("video_")})] = None,
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
        return await queue.shown(await queue.existing(video_id, owner), response)

    @router.post("/{video_id}/cancel")
    async def cancel_video(video_id: str, owner: Owner, response: Response) -> VideoObject:
        """A queued video fails at once, a running one within a step; one that has ended stays as it is."""
        await queue.existing(video_id, owner)
        return await queue.shown(await queue.cancel(video_id), response)

    @router.delete("/{video_id}")
    async def delete_video(video_id: str, owner: Owner) -> DeletedVideo:
        """Cancels it where it isn't finished. Its files go with it."""
        await queue.existing(video_id, owner)
        deleted = await queue.delete(video_id)
        if deleted.status.final:
            await sweeper.remove(deleted)
        return DeletedVideo(id=video_id)

    @router.get("/{video_id}/content", response_class=Response, responses=_CONTENT_DOCUMENT)
    async def download_video(request: Request, video_id: str, owner: Owner, variant: Variant = "video") -> Response:
        video = await queue.existing(video_id, owner)
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
