"""Servers of one's own for a benchmark, each in a process group of its own, that end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import yaml

from serving.config import ServiceConfig

_START_SECONDS, _STOP_SECONDS = 300.0, 60.0
_TAIL_CHARACTERS = 600
_ELSEWHERE = (
    *("models", "model_aliases", "data_dir", "host", "port", "require_keys", "webhooks", "quota_bytes"),
    *("store_url", "artifacts_url", "artifacts_options", "log_sharing"),
)


class NotStarted(OSError):  # noqa: N818
    """A server ended before it answered, or didn't answer in time; the message has what it said last."""


@contextmanager
def server(arguments: Sequence[str], url: str, ready: str, *, stop_seconds: float = _STOP_SECONDS) -> Iterator[None]:
    """`python -m` these arguments, from when `GET url/ready` answers until the end. Raises `NotStarted`.

    It has `stop_seconds` to end as by Ctrl-C; then it is killed with all that it has started.
    """
    # Settings for a shared machine's threads are not for what is measured: a server knows its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=said, stderr=said, env=environment, start_new_session=True
        )

        def last_words() -> str:
            said.seek(0)
            return " ".join(said.read()[-_TAIL_CHARACTERS:].split())

        try:
            give_up_at = time.monotonic() + _START_SECONDS
            while not _answers(f"{url}{ready}"):
                if process.poll() is not None:
                    raise NotStarted(f"{arguments[0]} ended with {process.returncode}: {last_words()}")
                if time.monotonic() > give_up_at:
                    raise NotStarted(f"{arguments[0]} does not answer at {url}: {last_words()}")
                time.sleep(0.1)
            yield
        finally:
            _end(process, stop_seconds)


@contextmanager
def service(settings: Mapping[str, object], folder: Path, port: int) -> Iterator[str]:
    """`rushes serve` with this configuration, its data in `folder`; its root's URL. Raises `NotStarted`."""
    # A store of its own, whatever the environment says: it is no place for a benchmark's videos where others are.
    store = {"data_dir": str(folder / "data"), "store_url": f"sqlite:///{folder / 'videos.db'}"}
    values = {**settings, **store, "host": "127.0.0.1", "port": port, "require_keys": False}
    path = folder / "service.yaml"
    path.write_text(yaml.safe_dump(values))
    url = f"http://127.0.0.1:{port}"
    with server(["serving.cli", "serve", "--config", str(path)], url, "/v1/models"):
        yield url


def settings_of(config: ServiceConfig) -> dict[str, object]:
    """As YAML has it, without what was left out, and without what says where things are kept and who may come."""
    said: dict[str, object] = config.model_dump(mode="json", exclude_unset=True, exclude=set(_ELSEWHERE))
    return said


def _answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False, timeout=5).is_success
    return False


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
