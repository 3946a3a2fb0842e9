"""Traces of videos and interactive sessions, as OpenTelemetry has them: from the request over every replica to each
engine step.

Off until `start_tracing`, and then at no cost worth naming. A video's trace id is made of the video's id, so that every
attempt at it, on whichever runner, is in one trace, which `trace_id_of` finds again; a session's likewise. Between
replicas the context goes along in the calls (`carrier`), not in Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

# W3C's `traceparent` by its name, or nothing.
Carrier = Mapping[str, str]
NOWHERE: Carrier = {}
# What a replica that is killed loses of its spans.
_FLUSH_MILLISECONDS = 1000

_tracer: Tracer | None = None
_share = 1.0
# The video whose first span is being made.
_wanted: ContextVar[str | None] = ContextVar("rushes_video", default=None)


class TracingError(OSError):
    """Traces were asked for and can't be sent."""


def start_tracing(url: str, share: float, replica: str) -> None:
    """Send this process's spans to an OTLP/HTTP endpoint, such as `http://collector:4318/v1/traces`.

    `share` of all videos are traced, each as a whole; `replica` says which process it was. Raises `TracingError`.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise TracingError(f"{error.name} is missing: pip install 'rushes[tracing]'") from error
    global _tracer, _share
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(share)),
        resource=Resource.create({"service.name": "rushes", "service.instance.id": replica}),
        id_generator=_ids(),
    )
    provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(endpoint=url), schedule_delay_millis=_FLUSH_MILLISECONDS)
    )
    # A provider of our own: Ray and its libraries may have set the process's.
    _tracer, _share = provider.get_tracer("rushes"), share


def trace_id_of(video_id: str) -> str:
    """Where to look for a video: 32 hexadecimal digits."""
    return hashlib.sha256(video_id.encode()).hexdigest()[:32]


@contextmanager
def beginning(
    video_id: str, headers: Mapping[str, str], name: str = "POST /v1/videos", **attributes: str
) -> Iterator[None]:
    """The first span of a video's trace, linked to the client's own trace if its `traceparent` came along."""
    if _tracer is None:
        yield
        return
    from opentelemetry import trace
    from opentelemetry.context import Context

    client = trace.get_current_span(_extracted(headers)).get_span_context()
    links = [trace.Link(client)] if client.is_valid else []
    with _first(video_id):
        span = _tracer.start_span(name, Context(), links=links, attributes=_with(video_id, attributes))
    with trace.use_span(span, end_on_exit=True):
        yield


def record_beginning(video_id: str, name: str, began_ns: int, ended_ns: int, **attributes: str) -> None:
    """The first span of a video that no request of its own asked for."""
    if _tracer is None:
        return
    from opentelemetry.context import Context

    with _first(video_id):
        span = _tracer.start_span(name, Context(), attributes=_with(video_id, attributes), start_time=began_ns)
    span.end(ended_ns)


@contextmanager
def below(video_id: str, name: str, **attributes: str | int) -> Iterator[None]:
    """A span right below the video's first: whatever this task does in the block is below it in turn."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(name, _root(video_id), attributes=_with(video_id, attributes)):
        yield


@contextmanager
def span(name: str, carrier: Carrier, **attributes: str | int | float) -> Iterator[None]:
    """Something that another process asked for, or that is below what it asked for."""
    if _tracer is None or not carrier:
        yield
        return
    with _tracer.start_as_current_span(name, _extracted(carrier), attributes=attributes):
        yield


class Open:
    """A span that no block encloses; `carrier` is for what is below it."""

    def __init__(self, name: str, carrier: Carrier, **attributes: str | int | float) -> None:
        self._span: Span | None = None
        self.carrier = carrier
        if _tracer is not None and carrier:
            self._span = _tracer.start_span(name, _extracted(carrier), attributes=attributes)
            self.carrier = _injected(self._span)

    def end(self) -> None:
        if self._span is not None:
            self._span.end()


def record(name: str, carrier: Carrier, began_ns: int, ended_ns: int, **attributes: str | int | float) -> None:
    """A span that is over; times are in nanoseconds since the epoch."""
    if _tracer is not None and carrier:
        made = _tracer.start_span(name, _extracted(carrier), attributes=attributes, start_time=began_ns)
        made.end(ended_ns)


def carrier() -> Carrier:
    """The context that this task is in, to go along in a call."""
    if _tracer is None:
        return NOWHERE
    from opentelemetry import trace

    return _injected(trace.get_current_span())


@contextmanager
def _first(video_id: str) -> Iterator[None]:
    """A span that is started in the block gets the ids of the video's first one."""
    token = _wanted.set(video_id)
    try:
        yield
    finally:
        _wanted.reset(token)


def _with(video_id: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"video.id": video_id, **attributes}


def _injected(of: Span) -> Carrier:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(found, trace.set_span_in_context(of))
    return found


def _extracted(carrier: Mapping[str, str]) -> Context:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({**carrier}, Context())


def _root(video_id: str) -> Context:
    """The context that the video's first span has or had, in whatever process that was."""
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

    trace_id, span_id = _ids_of(video_id)
    sampled = trace_id & TraceIdRatioBased.TRACE_ID_LIMIT < TraceIdRatioBased.get_bound_for_rate(_share)
    root = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(int(sampled)))
    return trace.set_span_in_context(trace.NonRecordingSpan(root), Context())


def _ids_of(video_id: str) -> tuple[int, int]:
    digest = hashlib.sha256(video_id.encode()).digest()
    return int.from_bytes(digest[:16], "big"), int.from_bytes(digest[16:24], "big")


def _ids() -> Any:
    from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator

    class Ids(IdGenerator):
        """Random, but for a video's first span."""

        def __init__(self) -> None:
            self._random = RandomIdGenerator()

        def generate_trace_id(self) -> int:
            video_id = _wanted.get()
            return self._random.generate_trace_id() if video_id is None else _ids_of(video_id)[0]

        def generate_span_id(self) -> int:
            video_id = _wanted.get()
            return self._random.generate_span_id() if video_id is None else _ids_of(video_id)[1]

    return Ids()
