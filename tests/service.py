"""The service in one process, without Ray: its API alone, or all of it on a real socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from sqlalchemy import create_engine, text

from models.bundle import Bundle
from serving.api.app import create_api
from serving.api.beginnings import ReferencePolicy
from serving.api.creation import WebhookPolicy
from serving.api.models import Catalog
from serving.api.places import Places
from serving.config import RealtimeConfig
from serving.deployments.attempt import AttemptSettings, Stages
from serving.deployments.batches import BatchWorker
from serving.deployments.courier import Courier
from serving.deployments.runner import Runner
from serving.jobs.artifacts import Artifacts, video_key
from serving.jobs.database import Database
from serving.jobs.storage import Storage
from serving.jobs.store import SqlVideoStore, Video
from serving.pipeline.local import LocalPipeline

# A URL for fsspec, and its options.
SharedFiles = tuple[str, dict[str, Any]]
MAX_BODY = 1 << 20
MAX_FILE = 3 << 20
REFERENCES = ReferencePolicy(max_bytes=1 << 20)
# Of a body that may hold a picture or a video.
MAX_REFERENCE_BODY = MAX_BODY + REFERENCES.max_body_bytes


def assert_envelope(response: httpx.Response, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"]


@asynccontextmanager
async def served(api: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """`api` on a real socket: httpx's own ASGI transport would hold a stream back until its end."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(api, log_level="critical", lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            await serving


async def until(holds: Callable[[], bool]) -> None:
    """Bounded by the test's own time limit."""
    while not holds():  # noqa: ASYNC110 - nothing here could set an event
        await asyncio.sleep(0.001)


class Service:
    """The application over a store of its own; `wakes` counts how often the runners were told of news."""

    def __init__(
        self,
        bundle: Bundle,
        data_dir: Path,
        *,
        require_keys: bool = False,
        url: str = "",
        shared_files: SharedFiles | None = None,
    ) -> None:
        """With `shared_files` the data directory is this one's alone."""
        self.url = url or f"sqlite:///{data_dir / 'videos.db'}"
        database = Database.open(self.url)
        self.store = SqlVideoStore(database)
        self.artifacts = Artifacts(data_dir, *(shared_files or ()))
        self.videos_dir = self.artifacts.videos_dir
        self.wakes = 0
        self.storage = Storage.over(database, self.store, self.artifacts, copy_logs=shared_files is not None)
        self.batch_worker = BatchWorker(self.storage, Catalog({"tiny": bundle}, {}))
        self.api = create_api(
            self.storage,
            {"tiny": bundle},
            self.wake,
            aliases={"sora-2": "tiny"},
            max_body_bytes=MAX_BODY,
            max_file_bytes=MAX_FILE,
            require_keys=require_keys,
            references=REFERENCES,
        )

    async def wake(self, video_id: str | None = None) -> None:
        self.wakes += video_id is None

    async def claimed(self) -> Video:
        video = await self.store.claim("runner", 60)
        assert video is not None
        return video

    async def completed(self, video_id: str, **files: bytes) -> None:
        """Make the oldest queued video, which must be this one, of these files: a dash in a name for its dot."""
        video = await self.claimed()
        assert video.id == video_id
        made = {}
        for name, data in files.items():
            with self.artifacts.scratch() as path:
                path.write_bytes(data)
                made[name.replace("_", ".")] = self.artifacts.put(video_key(video_id, name.replace("_", ".")), path)
        await self.store.complete(video_id, video.fence, artifacts=made)

    def created(self) -> int:
        engine = create_engine(self.url)
        with engine.connect() as connection:
            count: int = connection.execute(text("select count(*) from videos")).scalar_one()
        engine.dispose()
        return count


class WholeService:
    """Runner, stages, store, log and HTTP together in one process, without Ray."""

    def __init__(
        self,
        bundle: Bundle,
        pipeline: LocalPipeline,
        data_dir: Path,
        *,
        webhook_secret: str | None = None,
        shared_files: SharedFiles | None = None,
        require_keys: bool = False,
    ) -> None:
        self.require_keys = require_keys
        self.webhook_secret = webhook_secret
        self.webhooks = WebhookPolicy(enabled=webhook_secret is not None, allow_private=True)
        database = Database.open(f"sqlite:///{data_dir / 'videos.db'}")
        self.store = SqlVideoStore(database, max_attempts=2)
        self.artifacts = Artifacts(data_dir, *(shared_files or ()))
        self.storage = Storage.over(database, self.store, self.artifacts, copy_logs=shared_files is not None)
        self.videos_dir = self.artifacts.videos_dir
        self.stages: dict[str, Any] = {
            "text_encoder": pipeline.text_encoder,
            "denoiser": pipeline.denoiser,
            "decoder": pipeline.decoder,
            "encoder": pipeline.encoder,
            "preview": bundle.manifest.preview,
        }
        self.pipeline = pipeline
        self.bundle = bundle
        self.runner: Runner | None = None
        self.retiring: dict[str, Stages] = {}
        self.realtime = RealtimeConfig()
        self.places: Places | None = None

    def new_runner(self) -> Runner:
        settings = AttemptSettings(lease_seconds=30, max_attempts=2)
        stages = {"tiny": Stages(**self.stages)}
        return Runner(self.storage, stages, settings, max_videos=4, poll_seconds=0.05, retiring=self.retiring)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[httpx.AsyncClient]:
        """A runner, and the API on a real socket."""
        runner = self.runner = self.new_runner()

        async def wake(video_id: str | None = None) -> None:
            runner.wake() if video_id is None else runner.tell(video_id)

        bundles, aliases = {"tiny": self.bundle}, {"sora-2": "tiny"}
        api = create_api(
            self.storage,
            bundles,
            wake,
            aliases=aliases,
            webhooks=self.webhooks,
            require_keys=self.require_keys,
            stages={"tiny": Stages(**self.stages)},
            realtime=self.realtime,
            places=self.places,
        )
        batches = BatchWorker(self.storage, Catalog(bundles, aliases), self.webhooks)
        loops = [runner.run(), batches.run(poll_seconds=0.05)]
        if self.webhook_secret is not None:
            courier = Courier(
                self.storage.outbox, self.webhook_secret, allow_private=True, timeout_seconds=5, give_up_seconds=60
            )
            loops.append(courier.run(0.05))
        async with served(api) as client:
            working = asyncio.gather(*loops)
            try:
                yield client
            finally:
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
