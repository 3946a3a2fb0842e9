"""Train the bundled model from nothing: `python -m models.mini.train vae`, then `latents`, then `dit`.

Each stage resumes where it stopped; loss curves are written as pictures beside its state. `decoder` goes on with the
VAE's decoder alone, so that the latents a denoiser was trained on stay valid. `captioner` and `tiny_decoder` need
the latents alone (the latter of long clips), `rewriter` none of the others. `all` trains everything but the rewriter
in one process and within the given minutes: for a GPU.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from models.mini.clips import LONG
from models.mini.device import prepare, recipe
from models.mini.latents import cache_latents
from models.mini.scene import FRAMES
from models.mini.train_all import Plan, train_all
from models.mini.train_captioner import train_captioner
from models.mini.train_causal import train_causal, train_distil
from models.mini.train_dit import train_dit
from models.mini.train_rewriter import train_rewriter
from models.mini.train_tiny_decoder import train_tiny_decoder
from models.mini.train_vae import train_vae
from models.mini.training import Run, spawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    stages = ["all", "vae", "decoder", "latents", "dit", "causal", "distil", "rewriter", "captioner", "tiny_decoder"]
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"), help="states, caches and curves")
    parser.add_argument(
        "--minutes", type=float, default=30, help="budget of the stage over all its resumptions, or of all stages"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="batch sizes are in models/mini/device.py"
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="single-threaded processes that share gradients, by default 2; or that render clips, by default on all "
        "cores but one (all). A GPU has one",
    )
    parser.add_argument("--learning-rate", type=float, help="the peak, for one stage; by default the device's recipe's")
    parser.add_argument("--clips", type=int, default=3000, help="clips to cache (latents, all)")
    parser.add_argument("--long-clips", type=int, default=800, help=f"clips of {LONG} frames (all)")
    parser.add_argument("--keep", type=Path, help="where all puts weights and logs while it goes on (all)")
    parser.add_argument(
        "--frames", type=int, default=FRAMES, help=f"frames of a cached clip; {LONG} for causal training"
    )
    parser.add_argument("--start", type=Path, help="begin with this checkpoint's weights instead of from nothing")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser first (wants a C++ compiler)")
    options = parser.parse_args()
    try:
        device = prepare(options.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    if options.stage == "all":
        if options.keep is None:
            parser.error("all wants --keep")
        if options.learning_rate is not None:
            parser.error("all takes no --learning-rate: each stage has its own")
        try:
            train_all(
                Plan(
                    options.folder,
                    options.keep,
                    device,
                    options.minutes,
                    options.clips,
                    options.long_clips,
                    options.workers or max(1, len(os.sched_getaffinity(0)) - 1),
                    options.start,
                    options.compile,
                )
            )
        except FileExistsError as error:
            parser.error(str(error))
        return
    workers = options.workers or (2 if device.type == "cpu" else 1)
    if options.stage == "rewriter" and device.type != "cpu":
        parser.error("the rewriter is trained on CPUs")
    if workers > 1 and device.type != "cpu":
        parser.error("only CPUs' workers share gradients")
    run = Run(
        options.folder,
        options.stage,
        options.minutes,
        workers=workers,
        learning_rate=options.learning_rate or recipe(device, options.stage).learning_rate,
        start=options.start,
        compile=options.compile,
        device=device,
    )
    match options.stage:
        case "latents":
            spawn(cache_latents, run, options.clips, options.frames)
        case "dit":
            spawn(train_dit, run)
        case "causal":
            spawn(train_causal, run)
        case "distil":
            spawn(train_distil, run)
        case "rewriter":
            spawn(train_rewriter, run)
        case "captioner":
            spawn(train_captioner, run)
        case "tiny_decoder":
            spawn(train_tiny_decoder, run)
        case stage:
            spawn(train_vae, run, stage == "decoder")


if __name__ == "__main__":
    main()
