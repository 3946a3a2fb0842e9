"""A RayService, RayCluster or RayJob: its keys, the rules of KubeRay's own webhook, and times that fit each other.

The rules are those of KubeRay 1.7's `ray-operator/controllers/ray/utils/validation.go`, with the feature gates that are
on by default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from serving.validation.findings import Finding, joined, strangers
from serving.validation.placement import NodeGroup

KINDS = ("RayService", "RayCluster", "RayJob")
_CLUSTER_OF = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}
_NAME_LENGTH = {"RayService": 47, "RayCluster": 55, "RayJob": 47}
# Of the custom resource definitions; a test compares them. Of what isn't here any key is let through.
KEYS: Mapping[str, tuple[str, ...]] = {
    "service": (
        "deploymentUnhealthySecondThreshold",
        "excludeHeadPodFromServeSvc",
        "managedBy",
        "rayClusterConfig",
        "rayClusterDeletionDelaySeconds",
        "serveConfigV2",
        "serveService",
        "serviceUnhealthySecondThreshold",
        "suspend",
        "upgradeStrategy",
    ),
    "cluster": (
        "authOptions",
        "autoscalerOptions",
        "enableInTreeAutoscaling",
        "gcsFaultToleranceOptions",
        "headGroupSpec",
        "headServiceAnnotations",
        "historyServerOptions",
        "managedBy",
        "networkPolicy",
        "rayVersion",
        "suspend",
        "tlsOptions",
        "upgradeStrategy",
        "workerGroupSpecs",
    ),
    "head": (
        "enableIngress",
        "headService",
        "ingressOptions",
        "labels",
        "rayStartParams",
        "resources",
        "serviceType",
        "template",
    ),
    "worker": (
        "groupName",
        "idleTimeoutSeconds",
        "labels",
        "maxReplicas",
        "minReplicas",
        "numOfHosts",
        "priority",
        "rayStartParams",
        "replicas",
        "resources",
        "scaleStrategy",
        "suspend",
        "template",
    ),
    "autoscalerOptions": (
        "args",
        "command",
        "env",
        "envFrom",
        "idleTimeoutSeconds",
        "image",
        "imagePullPolicy",
        "resources",
        "securityContext",
        "upscalingMode",
        "version",
        "volumeMounts",
    ),
    "gcsFaultToleranceOptions": (
        "backend",
        "externalStorageNamespace",
        "redisAddress",
        "redisPassword",
        "redisUsername",
        "storage",
    ),
    "authOptions": ("enableK8sTokenAuth", "mode", "secretName"),
    "upgradeStrategy": ("clusterUpgradeOptions", "type"),
}
_UPGRADES = ("None", "NewCluster", "NewClusterWithIncrementalUpgrade")
_DELETION_SECONDS = 60
_HAPROXY_SECONDS = 120.0
_POD_GRACE_SECONDS = 30


def check_kuberay(document: Mapping[str, Any]) -> list[Finding]:
    """Everything that one of `KINDS` can be checked for by itself."""
    kind, spec = document["kind"], document.get("spec") or {}
    found = _name(kind, document.get("metadata") or {})
    cluster, where = cluster_of(document)
    if kind == "RayService":
        found += strangers(spec, KEYS["service"], "spec")
        found += _service(spec)
    if cluster is None:
        if not (kind == "RayJob" and spec.get("clusterSelector")):
            found.append(Finding(where, "there is no cluster"))
        return found
    return found + list(_cluster(cluster, where))


def check_times(document: Mapping[str, Any], graceful_seconds: float) -> list[Finding]:
    """Whether everything that ends replicas waits as long as the service's graceful_shutdown_seconds."""
    found = []
    spec = document["spec"]
    cluster, where = cluster_of(document)
    assert cluster is not None
    delay = spec.get("rayClusterDeletionDelaySeconds", _DELETION_SECONDS)
    if (spec.get("upgradeStrategy") or {}).get("type") != "None" and delay < graceful_seconds:
        message = f"{delay:g} s is less than graceful_shutdown_seconds ({graceful_seconds:g}): an upgrade ends videos"
        found.append(Finding("spec.rayClusterDeletionDelaySeconds", message))
    for index, group in enumerate(cluster.get("workerGroupSpecs") or []):
        place = f"{where}.workerGroupSpecs[{index}]"
        pod = _pod(group)
        grace = pod.get("terminationGracePeriodSeconds", _POD_GRACE_SECONDS)
        if grace < graceful_seconds:
            message = f"{grace:g} s is less than graceful_shutdown_seconds ({graceful_seconds:g}): a drain ends videos"
            found.append(Finding(f"{place}.template.spec.terminationGracePeriodSeconds", message))
    for place, container in _containers(cluster, where):
        environment = {each.get("name"): each.get("value") for each in container.get("env") or []}
        stop = float(environment.get("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S") or _HAPROXY_SECONDS)
        if environment.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and stop < graceful_seconds:
            message = f"HAProxy cuts streams {stop:g} s after any change of replicas; it should be {graceful_seconds:g}"
            found.append(Finding(f"{place}.env.RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", message))
    return found


def cluster_of(document: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    """The cluster's specification, and where it is."""
    key = _CLUSTER_OF.get(document["kind"])
    spec = document.get("spec") or {}
    return (spec.get(key), f"spec.{key}") if key else (spec, "spec")


def node_groups(cluster: Mapping[str, Any]) -> list[NodeGroup]:
    """What Ray will see of the cluster, when every group is at its largest."""
    groups = [_group("head", cluster.get("headGroupSpec") or {}, 1)]
    for worker in cluster.get("workerGroupSpecs") or []:
        most = worker.get("maxReplicas", worker.get("replicas", 1)) * worker.get("numOfHosts", 1)
        groups.append(_group(worker.get("groupName", ""), worker, most))
    return groups


def mounted_paths(cluster: Mapping[str, Any]) -> tuple[str, ...]:
    """Where volumes are in any of the pods."""
    mounts = [mount for _, container in _containers(cluster, "") for mount in container.get("volumeMounts") or []]
    return tuple(sorted({mount["mountPath"] for mount in mounts}))


def has_secrets(cluster: Mapping[str, Any]) -> bool:
    """Whether a pod's environment comes from somewhere that can't be seen."""
    return any(container.get("envFrom") for _, container in _containers(cluster, ""))


def _group(name: str, group: Mapping[str, Any], count: int) -> NodeGroup:
    parameters, resources = group.get("rayStartParams") or {}, group.get("resources") or {}
    limits: Mapping[str, Any] = {}
    if containers := _pod(group).get("containers"):
        asked = containers[0].get("resources") or {}
        limits = {**(asked.get("requests") or {}), **(asked.get("limits") or {})}
    cpus = resources.get("CPU") or parameters.get("num-cpus") or math.ceil(quantity(limits.get("cpu", 1)))
    gpus = resources.get("GPU") or parameters.get("num-gpus") or quantity(limits.get("nvidia.com/gpu", 0))
    return NodeGroup(name, float(cpus), float(gpus), count, group.get("labels") or {})


def quantity(value: Any) -> float:
    """Kubernetes' numbers: `500m`, `2`, `8Gi`."""
    match = re.fullmatch(r"([0-9.]+)(m|[kMGT]i?|)", str(value))
    if match is None:
        return 0.0
    suffix = match[2]
    if suffix == "m":
        return float(match[1]) / 1000
    base = 1024 if suffix.endswith("i") else 1000
    power = " kMGT".index(suffix[0]) if suffix else 0
    return float(match[1]) * float(base**power)


def _pod(group: Mapping[str, Any]) -> Mapping[str, Any]:
    pod: Mapping[str, Any] = (group.get("template") or {}).get("spec") or {}
    return pod


def _containers(cluster: Mapping[str, Any], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    groups = [("headGroupSpec", cluster.get("headGroupSpec") or {})]
    groups += [(f"workerGroupSpecs[{n}]", group) for n, group in enumerate(cluster.get("workerGroupSpecs") or [])]
    for place, group in groups:
        for index, container in enumerate(_pod(group).get("containers") or []):
            yield joined(where, f"{place}.template.spec.containers[{index}]"), container


def _name(kind: str, metadata: Mapping[str, Any]) -> list[Finding]:
    name = str(metadata.get("name", ""))
    if len(name) <= _NAME_LENGTH[kind] and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        return []
    return [Finding("metadata.name", f"must be a DNS label of at most {_NAME_LENGTH[kind]} characters, not {name!r}")]


def _service(spec: Mapping[str, Any]) -> list[Finding]:
    found = []
    strategy = spec.get("upgradeStrategy") or {}
    found += strangers(strategy, KEYS["upgradeStrategy"], "spec.upgradeStrategy")
    kind = strategy.get("type", "NewCluster")
    if kind not in _UPGRADES:
        found.append(Finding("spec.upgradeStrategy.type", f"must be one of {', '.join(_UPGRADES)}"))
    if kind == _UPGRADES[2]:
        options = strategy.get("clusterUpgradeOptions") or {}
        surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent")
        where = "spec.upgradeStrategy.clusterUpgradeOptions"
        if not (spec.get("rayClusterConfig") or {}).get("enableInTreeAutoscaling"):
            found.append(Finding("spec.rayClusterConfig.enableInTreeAutoscaling", f"is needed for {kind}"))
        if not 0 <= surge <= 100:
            found.append(Finding(f"{where}.maxSurgePercent", "must be between 0 and 100"))
        if step is None or not 0 <= step <= surge:
            found.append(Finding(f"{where}.stepSizePercent", "must be between 0 and maxSurgePercent"))
        if not options.get("intervalSeconds"):
            found.append(Finding(f"{where}.intervalSeconds", "must be more than 0"))
        if not options.get("gatewayClassName"):
            found.append(Finding(f"{where}.gatewayClassName", f"is needed for {kind}"))
    head = (spec.get("rayClusterConfig") or {}).get("headGroupSpec") or {}
    if (head.get("headService") or {}).get("metadata", {}).get("name"):
        found.append(Finding("spec.rayClusterConfig.headGroupSpec.headService.metadata.name", "must not be set"))
    if (head.get("rayStartParams") or {}).get("num-cpus") == "0" and not spec.get("excludeHeadPodFromServeSvc"):
        message = "should be true: a head without work has no replicas to answer with"
        found.append(Finding("spec.excludeHeadPodFromServeSvc", message))
    return found


def _cluster(cluster: Mapping[str, Any], where: str) -> Iterator[Finding]:
    yield from strangers(cluster, KEYS["cluster"], where)
    for key in ("autoscalerOptions", "gcsFaultToleranceOptions", "authOptions"):
        yield from strangers(cluster.get(key) or {}, KEYS[key], f"{where}.{key}")
    head = cluster.get("headGroupSpec") or {}
    yield from strangers(head, KEYS["head"], f"{where}.headGroupSpec")
    yield from _any_group(head, f"{where}.headGroupSpec")
    scaling = bool(cluster.get("enableInTreeAutoscaling"))
    second = scaling and (cluster.get("autoscalerOptions") or {}).get("version", "v2") == "v2"
    groups = [(f"{where}.headGroupSpec", head)]
    for index, worker in enumerate(cluster.get("workerGroupSpecs") or []):
        place = f"{where}.workerGroupSpecs[{index}]"
        groups.append((place, worker))
        yield from strangers(worker, KEYS["worker"], place)
        yield from _any_group(worker, place)
        yield from _counts(worker, place, scaling)
    for place, group in groups:
        if second and _pod(group).get("restartPolicy", "Never") != "Never":
            yield Finding(f"{place}.template.spec.restartPolicy", "must be Never or unset with autoscaler v2")
    yield from _fault_tolerance(cluster, where)
    authentication = cluster.get("authOptions") or {}
    if authentication.get("enableK8sTokenAuth"):
        yield Finding(f"{where}.authOptions.enableK8sTokenAuth", "isn't supported for a RayService or a RayJob")
    version = tuple(int(part) for part in re.findall(r"\d+", str(cluster.get("rayVersion", "")))[:2])
    if authentication.get("mode") == "token" and version < (2, 52):
        yield Finding(f"{where}.rayVersion", "token authentication needs Ray 2.52 or later")


def _any_group(group: Mapping[str, Any], where: str) -> Iterator[Finding]:
    if not _pod(group).get("containers"):
        yield Finding(f"{where}.template.spec.containers", "there must be one")
    parameters = group.get("rayStartParams") or {}
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(parameters):
        yield Finding(f"{where}.resources", "resources must not be in rayStartParams too")
    if "labels" in parameters:
        yield Finding(f"{where}.rayStartParams.labels", "isn't supported: use the group's `labels`")
    for key, value in (group.get("labels") or {}).items():
        if not re.fullmatch(r"([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", key):
            yield Finding(f"{where}.labels", f"{key!r} can't be a label's name")
        if not re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?", str(value)):
            yield Finding(f"{where}.labels.{key}", f"{value!r} can't be a label's value")


def _counts(worker: Mapping[str, Any], where: str, scaling: bool) -> Iterator[Finding]:
    least, most = worker.get("minReplicas"), worker.get("maxReplicas")
    if not scaling and (least is None or most is None):
        yield Finding(where, "minReplicas and maxReplicas must be set when autoscaling is disabled")
    for key in ("minReplicas", "maxReplicas"):
        if (worker.get(key) or 0) < 0:
            yield Finding(f"{where}.{key}", "must not be negative")
    if least is not None and most is not None and least > most:
        yield Finding(f"{where}.minReplicas", "must not be more than maxReplicas")
    if scaling and worker.get("suspend"):
        yield Finding(f"{where}.suspend", "can't be used with autoscaling")
    replicas = worker.get("replicas")
    if replicas is not None and most is not None and not (least or 0) <= replicas <= most:
        yield Finding(f"{where}.replicas", "must be between minReplicas and maxReplicas")


def _fault_tolerance(cluster: Mapping[str, Any], where: str) -> Iterator[Finding]:
    options = cluster.get("gcsFaultToleranceOptions")
    head = cluster.get("headGroupSpec") or {}
    containers = _pod(head).get("containers") or [{}]
    environment = {each.get("name") for each in containers[0].get("env") or []}
    place = f"{where}.gcsFaultToleranceOptions"
    if options is None:
        if "RAY_REDIS_ADDRESS" in environment:
            yield Finding(place, "is needed: the head has RAY_REDIS_ADDRESS")
        return
    for name in sorted(environment & {"REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS"}):
        yield Finding(place, f"takes the place of {name} in the head's environment")
    if {"redis-password", "redis-username"} & set(head.get("rayStartParams") or {}):
        yield Finding(place, "takes the place of redis-… in rayStartParams")
    if options.get("backend", "redis") == "redis" and options.get("storage"):
        yield Finding(f"{place}.storage", "is for the backend rocksdb")
    if options.get("backend") == "rocksdb":
        message = "KubeRay needs its feature gate GCSFaultToleranceEmbeddedStorage"
        yield Finding(f"{place}.backend", message, certain=False)
        for key in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
            if options.get(key):
                yield Finding(f"{place}.{key}", "must not be set with the backend rocksdb")
