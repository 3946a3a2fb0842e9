"""What an interactive session and its client say to each other, in the manner of OpenAI's Realtime API.

Everything is a JSON text message with a `type`; the init segment and each fragment are binary messages, each right
after the JSON that says what it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from serving.api.errors import ApiError, error_body
from serving.api.schemas import CreateVideoRequest, WholeNumber, named_error, parse_create, without_nul
from serving.pipeline.interactive import LiveFragment, Prompt

# What a client may say at once.
MAX_EVENT_CHARACTERS = 1 << 16


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _ClientEvent(_Strict):
    """`event_id` is named by an error that the event causes."""

    event_id: str | None = Field(default=None, max_length=512)


class PromptChange(_Strict):
    prompt: str

    @field_validator("prompt")
    @classmethod
    def _without_nul(cls, text: str) -> str | None:
        return without_nul(text)


class SessionSettings(PromptChange):
    """As in `POST /v1/videos`."""

    model: str | None = None
    size: str | None = None
    seed: WholeNumber | None = None
    negative_prompt: str | None = None
    num_inference_steps: WholeNumber | None = None
    guidance_scale: float | None = Field(default=None, allow_inf_nan=False)
    rewrite_prompt: bool | None = None
    codec: str | None = None
    decoder: str | None = None
    guidance_interval: list[float] | None = None
    cache: str | None = None
    guidance_cache: str | None = None
    lora: Any = None

    @field_validator("negative_prompt")
    @classmethod
    def _negative_without_nul(cls, text: str | None) -> str | None:
        return without_nul(text)

    def as_request(self) -> CreateVideoRequest:
        """Raises `ApiError`."""
        return parse_create(self.model_dump(), form=False)


class SessionCreate(_ClientEvent):
    """Begin. Once a connection."""

    type: Literal["session.create"]
    session: SessionSettings


class SessionUpdate(_ClientEvent):
    """Another prompt, from the next chunk that is denoised on."""

    type: Literal["session.update"]
    session: PromptChange


class SessionPause(_ClientEvent):
    """Begin no further chunk."""

    type: Literal["session.pause"]


class SessionResume(_ClientEvent):
    type: Literal["session.resume"]


class SessionStop(_ClientEvent):
    """End it."""

    type: Literal["session.stop"]


class FragmentAck(_ClientEvent):
    """Fragment `index` and all before it have arrived: so much more may be made."""

    type: Literal["fragment.ack"]
    index: WholeNumber


ClientEvent = SessionCreate | SessionUpdate | SessionPause | SessionResume | SessionStop | FragmentAck
_CLIENT_EVENTS: Mapping[str, type[ClientEvent]] = {
    "session.create": SessionCreate,
    "session.update": SessionUpdate,
    "session.pause": SessionPause,
    "session.resume": SessionResume,
    "session.stop": SessionStop,
    "fragment.ack": FragmentAck,
}


def event_id_of(values: Any) -> str | None:
    """What a client calls its event, if it is one with a name."""
    found = values.get("event_id") if isinstance(values, Mapping) else None
    return found if isinstance(found, str) else None


def read_event(text: str) -> Any:
    """A message, decoded. Raises `ApiError`."""
    if len(text) > MAX_EVENT_CHARACTERS:
        raise ApiError(400, f"An event has at most {MAX_EVENT_CHARACTERS} characters.", code="event_too_large")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(400, "The event is not valid JSON.", code="invalid_json") from None


def parse_event(values: Any) -> ClientEvent:
    """Raises `ApiError`, whose `param` is a path such as `session.size`."""
    if not isinstance(values, Mapping):
        raise ApiError(400, "An event must be a JSON object.", code="invalid_type")
    kind = values.get("type")
    event = _CLIENT_EVENTS.get(kind) if isinstance(kind, str) else None
    if event is None:
        message = f"type must be one of: {', '.join(_CLIENT_EVENTS)}."
        raise ApiError(400, message, param="type", code="invalid_event_type")
    try:
        return event.model_validate(values, strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        for found in errors:
            found["loc"] = (".".join(str(part) for part in found["loc"]),)
        raise named_error(errors) from None


def server_event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "event_id": f"event_{uuid4().hex}", **fields}


def error_event(error: ApiError, client_event_id: str | None = None) -> dict[str, Any]:
    """As every other error of the API, and which of the client's events it answers."""
    body: Any = error_body(error.status, error.message, error.param, error.code)["error"]
    return server_event("error", error=body | {"event_id": client_event_id})


def prompt_said(prompt: Prompt) -> dict[str, Any]:
    revised = prompt.rendered if prompt.rendered != prompt.text else None
    return {"prompt": prompt.text, "revised_prompt": revised, "prompt_number": prompt.number}


def fragment_event(live: LiveFragment, fps: int) -> dict[str, Any]:
    """What stands before a fragment's bytes; `prompt_changed` is true for the first one under its prompt."""
    fragment = live.fragment
    return server_event(
        "fragment",
        index=fragment.index,
        first_frame=fragment.first_frame,
        frames=fragment.frames,
        start_seconds=fragment.first_frame / fps,
        seconds=fragment.frames / fps,
        bytes=len(fragment.data),
        sha256=hashlib.sha256(fragment.data).hexdigest(),
        prompt_changed=live.prompt_changed,
        **prompt_said(live.prompt),
    )
