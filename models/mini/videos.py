"""Videos as a user gets them: over HTTP, from a service at an address or from one that is started for the occasion."""

from __future__ import annotations

import asyncio
import io
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import httpx
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

Frames = NDArray[np.uint8]

_START_SECONDS, _VIDEO_SECONDS = 300, 3600


@contextmanager
def service(bundle: Path | None, console: Console) -> Iterator[str]:
    """URL of a service that lives as long as the context. Raises `RuntimeError` with its last words if it can't."""
    with tempfile.TemporaryDirectory(prefix="rushes-evaluate-") as folder, (Path(folder) / "log").open("w+") as log:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "serving.cli", "serve", "--port", str(port), "--data-dir", f"{folder}/data"]
        if bundle is not None:
            command += ["--bundle", str(bundle)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            with console.status("starting the service"):
                if not _is_up(url, process):
                    log.seek(0)
                    raise RuntimeError(f"the service did not start:\n{log.read()[-2000:]}")
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_up(url: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/v1/models", timeout=5).is_success:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    return False


async def generate(
    url: str, bodies: list[dict[str, object]], in_flight: int, console: Console, use: Callable[[int, Frames], None]
) -> None:
    """Call `use` with each body's place and its video's frames. Raises `RuntimeError` when the service fails one."""
    places = asyncio.Semaphore(in_flight)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        with Progress(console=console) as progress:
            bar = progress.add_task("videos", total=len(bodies))

            async def one(index: int, body: dict[str, object]) -> None:
                async with places:
                    video = await _make(client, body)
                    # In a thread: while it judges one video the others are still asked after.
                    await asyncio.to_thread(lambda: use(index, decode(video)))
                progress.advance(bar)

            async with asyncio.TaskGroup() as group:
                for index, body in enumerate(bodies):
                    group.create_task(one(index, body))


async def _make(client: httpx.AsyncClient, body: dict[str, object]) -> bytes:
    prompt = body["prompt"]
    answer = await client.post("/v1/videos", json=body)
    if answer.is_error:
        raise RuntimeError(f"{prompt!r}: {answer.text}")
    video_id = answer.json()["id"]
    async with asyncio.timeout(_VIDEO_SECONDS):
        while True:
            video = (await client.get(f"/v1/videos/{video_id}")).raise_for_status().json()
            if video["status"] not in ("queued", "in_progress"):
                break
            await asyncio.sleep(0.2)
    if video["status"] != "completed":
        raise RuntimeError(f"{prompt!r}: {video['error']}")
    return (await client.get(f"/v1/videos/{video_id}/content")).raise_for_status().content


def decode(video: bytes) -> Frames:
    """All frames `[frames, height, width, 3]` of an MP4."""
    with av.open(io.BytesIO(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
