"""`GET /v1/load`: how much there is to do, and who is there to do it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from serving.jobs.estimates import Estimates


class StageLoad(BaseModel):
    """One stage of one model: replicas that work, and all that there are or will be."""

    model: str
    stage: str
    replicas: int
    target_replicas: int


class Load(BaseModel):
    object: Literal["load"] = "load"
    queued: int
    running: int
    stages: list[StageLoad]


AskStages = Callable[[], Awaitable[Sequence[StageLoad]]]


async def no_stages() -> Sequence[StageLoad]:
    """Of a service whose stages nobody can count."""
    return ()


def load_router(estimates: Estimates, ask_stages: AskStages) -> APIRouter:
    router = APIRouter(prefix="/v1/load", tags=["health"])

    @router.get("")
    async def load() -> Load:
        """Everybody's videos, whoever asks: it is the machines that this is about."""
        queued, running = await estimates.unfinished()
        return Load(queued=queued, running=running, stages=list(await ask_stages()))

    return router
