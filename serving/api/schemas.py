"""What goes over the wire: OpenAI's Videos and Models objects, and this service's own fields beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from models.bundle import Manifest
from serving.api.errors import ApiError
from serving.jobs.store import Video, VideoStatus
from serving.pipeline.request import decoders_of


def _whole_number(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is a whole one too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole_seconds(value: Any) -> Any:
    """OpenAI sends `seconds` as a string, people send a number; both mean the same."""
    spelt = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10
    return int(value) if spelt else _whole_number(value)


WholeNumber = Annotated[int, BeforeValidator(_whole_number)]
WholeSeconds = Annotated[int, BeforeValidator(_whole_seconds, json_schema_input_type=str | int)]
_Request = TypeVar("_Request", bound=BaseModel)


class CreateVideoRequest(BaseModel):
    """The body of `POST /v1/videos`. What is left out is the model's default; limits are checked against the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(description="What to show.")
    model: str | None = Field(default=None, description="A model's name, as `GET /v1/models` lists it.")
    seconds: WholeSeconds | None = Field(default=None, description="Whole seconds, as a string or a number.")
    size: str | None = Field(default=None, description="`WIDTHxHEIGHT` in pixels.")
    seed: WholeNumber | None = Field(
        default=None, description="The same seed gives the same video; random when it is left out."
    )
    negative_prompt: str | None = Field(default=None, description="What not to show.")
    num_inference_steps: WholeNumber | None = Field(default=None, description="Denoising steps.")
    guidance_scale: float | None = Field(
        default=None, allow_inf_nan=False, description="How strictly to follow the prompt; 1 is not at all guided."
    )
    guidance_interval: list[float] | None = Field(
        default=None,
        description="Guide only the steps within these two shares of the way, such as [0.2, 0.8]; the others take half "
        "the work. All of them when it is left out.",
    )
    cache: str | None = Field(
        default=None,
        description="`fast` or `faster`: ask the model in fewer of the steps, at some cost in quality; `off` if null.",
    )
    guidance_cache: str | None = Field(
        default=None,
        description="`alternate`: in every second guided step from the third on, make do with what "
        "the guidance of the one before was; `off` if null.",
    )
    rewrite_prompt: bool | None = Field(
        default=None, description="Whether a loose prompt is made a detailed one first; the service's default if null."
    )
    best_of: WholeNumber | None = Field(
        default=None, description="Make so many videos, of this seed and the next ones, and show the best; 1 to 8."
    )
    scene_prompts: list[dict[str, Any]] | None = Field(
        default=None,
        description="Other prompts from a time on, as objects with `start_seconds` and `prompt`; causal models only.",
    )
    lora: str | dict[str, Any] | list[Any] | None = Field(
        default=None,
        description="The model's LoRAs to use: a name, an object with `name` and `scale` (1 if left out), or a list.",
    )
    codec: str | None = Field(default=None, description="What encodes it: `h264`, `av1` or `vp9`; the first if null.")
    decoder: str | None = Field(
        default=None,
        description="`tiny`: decode with the model's small decoder, if it has one: several times as fast, less sharp. "
        "`full` if null.",
    )
    webhook_url: str | None = Field(
        default=None, description="What to call when the video has ended, with a signed event."
    )
    stream: bool = Field(
        default=False, description="Answer with the video itself, as fragmented MP4, while it is made."
    )

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _without_nul(cls, text: str | None) -> str | None:
        return without_nul(text)


class RemixVideoRequest(BaseModel):
    """The body of `POST /v1/videos/{id}/remix`; everything that isn't said here is as in the video."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(description="What to show now.")
    strength: float | None = Field(
        default=None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="How far to go from the video: near 0 it stays as it is, 1 keeps nothing of it.",
    )
    seed: WholeNumber | None = Field(
        default=None, description="The video's own when it is left out; random for an upload."
    )
    rewrite_prompt: bool | None = Field(default=None, description="As in `POST /v1/videos`.")
    lora: str | dict[str, Any] | list[Any] | None = Field(
        default=None, description="As in `POST /v1/videos`; the video's own when it is left out."
    )
    webhook_url: str | None = Field(default=None, description="As in `POST /v1/videos`.")
    stream: bool = Field(default=False, description="As in `POST /v1/videos`.")

    @field_validator("prompt")
    @classmethod
    def _without_nul(cls, text: str) -> str | None:
        return without_nul(text)


class EditVideoRequest(RemixVideoRequest):
    """The body of `POST /v1/videos/edits`, beside the `video` itself."""

    model: str | None = Field(default=None, description="For an uploaded video; else it is the video's own.")
    size: str | None = Field(
        default=None, description="For an uploaded video, which is cut to cover it; else it is the video's own."
    )


class ExtendVideoRequest(EditVideoRequest):
    """The body of `POST /v1/videos/extensions`, beside the `video` itself."""

    strength: None = None
    seconds: WholeSeconds = Field(description="How much is added, in whole seconds.")


def without_nul(text: str | None) -> str | None:
    """PostgreSQL can't keep it, and it shows nothing. Raises `ValueError`."""
    if text is not None and "\0" in text:
        raise ValueError("it must not contain a NUL character")
    return text


def parse_create(values: Any, *, form: bool) -> CreateVideoRequest:
    """`parse` for the body of `POST /v1/videos`, without the `input_reference`."""
    return parse(CreateVideoRequest, values, form=form)


def parse(request: type[_Request], values: Any, *, form: bool) -> _Request:
    """Check a decoded body; in a form everything is text, in JSON types must be right.

    Raises `ApiError` (400), which names the field.
    """
    if not isinstance(values, Mapping):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_type")
    try:
        return request.model_validate(values, strict=not form)
    except ValidationError as error:
        raise named_error(error.errors(include_url=False)) from None


def named_error(errors: list[ErrorDetails]) -> ApiError:
    unknown = [str(error["loc"][0]) for error in errors if error["type"] == "extra_forbidden"]
    if unknown:
        shown = ", ".join(name[:64] for name in unknown[:5])
        return ApiError(400, f"Unknown parameter: {shown}.", param=unknown[0][:64], code="unknown_parameter")
    first = errors[0]
    param = str(first["loc"][0])
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: {param}.", param=param, code="missing_required_parameter")
    return ApiError(400, f"Invalid {param}: {first['msg']}.", param=param, code="invalid_value")


class VideoError(BaseModel):
    code: str
    message: str


class ScenePrompt(BaseModel):
    start_seconds: float
    prompt: str


class LoraScale(BaseModel):
    name: str
    scale: float


class VideoObject(BaseModel):
    """OpenAI's video object, every key always there, and what it takes to make the same video again."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str | None
    revised_prompt: str | None = None
    size: str
    seconds: str
    remixed_from_video_id: str | None = None
    error: VideoError | None
    seed: int
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    best_of: int
    guidance_interval: tuple[float, float]
    cache: str
    guidance_cache: str
    scene_prompts: list[ScenePrompt]
    lora: list[LoraScale]
    codec: str
    decoder: str
    estimated_seconds_left: float | None = Field(
        default=None, description="Until it is completed; null when it isn't known, when it has ended, and in lists."
    )


def video_object(video: Video, *, estimated_seconds_left: float | None = None) -> VideoObject:
    failed = video.status is VideoStatus.FAILED
    return VideoObject(
        id=video.id,
        model=video.model,
        status=video.status.value,
        progress=video.progress,
        created_at=int(video.created_at),
        completed_at=None if video.completed_at is None or failed else int(video.completed_at),
        expires_at=whole_seconds(video.expires_at),
        prompt=video.prompt,
        revised_prompt=video.request.get("revised_prompt"),
        size=video.size,
        seconds=video.seconds,
        remixed_from_video_id=video.request.get("source_video_id"),
        error=VideoError(code=video.error_code or "failed", message=video.error_message or "") if failed else None,
        seed=video.request["seed"],
        negative_prompt=video.request["negative_prompt"],
        num_inference_steps=video.request["num_inference_steps"],
        guidance_scale=video.request["guidance_scale"],
        best_of=video.request.get("best_of", 1),
        guidance_interval=video.request.get("guidance_interval", (0.0, 1.0)),
        cache=video.request.get("cache", "off"),
        guidance_cache=video.request.get("guidance_cache", "off"),
        scene_prompts=[
            ScenePrompt(start_seconds=start, prompt=prompt) for start, prompt in video.request.get("scene_prompts", ())
        ],
        lora=[LoraScale(name=name, scale=scale) for name, scale in video.request.get("lora", ())],
        codec=video.request.get("codec", "h264"),
        decoder=video.request.get("decoder", "full"),
        estimated_seconds_left=None if estimated_seconds_left is None else round(estimated_seconds_left, 1),
    )


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ModelLimits(BaseModel):
    """What a request for this model may ask for, and what it gets when it doesn't ask."""

    fps: int
    default_size: str
    size_multiple: int
    min_side: int
    max_side: int
    default_seconds: int
    max_seconds: int
    default_steps: int
    max_steps: int
    default_guidance_scale: float
    max_prompt_characters: int


class ModelObject(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rushes"
    realtime: bool = Field(description="Whether there may be interactive sessions on it, at `/v1/realtime`.")
    limits: ModelLimits
    loras: list[str] = Field(description="What `lora` may name.")
    decoders: list[str] = Field(description="What `decoder` may be.")
    needs_picture: bool = Field(description="Whether it makes videos of an `input_reference` alone.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


def model_object(name: str, manifest: Manifest, created: int) -> ModelObject:
    limits = manifest.limits
    width, height = limits.default_size
    return ModelObject(
        id=name,
        created=created,
        realtime=manifest.rollout == "causal",
        limits=ModelLimits(
            fps=manifest.fps,
            default_size=f"{width}x{height}",
            size_multiple=limits.size_multiple,
            min_side=limits.min_side,
            max_side=limits.max_side,
            default_seconds=limits.default_seconds,
            max_seconds=limits.max_seconds,
            default_steps=manifest.sampler.num_inference_steps,
            max_steps=limits.max_steps,
            default_guidance_scale=manifest.sampler.guidance_scale,
            max_prompt_characters=limits.max_prompt_characters,
        ),
        loras=[lora.name for lora in manifest.loras],
        decoders=[*decoders_of(manifest)],
        needs_picture=manifest.pictured,
    )


def whole_seconds(time: float | None) -> int | None:
    """As OpenAI's objects have times."""
    return None if time is None else int(time)
