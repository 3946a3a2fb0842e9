"""What a video will take: measured costs, and what a service tells by them and by its own history."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import httpx
import pytest
from service import Service

from models.bundle import Bundle
from models.cost import CallSample, ChunkSample, CostInfo, fit
from serving.jobs.database import Database
from serving.jobs.estimates import Estimates
from serving.jobs.store import SqlVideoStore, Video, VideoStatus, new_video_id
from serving.jobs.tables import videos as videos_table
from serving.measuring import sample, write
from serving.pipeline.pricing import work_of
from serving.pipeline.request import make_spec


def costing(call: float, token: float, pair: float) -> CostInfo:
    calls = [
        CallSample(rows=rows, tokens=tokens, seconds=call + rows * (token * tokens + pair * tokens**2))
        for rows in (1, 2, 4)
        for tokens in (16, 64, 256, 1024)
    ]
    chunks = [ChunkSample(pixels=pixels, seconds=0.01 + 1e-6 * pixels) for pixels in (4096, 16384, 65536)]
    return fit("a made-up machine", calls, chunks)


@pytest.mark.parametrize(
    ("call", "token", "pair"), [(0.001, 0.0002, 1e-7), (0, 0.0002, 0), (0.01, 0, 1e-6), (0, 0, 1e-6), (0.5, 0, 0)]
)
def test_a_rule_is_found_again(call: float, token: float, pair: float) -> None:
    cost = costing(call, token, pair)
    assert (cost.call, cost.token, cost.token_pair) == pytest.approx((call, token, pair), rel=1e-4, abs=1e-12)
    assert (cost.chunk, cost.pixel) == pytest.approx((0.01, 1e-6))
    assert cost.worst_error < 1e-6


def test_what_follows_no_rule_is_refused() -> None:
    calls = [
        CallSample(rows=1, tokens=tokens, seconds=seconds) for tokens, seconds in ((16, 1.0), (64, 0.2), (256, 1.0))
    ]
    with pytest.raises(ValueError, match="off its own measurements"):
        fit("a noisy machine", calls, [ChunkSample(pixels=1, seconds=1)])


def test_every_size_is_measured_and_the_bundle_keeps_it(tiny_bundle: Bundle, tmp_path: Path) -> None:
    calls, chunks = sample(tiny_bundle, progress=lambda said: None)
    assert {one.rows for one in calls} == {1, 2, 4}
    assert len({one.tokens for one in calls}) >= 4
    assert len({one.pixels for one in chunks}) >= 4
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.root, copy)
    measured = write(Bundle.load(copy), costing(0.001, 0.0002, 0))
    measured.verify()
    assert measured.manifest.cost == costing(0.001, 0.0002, 0)
    assert (
        replace(measured, manifest=measured.manifest.model_copy(update={"cost": None})).manifest == tiny_bundle.manifest
    )


def test_twice_the_work_costs_twice_as_much(tiny_bundle: Bundle, tiny_causal_bundle: Bundle) -> None:
    cost = costing(0, 0.001, 0)
    for bundle in (tiny_bundle, tiny_causal_bundle):
        manifest = bundle.manifest.model_copy(update={"cost": cost})
        spec = make_spec(manifest, "x", seconds=1, guidance_scale=1, num_inference_steps=10)
        decoding = work_of(manifest, replace(spec, num_inference_steps=0)) if manifest.rollout != "causal" else None
        assert work_of(manifest, replace(spec, guidance_scale=2.0)) > 1.5 * work_of(manifest, spec)
        if decoding is not None:
            once = work_of(manifest, spec) - decoding
            assert work_of(manifest, replace(spec, guidance_scale=2.0)) - decoding == pytest.approx(2 * once)


async def test_a_measured_model_has_an_estimate_before_its_first_video(tiny_bundle: Bundle, tmp_path: Path) -> None:
    manifest = tiny_bundle.manifest.model_copy(update={"cost": costing(0, 0.001, 0)})
    service = Service(replace(tiny_bundle, manifest=manifest), tmp_path)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(service.api), base_url="http://test") as client:
        asked = {"prompt": "a ball", "seconds": 1}
        first = (await client.post("/v1/videos", json=asked)).json()
        expected = work_of(manifest, make_spec(manifest, "a ball", seconds=1))
        assert first["estimated_seconds_left"] == pytest.approx(expected, abs=0.1)
        await service.store.request_cancel(first["id"])
        assert (await client.get(f"/v1/videos/{first['id']}")).json()["estimated_seconds_left"] is None


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


async def test_estimates_are_of_the_models_own_history_and_of_the_queue(database_url: str) -> None:
    database, clock = Database.open(database_url), Clock()
    store, estimates = SqlVideoStore(database, clock=clock), Estimates(database, clock=clock)

    def video(model: str, **changes: object) -> Video:
        return replace(Video(new_video_id(), model, "x", "1", "64x64", work=10.0), **changes)  # type: ignore[arg-type]  # any field

    waiting = await store.create(video("slow"))
    assert await estimates.seconds_left(waiting) is None, "nothing is known"
    ended = {"status": VideoStatus.COMPLETED, "created_at": clock.now, "started_at": clock.now}
    with database.write() as connection:
        for model, seconds in (("slow", 20.0), ("fast", 5.0)):
            done = video(model, **ended, completed_at=clock.now + seconds)
            connection.execute(videos_table.insert(), asdict(done))
        queued = [video("fast", created_at=clock.now + 1 + n / 1000) for n in range(2000)]
        connection.execute(videos_table.insert(), [asdict(one) for one in queued])
    assert await estimates.seconds_left(waiting) is None, "it has looked just now"
    clock.now += 3
    assert await estimates.seconds_left(waiting) == pytest.approx(20)
    assert await estimates.seconds_left(queued[0]) == pytest.approx(20 + 5)
    assert await estimates.seconds_left(queued[9]) == pytest.approx(20 + 5 * 10)
    last = await estimates.seconds_left(queued[-1])
    assert last is not None
    assert last == pytest.approx(20 + 5 * 2000, rel=0.02), "beyond what is looked at it is reckoned"
    running = replace(waiting, status=VideoStatus.IN_PROGRESS, progress=50, started_at=clock.now - 30)
    assert await estimates.seconds_left(running) == pytest.approx(30)
    assert await estimates.seconds_left(replace(running, status=VideoStatus.COMPLETED)) == 0
    database.dispose()
