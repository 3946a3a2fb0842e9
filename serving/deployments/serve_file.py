"""A Serve configuration file, checked as Ray does not: it drops keys that it doesn't know without a word."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import RayActorOptionsSchema, ServeDeploySchema

from serving.config import ConfigError, ServiceConfig, parse_config
from serving.validation.findings import Finding, joined, strangers
from serving.validation.placement import Demand, demands_of

BUILD_APP = "serving.deployments.app:build_app"
# What Ray keeps as plain dictionaries, and reads as these.
_READ_AS: Mapping[str, type[BaseModel]] = {
    "autoscaling_config": AutoscalingConfig,
    "autoscaling_policy": AutoscalingPolicy,
    "ray_actor_options": RayActorOptionsSchema,
}


@dataclass(frozen=True, slots=True)
class ServeFile:
    """What a file says: this service's configuration, if it is of this service, and what its deployments ask for."""

    config: ServiceConfig | None
    demands: list[Demand]
    findings: list[Finding]


def check_serve_file(values: Any) -> ServeFile:
    if not isinstance(values, dict):
        return ServeFile(None, [], [Finding("", "a Serve configuration is a mapping with `applications`")])
    found = _unknown(ServeDeploySchema, values, "")
    try:
        ServeDeploySchema.model_validate(values)
    except ValidationError as error:
        found += [Finding(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
        return ServeFile(None, [], found)
    config: ServiceConfig | None = None
    demands: list[Demand] = []
    for index, application in enumerate(values["applications"]):
        where = f"applications[{index}]"
        if application.get("import_path") != BUILD_APP:
            continue
        try:
            config = parse_config(application.get("args") or {}, f"{where}.args")
        except ConfigError as error:
            found.append(Finding(f"{where}.args", str(error).removeprefix(f"{where}.args: ")))
            continue
        demands = demands_of(config)
        found += _overrides(application.get("deployments") or [], demands, config, where)
    request_timeout = (values.get("http_options") or {}).get("request_timeout_s")
    if config is not None and request_timeout and request_timeout < config.graceful_shutdown_seconds:
        message = f"ends a stream after {request_timeout:g} s, before graceful_shutdown_seconds: leave it out"
        found.append(Finding("http_options.request_timeout_s", message))
    return ServeFile(config, demands, found)


def _overrides(deployments: list[Any], demands: list[Demand], config: ServiceConfig, where: str) -> list[Finding]:
    """Options in the file take the place of the configuration's own."""
    found = []
    names = {demand.name for demand in demands}
    for index, deployment in enumerate(deployments):
        place = f"{where}.deployments[{index}]"
        if deployment.get("name") not in names:
            message = f"there is no deployment {deployment.get('name')!r}; there are {', '.join(sorted(names))}"
            found.append(Finding(f"{place}.name", message))
        grace = deployment.get("graceful_shutdown_timeout_s")
        if grace is not None and grace < config.graceful_shutdown_seconds:
            message = f"is less than graceful_shutdown_seconds ({config.graceful_shutdown_seconds:g})"
            found.append(Finding(f"{place}.graceful_shutdown_timeout_s", message))
        for key in ("num_replicas", "ray_actor_options", "autoscaling_config"):
            if key in deployment:
                message = "is set by the service's own configuration, under `args`: placement is checked against that"
                found.append(Finding(f"{place}.{key}", message, certain=False))
    return found


def _unknown(model: type[BaseModel], values: Any, where: str) -> list[Finding]:
    """Keys that the model doesn't have, in it and in the models inside."""
    if not isinstance(values, dict):
        return []
    found = strangers(values, model.model_fields, where)
    for key, value in values.items():
        if key not in model.model_fields:
            continue
        place = joined(where, key)
        inner = _READ_AS.get(key) or _model_in(model.model_fields[key].annotation)
        if inner is None:
            continue
        if isinstance(value, list):
            for index, each in enumerate(value):
                found += _unknown(inner, each, f"{place}[{index}]")
        else:
            found += _unknown(inner, value, place)
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in `Optional[List[Model]]` and the like."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for each in typing.get_args(annotation) if (found := _model_in(each))), None)
