"""`build_app`: the only place where the deployments are decorated and bound to each other.

`rushes serve` and `serve run serving/deployments/rushes.yaml` both end up here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from models.bundle import Bundle
from serving.config import ServiceConfig, parse_config
from serving.deployments.api import ApiDeployment
from serving.deployments.crew import RunnerDeployment
from serving.deployments.decoder import DecoderDeployment
from serving.deployments.denoiser import DenoiserDeployment
from serving.deployments.door import CLOSE_SECONDS
from serving.deployments.fused import FusedDeployment
from serving.deployments.remote import StageHandles, StageName, stage_name
from serving.deployments.text_encoder import TextEncoderDeployment
from serving.stage_config import StageConfig

# Equal session ids go to one replica. A busy replica is waited for: elsewhere there is no causal cache.
_STICKY = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    request_router_kwargs={"num_fallback_replicas": 0},
)
# Ray's default of 20 tries at a constructor takes minutes to say that a bundle is broken.
_CONSTRUCTOR_TRIES = 2
_SHUTDOWN_LOOK_SECONDS = 0.2
# A replica that has failed and doesn't close its door by itself is killed after so long.
_DOOR_SECONDS = 5.0 * CLOSE_SECONDS
# How soon Ray sees that a replica has died, and starts another; its default is 10 s.
_HEALTH_LOOK_SECONDS = 2.0
# Of a replica that everything is in: one that misses this three times in a row is replaced.
_HEALTH_ANSWER_SECONDS = 10.0
# Load is averaged over so long before anything is decided by it; Ray's 30 s would be most of a short video.
_LOOK_BACK_SECONDS = 12.0
# Unless the application has one for its stages together, which Ray takes from a Serve file only.
_POLICY = "serving.deployments.scaling:StagePolicy"


def build_app(config: ServiceConfig | Mapping[str, Any] | None = None) -> Application:
    """The service as one Ray Serve application. Raises `ConfigError`, which names what is wrong, or `BundleError`."""
    if not isinstance(config, ServiceConfig):
        config = parse_config(config or {})
    config = config.resolved()
    if config.fused:
        checked(config.models)
        return build_fused(config)
    stages = {name: _stages(name, bundle, config) for name, bundle in checked(config.models).items()}
    asleep = _asleep(config)
    retiring = {name: _stages(f"{name}-retiring", bundle, asleep) for name, bundle in checked(config.retiring).items()}
    return build_api(config, build_runner(config, stages, retiring), stages)


def build_fused(config: ServiceConfig, *, door: bool = False) -> Application:
    """Everything in one replica. An old one ends before a new one begins: it would take videos that it doesn't know.

    With a `door` it listens itself at the configuration's `host` and `port`, and no proxy is needed.
    """
    # A replica with a door is never replaced but for its failing, and the next one needs the port.
    grace = _DOOR_SECONDS if door else max(config.graceful_shutdown_seconds, config.realtime.max_seconds)
    application: Application = _deployment(
        serve.ingress()(FusedDeployment),
        "fused",
        config,
        num_replicas=1,
        max_ongoing_requests=config.api.max_ongoing_requests,
        graceful_shutdown_timeout_s=grace,
        health_check_timeout_s=_HEALTH_ANSWER_SECONDS,
        ray_actor_options=_asked(config.cores(), config.gpus(), config.all_labels()),
    ).bind(config, door=door)
    return application


def build_model(name: str, bundle: Bundle, config: ServiceConfig) -> Application:
    """One model's stages as an application of their own, which comes and goes without the others."""
    stages = _stages(name, bundle, config, together=True)
    application: Application = stages.text_encoder
    return application


def checked(paths: Mapping[str, Path]) -> dict[str, Bundle]:
    """Every model's bundle, with all of its files verified. Raises `BundleError`."""
    bundles = {name: Bundle.load(path) for name, path in paths.items()}
    for bundle in bundles.values():
        bundle.verify()
    return bundles


def build_runner(
    config: ServiceConfig, stages: Mapping[str, StageHandles], retiring: Mapping[str, StageHandles] | None = None
) -> Application:
    """The runner, over stages that are bound with it or run already."""
    application: Application = _deployment(
        RunnerDeployment,
        "runner",
        config,
        num_replicas=config.runner.replicas,
        # `wake` answers at once; `drain` may wait for long.
        max_ongoing_requests=1000,
        max_surge_percent=100,
        ray_actor_options=_asked(config.runner.num_cpus, 0, config.runner.label_selector),
    ).bind(config, stages, retiring or {})
    return application


def build_api(config: ServiceConfig, runner: Any, stages: Mapping[str, StageHandles]) -> Application:
    """The API, in front of a runner and stages that are bound with it or run already."""
    application: Application = _deployment(
        serve.ingress()(ApiDeployment),
        "api",
        config,
        num_replicas=config.api.replicas,
        max_ongoing_requests=config.api.max_ongoing_requests,
        # Interactive sessions stay where they are when their replica's place is taken.
        graceful_shutdown_timeout_s=max(config.graceful_shutdown_seconds, config.realtime.max_seconds),
        # The new one answers before the old one stops: a request would wait for as long as a replica takes to start.
        max_surge_percent=100,
        ray_actor_options=_asked(config.api.num_cpus, 0, config.api.label_selector),
    ).bind(config, runner, stages)
    return application


def _asleep(config: ServiceConfig) -> ServiceConfig:
    """The same with stages that have no replica until one is asked for something."""

    def asleep(stage: StageConfig) -> StageConfig:
        return stage.model_copy(update={"autoscaling": stage.autoscaling.model_copy(update={"min_replicas": 0})})

    return config.model_copy(update={name: asleep(stage) for name, stage in config.stages()})


def _stages(model: str, bundle: Bundle, config: ServiceConfig, *, together: bool = False) -> StageHandles:
    """`together`: the text encoder is bound to the other two."""

    def stage(cls: type, name: StageName, settings: StageConfig, *beside: Any, **options: Any) -> Any:
        scaling = settings.autoscaling
        return _deployment(
            cls,
            stage_name(model, name),
            config,
            max_ongoing_requests=settings.max_ongoing_requests,
            autoscaling_config={
                "min_replicas": scaling.min_replicas,
                "max_replicas": scaling.max_replicas,
                "policy": {"policy_function": _POLICY, "policy_kwargs": config.scaling.model_dump()},
                "upscale_delay_s": scaling.upscale_delay_seconds,
                "downscale_delay_s": scaling.downscale_delay_seconds,
                "look_back_period_s": _LOOK_BACK_SECONDS,
            },
            ray_actor_options=_asked(settings.num_cpus, settings.num_gpus, settings.label_selector),
            **options,
        ).bind(bundle.root, bundle.digest, settings, config.observability, *beside)

    denoiser = stage(DenoiserDeployment, "denoiser", config.denoiser)
    decoder = stage(DecoderDeployment, "decoder", config.decoder, request_router_config=_STICKY)
    beside = (denoiser, decoder) if together else ()
    text_encoder = stage(TextEncoderDeployment, "text-encoder", config.text_encoder, *beside)
    return StageHandles(text_encoder=text_encoder, denoiser=denoiser, decoder=decoder)


def _asked(num_cpus: float, num_gpus: float, label_selector: Mapping[str, str]) -> dict[str, Any]:
    """Of Ray, for each replica."""
    where = {"label_selector": dict(label_selector)} if label_selector else {}
    return {"num_cpus": num_cpus, "num_gpus": num_gpus, **where}


def _deployment(cls: Any, name: str, config: ServiceConfig, **options: Any) -> Any:
    options.setdefault("graceful_shutdown_timeout_s", config.graceful_shutdown_seconds)
    return serve.deployment(
        cls,
        name=name,
        graceful_shutdown_wait_loop_s=_SHUTDOWN_LOOK_SECONDS,
        health_check_period_s=_HEALTH_LOOK_SECONDS,
        max_constructor_retry_count=_CONSTRUCTOR_TRIES,
        logging_config={
            "log_level": "WARNING",
            "enable_access_log": False,
            "encoding": config.observability.log_format.upper(),
        },
        **options,
    )
