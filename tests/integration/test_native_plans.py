"""Whole videos through plans, on a double of TensorRT: the same bytes as by ONNX Runtime, state kept in its place."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from fake_tensorrt import FakeCuda, FakeTensorRT, write_plan
from service import until

from export.profiles import profiles_of
from models.bundle import SERVED_GRAPHS, Bundle
from models.plans import PlanBasis, PlanInfo, gpu_name, graph_digest, store_plan
from serving.engines import cuda as cuda_module
from serving.engines import opening
from serving.engines.engine import EngineError
from serving.engines.onnx_runtime import CPU
from serving.pipeline.local import LocalPipeline
from serving.pipeline.request import make_spec
from serving.pipeline.stages import Fragment


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """The module `tensorrt`, and a GPU, as serving meets them."""
    fake = FakeTensorRT(FakeCuda())

    def device() -> FakeCuda:
        made = FakeCuda()
        made.module = fake
        return made

    monkeypatch.setattr(cuda_module, "Cuda", device)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return fake


def build(bundle: Bundle, cache: Path) -> None:
    """What `rushes export tensorrt` would leave."""
    for name in SERVED_GRAPHS:
        if name not in bundle.manifest.graphs:
            continue
        profiles = profiles_of(bundle.manifest, name, any_size=True, rows=8)
        basis = PlanBasis(
            graph=name,
            graph_sha256=graph_digest(bundle, name),
            runtime="tensorrt",
            version="11.4.0",
            gpu=gpu_name("Imagined GPU", (9, 0)),
            profiles=profiles,
        )
        said = [{tensor: list(ends) for tensor, ends in profile.items()} for profile in profiles]
        data = write_plan(cache / "scratch", bundle.path_of(name), said, memory=64).read_bytes()
        info = PlanInfo(basis=basis, bundle="tiny", bytes=len(data), sha256=sha256(data).hexdigest(), seconds=0)
        store_plan(cache, info, data)


async def video(bundle: Bundle, size: str, **options: object) -> list[Fragment]:
    async with LocalPipeline.open(bundle, **options) as pipeline:  # type: ignore[arg-type]  # of several types
        return await made_by(pipeline, bundle, size)


async def made_by(
    pipeline: LocalPipeline, bundle: Bundle, size: str, shown: Callable[[Fragment], Awaitable[None]] | None = None
) -> list[Fragment]:
    fragments: list[Fragment] = []

    async def sink(fragment: Fragment) -> None:
        fragments.append(fragment)
        if shown is not None:
            await shown(fragment)

    spec = make_spec(bundle.manifest, "a red ball", seconds=2, seed=3, size=size, rewrite_prompt=False)
    await pipeline.generate(spec, sink)
    return fragments


@pytest.mark.parametrize("kind", ["", "causal_", "experts_"])
async def test_a_video_is_the_same(
    kind: str, trt: FakeTensorRT, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle: Bundle = request.getfixturevalue(f"tiny_{kind}bundle")
    build(bundle, tmp_path)
    made = await video(bundle, "64x64", provider="tensorrt", plans=tmp_path)
    assert made == await video(bundle, "64x64")
    assert len(made) > 1
    executed = len(trt.called("execute_async_v3"))
    if kind == "":
        # Calls of one shape: the first one runs, the second is captured in two, later ones are replays. There are two
        # prompts and four steps; the decoder, with a cache, is never captured, and has two calls for the first chunk.
        assert executed == 3 + 3 + len(made) + 1


async def test_a_causal_cache_stays_on_the_device(
    trt: FakeTensorRT, tiny_causal_bundle: Bundle, tmp_path: Path
) -> None:
    build(tiny_causal_bundle, tmp_path)
    made: list[torch.Tensor] = []
    original = FakeCuda.zeros

    def zeros(self: FakeCuda, shape: tuple[int, ...]) -> torch.Tensor:
        made.append(original(self, shape))
        return made[-1]

    FakeCuda.zeros = zeros  # type: ignore[method-assign, assignment]  # to look on
    try:
        await video(tiny_causal_bundle, "64x64", provider="tensorrt", plans=tmp_path)
    finally:
        FakeCuda.zeros = original  # type: ignore[method-assign]  # as it was
    (cache,) = made
    # Every call read it where it was made.
    addresses = {address for name, address in trt.called("set_tensor_address") if name == "cache"}
    assert addresses == {cache.data_ptr()}
    assert bool(cache.any())


@pytest.mark.parametrize("kind", ["", "causal_"])
async def test_a_video_begun_without_plans_goes_on_with_them(
    kind: str,
    trt: FakeTensorRT,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """ONNX Runtime's CPU in the clothes of its CUDA."""
    monkeypatch.setattr(opening, "_MEANWHILE", CPU)
    monkeypatch.setattr(opening, "_LOOK_SECONDS", 0.01)
    caplog.set_level(logging.INFO, "serving.engines")
    bundle: Bundle = request.getfixturevalue(f"tiny_{kind}bundle")
    later: list[asyncio.Task[list[Fragment]]] = []

    async def plans_come(fragment: Fragment) -> None:
        if fragment.index == 0:
            assert trt.called("execute_async_v3") == []
            await asyncio.to_thread(build, bundle, tmp_path)
            moved = "runs its plans from now on"
            await until(lambda: sum(moved in message for message in caplog.messages) == 3)
            # Another one shares its calls.
            later.append(asyncio.create_task(made_by(pipeline, bundle, "64x64")))

    async with LocalPipeline.open(bundle, provider="tensorrt", plans=tmp_path) as pipeline:
        said = [message for message in caplog.messages if "runs the graphs until there are plans" in message]
        assert [message.split(" for ")[0] for message in said] == [
            f"There is no plan of the {graph}" for graph in ("text_encoder", "denoiser", "decoder_first")
        ]
        first = await made_by(pipeline, bundle, "64x64", plans_come)
        assert trt.called("execute_async_v3") != []
        second = await later[0]
    assert first == second == await video(bundle, "64x64")


def test_a_broken_plan_is_said_at_once(trt: FakeTensorRT, tiny_causal_bundle: Bundle, tmp_path: Path) -> None:
    build(tiny_causal_bundle, tmp_path)
    for plan in tmp_path.glob("*.plan"):
        plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(EngineError, match=r"is not what its record says: delete it and build it again"):
        LocalPipeline.open(tiny_causal_bundle, provider="tensorrt", plans=tmp_path)


def test_without_a_plan_and_without_cuda_it_says_both(
    trt: FakeTensorRT, tiny_causal_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_MEANWHILE", "ImaginaryExecutionProvider")
    missing = r"no plan of the text_encoder for tensorrt 11.4.0 on Imagined GPU, sm90 in .*: make one with"
    with pytest.raises(EngineError, match=rf"{missing} .* can Imaginary.* this onnxruntime has no ImaginaryExecution"):
        LocalPipeline.open(tiny_causal_bundle, provider="tensorrt", plans=tmp_path)
