"""The service on this machine: a Ray of its own, started for it and stopped with it."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from serving.config import ConfigError, ServiceConfig
from serving.deployments.door import socket_of
from serving.deployments.storage import open_storage

if TYPE_CHECKING:
    from serving.deployments.fleet import Fleet

# Read by Ray when it is imported or by the processes that it starts, so they must be set before.
_ENVIRONMENT = {
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_enable_metrics_collection": "0",
    # Ray lowers its workers' priority by 15, which on a busy machine leaves them next to nothing.
    "RAY_worker_niceness": "0",
    # Ray kills an HTTP proxy that takes more than 5 s to start, again and again: a busy laptop takes longer.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_worker_register_timeout_seconds": "180",
}
# Latents and fragments in flight; Ray would take a third of the machine's memory.
_OBJECT_STORE_BYTES = 512 << 20
_ANSWER_SECONDS = 120
_COUNT_SECONDS = 5
_HAND_BACK_SECONDS = 15
_VITAL = {"gcs_server", "raylet"}


class StartError(OSError):
    """Ray or one of its replicas did not start."""


@dataclass(frozen=True, slots=True)
class LocalService:
    """A running service; `url` is its root."""

    url: str
    fleet: Fleet

    def running(self) -> int:
        """Videos in hand."""
        return sum(self._answers("running", timeout_seconds=_COUNT_SECONDS))

    def drain(self) -> None:
        """Take no new video, and return when those in hand have ended; queued ones stay in the store."""
        self._answers("drain")

    def hand_back(self) -> None:
        """Put the videos in hand back into the queue, with all that is made of them kept; for some seconds at most."""
        self._answers("hand_back", timeout_seconds=_HAND_BACK_SECONDS)

    def _answers(self, question: str, timeout_seconds: float | None = None) -> list[Any]:
        """Of whoever has videos in hand: nobody, while another replica takes the place of one that has failed.

        One that hangs isn't waited for any longer than so many seconds.
        """
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import DeploymentUnavailableError

        with suppress(RayActorError, DeploymentUnavailableError, TimeoutError):
            answers: list[Any] = self.fleet.runner().broadcast(question).results(timeout_s=timeout_seconds)
            return answers
        return []

    def dead(self) -> list[str]:
        """Those of Ray's own processes that have died, without which nothing here works; empty while all is well."""
        node = _ray_node()
        return ["ray"] if node is None else sorted({kind for kind, _ in node.dead_processes()} & _VITAL)

    def kill(self) -> None:
        """End what is left of a Ray that has died: to stop it as usual would take the minute that it waits for its
        head. The replicas end with the raylet."""
        if node := _ray_node():
            node.kill_all_processes(check_alive=False, allow_graceful=False)


@contextmanager
def local_service(config: ServiceConfig) -> Iterator[LocalService]:
    """Start everything, and stop all of it on the way out.

    Raises `ConfigError`, `BundleError` or `DatabaseError` for what can't be started with, and `StartError` when Ray
    doesn't come up.
    """
    config = config.resolved()
    metrics_port = config.observability.metrics_port
    url = f"http://{'127.0.0.1' if config.host in ('0.0.0.0', '::') else config.host}:{config.port}"
    _check_port(config.host, config.port)
    open_storage(config).database.dispose()  # what is wrong with the database is said now, and not by a replica
    measuring = {} if metrics_port is None else {"RAY_enable_metrics_collection": "1"}
    added = {name: value for name, value in {**_ENVIRONMENT, **measuring}.items() if name not in os.environ}
    os.environ.update(added)

    import ray
    from ray import serve
    from ray.exceptions import RayError

    from serving.deployments.fleet import Fleet

    fleet = Fleet(serve)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address="local",
                # Twice: models are rolled with old and new side by side, and others may be loaded.
                num_cpus=max(math.ceil(2 * config.cores()), os.cpu_count() or 1),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                logging_level="ERROR",
                _metrics_export_port=metrics_port,
                log_to_driver=False,
            )
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler aborts the process with a stack trace
            _start_serve(serve, config)
            fleet.start(config)
            _wait_for_answer(url)
        except (RayError, RuntimeError, TimeoutError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StartError(f"the service did not start: {said} (Ray's logs: /tmp/ray/session_latest/logs)") from error
        yield LocalService(url, fleet)
    finally:
        # The replicas die with this Ray: whoever wants to wait for their work drains first.
        if ray.is_initialized():
            _forget_handles(serve)
        ray.shutdown()
        for name in added:  # the next service of this process may be measured, or not be
            os.environ.pop(name, None)


def _ray_node() -> Any:
    """Ray has no other way to ask for the processes that it started here."""
    import ray

    return ray._private.worker._global_node


def _forget_handles(serve: Any) -> None:
    """A handle's threads outlive Ray otherwise, and the first call that one of them makes starts another Ray.

    `serve.shutdown()` does this too, but then waits for every replica in turn.
    """
    client = serve.context._get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        client.shutdown_cached_handles()
    serve.context._set_global_client(None)


def _start_serve(serve: Any, config: ServiceConfig) -> None:
    options = {"host": config.host, "port": config.port, "request_timeout_s": None}
    logging_config = {"log_level": "WARNING", "enable_access_log": False}
    location = "Disabled" if config.fused else "HeadOnly"  # a fused replica has a door of its own
    try:
        serve.start(proxy_location=location, http_options=options, logging_config=logging_config)
    except TimeoutError:
        # Ray waits a minute for its HTTP proxy and no longer. Its controller goes on, and can be joined.
        serve.start(proxy_location=location, http_options=options, logging_config=logging_config)


def _wait_for_answer(url: str) -> None:
    """The replicas are there; Ray's proxy learns of them, and may itself still be starting."""
    give_up_at = time.monotonic() + _ANSWER_SECONDS
    while True:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", trust_env=False).is_success:
                return
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"nothing answers at {url}")
        time.sleep(0.05)


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _check_port(host: str, port: int) -> None:
    """Ray would say it much later, and in the log of a process that nobody sees."""
    try:
        with socket_of(host) as probe:
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(f"{host}:{port} can't be listened on: {error.strerror}") from None
