"""A diffusers checkpoint to a bundle: the core of `rushes export`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp

from export import captioner, graphs, parity, words
from export.onnx import OPSET, ExportError, Graph, WeightFile, export_graph
from export.settings import CheckpointSettings
from models.bundle import (
    MANIFEST,
    Bundle,
    CausalInfo,
    FileInfo,
    GraphInfo,
    GraphName,
    LatentInfo,
    Manifest,
    TextInfo,
    sha256_of,
)
from models.wan import UnsupportedCheckpointError, WanCheckpoint

LIBRARIES = ("torch", "diffusers", "transformers", "onnx")
TOKENIZER = "tokenizer.json"

Progress = Callable[[str], None]


def export_checkpoint(checkpoint: Path | str, output: Path | str, progress: Progress = lambda line: None) -> Bundle:
    """Export a `WanPipeline` directory, verify every graph against torch, and put the bundle at `output`.

    A bundle that is already there is replaced. `progress` gets one line a step. Raises `ExportError`; then `output` is
    as it was before: the work happens in a sibling directory that is renamed at the end.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if output.exists() and not (output / MANIFEST).is_file() and not _is_empty(output):
        raise ExportError(f"{output} exists and is no bundle: choose another place.")
    settings = CheckpointSettings.load(checkpoint)
    progress(f"Loading {checkpoint}")
    try:
        parts = WanCheckpoint.load(checkpoint)
    except (UnsupportedCheckpointError, OSError) as error:
        raise ExportError(str(error)) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        _write(checkpoint, parts, settings, folder, progress)
        folder.chmod(0o755)
        _replace(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Bundle.load(output)


def _write(
    checkpoint: Path, parts: WanCheckpoint, settings: CheckpointSettings, folder: Path, progress: Progress
) -> None:
    geometry = graphs.Geometry.probe(parts)
    if int(parts.transformer.config.in_channels) != geometry.channels:
        raise ExportError("The denoiser and the VAE differ in their latent channels: no text-to-video.")
    rewriter, captions = words.rewriter(checkpoint), captioner.captioner(checkpoint, geometry)
    window = settings.window
    specs = (
        graphs.text_encoder(parts, settings.max_tokens),
        graphs.causal_denoiser(parts, settings.max_tokens, window)
        if window
        else graphs.denoiser(parts, settings.max_tokens),
        *graphs.decoders(parts, geometry),
        *(rewriter[1] if rewriter else ()),
        *((*captions[1], *captioner.encoders(parts, geometry)) if captions else ()),
    )
    weights: dict[str, WeightFile] = {}
    infos: dict[GraphName, GraphInfo] = {}
    for graph in specs:
        file = weights.setdefault(graph.weights, WeightFile(folder / graph.weights))
        infos[graph.name] = _graph(graph, file, folder, progress)
    progress("Comparing streamed decoding with decoding in one go")
    first, following = (parity.open_session(folder / infos[name].file) for name in ("decoder_first", "decoder_next"))
    streaming = parity.streaming_error(parts, first, following)
    following_info = infos["decoder_next"]
    infos["decoder_next"] = following_info.model_copy(
        update={"parity": following_info.parity | {"streaming": streaming}}
    )
    progress(f"Streamed decoding agrees within {streaming:.1e}")
    if captions:
        progress("Comparing streamed encoding with encoding in one go")
        first, following = (
            parity.open_session(folder / infos[name].file) for name in ("encoder_first", "encoder_next")
        )
        error = captioner.encoding_error(parts, first, following, geometry)
        following_info = infos["encoder_next"]
        infos["encoder_next"] = following_info.model_copy(
            update={"parity": following_info.parity | {"streaming": error}}
        )
    _copy_tokenizer(parts.tokenizer, folder / TOKENIZER)

    config = parts.transformer.config
    causal = (
        CausalInfo(
            sink_chunks=window.sink_chunks,
            window_chunks=window.window_chunks,
            layers=int(config.num_layers),
            dim=int(config.num_attention_heads * config.attention_head_dim),
        )
        if window
        else None
    )
    manifest = Manifest(
        name=str(settings.name),
        family="wan",
        rollout=settings.rollout,
        fps=settings.fps,
        chunk_latent_frames=settings.chunk_latent_frames,
        causal=causal,
        text=TextInfo(tokenizer=TOKENIZER, max_tokens=settings.max_tokens, dim=int(config.text_dim)),
        latent=LatentInfo(
            channels=geometry.channels,
            spatial=geometry.spatial,
            temporal=geometry.temporal,
            patch=int(config.patch_size[1]),
        ),
        sampler=settings.sampler_info(parts.scheduler),
        limits=settings.limits,
        rewriter=rewriter[0] if rewriter else None,
        captioner=captions[0] if captions else None,
        graphs=infos,
        files={
            path.name: FileInfo(sha256=sha256_of(path), bytes=path.stat().st_size) for path in sorted(folder.iterdir())
        },
        versions={name: version(name) for name in LIBRARIES} | {"opset": str(OPSET)},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1, exclude_none=True) + "\n")


def _graph(graph: Graph, weights: WeightFile, folder: Path, progress: Progress) -> GraphInfo:
    progress(f"Exporting {graph.name}")
    inputs, outputs = export_graph(graph, weights)
    errors = parity.graph_errors(graph, parity.open_session(folder / graph.file))
    floats = max(error for name, error in errors.items() if name != "frames")
    progress(f"{graph.name} agrees with torch within {floats:.1e}")
    return GraphInfo(
        file=graph.file,
        inputs=inputs,
        outputs=outputs,
        parity=errors,
        verified_shapes=tuple(
            {name: tuple(value.shape) for name, value in feeds.items() if not name.startswith("cache")}
            for feeds in (graph.example, *graph.cases)
        ),
    )


def _copy_tokenizer(source: Path, target: Path) -> None:
    """transformers saves whatever padding and truncation was last used; serving pads by itself."""
    tokenizer = json.loads(source.read_text(encoding="utf-8"))
    tokenizer["padding"] = tokenizer["truncation"] = None
    target.write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _replace(folder: Path, output: Path) -> None:
    """Put a finished bundle in place; an older one is moved aside first, since a directory can't be overwritten."""
    if not output.exists():
        folder.rename(output)
        return
    old = Path(mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
    output.rename(old / output.name)
    try:
        folder.rename(output)
    except BaseException:
        (old / output.name).rename(output)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
