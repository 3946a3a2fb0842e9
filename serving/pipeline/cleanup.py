"""Work that is seen through although whoever waits for it is cancelled, and cancelled again."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


async def seen_through(work: Coroutine[Any, Any, _T]) -> _T:
    """Return or raise what `work` does when it has; a cancellation that came meanwhile is raised only then.

    A task that is cancelled cleans up, and may be cancelled once more while it does so: by a task group of which
    another task failed at the same moment. What was still to be freed would then never be.
    """
    running = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return await running
