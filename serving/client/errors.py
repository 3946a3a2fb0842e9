"""What can go wrong for a client."""

from __future__ import annotations

import httpx


class RushesError(Exception):
    """Everything that the client raises of its own."""


class ApiError(RushesError):
    """The service refused a request: `status`, and what OpenAI's error shape says of it."""

    def __init__(
        self, status: int, message: str, *, param: str | None, code: str | None, retry_after_seconds: float | None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_seconds = retry_after_seconds


class VideoFailed(RushesError):  # noqa: N818 - it is the video that failed
    """The video failed or was cancelled: what was shown of it is all there will be."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


class Unreachable(RushesError):  # noqa: N818 - reads as what it is
    """The service did not answer for as long as the client was told to try."""


def error_of(response: httpx.Response) -> ApiError:
    """Of an answer from 400 on, which has been read."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = {"message": f"{response.url} answered {response.status_code}, and not as this API does"}
    try:
        retry_after = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        retry_after = None
    return ApiError(
        response.status_code,
        str(error.get("message")),
        param=error.get("param"),
        code=error.get("code"),
        retry_after_seconds=retry_after,
    )
