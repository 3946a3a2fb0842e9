"""Engines that are there at once, and make room for better ones as soon as those can be had.

All engines of a stage move together, between two calls. Looking and opening happen in a thread of their own, so that no
call waits for them. Knows nothing of what makes engines better: see `serving.engines.opening`.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

from serving.engines.engine import Arrays, Engine, Inputs, arrays_of

_log = logging.getLogger(__name__)


class Better(Protocol):
    """Where the better engines come from, and how."""

    def find(self) -> Hashable | None:
        """What all of them would be made of: equal while nothing has changed. None: it isn't all there yet."""

    def open(self) -> Sequence[Engine]:
        """In the order of those that they take the place of; may take minutes. Raises `EngineError`."""


class MovingEngine:
    """An engine that is another one later. Whoever needs it to stay the same for a while takes what it is `now`."""

    def __init__(self, engines: _Together, index: int) -> None:
        self._engines, self._index = engines, index

    @property
    def now(self) -> Engine:
        return self._engines.now[self._index]

    @property
    def inputs(self) -> Inputs:
        return self.now.inputs

    @property
    def outputs(self) -> Sequence[str]:
        return self.now.outputs

    @property
    def arrays(self) -> Arrays:
        return arrays_of(self.now)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return self.now.run(feeds)


def moving(name: str, engines: Sequence[Engine], better: Better, look_seconds: float) -> list[MovingEngine]:
    """`engines`, until `better` are there; it is looked for them every `look_seconds`, while anybody has the engines.

    What can't be opened is logged, and not tried again until `find` says something else. `name` is for the log. While
    they are opened both are in memory.
    """
    together = _Together(engines)
    ended = threading.Event()
    weakref.finalize(together, ended.set)
    arguments = (name, weakref.ref(together), ended, better, look_seconds)
    threading.Thread(target=_look, args=arguments, name=f"{name}-move", daemon=True).start()
    return [MovingEngine(together, index) for index in range(len(engines))]


class _Together:
    def __init__(self, engines: Sequence[Engine]) -> None:
        # One assignment moves all: no call sees a state of one kind and then an engine of the other before it.
        self.now = tuple(engines)


def _look(
    name: str, engines: weakref.ref[_Together], ended: threading.Event, better: Better, look_seconds: float
) -> None:
    tried: Hashable | None = None
    said = ""
    while not ended.wait(look_seconds):
        try:
            found = better.find()
            if found is None or found == tried:
                continue
            tried = found
            opened = tuple(better.open())
        except Exception as error:  # whatever it is, the engines that are there go on
            if str(error) != said:
                said = str(error)
                _log.warning("%s: goes on as it is until the plans change: %s", name, said)
            continue
        if together := engines():
            together.now = opened
            _log.info("%s: runs its plans from now on", name)
        return
