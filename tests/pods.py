"""A rendered RayService on this machine, without Kubernetes: each of its pods is what KubeRay would run in it, `ray
start` with the pod's own environment, parameters and resources, and the Serve configuration goes to the dashboard as
KubeRay sends it.

Only what pods don't share and one machine does is different: ports, where Ray's files are, where a volume is mounted.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import yaml
from marked import Mark

from serving.deployments.local import free_port

# What KubeRay adds to its own, and what keeps a busy machine from being taken for a dead one.
_ENVIRONMENT = {
    "RAY_SERVE_KV_TIMEOUT_S": "5",
    "RAY_gcs_server_request_timeout_seconds": "5",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_worker_register_timeout_seconds": "180",
    "RAY_agent_register_timeout_ms": "120000",
}
_OBJECT_STORE_BYTES = 128 << 20
_NO_HEAD = "Did the head node or gcs start successfully?"
_UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}


class Pods:
    """One head and one worker. `with running_pods(…)`."""

    def __init__(self, documents: str, directory: Path, environment: Mapping[str, str]) -> None:
        (self._service,) = [
            each["spec"] for each in yaml.safe_load_all(documents) if each and each["kind"] == "RayService"
        ]
        self._directory = directory
        # Sockets have short names only.
        self._temporary = Path(tempfile.mkdtemp(prefix="pods-"))
        self._token = secrets.token_hex(32)
        self._environment = dict(environment)
        self._port, self._dashboard, self.metrics_port = free_port(), free_port(), free_port()
        self._head_http, worker_http = free_port(), free_port()
        self._worker_http = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(worker_http)}
        self.url = f"http://127.0.0.1:{worker_http}"
        """Of the worker's proxy: the Service leaves the head out."""
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._operator = httpx.Client(
            base_url=f"http://127.0.0.1:{self._dashboard}",
            headers={"Authorization": f"Bearer {self._token}"},
            timeout=30,
            trust_env=False,
        )
        self._user = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        self.head, self.worker = Mark(), Mark()

    def serve_config(self, mounts: Mapping[str, Path]) -> dict[str, Any]:
        """As it stands in the RayService, with directories in the place of the volumes."""
        text = self._service["serveConfigV2"]
        for mount, path in mounts.items():
            text = text.replace(f"{mount}\n", f"{path}\n")
        config: dict[str, Any] = yaml.safe_load(text)
        config["http_options"]["port"] = self._head_http
        return config

    def start_head(self) -> None:
        # A new pod's /tmp is empty: this file would have it believe that another head runs here.
        (self._temporary / "ray_current_cluster").unlink(missing_ok=True)
        cluster = self._service["rayClusterConfig"]
        kept = cluster.get("gcsFaultToleranceOptions", {}).get("redisAddress")
        outlived = {"RAY_REDIS_ADDRESS": kept, "RAY_external_storage_namespace": self._token[:8]} if kept else {}
        self._start(
            self.head,
            "head",
            cluster["headGroupSpec"],
            "--head",
            f"--port={self._port}",
            f"--dashboard-port={self._dashboard}",
            f"--ray-client-server-port={free_port()}",
            f"--metrics-export-port={free_port()}",
            f"--temp-dir={self._temporary}",
            "--no-monitor",  # its autoscaler is a container of its own
            environment=outlived,
        )

    def start_worker(self) -> None:
        (group,) = self._service["rayClusterConfig"]["workerGroupSpecs"]
        ports = {f"--metrics-export-port={self.metrics_port}", f"--address=127.0.0.1:{self._port}"}
        patient = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        self._start(self.worker, "worker", group, *ports, environment=self._worker_http | patient)

    def _start(
        self, mark: Mark, name: str, group: Mapping[str, Any], *options: str, environment: Mapping[str, str] = {}
    ) -> None:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        own = {"num-cpus": limits["cpu"], "memory": _bytes(limits["memory"])} | group["rayStartParams"]
        command = [
            *[sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address=127.0.0.1"],
            *[f"--{key}={value}" for key, value in own.items()],
            *options,
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            *["--min-worker-port=0", "--max-worker-port=0"],
            # One that it must be told of itself is waited for by the raylet for 15 s only.
            *[
                f"--{name}-port={free_port()}"
                for name in ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent")
            ],
        ]
        given = {each["name"]: str(each["value"]) for each in container["env"]} | _ENVIRONMENT
        given |= {
            "DASHBOARD_METRIC_PORT": str(free_port()),
            "HOME": str(self._temporary),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
        }
        given |= self._environment | environment | mark.environment
        with (self._directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | given, start_new_session=True)
        self._started[name] = process

    def dashboard(self, method: str, path: str, **options: Any) -> httpx.Response:
        """As the operator asks. Raises `AssertionError` when a pod has ended by itself."""
        for name, process in list(self._started.items()):
            if process.poll() is not None:
                said = (self._directory / f"{name}.log").read_text()[-4000:]
                # KubeRay has a worker wait for its head, in a container before it.
                assert (name, _NO_HEAD in said) == ("worker", True), said
                self.start_worker()
        return self._operator.request(method, path, **options)

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Hand the Serve configuration over, as soon as there is somebody to take it."""
        while True:
            with suppress(httpx.TransportError):
                answer = self.dashboard("PUT", "/api/serve/applications/", json=config)
                if answer.is_success:
                    return
                assert answer.status_code >= 500, answer.text
            time.sleep(0.2)

    def application(self) -> dict[str, Any]:
        """How the dashboard says it stands; nothing while it says nothing."""
        with suppress(httpx.TransportError):
            answer = self.dashboard("GET", "/api/serve/applications/")
            if answer.is_success:
                found: dict[str, Any] = answer.json()["applications"].get("rushes", {})
                return found
        return {}

    def replicas(self) -> dict[str, dict[str, str]]:
        """The state of each, by deployment and id."""
        deployments = self.application().get("deployments", {})
        return {
            name: {replica["replica_id"]: replica["state"] for replica in deployment["replicas"]}
            for name, deployment in deployments.items()
        }

    def wait_until_it_runs(self) -> None:
        """Every deployment as it was last told to be, and the worker's proxy answering."""
        while True:
            application = self.application()
            assert application.get("status") != "DEPLOY_FAILED", application
            if application.get("status") == "RUNNING":
                with suppress(httpx.TransportError):
                    if self._user.get("/health").is_success:
                        return
            time.sleep(0.1)

    def ended(self) -> list[str]:
        """How all videos have ended, when the last one has: a stream may end before its file is made."""
        while True:
            videos = self._user.get("/v1/videos", params={"limit": 100}).raise_for_status().json()["data"]
            statuses = [video["status"] for video in videos]
            if not {"queued", "in_progress"} & {*statuses}:
                return statuses
            time.sleep(0.1)

    def end(self) -> None:
        self._operator.close()
        self._user.close()
        self.worker.kill_all()
        self.head.kill_all()
        shutil.rmtree(self._temporary, ignore_errors=True)


@contextmanager
def running_pods(documents: str, directory: Path, environment: Mapping[str, str] | None = None) -> Iterator[Pods]:
    """`documents` are what the chart makes; the pods' output is in `directory`."""
    pods = Pods(documents, directory, environment or {})
    try:
        pods.start_head()
        pods.start_worker()
        yield pods
    finally:
        pods.end()


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]
