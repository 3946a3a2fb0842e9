"""What `rushes generate` does: one video in this process, with its progress shown."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from models.bundle import Bundle
from serving.media.fmp4 import remux_to_mp4
from serving.pipeline.geometry import latent_shape
from serving.pipeline.local import LocalPipeline
from serving.pipeline.stages import Fragment, StepDone, VideoSpec


async def generate_file(bundle: Bundle, spec: VideoSpec, output: Path, console: Console) -> None:
    """Write `output`, whole or not at all; the same bytes as the service's for the same spec."""
    _, latent_frames, _, _ = latent_shape(bundle.manifest, spec)
    chunks = -(-latent_frames // bundle.manifest.chunk_latent_frames)
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
            await pipeline.generate(spec, sink, on_progress)
    remux_to_mp4(made[0].init, (fragment.data for fragment in made), output)
