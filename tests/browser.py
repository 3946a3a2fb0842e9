"""A real browser, where there is one."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: install the `chromium` package")
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@asynccontextmanager
async def chromium() -> AsyncIterator[Any]:
    playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
    async with playwright.async_playwright() as started:
        opened = await started.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield opened
        await opened.close()


class Page:
    """One tab, and everything that went wrong in it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._hear)

    def _hear(self, said: Any) -> None:
        if said.type == "error":
            self.errors.append(f"{said.text} ({said.location.get('url')})")

    async def until(self, condition: str) -> None:
        """Bounded by the test's own time limit. Asked from outside: the page's policy allows no `eval` in it."""
        while not await self.page.evaluate(f"Boolean({condition})"):  # noqa: ASYNC110 - nothing here can set an event
            await asyncio.sleep(0.02)
