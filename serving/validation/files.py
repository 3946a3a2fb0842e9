"""Any file that the service is run from: its own configuration, one for Ray Serve, or manifests for Kubernetes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from serving.config import ConfigError, ServiceConfig, parse_config
from serving.validation.findings import Finding
from serving.validation.kuberay import (
    KINDS,
    check_kuberay,
    check_times,
    cluster_of,
    has_secrets,
    mounted_paths,
    node_groups,
)
from serving.validation.placement import Demand, NodeGroup, check_placement
from serving.validation.service import check_service

# Ray's names for accelerators, as `ray.io/accelerator-type` has them.
GPU_GIB: Mapping[str, float] = {
    "T4": 16,
    "A10G": 24,
    "L4": 24,
    "RTX-4090": 24,
    "A100": 40,
    "A100-40G": 40,
    "A100-80G": 80,
    "L40S": 48,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}
# Rendered charts are long.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_STAGES = {"text-encoder": "text_encoder", "denoiser": "denoiser", "decoder": "decoder"}


def check_file(path: Path, gpu_gib: float | None = None) -> list[Finding]:
    """Everything that is wrong with it; `gpu_gib` is the memory of GPUs that the file doesn't name.

    Raises `ConfigError` for a file that isn't YAML.
    """
    try:
        documents = [
            each for each in yaml.load_all(path.read_text(encoding="utf-8"), Loader=_LOADER) if each is not None
        ]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not documents:
        documents = [{}]
    found = []
    for document in documents:
        if not isinstance(document, dict):
            found.append(Finding("", "a mapping was expected"))
        elif "kind" in document:
            found += _manifest(document, gpu_gib)
        elif "applications" in document:
            found += _serve(document, [], (), gpu_gib)[0]
        else:
            found += _service(document, gpu_gib)
    return found


def _service(values: Mapping[str, Any], gpu_gib: float | None) -> list[Finding]:
    try:
        config = parse_config(values, "")
    except ConfigError as error:
        return [Finding("", str(error).removeprefix(": "))]
    return check_service(config, dict.fromkeys(_STAGES.values(), gpu_gib) if gpu_gib else {})


def _serve(
    values: Any, groups: list[NodeGroup], mounted: tuple[str, ...], gpu_gib: float | None, *, secrets: bool = False
) -> tuple[list[Finding], ServiceConfig | None]:
    from serving.deployments.serve_file import check_serve_file

    file = check_serve_file(values)
    found = list(file.findings)
    if groups:
        found += check_placement(file.demands, groups)
    if file.config is not None:
        found += check_service(file.config, _gpus(file.demands, groups, gpu_gib), mounted, secrets=secrets)
    return found, file.config


def _manifest(document: Mapping[str, Any], gpu_gib: float | None) -> list[Finding]:
    if document["kind"] not in KINDS:
        return []
    name = f"{document['kind']}/{(document.get('metadata') or {}).get('name', '')}"
    found = check_kuberay(document)
    cluster, _ = cluster_of(document)
    if document["kind"] == "RayService" and cluster is not None:
        text = document["spec"].get("serveConfigV2") or ""
        place = "spec.serveConfigV2"
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            found.append(Finding(place, f"not YAML: {' '.join(str(error).split())}"))
        else:
            groups, mounted = node_groups(cluster), mounted_paths(cluster)
            served, config = _serve(values, groups, mounted, gpu_gib, secrets=has_secrets(cluster))
            found += [each.under(place) for each in served]
            if config is not None:
                found += check_times(document, config.graceful_shutdown_seconds)
    return [each.under(name) for each in found]


def _gpus(demands: list[Demand], groups: list[NodeGroup], gpu_gib: float | None) -> dict[str, float]:
    """The smallest GPU that each stage may meet."""
    found: dict[str, float] = {}
    for demand in demands:
        stage = next((key for suffix, key in _STAGES.items() if demand.name.endswith(f"-{suffix}")), None)
        if stage is None or not demand.num_gpus:
            continue
        types = [group.labels.get("ray.io/accelerator-type", "") for group in groups if group.takes(demand)]
        known = [GPU_GIB[name] for name in types if name in GPU_GIB] or ([gpu_gib] if gpu_gib else [])
        if known:
            found[stage] = min(known)
    return found
