"""The HTTP front behind Ray Serve."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import Any, get_args

from fastapi import FastAPI
from ray import serve
from starlette.types import Lifespan

from models.bundle import Bundle
from serving.api.app import create_api
from serving.api.beginnings import ReferencePolicy
from serving.api.load import AskStages, StageLoad
from serving.api.places import Places, Withdrawal
from serving.api.queueing import Wake
from serving.config import ServiceConfig
from serving.deployments.loads import StageWatch
from serving.deployments.observing import start_observing
from serving.deployments.remote import StageHandles, StageName, remote_stages, stage_name
from serving.deployments.storage import REPLICA_PATIENCE_SECONDS, open_storage, webhook_policy
from serving.jobs.storage import Storage
from serving.pipeline.interactive import LiveStages
from serving.pipeline.pace import StageState

_LOOK_SECONDS = 1.0

_log = logging.getLogger(__name__)


def front(
    config: ServiceConfig,
    storage: Storage,
    bundles: Mapping[str, Bundle],
    stages: Mapping[str, LiveStages],
    wake: Wake,
    ask_stages: AskStages,
    places: Places | None = None,
    lifespan: Lifespan[FastAPI] | None = None,
) -> FastAPI:
    """The API as `config` wants it."""
    return create_api(
        storage,
        bundles,
        wake,
        aliases=config.model_aliases,
        webhooks=webhook_policy(config),
        require_keys=config.keys_required,
        max_body_bytes=config.api.max_body_bytes,
        max_file_bytes=config.api.max_file_bytes,
        rewriter=config.text_encoder.rewriter,
        references=ReferencePolicy(config.api.max_reference_bytes, config.api.private_references),
        ask_stages=ask_stages,
        stages=stages,
        realtime=config.realtime,
        places=places,
        lifespan=lifespan,
    )


class ApiDeployment:
    """One replica of the API. It keeps nothing but interactive sessions: any replica answers any request.

    When another takes its place it still serves those, as long as their models are served.
    """

    def __init__(self, config: ServiceConfig, runner: Any, handles: Mapping[str, StageHandles]) -> None:
        self._config, self._handles = config, handles
        self._watches: dict[tuple[str, StageName], StageWatch] = {
            (model, stage): StageWatch(model, stage, _asking(getattr(handles[model], stage.replace("-", "_"))))
            for model, stage in product(config.models, get_args(StageName))
        }
        self._runner = runner
        self._wakes: set[asyncio.Task[None]] = set()

    def __serve_build_asgi_app__(self) -> FastAPI:
        config = self._config
        start_observing(config.observability)
        bundles = {name: Bundle.load(path) for name, path in config.models.items()}
        storage = open_storage(config, patience_seconds=REPLICA_PATIENCE_SECONDS)
        places = Places(config.realtime.max_sessions, storage.live)
        self._withdrawing = asyncio.create_task(self._withdraw(places))
        stages = {name: remote_stages(handles, bundles[name]) for name, handles in self._handles.items()}
        return front(config, storage, bundles, stages, self._wake, self._stages, places)

    async def _withdraw(self, places: Places) -> None:
        """End the sessions whose model's application isn't the runners' any more: those are the first to know."""
        here = {model: handles.denoiser.app_name for model, handles in self._handles.items()}
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if not places.taken:
                continue
            with suppress(Exception):  # no runner answers at the moment
                served: Mapping[str, str] = await self._runner.serves.remote()
                gone: dict[str, Withdrawal] = {
                    model: "model_replaced" if model in served else "model_unloaded"
                    for model, app in here.items()
                    if served.get(model) != app
                }
                places.withdraw(gone)

    async def _stages(self) -> list[StageLoad]:
        """As Ray Serve's controller counts their replicas, in whichever applications they are."""
        status = await asyncio.to_thread(serve.status)
        states: dict[str, Counter[str]] = defaultdict(Counter)
        for application in status.applications.values():
            for name, deployment in application.deployments.items():
                states[name].update(deployment.replica_states)
        found = [(watch, states[stage_name(*of)]) for of, watch in self._watches.items()]
        loads = [watch.load(counts["RUNNING"], counts.total() - counts["STOPPING"]) for watch, counts in found]
        return await asyncio.gather(*loads)

    async def _wake(self, video_id: str | None = None) -> None:
        """Tell the runners, without making the client wait for it: they look by themselves too, only later.

        Of a new video one of them, of one that is to stop all: nobody here knows whose it is.
        """
        task = asyncio.create_task(self._tell(video_id))
        self._wakes.add(task)
        task.add_done_callback(self._wakes.discard)

    async def _tell(self, video_id: str | None) -> None:
        try:
            if video_id is None:
                await self._runner.wake.remote()
            else:
                await self._runner.broadcast("tell", video_id).results_async()
        except Exception:
            _log.warning("no runner could be told of the news", exc_info=True)


def _asking(handle: Any) -> Callable[[], Awaitable[Sequence[StageState]]]:
    async def ask() -> Sequence[StageState]:
        states: Sequence[StageState] = await handle.broadcast("state").results_async()
        return states

    return ask
