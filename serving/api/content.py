"""A stored file as an answer: whole or in part, or only what is known of it (RFC 9110, 8.8, 13 and 14)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from serving.api.errors import ApiError
from serving.jobs.artifacts import Artifacts

_ONE_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def file_response(
    request: Request, artifacts: Artifacts, key: str, file: Mapping[str, object], *, kind: str, name: str, made: float
) -> Response:
    """The file under `key`, of which `file` says size and hash; it was `made` then and never changes.

    One range of bytes is honoured, several are answered with the whole file, as a server may. Raises `ApiError` (416).
    """
    size, etag = int(str(file["size_bytes"])), f'"{file["sha256"]}"'
    headers = {
        "ETag": etag,
        "Last-Modified": formatdate(made, usegmt=True),
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=3600",
        "Content-Disposition": f'attachment; filename="{name}"',
    }
    if _matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    start, stop, status = 0, size, HTTPStatus.OK
    if request.headers.get("if-range") in (None, etag, headers["Last-Modified"]):
        part = _range(request.headers.get("range"), size)
        if part is not None:
            start, stop = part
            status = HTTPStatus.PARTIAL_CONTENT
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=kind)
    return StreamingResponse(artifacts.read(key, start, stop), status, headers, media_type=kind)


def _matches(given: str | None, etag: str) -> bool:
    return given is not None and any(one.strip().removeprefix("W/") in ("*", etag) for one in given.split(","))


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """Start and stop of the only range asked for; None when there is none, or nothing that one must understand."""
    match = _ONE_RANGE.fullmatch(header.strip().replace(" ", "")) if header else None
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, stop = max(0, size - int(match[2])), size
    else:
        start, stop = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    if start >= stop:
        message = f"The file has {size} bytes; the range {header} is outside."
        headers = {"Content-Range": f"bytes */{size}"}
        raise ApiError(416, message, param="Range", code="range_not_satisfiable", headers=headers)
    return start, stop
