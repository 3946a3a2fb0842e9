"""From a checked request body to a video for the queue: the same for one request and for a line of a batch."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

from pydantic import BaseModel

from serving.api.errors import ApiError
from serving.api.models import Catalog
from serving.api.schemas import CreateVideoRequest
from serving.jobs.store import Idempotency, Video, new_video_id
from serving.jobs.targets import BadTarget, check_url
from serving.jobs.video import INTERACTIVE
from serving.pipeline.pricing import work_of
from serving.pipeline.request import InvalidRequest, make_spec
from serving.pipeline.stages import VideoSpec

_MAX_KEY_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class WebhookPolicy:
    """Whether webhooks can be signed, and whether they may go to private addresses."""

    enabled: bool = False
    allow_private: bool = False

    def checked(self, url: str | None) -> str | None:
        """Raises `ApiError` for a URL that would not be called."""
        if url is None:
            return None
        if not self.enabled:
            message = "webhook_url can't be used: this service has no webhook secret."
            raise ApiError(400, message, param="webhook_url", code="webhooks_disabled")
        try:
            check_url(url, allow_private=self.allow_private)
        except BadTarget as error:
            raise ApiError(
                400, f"webhook_url can't be called: {error}.", param="webhook_url", code="invalid_value"
            ) from None
        return url


NO_WEBHOOKS = WebhookPolicy()


def new_video(
    body: CreateVideoRequest,
    catalog: Catalog,
    webhooks: WebhookPolicy,
    *,
    owner: str | None,
    priority: int = INTERACTIVE,
    begins: bool = False,
) -> Video:
    """Raises `ApiError`, which names the parameter; nothing is written before everything is checked.

    `begins` says that the video is going to begin from something.
    """
    model, manifest = catalog.resolve(body.model)
    if manifest.pictured and not begins:
        message = f"Missing required parameter: input_reference. {model} makes videos of a picture."
        raise ApiError(400, message, param="input_reference", code="missing_required_parameter")
    spec = new_spec(body, catalog)
    return Video(
        id=new_video_id(),
        model=model,
        prompt=spec.prompt,
        seconds=str((spec.frames - 1) // manifest.fps),
        size=f"{spec.width}x{spec.height}",
        request=asdict(spec),
        owner=owner,
        priority=priority,
        work=work_of(manifest, spec),
        webhook_url=webhooks.checked(body.webhook_url),
    )


def new_spec(body: CreateVideoRequest, catalog: Catalog) -> VideoSpec:
    """All that determines the frames, with every default filled in. Raises `ApiError`."""
    _, manifest = catalog.resolve(body.model)
    try:
        return make_spec(
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
            guidance_interval=body.guidance_interval,
            cache=body.cache,
            guidance_cache=body.guidance_cache,
            lora=body.lora,
            codec=body.codec,
            decoder=body.decoder,
        )
    except InvalidRequest as error:
        raise ApiError(400, f"{error.message}.", param=error.param, code="invalid_value") from None


def idempotency(key: str | None, body: BaseModel, source: str = "") -> Idempotency | None:
    """What an `Idempotency-Key` header stands for; `source` is the hash of what the video begins from.

    Raises `ApiError` for one that can't be used.
    """
    if key is None:
        return None
    if not 0 < len(key) <= _MAX_KEY_CHARACTERS or not key.isprintable():
        message = f"Idempotency-Key must have 1 to {_MAX_KEY_CHARACTERS} printable characters."
        raise ApiError(400, message, param="Idempotency-Key", code="invalid_value")
    # Whether somebody watches makes no other video.
    asked = body.model_dump_json(exclude={"stream"}, exclude_none=True)
    return Idempotency(key, hashlib.sha256((source + asked).encode()).hexdigest())
