"""`rushes serve` as a machine runs it: in processes of its own, and started again whenever it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from marked import Mark

from serving.reloading import STATE

# What each process of the service is called, by a part of its command line.
PROCESSES = {
    "runner": "rushes-runner:runner",
    "api": "rushes:api",
    "text encoder": "text-encoder",
    "denoiser": "-denoiser",
    "decoder": "-decoder",
    "controller": "ServeController",
    "proxy": "ProxyActor",
    "head (gcs)": "gcs_server",
    "head (raylet)": "raylet/raylet",
    "rushes serve": "serving.cli",
}


def until(look: Callable[[], Any]) -> Any:
    """What `look` sees as soon as that is something. Bounded by the test's own time limit."""
    while not (seen := look()):
        time.sleep(0.1)
    return seen


class SupervisedService:
    """`with` it. `kill` ends one of its processes; nothing of it is left running afterwards."""

    def __init__(self, config: Mapping[str, Any], directory: Path) -> None:
        """`config` is the service's; its log is `directory / "serve.log"`."""
        self.url = f"http://127.0.0.1:{config['port']}"
        self.starts = 0
        self._mark = Mark()
        self._file, self._log = directory / "config.json", directory / "serve.log"
        self._state = Path(config["data_dir"]) / STATE
        self._file.write_text(json.dumps(config, default=str))  # JSON is YAML
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor = threading.Thread(target=self._supervise)

    def __enter__(self) -> SupervisedService:
        self._supervisor.start()
        try:
            self.wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        while self._supervisor.is_alive():  # which may be starting another one just now
            self.signal(signal.SIGKILL)
            self._supervisor.join(0.5)
        self._mark.kill_all()

    def wait_until_up(self, timeout_seconds: float = 300) -> None:
        give_up_at = time.monotonic() + timeout_seconds
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", trust_env=False).is_success:
                    return
            if time.monotonic() > give_up_at:
                raise TimeoutError(self._log.read_text()[-2000:])
            time.sleep(0.1)

    def is_started(self) -> bool:
        """Whether `rushes serve` is through with its start, which replicas that answer don't say; before that a SIGTERM
        breaks it off."""
        with suppress(OSError, ValueError):
            return self._process is not None and json.loads(self._state.read_bytes())["pid"] == self._process.pid
        return False

    def processes(self) -> dict[int, str]:
        """All that live, Ray's too: their command lines."""
        return self._mark.processes()

    def kill(self, name: str) -> bool:
        """SIGKILL to one process of this name (see `PROCESSES`); whether there was one."""
        return self._mark.kill(PROCESSES[name])

    def signal(self, number: signal.Signals) -> None:
        """To `rushes serve` itself."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def stop(self) -> int:
        """As a terminal does; the exit status. It is not started again."""
        self._stopping.set()
        self.signal(signal.SIGTERM)
        self._supervisor.join()
        assert self._process is not None
        return self._process.wait()

    def _supervise(self) -> None:
        command = [sys.executable, "-c", "from serving.cli import main; main()", "serve", "--config", str(self._file)]
        environment = {**os.environ, **self._mark.environment}
        while not self._stopping.is_set():
            self.starts += 1
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    command, stdout=log, stderr=log, env=environment, start_new_session=True
                )
            self._process.wait()
            self._stopping.wait(1.0)
