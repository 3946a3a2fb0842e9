"""The bundle: a directory that holds one servable model, described by `bundle.json`.

Only this file knows the manifest's shape. It is read by serving, which has no torch, and written by `export`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from models.samplers import SamplerName
from models.window import ContextWindow

FORMAT: Final = 1
MANIFEST = "bundle.json"

GraphName = Literal[
    "text_encoder",
    "denoiser",
    "decoder_first",
    "decoder_next",
    "rewriter_encoder",
    "rewriter_decoder",
    "captioner_encoder",
    "captioner_decoder",
    "encoder_first",
    "encoder_next",
]
# Graphs that a bundle has with a section of the manifest, and without it has not.
OPTIONAL_GRAPHS: Final[dict[str, str]] = {
    "rewriter_encoder": "rewriter",
    "rewriter_decoder": "rewriter",
    "captioner_encoder": "captioner",
    "captioner_decoder": "captioner",
    "encoder_first": "captioner",
    "encoder_next": "captioner",
}


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
    """One ONNX graph; `parity` is its largest absolute error against torch per output, over `verified_shapes`."""

    file: str = Field(description="The ONNX file; its weights may lie in an external data file beside it.")
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    parity: dict[str, float] = {}
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


class CausalInfo(_Strict):
    """The cache of a causal rollout; see `models.window` for what it remembers.

    The denoiser then takes one chunk of up to `chunk_latent_frames` frames a row, and two inputs more: `cache`
    float32 `[batch, layers, 2, (sink_chunks + window_chunks) * chunk_latent_frames, rows, columns, dim]`, keys before
    values, with a row and a column for each patch, and `write_index` int64 `[batch]`, how many chunks of the row's
    video are finished. Beside `velocity` it gives `chunk_cache`, the same for this chunk's frames alone. At timestep 0
    and on finished latents (the clean-context pass) that is what belongs into the cache.
    """

    sink_chunks: PositiveInt = 1
    window_chunks: PositiveInt = 3
    layers: PositiveInt
    dim: PositiveInt


class SamplerInfo(_Strict):
    """Default sampler settings; see `models.samplers`."""

    name: SamplerName = "unipc"
    shift: float = Field(gt=0)
    num_train_timesteps: PositiveInt = 1000
    num_inference_steps: PositiveInt = 20
    guidance_scale: float = Field(ge=1)


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


class Manifest(_Strict):
    """`bundle.json`."""

    format: Literal[1] = FORMAT
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    family: Literal["wan"]
    rollout: Literal["bidirectional", "causal"]
    fps: PositiveInt
    chunk_latent_frames: PositiveInt = Field(description="Latent frames in one decoded chunk.")
    causal: CausalInfo | None = Field(default=None, description="There if, and only if, the rollout is causal.")
    text: TextInfo
    latent: LatentInfo
    sampler: SamplerInfo
    limits: LimitsInfo
    rewriter: RewriterInfo | None = Field(default=None, description="None: prompts are taken as they are.")
    captioner: CaptionerInfo | None = Field(default=None, description="None: no captions, and no best of several.")
    graphs: dict[GraphName, GraphInfo]
    files: dict[str, FileInfo] = Field(description="Every file of the bundle but the manifest itself.")
    versions: dict[str, str] = Field(description="Library versions that made the bundle.")

    @property
    def window(self) -> ContextWindow:
        """What a causal model remembers. Raises `ValueError` for a bidirectional one."""
        if self.causal is None:
            raise ValueError(f"{self.name} is {self.rollout}: it has no context window")
        return ContextWindow(self.chunk_latent_frames, self.causal.sink_chunks, self.causal.window_chunks)

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


class BundleError(ValueError):
    """A bundle that can't be served. The message is one sentence: what is wrong, and what to do about it."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk. `digest` is the manifest's sha256: it names the bundle's exact content in cache keys."""

    root: Path
    manifest: Manifest
    digest: str

    @classmethod
    def load(cls, path: Path | str) -> Bundle:
        """Read `bundle.json` without touching the large files; `verify` does that. Raises `BundleError`."""
        root = Path(path)
        if not root.is_dir():
            raise BundleError(f"There is no bundle at {root}: check the path, or make one with `rushes export`.")
        try:
            data = (root / MANIFEST).read_bytes()
        except OSError as error:
            raise BundleError(f"{root} is no bundle, since {MANIFEST} can't be read there: export it again.") from error
        manifest = _parse(root, data)
        for graph in get_args(GraphName):
            section = OPTIONAL_GRAPHS.get(graph)
            wanted = section is None or getattr(manifest, section) is not None
            if wanted and graph not in manifest.graphs:
                raise BundleError(f"The bundle {root} has no graph '{graph}': export it again.")
        for name in [manifest.text.tokenizer, *(graph.file for graph in manifest.graphs.values())]:
            if name not in manifest.files:
                raise BundleError(f"The bundle {root} uses '{name}' but does not list it in `files`: export it again.")
        bundle = cls(root, manifest, hashlib.sha256(data).hexdigest())
        for name in manifest.files:
            bundle._inside(name)
        return bundle

    def verify(self) -> None:
        """Check every file's presence, size and sha256. Reads the whole bundle once. Raises `BundleError`."""
        for name, expected in self.manifest.files.items():
            path = self._inside(name)
            if not path.is_file():
                raise BundleError(f"The bundle {self.root} lacks '{name}': copy or export it again.")
            size = path.stat().st_size
            if size != expected.bytes:
                raise BundleError(
                    f"The bundle {self.root} has '{name}' with {size} bytes instead of {expected.bytes}: "
                    "the copy was cut off or replaced, so copy or export it again."
                )
            if sha256_of(path) != expected.sha256:
                raise BundleError(
                    f"The bundle {self.root} has '{name}' with another sha256 than the manifest says: "
                    "it was damaged or changed, so copy or export it again."
                )

    def path_of(self, graph: GraphName) -> Path:
        """The graph's ONNX file."""
        return self._inside(self.manifest.graphs[graph].file)

    @property
    def tokenizer(self) -> Path:
        """The `tokenizers` JSON file."""
        return self._inside(self.manifest.text.tokenizer)

    def _inside(self, name: str) -> Path:
        """The path of a file of the bundle; a manifest from elsewhere must not reach other files of this machine."""
        path = self.root / name
        named = PurePosixPath(name)
        if named.is_absolute() or ".." in named.parts or not path.resolve().is_relative_to(self.root.resolve()):
            raise BundleError(f"The bundle {self.root} names '{name}', which lies outside: don't use this bundle.")
        return path


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(root: Path, data: bytes) -> Manifest:
    where = root / MANIFEST
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise BundleError(f"{where} is not valid JSON ({error}): copy or export the bundle again.") from error
    if not isinstance(raw, dict):
        raise BundleError(f"{where} must hold a JSON object: export the bundle again.")
    # Before anything else: a newer format has keys that this version would only call unknown.
    if raw.get("format") != FORMAT:
        raise BundleError(
            f"{where} has bundle format {raw.get('format')!r} and this version of rushes reads format {FORMAT}: "
            "export the bundle again with this version."
        )
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{where} is wrong at `{key}` ({first['msg']}): export the bundle again.") from error
