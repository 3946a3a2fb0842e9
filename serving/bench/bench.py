"""What every scenario of the suite has in hand: a running service, the bundle that it is asked for, and rounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.bundle import Bundle
from serving.bench.asks import Ask, asks
from serving.bench.engines import decoder_of
from serving.bench.following import Follow, Target
from serving.config import ServiceConfig

Say = Callable[[str], None]
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Bench:
    """`bundle` is what the service at `url` serves under the bundle's own name, as `config` says."""

    url: str
    config: ServiceConfig
    bundle: Bundle
    rounds: int
    say: Say

    def target(self) -> Target:
        return Target(self.url, Follow.stream)

    def asks(self, count: int, *, seed: int = 0, label: str = "", **settings: Any) -> list[Ask]:
        """Requests for this bundle, whose prompts are rendered as they are."""
        body = {
            "model": self.bundle.manifest.name,
            "rewrite_prompt": False,
            "decoder": decoder_of(self.bundle),
            **settings,
        }
        return asks(count, body, seed=seed, label=label)

    def seconds(self, wanted: int) -> int:
        """As near to so many as the model allows."""
        return min(wanted, self.bundle.manifest.limits.max_seconds)


async def idle(target: Target) -> None:
    """Until the service has nothing to do."""
    while True:
        load = (await target.http.get("/v1/load")).raise_for_status().json()
        if not load["queued"] and not load["running"]:
            return
        await asyncio.sleep(_LOOK_SECONDS)
