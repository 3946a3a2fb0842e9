"""How busy the stages are, asked of all their replicas."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from serving.api.load import StageLoad
from serving.pipeline.pace import StageState

_log = logging.getLogger(__name__)

# Nobody waits longer for a figure that is old in a second.
_PATIENCE_SECONDS = 2.0


class StageWatch:
    """One stage. How much of the time it is busy is told from one asking to the next."""

    def __init__(self, model: str, stage: str, ask: Callable[[], Awaitable[Sequence[StageState]]]) -> None:
        """`ask` gets the state of each of its replicas."""
        self._model, self._stage, self._ask = model, stage, ask
        self._before: tuple[float, float] | None = None

    async def load(self, replicas: int, target_replicas: int) -> StageLoad:
        """With the replicas as the caller has counted them; without the rest when they don't answer."""
        counted = StageLoad(model=self._model, stage=self._stage, replicas=replicas, target_replicas=target_replicas)
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                states = await self._ask()
        except Exception:
            _log.warning("%s: its %s don't say how they stand", self._model, self._stage, exc_info=True)
            return counted
        busy, now = sum(state.busy_seconds for state in states), time.monotonic()
        before, self._before = self._before, (now, busy)
        occupancy = None
        if before is not None and states and now > before[0]:
            # A replica that went has taken its seconds along, one that came brings few.
            occupancy = min(1.0, max(0.0, (busy - before[1]) / (now - before[0]) / len(states)))
        return counted.model_copy(
            update={
                "waiting": sum(state.waiting for state in states),
                "in_work": sum(state.in_flight for state in states),
                "outstanding_seconds": round(sum(state.outstanding_seconds for state in states), 3),
                "occupancy": None if occupancy is None else round(occupancy, 3),
            }
        )
