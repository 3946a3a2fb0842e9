"""`GET /v1/load`: how much there is to do, and who is there to do it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from serving.jobs.estimates import Estimates


class StageLoad(BaseModel):
    """One stage of one model, over all its replicas."""

    model: str
    stage: str
    replicas: int = Field(description="Those that work.")
    target_replicas: int = Field(description="All that there are or will be.")
    waiting: int | None = Field(default=None, description="Calls or videos that wait for a place; null if not known.")
    in_work: int | None = Field(default=None, description="Those that have one.")
    outstanding_seconds: float | None = Field(default=None, description="What all of them will take.")
    occupancy: float | None = Field(
        default=None,
        description="Which part of the time engines ran, 0 to 1, since this replica of the API was last asked; null at "
        "first.",
    )


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
