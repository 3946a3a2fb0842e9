"""Lines that say which video and which attempt they are about, as text or as JSON. Prompts are in none of them."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

from serving.tracing import trace_id_of

LogFormat = Literal["text", "json"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]

_about: ContextVar[Mapping[str, str | int]] = ContextVar("rushes_log", default={})  # noqa: B039 - never changed


@contextmanager
def about(**fields: str | int) -> Iterator[None]:
    """What is logged in this block, and in tasks that it starts, has these fields too: `video_id`, `attempt`."""
    token = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(token)


def start_logging(format: LogFormat, level: LogLevel) -> None:
    """What this process logs goes to stderr from now on, which Ray keeps by replica."""
    # Ray Serve may have put its own log in the place of `sys.stderr`.
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logger = logging.getLogger("serving")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(fields)s")

    def format(self, record: logging.LogRecord) -> str:
        record.fields = "".join(f" {name}={value}" for name, value in _about.get().items())
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _about.get()
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **fields,
        }
        if video_id := fields.get("video_id"):
            line["trace_id"] = trace_id_of(str(video_id))
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
