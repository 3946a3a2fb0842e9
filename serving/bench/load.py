"""The load generator: requests by their times of arrival, or so many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from serving.bench.asks import Arrival, Ask
from serving.bench.following import Outcome, Target

OnEnd = Callable[[Outcome], None]


async def open_loop(target: Target, arrivals: Sequence[Arrival], on_end: OnEnd | None = None) -> list[Outcome]:
    """Send each request at its time, however many are unfinished; outcomes in the order of the arrivals."""
    target.restart()

    async def one(arrival: Arrival) -> Outcome:
        await asyncio.sleep(max(0.0, arrival.at_seconds - target.now()))
        return _told(await target.make(arrival.ask, scheduled=arrival.at_seconds), on_end)

    return list(await asyncio.gather(*(one(arrival) for arrival in arrivals)))


async def closed_loop(
    target: Target, asks: Sequence[Ask], concurrency: int, on_end: OnEnd | None = None
) -> list[Outcome]:
    """Keep `concurrency` requests unfinished until all are sent; outcomes in the order of the requests."""
    target.restart()
    waiting = iter(enumerate(asks))
    outcomes: dict[int, Outcome] = {}

    async def client() -> None:
        for number, ask in waiting:
            outcomes[number] = _told(await target.make(ask), on_end)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return [outcomes[number] for number in sorted(outcomes)]


def _told(outcome: Outcome, on_end: OnEnd | None) -> Outcome:
    if on_end is not None:
        on_end(outcome)
    return outcome
