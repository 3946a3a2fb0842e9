"""The engine calls that a video needs, recorded once and then replayed with nothing around them: the limit.

The pipeline's own session and decoder make the calls, so these are the same in number, shape and order as a service's.
What lies between them (sampler, queues, muxer) is what a replay leaves out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle, GraphName
from serving.config import ServiceConfig
from serving.engines.engine import Array, Engine, arrays_of
from serving.engines.opening import Opener
from serving.pipeline.decoding import EngineDecoder
from serving.pipeline.sessions import open_session
from serving.pipeline.stages import DenoiseRequest, LatentChunk, TextEmbedding, VideoSpec
from serving.pipeline.text import EngineTextEncoder
from serving.stage_config import StageConfig


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an engine; `feeds` are as they were, but for caches, which go on changing in place."""

    graph: GraphName
    engine: Engine
    feeds: Mapping[str, Array]

    def run(self) -> float:
        """Seconds that it took."""
        started = time.perf_counter()
        self.engine.run(self.feeds)
        return time.perf_counter() - started

    def with_rows(self, rows: int) -> Call:
        """The same call for so many rows, each a copy of the first."""
        return replace(self, feeds={name: np.repeat(array[:1], rows, axis=0) for name, array in self.feeds.items()})


@dataclass(frozen=True, slots=True)
class ChunkCalls:
    """What one chunk takes beyond those before it: the denoiser's calls until it is out, and the decoder's."""

    seconds: float
    denoise: tuple[Call, ...]
    decode: tuple[Call, ...]
    frames: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class VideoCalls:
    """All of one video. A bidirectional one has all its denoiser calls before its first chunk."""

    spec: VideoSpec
    text: tuple[Call, ...]
    chunks: tuple[ChunkCalls, ...]

    @property
    def seconds(self) -> float:
        """How long the video plays."""
        return sum(chunk.seconds for chunk in self.chunks)

    @property
    def first_chunk(self) -> list[Call]:
        """What must be done, one after another, before anything can be seen."""
        return [*self.text, *self.chunks[0].denoise, *self.chunks[0].decode]


class _Recorded:
    """An engine that keeps the feeds of its calls, and the frames that come out of them."""

    def __init__(self, graph: GraphName, engine: Engine) -> None:
        self.graph, self.engine = graph, engine
        self.inputs, self.outputs, self.arrays = engine.inputs, engine.outputs, arrays_of(engine)
        self.calls: list[Call] = []
        self.frames: list[NDArray[np.uint8]] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.calls.append(Call(self.graph, self.engine, dict(feeds)))
        outputs = self.engine.run(feeds)
        if "frames" in outputs:
            self.frames.append(outputs["frames"][0])
        return outputs


class Engines:
    """A bundle's engines, opened as `config` says that the service opens them. Raises `EngineError`."""

    def __init__(self, bundle: Bundle, config: ServiceConfig) -> None:
        self.bundle, self.config = bundle, config
        self.text = self._open(config.text_encoder, "text_encoder")
        names: list[GraphName] = ["denoiser", "denoiser_2"] if bundle.manifest.experts else ["denoiser"]
        self.denoisers = self._open(config.denoiser, *names)
        decoders: list[GraphName] = ["decoder_first", "decoder_next"]
        if bundle.manifest.tiny_decoder is not None:
            decoders += ["tiny_decoder_first", "tiny_decoder_next"]
        self.decoders = self._open(config.decoder, *decoders)

    async def record(self, spec: VideoSpec) -> VideoCalls:
        """Make the video once, and keep the calls that this takes."""
        manifest, id = self.bundle.manifest, uuid4().hex
        text = _Recorded("text_encoder", self.text["text_encoder"])
        encoder = EngineTextEncoder(text, self.bundle.tokenizer, manifest.text)
        first, following = (
            _Recorded(name, engine)
            for name, engine in self.decoders.items()
            if name.startswith("tiny") == (spec.decoder == "tiny")
        )
        decoder = EngineDecoder((first, following), manifest, tiny=(first, following))
        try:
            conditional = await encoder.encode(spec.rendered_prompt)
            calls = tuple(text.calls)
            # A service has the negative prompt's embedding already: it is the same for almost everybody.
            unconditional = await encoder.encode(spec.negative_prompt) if spec.guidance_scale > 1 else None
            chunks = []
            for chunk, denoise in self._denoised(spec, conditional, unconditional):
                await decoder.decode(id, spec, chunk)
                decode = (*first.calls, *following.calls)
                frames = np.concatenate([*first.frames, *following.frames])
                for recorded in (first, following):
                    recorded.calls.clear()
                    recorded.frames.clear()
                chunks.append(ChunkCalls(len(frames) / manifest.fps, denoise, decode, frames))
        finally:
            await encoder.stop()
            await decoder.stop()
        return VideoCalls(spec, calls, tuple(chunks))

    def _denoised(
        self, spec: VideoSpec, conditional: TextEmbedding, unconditional: TextEmbedding | None
    ) -> Iterable[tuple[LatentChunk, tuple[Call, ...]]]:
        """Each chunk with the calls that it took."""
        request = DenoiseRequest("recorded", spec, conditional, unconditional)
        session = open_session(self.bundle.manifest, request, arrays_of(self.denoisers["denoiser"]))
        calls: list[Call] = []
        while session.calls_done < session.calls:
            call = Call(session.graph, self.denoisers[session.graph], session.feeds())
            calls.append(call)
            for event in session.take(call.engine.run(call.feeds)):
                if isinstance(event, LatentChunk):
                    yield event, tuple(calls)
                    calls = []

    def _open(self, stage: StageConfig, *names: GraphName) -> dict[GraphName, Engine]:
        opened = Opener(self.bundle, stage.threads, stage.provider, stage.plans).open(*names)
        return dict(zip(names, opened, strict=True))


def replay(video: VideoCalls) -> list[float]:
    """Seconds from the start until each chunk is decoded, when decoding goes on beside denoising, each in a thread."""
    started = time.perf_counter()

    def decoded(calls: Sequence[Call]) -> float:
        for call in calls:
            call.run()
        return time.perf_counter() - started

    with ThreadPoolExecutor(1, thread_name_prefix="decoder") as thread:
        for call in video.text:
            call.run()
        ends = []
        for chunk in video.chunks:
            for call in chunk.denoise:
                call.run()
            ends.append(thread.submit(decoded, chunk.decode))
        return [end.result() for end in ends]


def saturate(replicas: Sequence[VideoCalls], *, rows: int, denoisers: int, decoders: int, batches: int) -> list[float]:
    """When so many videos would be finished by the engines alone, with full batches of `rows` all the time.

    `denoisers` and `decoders` are threads, for as many replicas; each denoiser makes `batches` calls of each kind.
    `replicas` are the same video, recorded once for each thread of the kind that has more: an engine takes one call at
    a time.
    """
    per_call = max(1, rows // _rows(replicas[0].chunks[0].denoise[0]))
    widened = [
        [call.with_rows(per_call * _rows(call)) for chunk in video.chunks for call in chunk.denoise]
        for video in replicas[:denoisers]
    ]
    waiting: SimpleQueue[bool] = SimpleQueue()
    started = time.perf_counter()

    def denoise(calls: Sequence[Call]) -> None:
        for _ in range(batches):
            for call in calls:
                call.run()
            for _ in range(per_call):
                waiting.put(True)

    def decode(video: VideoCalls) -> list[float]:
        ends = []
        while waiting.get():
            for call in (*video.text, *(call for chunk in video.chunks for call in chunk.decode)):
                call.run()
            ends.append(time.perf_counter() - started)
        return ends

    with ThreadPoolExecutor(denoisers + decoders) as threads:
        decoding = [threads.submit(decode, video) for video in replicas[:decoders]]
        denoising = [threads.submit(denoise, calls) for calls in widened]
        try:
            for one in denoising:
                one.result()
        finally:
            for _ in decoding:
                waiting.put(False)
        return sorted(end for one in decoding for end in one.result())


def _rows(call: Call) -> int:
    return len(next(iter(call.feeds.values())))
