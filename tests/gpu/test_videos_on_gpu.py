"""Whole videos on a GPU, by each runtime, against the CPU's."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from parity_on_gpu import assert_close, feeds_of

from export.precision import quantize
from models.bundle import SERVED_GRAPHS, Bundle
from serving.engines.onnx_runtime import CUDA, TENSORRT, OnnxRuntimeEngine, context_file
from serving.pipeline.local import LocalPipeline
from serving.pipeline.request import make_spec

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

LEAST_PSNR = 45.0


async def frames_of(bundle: Bundle, count: int = 1, **options: Any) -> list[NDArray[np.uint8]]:
    """`count` videos made at the same time, decoded."""
    import asyncio

    async def one(pipeline: LocalPipeline, seed: int) -> NDArray[np.uint8]:
        made: list[bytes] = []

        async def sink(fragment: Any) -> None:
            made.append((b"" if made else fragment.init) + fragment.data)

        spec = make_spec(bundle.manifest, "a red ball", seconds=1, seed=seed, size="64x64", rewrite_prompt=False)
        await pipeline.generate(spec, sink)
        with av.open(io.BytesIO(b"".join(made))) as opened:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)])

    async with LocalPipeline.open(bundle, **options) as pipeline:
        return list(await asyncio.gather(*(one(pipeline, seed) for seed in range(count))))


def assert_same_video(got: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> None:
    assert got.shape == wanted.shape
    error = np.square(got.astype(np.float64) - wanted).mean()
    # Both were encoded: what differs by a level before is at most a little more after.
    assert error == 0 or 10 * np.log10(255**2 / error) >= LEAST_PSNR - 5


async def test_a_video_by_plans_is_the_cpus(bundle: Bundle, plans: Callable[..., Path]) -> None:
    (wanted,) = await frames_of(bundle)
    (got,) = await frames_of(bundle, provider="tensorrt", plans=plans(bundle))
    assert_same_video(got, wanted)


async def test_videos_together_are_what_each_is_alone(tiny_causal_bundle: Bundle, plans: Callable[..., Path]) -> None:
    """Caches of several videos are joined on the device and kept apart."""
    wanted = await frames_of(tiny_causal_bundle, 3)
    got = await frames_of(tiny_causal_bundle, 3, provider="tensorrt", plans=plans(tiny_causal_bundle))
    for mine, theirs in zip(got, wanted, strict=True):
        assert_same_video(mine, theirs)


async def test_a_video_in_fp16_is_near_the_masters(
    tiny_bundle: Bundle, plans: Callable[..., Path], tmp_path: Path
) -> None:
    half = quantize(tiny_bundle, tmp_path / "half", "fp16")
    (wanted,) = await frames_of(tiny_bundle)
    (got,) = await frames_of(half, provider="tensorrt", plans=plans(half))
    error = np.square(got.astype(np.float64) - wanted).mean()
    assert error == 0 or 10 * np.log10(255**2 / error) >= 30


def starts(provider: str, bundle: Bundle) -> None:
    """Skip where ONNX Runtime's provider lacks its libraries, which the error names."""
    if provider not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime was built without {provider}: pip install onnxruntime-gpu")
    onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(str(bundle.path_of("text_encoder")), providers=[provider])
    if session.get_providers()[0] != provider:
        pytest.skip(f"{provider} does not start: CUDA's libraries, cuDNN or libnvinfer.so.10 are missing")


@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_every_graph_agrees_on_onnx_runtimes_gpu_providers(provider: str, bundle: Bundle, tmp_path: Path) -> None:
    starts(provider, bundle)
    symbols = {"batch": 1, "tokens": 64, "frames": 2, "rows": 2, "columns": 2, "height": 4, "width": 4}
    for name in SERVED_GRAPHS:
        if name not in bundle.manifest.graphs:
            continue
        feeds = feeds_of(bundle.manifest.graphs[name], symbols)
        path = bundle.path_of(name)
        engine = OnnxRuntimeEngine(path, provider=provider, context_dir=tmp_path)
        assert_close(engine.run(feeds), OnnxRuntimeEngine(path).run(feeds))


async def test_a_video_by_onnx_runtimes_cuda_is_the_cpus(tiny_bundle: Bundle) -> None:
    starts(CUDA, tiny_bundle)
    (wanted,) = await frames_of(tiny_bundle)
    (got,) = await frames_of(tiny_bundle, provider=CUDA)
    assert_same_video(got, wanted)


def test_an_ep_context_file_is_loaded_the_next_time(tiny_bundle: Bundle, tmp_path: Path) -> None:
    starts(TENSORRT, tiny_bundle)
    path = tiny_bundle.path_of("text_encoder")
    feeds = feeds_of(tiny_bundle.manifest.graphs["text_encoder"], {"batch": 1, "tokens": 64})
    first = OnnxRuntimeEngine(path, provider=TENSORRT, context_dir=tmp_path).run(feeds)
    context = context_file(path, tmp_path)
    written = context.stat().st_mtime_ns
    again = OnnxRuntimeEngine(path, provider=TENSORRT, context_dir=tmp_path).run(feeds)
    assert_close(again, first)
    assert context.stat().st_mtime_ns == written
