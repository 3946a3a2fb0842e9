"""The service as its users meet it: Ray Serve, HTTP, the openai SDK."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import httpx
import openai
import pytest
import ray
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from pipelines import as_stream, made_alone
from prometheus_client.parser import text_string_to_metric_families
from queries import all_metrics
from receiver import SECRET, Receiver, receiving

from k8s import look, render
from models.bundle import Bundle
from serving.bench.observed import between, counts
from serving.client import Rushes
from serving.config import ObservabilityConfig, ServiceConfig, WebhookConfig
from serving.deployments.local import LocalService, free_port, local_service
from serving.jobs.fragment_log import FragmentLog
from serving.jobs.store import SqlVideoStore, VideoStatus
from serving.media.fmp4 import remux_to_mp4
from serving.metrics import exported_names
from serving.pipeline.stages import Fragment
from serving.tracing import trace_id_of

PROMPT = "a red ball moving left"
ASKED: dict[str, Any] = {"prompt": "a red ball moving left", "seconds": 1, "seed": 7, "num_inference_steps": 4}
OTHERS: list[dict[str, Any]] = [
    {"prompt": "a blue cube spinning", "seconds": 2, "seed": 1, "num_inference_steps": 6},
    {"prompt": "a green cone", "seconds": 1, "seed": 2, "num_inference_steps": 3, "guidance_scale": 1},
    {"prompt": "a white cylinder", "seconds": 1, "seed": 3, "num_inference_steps": 9, "guidance_scale": 5},
]


@dataclass(frozen=True)
class RunningService:
    service: LocalService
    config: ServiceConfig
    store: SqlVideoStore
    told: Receiver

    def spans(self, video_id: str) -> list[tuple[str, Span]]:
        """Those of its trace that have come so far, each with the replica that it is of."""
        found = []
        for headers, body in list(self.told.received):
            if headers["content-type"] == "application/x-protobuf":
                for of_replica in ExportTraceServiceRequest.FromString(body).resource_spans:
                    attributes = {each.key: each.value.string_value for each in of_replica.resource.attributes}
                    for scope in of_replica.scope_spans:
                        found += [(attributes["service.instance.id"], span) for span in scope.spans]
        return [(replica, span) for replica, span in found if span.trace_id.hex() == trace_id_of(video_id)]


@pytest.fixture(scope="module")
def running(
    tiny_bundle: Bundle, tiny_causal_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    """One Ray for all of these tests: starting it takes longer than most of them."""
    config = ServiceConfig(
        models={"tiny": tiny_bundle.root, "tiny-causal": tiny_causal_bundle.root},
        data_dir=tmp_path_factory.mktemp("service"),
        port=free_port(),
        webhooks=WebhookConfig(secret=SECRET, allow_private=True),
    )
    with receiving() as told, pytest.MonkeyPatch.context() as environment:
        # What is measured is to be seen soon.
        environment.setenv("RAY_metrics_report_interval_ms", "1000")
        seen = ObservabilityConfig(
            metrics_port=free_port(),
            traces_url=f"http://127.0.0.1:{told.server.server_port}/v1/traces",
            log_format="json",
            log_level="INFO",
        )
        config = config.model_copy(update={"observability": seen})
        with local_service(config) as service:
            yield RunningService(service, config, SqlVideoStore(config.resolved_store_url), told)


@pytest.fixture
def client(running: RunningService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.service.url, timeout=120) as opened:
        yield opened


def as_file(made: list[Fragment], path: Path) -> bytes:
    remux_to_mp4(made[0].init, (fragment.data for fragment in made), path)
    return path.read_bytes()


def until_ended(client: httpx.Client, video_id: str) -> dict[str, Any]:
    return until(
        lambda: client.get(f"/v1/videos/{video_id}").json(), lambda video: video["status"] in ("completed", "failed")
    )


def until(look: Callable[[], Any], good: Callable[[Any], bool]) -> Any:
    """Bounded by the test's own time limit."""
    while not good(seen := look()):
        time.sleep(0.02)
    return seen


def streamed(client: httpx.Client, asked: dict[str, Any]) -> bytes:
    with client.stream("POST", "/v1/videos", json={**asked, "stream": True}) as response:
        assert response.status_code == 200
        return response.read()


def parts(stream: bytes) -> Iterator[bytes]:
    """The init segment, then each moof+mdat."""
    part, offset = b"", 0
    while offset < len(stream):
        size, kind = struct.unpack_from(">I4s", stream, offset)
        part += stream[offset : offset + size]
        offset += size
        if kind in (b"moov", b"mdat"):
            yield part
            part = b""
    assert part == b""


def frame_count(video: bytes) -> int:
    with av.open(io.BytesIO(video)) as opened:
        return sum(1 for _ in opened.decode(video=0))


def test_a_video_is_created_polled_and_downloaded(
    running: RunningService, client: httpx.Client, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    created = client.post("/v1/videos", json=ASKED).json()
    assert created["status"] == "queued"
    ended = until_ended(client, created["id"])
    assert (ended["status"], ended["progress"], ended["error"]) == ("completed", 100, None)
    assert ended["expires_at"] > ended["completed_at"] >= ended["created_at"]
    content = client.get(f"/v1/videos/{created['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert frame_count(content.content) == tiny_bundle.manifest.fps + 1
    assert content.content == as_file(made_alone(tiny_bundle, ASKED), tmp_path / "alone.mp4")
    part = client.get(f"/v1/videos/{created['id']}/content", headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")


def test_a_stream_has_the_bytes_of_one_process_and_every_prefix_plays(
    client: httpx.Client, tiny_bundle: Bundle
) -> None:
    stream = streamed(client, ASKED)
    made = made_alone(tiny_bundle, ASKED)
    assert stream == as_stream(made)
    init, *fragments = parts(stream)
    assert len(fragments) == len(made) > 1
    for n in range(1, len(fragments) + 1):
        assert frame_count(init + b"".join(fragments[:n])) == sum(fragment.frames for fragment in made[:n])


def test_the_first_fragment_is_here_before_the_second_half_is_decoded(
    running: RunningService, client: httpx.Client, tiny_bundle: Bundle
) -> None:
    side = tiny_bundle.manifest.limits.max_side
    asked = {"prompt": "a red ball", "seconds": 4, "seed": 7, "num_inference_steps": 1, "guidance_scale": 1}
    asked["size"] = f"{side}x{side}"  # enough to decode for a busy machine's client to keep up
    with client.stream("POST", "/v1/videos", json={**asked, "stream": True}) as response:
        assert response.headers["content-type"] == "video/mp4"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"
        log = FragmentLog.open(running.config.videos_dir, response.headers["x-video-id"])
        received, decoded_by_then = b"", 0
        for piece in response.iter_raw():
            received += piece
            if not decoded_by_then and received.count(b"mdat"):
                decoded_by_then = sum(entry.frames for entry in log.entries())
    assert frame_count(received) == 4 * tiny_bundle.manifest.fps + 1
    assert 0 < decoded_by_then < frame_count(received) / 2


def test_bytes_do_not_depend_on_what_else_is_in_flight(client: httpx.Client, tiny_bundle: Bundle) -> None:
    with ThreadPoolExecutor(4) as pool:
        streams = list(pool.map(lambda asked: streamed(client, asked), [*OTHERS, ASKED]))
    for asked, stream in zip([*OTHERS, ASKED], streams, strict=True):
        assert stream == as_stream(made_alone(tiny_bundle, asked)), asked


def test_an_interactive_session_through_every_process(running: RunningService, tiny_causal_bundle: Bundle) -> None:
    settings = {"seed": 7, "num_inference_steps": 2, "size": "64x64", "rewrite_prompt": False}
    with Rushes(running.service.url) as rushes:
        with rushes.realtime(PROMPT, model="tiny-causal", **settings) as live:
            chunks = []
            for chunk in live:
                chunks.append(chunk)
                if chunk.index == 1:
                    live.change_prompt("a blue cube")
                if chunk.prompt != PROMPT:
                    break
            live.pause()
        # The block is left, so the connection is cut: and no stage has anything of it.
        fleet = running.service.fleet
        while any(fleet.stage("tiny-causal", "denoiser").broadcast("sessions").results()):
            time.sleep(0.05)
    assert [chunk.index for chunk in chunks if chunk.prompt_changed] == [0, chunks[-1].index]
    scenes = [{"start_seconds": chunks[-1].about["start_seconds"], "prompt": "a blue cube"}]
    seconds = 1 + int(chunks[-1].about["start_seconds"] + 1)
    asked = {"prompt": PROMPT, "seconds": seconds, "scene_prompts": scenes, "decoder": "tiny", **settings}
    made = made_alone(tiny_causal_bundle, asked)
    assert [chunk.data for chunk in chunks] == [fragment.data for fragment in made[: len(chunks)]]


def test_a_causal_model_streams_the_bytes_of_one_process(client: httpx.Client, tiny_causal_bundle: Bundle) -> None:
    scenes = [{"start_seconds": 2.5, "prompt": "a blue cube spinning"}]
    asked = {"prompt": "a red ball moving left", "seconds": 5, "seed": 7, "scene_prompts": scenes}
    stream = streamed(client, {**asked, "model": "tiny-causal"})
    made = made_alone(tiny_causal_bundle, asked)
    assert len(made) == 7
    assert stream == as_stream(made)


def test_closing_a_stream_does_not_cancel_the_video(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/videos", json={**ASKED, "seconds": 2, "stream": True}) as response:
        video_id = response.headers["x-video-id"]
    assert until_ended(client, video_id)["status"] == "completed"


def test_cancelling_reaches_the_denoiser(running: RunningService, client: httpx.Client, tiny_bundle: Bundle) -> None:
    denoiser = running.service.fleet.stage("tiny", "denoiser")
    limits = tiny_bundle.manifest.limits
    long = {"prompt": "a ball", "num_inference_steps": limits.max_steps, "seconds": limits.max_seconds}
    long["size"] = f"{limits.max_side}x{limits.max_side}"
    video_id = client.post("/v1/videos", json=long).json()["id"]
    until(lambda: denoiser.sessions.remote().result(), lambda count: count == 1)
    asyncio.run(running.store.request_cancel(video_id))
    ended = until_ended(client, video_id)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "cancelled")
    assert ended["progress"] < 80, "the denoiser was through before the cancel came"
    # The runner has waited for every stage to let go before it wrote the end down.
    until(lambda: denoiser.sessions.remote().result(), lambda count: count == 0)


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_the_openai_sdk_creates_polls_and_downloads(
    running: RunningService, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    sdk = openai.OpenAI(base_url=f"{running.service.url}/v1", api_key="unused")
    settings = {key: value for key, value in ASKED.items() if key not in ("prompt", "seconds")}
    video = sdk.videos.create_and_poll(
        model="tiny", prompt=ASKED["prompt"], seconds="1", extra_body=settings, poll_interval_ms=50
    )
    assert (video.status, video.seconds, video.model) == ("completed", "1", "tiny")
    sdk.videos.download_content(video.id).write_to_file(tmp_path / "sdk.mp4")
    assert (tmp_path / "sdk.mp4").read_bytes() == as_file(made_alone(tiny_bundle, ASKED), tmp_path / "alone.mp4")
    assert [model.id for model in sdk.models.list()] == ["tiny", "tiny-causal"]
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.videos.create(prompt="a ball", size="100x100")  # type: ignore[arg-type]  # no size of the SDK
    assert refused.value.param == "size"
    with pytest.raises(openai.NotFoundError):
        sdk.videos.retrieve("video_" + "0" * 32)


def test_nothing_is_left_running(running: RunningService) -> None:
    until(running.service.running, lambda count: count == 0)
    logs = running.config.videos_dir.iterdir()
    for video in [asyncio.run(running.store.get(log.name)) for log in logs]:
        assert video is not None
        assert video.status in (VideoStatus.COMPLETED, VideoStatus.FAILED)
        assert video.error_code in (None, "cancelled")


def test_the_load_names_every_stage(client: httpx.Client) -> None:
    load = client.get("/v1/load").json()
    assert {(stage["model"], stage["stage"]) for stage in load["stages"]} == {
        (model, stage) for model in ("tiny", "tiny-causal") for stage in ("text-encoder", "denoiser", "decoder")
    }
    assert all(stage["replicas"] == stage["target_replicas"] == 1 for stage in load["stages"])
    assert all((stage["waiting"], stage["in_work"]) == (0, 0) for stage in load["stages"])
    # The service has made videos, but none since it was last asked.
    again = client.get("/v1/load").json()["stages"]
    assert all(0 <= stage["occupancy"] < 0.5 for stage in again)


def finished(client: httpx.Client, **asked: Any) -> str:
    video: dict[str, Any] = client.post("/v1/videos", json=ASKED | asked).json()
    until(lambda: client.get(f"/v1/videos/{video['id']}").json()["status"], lambda status: status == "completed")
    return str(video["id"])


def test_every_metric_is_scraped(running: RunningService, client: httpx.Client) -> None:
    video_id = finished(client, webhook_url=running.told.url)
    until(
        lambda: [body for _, body in running.told.received], lambda bodies: any(video_id.encode() in b for b in bodies)
    )
    client.post(
        "/v1/videos/characters",
        files={"video": client.get(f"/v1/videos/{video_id}/content").content},
        data={"name": "ball"},
    )
    page = f"http://127.0.0.1:{running.config.observability.metrics_port}/metrics"

    def samples() -> dict[str, list[dict[str, str]]]:
        found: dict[str, list[dict[str, str]]] = {}
        for family in text_string_to_metric_families(httpx.get(page).text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample.labels)
        return found

    # All that dashboards and alerts ask for, Ray's own too.
    scraped = until(samples, lambda found: exported_names() | all_metrics() <= found.keys())
    stages = {(labels["model"], labels["stage"]) for labels in scraped["ray_rushes_stage_call_seconds_count"]}
    assert {("tiny", "text-encoder"), ("tiny", "denoiser"), ("tiny", "decoder")} <= stages
    observed = between({}, counts(httpx.get(page).text), wall_seconds=60, completed=1, latency_seconds=None)
    assert observed.occupancy.keys() == observed.calls.keys() == {"text-encoder", "denoiser", "decoder"}
    assert observed.rows is not None
    assert all(labels["model"] in ("tiny", "tiny-causal") for labels in scraped["ray_rushes_videos_ended_total"])
    assert {labels["state"] for labels in scraped["ray_rushes_jobs"]} == {"queued", "held", "in_progress", "lapsed"}


def test_prometheus_has_something_for_the_dashboards(
    running: RunningService, client: httpx.Client, tmp_path: Path
) -> None:
    """With what k8s/operations.md says for a laptop, but for the port and the time between scrapes: this Ray forgets
    within a second what isn't said again, and what is said every five seconds one scrape in ten might always miss."""
    if shutil.which("prometheus") is None:
        pytest.skip("there is no prometheus: install the `prometheus` package")
    finished(client)
    config = yaml.safe_load((render.HERE / "laptop" / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "2s"
    config["rule_files"] = [str(render.HERE / "laptop" / file) for file in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [
        {"targets": [f"127.0.0.1:{running.config.observability.metrics_port}"]}
    ]
    file, port = tmp_path / "prometheus.yml", free_port()
    file.write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={tmp_path}/tsdb"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as prometheus:
            shown: dict[str, list[str]] = {}

            def look_again() -> set[str]:
                """Which panels have shown something by now: a busy machine may not answer each scrape in time."""
                title, said = "", list[str]()
                with suppress(httpx.HTTPError):  # until it has read its own files
                    said = [*look.lines(prometheus)]
                for line in said:
                    if not line.startswith(" "):
                        title = line.partition(" [")[0]
                    elif line.strip() != "no data":
                        shown.setdefault(title, []).append(line.strip())
                return set(shown)

            # Those that one look of Prometheus' own is enough for.
            wanted = {"Videos in the store", "Work in hand", "Waiting", "In work", "Replicas", "What runs"}
            until(look_again, lambda titles: wanted <= titles)
        assert "tiny-denoiser: 1" in shown["Replicas"]
        assert not any("firing" in alert for alert in shown.get("# Alerts", []))
    finally:
        process.kill()
        process.wait()


def test_one_trace_leads_from_the_request_to_every_step(running: RunningService, client: httpx.Client) -> None:
    video_id = finished(client)
    wanted = {"POST /v1/videos", "attempt", "encode", "denoise", "step", "decode"}
    spans = until(lambda: running.spans(video_id), lambda found: wanted <= {span.name for _, span in found})
    by_id = {span.span_id: span for _, span in spans}
    roots = [span.name for _, span in spans if span.parent_span_id not in by_id]
    assert roots == ["POST /v1/videos"]
    steps = [span for _, span in spans if span.name == "step"]
    assert len(steps) == ASKED["num_inference_steps"]
    assert {by_id[step.parent_span_id].name for step in steps} == {"denoise"}
    # API, runner and the three stages.
    assert len({replica for replica, _ in spans}) == 5


def test_batches_and_sessions_are_traced_too(running: RunningService, client: httpx.Client) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/videos", "body": ASKED | {"model": "tiny"}}
    file = client.post("/v1/files", files={"file": json.dumps(line).encode()}, data={"purpose": "batch"}).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/videos", "completion_window": "24h"}
    batch_id = client.post("/v1/batches", json=asked).json()["id"]
    settings = {"model": "tiny-causal", "size": "64x64", "num_inference_steps": 2}
    with Rushes(running.service.url) as rushes, rushes.realtime("a red ball", **settings) as live:
        next(iter(live))
        session_id = live.session["id"]
    batch = until(lambda: client.get(f"/v1/batches/{batch_id}").json(), lambda seen: seen["status"] == "completed")
    result = json.loads(client.get(f"/v1/files/{batch['output_file_id']}/content").text)
    made = {"denoise", "step", "decode", "encode"}
    for traced, root, below in (
        (result["response"]["body"]["id"], "batch line", {"attempt", *made}),
        (session_id, "WS /v1/realtime", {"prompt", *made}),
    ):
        spans = until(
            lambda of=traced: running.spans(of), lambda found, all=below | {root}: all <= {s.name for _, s in found}
        )
        by_id = {span.span_id for _, span in spans}
        assert [span.name for _, span in spans if span.parent_span_id not in by_id] == [root]


def test_logs_say_which_video_and_never_what_of(running: RunningService, client: httpx.Client) -> None:
    secret = "a heliotrope dodecahedron"
    video_id = finished(client, prompt=secret)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())

    def lines() -> list[str]:
        return [
            line for file in logs.glob("worker-*.err") for line in file.read_text().splitlines() if video_id in line
        ]

    said = json.loads(until(lines, bool)[0])
    assert (said["video_id"], said["attempt"], said["level"]) == (video_id, 1, "INFO")
    assert said["trace_id"] == trace_id_of(video_id)
    everything = b"".join(file.read_bytes() for file in logs.rglob("*") if file.is_file())
    assert secret.encode() not in everything


def test_a_late_viewer_sees_what_the_first_one_saw(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/videos", json=ASKED | {"stream": True}) as first:
        video_id = first.headers["x-video-id"]
        seen = first.read()
    assert client.get(f"/v1/videos/{video_id}/stream").content == seen
    assert client.get(f"/v1/videos/{video_id}/hls/media.m3u8").text.endswith("#EXT-X-ENDLIST\n")
