"""From a checked request body to a video for the queue: the same for one request and for a line of a batch."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

from models.bundle import Manifest
from serving.api.errors import ApiError
from serving.api.models import Catalog
from serving.api.schemas import CreateVideoRequest
from serving.jobs.store import Idempotency, Video, new_video_id
from serving.jobs.video import INTERACTIVE
from serving.pipeline.geometry import latent_shape
from serving.pipeline.request import InvalidRequest, make_spec
from serving.pipeline.stages import VideoSpec

_MAX_KEY_CHARACTERS = 255


def new_video(body: CreateVideoRequest, catalog: Catalog, *, owner: str | None, priority: int = INTERACTIVE) -> Video:
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
        owner=owner,
        priority=priority,
        work=work_of(manifest, spec),
    )


def work_of(manifest: Manifest, spec: VideoSpec) -> float:
    """Latent tokens through the denoiser, over all rows and steps."""
    _, frames, height, width = latent_shape(manifest, spec)
    tokens = frames * (height // manifest.latent.patch) * (width // manifest.latent.patch)
    rows = 2 if spec.guidance_scale > 1 else 1
    return float(tokens * rows * spec.num_inference_steps)


def idempotency(key: str | None, body: CreateVideoRequest) -> Idempotency | None:
    """What an `Idempotency-Key` header stands for. Raises `ApiError` for one that can't be used."""
    if key is None:
        return None
    if not 0 < len(key) <= _MAX_KEY_CHARACTERS or not key.isprintable():
        message = f"Idempotency-Key must have 1 to {_MAX_KEY_CHARACTERS} printable characters."
        raise ApiError(400, message, param="Idempotency-Key", code="invalid_value")
    # Whether somebody watches makes no other video.
    asked = body.model_dump_json(exclude={"stream"}, exclude_none=True)
    return Idempotency(key, hashlib.sha256(asked.encode()).hexdigest())
