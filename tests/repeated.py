"""What somebody does all the time while something else goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Leaves the machine to what goes on.
_PAUSE_SECONDS = 0.05


@dataclass
class Repeated:
    """Something that is done again and again in a thread, and what came of it."""

    work: Callable[[], Any]
    results: list[Any] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    longest_seconds: float = 0.0

    def __enter__(self) -> Repeated:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._repeat)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _repeat(self) -> None:
        while not self._end.wait(_PAUSE_SECONDS):
            began = time.monotonic()
            try:
                self.results.append(self.work())
            except Exception as error:
                self.errors.append(error)
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
