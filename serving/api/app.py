"""The HTTP application, without Ray: give it what the service keeps, and the models."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from fastapi import Depends, FastAPI
from starlette.types import Lifespan

from models.bundle import Bundle
from serving.api.auth import Gate
from serving.api.batches import batches_router
from serving.api.beginnings import DEFAULT_REFERENCES, Beginnings, ReferencePolicy
from serving.api.body import BodyLimit
from serving.api.characters import characters_router
from serving.api.creation import NO_WEBHOOKS, WebhookPolicy
from serving.api.errors import ERRORS, install_error_handlers
from serving.api.events import events_router
from serving.api.files import PATH as FILES_PATH
from serving.api.files import files_router
from serving.api.hls import hls_router
from serving.api.load import AskStages, load_router, no_stages
from serving.api.models import Catalog, models_router
from serving.api.places import Places
from serving.api.playground import playground_router
from serving.api.queueing import TAKE_FILES, VideoQueue, Wake
from serving.api.realtime import realtime_router
from serving.api.references import references_router
from serving.api.streams import streams_router
from serving.api.videos import videos_router
from serving.config import RealtimeConfig
from serving.jobs.estimates import Estimates
from serving.jobs.storage import Storage
from serving.pipeline.interactive import LiveStages
from serving.stage_config import RewriterConfig


def create_api(
    storage: Storage,
    bundles: Mapping[str, Bundle],
    wake: Wake,
    *,
    aliases: Mapping[str, str] | None = None,
    webhooks: WebhookPolicy = NO_WEBHOOKS,
    require_keys: bool = False,
    max_body_bytes: int = 1 << 20,
    max_file_bytes: int = 200 << 20,
    rewriter: RewriterConfig | None = None,
    references: ReferencePolicy = DEFAULT_REFERENCES,
    ask_stages: AskStages = no_stages,
    stages: Mapping[str, LiveStages] | None = None,
    realtime: RealtimeConfig | None = None,
    places: Places | None = None,
    lifespan: Lifespan[FastAPI] | None = None,
) -> FastAPI:
    """Everything under `/v1`, `/health`, and the page at `/`.

    `wake` tells the runners that there is a new video in the store, or one to stop; `aliases` are other names for
    models; `require_keys` lets in only who has an API key; `ask_stages` says what there is of the stages.
    `stages` are what interactive sessions are made by, for each model that is to have them, and `places` where those
    are; without it nobody but their clients ends them. `lifespan` is around all that the application serves.
    """
    app = FastAPI(title="Rushes", version=version("rushes"), redirect_slashes=False, lifespan=lifespan)
    with_files = dict.fromkeys(TAKE_FILES, max_body_bytes + references.max_body_bytes)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes, larger={FILES_PATH: max_file_bytes, **with_files})
    install_error_handlers(app)
    catalog = Catalog(bundles, aliases or {}, rewriter or RewriterConfig())
    keys = Gate(storage.keys if require_keys else None)
    gate = [Depends(keys)]
    beginnings = Beginnings(storage, references)
    estimates = Estimates(storage.database, priced=catalog.priced)
    queue = VideoQueue(storage, wake, beginnings, estimates)
    for videos in (
        characters_router(storage, catalog, beginnings),
        references_router(catalog, webhooks, queue, beginnings),
        videos_router(storage, catalog, webhooks, queue, beginnings),
        streams_router(storage, queue),
        events_router(storage, queue, estimates),
        hls_router(storage, catalog, queue),
    ):
        app.include_router(videos, dependencies=gate, responses=ERRORS)
    app.include_router(models_router(catalog), dependencies=gate, responses=ERRORS)
    app.include_router(files_router(storage), dependencies=gate, responses=ERRORS)
    app.include_router(batches_router(storage, webhooks), dependencies=gate, responses=ERRORS)

    realtime = realtime or RealtimeConfig()
    places = places or Places(realtime.max_sessions, storage.live)
    app.include_router(realtime_router(keys, catalog, stages or {}, realtime, places))
    app.include_router(load_router(estimates, ask_stages), dependencies=gate, responses=ERRORS)
    app.include_router(playground_router())

    @app.get("/health", tags=["health"])
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app
