"""The chart's own Serve configuration on a cluster of several nodes, each stage on GPUs of its own (made up, on one
machine): load raises the denoisers first and the decoders after them, and idle lets them go."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from k8s import render
from serving.config import MINI_BUNDLE
from serving.deployments.local import free_port

# As production's values call theirs.
MODEL = "wan"
GPUS = {"text_encoder": 1, "denoiser": 3, "decoder": 2}
VIDEOS = int(os.environ.get("RUSHES_CLUSTER_VIDEOS", "5"))
# Read by Ray's processes when they start. Metrics come sooner, and a busy machine isn't taken for a dead one.
ENVIRONMENT = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_worker_register_timeout_seconds": "180",
}


def serve_config(tmp_path: Path, port: int) -> dict[str, Any]:
    """What the chart makes of production's values with the bundled model, for this machine."""

    def scaled(most: int) -> dict[str, Any]:
        scaling = {"min_replicas": 1, "max_replicas": most, "upscale_delay_seconds": 0, "downscale_delay_seconds": 1}
        return {"num_cpus": 0.1, "num_gpus": 1, "provider": "CPUExecutionProvider", "autoscaling": scaling}

    values = {
        "config": {
            "models": {MODEL: str(MINI_BUNDLE)},
            "artifacts_url": f"file://{tmp_path}/artifacts",
            "data_dir": str(tmp_path / "data"),
            "require_keys": False,
            "observability": {"traces_share": 0},
            "runner": {"num_cpus": 0.1, "replicas": 1, "max_videos": VIDEOS},
            "api": {"num_cpus": 0.1, "replicas": 1},
            **{stage: scaled(most) for stage, most in GPUS.items()},
        },
        "autoscaling": {"targetSeconds": 1, "coldStartSeconds": 0},
        "engines": {"enabled": False},
    }
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    production = str(render.CHART / "values-production.yaml")
    made = yaml.safe_load_all(render.helm_template("-f", production, "-f", str(file)))
    (service,) = [document for document in made if document and document["kind"] == "RayService"]
    config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    # All nodes are one machine here, with one port.
    return config | {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return serve_config(tmp_path, free_port())


@pytest.fixture
def cluster(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    import ray
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 100 << 20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    try:
        made.add_node(num_cpus=4, labels={"rushes.dev/stage": "front"}, wait=False, **memory)
        for stage, gpus in GPUS.items():
            made.add_node(num_cpus=4, num_gpus=gpus, labels={"rushes.dev/stage": stage}, wait=False, **memory)
        made.wait_for_nodes(timeout=120)
        made.connect()
        yield
    finally:
        ray.shutdown()
        made.shutdown()


def targets(serve: Any) -> tuple[int, int]:
    """How many denoisers and decoders Serve wants: those that go are still counted among the states."""
    deployments = serve.status().applications["rushes"].deployments
    counts = []
    for stage in ("denoiser", "decoder"):
        states = deployments[f"{MODEL}-{stage}"].replica_states
        counts.append(sum(count for state, count in states.items() if state != "STOPPING"))
    return counts[0], counts[1]


def wait_until_it_runs(serve: Any, http: httpx.Client) -> None:
    while True:
        if application := serve.status().applications.get("rushes"):
            assert application.status != "DEPLOY_FAILED", application
            with suppress(httpx.TransportError):
                if application.status == "RUNNING" and http.get("/health").is_success:
                    return
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_load_raises_denoisers_then_decoders_and_idle_lowers_them(cluster: None, config: dict[str, Any]) -> None:
    from ray import serve
    from ray.serve import context
    from ray.serve.schema import ServeDeploySchema

    serve.start(proxy_location="HeadOnly", http_options=config["http_options"])
    try:
        # Not blocking: Ray waits a minute and no longer.
        context._get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
        with httpx.Client(base_url=f"http://127.0.0.1:{config['http_options']['port']}", timeout=60) as http:
            wait_until_it_runs(serve, http)
            assert targets(serve) == (1, 1)
            asked = {"prompt": "a red ball bouncing", "seconds": 2, "num_inference_steps": 40}
            seeds = itertools.count()

            def create() -> str:
                return str(http.post("/v1/videos", json=asked | {"seed": next(seeds)}).json()["id"])

            trace = [(1, 1)]
            unfinished: set[str] = set()
            # However fast this machine is, the load goes on until it has done something.
            while unfinished or max(denoisers for denoisers, _ in trace) == 1:
                if max(denoisers for denoisers, _ in trace) == 1:
                    unfinished |= {create() for _ in range(VIDEOS - len(unfinished))}
                for video_id in list(unfinished):
                    video = http.get(f"/v1/videos/{video_id}").json()
                    assert video["status"] != "failed", video["error"]
                    if video["status"] == "completed":
                        unfinished.discard(video_id)
                trace.append(targets(serve))
                time.sleep(0.1)
        while trace[-1] != (1, 1):
            trace.append(targets(serve))
            time.sleep(0.1)
    finally:
        serve.shutdown()
    steps = [step for step, _ in itertools.groupby(trace)]
    said = f"denoisers and decoders: {steps}"
    assert max(denoisers for denoisers, _ in steps) > 1, said
    first_denoiser = next(n for n, (denoisers, _) in enumerate(steps) if denoisers > 1)
    first_decoder = next((n for n, (_, decoders) in enumerate(steps) if decoders > 1), len(steps))
    assert first_denoiser <= first_decoder, said
    # The decoder has the smaller part of the work.
    assert max(decoders for _, decoders in steps) <= max(denoisers for denoisers, _ in steps), said
    print(said)
