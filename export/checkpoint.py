"""A diffusers checkpoint to a bundle: the core of `rushes export`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from export import captioner, parity, preview
from export.lora import Adapter, merge
from export.named_lora import NamedLora, attach, switched
from export.onnx import OPSET, ExportError, WeightFile, export_graph
from export.proof import prove
from export.settings import CheckpointSettings
from export.small_models import SmallModels
from export.workspace import check_place, replaced
from models.bundle import (
    MANIFEST,
    Bundle,
    CausalInfo,
    FileInfo,
    GraphInfo,
    GraphName,
    Manifest,
    NamedLoraInfo,
    TextInfo,
    sha256_of,
)
from models.families import Family, Plan, UnsupportedCheckpointError, open_checkpoint
from models.graph import Graph
from models.wan_family import WanFamily

LIBRARIES = ("torch", "diffusers", "transformers", "onnx")
TOKENIZER = "tokenizer.json"

Progress = Callable[[str], None]


def export_checkpoint(
    checkpoint: Path | str,
    output: Path | str,
    progress: Progress = lambda line: None,
    *,
    verify: bool = True,
    adapters: Sequence[Adapter] = (),
    loras: Sequence[NamedLora] = (),
) -> Bundle:
    """Export a diffusers directory, prove the bundle equal to it unless told not to, and put it at `output`.

    `adapters` are merged into its denoisers first; `loras` stay apart, for requests to name. A bundle that is already
    there is replaced. `progress` gets one line a step. Raises `ExportError`; then `output` is as it was before: the
    work happens in a sibling directory that is renamed at the end.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    check_place(output)
    settings = CheckpointSettings.load(checkpoint)
    plan = replace(settings.plan(checkpoint), lazily=not verify and not adapters)
    progress(f"Loading {checkpoint}")
    try:
        family = open_checkpoint(checkpoint, plan)
        # Here, since later it would be said after minutes of work.
        settings.sampler_info(family.scheduler)
        merged = tuple([merge(adapter, family.transformers, family.lora_loader) for adapter in adapters])
        named, branches = attach(loras, family.transformers, family.lora_loader)
        graphs = tuple([switched(graph, branches) for graph in family.graphs(plan)])
    except (UnsupportedCheckpointError, OSError) as error:
        raise ExportError(str(error)) from error
    extras = SmallModels.of(checkpoint, family)
    with replaced(output) as folder:
        manifest = _write(family, graphs, extras, settings, plan, named, folder, progress, verify)
        manifest = manifest.model_copy(update={"adapters": merged, "preview": preview.fit(manifest, folder)})
        if verify:
            progress("Comparing a whole video")
            manifest = manifest.model_copy(update={"proof": prove(family, graphs, manifest, folder)})
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1, exclude_none=True) + "\n")
    return Bundle.load(output)


def _write(
    family: Family,
    graphs: Sequence[Graph],
    extras: SmallModels,
    settings: CheckpointSettings,
    plan: Plan,
    loras: tuple[NamedLoraInfo, ...],
    folder: Path,
    progress: Progress,
    verify: bool,
) -> Manifest:
    """Every file but the manifest, which is returned."""
    weights: dict[str, WeightFile] = {}
    infos: dict[GraphName, GraphInfo] = {}
    for graph in (*graphs, *extras.graphs):
        file = weights.setdefault(graph.weights, WeightFile(folder / graph.weights))
        infos[graph.name] = _graph(graph, file, folder, progress, verify)
    if verify:
        infos["decoder_next"] = _streaming(family, infos["decoder_next"], plan, folder, progress)
        if "encoder_next" in infos:
            infos["encoder_next"] = _encoding(family, infos["encoder_next"], folder, progress)
    _copy_tokenizer(family.tokenizer, folder / TOKENIZER)
    causal = None
    if plan.window is not None:
        layers, dim = family.cache_size()
        causal = CausalInfo(
            sink_chunks=plan.window.sink_chunks,
            window_chunks=plan.window.window_chunks,
            positions=plan.positions,
            layers=layers,
            dim=dim,
        )
    return Manifest(
        name=str(settings.name),
        family=family.name,
        rollout=settings.rollout,
        fps=settings.fps,
        chunk_latent_frames=settings.chunk_latent_frames,
        causal=causal,
        experts=family.experts,
        image=family.image,
        text=TextInfo(tokenizer=TOKENIZER, max_tokens=settings.max_tokens, dim=family.text_dim),
        latent=family.latent,
        sampler=settings.sampler_info(family.scheduler),
        limits=settings.limits,
        rewriter=extras.rewriter,
        captioner=extras.captioner,
        tiny_decoder=extras.tiny_decoder,
        loras=loras,
        graphs=infos,
        files={
            path.name: FileInfo(sha256=sha256_of(path), bytes=path.stat().st_size) for path in sorted(folder.iterdir())
        },
        versions={name: version(name) for name in LIBRARIES} | {"opset": str(OPSET)},
    )


def _graph(graph: Graph, weights: WeightFile, folder: Path, progress: Progress, verify: bool) -> GraphInfo:
    progress(f"Exporting {graph.name}")
    start = time.perf_counter()
    inputs, outputs = export_graph(graph, weights)
    info = GraphInfo(file=graph.file, inputs=inputs, outputs=outputs)
    if verify:
        errors = parity.graph_errors(graph, parity.open_session(folder / graph.file))
        floats = max(error for name, error in errors.largest.items() if name != "frames")
        progress(f"{graph.name} agrees with torch within {floats:.1e}")
        shapes = tuple(
            {name: tuple(value.shape) for name, value in feeds.items() if not name.startswith("cache")}
            for feeds in (graph.example, *graph.cases)
        )
        info = info.model_copy(update={"parity": errors.largest, "mean_error": errors.mean, "verified_shapes": shapes})
    return info.model_copy(update={"seconds": round(time.perf_counter() - start, 2)})


def _streaming(family: Family, info: GraphInfo, plan: Plan, folder: Path, progress: Progress) -> GraphInfo:
    """The decoder's proof, with what chunk by chunk is against one go."""
    progress("Comparing streamed decoding with decoding in one go")
    first, following = (parity.open_session(folder / f"decoder_{name}.onnx") for name in ("first", "next"))
    if family.latent.streaming == "exact":
        error = parity.streaming_error(family, first, following)
        progress(f"Streamed decoding agrees within {error:.1e}")
        return info.model_copy(update={"parity": info.parity | {"streaming": error}})
    largest, mean = parity.seam_error(family, first, following, plan.chunk_latent_frames)
    progress(f"Decoding chunk by chunk is off by {largest:.2g} at most, {mean:.2g} on average")
    return info.model_copy(
        update={"parity": info.parity | {"seam": largest}, "mean_error": info.mean_error | {"seam": mean}}
    )


def _encoding(family: Family, info: GraphInfo, folder: Path, progress: Progress) -> GraphInfo:
    """The encoder's proof, with what streamed encoding is against one go."""
    assert isinstance(family, WanFamily)  # or there would be no such graph
    progress("Comparing streamed encoding with encoding in one go")
    first, following = (parity.open_session(folder / f"encoder_{name}.onnx") for name in ("first", "next"))
    error = captioner.encoding_error(family.checkpoint, first, following, family.latent)
    return info.model_copy(update={"parity": info.parity | {"streaming": error}})


def _copy_tokenizer(source: Path, target: Path) -> None:
    """transformers saves whatever padding and truncation was last used; serving pads by itself."""
    tokenizer = json.loads(source.read_text(encoding="utf-8"))
    tokenizer["padding"] = tokenizer["truncation"] = None
    target.write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", encoding="utf-8")
