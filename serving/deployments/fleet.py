"""The models of a running service: loaded, unloaded and rolled, each as a Ray Serve application of its own.

Ray Serve (2.60) restarts every deployment of an application that is run again, whether it changed or not: each gets a
new random version. So each model is an application, named after its content, and so are runner and API. A change starts
the new models, then another runner, then another API; and lets the old models go when the old runner has finished its
videos on them. In this order: a runner fails a video whose model it doesn't know. A replica of the old API stays while
it has an interactive session, and ends that when the session's model is to go.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.bundle import Bundle
from serving.config import ConfigError, ServiceConfig
from serving.deployments.app import build_api, build_fused, build_model, build_runner, checked
from serving.deployments.remote import StageHandles, StageName, stage_name

API, RUNNER = "rushes", "rushes-runner"
# What a change of models may change; anything else needs a new start.
_CHANGEABLE = {"models", "model_aliases", "text_encoder", "denoiser", "decoder"}
_LOOK_SECONDS = 0.2
# Longer than sessions are given to end by themselves.
_SESSIONS_SECONDS = 90.0


class FleetError(OSError):
    """A model did not start; what was served before still is."""


@dataclass(frozen=True, slots=True)
class _Model:
    """A model as it is served: the application's name changes with the bundle's content and with the settings."""

    name: str
    bundle: Bundle
    app: str


class Fleet:
    """What runs in this Ray. Calls come one after another; all of them block."""

    def __init__(self, serve: Any) -> None:
        self._serve = serve
        self._config: ServiceConfig | None = None
        self._models: dict[str, _Model] = {}

    def start(self, config: ServiceConfig) -> None:
        """Raises `BundleError` or `ConfigError` before anything starts, `RuntimeError` when a replica doesn't."""
        if config.retiring:
            raise ConfigError("retiring is for Serve files: here an old bundle finishes its videos by itself")
        config = config.resolved()
        models = _models_of(config)
        if config.fused:
            self._serve.run_many([self._target(build_fused(config, door=True), API, route_prefix="/")])
        else:
            # All at once: waiting for each in turn would take several times as long.
            self._serve.run_many([*self._targets(models, config), *self._front(models, config)])
        self._config, self._models = config, models

    def change(self, config: ServiceConfig) -> list[str]:
        """Serve what `config` says from now on; returns what was done, a line each.

        Every new bundle is verified, and its engines have been loaded, before any request meets it. Videos that are
        running end on the models they began with, whose replicas then go, and interactive sessions with their chunk in
        hand. Raises `ConfigError`, `BundleError` or `FleetError`: then what was served before still is.
        """
        assert self._config is not None
        if self._config.fused:
            raise ConfigError("a fused service is changed by a new start, which goes on with every video in hand")
        config = config.resolved()
        _check_changeable(self._config, config)
        models = _models_of(config)
        before = {model.app for model in self._models.values()}
        new = {name: model for name, model in models.items() if model.app not in before}
        said = [f"{'rolled' if name in self._models else 'loaded'} {name}" for name in new]
        said += [f"unloaded {name}" for name in self._models if name not in models]
        if config == self._config and not said:
            return []
        _check_room(len(new), config)
        try:
            if new:
                self._serve.run_many(self._targets(new, config))
        except RuntimeError as error:
            reason = self._why([model.app for model in new.values()]) or _reason(error)
            for model in new.values():
                self._serve.delete(model.app)
            raise FleetError(f"{', '.join(new)} can't be started, so nothing was changed: {reason}") from error
        runner, api = self._front(models, config)
        self._serve.run_many([runner])
        self._replace_api(api, config.api.replicas)
        old = [model for model in self._models.values() if model.app not in {new.app for new in models.values()}]
        self._config, self._models = config, models
        self._wait_for_the_old_runner(config.runner.replicas)
        for model in old:
            self._wait_for_sessions(model)
            self._serve.delete(model.app)
        return said or ["changed"]

    @property
    def served(self) -> dict[str, Path]:
        """Every model's bundle."""
        return {name: model.bundle.root for name, model in self._models.items()}

    def stage(self, model: str, stage: StageName) -> Any:
        """A stage's handle."""
        return self._handle(self._models[model], stage)

    def runner(self) -> Any:
        """The handle of whatever has the videos in hand."""
        fused = self._config is not None and self._config.fused
        return self._existing("fused", API) if fused else self._existing("runner", RUNNER)

    def _targets(self, models: Mapping[str, _Model], config: ServiceConfig) -> list[Any]:
        return [self._target(build_model(m.name, m.bundle, config), m.app) for m in models.values()]

    def _front(self, models: Mapping[str, _Model], config: ServiceConfig) -> list[Any]:
        """Runner and API."""
        stages = {
            name: StageHandles(
                text_encoder=self._handle(model, "text-encoder"),
                denoiser=self._handle(model, "denoiser"),
                decoder=self._handle(model, "decoder"),
            )
            for name, model in models.items()
        }
        return [
            self._target(build_runner(config, stages), RUNNER),
            self._target(build_api(config, self.runner(), stages), API, route_prefix="/"),
        ]

    def _target(self, application: Any, app: str, route_prefix: str | None = None) -> Any:
        from ray.serve.api import RunTarget

        return RunTarget(application, name=app, route_prefix=route_prefix)

    def _handle(self, model: _Model, stage: StageName) -> Any:
        return self._existing(stage_name(model.name, stage), model.app)

    def _existing(self, deployment: str, app: str) -> Any:
        # Unchecked: what runs and what calls it are started at once.
        return self._serve.get_deployment_handle(deployment, app, _check_exists=False)

    def _why(self, apps: list[str]) -> str:
        """What a replica that didn't start raised: in Ray's message, behind the whole traceback."""
        applications = self._serve.status().applications
        for app in apps:
            if app not in applications:
                continue
            for deployment in applications[app].deployments.values():
                raised = [line for line in deployment.message.splitlines() if "Error: " in line]
                if raised:
                    return str(raised[-1].partition("Error: ")[2].strip())
        return ""

    def _replace_api(self, target: Any, replicas: int) -> None:
        """Returns when the new one answers alone: Ray would wait for the old one's last viewer too."""
        old = self._api_replicas()
        self._serve.run_many([target], wait_for_applications_running=False)

        def running() -> list[str]:
            return [id for id, state in self._api_replicas().items() if state == "RUNNING"]

        while len(answering := running()) < replicas or any(id in old for id in answering):
            if self._serve.status().applications[API].status == "DEPLOY_FAILED":
                raise FleetError(f"the API can't be started again: {self._why([API])}")
            time.sleep(_LOOK_SECONDS)

    def _api_replicas(self) -> dict[str, str]:
        """The state of each, by id; those that others have taken the place of are `STOPPING`."""
        details = self._serve.context._get_global_client().get_serve_details()  # no public call tells them apart
        replicas = details["applications"][API]["deployments"]["api"]["replicas"]
        return {replica["replica_id"]: replica["state"] for replica in replicas}

    def _wait_for_sessions(self, model: _Model) -> None:
        """Until those of a model that goes have ended: the API's replicas see to that."""
        from ray.serve.exceptions import RayServeException

        denoiser, until = self._handle(model, "denoiser"), time.monotonic() + _SESSIONS_SECONDS
        with suppress(RayServeException):  # it has no replica
            while sum(denoiser.broadcast("sessions").results()) and time.monotonic() < until:
                time.sleep(_LOOK_SECONDS)

    def _wait_for_the_old_runner(self, replicas: int) -> None:
        """Until only replicas of the new one are there. Ray ends the others after `graceful_shutdown_seconds`."""
        while True:
            states = self._serve.status().applications[RUNNER].deployments["runner"].replica_states
            if {state: count for state, count in states.items() if count} == {"RUNNING": replicas}:
                return
            time.sleep(_LOOK_SECONDS)


def _models_of(config: ServiceConfig) -> dict[str, _Model]:
    """Verified. Raises `BundleError`."""
    settings = json.dumps([stage.model_dump(mode="json") for _, stage in config.stages()])

    def model(name: str, bundle: Bundle) -> _Model:
        content = hashlib.sha256(f"{bundle.root} {bundle.digest} {settings}".encode()).hexdigest()
        return _Model(name, bundle, f"rushes-model-{name}-{content[:8]}")

    return {name: model(name, bundle) for name, bundle in checked(config.models).items()}


def _check_room(models: int, config: ServiceConfig) -> None:
    """New replicas start beside the old ones; Ray would wait for ever for cores or GPUs that it hasn't."""
    import ray

    free = ray.available_resources()
    for resource, needed in (
        ("CPU", models * config.cores_of_one_model()),
        ("GPU", models * config.gpus_of_one_model()),
    ):
        if needed > free.get(resource, 0.0) + 1e-6:
            raise FleetError(
                f"new replicas need {needed:g} {resource} beside those that run, and {free.get(resource, 0):g} are "
                "free: unload something first, or start the service again"
            )


def _reason(error: Exception) -> str:
    """Ray puts the replica's own error last, behind its whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1]


def _check_changeable(before: ServiceConfig, after: ServiceConfig) -> None:
    old, new = before.model_dump(exclude=_CHANGEABLE), after.model_dump(exclude=_CHANGEABLE)
    if changed := [key for key in old if old[key] != new[key]]:
        raise ConfigError(f"{', '.join(changed)} can't be changed in a running service: stop it and start it again")
