"""What passes between the stages, and the three protocols that the deployments and the in-process pipeline share."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.samplers import SamplerName
from serving.jobs.checkpoint import NOTHING, Checkpoint
from serving.media.fmp4 import Codec
from serving.pipeline.shortcuts import Cache, GuidanceCache
from serving.tracing import Carrier

# The VAE's, and one that is several times as fast and less sharp (`models.tiny_decoder`).
DecoderName = Literal["full", "tiny"]
DECODERS: Final[tuple[DecoderName, ...]] = ("full", "tiny")


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """A request with every default filled in and every limit checked: all that determines the frames.

    `scene_prompts` are pairs of a time in seconds and the prompt from the first chunk on that begins then or later;
    only a causal model can have them.

    A video with a `source`, the key of an artifact, begins from its first `source_frames` frames. Without a `strength`
    they are the video's own first frames (a picture's is one; an extension's are a whole video's). With one they are a
    draft of all of it, noised by so much of the way and denoised again: 0 would keep it, 1 doesn't see it.
    `source_video_id` says of which video it is, if it is one of this service.

    Only the steps within `guidance_interval`, as shares of the way, are guided; `cache` says how many of all steps ask
    the model, and `guidance_cache` how many of the guided ones ask it for the negative prompt too (see `shortcuts`).

    `lora` are pairs of the name of one of the bundle's LoRAs and how much of it is wanted.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    sampler: SamplerName = "unipc"
    scene_prompts: tuple[tuple[float, str], ...] = ()
    rewrite_prompt: bool = False
    revised_prompt: str | None = None
    best_of: int = 1
    source: str | None = None
    source_frames: int = 0
    strength: float | None = None
    source_video_id: str | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    cache: Cache = "off"
    guidance_cache: GuidanceCache = "off"
    lora: tuple[tuple[str, float], ...] = ()
    codec: Codec = "h264"
    decoder: DecoderName = "full"

    @property
    def rendered_prompt(self) -> str:
        """What the text encoder gets."""
        return self.prompt if self.revised_prompt is None else self.revised_prompt


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """One prompt's `encoder_hidden_states`: float32 `[max_tokens, dim]`, zero beyond the prompt's own tokens."""

    hidden_states: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Steering:
    """What an endless video may do next: begin its chunks up to but without `chunks`, under the prompt `text`.

    `number` counts the prompts, from 0; None for `text` means that it is as before.
    """

    chunks: int
    number: int = 0
    text: TextEmbedding | None = None


@dataclass(frozen=True, slots=True)
class EncodedSource:
    """What a video begins from, as the denoiser takes it: normalised latents float32 `[channels, frames, height,
    width]`, and `hidden_states` `[tokens, dim]` where the model has an image encoder.

    The latents are those of the given frames; or for a model that takes a picture as channels, of a whole video that
    shows it and then grey (`models.pictures`)."""

    latents: NDArray[np.float32]
    hidden_states: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class DenoiseRequest:
    """One video for the denoiser; `unconditional` is used when `spec.guidance_scale > 1`.

    `scenes` are `spec.scene_prompts`, encoded: from a time on another embedding stands in for `conditional`, while the
    cached context is kept. `source` is `spec.source`, encoded.

    `begun` is what is finished already and need not be made or reported again. Every `state_every` steps a
    bidirectional video reports its sampler's state; 0 means never. Somebody may be watching an `interactive` one: its
    chunks are wanted by the time that they are played, and its share of the engine is larger. `trace` is what its
    steps' spans are below.

    With `steering` a causal video has no end: `spec.frames` says nothing, and `Steerable.steer` says how it goes on.
    `begun` is then what is left to remember of `chunks_before`: the context's sinks, and the last chunks.
    """

    video_id: str
    spec: VideoSpec
    conditional: TextEmbedding
    unconditional: TextEmbedding | None
    scenes: tuple[tuple[float, TextEmbedding], ...] = ()
    source: EncodedSource | None = None
    begun: Checkpoint = NOTHING
    state_every: int = 0
    interactive: bool = True
    steering: Steering | None = None
    chunks_before: int = 0
    trace: Carrier = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepDone:
    """`step` of a video's `steps` calls are made, over all chunks and with their clean-context passes."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class LatentChunk:
    """Denoised normalised latents float32 `[channels, frames, height, width]`; `index` counts chunks from 0.

    `prompt` is the number of the prompt that it was denoised under. One that `opens` begins a decoder's session though
    it isn't the first: what came before it is forgotten.
    """

    index: int
    latents: NDArray[np.float32]
    last: bool
    prompt: int = 0
    opens: bool = False


@dataclass(frozen=True, slots=True)
class SamplerState:
    """What a bidirectional video's sampler holds after `step` steps, to go on from elsewhere: float32 `[1 + history,
    channels, frames, height, width]`, the latents first. If the next step makes do with an earlier one's guidance, the
    difference that this is made with comes last."""

    step: int
    state: NDArray[np.float32]


DenoiseEvent = StepDone | LatentChunk | SamplerState


@dataclass(frozen=True, slots=True)
class Fragment:
    """One decoded and encoded chunk: `data` is a `moof`+`mdat` that follows `init` (the same for every fragment)."""

    index: int
    frames: int
    first_frame: int
    init: bytes
    data: bytes


class TextEncoder(Protocol):
    async def encode(self, prompt: str) -> TextEmbedding: ...


class FrameEncoder(Protocol):
    async def encode_source(self, frames: NDArray[np.uint8], video_frames: int) -> EncodedSource:
        """What a video of so many frames begins from, given as `[frames, height, width, 3]`; incomplete groups of the
        model's temporal factor after the first frame are left out."""


class Denoiser(Protocol):
    def denoise(self, request: DenoiseRequest) -> AsyncGenerator[DenoiseEvent, None]:
        """Closing the generator cancels the video: its rows leave the batch before the next step.

        Raises `LostSession` when whoever held the video is gone: ask again, beginning from what there is.
        """


class Steerable(Denoiser, Protocol):
    """A denoiser whose endless videos can be steered while they are made."""

    async def steer(self, video_id: str, steering: Steering) -> bool:
        """From the next chunk on. False when nobody has such a video (any more)."""


class Decoder(Protocol):
    """Sessions are sticky: the chunks of one video come in order, and the causal cache stays with the session."""

    async def decode(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> Fragment:
        """Chunk 0, or one that `opens`, begins the session, the last chunk closes it. What is `interactive`, which
        somebody may be watching, goes before the rest.

        Raises `LostSession` if chunk n - 1 wasn't seen here.
        """

    async def replay(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> None:
        """As `decode`, for a chunk whose fragment is there already: only the cache moves on."""

    async def close(self, video_id: str) -> None:
        """Free the session's cache; harmless when there is none."""


class OtherBundle(LookupError):  # noqa: N818
    """The stage is of another bundle by now: whoever asks has begun with the one before."""


def same_bundle(served: str, asked: str) -> None:
    """Both are bundles' digests. Raises `OtherBundle` when they differ: half a video of each would be neither's."""
    if served != asked:
        raise OtherBundle("the model was changed while the video was made")


class LostSession(LookupError):  # noqa: N818
    """A stage doesn't have the video's session any more. The decoder has none that ends at the chunk before: replay the
    video's chunks from 0."""
