"""The page at `/`: `serving/web`, as it is, under a strict content security policy."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

_WEB = Path(__file__).parent.parent / "web"
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
# The page has nothing inline and calls nobody else; `blob:` is what it makes of bytes that it fetched with a key.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        "media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def playground_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    files = {path.name: path for path in _WEB.iterdir() if path.suffix in _TYPES}

    @router.get("/")
    async def page() -> FileResponse:
        return _file(files["index.html"])

    @router.get("/static/{name}")
    async def static(name: str) -> FileResponse:
        if name not in files:
            raise HTTPException(404)
        return _file(files[name])

    return router


def _file(path: Path) -> FileResponse:
    return FileResponse(path, headers=_HEADERS, media_type=_TYPES[path.suffix])
