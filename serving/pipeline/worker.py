"""A thread that makes one call after another, for whoever's turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from serving.pipeline.turns import Turns
from serving.threads import background_pool

_T = TypeVar("_T")


class Worker:
    """One call at a time, and none is begun that is cancelled before its turn."""

    def __init__(self, name: str) -> None:
        self._thread = background_pool(1, name)
        self._turns: Turns[asyncio.Future[None]] = Turns()
        self._busy = False

    async def run(self, call: Callable[[], _T], *, interactive: bool) -> _T:
        """What `call` returns or raises. When this is cancelled during the call, the next one still waits for its end.

        Raises `RuntimeError` when the worker was stopped.
        """
        await self._turn(interactive)
        try:
            running = asyncio.get_running_loop().run_in_executor(self._thread, call)
        except RuntimeError:
            self._pass_on()
            raise
        running.add_done_callback(lambda _: self._pass_on())
        return await asyncio.shield(running)

    async def stop(self) -> None:
        """Wait for the call that is running; those that wait for their turn raise."""
        await asyncio.to_thread(self._thread.shutdown)

    async def _turn(self, interactive: bool) -> None:
        if not self._busy:
            self._busy = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._turns.wait(turn, interactive=interactive)
        try:
            await turn
        except asyncio.CancelledError:
            self._turns.leave(turn)
            if not turn.cancelled():  # it came at the same moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while (turn := self._turns.take()) is not None:
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._busy = False
