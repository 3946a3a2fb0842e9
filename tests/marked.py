"""Processes that a test has started, with all that these have started: known by a variable in their environments."""

from __future__ import annotations

import os
import signal
import uuid
from contextlib import suppress
from pathlib import Path

_NAME = "RUSHES_MARK"


class Mark:
    """One set of processes: start the first with `environment`."""

    def __init__(self) -> None:
        self._value = uuid.uuid4().hex
        self.environment = {_NAME: self._value}

    def processes(self) -> dict[int, str]:
        """All that live: their command lines."""
        found = {}
        mark = f"{_NAME}={self._value}".encode()
        for path in Path("/proc").iterdir():
            with suppress(OSError):
                if not path.name.isdigit() or mark not in (path / "environ").read_bytes() or _state(path) == "Z":
                    continue
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return found

    def kill(self, part: str) -> bool:
        """SIGKILL to one process with this in its command line; whether there was one."""
        for pid, command in self.processes().items():
            if part in command:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return True
        return False

    def kill_all(self) -> None:
        """SIGKILL, until none is left: they may be starting others."""
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _state(path: Path) -> str:
    return (path / "stat").read_text().rpartition(")")[2].split()[0]
