"""A video that is interrupted anywhere is gone on with, not made again, and ends as the same bytes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from pipelines import opened_pipeline
from service import WholeService, until
from watched import Watched

from models.bundle import Bundle
from serving.engines.engine import Array, EngineError
from serving.jobs.artifacts import CHECKPOINTS, Artifacts, checkpoint_key
from serving.jobs.checkpoint import identity_of
from serving.jobs.fragment_log import FragmentLog
from serving.jobs.keeper import Keeper
from serving.jobs.store import Video, VideoStatus, new_video_id
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.generation import generate
from serving.pipeline.local import LocalPipeline
from serving.pipeline.request import make_spec
from serving.pipeline.scheduler import Limits
from serving.pipeline.stages import Fragment, LostSession, VideoSpec

# Some of two chunks, one of several candidates, one guided, one by another sampler than the model's.
ASKED: dict[str, list[dict[str, Any]]] = {
    "tiny_bundle": [
        {"seconds": 1, "num_inference_steps": 5},
        {"seconds": 1, "num_inference_steps": 3, "best_of": 2},
        # What is kept after the second step is in the middle between a full step and one that makes do with it.
        {"seconds": 1, "num_inference_steps": 5, "guidance_cache": "alternate", "guidance_interval": [0.2, 1]},
    ],
    "tiny_causal_bundle": [
        {"seconds": 4, "scene_prompts": [{"start_seconds": 2.5, "prompt": "a blue cube"}]},
        {"seconds": 2, "guidance_scale": 2.5},
        {"seconds": 2, "num_inference_steps": 3, "guidance_scale": 2.5, "guidance_cache": "alternate"},
    ],
}


class Crash(Exception):  # noqa: N818
    """What a kill -9 is in one process: it may come at any engine call, and nothing is tidied up after it."""


@dataclass
class Fuse:
    """Engine calls are counted, and one of them may be the last."""

    calls: int = 0
    blows_at: int | None = None
    first_steps: int = 0

    def __call__(self, feeds: Mapping[str, Array]) -> None:
        if self.calls == self.blows_at:
            raise Crash
        self.calls += 1


@pytest.fixture(params=ASKED)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    found: Bundle = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def pipeline(bundle: Bundle) -> AsyncIterator[LocalPipeline]:
    async with opened_pipeline(bundle) as opened:
        yield opened


def watched(pipeline: LocalPipeline, fuse: Fuse) -> EngineDenoiser:
    engine = pipeline.denoiser._engines["denoiser"]
    # Two rows are one guided video, so that how many calls there are does not depend on who comes first.
    return EngineDenoiser(Watched(engine, fuse), pipeline.bundle.manifest, limits=Limits(max_rows=2))


async def attempt(
    pipeline: LocalPipeline, spec: VideoSpec, artifacts: Artifacts, video_id: str, fence: int, fuse: Fuse
) -> tuple[list[Fragment], Keeper]:
    """One try as a runner makes it; raises `Crash` when the fuse blows."""
    identity = identity_of(pipeline.bundle.digest, asdict(spec))
    writer = await FragmentLog.create(artifacts.videos_dir, video_id, fence=fence, origin=identity)
    keeper = Keeper(artifacts, video_id, identity, writer.check_fence)
    denoiser, made = watched(pipeline, fuse), []

    async def sink(fragment: Fragment) -> None:
        await writer.append(fragment.index, fragment.first_frame, fragment.frames, fragment.init, fragment.data)
        made.append(fragment)

    try:
        await generate(
            video_id,
            spec,
            text_encoder=pipeline.text_encoder,
            denoiser=denoiser,
            decoder=pipeline.decoder,
            sink=sink,
            captioner=pipeline.captioner,
            keeping=keeper,
            state_every=2,
            shown=writer.trusted,
        )
    finally:
        await keeper.close()
        await denoiser.stop()
    return made, keeper


def log_of(artifacts: Artifacts, video_id: str) -> list[bytes]:
    log = FragmentLog.open(artifacts.videos_dir, video_id)
    return [log.init(), *log.fragments()]


async def test_a_video_may_crash_at_any_step_and_ends_the_same(
    bundle: Bundle, pipeline: LocalPipeline, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    artifacts = Artifacts(tmp_path)
    for asked in ASKED[request.node.callspec.params["bundle"]]:
        spec = make_spec(bundle.manifest, "a red ball", **{"seed": 7, "size": "64x64", **asked})
        undisturbed = new_video_id()
        whole = Fuse()
        await attempt(pipeline, spec, artifacts, undisturbed, 1, whole)
        for blows_at in range(whole.calls):
            video_id, first = new_video_id(), Fuse(blows_at=blows_at)
            with pytest.raises(Crash):
                await attempt(pipeline, spec, artifacts, video_id, 1, first)
            shown = len(FragmentLog.open(artifacts.videos_dir, video_id).entries())
            second = Fuse()
            made, _ = await attempt(pipeline, spec, artifacts, video_id, 2, second)
            assert log_of(artifacts, video_id) == log_of(artifacts, undisturbed), (asked, blows_at)
            assert [fragment.index for fragment in made] == list(range(shown, len(made) + shown)), "encoded again"
            assert second.calls <= whole.calls
            if blows_at == whole.calls - 1:
                assert second.calls < whole.calls, "nothing was kept"
        # After the last step there is nothing left to denoise, whoever failed then.
        again = Fuse(blows_at=0)
        (artifacts.videos_dir / undisturbed / "index.jsonl").unlink()
        made, _ = await attempt(pipeline, spec, artifacts, undisturbed, 2, again)
        assert again.calls == 0
        assert [fragment.data for fragment in made] == log_of(artifacts, undisturbed)[1:]


async def test_a_crash_at_every_second_step_still_ends(
    bundle: Bundle, pipeline: LocalPipeline, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    artifacts, video_id, alone = Artifacts(tmp_path), new_video_id(), new_video_id()
    asked = ASKED[request.node.callspec.params["bundle"]][0]
    spec = make_spec(bundle.manifest, "a red ball", **{"seed": 7, "size": "64x64", **asked})
    await attempt(pipeline, spec, artifacts, alone, 1, Fuse())
    tries = 0
    while True:
        tries += 1
        try:
            # A causal chunk takes three calls, and what is finished has to be looked at again.
            lasts = 2 if bundle.manifest.rollout == "bidirectional" else 3 + tries
            await attempt(pipeline, spec, artifacts, video_id, tries, Fuse(blows_at=lasts))
        except Crash:
            continue
        break
    assert tries > 2
    assert log_of(artifacts, video_id) == log_of(artifacts, alone)


async def test_a_lost_denoiser_is_opened_again_where_it_was(bundle: Bundle, pipeline: LocalPipeline) -> None:
    """Within one attempt: nothing has to be read back."""

    class Dying:
        def __init__(self) -> None:
            self.fuse = Fuse(blows_at=3)
            self.inner = watched(pipeline, self.fuse)
            self.opened = 0

        async def denoise(self, request: Any) -> Any:
            self.opened += 1
            try:
                async for event in self.inner.denoise(request):
                    yield event
            except Crash:
                self.fuse.blows_at = None
                raise LostSession("killed") from None

    spec = make_spec(bundle.manifest, "a red ball", seed=7, seconds=2, size="64x64", num_inference_steps=4)
    made: dict[str, list[bytes]] = {"dying": [], "whole": []}
    dying, whole = Dying(), Fuse()
    for name, denoiser in (("dying", dying), ("whole", watched(pipeline, whole))):

        async def sink(fragment: Fragment, into: list[bytes] = made[name]) -> None:
            into.append(fragment.data)

        await generate(
            name,
            spec,
            text_encoder=pipeline.text_encoder,
            denoiser=denoiser,  # type: ignore[arg-type]  # all of one that is used
            decoder=pipeline.decoder,
            sink=sink,
            state_every=1,
        )
    assert made["dying"] == made["whole"]
    assert dying.opened == 2
    # A causal chunk begins anew.
    assert dying.fuse.calls <= whole.calls + (3 if bundle.manifest.rollout == "causal" else 0)


async def test_a_denoiser_that_is_always_lost_is_an_error(
    pipeline: LocalPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serving.pipeline import generation

    class Lost:
        tries = 0

        async def denoise(self, request: Any) -> Any:
            self.tries += 1
            raise LostSession("killed")
            yield

    async def at_once(tries: int) -> None: ...

    monkeypatch.setattr(generation, "pause", at_once)
    denoiser = Lost()
    spec = make_spec(pipeline.bundle.manifest, "a red ball", seed=7, seconds=1)
    with pytest.raises(LostSession):
        await generate(
            "video",
            spec,
            text_encoder=pipeline.text_encoder,
            denoiser=denoiser,  # type: ignore[arg-type]  # all of one that is used
            decoder=pipeline.decoder,
            sink=None,  # type: ignore[arg-type]  # nothing comes so far
        )
    assert denoiser.tries == 1 + generation.MAX_REOPENS


def decoders_of(pipeline: LocalPipeline) -> tuple[Any, Any]:
    return pipeline.decoder._engines["full"]


class Service(WholeService):
    """With engines that a test may break."""

    def __init__(self, bundle: Bundle, pipeline: LocalPipeline, data_dir: Path) -> None:
        super().__init__(bundle, pipeline, data_dir)
        self.fuse = Fuse()
        self.denoiser = self.stages["denoiser"] = watched(pipeline, self.fuse)
        self.stages["bundle_digest"] = bundle.digest
        self.decodes = Fuse()
        first, following = decoders_of(pipeline)
        pipeline.decoder._engines["full"] = (Watched(first, self.decodes), Watched(following, self.decodes))

    async def ended(self, video_id: str) -> Video:
        while True:
            video = await self.store.get(video_id)
            if video is not None and video.status.final:
                return video
            await asyncio.sleep(0.01)


@pytest.fixture
async def service(bundle: Bundle, pipeline: LocalPipeline, tmp_path: Path) -> AsyncIterator[Service]:
    opened = Service(bundle, pipeline, tmp_path)
    yield opened
    await opened.denoiser.stop()


BODY = {"prompt": "a red ball", "seconds": 2, "size": "64x64", "seed": 7, "num_inference_steps": 4}


async def test_a_decode_that_fails_is_tried_again_from_the_latents(service: Service, tmp_path: Path) -> None:
    class Broken(Watched):
        broken = True

        def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
            if Broken.broken:
                Broken.broken = False
                raise EngineError("out of memory")
            return super().run(feeds)

    async with service.running() as client:
        undisturbed = (await client.post("/v1/videos", json=BODY)).json()["id"]
        await service.ended(undisturbed)
        calls = service.fuse.calls
        first, following = decoders_of(service.pipeline)
        service.pipeline.decoder._engines["full"] = (first, Broken(following, lambda feeds: None))
        video_id = (await client.post("/v1/videos", json=BODY)).json()["id"]
        video = await service.ended(video_id)
    assert (video.status, video.error_message) == (VideoStatus.COMPLETED, None)
    made = service.fuse.calls - calls
    if service.bundle.manifest.rollout == "bidirectional":
        assert made == calls
    else:
        assert made < 2 * calls, "it was denoised from the prompt again"
    files = [(service.videos_dir / name / "video.mp4").read_bytes() for name in (undisturbed, video_id)]
    assert files[0] == files[1]
    assert service.artifacts.names(CHECKPOINTS) == []


async def test_a_finish_that_fails_costs_neither_denoising_nor_decoding(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failures = service.artifacts.put, iter([OSError("disk full")])

    def failing(key: str, source: Path) -> Any:
        for error in failures:
            raise error
        return put(key, source)

    async with service.running() as client:
        undisturbed = (await client.post("/v1/videos", json=BODY)).json()["id"]
        await service.ended(undisturbed)
        before = service.fuse.calls, service.decodes.calls
        monkeypatch.setattr(service.artifacts, "put", failing)
        video_id = (await client.post("/v1/videos", json=BODY)).json()["id"]
        video = await service.ended(video_id)
    assert video.status is VideoStatus.COMPLETED
    assert video.fence == 2
    assert (service.fuse.calls, service.decodes.calls) == (2 * before[0], 2 * before[1])
    files = [(service.videos_dir / name / "video.mp4").read_bytes() for name in (undisturbed, video_id)]
    assert files[0] == files[1]


async def test_headway_lets_a_video_outlive_more_failures_than_attempts(service: Service) -> None:
    """Two attempts are allowed; every one fails, but each has kept something."""

    class Stumbling:
        """Fails after each new thing that was kept."""

        def __init__(self, inner: EngineDenoiser) -> None:
            self.inner, self.opened = inner, 0

        async def denoise(self, request: Any) -> Any:
            self.opened += 1
            request = replace(request, state_every=1)
            async for event in self.inner.denoise(request):
                yield event
                if type(event).__name__ == "SamplerState" or (
                    type(event).__name__ == "LatentChunk" and service.bundle.manifest.rollout == "causal"
                ):
                    raise EngineError("again")

    stumbling = Stumbling(service.stages["denoiser"])
    service.stages["denoiser"] = stumbling
    async with service.running() as client:
        video_id = (await client.post("/v1/videos", json=BODY)).json()["id"]
        video = await service.ended(video_id)
    assert video.error_message is None
    assert video.status is VideoStatus.COMPLETED
    assert stumbling.opened >= 3
    assert video.fence >= 3


async def test_a_failed_videos_checkpoint_is_gone(service: Service) -> None:
    class Half:
        """Makes something that is kept, and then nothing any more."""

        def __init__(self, inner: EngineDenoiser) -> None:
            self.inner, self.opened = inner, 0

        async def denoise(self, request: Any) -> Any:
            self.opened += 1
            if self.opened == 1:
                events = self.inner.denoise(replace(request, state_every=1))
                for _ in range(4):
                    yield await anext(events)
                await events.aclose()
            raise EngineError("broken")

    service.stages["denoiser"] = Half(service.stages["denoiser"])
    async with service.running() as client:
        video_id = (await client.post("/v1/videos", json={**BODY, "num_inference_steps": 20})).json()["id"]
        video = await service.ended(video_id)
    assert (video.status, video.error_code) == (VideoStatus.FAILED, "generation_failed")
    assert video.fence == 2
    assert service.artifacts.names(CHECKPOINTS) == []


async def test_other_bytes_in_the_log_end_a_video_at_once(service: Service) -> None:
    """A model that was changed under a video: more attempts can't help."""
    gate = threading.Event()
    first, following = decoders_of(service.pipeline)
    fragments = iter((0, 1))
    held = Watched(following, lambda _: None if next(fragments, None) == 0 else gate.wait())  # type: ignore[func-returns-value]  # two calls in one
    service.pipeline.decoder._engines["full"] = (first, held)
    async with service.running() as client:
        video_id = (await client.post("/v1/videos", json=BODY)).json()["id"]
        log = FragmentLog.open(service.videos_dir, video_id)
        await until(lambda: len(log.entries()) == 1)
    gate.set()
    (log.path / "origin").write_text("another model")
    async with service.running():
        video = await service.ended(video_id)
    assert video.status is VideoStatus.FAILED
    assert "the model was changed" in (video.error_message or "")
    assert (service.videos_dir.parent / checkpoint_key(video_id)).exists() is False


async def test_a_cancel_frees_the_rows_within_a_step(service: Service, bundle: Bundle) -> None:
    """By the scheduler's own trace, and by the order of events: the engine is held in a call while the cancel comes,
    the video has ended before that call is through, and no later call has a row of it."""
    both, held, inside = threading.Event(), threading.Event(), threading.Event()
    cancelled, calls = "", 0

    def hold(feeds: Mapping[str, Array]) -> None:
        nonlocal calls
        calls += 1
        both.wait()
        if not inside.is_set() and cancelled in {session[0] for session in denoiser.trace[-1].sessions}:  # type: ignore[index]  # ids are of any type
            inside.set()
            held.wait()

    denoiser = EngineDenoiser(Watched(service.pipeline.denoiser._engines["denoiser"], hold), bundle.manifest)
    service.stages["denoiser"] = denoiser
    limits = bundle.manifest.limits
    long = {**BODY, "seconds": min(8, limits.max_seconds), "num_inference_steps": limits.max_steps}
    try:
        async with service.running() as client:
            cancelled, goes_on = [(await client.post("/v1/videos", json=long)).json()["id"] for _ in range(2)]
            await until(lambda: denoiser.sessions == 2)
            both.set()
            await asyncio.to_thread(inside.wait)
            running = denoiser.trace[-1]
            assert (await client.post(f"/v1/videos/{cancelled}/cancel")).status_code == 200
            video = await service.ended(cancelled)
            assert (video.status, video.error_code) == (VideoStatus.FAILED, "cancelled")
            held_calls = calls
            assert denoiser.trace[-1].event == "removed"
            assert denoiser.trace[-1].step == running.step
            held.set()
            await until(lambda: calls >= held_calls + 5)
            later = [line for line in denoiser.trace if line.event == "ran" and line.step > running.step]
            assert len(later) >= 4
            assert {session[0] for line in later for session in line.sessions} == {goes_on}  # type: ignore[index]  # ids are of any type
            await client.post(f"/v1/videos/{goes_on}/cancel")
            await service.ended(goes_on)
            assert (denoiser.sessions, service.pipeline.decoder.sessions) == (0, 0)
    finally:
        both.set()
        held.set()
        await denoiser.stop()
