"""Log lines and traces: what they say, and what they never say."""

from __future__ import annotations

import asyncio
import json
import logging
import sys

import pytest

from serving import tracing
from serving.logs import JsonFormatter, TextFormatter, about


def line(formatter: logging.Formatter, message: str = "attempt %d failed", *args: object) -> str:
    try:
        raise ValueError("no room")
    except ValueError:
        error = sys.exc_info()
    return formatter.format(logging.LogRecord("serving.x", logging.ERROR, "x.py", 1, message, args or (2,), error))


def test_a_json_line_names_video_attempt_and_trace() -> None:
    with about(video_id="video_1"), about(attempt=2):
        said = json.loads(line(JsonFormatter()))
    assert said["video_id"] == "video_1"
    assert said["attempt"] == 2
    assert said["trace_id"] == tracing.trace_id_of("video_1")
    assert said["message"] == "attempt 2 failed"
    assert said["level"] == "ERROR"
    assert "ValueError: no room" in said["error"]


def test_what_a_block_is_about_ends_with_it() -> None:
    with about(video_id="video_1"):
        pass
    assert "video_id" not in json.loads(line(JsonFormatter()))


def test_a_text_line_says_the_same() -> None:
    with about(video_id="video_1", attempt=2):
        assert "ERROR serving.x: attempt 2 failed video_id=video_1 attempt=2" in line(TextFormatter())


async def test_tasks_are_about_what_their_starter_was() -> None:
    async def said(video_id: str) -> str:
        with about(video_id=video_id):
            return await asyncio.create_task(asyncio.to_thread(line, JsonFormatter()))

    found = await asyncio.gather(*(said(f"video_{n}") for n in range(5)))
    assert [json.loads(text)["video_id"] for text in found] == [f"video_{n}" for n in range(5)]


def test_without_tracing_nothing_is_carried() -> None:
    with tracing.below("video_1", "attempt"), tracing.span("encode", {"traceparent": "00-1-2-01"}):
        assert tracing.carrier() == {}
    opened = tracing.Open("denoise", {})
    assert opened.carrier == {}
    opened.end()


def test_a_missing_exporter_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(tracing.TracingError, match=r"rushes\[tracing\]"):
        tracing.start_tracing("http://127.0.0.1:1/v1/traces", 1.0, "replica")
