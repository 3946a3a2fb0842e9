"""A bundle in words and tables, for people: what `rushes inspect` prints."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from models.bundle import Bundle, GraphInfo, Manifest


def describe(bundle: Bundle, console: Console) -> None:
    """Print what the model is, its graphs with their errors, its files, and the proof."""
    manifest = bundle.manifest
    console.print(_facts(bundle))
    console.print(_graphs(manifest))
    console.print(_files(manifest))
    console.print(_proof(manifest))


def _facts(bundle: Bundle) -> Table:
    manifest = bundle.manifest
    latent, sampler, limits = manifest.latent, manifest.sampler, manifest.limits
    table = Table(show_header=False, box=None, title=escape(manifest.name), title_justify="left", title_style="bold")
    rows = {
        "family": f"{manifest.family}, {manifest.rollout}",
        "latents": f"{latent.channels} channels, {latent.spatial}x smaller, {latent.temporal} frames each, "
        f"in chunks of {manifest.chunk_latent_frames}; decoding in chunks is {latent.streaming}",
        "text": f"{manifest.text.max_tokens} tokens of {manifest.text.dim}",
        "sampler": f"{sampler.name}, {sampler.num_inference_steps} steps, guidance {sampler.guidance_scale:g}",
        "limits": f"{limits.min_side} to {limits.max_side} pixels, up to {limits.max_seconds} s at {manifest.fps} fps",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "digest": bundle.digest,
    }
    if manifest.cost is not None:
        cost = manifest.cost
        rows["cost"] = (
            f"{cost.call:.2g} s a call, {cost.token:.2g} s a token, {cost.token_pair:.2g} s a pair; "
            f"{cost.chunk:.2g} s a chunk, {cost.pixel:.2g} s a pixel; "
            f"within {100 * cost.worst_error:.0f} %, {cost.device}"
        )
    if manifest.adapters:
        rows["merged"] = ", ".join(f"{adapter.name} x {adapter.scale:g}" for adapter in manifest.adapters)
    if manifest.loras:
        rows["loras"] = ", ".join(lora.name for lora in manifest.loras)
    if manifest.precision is not None:
        rows["precision"] = f"{manifest.precision.name}, of {manifest.precision.master}"
    if manifest.causal is not None:
        causal = manifest.causal
        rows["cache"] = (
            f"{causal.sink_chunks} + {causal.window_chunks} chunks, {causal.layers} layers of {causal.dim}, "
            f"positions by {causal.positions}"
        )
    if manifest.experts is not None:
        rows["experts"] = f"denoiser_2 below timestep {manifest.experts.boundary_timestep:g}"
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _graphs(manifest: Manifest) -> Table:
    table = Table(title="Graphs", title_justify="left")
    for name in ("graph", "output", "max error", "mean error", "shapes tried", "seconds"):
        table.add_column(name, justify="left" if name in ("graph", "output") else "right")
    for name, graph in manifest.graphs.items():
        rows = _errors(graph)
        for index, (output, largest, mean) in enumerate(rows):
            tried = str(len(graph.verified_shapes)) if graph.verified_shapes else "not verified"
            seconds = f"{graph.seconds:.1f}" if graph.seconds is not None else ""
            first = (name, tried, seconds) if index == 0 else ("", "", "")
            table.add_row(
                first[0], escape(output), largest, mean, first[1], first[2], end_section=output == rows[-1][0]
            )
    return table


def _errors(graph: GraphInfo) -> list[tuple[str, str, str]]:
    """A row for each output, and one for all caches together: a decoder has dozens."""

    def text(errors: dict[str, float], names: list[str]) -> str:
        known = [errors[name] for name in names if name in errors]
        return f"{max(known):.1e}" if known else ""

    names = list(graph.parity) or [output.name for output in graph.outputs]
    caches = [name for name in names if name.startswith(("cache_", "next_cache_"))]
    groups = [(name, [name]) for name in names if name not in caches]
    if caches:
        groups.append((f"{len(caches)} caches", caches))
    return [(label, text(graph.parity, group), text(graph.mean_error, group)) for label, group in groups]


def _files(manifest: Manifest) -> Table:
    table = Table(title="Files", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    table.add_column("sha256", overflow="fold")
    for name, info in manifest.files.items():
        table.add_row(escape(name), f"{info.bytes:,}", info.sha256)
    return table


def _proof(manifest: Manifest) -> str:
    proof = manifest.proof
    if proof is None:
        return "No whole video was compared."
    width, height = proof.size
    return (
        f"A whole video, {proof.frames} frames of {width}x{height} in {proof.steps} steps, against {proof.reference}: "
        f"{proof.psnr_db:.1f} dB, worst frame {proof.worst_frame_psnr_db:.1f} dB."
    )
