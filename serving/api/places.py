"""How many interactive sessions there may be: in this replica, and of each API key anywhere."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from serving.api.errors import ApiError
from serving.jobs.live import LEASE_SECONDS, LiveSessions

# Why a model's sessions end.
Withdrawal = Literal["model_replaced", "model_unloaded"]

_log = logging.getLogger(__name__)


class Places:
    """Those of this replica."""

    def __init__(self, most: int, live: LiveSessions) -> None:
        self._most, self._live = most, live
        self.taken = 0
        self._withdrawn: dict[str, Withdrawal] = {}
        self._told: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def withdraw(self, models: Mapping[str, Withdrawal]) -> None:
        """These models are about to go from here: their sessions end, and none begins."""
        for model, why in models.items():
            self._withdrawn.setdefault(model, why)
            self._told[model].set()

    async def withdrawal(self, model: str) -> Withdrawal:
        """Why, once the model goes."""
        await self._told[model].wait()
        return self._withdrawn[model]

    async def take(self, session_id: str, model: str, owner: str | None) -> None:
        """Raises `ApiError` (429) when all here are taken, or (503) when the model is going, and `LimitReached` when
        the key has as much as it may."""
        if model in self._withdrawn:
            message = f"{model} is being replaced here: connect again."
            raise ApiError(503, message, param="session.model", code="model_unavailable")
        if self.taken >= self._most:
            message = f"There are {self.taken} interactive sessions here already; try again later."
            raise ApiError(429, message, code="too_many_sessions")
        self.taken += 1
        if owner is None:
            return
        try:
            await self._live.open(session_id, owner)
        except BaseException:
            self.taken -= 1
            raise

    async def keep(self, session_id: str, owner: str) -> None:
        """Hold on to a place that was taken; returns when the key has been revoked."""
        good = True
        while good:
            await asyncio.sleep(LEASE_SECONDS / 3)
            try:
                good = await self._live.renew(session_id, owner)
            except Exception:  # the database is away for a moment
                _log.warning("%s: its place could not be kept", session_id, exc_info=True)

    async def leave(self, session_id: str, owner: str | None) -> None:
        self.taken -= 1
        if owner is None:
            return
        try:
            await self._live.close(session_id, owner)
        except Exception:  # the place is free when its lease has run out
            _log.warning("%s: its place could not be given back", session_id, exc_info=True)
