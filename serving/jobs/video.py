"""The record of one generation job, and what says who may write to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from serving.jobs.ids import is_id, new_id

# A claim takes the lowest priority first. What somebody may be watching goes before what a batch comes back for.
INTERACTIVE, BATCH = 0, 10
# Added to the priority of a video that no runner may claim yet: its key has as many in hand as it may.
HELD = 100


class VideoStatus(StrEnum):
    """The four words of OpenAI's API; its SDK stops polling on any other. A cancelled video is `failed`."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def final(self) -> bool:
        return self in (VideoStatus.COMPLETED, VideoStatus.FAILED)


@dataclass(frozen=True, slots=True)
class Video:
    """One video as the store knows it. Times are seconds since the epoch; `progress` is 0 to 100.

    `request` is everything that determines the frames, as JSON (the resolved `VideoSpec`'s fields).
    `attempt` counts the tries at it since something of it was last kept for good, and `lapses` those of them that ended
    with their runner; `fence` grows with each try, and only its newest value may write. `work` is what it costs, in
    units that are only ever compared. `owner` is the id of the API key that made it. From `expires_at` on a video that
    has ended is swept away. `deleted_at` hides one that isn't swept away yet from whoever deleted it. A completed one
    has `artifacts`: size and hash by file name. A batch's has the place of its line in the file and the name that it
    has there. `webhook_url` is told of its end. Of its `steps` engine calls `step` are made, as far as was last noted.
    """

    id: str
    model: str
    prompt: str
    seconds: str
    size: str
    request: Mapping[str, Any] = field(default_factory=dict)
    status: VideoStatus = VideoStatus.QUEUED
    progress: int = 0
    created_at: float = 0.0
    completed_at: float | None = None
    expires_at: float | None = None
    error_code: str | None = None
    error_message: str | None = None
    attempt: int = 0
    fence: int = 0
    runner_id: str | None = None
    lease_until: float | None = None
    cancel_requested: bool = False
    owner: str | None = None
    priority: int = INTERACTIVE
    work: float = 0.0
    started_at: float | None = None
    deleted_at: float | None = None
    artifacts: Mapping[str, Any] | None = None
    stored_bytes: int = 0
    batch_id: str | None = None
    batch_line: int | None = None
    custom_id: str | None = None
    webhook_url: str | None = None
    lapses: int = 0
    step: int = 0
    steps: int = 0


class StaleFence(RuntimeError):  # noqa: N818 - the vocabulary's own word
    """A newer attempt at the video has begun (or it has ended): this one must stop and may not write."""


def new_video_id() -> str:
    return new_id("video_")


def is_video_id(text: str) -> bool:
    """Whether `text` is an id this service could have made: safe as the name of a directory."""
    return is_id("video_", text)
