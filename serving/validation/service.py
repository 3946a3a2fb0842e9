"""A service's configuration against itself and against its bundles: what would fail hours later, or on every video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from models.bundle import Bundle, BundleError, Manifest
from serving.config import MINI_BUNDLE, ServiceConfig
from serving.pipeline.geometry import latent_shape
from serving.pipeline.pricing import work_of
from serving.pipeline.stages import VideoSpec
from serving.stage_config import StageConfig
from serving.validation.findings import Finding

# Of a GPU's memory, what weights and caches may take; activations and the driver need the rest.
_SHARE = 0.8
_STAGES = ("text_encoder", "denoiser", "decoder")
_FLOAT_BYTES = 4


def check_service(
    config: ServiceConfig, gpu_gib: Mapping[str, float], mounted: tuple[str, ...] = (), *, secrets: bool = False
) -> list[Finding]:
    """`gpu_gib` is the memory of the GPU that each stage gets, where that is known. Bundles below a `mounted` path are
    in a volume, which isn't here; with `secrets`, the environment there says more than the one here."""
    found = _contradictions(config)
    if not secrets:
        found += _one_machine(config)
    named = [(f"{key}.{name}", path) for key in ("models", "retiring") for name, path in getattr(config, key).items()]
    for where, path in named:
        try:
            bundle = Bundle.load(path.expanduser())
        except BundleError as error:
            inside = any(path.is_relative_to(mount) for mount in mounted)
            said = "it is in a volume, so it can't be looked at from here" if inside else str(error)
            found.append(Finding(where, said, certain=not inside))
            continue
        found += [finding.under(where) for finding in _model(config, bundle, gpu_gib)]
    return found


def longest(manifest: Manifest) -> VideoSpec:
    """The largest video that may be asked for, with everything else at its default."""
    limits, sampler = manifest.limits, manifest.sampler
    return VideoSpec(
        prompt="",
        negative_prompt="",
        width=limits.max_side,
        height=limits.max_side,
        frames=manifest.fps * limits.max_seconds + 1,
        seed=0,
        num_inference_steps=sampler.num_inference_steps,
        guidance_scale=max(sampler.guidance_scale, 2.0),
    )


def _contradictions(config: ServiceConfig) -> list[Finding]:
    found = []
    if config.lease_seconds >= config.graceful_shutdown_seconds:
        message = "must be less than graceful_shutdown_seconds, or a runner that is ended loses its videos to none"
        found.append(Finding("lease_seconds", message))
    if config.webhooks.timeout_seconds >= config.webhooks.give_up_seconds:
        found.append(Finding("webhooks.timeout_seconds", "must be less than webhooks.give_up_seconds"))
    return found


def _one_machine(config: ServiceConfig) -> list[Finding]:
    if not config.resolved_store_url.startswith("sqlite") or config.api.replicas + config.runner.replicas <= 2:
        return []
    message = "SQLite is for one machine: several runners or API replicas may be on several; give store_url"
    return [Finding("store_url", message, certain=False)]


def _model(config: ServiceConfig, bundle: Bundle, gpu_gib: Mapping[str, float]) -> list[Finding]:
    manifest = bundle.manifest
    spec = longest(manifest)
    found = _rows(config, manifest, spec)
    if manifest.cost is not None:
        seconds = work_of(manifest, spec)
        if seconds > config.graceful_shutdown_seconds:
            message = (
                f"its longest video takes {seconds:.0f} s ({manifest.cost.device}), more than "
                f"graceful_shutdown_seconds ({config.graceful_shutdown_seconds:.0f}): a replica that must go would be "
                "ended in the middle of it"
            )
            found.append(Finding("", message, certain=False))
    for name in _STAGES:
        settings: StageConfig = getattr(config, name)
        if name in gpu_gib and settings.num_gpus:
            found += _memory(name, settings, bundle, spec, gpu_gib[name])
        if settings.provider.startswith("tensorrt") and settings.plans is None and bundle.root == MINI_BUNDLE:
            message = "the bundled model has no plans, so it stays on CUDA: `rushes export tensorrt` and `plans`"
            found.append(Finding(name, message, certain=False))
    return found


def _rows(config: ServiceConfig, manifest: Manifest, spec: VideoSpec) -> list[Finding]:
    """One that no call can hold would be taken, and would fail."""
    _, frames, height, width = latent_shape(manifest, spec)
    if manifest.rollout == "causal":
        frames = min(frames, manifest.chunk_latent_frames)
    tokens = 2 * frames * (height // manifest.latent.patch) * (width // manifest.latent.patch)
    if tokens <= config.denoiser.max_tokens:
        return []
    message = (
        f"its largest video has {tokens} tokens in a call, and denoiser.max_tokens is {config.denoiser.max_tokens}"
    )
    return [Finding("", message)]


def _memory(stage: str, settings: StageConfig, bundle: Bundle, spec: VideoSpec, gib: float) -> list[Finding]:
    share = min(1.0, settings.num_gpus) * gib * 2**30
    weights = sum(info.bytes for name, info in bundle.manifest.files.items() if _stage_of(name) == stage)
    caches = _cache_bytes(bundle.manifest, spec) if stage == "denoiser" else 0
    if weights + caches <= _SHARE * share:
        return []
    message = (
        f"{stage}: {weights / 2**30:.1f} GiB of weights and {caches / 2**30:.1f} GiB of cache for its largest video "
        f"don't fit into {_SHARE:.0%} of {share / 2**30:.1f} GiB, its share of the GPU"
    )
    return [Finding("", message)]


def _stage_of(file: str) -> str:
    """Weights lie beside the graphs, under the stage's name."""
    name = Path(file).name
    return next((stage for stage in _STAGES if name.startswith(stage)), "decoder" if name.startswith("encoder") else "")


def _cache_bytes(manifest: Manifest, spec: VideoSpec) -> int:
    if manifest.causal is None:
        return 0
    _, _, height, width = latent_shape(manifest, spec)
    grid = (height // manifest.latent.patch) * (width // manifest.latent.patch)
    causal = manifest.causal
    return 2 * causal.layers * 2 * manifest.window.cached_frames * grid * causal.dim * _FLOAT_BYTES
