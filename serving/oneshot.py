"""What `rushes generate` and `rushes caption` do: one video in this process."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from models.bundle import Bundle, BundleError
from serving.media.fmp4 import remux_to_mp4
from serving.media.frames import read_frames
from serving.pipeline.captioning import EngineCaptioner
from serving.pipeline.encoding import EngineEncoder
from serving.pipeline.geometry import latent_shape
from serving.pipeline.local import LocalPipeline
from serving.pipeline.stages import Fragment, StepDone, VideoSpec


async def generate_file(
    bundle: Bundle, spec: VideoSpec, output: Path, console: Console, picture: Path | None = None
) -> None:
    """Write `output`, whole or not at all; the same bytes as the service's for the same spec and `picture`.

    Raises `BundleError` for a model that can't begin with one, or needs one, and `OSError` for a file that is none.
    """
    manifest = bundle.manifest
    if picture is not None and not manifest.encodes:
        raise BundleError(f"{manifest.name} has no encoder for frames, so it can't begin with a picture.")
    if picture is None and manifest.pictured:
        raise BundleError(f"{manifest.name} makes videos of a picture: give one.")
    source = None
    if picture is not None:
        frames = read_frames(picture, fps=manifest.fps, width=spec.width, height=spec.height)
        source, spec = next(frames)[None], replace(spec, source=picture.name, source_frames=1)
    _, latent_frames, _, _ = latent_shape(bundle.manifest, spec)
    chunks = len(bundle.manifest.chunks(latent_frames))
    columns = (TextColumn("{task.description:7}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    made: list[Fragment] = []
    with Progress(*columns, console=console) as progress:
        steps_bar = progress.add_task("steps", total=None)
        chunks_bar = progress.add_task("chunks", total=chunks)

        def on_progress(done: StepDone) -> None:
            progress.update(steps_bar, completed=done.step, total=done.steps)

        async def sink(fragment: Fragment) -> None:
            made.append(fragment)
            progress.advance(chunks_bar)

        async with LocalPipeline.open(bundle, threads=len(os.sched_getaffinity(0))) as pipeline:
            spec = await pipeline.revise(spec)
            if spec.revised_prompt is not None:
                console.print(f"revised prompt: {spec.revised_prompt}", markup=False)
            await pipeline.generate(spec, sink, on_progress, source=source)
    remux_to_mp4(made[0].init, (fragment.data for fragment in made), output)


async def caption_file(bundle: Bundle, video: Path) -> str:
    """A caption of the beginning of `video`.

    Raises `BundleError` without a captioner, `OSError` for what is no video.
    """
    captioner, info = EngineCaptioner.open(bundle), bundle.manifest.captioner
    encoder = EngineEncoder.open(bundle, threads=len(os.sched_getaffinity(0)))
    if captioner is None or info is None or encoder is None:
        raise BundleError(f"The bundle {bundle.root} has no captioner: choose another one.")
    width, height = bundle.manifest.limits.default_size
    frames = read_frames(video, fps=bundle.manifest.fps, width=width, height=height)
    try:
        return await captioner.caption(encoder.encode(frames, info.max_frames))
    finally:
        await encoder.stop()
        await captioner.stop()
