"""`/v1/videos`: create, watch, ask about and download."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from serving.api.body import read_body
from serving.api.errors import ApiError
from serving.api.models import Catalog
from serving.api.schemas import CreateVideoRequest, VideoObject, parse_create, video_object
from serving.api.streams import follow_video
from serving.jobs.artifacts import finished_path
from serving.jobs.store import Video, VideoStatus, VideoStore, new_video_id
from serving.jobs.video import is_video_id
from serving.pipeline.request import InvalidRequest, make_spec

# The body is read by hand, for it may be JSON or a form: this says so in the OpenAPI document.
_CREATE_SCHEMA = CreateVideoRequest.model_json_schema()
_CREATE_DOCUMENT = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": _CREATE_SCHEMA} for kind in ("application/json", "multipart/form-data")},
    }
}


def videos_router(
    store: VideoStore, videos_dir: Path, catalog: Catalog, wake: Callable[[], Awaitable[None]]
) -> APIRouter:
    router = APIRouter(prefix="/v1/videos", tags=["videos"])

    async def existing(video_id: str) -> Video:
        video = await store.get(video_id) if is_video_id(video_id) else None
        if video is None:
            raise ApiError(404, f"There is no video {video_id[:64]!r}.", param="video_id", code="video_not_found")
        return video

    @router.post("", response_model=VideoObject, openapi_extra=_CREATE_DOCUMENT)
    async def create_video(request: Request) -> Response | VideoObject:
        values, form = await read_body(request)
        body = parse_create(values, form=form)
        video = await store.create(_new_video(body, catalog))
        await wake()
        if not body.stream:
            return video_object(video)
        # Closing this connection ends the watching, not the video.
        return StreamingResponse(
            follow_video(store, videos_dir, video.id),
            media_type="video/mp4",
            headers={"X-Video-Id": video.id, "Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    @router.get("/{video_id}")
    async def retrieve_video(video_id: str) -> VideoObject:
        return video_object(await existing(video_id))

    @router.get("/{video_id}/content", response_class=FileResponse)
    async def download_video(video_id: str, variant: Literal["video"] = "video") -> FileResponse:
        video = await existing(video_id)
        if video.status is VideoStatus.FAILED:
            raise ApiError(400, f"The video failed: {video.error_message}", param="video_id", code="video_failed")
        if video.status is not VideoStatus.COMPLETED:
            message = f"The video is {video.status.value}; its content is there when it is completed."
            raise ApiError(400, message, param="video_id", code="video_not_ready")
        path = finished_path(videos_dir, video.id)
        return FileResponse(path, media_type="video/mp4", filename=f"{video.id}.mp4")

    return router


def _new_video(body: CreateVideoRequest, catalog: Catalog) -> Video:
    """Raises `ApiError`, which names the parameter; nothing is written before everything is checked."""
    model, manifest = catalog.resolve(body.model)
    try:
        spec = make_spec(
            manifest,
            body.prompt,
            seconds=body.seconds,
            size=body.size,
            seed=body.seed,
            negative_prompt=body.negative_prompt,
            num_inference_steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
            rewrite_prompt=body.rewrite_prompt,
            best_of=body.best_of,
            can_rewrite=catalog.rewriter.serves(manifest),
            rewrite_by_default=catalog.rewriter.by_default,
            scene_prompts=body.scene_prompts,
        )
    except InvalidRequest as error:
        raise ApiError(400, f"{error.message}.", param=error.param, code="invalid_value") from None
    return Video(
        id=new_video_id(),
        model=model,
        prompt=spec.prompt,
        seconds=str((spec.frames - 1) // manifest.fps),
        size=f"{spec.width}x{spec.height}",
        request=asdict(spec),
    )
