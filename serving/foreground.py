"""What `rushes serve` and `rushes demo` do: the service on this machine, as long as a terminal wants it."""

from __future__ import annotations

import json
import os
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from models.bundle import BundleError
from serving.config import ConfigError, ServiceConfig
from serving.deployments.local import LocalService, free_port, local_service
from serving.reloading import State

_TRY_IT = """\
[bold]{url}[/]  serves {models}; videos are kept in {data_dir}

  curl -N {url}/v1/videos -H 'Content-Type: application/json' \\
    -d '{body}' > ball.mp4

Ctrl-C stops it."""

_LOOK_SECONDS = 0.1


class _RayDied(Exception):  # noqa: N818
    """Some of its processes; the message says which."""


def serve_until_interrupted(config: ServiceConfig, console: Console, read: Callable[[], ServiceConfig]) -> None:
    """Start, say how to try it, and on SIGINT or SIGTERM finish the videos in hand; a second one puts them back into
    the queue, where the next start finds them.

    On SIGHUP `read` the configuration again and change the models to it; what is wrong with it is said, and changes
    nothing. When Ray dies under it, this process ends with status 1: whoever started it may start it again, and nothing
    is lost by that.
    """
    with ExitStack() as running:
        signals = running.enter_context(_Signals())
        with console.status("starting"):
            service = running.enter_context(local_service(config))
        signals.up()
        state = running.enter_context(State.kept(config.data_dir))
        body = json.dumps({"prompt": "a red ball bouncing on a sand floor at sunset", "stream": True})
        models = ", ".join(config.models)
        console.print(_TRY_IT.format(url=service.url, models=models, data_dir=config.data_dir, body=body))
        try:
            while not signals.came():
                if signals.hung_up():
                    state.tell(*_reload(service, read, console))
                _check(service)
                time.sleep(_LOOK_SECONDS)
            _drain(service, signals, console)
        except _RayDied as died:
            console.print(f"[red]rushes:[/] Ray has died ({died}); start again, and every video is gone on with")
            service.kill()
            # Not by an exception: Ray's own handlers would wait for what is dead.
            os._exit(1)


def run_demo(models: Mapping[str, Path], request: Mapping[str, Any], output: Path, console: Console) -> None:
    """Ask a service of its own for one video, show each chunk when it comes, and save the finished file."""
    started = time.monotonic()
    with ExitStack() as running:
        data_dir = running.enter_context(tempfile.TemporaryDirectory(prefix="rushes-demo-"))
        with console.status("starting the service"):
            config = ServiceConfig(models=dict(models), data_dir=Path(data_dir), port=free_port())
            service = running.enter_context(local_service(config))
        console.print(f"service up after {time.monotonic() - started:.1f} s; asking for {request['prompt']!r}")
        with httpx.Client(base_url=service.url, timeout=None) as client:
            data = _finished(client, _watch(client, request, console), console)
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _watch(client: httpx.Client, request: Mapping[str, Any], console: Console) -> str:
    asked = time.monotonic()
    with client.stream("POST", "/v1/videos", json={**request, "stream": True}) as response:
        if response.is_error:
            response.read()
            raise OSError(response.json()["error"]["message"])
        video_id = response.headers["X-Video-Id"]
        chunk = 0
        for kind, size in _boxes(response.iter_bytes()):
            if kind == b"mdat":
                chunk += 1
                made = client.get(f"/v1/videos/{video_id}").json()["progress"]
                console.print(
                    f"chunk {chunk:2} after {time.monotonic() - asked:5.2f} s  {size / 1000:6.1f} kB"
                    f"  (video {made} % made)"
                )
    return video_id


def _finished(client: httpx.Client, video_id: str, console: Console) -> bytes:
    """The MP4, which is there a moment after the last chunk."""
    while (video := client.get(f"/v1/videos/{video_id}").json())["status"] in ("queued", "in_progress"):
        time.sleep(0.05)
    if video["status"] == "failed":
        raise OSError(video["error"]["message"])
    if video["revised_prompt"] is not None:
        console.print(f"revised prompt: {video['revised_prompt']}", markup=False)
    return client.get(f"/v1/videos/{video_id}/content").raise_for_status().content


def _boxes(parts: Iterator[bytes]) -> Iterator[tuple[bytes, int]]:
    """Type and size in bytes of each top-level box (ISO/IEC 14496-12, 4.2), as soon as all of it has come."""
    pending = b""
    for part in parts:
        pending += part
        while len(pending) >= 8:
            size, kind = struct.unpack_from(">I4s", pending)
            if len(pending) < size:
                break
            yield kind, size
            pending = pending[size:]


def _check(service: LocalService) -> None:
    if dead := service.dead():
        raise _RayDied(", ".join(dead))


def _drain(service: LocalService, signals: _Signals, console: Console) -> None:
    if count := service.running():
        console.print(
            f"finishing {count} video{'s' if count > 1 else ''}; Ctrl-C again to leave them for the next start"
        )
    drained = threading.Thread(target=service.drain, daemon=True)
    drained.start()
    while drained.is_alive() and not signals.came(twice=True):
        _check(service)
        drained.join(_LOOK_SECONDS)
    if drained.is_alive():
        service.hand_back()


def _reload(service: LocalService, read: Callable[[], ServiceConfig], console: Console) -> tuple[bool, str]:
    """Whether it was done, and a line about it."""
    try:
        with console.status("reloading"):
            said = ", ".join(service.fleet.change(read())) or "nothing to change"
    except (ConfigError, BundleError, OSError) as error:
        console.print(f"[red]not reloaded:[/] {escape(str(error))}")
        return False, str(error)
    console.print(f"reloaded: {escape(said)}")
    return True, said


class _Signals:
    """SIGINT, SIGTERM and SIGHUP, in the main thread: an end to the start, and something to look for once it is up."""

    def __init__(self) -> None:
        self._count = self._hangups = 0
        self._up = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def up(self) -> None:
        """From here on signals are counted."""
        self._up = True

    def came(self, *, twice: bool = False) -> bool:
        return self._count > twice

    def _came(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._hangups += 1
            return
        self._count += 1
        if not self._up:
            raise KeyboardInterrupt

    def hung_up(self) -> bool:
        """Whether SIGHUP came since this was last asked. Those that came at the same time are one."""
        hung_up, self._hangups = self._hangups > 0, 0
        return hung_up
