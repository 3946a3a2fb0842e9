"""Any process may be killed, the database restarted and the file store away: every video ends completed, once, and as
the same bytes.

One small round by default. `RUSHES_CHAOS_ROUNDS`, `RUSHES_CHAOS_JOBS` and `RUSHES_CHAOS_OUTAGE_SECONDS` make it
larger, and `RUSHES_CHAOS_SEED` another.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from postgres import Cluster
from standardwebhooks import Webhook
from supervised import PROCESSES, SupervisedService, until
from viewers import DEATHS, steered, watched

from models.bundle import Bundle
from serving.deployments.local import free_port
from serving.jobs.artifacts import CHECKPOINTS, Artifacts
from serving.jobs.fragment_log import FragmentLog
from serving.jobs.store import SqlVideoStore

JOBS = int(os.environ.get("RUSHES_CHAOS_JOBS", "6"))
ROUNDS = int(os.environ.get("RUSHES_CHAOS_ROUNDS", "1"))
OUTAGE_SECONDS = float(os.environ.get("RUSHES_CHAOS_OUTAGE_SECONDS", "3"))
SEED = int(os.environ.get("RUSHES_CHAOS_SEED", "7"))
LEASE_SECONDS = 3
SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900 + 600 * ROUNDS),
]


def picture() -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def requests() -> list[dict[str, Any]]:
    """One of each kind of work."""
    scenes = [{"start_seconds": 2.5, "prompt": "a blue cube spinning"}]
    return [
        {"model": "tiny", "prompt": "a red ball", "seconds": 2, "num_inference_steps": 40},
        {"model": "tiny", "prompt": "a cone", "size": "128x96", "num_inference_steps": 24, "guidance_scale": 1},
        {"model": "tiny", "prompt": "a white cube", "seconds": 1, "num_inference_steps": 20, "best_of": 3},
        {
            "model": "tiny",
            "prompt": "it moves",
            "num_inference_steps": 20,
            "seconds": 1,
            "size": "64x64",
            "input_reference": {"image_url": picture()},
        },
        {"model": "tiny-causal", "prompt": "a red ball", "seconds": 12, "num_inference_steps": 6},
        {"model": "tiny-causal", "prompt": "a cone", "seconds": 5, "scene_prompts": scenes, "guidance_scale": 2},
    ]


class Receiver:
    """Hears webhooks: which events each video had, by their ids."""

    def __init__(self) -> None:
        self.events: dict[str, set[tuple[str, str]]] = {}
        signer = Webhook(SECRET)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                event = signer.verify(body, dict(self.headers))
                heard = receiver.events.setdefault(event["data"]["id"], set())
                heard.add((event["type"], self.headers["webhook-id"]))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Bucket:
    """An S3 of the test's own, which may go away and come back with what was in it."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._new: Any = lambda: ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server = self._new()
        self._server.start()
        # What it keeps is the whole process's: other tests' buckets would be here too.
        httpx.post(f"http://127.0.0.1:{self._port}/moto-api/reset", trust_env=False).raise_for_status()
        self.options = {"endpoint_url": f"http://127.0.0.1:{self._port}", "key": "test", "secret": "test"}

    @contextmanager
    def away(self) -> Iterator[None]:
        self._server.stop()
        try:
            yield
        finally:
            self._server = self._new()
            self._server.start()

    def stop(self) -> None:
        self._server.stop()


class Client:
    """A backend's: it asks again until it has an answer, and a key makes that harmless."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        while True:
            try:
                response = self._http.request(method, path, **options)
                # Until it knows the service's routes, Ray's proxy says 404 to everything, in words of its own.
                if response.status_code < 500 and not response.content.startswith(b"Path '"):
                    return response
            except httpx.TransportError:
                pass
            time.sleep(0.2)

    def create(self, body: dict[str, Any], key: str) -> str:
        response = self.ask("POST", "/v1/videos", json={"seed": 7, **body}, headers={"Idempotency-Key": key})
        assert response.status_code == 200, response.text
        video_id: str = response.json()["id"]
        return video_id

    def ended(self, video_id: str) -> dict[str, Any]:
        while (video := self.ask("GET", f"/v1/videos/{video_id}").json())["status"] in ("queued", "in_progress"):
            time.sleep(0.2)
        ended: dict[str, Any] = video
        return ended

    def is_busy(self) -> bool:
        return bool(self.ask("GET", "/v1/load").json()["running"])

    def content(self, video_id: str) -> str:
        response = self.ask("GET", f"/v1/videos/{video_id}/content")
        assert response.status_code == 200, response.text
        return sha256(response.content).hexdigest()


class Faults:
    """What goes wrong in one round, in an order of its own."""

    def __init__(
        self,
        service: SupervisedService,
        cluster: Cluster,
        bucket: Bucket,
        chance: random.Random,
        is_busy: Callable[[], bool],
    ) -> None:
        self._service, self._cluster, self._bucket, self._chance = service, cluster, bucket, chance
        self._is_busy = is_busy
        self.happened: Counter[str] = Counter()

    def round(self, number: int) -> None:
        """Half of the processes, each round others; and the database or the file store, or in the end both."""
        names = list(PROCESSES)
        self._chance.shuffle(names)
        chosen = names[: len(names) // 2]
        if number == 0:
            # The one that works on the videos, and the one that all of them depend on, are never left to chance.
            chosen = list(dict.fromkeys(["runner", "head (raylet)", *chosen]))[: len(chosen)]
        chosen += ["database", "artifacts"]
        self._chance.shuffle(chosen)
        if number == 0:
            # While there certainly is something that it works on: a fast machine is soon through.
            chosen.remove("runner")
            until(self._is_busy)
            self._end("runner")
        for name in chosen:
            time.sleep(self._chance.uniform(0.2, 3))
            if name == "database":
                self._cluster.restart()
            elif name == "artifacts":
                with self._bucket.away():
                    time.sleep(OUTAGE_SECONDS)
            else:
                self._end(name)
                continue
            self.happened[name] += 1

    def _end(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not self._service.kill(name) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.happened[name] += 1


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    pytest.importorskip("moto.server")
    opened = Bucket()
    yield opened
    opened.stop()


def test_every_video_ends_completed_once_and_the_same_whatever_dies(
    tiny_bundle: Bundle, tiny_causal_bundle: Bundle, postgres_cluster: Cluster, bucket: Bucket, tmp_path: Path
) -> None:
    receiver, chance = Receiver(), random.Random(SEED)
    store_url = postgres_cluster.cleared_database()
    artifacts = Artifacts(tmp_path / "data", "s3://rushes/here", bucket.options)
    artifacts._files.mkdir("rushes")
    config = {
        "models": {"tiny": tiny_bundle.root, "tiny-causal": tiny_causal_bundle.root},
        "data_dir": tmp_path / "data",
        "store_url": store_url,
        "artifacts_url": "s3://rushes/here",
        "artifacts_options": bucket.options,
        "port": free_port(),
        "lease_seconds": LEASE_SECONDS,
        "webhooks": {"secret": SECRET, "allow_private": True},
        "runner": {"batch_poll_seconds": 0.5},
        "sweep_seconds": 2,
    }
    asked = requests()
    with SupervisedService(config, tmp_path) as service:
        client = Client(service.url)
        undisturbed = [client.create(body, f"undisturbed-{n}") for n, body in enumerate(asked)]
        for video_id in undisturbed:
            assert client.ended(video_id)["status"] == "completed"
        expected = [client.content(video_id) for video_id in undisturbed]
        assert len(set(expected)) == len(asked)

        # Whoever watches a video sees each of its frames once, whichever process dies on the way.
        long = {**asked[4], "seed": 7}
        expected_fragments = watched(service, long, {})
        assert expected_fragments.frames == 12 * 16 + 1
        for deaths in DEATHS:
            began = time.monotonic()
            assert watched(service, long, deaths) == expected_fragments, deaths
            died = " and ".join(deaths.values())
            print(f"watched on while {died} died: {time.monotonic() - began:.1f} s", flush=True)

        # And whoever steers one goes on with it: to the same bytes, while what the model remembers reaches back so far.
        undisturbed_session = steered(service, "tiny-causal", {}, 8)
        began = time.monotonic()
        assert steered(service, "tiny-causal", {0: "denoiser", 4: "decoder"}, 8) == undisturbed_session
        print(f"steered on while denoiser and decoder died: {time.monotonic() - began:.1f} s", flush=True)

        faults = Faults(service, postgres_cluster, bucket, chance, client.is_busy)
        ids: list[str] = []
        for number in range(ROUNDS):
            began = time.monotonic()
            with ThreadPoolExecutor(1) as beside:
                going_wrong = beside.submit(faults.round, number)
                mine = [
                    client.create({**asked[n % len(asked)], "webhook_url": receiver.url}, f"{number}-{n}")
                    for n in range(JOBS)
                ]
                going_wrong.result()
            for n, video_id in enumerate(mine):
                video = client.ended(video_id)
                assert (video["status"], video["progress"], video["error"]) == ("completed", 100, None), video
                assert client.content(video_id) == expected[n % len(asked)], (number, asked[n % len(asked)])
            ids += mine
            print(f"round {number}: {time.monotonic() - began:.1f} s, {service.starts} starts", flush=True)
        print(dict(faults.happened))
        assert len(set(ids)) == ROUNDS * JOBS

        store = SqlVideoStore(store_url)
        fences = []
        for video_id in [*undisturbed, *ids]:
            record = asyncio.run(store.get(video_id))
            assert record is not None
            fences.append(record.fence)
            log = FragmentLog.open(tmp_path / "data" / "videos", video_id)
            lines = (log.path / "index.jsonl").read_text().splitlines()
            entries = log.entries()
            assert len(lines) == len(entries) + 1, "one end"
            assert [entry.first_frame for entry in entries][1:] == [e.first_frame + e.frames for e in entries][:-1]
            assert entries[-1].first_frame + entries[-1].frames == record.request["frames"]
        print("attempts:", dict(Counter(fences)))
        assert max(fences) > 1 or not ROUNDS, "no attempt was disturbed"
        store.dispose()
        until(lambda: all(len(receiver.events.get(video_id, ())) >= 1 for video_id in ids))
        for video_id in ids:
            assert [kind for kind, _ in receiver.events[video_id]] == ["video.completed"]
        # Nothing is left: no checkpoints, no processes.
        service.wait_until_up()
        until(lambda: artifacts.names(CHECKPOINTS) == [])
        until(service.is_started)
        assert service.stop() == 0
        until(lambda: service.processes() == {})
    receiver.server.shutdown()
