"""`rushes bench` against a real service of a tiny bundle: what it reports can be checked against what was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from service import WholeService, served
from typer.testing import CliRunner

from models.bundle import Bundle
from serving.bench.asks import Ask, asks
from serving.bench.breakdown import explained, explained_each
from serving.bench.calls import Call, Engines, VideoCalls, replay, saturate
from serving.bench.engines import default_spec, engines_table, time_engines
from serving.bench.following import Follow, Outcome, Target
from serving.bench.load import closed_loop
from serving.bench.peer import app as peer_app
from serving.cli import app
from serving.config import ServiceConfig
from serving.pipeline.local import LocalPipeline

runner = CliRunner()
SMALL: dict[str, Any] = {"size": "64x64", "seconds": 1, "num_inference_steps": 2}


@pytest.fixture
async def http(tiny_bundle: Bundle, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        LocalPipeline.open(tiny_bundle) as pipeline,
        WholeService(tiny_bundle, pipeline, tmp_path).running() as client,
    ):
        yield client


async def ended(http: httpx.AsyncClient, video_id: str) -> Any:
    """A stream ends a moment before its video is completed: the file is made of it then."""
    while True:
        video = (await http.get(f"/v1/videos/{video_id}")).json()
        if video["status"] != "in_progress":
            return video


async def bench(http: httpx.AsyncClient, *arguments: str) -> Any:
    return await asyncio.to_thread(runner.invoke, app, ["bench", "load", "--url", str(http.base_url), *arguments])


async def test_a_report_is_of_what_was_asked(http: httpx.AsyncClient, tiny_bundle: Bundle, tmp_path: Path) -> None:
    output, plots = tmp_path / "report.json", tmp_path / "plots"
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"at_seconds": 0, **SMALL, "label": "short"},
        {"at_seconds": 0.1, **SMALL, "seconds": 2, "label": "long"},
        {"at_seconds": 0.2, **SMALL, "size": "65x65", "label": "short"},
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    done = await bench(
        http,
        *("--trace", str(trace), "-o", str(output), "--plots", str(plots), "--bundle", str(tiny_bundle.root)),
        *("--slo-seconds", "300", "--slo-first-chunk-seconds", "0", "--seed", "5"),
    )
    assert done.exit_code == 1, done.output
    assert "1 of 3 requests failed" in done.stderr
    assert "| requests" in done.stdout
    assert "the rest" in done.stdout
    told = json.loads(output.read_text())
    report, outcomes = told["report"], told["outcomes"]
    assert (report["requests"], report["completed"], report["errors"]) == (3, 2, {"http 400 invalid_value": 1})
    assert report["attained"] == {"latency": 2 / 3, "first_chunk": 0, "both": 0}
    assert list(report["labels"]) == ["short", "long"]
    fps = tiny_bundle.manifest.fps
    assert [outcome["video_seconds"] for outcome in outcomes[:2]] == pytest.approx([1 + 1 / fps, 2 + 1 / fps])
    assert [outcome["ask"]["body"]["seed"] for outcome in outcomes] == [5, 6, 7]
    for outcome in outcomes[:2]:
        times = [chunk["at_seconds"] for chunk in outcome["chunks"]]
        assert outcome["scheduled"] <= outcome["sent"] <= outcome["accepted"] <= times[0]
        assert times == sorted(times)
        assert times[-1] <= outcome["ended"]
        assert (await ended(http, outcome["video_id"]))["status"] == "completed"
    assert sum(told["breakdown"]["parts"].values()) + told["breakdown"]["rest"] == pytest.approx(
        told["breakdown"]["whole"]
    )
    # Every engine had something to do.
    assert all(share > 0 for share in told["occupancy"].values())
    assert told["occupancy"].keys() == told["breakdown"]["parts"].keys()
    # Three that were measured, of which one was refused, and one to warm up, which is in no figure.
    assert len((await http.get("/v1/videos")).json()["data"]) == 3
    assert sorted(path.name for path in plots.iterdir()) == ["latency.png", "timeline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots.iterdir())


async def test_a_breakdown_is_of_all_that_costs_calls(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Call, "run", lambda call: float(len(next(iter(call.feeds.values())))))  # rows, not seconds
    plain = SMALL | {"num_inference_steps": 8, "guidance_scale": 3.0}
    bodies = [plain, plain | {"best_of": 3}, plain | {"guidance_interval": [0.0, 0.0]}, plain]
    outcomes = [Outcome(Ask(body), scheduled=0, sent=0, ended=9) for body in bodies]
    refused = Outcome(Ask({"size": "1x1"}), scheduled=0, sent=0, ended=1, error="http 400")
    told = await explained_each(tiny_bundle, ServiceConfig(), [refused, *outcomes])
    assert [one.parts["denoiser"] for one in told] == [16, 48, 8, 16]
    assert {one.parts["decoder"] for one in told} == {told[0].parts["decoder"]}


@pytest.mark.parametrize("follow", ["poll", "watch"])
async def test_a_job_is_followed_to_its_end(http: httpx.AsyncClient, tmp_path: Path, follow: str) -> None:
    output = tmp_path / "report.json"
    small = ["--size", "64x64", "--seconds", "1", "--steps", "2", "--field", "guidance_scale=1"]
    done = await bench(
        http,
        *("--follow", follow, "--rate", "20", "-n", "2", "--warm-up", "0", "-o", str(output), "--seed", "-1", *small),
        *(["--form"] if follow == "watch" else []),
    )
    assert done.exit_code == 0, done.output
    told = json.loads(output.read_text())
    assert told["report"]["completed"] == 2
    for outcome in told["outcomes"]:
        assert bool(outcome["chunks"]) == (follow == "watch")
        assert outcome["ended"] > outcome["scheduled"]
        made = await ended(http, outcome["video_id"])
        assert (made["status"], made["guidance_scale"], made["num_inference_steps"]) == ("completed", 1, 2)


async def test_a_closed_loop_keeps_its_concurrency(http: httpx.AsyncClient) -> None:
    async with Target(str(http.base_url), Follow.stream, delete=True) as target:
        outcomes = await closed_loop(target, asks(5, SMALL), 2)
    assert [outcome.ask.body["seed"] for outcome in outcomes] == [0, 1, 2, 3, 4]
    assert [outcome.error for outcome in outcomes] == [None] * 5
    edges = [(outcome.sent, 1) for outcome in outcomes] + [(outcome.ended, -1) for outcome in outcomes]
    unfinished = [sum(step for _, step in sorted(edges)[: place + 1]) for place in range(len(edges))]
    assert max(unfinished) == 2
    assert (await http.get("/v1/videos")).json()["data"] == []


async def test_the_first_chunk_alone_is_followed_by_a_cancel(http: httpx.AsyncClient) -> None:
    async with Target(str(http.base_url), Follow.stream) as target:
        assert await target.first_chunk_seconds(Ask({"prompt": "a ball", **SMALL, "seconds": 8})) > 0
    (video,) = (await http.get("/v1/videos")).json()["data"]
    assert (await ended(http, video["id"]))["status"] in ("completed", "failed")


async def test_errors_are_told_by_kind(http: httpx.AsyncClient) -> None:
    async with Target(str(http.base_url), Follow.stream, timeout_seconds=0.01) as target:
        assert (await target.make(Ask({"prompt": "a ball", "seconds": 8}))).error == "timeout"
    async with Target(str(http.base_url), Follow.poll) as target:
        assert (await target.make(Ask({"prompt": ""}))).error == "http 400 invalid_value"
    async with Target("http://127.0.0.1:9", Follow.poll) as target:
        assert (await target.make(Ask({"prompt": "a"}))).error == "no connection"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "1", "--concurrency", "2"], "exclude each other"),
        (["--rate", "0"], "--rate must be positive"),
        (["--field", "best_of"], "NAME=JSON"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--output", "nowhere/a.json"], "no directory"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(arguments: list[str], said: str) -> None:
    done = runner.invoke(app, ["bench", "load", "--url", "http://127.0.0.1:9", *arguments])
    assert done.exit_code in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_is_not_there_is_said_before_anything_is_measured() -> None:
    done = runner.invoke(app, ["bench", "load", "--url", "http://127.0.0.1:9"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "can't be reached" in done.stderr


async def recorded(bundle: Bundle, **settings: Any) -> VideoCalls:
    return await Engines(bundle, ServiceConfig()).record(default_spec(bundle, **settings))


async def test_the_recorded_calls_are_those_that_a_video_takes(tiny_bundle: Bundle) -> None:
    video = await recorded(tiny_bundle, **SMALL)
    manifest = tiny_bundle.manifest
    assert len(video.chunks) == len(manifest.chunks(1 + manifest.fps // manifest.latent.temporal))
    assert [len(chunk.denoise) for chunk in video.chunks] == [2] + [0] * (len(video.chunks) - 1)
    assert all(len(call.feeds["latents"]) == 2 for call in video.chunks[0].denoise)  # guided
    assert [call.graph for call in video.chunks[0].decode] == ["decoder_first", "decoder_next"]
    assert video.seconds == pytest.approx(1 + 1 / manifest.fps)
    ends = replay(video)
    assert len(ends) == len(video.chunks)
    assert ends == sorted(ends)
    made = saturate([video], rows=4, denoisers=1, decoders=1, batches=2)
    assert len(made) == 4  # two calls of two guided videos
    told = explained(video, 10.0, manifest.fps)
    assert told.rest == pytest.approx(10 - sum(told.parts.values()))


async def test_a_causal_videos_calls_come_chunk_by_chunk(tiny_causal_bundle: Bundle) -> None:
    video = await recorded(tiny_causal_bundle, seconds=2)
    steps = tiny_causal_bundle.manifest.sampler.num_inference_steps
    # The clean-context pass of a chunk lies before the next one's steps.
    assert [len(chunk.denoise) for chunk in video.chunks] == [steps] + [steps + 1] * (len(video.chunks) - 1)
    assert len(video.first_chunk) == len(video.text) + steps + len(video.chunks[0].decode)
    assert len(replay(video)) == len(video.chunks) > 1
    wide = video.chunks[-1].denoise[-1].with_rows(3)
    assert {len(array) for array in wide.feeds.values()} == {3}
    assert wide.run() > 0


def test_engines_are_timed_at_each_number_of_rows(tiny_bundle: Bundle) -> None:
    said: list[str] = []
    spec = replace(default_spec(tiny_bundle, **SMALL), seed=1)
    times = time_engines(tiny_bundle, spec, ServiceConfig(), rows=(1, 2), times=1, say=said.append)
    steps = [one for one in times.calls if one.what.startswith("denoiser step")]
    assert [one.rows for one in steps] == [1, 2]
    assert all(one.seconds.least > 0 for one in times.calls)
    assert times.whole.median >= times.first_chunk.median > 0
    assert "H.264" in engines_table(times)
    assert said


async def test_the_peers_queue_takes_one_at_a_time_and_says_what_failed() -> None:
    running: list[int] = []

    def make(body: Any) -> Any:
        running.append(len(running))
        if body["prompt"] == "bad":
            raise ValueError("no")
        return np.zeros((5, 16, 16, 3), np.uint8)

    api = peer_app(make, 16)
    async with api.router.lifespan_context(api), served(api) as client:
        async with Target(str(client.base_url), Follow.poll, poll_seconds=0.01) as target:
            outcomes = await closed_loop(target, asks(3, {}, prompts=["a", "bad", "c"]), 3)
        alone = (await client.post("/alone", json={"prompt": "a"})).json()
    assert [outcome.error for outcome in outcomes] == [None, "video failed: failed", None]
    assert alone["seconds"] > 0
    assert len(running) == 4
