"""A bell in one process: who waits for something is woken by whoever makes it here, in any event loop or thread.

Nothing may depend on it alone: makers and those who wait may be in different processes, so whoever waits looks by
itself as well, only later.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Hashable
from contextlib import suppress


class Bell:
    """Rung for one topic at a time."""

    def __init__(self) -> None:
        self._waiting: defaultdict[Hashable, set[asyncio.Future[None]]] = defaultdict(set)

    async def wait(self, topic: Hashable, seconds: float) -> None:
        """Until it rings for the topic, but not for longer."""
        heard = asyncio.get_running_loop().create_future()
        self._waiting[topic].add(heard)
        try:
            await asyncio.wait({heard}, timeout=seconds)
        finally:
            self._waiting[topic].discard(heard)
            if not self._waiting[topic]:
                del self._waiting[topic]

    def ring(self, topic: Hashable) -> None:
        for heard in tuple(self._waiting.get(topic, ())):
            with suppress(RuntimeError):  # its loop was closed meanwhile
                heard.get_loop().call_soon_threadsafe(_hear, heard)


def _hear(heard: asyncio.Future[None]) -> None:
    if not heard.done():
        heard.set_result(None)
