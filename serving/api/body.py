"""Request bodies: bounded, and as a mapping whether they came as JSON or as a form."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.errors import ApiError

_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_MAX_FORM_FIELDS = 64
_NESTED = re.compile(r"(\w+)(\[\])?\[(\w+)\]")


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


@asynccontextmanager
async def opened_body(request: Request) -> AsyncIterator[tuple[Any, bool]]:
    """The decoded body, and whether it was a form: there a value is text or, until the end of the block, an
    `UploadFile`. Fields such as `video[id]`, which is how SDKs send objects in forms, are put together, and
    `characters[][id]` is a list of one object.

    Raises `ApiError`.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind in _FORMS:
        try:
            form = await request.form(max_files=1, max_fields=_MAX_FORM_FIELDS)
        except HTTPException as error:
            raise ApiError(400, f"The form can't be read: {error.detail}", code="invalid_form") from None
        try:
            yield _values(form), True
        finally:
            await form.close()
    elif kind == "application/json" or kind.endswith("+json"):
        yield _json(await request.body()), False
    else:
        raise ApiError(415, f"The body must be JSON or a form, not {kind[:80]}.", code="unsupported_media_type")


def _values(form: FormData) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        place, key = values, name
        if found := _NESTED.fullmatch(name):
            place, key = values.setdefault(found[1], [{}] if found[2] else {}), found[3]
            if found[2] and isinstance(place, list):
                place = place[0]
        if not isinstance(place, dict) or key in place:
            raise ApiError(400, f"{name[:64]} is given twice.", param=name[:64], code="invalid_value")
        place[key] = value
    return values


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        place = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"The body is not valid JSON{place}.", code="invalid_json") from None
