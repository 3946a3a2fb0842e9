"""A suite that hangs says where, and goes on.

SIGUSR1 stops it: `timeout --signal=USR1 SECONDS pytest ...` sends that to all its processes. Those of pytest-xdist say
where they are; the one that started them says which tests had begun and what all processes were doing.
`RUSHES_TEST_SECONDS`: a test that takes longer is killed, with its process and what that started, and so has failed.
For what neither its own time limit nor `faulthandler` ends.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from execnet.gateway import Gateway
from xdist.scheduler import LoadScopeScheduling

_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_KILL_AFTER = float(os.environ.get("RUSHES_TEST_SECONDS", "0"))
_LOOK_SECONDS = 5


class Unfinished:
    """Knows, also of other processes' tests (pytest-xdist), which have begun and not ended."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._busiest = ""
        self._pids: dict[str, int] = {}
        if _WORKER:
            faulthandler.register(signal.SIGUSR1, os.dup(sys.__stderr__.fileno()), all_threads=False)
        else:
            signal.signal(signal.SIGUSR1, self._stop)

    def watch(self, scheduling: LoadScopeScheduling) -> None:
        """Kill processes whose test takes too long."""
        if _KILL_AFTER:
            threading.Thread(target=self._watch, args=(scheduling,), daemon=True).start()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_newgateway(self, gateway: Gateway) -> None:
        self._pids[gateway.id] = gateway._rinfo().pid

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._began[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._began.pop(nodeid, None)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._busiest:
            terminalreporter.write_line(self._busiest)
        for test, began in self._began.items():
            terminalreporter.write_line(f"UNFINISHED {test} after {time.monotonic() - began:.0f} s")

    def _stop(self, *_: object) -> None:
        self._busiest = _busiest()
        raise KeyboardInterrupt

    def _watch(self, scheduling: LoadScopeScheduling) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            for test, began in list(self._began.items()):
                if time.monotonic() - began < _KILL_AFTER:
                    continue
                for node, scopes in scheduling.assigned_work.items():
                    if any(test in tests for tests in scopes.values()):
                        print(f"\nKILLED {test}\n{_busiest()}", file=sys.__stderr__, flush=True)
                        del self._began[test]
                        _kill(self._pids[node.gateway.id])


def _busiest() -> str:
    command = ["ps", "-eo", "pid,ppid,stat,etimes,times,rss,args", "--sort=-times", "--cols", "160"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return "\n".join([f"{time.strftime('%X')}, load {os.getloadavg()}", *lines[:20]])


def _kill(process: int) -> None:
    """With all that it started."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=False).stdout
    parents = {int(pid): int(parent) for pid, parent in map(str.split, listed.splitlines()[1:])}
    doomed = [process]
    for parent in doomed:
        doomed += [pid for pid, its in parents.items() if its == parent]
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
