"""What OpenAI's API makes of other videos: remixes, edits and extensions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from models.bundle import Manifest
from serving.api.auth import Owner
from serving.api.beginnings import DEFAULT_STRENGTH, Beginnings, as_object, check_goes_on
from serving.api.body import opened_body
from serving.api.creation import WebhookPolicy, new_video
from serving.api.document import body_document
from serving.api.errors import ApiError
from serving.api.models import Catalog
from serving.api.queueing import IdempotencyKey, VideoQueue
from serving.api.schemas import (
    CreateVideoRequest,
    EditVideoRequest,
    ExtendVideoRequest,
    RemixVideoRequest,
    VideoObject,
    parse,
)
from serving.jobs.store import Video, VideoStatus


def references_router(
    catalog: Catalog, webhooks: WebhookPolicy, queue: VideoQueue, beginnings: Beginnings
) -> APIRouter:
    router = APIRouter(prefix="/v1/videos", tags=["videos"])

    @router.post(
        "/{video_id}/remix",
        response_model=VideoObject,
        openapi_extra=body_document(RemixVideoRequest, catalog, webhooks=webhooks.enabled),
    )
    async def remix_video(
        request: Request, response: Response, video_id: str, owner: Owner, idempotency_key: IdempotencyKey = None
    ) -> Response | VideoObject:
        """The same video under another prompt."""
        source = await completed(video_id, owner, "video_id")
        async with opened_body(request) as (values, form):
            body = parse(RemixVideoRequest, values, form=form)
        video, manifest = again(body, source, owner, "video_id")
        strength = DEFAULT_STRENGTH if body.strength is None else body.strength
        video, kept = await beginnings.from_video(video, manifest, source, strength=strength)
        return await queue.put(request, response, video, body, kept)

    @router.post(
        "/edits",
        response_model=VideoObject,
        openapi_extra=body_document(EditVideoRequest, catalog, webhooks=webhooks.enabled, video=True),
    )
    async def edit_video(
        request: Request, response: Response, owner: Owner, idempotency_key: IdempotencyKey = None
    ) -> Response | VideoObject:
        """As a remix, but of an uploaded video too."""
        return await derived(request, response, owner, EditVideoRequest)

    @router.post(
        "/extensions",
        response_model=VideoObject,
        openapi_extra=body_document(ExtendVideoRequest, catalog, webhooks=webhooks.enabled, video=True),
    )
    async def extend_video(
        request: Request, response: Response, owner: Owner, idempotency_key: IdempotencyKey = None
    ) -> Response | VideoObject:
        """A video that begins as another one and goes on."""
        return await derived(request, response, owner, ExtendVideoRequest)

    async def derived(
        request: Request, response: Response, owner: str | None, kind: type[EditVideoRequest]
    ) -> Response | VideoObject:
        async with opened_body(request) as (values, form):
            given = values.pop("video", None) if isinstance(values, dict) else None
            body = parse(kind, values, form=form)
            extending = isinstance(body, ExtendVideoRequest)
            seconds = body.seconds if isinstance(body, ExtendVideoRequest) else 0
            strength = None if extending else DEFAULT_STRENGTH if body.strength is None else body.strength
            if given is None:
                message = "Missing required parameter: video."
                raise ApiError(400, message, param="video", code="missing_required_parameter")
            if isinstance(given, UploadFile):
                video, manifest = uploaded(body, owner)
                video, kept = await beginnings.from_upload(
                    video, manifest, given, strength=strength, more_seconds=seconds
                )
            else:
                reference = as_object(given, "video")
                if reference.keys() != {"id"} or not isinstance(reference["id"], str):
                    message = "video must be an upload or an object with an id."
                    raise ApiError(400, message, param="video", code="invalid_value")
                source = await completed(reference["id"], owner, "video")
                video, manifest = again(body, source, owner, "video")
                video, kept = await beginnings.from_video(
                    video, manifest, source, strength=strength, more_seconds=seconds
                )
        return await queue.put(request, response, video, body, kept)

    async def completed(video_id: str, owner: str | None, param: str) -> Video:
        video = await queue.existing(video_id, owner, param)
        if video.status is not VideoStatus.COMPLETED:
            message = f"The video is {video.status.value}; only a completed one can be gone on from."
            raise ApiError(400, message, param=param, code="video_not_ready")
        return video

    def again(body: RemixVideoRequest, source: Video, owner: str | None, param: str) -> tuple[Video, Manifest]:
        """A video with another one's settings."""
        for name in ("model", "size"):
            if getattr(body, name, None) is not None:
                message = f"{name} is for uploaded videos; this video has its own."
                raise ApiError(400, message, param=name, code="invalid_value")
        request = source.request
        model, manifest = catalog.resolve(source.model)
        check_goes_on(manifest, param)
        asked = CreateVideoRequest(
            prompt=body.prompt,
            model=model,
            size=source.size,
            seed=request["seed"] if body.seed is None else body.seed,
            negative_prompt=request["negative_prompt"],
            num_inference_steps=request["num_inference_steps"],
            guidance_scale=request["guidance_scale"],
            rewrite_prompt=body.rewrite_prompt,
            best_of=request.get("best_of", 1),
            guidance_interval=request.get("guidance_interval"),
            cache=request.get("cache"),
            guidance_cache=request.get("guidance_cache"),
            lora=[{"name": name, "scale": scale} for name, scale in request.get("lora", ())]
            if body.lora is None
            else body.lora,
            codec=request.get("codec"),
            decoder=request.get("decoder"),
            webhook_url=body.webhook_url,
        )
        return new_video(asked, catalog, webhooks, owner=owner), manifest

    def uploaded(body: EditVideoRequest, owner: str | None) -> tuple[Video, Manifest]:
        model, manifest = catalog.resolve(body.model)
        check_goes_on(manifest, "video")
        asked = CreateVideoRequest(
            prompt=body.prompt,
            model=model,
            size=body.size,
            seed=body.seed,
            rewrite_prompt=body.rewrite_prompt,
            lora=body.lora,
            webhook_url=body.webhook_url,
        )
        return new_video(asked, catalog, webhooks, owner=owner), manifest

    return router
