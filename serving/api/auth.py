"""Whose request it is: `Authorization: Bearer` with an API key, where keys are required."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from starlette.requests import HTTPConnection

from serving.api.errors import ApiError
from serving.jobs.keys import KeyStore


class Gate:
    """A dependency of every route under `/v1`. Without keys everybody is nobody, and sees everything."""

    def __init__(self, keys: KeyStore | None) -> None:
        self._keys = keys

    async def __call__(self, request: HTTPConnection) -> None:
        """Raises `ApiError` (401)."""
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        request.state.owner = await self.owner_of(secret.strip() if scheme.lower() == "bearer" else "")

    async def owner_of(self, secret: str) -> str | None:
        """The id of the key, None where none is required. Raises `ApiError` (401)."""
        if self._keys is None:
            return None
        if not secret:
            message = "An API key is needed: send it as `Authorization: Bearer KEY`."
            raise ApiError(401, message, code="missing_api_key", headers={"WWW-Authenticate": "Bearer"})
        key = await self._keys.find(secret)
        if key is None:
            message = "This API key is not known, or was revoked."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return key.id


def _owner(request: Request) -> str | None:
    owner: str | None = request.state.owner
    return owner


# The id of the key that the request came with; None where none is required.
Owner = Annotated[str | None, Depends(_owner)]


def may_see(owner: str | None, thing_owner: str | None) -> bool:
    return owner is None or owner == thing_owner
