"""`rushes.json`: what a checkpoint's directory may say about serving it; diffusers ignores the file."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from export.onnx import ExportError
from models.bundle import BetasInfo, LimitsInfo, Positions, SamplerInfo, TokenShift
from models.families import Decoding, Defaults, Plan, defaults_of
from models.samplers import VARIANCE_PRESERVING, SamplerName
from models.window import ContextWindow

SETTINGS = "rushes.json"
SAMPLERS: dict[str, SamplerName] = {
    "FlowMatchEulerDiscreteScheduler": "euler",
    "UniPCMultistepScheduler": "unipc",
    "CogVideoXDDIMScheduler": "ddim",
    "CogVideoXDPMScheduler": "dpm",
}
# What a variance-preserving scheduler's config must say, for it is all that is computed here.
_PREDICTS_V = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "trained_betas": None,
}


class SamplerSettings(BaseModel):
    """Defaults that the scheduler's config does not know; None: taken from that config."""

    model_config = ConfigDict(extra="forbid")

    name: SamplerName | None = None
    shift: float | None = Field(default=None, gt=0)
    num_inference_steps: PositiveInt = 20
    guidance_scale: float = Field(default=5.0, ge=1)


class CausalSettings(BaseModel):
    """What a causal model was trained to remember, in chunks, and where its weights are.

    `weights` is a file beside `rushes.json` in the layout of Self-Forcing, CausVid or LongLive (or of diffusers), whose
    weights take the place of the transformer's. With sinks, these projects count `positions` as `absolute`.
    """

    model_config = ConfigDict(extra="forbid")

    sink_chunks: NonNegativeInt = 1
    window_chunks: PositiveInt = 3
    positions: Positions = "window"
    weights: str | None = None


class DecodingSettings(BaseModel):
    """For a VAE that denoises while it decodes, such as LTX's from 0.9.1 on; the defaults are its authors'."""

    model_config = ConfigDict(extra="forbid")

    timestep: float = Field(default=Decoding().timestep, ge=0, le=1)
    noise_scale: float = Field(default=Decoding().noise_scale, ge=0, le=1)


class CheckpointSettings(BaseModel):
    """`rushes.json`; every key may be left out. A family has defaults of its own, see `models.families`."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(default=None, description="The model's name in the API; by default the directory's.")
    fps: PositiveInt = 16
    max_tokens: PositiveInt = 64
    chunk_latent_frames: PositiveInt = 3
    rollout: Literal["bidirectional", "causal"] = Field(default="bidirectional", description="As it was trained.")
    causal: CausalSettings = Field(default=CausalSettings(), description="Only for the causal rollout.")
    sampler: SamplerSettings = SamplerSettings()
    decoding: DecodingSettings = DecodingSettings()
    limits: LimitsInfo = LimitsInfo(
        default_size=(128, 128), min_side=64, max_side=256, size_multiple=16, default_seconds=2, max_seconds=8
    )

    @property
    def window(self) -> ContextWindow | None:
        """What a causal model remembers; None for a bidirectional one."""
        if self.rollout == "bidirectional":
            return None
        return ContextWindow(self.chunk_latent_frames, self.causal.sink_chunks, self.causal.window_chunks)

    def plan(self, checkpoint: Path) -> Plan:
        """How the checkpoint is going to be served."""
        causal = self.causal if self.window else CausalSettings()
        return Plan(
            max_tokens=self.max_tokens,
            fps=self.fps,
            chunk_latent_frames=self.chunk_latent_frames,
            limits=self.limits,
            window=self.window,
            positions=causal.positions,
            weights=checkpoint / causal.weights if causal.weights else None,
            decoding=Decoding(self.decoding.timestep, self.decoding.noise_scale),
        )

    def _completed(self, defaults: Defaults | None) -> CheckpointSettings:
        """With the family's defaults for what the file leaves out."""
        if defaults is None:
            return self
        known = {field.name: getattr(defaults, field.name) for field in fields(defaults)}
        sampler = {name: known.pop(name) for name in ("num_inference_steps", "guidance_scale")}
        chosen = {name: value for name, value in sampler.items() if name not in self.sampler.model_fields_set}
        mine = {name: value for name, value in known.items() if name not in self.model_fields_set}
        return self.model_copy(update=mine | {"sampler": self.sampler.model_copy(update=chosen)})

    @classmethod
    def load(cls, checkpoint: Path) -> CheckpointSettings:
        """Read the file if it is there. Raises `ExportError`."""
        path = checkpoint / SETTINGS
        try:
            settings = cls.model_validate_json(path.read_bytes()) if path.exists() else cls()
        except ValidationError as error:
            first = error.errors()[0]
            raise ExportError(f"{path} is wrong at `{'.'.join(map(str, first['loc']))}`: {first['msg']}.") from error
        settings = settings._completed(defaults_of(checkpoint))
        name = settings.name or re.sub(r"[^a-z0-9._-]+", "-", checkpoint.resolve().name.lower()).strip("-._")
        return settings.model_copy(update={"name": name or "model"})

    def sampler_info(self, scheduler: dict[str, Any]) -> SamplerInfo:
        """The manifest's sampler, from these settings and the checkpoint's scheduler config. Raises `ExportError`."""
        kind = str(scheduler.get("_class_name"))
        name = self.sampler.name or SAMPLERS.get(kind)
        shift = self.sampler.shift
        for key in ("flow_shift", "shift", "snr_shift_scale"):
            shift = shift or scheduler.get(key)
        if name is None or shift is None:
            raise ExportError(
                f"The scheduler {kind} is unknown: give `sampler.name` and `sampler.shift` in {SETTINGS}."
            )
        dynamic = name == "euler" and bool(scheduler.get("use_dynamic_shifting")) and self.sampler.shift is None
        names = {
            "base_tokens": "base_image_seq_len",
            "max_tokens": "max_image_seq_len",
            "base_shift": "base_shift",
            "max_shift": "max_shift",
        }
        return SamplerInfo(
            name=name,
            shift=shift,
            token_shift=TokenShift(**{key: scheduler[value] for key, value in names.items() if value in scheduler})
            if dynamic
            else None,
            terminal=scheduler.get("shift_terminal") if name == "euler" else None,
            betas=_betas(scheduler) if name in VARIANCE_PRESERVING else None,
            num_train_timesteps=scheduler.get("num_train_timesteps", 1000),
            num_inference_steps=self.sampler.num_inference_steps,
            guidance_scale=self.sampler.guidance_scale,
        )


def _betas(scheduler: dict[str, Any]) -> BetasInfo:
    """Raises `ExportError` for a schedule that is not computed here."""
    for key, wanted in _PREDICTS_V.items():
        if scheduler.get(key, wanted) != wanted:
            raise ExportError(f"The scheduler's `{key}` must be {wanted}, not {scheduler[key]}.")
    try:
        return BetasInfo(
            start=scheduler["beta_start"],
            end=scheduler["beta_end"],
            zero_terminal=scheduler["rescale_betas_zero_snr"],
            spacing=scheduler["timestep_spacing"],
        )
    except KeyError as error:
        raise ExportError(f"The scheduler's config lacks {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ExportError(f"The scheduler's config is wrong at `{first['loc'][0]}`: {first['msg']}.") from error
