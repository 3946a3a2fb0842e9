"""The service's one configuration: what `rushes serve --config` reads and what `serve run` passes to `build_app`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic import ValidationError as PydanticValidationError

import models.mini
from serving.logs import LogFormat, LogLevel
from serving.stage_config import DecoderConfig, DenoiserConfig, ScalingConfig, StageConfig, Strict, TextEncoderConfig

_MINI = Path(models.mini.__file__).parent
MINI_BUNDLE = _MINI / "bundle"
# What a path may be instead, wherever a bundle is named.
BUNDLED = {"mini": MINI_BUNDLE, "mini-causal": _MINI / "causal" / "bundle"}

# Ray kills a replica that is still busy after its own default of 20 s, which is shorter than a video.
_LONGEST_VIDEO_SECONDS = 600.0


class ConfigError(ValueError):
    """The configuration can't be used; the message names the key."""


class RunnerConfig(Strict):
    """Runners claim videos from the store and take them through the stages."""

    num_cpus: NonNegativeFloat = Field(default=0.1, description="Cores that Ray sets aside for a replica.")
    replicas: PositiveInt = Field(default=1, description="How many runners there are.")
    label_selector: dict[str, str] = Field(
        default={},
        description="Labels that a Ray node must have for a replica to be there, such as `rushes.dev/stage: front`.",
    )
    max_videos: PositiveInt = Field(
        default=16,
        description="Videos one runner works on at a time; a batch's have two thirds of these places at most.",
    )
    poll_seconds: PositiveFloat = Field(
        default=0.5, description="How often a runner looks for queued videos when nobody has told it of one."
    )
    batch_poll_seconds: PositiveFloat = Field(
        default=2.0, description="How often a runner looks after batches and webhooks."
    )
    max_attempts: PositiveInt = Field(
        default=3,
        description="Failed tries at a video before it fails for good, since something of it was last kept.",
    )
    max_lapses: PositiveInt = Field(
        default=10, description="As max_attempts, for tries that ended because their runner vanished."
    )
    checkpoint_steps: NonNegativeInt = Field(
        default=5,
        description="Every so many steps a bidirectional video's sampler is kept, to go on from after a crash; 0 is "
        "never. Finished chunks of a causal video always are.",
    )


class ApiConfig(Strict):
    """The HTTP front: any replica answers any request."""

    num_cpus: NonNegativeFloat = Field(default=0.1, description="Cores that Ray sets aside for a replica.")
    replicas: PositiveInt = Field(default=1, description="How many there are.")
    label_selector: dict[str, str] = Field(
        default={},
        description="Labels that a Ray node must have for a replica to be there, such as `rushes.dev/stage: front`.",
    )
    max_ongoing_requests: PositiveInt = Field(
        default=512, description="Open requests a replica has at most; a viewer is one."
    )
    max_body_bytes: PositiveInt = Field(default=1 << 20, description="The longest request body that is read.")
    max_file_bytes: PositiveInt = Field(default=200 << 20, description="The largest file that can be uploaded.")
    max_reference_bytes: PositiveInt = Field(
        default=32 << 20, description="The largest picture or video that a new video can begin from."
    )
    private_references: bool = Field(
        default=False, description="Whether pictures may be fetched from addresses inside the service's own network."
    )


class RealtimeConfig(Strict):
    """Interactive sessions: `/v1/realtime`, for causal models."""

    max_sessions: NonNegativeInt = Field(
        default=4, description="Sessions at a time on one replica of the API; 0 means none."
    )
    idle_seconds: PositiveFloat = Field(
        default=60.0, description="A session whose client hasn't said or acknowledged anything for so long ends."
    )
    max_seconds: PositiveFloat = Field(default=3600.0, description="How long a session may last.")
    buffer_seconds: PositiveFloat = Field(
        default=2.0, description="How far ahead of playback a session is made: what a new prompt takes to be seen."
    )


class WebhookConfig(Strict):
    """Whom the service calls when a video or a batch has ended: the `webhook_url` of the request."""

    secret: str | None = Field(
        default_factory=lambda: os.environ.get("RUSHES_WEBHOOK_SECRET"),
        pattern=r"^whsec_[A-Za-z0-9+/]{16,}={0,2}$",
        description="What events are signed with: `whsec_` and base64; the environment's RUSHES_WEBHOOK_SECRET when it "
        "is left out. Without it, requests with a `webhook_url` are refused.",
    )
    allow_private: bool = Field(
        default=False, description="Whether addresses inside the service's own network may be called."
    )
    timeout_seconds: PositiveFloat = Field(default=10.0, description="How long a target has to answer.")
    give_up_seconds: PositiveFloat = Field(default=86400.0, description="How long a target is tried.")


class ObservabilityConfig(Strict):
    """What is to be seen of a running service from outside."""

    metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Port of `rushes serve` at which Prometheus finds `/metrics`; none when it is left out. Elsewhere "
        "Ray's own, of each node, has them: 8080 on Kubernetes.",
    )
    traces_url: str | None = Field(
        default=None,
        pattern="^https?://",
        description="Where traces are sent: an OTLP/HTTP endpoint, such as http://collector:4318/v1/traces.",
    )
    traces_share: float = Field(default=1.0, ge=0, le=1, description="The share of videos that are traced.")
    log_format: LogFormat = Field(default="text", description="What a replica's log lines are: text or json.")
    log_level: LogLevel = Field(default="WARNING", description="What is logged: DEBUG, INFO, WARNING or ERROR.")
    log_prompts: bool = Field(
        default=False, description="Whether prompts may be logged, at INFO: they are private unless you say otherwise."
    )


def bundled(path: Path | str) -> Path:
    """A bundle's directory: the bundled one of this name, where no file or directory has it."""
    return BUNDLED.get(str(path), Path(path)) if not Path(path).exists() else Path(path)


class ServiceConfig(Strict):
    """Everything about a running service."""

    models: dict[str, Path] = Field(
        default={"mini": MINI_BUNDLE},
        min_length=1,
        description="Model name to its bundle's directory, or `mini` or `mini-causal` for a bundled one; the first is "
        "the default.",
    )
    retiring: dict[str, Path] = Field(
        default={},
        description="Bundles that models had before, in a Serve file: videos that began with one are finished by it. "
        "Its stages have no replica until there is such a video. `rushes reload` needs none.",
    )
    fused: bool = Field(
        default=False,
        description="Whether one process does everything, for small installations: API, runner and the stages of all "
        "models, each of which is there once. Nothing goes from process to process then; nothing scales, and "
        "`rushes reload` is refused. `rushes serve` has it listen itself, without Ray's HTTP proxy.",
    )
    data_dir: Path = Field(default=Path("rushes-data"), description="Where the store and the finished videos live.")
    store_url: str | None = Field(
        default_factory=lambda: os.environ.get("RUSHES_STORE_URL"),
        description="SQLAlchemy URL of the video store; the environment's RUSHES_STORE_URL when it is left out, and "
        "SQLite in `data_dir` without that.",
    )
    artifacts_url: str | None = Field(
        default=None,
        description="Where finished videos and uploads are kept: an fsspec URL, such as `s3://bucket/prefix` or "
        "`gs://bucket/prefix`; `data_dir` when it is left out.",
    )
    log_sharing: Literal["directory", "artifacts"] = Field(
        default="directory",
        description="How the replicas come to see a video while it is made: they share `data_dir`, or each fragment is "
        "put below `artifacts_url` too, and `data_dir` may be a directory of each machine's own.",
    )
    artifacts_options: dict[str, Any] = Field(
        default={}, description="What fsspec is told for that URL, such as `endpoint_url`."
    )
    quota_bytes: PositiveInt | None = Field(
        default=None, description="Beyond so many bytes of videos, those that expire soonest are deleted early."
    )
    sweep_seconds: PositiveFloat = Field(default=60.0, description="How often expired videos are deleted.")
    model_aliases: dict[str, str] = Field(
        default={}, description="Other names for models, such as `sora-2: mini`, for clients that insist on one."
    )
    host: str = Field(default="127.0.0.1", description="Address that `rushes serve` listens on.")
    port: int = Field(default=8000, ge=1, le=65535, description="Port that `rushes serve` listens on.")
    text_encoder: TextEncoderConfig = Field(
        default=TextEncoderConfig(num_cpus=0.1), description="The text encoder stage."
    )
    denoiser: DenoiserConfig = Field(default=DenoiserConfig(num_cpus=0.5), description="The denoiser stage.")
    decoder: DecoderConfig = Field(default=DecoderConfig(num_cpus=0.3), description="The decoder stage.")
    scaling: ScalingConfig = Field(default=ScalingConfig(), description="By what work stages get replicas.")
    runner: RunnerConfig = Field(default=RunnerConfig(), description="The runners.")
    api: ApiConfig = Field(default=ApiConfig(), description="The HTTP front.")
    require_keys: bool | None = Field(
        default=None,
        description="Whether requests need an API key (`rushes keys create`); when it is left out, they do unless "
        "`host` is a loopback address.",
    )
    realtime: RealtimeConfig = Field(default=RealtimeConfig(), description="Interactive sessions.")
    webhooks: WebhookConfig = Field(default_factory=WebhookConfig, description="Whom the service calls.")
    observability: ObservabilityConfig = Field(
        default=ObservabilityConfig(), description="Metrics, traces and logs of the service."
    )
    lease_seconds: PositiveFloat = Field(
        default=30.0, ge=3, description="A video whose runner hasn't been heard of for so long is another runner's."
    )
    retention_days: PositiveFloat = Field(
        default=30.0, description="How long a finished video is kept, as `expires_at` says."
    )
    graceful_shutdown_seconds: PositiveFloat = Field(
        default=_LONGEST_VIDEO_SECONDS,
        description="How long a replica that must go may still work; longer than the longest video takes.",
    )

    @model_validator(mode="after")
    def _aliases_name_models(self) -> ServiceConfig:
        for alias, name in self.model_aliases.items():
            if name not in self.models:
                raise ValueError(f"model_aliases.{alias}: there is no model {name!r}")
            if alias in self.models:
                raise ValueError(f"model_aliases.{alias}: that is a model's own name")
        return self

    @model_validator(mode="after")
    def _retiring_bundles_are_of_models(self) -> ServiceConfig:
        for name, path in self.retiring.items():
            if name not in self.models:
                raise ValueError(f"retiring.{name}: there is no model {name!r}")
            if path == self.models[name]:
                raise ValueError(f"retiring.{name}: that is the model's bundle now")
        return self

    @model_validator(mode="after")
    def _fused_is_one_process(self) -> ServiceConfig:
        if not self.fused:
            return self
        if self.retiring:
            raise ValueError("retiring: a fused service has no other stages that an old bundle could be in")
        counts = {f"{name}.autoscaling.max_replicas": stage.autoscaling.max_replicas for name, stage in self.stages()}
        counts |= {"runner.replicas": self.runner.replicas, "api.replicas": self.api.replicas}
        for key, count in counts.items():
            if count > 1:
                raise ValueError(f"{key}: a fused service has one of everything, not {count}")
        return self

    @property
    def default_model(self) -> str:
        return next(iter(self.models))

    @property
    def keys_required(self) -> bool:
        if self.require_keys is not None:
            return self.require_keys
        try:
            return not ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"

    @property
    def videos_dir(self) -> Path:
        """One directory a video: its fragment log and its finished MP4."""
        return self.data_dir / "videos"

    @property
    def resolved_store_url(self) -> str:
        return self.store_url or f"sqlite:///{self.data_dir / 'videos.db'}"

    def resolved(self) -> ServiceConfig:
        """The same with absolute paths: Ray's workers have working directories of their own.

        Raises `ConfigError` when a bundle isn't there.
        """
        bundles = _resolved("models", self.models)
        stages = {
            name: stage.model_copy(update={"plans": stage.plans and stage.plans.expanduser().resolve()})
            for name, stage in self.stages()
        }
        return self.model_copy(
            update={
                "models": bundles,
                "retiring": _resolved("retiring", self.retiring),
                "data_dir": self.data_dir.expanduser().resolve(),
                **stages,
            }
        )

    def stages(self) -> list[tuple[str, StageConfig]]:
        """Each by its key."""
        return [("text_encoder", self.text_encoder), ("denoiser", self.denoiser), ("decoder", self.decoder)]

    def cores_of_one_model(self) -> float:
        """What one model's replicas ask Ray for when it is loaded."""
        return sum(stage.num_cpus * stage.autoscaling.min_replicas for _, stage in self.stages())

    def gpus_of_one_model(self) -> float:
        """The same in GPUs."""
        return sum(stage.num_gpus * stage.autoscaling.min_replicas for _, stage in self.stages())

    def cores(self) -> float:
        """What the replicas ask Ray for when every stage is at its largest."""
        return (
            sum(stage.num_cpus * stage.autoscaling.max_replicas for _, stage in self.stages()) * len(self.models)
            + self.runner.num_cpus * self.runner.replicas
            + self.api.num_cpus * self.api.replicas
        )

    def gpus(self) -> float:
        """The same in GPUs."""
        return sum(stage.num_gpus * stage.autoscaling.max_replicas for _, stage in self.stages()) * len(self.models)

    def all_labels(self) -> dict[str, str]:
        """What a Ray node must have to take every part."""
        stages = [stage.label_selector for _, stage in self.stages()]
        selectors = [self.api.label_selector, self.runner.label_selector, *stages]
        return {key: value for selector in selectors for key, value in selector.items()}


def _resolved(key: str, bundles: Mapping[str, Path]) -> dict[str, Path]:
    found = {name: bundled(path).expanduser().resolve() for name, path in bundles.items()}
    for name, path in found.items():
        if not (path / "bundle.json").is_file():
            raise ConfigError(f"{key}.{name}: no bundle at {path}")
    return found


def parse_config(values: Any, source: str = "config") -> ServiceConfig:
    """Check `values` as a `ServiceConfig`. Raises `ConfigError`, which names every wrong key."""
    try:
        return ServiceConfig.model_validate(values)
    except PydanticValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {_said(e)}" for e in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from None


def load_config(path: Path) -> ServiceConfig:
    """Read a YAML file. An empty file is all defaults. Raises `ConfigError`."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return parse_config({} if values is None else values, str(path))


def _said(error: Any) -> str:
    return "there is no such key" if error["type"] == "extra_forbidden" else str(error["msg"])
