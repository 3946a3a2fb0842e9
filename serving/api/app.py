"""The HTTP application, without Ray: give it a store, a directory of logs and the models."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI

from models.bundle import Bundle
from serving.api.body import BodyLimit
from serving.api.errors import install_error_handlers
from serving.api.models import Catalog, models_router
from serving.api.videos import videos_router
from serving.config import RewriterConfig
from serving.jobs.store import VideoStore


def create_api(
    store: VideoStore,
    videos_dir: Path,
    bundles: Mapping[str, Bundle],
    wake: Callable[[], Awaitable[None]],
    *,
    max_body_bytes: int = 1 << 20,
    rewriter: RewriterConfig | None = None,
) -> FastAPI:
    """Everything under `/v1`, and `/health`. `wake` tells the runners that there is a new video in the store."""
    app = FastAPI(title="Rushes", version=version("rushes"), redirect_slashes=False)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    install_error_handlers(app)
    catalog = Catalog(bundles, rewriter or RewriterConfig())
    app.include_router(videos_router(store, videos_dir, catalog, wake))
    app.include_router(models_router(catalog))

    @app.get("/health", tags=["health"])
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app
