"""The manifest: what `bundle.json` says of a bundle. Only this file knows its shape.

It is read by serving, which has no torch, and written by `export`.
"""

from __future__ import annotations

import math
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from models.cost import CostInfo
from models.diffusion import BetaSchedule, Spacing
from models.samplers import VARIANCE_PRESERVING, SamplerName, SamplerTable, build_table
from models.window import ContextWindow

FORMAT: Final = 1

FamilyName = Literal["wan", "ltx", "cogvideox"]
Positions = Literal["window", "absolute"]
Precision = Literal["fp16", "int8", "int8-static", "int8-weights", "int4-weights"]
GraphName = Literal[
    "text_encoder",
    "denoiser",
    "denoiser_2",
    "decoder_first",
    "decoder_next",
    "tiny_decoder_first",
    "tiny_decoder_next",
    "rewriter_encoder",
    "rewriter_decoder",
    "captioner_encoder",
    "captioner_decoder",
    "encoder_first",
    "encoder_next",
    "image_encoder",
]
# Graphs that a bundle has with a section of the manifest, and without it has not.
OPTIONAL_GRAPHS: Final[dict[str, str]] = {
    "denoiser_2": "experts",
    "tiny_decoder_first": "tiny_decoder",
    "tiny_decoder_next": "tiny_decoder",
    "rewriter_encoder": "rewriter",
    "rewriter_decoder": "rewriter",
    "captioner_encoder": "captioner",
    "captioner_decoder": "captioner",
    "encoder_first": "captioner",
    "encoder_next": "captioner",
    "image_encoder": "image",
}
# Those whose tensors every model has in common.
SERVED_GRAPHS: Final[tuple[GraphName, ...]] = (
    "text_encoder",
    "denoiser",
    "denoiser_2",
    "decoder_first",
    "decoder_next",
    "tiny_decoder_first",
    "tiny_decoder_next",
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileInfo(_Strict):
    """One file of the bundle, by path relative to the bundle's directory."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class TensorInfo(_Strict):
    """A graph's input or output: dtype by numpy name; a string dimension is dynamic."""

    name: str
    dtype: Literal["float32", "float16", "int64", "uint8"]
    shape: tuple[int | str, ...]


class GraphInfo(_Strict):
    """One ONNX graph and its proof: the errors of each output against torch, over all `verified_shapes`."""

    file: str = Field(description="The ONNX file; its weights may lie in an external data file beside it.")
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    parity: dict[str, float] = Field(default={}, description="Largest absolute error by output; none: not verified.")
    mean_error: dict[str, float] = Field(default={}, description="Mean absolute error by output.")
    seconds: float | None = Field(default=None, ge=0, description="How long exporting and verifying it took.")
    verified_shapes: tuple[dict[str, tuple[int, ...]], ...] = ()


class TextInfo(_Strict):
    """How a prompt becomes the denoiser's `encoder_hidden_states` `[batch, max_tokens, dim]`."""

    tokenizer: str = Field(description="A `tokenizers` JSON file.")
    max_tokens: PositiveInt
    dim: PositiveInt


class WordsInfo(_Strict):
    """A closed vocabulary and how a decoder graph speaks it, word by word."""

    words: tuple[str, ...] = Field(min_length=2, description="By id; 0 is padding and 1 the end.")
    starts: PositiveInt = Field(description="Start marks, whose ids follow the words'.")
    max_words: PositiveInt = Field(description="Ids that the decoder takes at most, the start mark included.")


class RewriterInfo(WordsInfo):
    """How a loose prompt becomes a detailed caption; the start mark settles what the prompt leaves open."""

    buckets: PositiveInt = Field(description="See `models.spelling`.")
    max_prompt_words: PositiveInt


class CaptionerInfo(WordsInfo):
    """How a video's latents become a caption; with it come the VAE encoder's graphs, so that any video has latents."""

    max_frames: PositiveInt = Field(description="Latent frames that are looked at, from the first.")


class LatentInfo(_Strict):
    """Latent geometry `[batch, channels, frames, height, width]` and its normalisation.

    A video of F frames has `1 + (F - 1) / temporal` latent frames. The denoiser works on normalised latents; the
    decoder graphs undo the normalisation themselves, so serving never needs the means.
    """

    channels: PositiveInt
    spatial: PositiveInt = Field(description="Pixels per latent cell, both ways.")
    temporal: PositiveInt = Field(description="Video frames per latent frame after the first.")
    patch: PositiveInt = Field(description="The denoiser needs latent height and width to be multiples of this.")
    patch_frames: PositiveInt = Field(
        default=1,
        description="The denoiser needs latent frames to be a multiple of this; what is missing is put before the "
        "first, and left out when all is denoised.",
    )
    group: PositiveInt = Field(
        default=1,
        description="Latent frames that are decoded together. Above 1, `decoder_first` takes one more than these, and "
        "the first chunk has one more than `chunk_latent_frames`, which is a multiple of it.",
    )
    streaming: Literal["exact", "overlapped"] = Field(
        default="exact",
        description="`exact`: the VAE is causal, `decoder_first` takes one latent frame, and decoding chunk by chunk "
        "is decoding in one go. `overlapped`: it isn't, `decoder_first` takes the whole first chunk, and each later "
        "one is decoded behind latents before it; what that costs at the seams is `parity.seam` of `decoder_next`.",
    )

    @property
    def lead(self) -> int:
        """Latent frames that the first chunk has more than the others."""
        return 1 if self.group > 1 else 0

    @property
    def first(self) -> int:
        """Latent frames that `decoder_first` takes when decoding is exact."""
        return self.lead + self.group


class PreviewInfo(_Strict):
    """A latent cell's colour without the decoder: `latent @ factors + bias` is RGB from 0 to 1, roughly."""

    factors: tuple[tuple[float, float, float], ...] = Field(description="What each latent channel adds to R, G and B.")
    bias: tuple[float, float, float]


class TinyDecoderInfo(_Strict):
    """A second, smaller decoder of the same latents, for requests that would rather have speed; see
    `models.tiny_decoder`. Its graphs have the inputs and outputs of the VAE's, with fewer and smaller caches."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the weight file that it was made from.")
    parameters: PositiveInt


class ImageInfo(_Strict):
    """How the picture that a video is made of becomes the denoiser's `image_hidden_states` `[batch, tokens, dim]`."""

    side: PositiveInt = Field(description="The graph `image_encoder` takes a square of so many pixels each way.")


class CausalInfo(_Strict):
    """The cache of a causal rollout; see `models.window` for what it remembers.

    The denoiser then takes one chunk of up to `chunk_latent_frames` frames a row, and two inputs more: `cache`
    float32 `[batch, layers, 2, (sink_chunks + window_chunks) * chunk_latent_frames, rows, columns, dim]`, keys before
    values, with a row and a column for each patch, and `write_index` int64 `[batch]`, how many chunks of the row's
    video are finished. Beside `velocity` it gives `chunk_cache`, the same for this chunk's frames alone. At timestep 0
    and on finished latents (the clean-context pass) that is what belongs into the cache.
    """

    sink_chunks: NonNegativeInt = 1
    window_chunks: PositiveInt = 3
    positions: Positions = Field(default="window", description="Where RoPE puts the sinks; see `models.wan_causal`.")
    layers: PositiveInt
    dim: PositiveInt


class ExpertsInfo(_Strict):
    """Two denoisers for two ranges of noise (Wan 2.2 A14B): `denoiser_2` takes the timesteps below the boundary."""

    boundary_timestep: float = Field(gt=0, lt=1000)


class TokenShift(_Strict):
    """A shift that grows with the video, `e^mu`, with mu linear in the number of latent tokens (LTX, Flux)."""

    base_tokens: PositiveInt = 256
    max_tokens: PositiveInt = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def at(self, tokens: int) -> float:
        """The shift of a video with this many tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_shift + slope * (tokens - self.base_tokens))


class BetasInfo(_Strict):
    """How the noise of a variance-preserving model grows; see `models.diffusion.BetaSchedule`."""

    start: float = Field(gt=0, lt=1)
    end: float = Field(gt=0, lt=1)
    zero_terminal: bool
    spacing: Spacing


class SamplerInfo(_Strict):
    """Default sampler settings; see `models.samplers`. `ddim` and `dpm` need `betas`, and no other has them."""

    name: SamplerName = "unipc"
    shift: float = Field(gt=0)
    token_shift: TokenShift | None = Field(default=None, description="Takes the place of `shift` if it is there.")
    terminal: float | None = Field(default=None, gt=0, lt=1, description="The schedule's last sigma before 0.")
    betas: BetasInfo | None = None
    num_train_timesteps: PositiveInt = 1000
    num_inference_steps: PositiveInt = 20
    guidance_scale: float = Field(ge=1)

    @model_validator(mode="after")
    def _betas_fit_the_name(self) -> Self:
        if (self.name in VARIANCE_PRESERVING) != (self.betas is not None):
            raise ValueError("the samplers ddim and dpm need `betas`, and no other has them")
        return self

    def table(
        self, steps: int, guidance_scale: float, tokens: int, name: SamplerName | None = None, *, start: int = 0
    ) -> SamplerTable:
        """The table of one request whose latents are `tokens` cells; by another sampler if `name` says so.

        Without its first `start` steps, for what doesn't begin from pure noise.
        """
        return build_table(
            name or self.name,
            steps,
            shift=self.shift if self.token_shift is None else self.token_shift.at(tokens),
            guidance_scale=guidance_scale,
            num_train_timesteps=self.num_train_timesteps,
            by_tokens=self.token_shift is not None,
            terminal=self.terminal,
            betas=None if self.betas is None else BetaSchedule(**self.betas.model_dump()),
            start=start,
        )


class LimitsInfo(_Strict):
    """What a request may ask for. Sizes are pixels and must be multiples of `size_multiple`."""

    default_size: tuple[PositiveInt, PositiveInt] = Field(description="width, height")
    min_side: PositiveInt
    max_side: PositiveInt
    size_multiple: PositiveInt
    default_seconds: PositiveInt
    max_seconds: PositiveInt
    max_steps: PositiveInt = 100
    max_prompt_characters: PositiveInt = 4000


class ProofInfo(_Strict):
    """A whole video made with the bundle's graphs, against `reference` from the same noise and settings."""

    reference: str = Field(description="What made the other video, such as diffusers' pipeline.")
    size: tuple[PositiveInt, PositiveInt] = Field(description="width, height")
    frames: PositiveInt
    steps: PositiveInt
    psnr_db: float = Field(description="Over all frames as uint8; equal ones count as 100.")
    worst_frame_psnr_db: float
    seconds: float = Field(ge=0)


class AdapterInfo(_Strict):
    """A LoRA file that is merged into the denoiser's weights."""

    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scale: float


class NamedLoraInfo(_Strict):
    """A LoRA that requests name: it is beside the weights, and does nothing where it isn't asked for."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    files: tuple[AdapterInfo, ...] = Field(min_length=1, description="One for each transformer that it is for.")


class PrecisionInfo(_Strict):
    """What was made of an fp32 bundle; `parity` of the changed graphs and `proof` are then against that one."""

    name: Precision
    master: str = Field(pattern=r"^[0-9a-f]{64}$", description="The fp32 bundle's digest.")


class Manifest(_Strict):
    """`bundle.json`."""

    format: Literal[1] = FORMAT
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    family: FamilyName
    rollout: Literal["bidirectional", "causal"]
    fps: PositiveInt
    chunk_latent_frames: PositiveInt = Field(description="Latent frames in one decoded chunk.")
    causal: CausalInfo | None = Field(default=None, description="There if, and only if, the rollout is causal.")
    experts: ExpertsInfo | None = Field(default=None, description="There if, and only if, there are two denoisers.")
    text: TextInfo
    latent: LatentInfo
    sampler: SamplerInfo
    limits: LimitsInfo
    image: ImageInfo | None = Field(default=None, description="None: no image encoder.")
    tiny_decoder: TinyDecoderInfo | None = Field(default=None, description="None: the VAE's decoder alone.")
    rewriter: RewriterInfo | None = Field(default=None, description="None: prompts are taken as they are.")
    captioner: CaptionerInfo | None = Field(default=None, description="None: no captions, and no best of several.")
    adapters: tuple[AdapterInfo, ...] = Field(default=(), description="In the order in which they were merged.")
    loras: tuple[NamedLoraInfo, ...] = Field(
        default=(),
        description="In the order of the columns of `lora_scales` `[batch, loras]`, an input of the "
        "denoisers that these change: how much of each LoRA a row gets.",
    )
    precision: PrecisionInfo | None = Field(default=None, description="None: fp32, the master of all others.")
    graphs: dict[GraphName, GraphInfo]
    files: dict[str, FileInfo] = Field(description="Every file of the bundle but the manifest itself.")
    versions: dict[str, str] = Field(description="Library versions that made the bundle.")
    proof: ProofInfo | None = Field(default=None, description="None: exported without verification.")
    cost: CostInfo | None = Field(default=None, description="What it takes; None: never measured.")
    preview: PreviewInfo | None = Field(default=None, description="None: nothing is to be seen before it is decoded.")

    @property
    def encodes(self) -> bool:
        """Whether frames can be made latents: what a video that begins from another one or from a picture needs."""
        return {"encoder_first", "encoder_next"} <= self.graphs.keys()

    def shape_of(self, graph: GraphName, name: str) -> tuple[int | str, ...] | None:
        """The shape of one of a graph's inputs; None if there is no such graph or input."""
        inputs = self.graphs[graph].inputs if graph in self.graphs else ()
        return next((tensor.shape for tensor in inputs if tensor.name == name), None)

    @property
    def pictured(self) -> bool:
        """Whether videos are made of a picture, which the denoiser takes as added channels: see `models.pictures`."""
        return self.shape_of("denoiser", "condition") is not None

    @property
    def timesteps_by_frame(self) -> bool:
        """Whether the denoiser takes a timestep for each latent frame: 0 says that a frame is given and clean."""
        return len(self.shape_of("denoiser", "timestep") or ()) == 2

    @property
    def decodes_with_noise(self) -> bool:
        """Whether the decoders take `noise`, standard normal and shaped like the latents."""
        return self.shape_of("decoder_first", "noise") is not None

    @property
    def window(self) -> ContextWindow:
        """What a causal model remembers. Raises `ValueError` for a bidirectional one."""
        if self.causal is None:
            raise ValueError(f"{self.name} is {self.rollout}: it has no context window")
        return ContextWindow(self.chunk_latent_frames, self.causal.sink_chunks, self.causal.window_chunks)

    @model_validator(mode="after")
    def _graphs_fit_each_other(self) -> Self:
        """What one graph makes and another takes, where the manifest's tensors say so."""
        if "denoiser_2" in self.graphs and self.experts is None:
            raise ValueError("a second denoiser needs `experts`")
        widths = {
            ("latents", 1): ("`latent.channels`", self.latent.channels),
            ("encoder_hidden_states", -1): ("`text.dim`", self.text.dim),
            ("hidden_states", -1): ("`text.dim`", self.text.dim),
        }
        for name, graph in self.graphs.items():
            tensors = {tensor.name: tensor.shape for tensor in (*graph.inputs, *graph.outputs)}
            for (tensor, axis), (what, width) in widths.items():
                shape = tensors.get(tensor)
                if name in SERVED_GRAPHS and shape is not None and (len(shape) < 2 or shape[axis] != width):
                    raise ValueError(f"the {name}'s {tensor} {list(shape)} is not as {what} {width} says")
        return self

    @model_validator(mode="after")
    def _pictures_can_be_seen(self) -> Self:
        if self.pictured and (not self.encodes or self.rollout != "bidirectional"):
            raise ValueError("a denoiser with `condition` needs the VAE's encoder and a bidirectional rollout")
        if "denoiser" in self.graphs and (self.image is None) != (
            self.shape_of("denoiser", "image_hidden_states") is None
        ):
            raise ValueError("a denoiser with `image_hidden_states` needs `image`, and no other has it")
        return self

    @model_validator(mode="after")
    def _preview_fits_the_latents(self) -> Self:
        if self.preview is not None and len(self.preview.factors) != self.latent.channels:
            raise ValueError(f"`preview` is for {len(self.preview.factors)} latent channels")
        return self

    @model_validator(mode="after")
    def _loras_fit_the_graphs(self) -> Self:
        names = [lora.name for lora in self.loras]
        if len(set(names)) < len(names):
            raise ValueError("`loras` has a name twice")
        shapes = [self.shape_of(graph, "lora_scales") for graph in ("denoiser", "denoiser_2")]
        wrong = [shape for shape in shapes if shape is not None and shape[1:] != (len(names),)]
        if wrong or (names and self.graphs and not any(shapes)):
            raise ValueError(f"the denoisers take the scales of other LoRAs than the {len(names)} in `loras`")
        return self

    def chunks(self, latent_frames: int) -> list[slice]:
        """Which latent frames of a video each chunk holds; the first may have more than the others, the last fewer."""
        size, lead = self.chunk_latent_frames, self.latent.lead
        starts = [0, *range(lead + size, latent_frames, size)]
        return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], latent_frames], strict=True)]

    @model_validator(mode="after")
    def _chunks_fit_the_decoder(self) -> Self:
        latent = self.latent
        if self.chunk_latent_frames % latent.group:
            raise ValueError("`chunk_latent_frames` must be a multiple of `latent.group`")
        if latent.group > 1 and (self.rollout == "causal" or self.fps % (latent.group * latent.temporal)):
            raise ValueError("`latent.group` needs a bidirectional rollout and seconds of whole groups")
        return self

    @model_validator(mode="after")
    def _cache_fits_the_graph(self) -> Self:
        if (self.rollout == "causal") != (self.causal is not None):
            raise ValueError("a causal rollout needs `causal`, and no other has it")
        denoiser = self.graphs.get("denoiser")
        if self.causal is not None and denoiser is not None:
            shape = next((tensor.shape for tensor in denoiser.inputs if tensor.name == "cache"), ())
            fixed = (self.causal.layers, 2, self.window.cached_frames, self.causal.dim)
            if len(shape) != 7 or (*shape[1:4], shape[6]) != fixed:
                raise ValueError(f"the denoiser's cache {list(shape)} is not that of `causal`")
        return self
