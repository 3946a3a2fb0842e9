"""How long a client goes on trying, and how it asks: what the two clients share."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx

from serving.client.errors import ApiError, Unreachable, VideoFailed

DEFAULT_URL = "http://127.0.0.1:8000"
RETRY_SECONDS = 60.0
# Silence is normal: a queued video has nothing to say. After so long the connection itself is asked for again.
QUIET = httpx.Timeout(10.0, read=30.0)
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0
ENDED = ("completed", "failed")
BATCH_ENDED = ("completed", "failed", "expired", "cancelled")


class Patience:
    """For `seconds` without progress it says how long to pause; then it raises `Unreachable`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        self._until: float | None = None
        self._pause = _FIRST_PAUSE_SECONDS

    def pause(self, error: Exception) -> float:
        """After this error. Raises an error that trying again won't help, or `Unreachable`."""
        if isinstance(error, ApiError) and error.status < 500 and error.status != 429:
            raise error
        now = time.monotonic()
        if self._until is None:
            self._until = now + self._seconds
        if now >= self._until:
            tried = f" for {self._seconds:.0f} s" if self._seconds else ""
            raise Unreachable(f"the service could not be reached{tried}: {error}") from error
        pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        if isinstance(error, ApiError) and error.retry_after_seconds is not None:
            pause = max(pause, error.retry_after_seconds)
        return min(pause, self._until - now)


def headers(api_key: str | None) -> dict[str, str]:
    """`api_key` None means the environment's RUSHES_API_KEY, if there is one."""
    key = api_key or os.environ.get("RUSHES_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def checked(video: dict[str, Any]) -> dict[str, Any]:
    """Raises `VideoFailed` for one that failed."""
    if video["status"] == "failed":
        raise VideoFailed(video["error"]["code"], video["error"]["message"])
    return video


def batch_file(requests: Iterable[Mapping[str, Any]] | Path) -> tuple[str, bytes]:
    """A batch's input: a file of requests, or the bodies of requests, whose `custom_id`s are then their places."""
    if isinstance(requests, Path):
        return requests.name, requests.read_bytes()
    lines = [
        json.dumps({"custom_id": str(place), "method": "POST", "url": "/v1/videos", "body": dict(body)})
        for place, body in enumerate(requests)
    ]
    return "requests.jsonl", "\n".join(lines).encode()
