"""`rushes validate`: what is wrong is said before anything is applied, and what is right passes in silence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from serving.cli import app
from serving.config import ConfigError, ServiceConfig, parse_config
from serving.deployments.serve_file import check_serve_file
from serving.validation.files import check_file
from serving.validation.findings import Finding
from serving.validation.kuberay import KEYS, quantity
from serving.validation.placement import Demand, NodeGroup, check_placement, demands_of, matches
from serving.validation.service import check_service

BESIDE = Path(__file__).parents[3] / "shared" / "contracts" / "kuberay"
CONTRACTS = Path(os.environ.get("RUSHES_KUBERAY_CRDS", BESIDE))


def said(found: list[Finding]) -> str:
    return "\n".join(f"{finding.where}: {finding.message}" for finding in found)


def serve_file(**args: Any) -> dict[str, Any]:
    application = {
        "name": "rushes",
        "route_prefix": "/",
        "import_path": "serving.deployments.app:build_app",
        "args": args,
    }
    return {"http_options": {"host": "0.0.0.0"}, "applications": [application]}


def pod(cpu: str, **more: Any) -> dict[str, Any]:
    container = {"name": "ray", "image": "rushes:1", "resources": {"limits": {"cpu": cpu, "memory": "8Gi"}}}
    return {"spec": {"terminationGracePeriodSeconds": 900, "containers": [container], **more}}


def ray_service(**args: Any) -> dict[str, Any]:
    """A right one."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "rushes"},
        "spec": {
            "serveConfigV2": yaml.safe_dump(serve_file(**args)),
            "excludeHeadPodFromServeSvc": True,
            "rayClusterDeletionDelaySeconds": 900,
            "rayClusterConfig": {
                "rayVersion": "2.60.0",
                "enableInTreeAutoscaling": True,
                "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": pod("2")},
                "workerGroupSpecs": [
                    {
                        "groupName": "all",
                        "minReplicas": 1,
                        "maxReplicas": 2,
                        "template": pod("2", restartPolicy="Never"),
                    }
                ],
            },
        },
    }


def checked(tmp_path: Path, document: Any) -> list[Finding]:
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump(document))
    return check_file(file)


def test_what_is_right_passes_in_silence(tmp_path: Path) -> None:
    assert checked(tmp_path, {}) == []
    assert checked(tmp_path, {"graceful_shutdown_seconds": 700}) == []
    assert checked(tmp_path, serve_file()) == []
    assert checked(tmp_path, ray_service()) == []


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        (lambda f: f.update(proxy_locatoin="HeadOnly"), "proxy_locatoin", "is 'proxy_location' meant?"),
        (lambda f: f["http_options"].update(prot=8000), "http_options.prot", "is 'port' meant?"),
        (lambda f: f["http_options"].update(request_timeout_s=60), "request_timeout_s", "ends a stream after 60 s"),
        (lambda f: f["applications"][0].update(route_prefx="/"), "applications[0].route_prefx", "route_prefix"),
        (lambda f: f["applications"][0]["args"].update(denoiserr={}), "applications[0].args", "no such key"),
        (
            lambda f: f["applications"][0].update(deployments=[{"name": "mini-decoder", "max_ongoing_requets": 3}]),
            "deployments[0].max_ongoing_requets",
            "is 'max_ongoing_requests' meant?",
        ),
        (
            lambda f: f["applications"][0].update(
                deployments=[{"name": "mini-decoder", "autoscaling_config": {"min_replica": 1}}]
            ),
            "deployments[0].autoscaling_config.min_replica",
            "is 'min_replicas' meant?",
        ),
        (
            lambda f: f["applications"][0].update(deployments=[{"name": "decoder"}]),
            "deployments[0].name",
            "no deployment",
        ),
        (
            lambda f: f["applications"][0].update(deployments=[{"name": "runner", "graceful_shutdown_timeout_s": 20}]),
            "graceful_shutdown_timeout_s",
            "less than graceful_shutdown_seconds (600)",
        ),
    ],
)
def test_a_serve_file_is_read_strictly(change: Callable[[Any], None], where: str, message: str) -> None:
    file = serve_file()
    change(file)
    found = check_serve_file(file).findings
    assert any(where in each.where and message in each.message for each in found), said(found)


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        (lambda s: s.update(excludeHeadPodFromServeSVC=True), "excludeHeadPodFromServeSVC", "no such key"),
        (lambda s: s.update(rayClusterDeletionDelaySeconds=60), "rayClusterDeletionDelaySeconds", "60 s is less than"),
        (lambda s: s.pop("excludeHeadPodFromServeSvc"), "excludeHeadPodFromServeSvc", "should be true"),
        (lambda s: s.update(upgradeStrategy={"type": "Rolling"}), "upgradeStrategy.type", "must be one of"),
        (
            lambda s: s.update(upgradeStrategy={"type": "NewClusterWithIncrementalUpgrade"}),
            "clusterUpgradeOptions.gatewayClassName",
            "is needed",
        ),
        (lambda s: s.update(serveConfigV2="a: [b"), "serveConfigV2", "not YAML"),
    ],
)
def test_a_rayservice_is_checked(tmp_path: Path, change: Callable[[Any], None], where: str, message: str) -> None:
    document = ray_service()
    change(document["spec"])
    found = checked(tmp_path, document)
    assert any(where in each.where and message in each.message for each in found), said(found)


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        (lambda c: c["workerGroupSpecs"][0].update(minReplica=1), "workerGroupSpecs[0].minReplica", "'minReplicas'"),
        (lambda c: c["workerGroupSpecs"][0].update(minReplicas=3), "minReplicas", "not be more than maxReplicas"),
        (
            lambda c: c["workerGroupSpecs"][0]["template"]["spec"].update(restartPolicy="Always"),
            "restartPolicy",
            "Never",
        ),
        (
            lambda c: c["workerGroupSpecs"][0]["template"]["spec"].update(terminationGracePeriodSeconds=30),
            "terminationGracePeriodSeconds",
            "30 s is less than",
        ),
        (
            lambda c: c["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(
                env=[{"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"}]
            ),
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S",
            "HAProxy cuts streams 120 s",
        ),
        (
            lambda c: c["headGroupSpec"].update(resources={"CPU": "0"}),
            "headGroupSpec.resources",
            "must not be in rayStartParams too",
        ),
        (
            lambda c: c["headGroupSpec"]["rayStartParams"].update(labels="a=b"),
            "rayStartParams.labels",
            "isn't supported",
        ),
        (lambda c: c["workerGroupSpecs"][0].update(labels={"a b": "c"}), "labels", "can't be a label's name"),
        (lambda c: c.update(authOptions={"mode": "token"}, rayVersion="2.40.0"), "rayVersion", "2.52"),
        (lambda c: c.update(authOptions={"enableK8sTokenAuth": True}), "enableK8sTokenAuth", "isn't supported"),
        (lambda c: c.update(gcsFaultToleranceOptions={"storage": {"size": "1Gi"}}), "storage", "rocksdb"),
        (
            lambda c: c["headGroupSpec"]["template"]["spec"]["containers"][0].update(
                env=[{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}]
            ),
            "gcsFaultToleranceOptions",
            "is needed",
        ),
        (
            lambda c: c.update(
                enableInTreeAutoscaling=False, workerGroupSpecs=[{"groupName": "a", "template": pod("4")}]
            ),
            "workerGroupSpecs[0]",
            "must be set when autoscaling is disabled",
        ),
        (
            lambda c: c["workerGroupSpecs"][0].update(template=pod("0")),
            "mini-denoiser",
            "no worker group has a node for a replica of it (0.5 CPU, 0 GPU)",
        ),
    ],
)
def test_its_cluster_is_checked(tmp_path: Path, change: Callable[[Any], None], where: str, message: str) -> None:
    document = ray_service()
    change(document["spec"]["rayClusterConfig"])
    found = checked(tmp_path, document)
    assert any(where in each.where and message in each.message for each in found), said(found)


def test_keys_are_those_of_the_custom_resource_definition() -> None:
    if not CONTRACTS.exists():
        pytest.skip(f"there is no {CONTRACTS}: RUSHES_KUBERAY_CRDS may name a folder with KubeRay's definitions")
    text = (CONTRACTS / "ray.io_rayservices.yaml").read_bytes()
    versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
    schema = next(each for each in versions if each["name"] == "v1")["schema"]["openAPIV3Schema"]
    service = schema["properties"]["spec"]["properties"]
    cluster = service["rayClusterConfig"]["properties"]
    assert {
        "service": set(service),
        "cluster": set(cluster),
        "head": set(cluster["headGroupSpec"]["properties"]),
        "worker": set(cluster["workerGroupSpecs"]["items"]["properties"]),
        "upgradeStrategy": set(service["upgradeStrategy"]["properties"]),
        **{
            key: set(cluster[key]["properties"])
            for key in ("autoscalerOptions", "gcsFaultToleranceOptions", "authOptions")
        },
    } == {key: set(names) for key, names in KEYS.items()}


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    (finding,) = checked(tmp_path, {"models": {"wan": str(tmp_path / "nothing")}})
    assert finding.where == "models.wan"
    assert finding.certain


def test_a_bundle_in_a_volume_is_only_warned_about(tmp_path: Path) -> None:
    document = ray_service(models={"wan": "/bundles/wan"})
    worker = document["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    worker["template"]["spec"]["containers"][0]["volumeMounts"] = [{"name": "bundles", "mountPath": "/bundles"}]
    (finding,) = checked(tmp_path, document)
    assert "volume" in finding.message
    assert not finding.certain


def test_a_video_that_no_call_can_hold() -> None:
    (finding,) = check_service(parse_config({"denoiser": {"max_tokens": 64}}), {})
    assert "denoiser.max_tokens is 64" in finding.message


def test_a_model_beyond_the_gpu() -> None:
    config = parse_config({"denoiser": {"num_gpus": 0.5, "provider": "CUDAExecutionProvider"}})
    assert check_service(config, {"denoiser": 1.0}) == []
    (finding,) = check_service(config, {"denoiser": 0.01})
    assert "don't fit into 80% of 0.0 GiB" in finding.message


def test_a_lease_that_outlives_its_runner() -> None:
    (finding,) = check_service(parse_config({"lease_seconds": 60, "graceful_shutdown_seconds": 50}), {})
    assert finding.where == "lease_seconds"


@pytest.mark.parametrize(
    ("value", "wanted", "holds"),
    [
        ("a", "a", True),
        ("a", "b", False),
        (None, "a", False),
        ("a", "!a", False),
        (None, "!a", True),
        ("b", "in(a, b)", True),
        ("c", "!in(a, b)", True),
    ],
)
def test_label_selectors_are_rays(value: str | None, wanted: str, holds: bool) -> None:
    assert matches(value, wanted) is holds


def test_replicas_are_packed() -> None:
    stage = Demand("denoiser", 1, 1, {"stage": "denoiser"}, least=2, most=3)
    other = Demand("api", 1, 0, {}, least=1, most=1)
    gpus = NodeGroup("gpu", 4, 2, 1, {"stage": "denoiser"})
    (finding,) = check_placement([stage, other], [gpus])
    assert not finding.certain
    assert check_placement([stage, other], [NodeGroup("gpu", 4, 2, 2, {"stage": "denoiser"})]) == []
    (finding,) = check_placement([stage], [NodeGroup("gpu", 4, 1, 1, {"stage": "denoiser"})])
    assert finding.certain
    (finding,) = check_placement([stage], [NodeGroup("gpu", 4, 8, 1, {"stage": "decoder"})])
    assert "stage=denoiser" in finding.message


def test_an_upgrade_in_place_needs_room_beside_what_is_there(tmp_path: Path) -> None:
    api = Demand("api", 1, 0, {}, least=2, most=2, surge=2)
    stage = Demand("denoiser", 2, 1, {}, least=1, most=1)
    gpu = NodeGroup("gpu", 2, 1, 1)
    (finding,) = check_placement([api, stage], [gpu, NodeGroup("front", 3, 0, 1)])
    assert (finding.where, finding.certain) == ("api", False)
    assert "no room for an upgrade in place" in finding.message
    assert check_placement([api, stage], [gpu, NodeGroup("front", 4, 0, 1)]) == []
    retiring = Demand("denoiser-retiring", 2, 1, {}, least=0, most=1, surge=1)
    found = check_placement([stage, retiring], [gpu])
    assert [(finding.where, finding.certain) for finding in found] == [("denoiser-retiring", False)] * 2
    (finding,) = checked(tmp_path, ray_service(api={"num_cpus": 1.5}))
    assert "upgrade in place" in finding.message


def test_every_deployment_is_placed() -> None:
    names = [demand.name for demand in demands_of(ServiceConfig())]
    assert names == ["mini-text-encoder", "mini-denoiser", "mini-decoder", "runner", "api"]
    both = demands_of(ServiceConfig(retiring={"mini": Path("before")}))
    assert {demand.name for demand in both if demand.surge} == {
        *("mini-retiring-text-encoder", "mini-retiring-denoiser", "mini-retiring-decoder"),
        *("runner", "api"),
    }


@pytest.mark.parametrize(("text", "value"), [("500m", 0.5), ("2", 2), ("8Gi", 8 * 2**30), ("1.5k", 1500), ("x", 0)])
def test_quantities_are_kubernetes(text: str, value: float) -> None:
    assert quantity(text) == value


def test_the_command(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("port: 9000\n")
    bad.write_text("prot: 9000\n")
    assert CliRunner().invoke(app, ["validate", str(good)]).exit_code == 0
    result = CliRunner().invoke(app, ["validate", str(good), str(bad)])
    assert result.exit_code == 2
    assert f"{bad}: error: prot: there is no such key" in result.stdout
    bad.write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        check_file(bad)
