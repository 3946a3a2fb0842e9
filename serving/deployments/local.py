"""The service on this machine: a Ray of its own, started for it and stopped with it."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from serving.config import ConfigError, ServiceConfig

APP_NAME = "rushes"

# Read by Ray when it is imported or by the processes that it starts, so they must be set before.
_ENVIRONMENT = {
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_enable_metrics_collection": "0",
}
# Latents and fragments in flight; Ray would take a third of the machine's memory.
_OBJECT_STORE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class LocalService:
    """A running service; `url` is its root."""

    url: str
    _runner: Any

    def running(self) -> int:
        """Videos in hand."""
        count: int = self._runner.running.remote().result()
        return count

    def drain(self) -> None:
        """Take no new video, and return when those in hand have ended; queued ones stay in the store."""
        for _ in self._runner.broadcast("drain").results():
            pass


@contextmanager
def local_service(config: ServiceConfig) -> Iterator[LocalService]:
    """Start everything, and stop all of it on the way out. Raises `ConfigError` for what can't be started with."""
    config = config.resolved()
    _check_port(config.host, config.port)
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})

    import ray
    from ray import serve

    from serving.deployments.app import build_app

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray.init(
        address="local",
        num_cpus=max(math.ceil(config.cores()), os.cpu_count() or 1),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        configure_logging=True,
        logging_level="ERROR",
        log_to_driver=False,
    )
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.host, "port": config.port, "request_timeout_s": None},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.run(build_app(config), name=APP_NAME, route_prefix="/")
        host = "127.0.0.1" if config.host in ("0.0.0.0", "::", "") else config.host
        yield LocalService(f"http://{host}:{config.port}", serve.get_deployment_handle("runner", APP_NAME))
    finally:
        # The replicas die with this Ray: whoever wants to wait for their work drains first.
        with suppress(Exception):
            serve.context._set_global_client(None)
        ray.shutdown()


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _check_port(host: str, port: int) -> None:
    """Ray would say it much later, and in the log of a process that nobody sees."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(f"{host}:{port} can't be listened on: {error.strerror}") from None
