"""All that works behind the API: the runner, and beside it whatever looks after batches, webhooks and old videos."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from models.bundle import Bundle
from serving.api.models import Catalog
from serving.config import ServiceConfig
from serving.deployments.attempt import AttemptSettings, Stages
from serving.deployments.batches import BatchWorker
from serving.deployments.courier import Courier
from serving.deployments.metering import report_jobs
from serving.deployments.observing import start_observing
from serving.deployments.remote import StageHandles, remote_stages
from serving.deployments.runner import Runner
from serving.deployments.storage import REPLICA_PATIENCE_SECONDS, open_storage, webhook_policy
from serving.jobs.census import Census
from serving.jobs.storage import Storage
from serving.jobs.sweeper import Sweeper


class Crew:
    """At work from the moment it is made, in the event loop of whoever makes it."""

    def __init__(
        self,
        config: ServiceConfig,
        storage: Storage,
        bundles: Mapping[str, Bundle],
        stages: Mapping[str, Stages],
        retiring: Mapping[str, Stages] | None = None,
    ) -> None:
        """`stages` are the models', `retiring` those of bundles that models had before."""
        self._runner = Runner(
            storage,
            stages,
            AttemptSettings(
                lease_seconds=config.lease_seconds,
                max_attempts=config.runner.max_attempts,
                checkpoint_steps=config.runner.checkpoint_steps,
                log_prompts=config.observability.log_prompts,
            ),
            max_videos=config.runner.max_videos,
            poll_seconds=config.runner.poll_seconds,
            retiring=retiring,
        )
        loop = asyncio.get_running_loop()
        self._running = loop.create_task(self._runner.run())
        sweeper = Sweeper(
            storage.videos,
            storage.artifacts,
            files=storage.files,
            live=storage.live,
            quota_bytes=config.quota_bytes,
        )
        batches = BatchWorker(
            storage, Catalog(bundles, config.model_aliases, config.text_encoder.rewriter), webhook_policy(config)
        )
        self._beside = [
            loop.create_task(batches.run(config.runner.batch_poll_seconds)),
            loop.create_task(sweeper.run(config.sweep_seconds)),
            loop.create_task(report_jobs(Census(storage.database), lambda: self._runner.running)),
        ]
        if config.webhooks.secret is not None:
            courier = Courier(
                storage.outbox,
                config.webhooks.secret,
                allow_private=config.webhooks.allow_private,
                timeout_seconds=config.webhooks.timeout_seconds,
                give_up_seconds=config.webhooks.give_up_seconds,
            )
            self._beside.append(loop.create_task(courier.run(config.runner.batch_poll_seconds)))

    @property
    def running(self) -> int:
        """Videos in hand."""
        return self._runner.running

    def wake(self) -> None:
        """There is a new video in the store."""
        self._runner.wake()

    def tell(self, video_id: str) -> None:
        """Somebody wants this video to stop; it may be in other hands."""
        self._runner.tell(video_id)

    async def hand_back(self) -> None:
        """Put what is in hand back into the queue, with all that is made of it kept; take nothing new."""
        self._running.cancel()
        await asyncio.wait({self._running})

    async def drain(self) -> None:
        """Take nothing new, and return when what is in hand has ended. What is queued stays in the store."""
        await self._runner.drain()

    def check(self) -> None:
        """Raises `RuntimeError` when the runner has stopped by itself."""
        if self._running.done() and not self._runner.draining and not self._running.cancelled():
            raise RuntimeError("the runner has stopped") from self._running.exception()


class CrewReplica:
    """What a replica answers that has a crew, whatever else it has."""

    _crew: Crew

    async def running(self) -> int:
        """Videos in hand."""
        return self._crew.running

    async def hand_back(self) -> None:
        """Put what is in hand back into the queue, with all that is made of it kept; take nothing new."""
        await self._crew.hand_back()

    async def drain(self) -> None:
        """Take nothing new, and return when what is in hand has ended. What is queued stays in the store."""
        await self._crew.drain()

    async def check_health(self) -> None:
        self._crew.check()

    async def __del__(self) -> None:
        # Ray Serve calls and awaits this when the replica must go and its requests have ended, for as long as
        # `graceful_shutdown_seconds`.
        await self._crew.drain()


class RunnerDeployment(CrewReplica):
    """A crew behind Ray Serve, which works on its own and is only ever told of news. Each stage is a handle."""

    def __init__(
        self, config: ServiceConfig, handles: Mapping[str, StageHandles], retiring: Mapping[str, StageHandles]
    ) -> None:
        start_observing(config.observability)
        bundles = {name: Bundle.load(path) for name, path in config.models.items()}
        self._apps = {name: of_model.denoiser.app_name for name, of_model in handles.items()}
        self._crew = Crew(
            config,
            open_storage(config, patience_seconds=REPLICA_PATIENCE_SECONDS),
            bundles,
            {name: remote_stages(of_model, bundles[name]) for name, of_model in handles.items()},
            {name: remote_stages(of_model, Bundle.load(config.retiring[name])) for name, of_model in retiring.items()},
        )

    async def wake(self) -> None:
        """There is a new video in the store."""
        self._crew.wake()

    async def tell(self, video_id: str) -> None:
        """Somebody wants this video to stop."""
        self._crew.tell(video_id)

    async def serves(self) -> Mapping[str, str]:
        """The application of each model that videos are made on now."""
        return self._apps
