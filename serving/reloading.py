"""How `rushes reload` and a running `rushes serve` find each other: a small file in the data directory, and SIGHUP."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.plans import write_whole
from serving.config import ConfigError

STATE = "serve.json"
_LOOK_SECONDS = 0.1


class State:
    """What the serving process says of itself: its id, and how its last reload went."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reloads = 0

    @classmethod
    @contextmanager
    def kept(cls, data_dir: Path) -> Iterator[State]:
        """There as long as the service runs."""
        state = cls(data_dir / STATE)
        state._write(True, "")
        try:
            yield state
        finally:
            state._path.unlink(missing_ok=True)

    def tell(self, done: bool, said: str) -> None:
        """A reload has ended."""
        self._reloads += 1
        self._write(done, said)

    def _write(self, done: bool, said: str) -> None:
        state = {"pid": os.getpid(), "reloads": self._reloads, "done": done, "said": said}
        write_whole(self._path, json.dumps(state).encode())


def reload(data_dir: Path) -> str:
    """Have the service that runs on this data directory reload, and wait until it has; returns what it did.

    Raises `ConfigError` when there is none or when it refuses, with its own words.
    """
    before = _read(data_dir)
    try:
        os.kill(before["pid"], signal.SIGHUP)
    except ProcessLookupError:
        raise ConfigError(f"the service that was started on {data_dir} is gone: start it with `rushes serve`") from None
    while (now := _read(data_dir))["reloads"] == before["reloads"]:
        time.sleep(_LOOK_SECONDS)
    if not now["done"]:
        raise ConfigError(f"the service refused, and serves what it did: {now['said']}")
    return str(now["said"])


def _read(data_dir: Path) -> dict[str, int]:
    try:
        state: dict[str, int] = json.loads((data_dir / STATE).read_bytes())
    except (OSError, ValueError):
        raise ConfigError(f"no service runs on {data_dir} on this machine: start one with `rushes serve`") from None
    return state
