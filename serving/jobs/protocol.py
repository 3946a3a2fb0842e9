"""What the rest of the service may ask of a store of videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from serving.jobs.artifacts import Artifact
from serving.jobs.pages import Order
from serving.jobs.video import HELD, Video


class VideoNotFound(LookupError):  # noqa: N818 - reads as what it is
    """No video has this id."""


class IdempotencyConflict(ValueError):  # noqa: N818
    """The key was used for another request."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A request that may come twice and must count once: `digest` is of all that the request asks for."""

    key: str
    digest: str


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list; `has_more` says that it goes on after the last of these."""

    videos: Sequence[Video]
    has_more: bool


class VideoStore(Protocol):
    """Durable, shared by every process of the service. Methods with a `fence` raise `StaleFence` when it is not the
    video's newest, or when the video is not in progress any more; all that write to one video raise `VideoNotFound`."""

    async def create(self, video: Video, idempotency: Idempotency | None = None) -> Video:
        """Put `video` into the queue and return it as stored, `created_at` filled in.

        With a key that its owner has used for the same request in the last 24 hours, the video of that time is
        returned and nothing is created. Raises `IdempotencyConflict` when it was another request, and `LimitReached`
        when the owner has asked for too much.
        """

    async def get(self, video_id: str) -> Video | None: ...

    async def list(
        self, *, owner: str | None = None, limit: int = 20, order: Order = "desc", after: str | None = None
    ) -> Page:
        """Videos by the time of their ids, those that come after the id `after`; it need not be there any more.

        Deleted ones are left out. `owner` None means everybody's.
        """

    async def claim(self, runner_id: str, lease_seconds: float, *, below: int = HELD) -> Video | None:
        """Take a video whose runner has let its lease run out, else the oldest queued one of the lowest priority; only
        of priorities `below` this.

        Counts an attempt and raises the fence; None when there is nothing to do. A runner that vanished says little
        about the videos that it had, so more attempts of that kind are allowed than of those that failed. A video that
        has used up either, or that was cancelled while nobody ran it, is failed on the way instead
        (`attempts_exhausted`, `cancelled`).
        """

    async def heartbeat(self, video_id: str, fence: int, lease_seconds: float) -> Video:
        """Lease it for another `lease_seconds` from now. The answer's `cancel_requested` is news for the runner."""

    async def set_progress(
        self, video_id: str, fence: int, progress: int, *, headway: bool = False, step: int = 0, steps: int = 0
    ) -> Video:
        """Note `progress`, 0 to 100, and that so many of so many steps are done.

        The answer's `cancel_requested` is news for the runner.

        `headway`: something that the next attempt needn't make again is kept, so this counts as the first attempt. A
        video can make headway only so often, so its attempts stay bounded.
        """

    async def set_request(self, video_id: str, fence: int, request: Mapping[str, Any]) -> Video:
        """Replace what determines the frames, once more of it is known (the rewritten prompt)."""

    async def complete(
        self, video_id: str, fence: int, *, artifacts: Mapping[str, Artifact] | None = None, log_bytes: int = 0
    ) -> Video:
        """Its files are there: `artifacts` by name. They and the fragment log's `log_bytes` count for the quota."""

    async def fail(self, video_id: str, fence: int, code: str, message: str) -> Video: ...

    async def requeue(self, video_id: str, fence: int, *, count_attempt: bool = True) -> Video:
        """Give it back for another runner: after an error that may pass, or (`count_attempt=False`) when draining.

        Fails it with `attempts_exhausted` when that was its last attempt.
        """

    async def request_cancel(self, video_id: str) -> Video:
        """A queued video is failed with code `cancelled` at once; its runner does that for a running one. A video that
        has ended stays as it is."""

    async def delete(self, video_id: str) -> Video:
        """As `request_cancel`; and it is hidden from now on, and swept away soon after it has ended."""

    async def expired(self, limit: int) -> Sequence[Video]:
        """Videos that have ended and whose time is over, the longest over first."""

    async def beyond_quota(self, quota_bytes: int, limit: int) -> Sequence[Video]:
        """Completed videos that expire before the last `quota_bytes` worth of them, soonest first."""

    async def remove(self, video_id: str) -> None:
        """Forget a video that has ended, and the idempotency keys that led to it. Harmless when it is gone."""
