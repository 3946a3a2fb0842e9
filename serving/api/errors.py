"""OpenAI's error envelope for everything that goes wrong: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.routing import Match

_log = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """Every answer from 400 on."""

    error: ErrorDetail


# For the OpenAPI document.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorEnvelope, "description": "What is wrong with the request."},
    "5XX": {"model": ErrorEnvelope, "description": "What is wrong with the service."},
}


class ApiError(Exception):
    """An answer that says what is wrong. `param` is the request field at fault, `code` a word for machines."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})
        self.status = status
        self.message = message
        self.param = param
        self.code = code


def error_body(status: int, message: str, param: str | None, code: str | None) -> dict[str, object]:
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _allowed(app: FastAPI, request: Request) -> list[str]:
    """The methods of every route at the request's path; the framework names those of the first one alone."""
    methods: set[str] = set()
    for route in app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    return sorted(methods)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of `app`, its framework's own included, an envelope."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        # An oversized body is left unread, so the connection can't be used again.
        closed = {"Connection": "close"} if error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE else {}
        return JSONResponse(
            error_body(error.status, error.message, error.param, error.code), error.status, error.headers | closed
        )

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        code = None
        if error.status_code == HTTPStatus.NOT_FOUND:
            message, code = f"There is nothing at {request.method} {request.url.path}.", "not_found"
        headers = error.headers
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            message, code = f"{request.url.path} can't be asked with {request.method}.", "method_not_allowed"
            headers = {"Allow": ", ".join(_allowed(app, request))}
        return JSONResponse(error_body(error.status_code, message, None, code), error.status_code, headers)

    @app.exception_handler(RequestValidationError)
    async def parameter_error(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return JSONResponse(error_body(400, str(first["msg"]), param, "invalid_value"), 400)

    @app.exception_handler(OperationalError)
    async def database_away(request: Request, error: OperationalError) -> JSONResponse:
        """Such as while it is restarted. Clients that know what a 503 is ask again by themselves."""
        _log.warning("%s %s: the database could not be asked", request.method, request.url.path, exc_info=error)
        message = "The service can't reach its database; ask again in a moment."
        return JSONResponse(error_body(503, message, None, "unavailable"), 503, {"Retry-After": "1"})

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(error_body(500, "The service made a mistake; its log says more.", None, None), 500)
