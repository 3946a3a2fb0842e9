"""Request bodies: bounded, and as a mapping whether they came as JSON or as a form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.errors import ApiError

_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_MAX_FORM_FIELDS = 64


class BodyLimit:
    """ASGI middleware: reading more than `max_bytes` of a request's body raises `ApiError` (413).

    `larger` has other limits for some paths.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, larger: Mapping[str, int]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._larger = larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0
        max_bytes = self._larger.get(scope.get("path", ""), self._max_bytes)

        async def bounded_receive() -> Message:
            nonlocal read
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > max_bytes:
                    raise ApiError(413, f"The body is longer than {max_bytes} bytes.", code="body_too_large")
            return message

        await self._app(scope, bounded_receive, send)


async def read_body(request: Request) -> tuple[Any, bool]:
    """The decoded body, and whether it was a form (where every value is text). Raises `ApiError`."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind in _FORMS:
        return await _form(request), True
    if kind == "application/json" or kind.endswith("+json"):
        return _json(await request.body()), False
    raise ApiError(415, f"The body must be JSON or a form, not {kind[:80]}.", code="unsupported_media_type")


async def _form(request: Request) -> dict[str, Any]:
    try:
        async with request.form(max_files=1, max_fields=_MAX_FORM_FIELDS) as form:
            values: dict[str, Any] = {}
            for name, value in form.multi_items():
                if name in values:
                    raise ApiError(400, f"{name[:64]} is given twice.", param=name[:64], code="invalid_value")
                # The file's content is gone when the form is closed; its name is enough to refuse it by.
                values[name] = None if isinstance(value, UploadFile) else value
            return values
    except HTTPException as error:
        raise ApiError(400, f"The form can't be read: {error.detail}", code="invalid_form") from None


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        place = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"The body is not valid JSON{place}.", code="invalid_json") from None
