"""The denoiser behind Ray Serve."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import ActorDiedError, RayError

from models.bundle import Bundle
from serving.config import ObservabilityConfig
from serving.deployments.metering import report_stage
from serving.deployments.observing import start_observing
from serving.deployments.opening import open_denoiser
from serving.deployments.scaling import stats_of
from serving.pipeline.pace import StageState
from serving.pipeline.scheduler import TraceLine
from serving.pipeline.stages import DenoiseEvent, DenoiseRequest, Steering, StepDone, same_bundle
from serving.stage_config import DenoiserConfig
from serving.tracing import Open

_LOOK_SECONDS = 2.0
_STEP_SECONDS = 0.1


class DenoiserDeployment:
    """One replica: its engine, and the sessions of the videos that it denoises together."""

    def __init__(self, bundle: Path, digest: str, config: DenoiserConfig, observing: ObservabilityConfig) -> None:
        start_observing(observing)
        self._digest = digest
        self._stage = open_denoiser(Bundle.load(bundle, digest), config)
        self._reporting = asyncio.create_task(report_stage(lambda: self._stage.state))

    async def denoise(self, request: DenoiseRequest, bundle: str, caller: Any) -> AsyncGenerator[DenoiseEvent, None]:
        """One streaming call a video; of steps that follow each other closely not each is told of.

        Cancelling the call takes its rows out of the batch before the next step. So does the death of `caller`, the
        actor that asks: Ray lets a call go on that nobody hears the end of. `bundle` is the digest of the one that is
        meant. Raises `OtherBundle`.
        """
        same_bundle(self._digest, bundle)
        tracing = Open("denoise", request.trace)
        async with aclosing(self._stage.denoise(replace(request, trace=tracing.carrier))) as events:
            waiting = asyncio.create_task(_next(events))
            orphaned = asyncio.create_task(_until_dead(caller))
            told_at = -math.inf
            try:
                while True:
                    await asyncio.wait({waiting, orphaned}, return_when=asyncio.FIRST_COMPLETED)
                    if not waiting.done() or (event := waiting.result()) is None:
                        return
                    waiting = asyncio.create_task(_next(events))
                    if isinstance(event, StepDone):
                        # A message through Ray costs both ends a millisecond or two, and nobody reads so fast.
                        if time.monotonic() < told_at + _STEP_SECONDS and event.step < event.steps:
                            continue
                        told_at = time.monotonic()
                    yield event
            finally:
                for task in (waiting, orphaned):
                    task.cancel()
                await asyncio.gather(waiting, orphaned, return_exceptions=True)
                tracing.end()

    async def steer(self, video_id: str, steering: Steering) -> bool:
        """Whether an endless video of this name is here, which then goes on as `steering` says."""
        return await self._stage.steer(video_id, steering)

    async def state(self) -> StageState:
        """How this replica stands."""
        return self._stage.state

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `VideoPolicy`."""
        return stats_of(self._stage.state)

    async def sessions(self) -> int:
        """How many videos hold memory in this replica."""
        return self._stage.sessions

    async def trace(self) -> Sequence[TraceLine]:
        """What the last engine calls were of."""
        return self._stage.trace


async def _next(events: AsyncGenerator[DenoiseEvent, None]) -> DenoiseEvent | None:
    return await anext(events, None)


async def _until_dead(caller: Any) -> None:
    """Ask the actor for a sign of life every now and then; any answer but its death is one."""
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        try:
            await caller.__ray_ready__.remote()
        except ActorDiedError:
            return
        except RayError:
            continue
