"""How good the bundled model is: `python -m models.mini.evaluate` asks the service for held-out clips and judges them.

The prompts name attribute combinations that training never saw; seeds are fixed and settings are the model's defaults,
so two runs on one bundle give the same figures. Videos come over HTTP, as a user's do. Without `--url` a service of its
own is started and stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from models.mini.asks import Ask, captioned, held_out, lasting, loosely
from models.mini.figures import ALL_BAR, Answer, answer, figures, measures, report, table
from models.mini.render import render
from models.mini.scene import make_scene
from models.mini.sheet import contact_sheet, strip
from models.mini.videos import Frames, generate, service

CHECKPOINT = Path(__file__).parent / "checkpoint"


def reconstruction_psnr(checkpoint: Path, clips: int) -> list[float]:
    """PSNR in dB of held-out clips through the checkpoint's VAE. Raises `ImportError` without the export extra."""
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32).eval()
    asked = held_out(clips // 2, "one", seed=1) + held_out(clips - clips // 2, "two", seed=1)
    psnr = []
    for index, attributes in enumerate(asked):
        clip = render(make_scene(attributes, np.random.default_rng(index)))
        pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            again = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        psnr.append(10 * math.log10(4 / float((again - pixels).square().mean())))
    return psnr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="serve this bundle; the bundled model when left out")
    parser.add_argument("--url", help="use the service at this address")
    parser.add_argument(
        "--prompts", type=int, default=200, help="one-object prompts; half as many with two, a quarter with two beats"
    )
    parser.add_argument("--rewriting", action="store_true", help="loose words too, with and without a rewriter")
    parser.add_argument("--causal", action="store_true", help="long videos too: their first and last two seconds")
    parser.add_argument("--long-prompts", type=int, default=20, help="how many long videos")
    parser.add_argument("--long-seconds", type=int, default=60, help="how long they are")
    parser.add_argument("--all-bar", type=float, default=ALL_BAR, help="least share with all attributes right")
    parser.add_argument("--in-flight", type=int, default=4, help="videos asked for at a time")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="whose VAE is measured")
    parser.add_argument("--against", type=Path, help="an earlier evaluation.json, to compare with")
    parser.add_argument("--sheet-rows", type=int, default=40, help="videos of each group on the contact sheet")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/evaluation"), help="folder for the contact sheet and JSON"
    )
    options = parser.parse_args()
    if options.url and options.bundle:
        parser.error("--url names a service that has its bundle already: leave --bundle out")
    if min(options.prompts, options.long_prompts) < 1:
        parser.error("--prompts and --long-prompts must be at least 1")
    if options.long_seconds < 4:
        parser.error("--long-seconds must be at least 4")
    before = json.loads(options.against.read_text()) if options.against else None
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    asks = _asks(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the service is stopped too
    answers: dict[int, Answer] = {}
    strips: dict[int, NDArray[np.uint8]] = {}

    def use(index: int, frames: Frames) -> None:
        answers[index] = answer(asks[index], frames)
        if sum(a.group == asks[index].group for a in asks[:index]) < options.sheet_rows:
            strips[index] = strip(frames)

    try:
        with nullcontext(options.url) if options.url else service(options.bundle, console) as url:
            asyncio.run(generate(url, [ask.body for ask in asks], options.in_flight, console, use))
    except* (RuntimeError, TimeoutError, httpx.HTTPError) as group:
        error = group.exceptions[0]
        sys.exit(f"evaluate: {error or type(error).__name__}")
    found = [answers[index] for index in range(len(asks))]
    shares, others = figures(found, options.all_bar), measures(found, _psnr(options.checkpoint, console))
    console.print(table(shares, others, before))
    shown = sorted(strips)
    contact_sheet([answers[index] for index in shown], [strips[index] for index in shown], options.out / "sheet.png")
    (options.out / "evaluation.json").write_text(json.dumps(report(found, shares, others), indent=2) + "\n")
    console.print(f"{options.out / 'sheet.png'} and {options.out / 'evaluation.json'}")


def _asks(options: argparse.Namespace) -> list[Ask]:
    count = options.prompts
    asks = captioned("one", count) + captioned("two", math.ceil(count / 2)) + captioned("beats", math.ceil(count / 4))
    if options.rewriting:
        asks += loosely(count, True) + loosely(count, False)
    if options.causal:
        asks += lasting(options.long_prompts, options.long_seconds)
    return asks


def _psnr(checkpoint: Path, console: Console) -> list[float]:
    if not (checkpoint / "vae").is_dir():
        console.print(f"VAE reconstruction: not measured, there is no {checkpoint / 'vae'}")
        return []
    try:
        return reconstruction_psnr(checkpoint, 8)
    except ImportError as error:
        console.print(f"VAE reconstruction: not measured, the export extra is not installed ({error.name})")
        return []


if __name__ == "__main__":
    main()
