"""How long create, list and retrieve take while 10,000 videos wait: medians over HTTP, of a service of its own.

    python tests/perf/queue_latency.py [--videos 10000] [--requests 300]

First while the runner makes videos on the same cores, which is what the figures then mostly show, and then after it
has been told to take no more. One client, one connection.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import httpx

from models.bundle import Bundle
from serving.config import MINI_BUNDLE, ServiceConfig
from serving.deployments.local import free_port, local_service
from serving.jobs.database import Database
from serving.jobs.store import Video, new_video_id
from serving.jobs.tables import videos as videos_table
from serving.pipeline.request import make_spec

_AT_A_TIME = 1000


def fill(url: str, count: int) -> list[str]:
    """Queue so many videos; their ids."""
    spec = asdict(make_spec(Bundle.load(MINI_BUNDLE).manifest, "a small cyan cone moving left"))
    database = Database.open(url)
    rows = [
        asdict(
            Video(
                id=new_video_id(),
                model="mini",
                prompt=spec["prompt"],
                seconds="2",
                size="128x128",
                request=spec,
                created_at=time.time(),
            )
        )
        for _ in range(count)
    ]
    for start in range(0, count, _AT_A_TIME):
        with database.write() as connection:
            connection.execute(videos_table.insert(), rows[start : start + _AT_A_TIME])
    database.dispose()
    return [row["id"] for row in rows]


def measure(client: httpx.Client, ids: list[str], requests: int) -> None:
    pick = random.Random(0)
    asked: dict[str, Callable[[], httpx.Response]] = {
        "create": lambda: client.post("/v1/videos", json={"prompt": "a red ball", "seconds": 1}),
        "list": lambda: client.get("/v1/videos"),
        "retrieve": lambda: client.get(f"/v1/videos/{pick.choice(ids)}"),
    }
    for name, ask in asked.items():
        taken = []
        for _ in range(requests):
            started = time.perf_counter()
            ask().raise_for_status()
            taken.append(1000 * (time.perf_counter() - started))
        taken.sort()
        print(f"  {name:9} median {statistics.median(taken):5.1f} ms   p95 {taken[int(0.95 * requests)]:5.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = ServiceConfig(data_dir=Path(folder), port=free_port())
        with (
            local_service(config) as service,
            httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client,
        ):
            ids = fill(config.resolved_store_url, options.videos)
            while not service.running():
                time.sleep(0.05)
            print(f"{options.videos} videos in the queue, and others being made:")
            measure(client, ids, options.requests)
            service.drain()
            print("nothing being made:")
            measure(client, ids, options.requests)


if __name__ == "__main__":
    main()
