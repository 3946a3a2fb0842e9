"""What was running when the tests were interrupted: a suite that hangs says where."""

from __future__ import annotations

import time

import pytest


class Unfinished:
    """Knows, also of other processes' tests (pytest-xdist), which have begun and not ended."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._began[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._began.pop(nodeid, None)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        now = time.monotonic()
        for test, began in self._began.items():
            terminalreporter.write_line(f"UNFINISHED {test} after {now - began:.0f} s")
