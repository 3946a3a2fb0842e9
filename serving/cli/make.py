"""Videos without a service of one's own: `rushes generate`, `caption` and `demo`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from serving.cli.terminal import Bundle, Prompt, Seconds, Seed, Size, by_name, console, output_file, said_in_one_line
from serving.config import MINI_BUNDLE, ConfigError


class Sampler(StrEnum):
    euler = "euler"
    unipc = "unipc"
    renoise = "renoise"


def generate(
    prompt: Prompt,
    output: Annotated[Path, typer.Option("--output", "-o", help="The MP4 to write.")] = Path("video.mp4"),
    seconds: Seconds = None,
    size: Size = None,
    seed: Seed = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strictly to follow the prompt; 1 is unguided.")] = None,
    negative: Annotated[str, typer.Option(help="What not to show.")] = "",
    scene: Annotated[
        list[str] | None,
        typer.Option(help="SECONDS:PROMPT, another prompt from then on; may be repeated. For causal models."),
    ] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="The sampler; the model's own when left out.")] = None,
    rewrite: Annotated[
        bool | None,
        typer.Option("--rewrite/--no-rewrite", help="Make a detailed prompt of a loose one; on if the model can."),
    ] = None,
    best_of: Annotated[int | None, typer.Option(help="Make so many and keep the one nearest to the prompt.")] = None,
    picture: Annotated[Path | None, typer.Option(help="A picture that the video begins with.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="fast or faster: ask the model in fewer of the steps, at some cost in quality.")
    ] = None,
    guidance_cache: Annotated[
        str | None,
        typer.Option(
            help="alternate: from the third guided step on, every second one has no unconditional pass; not exact."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:SCALE]", help="One of the bundle's LoRAs, and how much of it; may be repeated."),
    ] = None,
    codec: Annotated[str | None, typer.Option(help="h264, av1 or vp9; h264 when left out.")] = None,
    decoder: Annotated[
        str | None, typer.Option(help="full, or tiny if the model has one: several times as fast, less sharp.")
    ] = None,
    bundle: Bundle = MINI_BUNDLE,
) -> None:
    """Make one video in this process, without a service."""
    import asyncio
    from dataclasses import replace

    from models.bundle import Bundle as LoadedBundle
    from serving.oneshot import generate_file
    from serving.pipeline.request import make_spec

    with said_in_one_line():
        output_file(output)
        loaded = LoadedBundle.load(bundle)
        loaded.verify()
        spec = make_spec(
            loaded.manifest,
            prompt,
            seconds=seconds,
            size=size,
            seed=seed,
            negative_prompt=negative,
            num_inference_steps=steps,
            guidance_scale=guidance,
            rewrite_prompt=rewrite,
            best_of=best_of,
            scene_prompts=[_scene(text) for text in scene or ()],
            cache=cache,
            guidance_cache=guidance_cache,
            lora=[_lora(text) for text in lora or ()],
            codec=codec,
            decoder=decoder,
        )
        if sampler is not None:
            spec = replace(spec, sampler=sampler.value)
        asyncio.run(generate_file(loaded, spec, output, console, picture))
        console.print(f"seed {spec.seed}")
        print(output)


def caption(
    video: Annotated[Path, typer.Argument(help="Any video file; its beginning is looked at.")],
    bundle: Bundle = MINI_BUNDLE,
) -> None:
    """Say what a video shows, in the words of the model's training captions."""
    import asyncio

    from models.bundle import Bundle as LoadedBundle
    from serving.oneshot import caption_file

    with said_in_one_line():
        print(asyncio.run(caption_file(LoadedBundle.load(bundle), video)))


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The MP4 to write.")] = Path("demo.mp4"),
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a red ball bouncing on a sand floor at sunset",
    seconds: Seconds = None,
    seed: Seed = 1,
    bundle: Bundle = MINI_BUNDLE,
) -> None:
    """Start the service, watch it make one video chunk by chunk, save the video, and stop the service."""
    from serving.foreground import run_demo

    with said_in_one_line():
        output_file(output)
        run_demo(by_name([bundle]), {"prompt": prompt, "seconds": seconds, "seed": seed}, output, console)
        print(output)


def _scene(text: str) -> dict[str, object]:
    """`4.5:a blue ball` as an entry of `scene_prompts`."""
    start, colon, prompt = text.partition(":")
    try:
        return {"start_seconds": float(start), "prompt": prompt if colon else None}
    except ValueError:
        raise ConfigError(f"--scene must be SECONDS:PROMPT, not {text!r}") from None


def _lora(text: str) -> dict[str, object]:
    """`style:0.8` as an entry of `lora`."""
    name, colon, scale = text.partition(":")
    try:
        return {"name": name, "scale": float(scale) if colon else 1.0}
    except ValueError:
        raise ConfigError(f"--lora must be NAME:SCALE, not {text!r}") from None
