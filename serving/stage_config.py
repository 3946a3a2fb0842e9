"""What the stages of the service's configuration may be told, and by what work they get replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from models.bundle import Manifest


class Strict(BaseModel):
    """Settings of one part, in which a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AutoscalingConfig(Strict):
    """How many replicas a stage has. Handed to Ray Serve, which would accept a misspelt key in silence."""

    min_replicas: NonNegativeInt = Field(
        default=1,
        description="Replicas that are always there; with 0 an idle model goes, and its next video waits for it.",
    )
    max_replicas: PositiveInt = Field(default=1, description="Replicas there may be at most.")
    upscale_delay_seconds: NonNegativeFloat = Field(
        default=2.0, description="How long the load must last to add a replica."
    )
    downscale_delay_seconds: NonNegativeFloat = Field(
        default=300.0, description="How long a replica is kept without load."
    )

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must not be less than min_replicas")
        return self


class ScalingConfig(Strict):
    """By what work a stage gets replicas. A Serve file's `autoscaling_policy`, such as the chart's, says it instead."""

    target_seconds: PositiveFloat = Field(
        default=30.0, description="A stage gets as many replicas as can do its work in this time."
    )
    cold_start_seconds: NonNegativeFloat = Field(
        default=10.0, description="How long a replica takes to be ready: what is done by then asks for none."
    )


class StageConfig(Strict):
    """One stage: text encoder, denoiser or decoder."""

    num_cpus: NonNegativeFloat = Field(
        default=0.2, description="Cores that Ray sets aside for a replica; may be a fraction."
    )
    num_gpus: NonNegativeFloat = Field(default=0.0, description="GPUs that Ray gives a replica; may be a fraction.")
    threads: PositiveInt = Field(default=1, description="Threads that one engine call uses on the CPU.")
    provider: str = Field(
        default="CPUExecutionProvider",
        description="What runs the graphs: one of ONNX Runtime's execution providers; `openvino`, or `openvino_bf16` "
        "on CPUs that have it; `cpu`, which is `openvino_bf16` where a replica finds both and CPUExecutionProvider "
        "elsewhere; or `tensorrt` or `tensorrt_rtx`, which run the plans of `rushes export tensorrt`, and until a "
        "stage has all of them CUDAExecutionProvider.",
    )
    plans: Path | None = Field(
        default=None, description="Where TensorRT's plans are; in the bundle's directory `plans` when it is left out."
    )
    label_selector: dict[str, str] = Field(
        default={},
        description="Labels that a Ray node must have for a replica to be there, such as `rushes.dev/stage: denoiser`.",
    )
    max_ongoing_requests: PositiveInt = Field(
        default=64, description="Requests a replica has in hand before it refuses more."
    )
    autoscaling: AutoscalingConfig = Field(default=AutoscalingConfig(), description="How many replicas there are.")


class RewriterConfig(Strict):
    """Prompt rewriting in front of the text encoder."""

    provider: Literal["bundle", "chat", "none"] = Field(
        default="bundle",
        description="The bundle's own rewriter, if it has one; an OpenAI-compatible chat endpoint; or none.",
    )
    by_default: bool = Field(default=True, description="Whether a request that doesn't say gets its prompt rewritten.")
    base_url: str | None = Field(default=None, description="The chat endpoint's, such as http://host:8080/v1.")
    model: str | None = Field(default=None, description="The chat endpoint's model.")
    api_key_env: str = Field(default="OPENAI_API_KEY", description="Environment variable with the endpoint's key.")
    timeout_seconds: PositiveFloat = Field(
        default=20.0, description="After so long without an answer a prompt is taken as it is."
    )

    @model_validator(mode="after")
    def _complete(self) -> RewriterConfig:
        if self.provider == "chat" and not (self.base_url and self.model):
            raise ValueError("the provider chat needs base_url and model")
        return self

    def serves(self, manifest: Manifest) -> bool:
        """Whether prompts for this model can be rewritten."""
        return self.provider == "chat" or (self.provider == "bundle" and manifest.rewriter is not None)


class TextEncoderConfig(StageConfig):
    """The text encoder, and the rewriter in front of it, which is too small for a deployment of its own."""

    rewriter: RewriterConfig = Field(default=RewriterConfig(), description="How loose prompts become detailed ones.")


class DenoiserConfig(StageConfig):
    """The denoiser, which batches rows of many videos into one engine call."""

    max_rows: int = Field(default=8, ge=2, description="Rows in one engine call; a video with guidance takes two.")
    max_tokens: PositiveInt = Field(default=1 << 15, description="Rows times latent tokens per row in one engine call.")
    max_sessions: PositiveInt = Field(
        default=64, description="Videos whose latents a replica holds; more wait their turn."
    )


class DecoderConfig(StageConfig):
    """The decoder, which keeps a causal cache for each video that it has in hand."""

    max_sessions: PositiveInt = Field(default=16, description="Videos whose decoder caches a replica keeps at a time.")
    video_encoder: Literal["auto", "software", "nvenc"] = Field(
        default="auto",
        description="What makes H.264 of frames: `software`, with the same bytes on every machine; `nvenc`, the GPU's "
        "own encoder, or no start without it; `auto`, that where a replica finds it. All replicas must find the same.",
    )
