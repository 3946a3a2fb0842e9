"""How a denoiser ends: stopped, broken off by a mistake of its own, or with the event loop that it told."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from contextlib import aclosing

import pytest
from pipelines import opened_pipeline
from watched import Watched

from models.bundle import Bundle
from serving.engines.engine import EngineError
from serving.engines.onnx_runtime import OnnxRuntimeEngine
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.request import make_spec
from serving.pipeline.scheduler import StepScheduler
from serving.pipeline.stages import DenoiseRequest, StepDone


async def asked(bundle: Bundle, steps: int = 4) -> DenoiseRequest:
    spec = make_spec(bundle.manifest, "a red ball", seconds=1, num_inference_steps=steps, rewrite_prompt=False)
    async with opened_pipeline(bundle) as pipeline:
        encode = pipeline.text_encoder.encode
        return DenoiseRequest("video", spec, await encode(spec.prompt), await encode(spec.negative_prompt))


async def whole(denoiser: EngineDenoiser, request: DenoiseRequest) -> int:
    async with aclosing(denoiser.denoise(request)) as events:
        return sum([isinstance(event, StepDone) async for event in events])


class Gate:
    """Every call of a denoiser waits at it until it is `open`."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.calls = 0

    def before(self, bundle: Bundle) -> EngineDenoiser:
        return EngineDenoiser(Watched(OnnxRuntimeEngine(bundle.path_of("denoiser")), self._wait), bundle.manifest)

    def _wait(self, _: object) -> None:
        self.calls += 1
        self.reached.set()
        self.open.wait()


async def test_one_that_is_stopped_finishes_its_call_and_says_so_to_whoever_is_here_or_comes(
    tiny_bundle: Bundle,
) -> None:
    gate = Gate()
    denoiser, request = gate.before(tiny_bundle), await asked(tiny_bundle)
    making = asyncio.create_task(whole(denoiser, request))
    await asyncio.to_thread(gate.reached.wait)
    stopping = asyncio.create_task(denoiser.stop())
    with pytest.raises(EngineError, match="was stopped"):
        await making
    assert not stopping.done()
    gate.open.set()
    await stopping
    assert gate.calls == 1
    with pytest.raises(EngineError, match="was stopped"):
        await whole(denoiser, request)
    assert denoiser.sessions == denoiser.outstanding_tokens == 0


async def test_a_mistake_between_two_calls_leaves_nobody_waiting(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(*_: object) -> None:
        raise ZeroDivisionError("no tokens")

    denoiser, request = EngineDenoiser.open(tiny_bundle), await asked(tiny_bundle)
    assert await whole(denoiser, request) == 4
    monkeypatch.setattr(StepScheduler, "took", wrong)
    for _ in range(2):
        with pytest.raises(EngineError, match="broke off: no tokens"):
            await whole(denoiser, request)
    assert "ZeroDivisionError" in caplog.text
    await denoiser.stop()


def test_it_makes_no_call_for_an_event_loop_that_is_closed(tiny_bundle: Bundle) -> None:
    gate = Gate()
    denoiser = gate.before(tiny_bundle)

    async def leave() -> asyncio.Task[int]:
        making = asyncio.create_task(whole(denoiser, await asked(tiny_bundle, steps=40)))
        await asyncio.to_thread(gate.reached.wait)
        return making

    before = threading.enumerate()
    assert asyncio.run(leave()).cancelled()
    (thread,) = [one for one in threading.enumerate() if one not in before and one.name == "denoiser"]
    gate.open.set()
    thread.join(10)
    assert not thread.is_alive()
    assert gate.calls == 1


LEAVING = """
import asyncio, atexit, sys, threading
from pathlib import Path
import numpy as np
from models.bundle import Bundle
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.request import make_spec
from serving.pipeline.stages import DenoiseRequest, TextEmbedding

def names():
    return [thread.name for thread in threading.enumerate()]

async def leave(bundle):
    text = bundle.manifest.text
    embedding = TextEmbedding(np.zeros((text.max_tokens, text.dim), np.float32))
    spec = make_spec(bundle.manifest, "a red ball", num_inference_steps=100, rewrite_prompt=False)
    kept.append(EngineDenoiser.open(bundle).denoise(DenoiseRequest("video", spec, embedding, embedding)))
    print(await anext(kept[0]), names())
    sys.exit(3)

kept = []
atexit.register(lambda: print("at last", names()))
asyncio.run(leave(Bundle.load(Path(sys.argv[1]))))
"""


def test_a_process_that_ends_waits_for_the_call_that_is_running(tiny_bundle: Bundle) -> None:
    """A thread that came back from an engine to no interpreter would abort it."""
    script = [sys.executable, "-c", LEAVING, str(tiny_bundle.root)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    first, last = done.stdout.splitlines()
    assert "'denoiser'" in first
    assert last == "at last ['MainThread']"
