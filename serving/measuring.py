"""What `rushes measure` does: run a bundle's graphs at several sizes, and write down what they take on this machine."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np

from models.bundle import MANIFEST, Bundle, BundleError, Manifest
from models.cost import CallSample, ChunkSample, CostInfo, fit
from serving.engines.engine import Engine
from serving.engines.onnx_runtime import CPU
from serving.engines.opening import Opener
from serving.pipeline.decoding import EngineDecoder
from serving.pipeline.geometry import latent_shape
from serving.pipeline.request import make_spec
from serving.pipeline.sessions import open_session
from serving.pipeline.stages import DenoiseRequest, EncodedSource, LatentChunk, TextEmbedding, VideoSpec

# The shortest of so many: whatever else runs on the machine only ever makes a call longer.
_TIMES = 3
Clock = Callable[[], float]
# Rows in a call: one video with and without guidance, and two.
_ROWS = (1, 2, 4)


def measure(
    bundle: Bundle, *, threads: int = 1, provider: str = CPU, progress: Callable[[str], None] = print
) -> CostInfo:
    """Raises `EngineError`, or `BundleError` when what was measured follows no rule."""
    calls, chunks = sample(bundle, threads=threads, provider=provider, progress=progress)
    device = f"{provider} on {platform.machine()}, {threads} of {os.cpu_count()} threads"
    try:
        return fit(device, calls, chunks)
    except ValueError as error:
        said = " ".join(str(error).split())
        raise BundleError(f"What {bundle.root} takes can't be told by a rule ({said}).") from None


def sample(
    bundle: Bundle, *, threads: int = 1, provider: str = CPU, progress: Callable[[str], None] = print
) -> tuple[list[CallSample], list[ChunkSample]]:
    """Time denoiser calls and chunks of several sizes. Raises `EngineError`."""
    # One thread's own time is what it takes on a quiet machine, however busy this one is.
    clock = time.process_time if provider == CPU and threads == 1 else time.perf_counter
    calls: list[CallSample] = []
    chunks: list[ChunkSample] = []
    (engine,) = Opener(bundle, threads, provider).open("denoiser")
    for spec, rows in product(_specs(bundle.manifest), _ROWS):
        progress(f"denoising {spec.width}x{spec.height}, {spec.frames} frames, {rows} rows")
        calls.append(_call(bundle.manifest, engine, spec, rows, clock))
    for spec in _specs(bundle.manifest):
        progress(f"decoding {spec.width}x{spec.height}, {spec.frames} frames")
        chunks += asyncio.run(_chunks(bundle, spec, threads, provider, clock))
    return calls, chunks


def write(bundle: Bundle, cost: CostInfo) -> Bundle:
    """Put it into the manifest, which is replaced at once; the bundle as it is then. Its digest is another one."""
    manifest = bundle.manifest.model_copy(update={"cost": cost})
    new = bundle.root / f".{MANIFEST}.tmp"
    new.write_text(manifest.model_dump_json(indent=1, exclude_none=True) + "\n")
    os.replace(new, bundle.root / MANIFEST)
    return Bundle.load(bundle.root)


def _specs(manifest: Manifest) -> Iterator[VideoSpec]:
    """The smallest and the default size, short and of the default length, and one between the sizes."""
    limits = manifest.limits
    width, height = limits.default_size
    least = -(-limits.min_side // limits.size_multiple) * limits.size_multiple
    between = (least + min(width, height)) // 2 // limits.size_multiple * limits.size_multiple
    sizes = dict.fromkeys([(least, least), (between, between), (width, height)])
    for (w, h), seconds in product(sizes, sorted({1, limits.default_seconds})):
        yield make_spec(
            manifest, "x", size=f"{w}x{h}", seconds=seconds, seed=0, num_inference_steps=1, guidance_scale=1
        )


def _call(manifest: Manifest, engine: Engine, spec: VideoSpec, rows: int, clock: Clock) -> CallSample:
    text = TextEmbedding(np.zeros((manifest.text.max_tokens, manifest.text.dim), np.float32))
    seen = manifest.shape_of("denoiser", "image_hidden_states")
    states = None if seen is None else np.zeros([int(size) for size in seen[1:]], np.float32)
    source = EncodedSource(np.zeros(latent_shape(manifest, spec), np.float32), states) if manifest.pictured else None
    session = open_session(manifest, DenoiseRequest("measured", spec, text, None, source=source))
    feeds = {name: np.repeat(value, rows, axis=0) for name, value in session.feeds().items()}
    seconds = min(_timed(lambda: engine.run(feeds), clock) for _ in range(1 + _TIMES))
    return CallSample(rows=rows, tokens=session.tokens_per_row, seconds=seconds)


async def _chunks(bundle: Bundle, spec: VideoSpec, threads: int, provider: str, clock: Clock) -> list[ChunkSample]:
    """The first chunk, which is unlike the others, and the second, where there is one."""
    manifest = bundle.manifest
    channels, frames, height, width = latent_shape(manifest, spec)
    decoder = EngineDecoder.open(bundle, threads=threads, provider=provider)
    best: dict[int, float] = {}
    pixels: dict[int, int] = {}
    try:
        for _ in range(1 + _TIMES):
            for index in range(min(2, -(-frames // manifest.chunk_latent_frames))):
                count = min(manifest.chunk_latent_frames, frames - index * manifest.chunk_latent_frames)
                chunk = LatentChunk(index, np.zeros((channels, count, height, width), np.float32), last=False)
                started = clock()
                fragment = await decoder.decode("measured", spec, chunk)
                best[index] = min(best.get(index, np.inf), clock() - started)
                pixels[index] = fragment.frames * spec.width * spec.height
            await decoder.close("measured")
    finally:
        await decoder.stop()
    return [ChunkSample(pixels=pixels[index], seconds=best[index]) for index in best]


def _timed(run: Callable[[], object], clock: Clock) -> float:
    started = clock()
    run()
    return clock() - started
