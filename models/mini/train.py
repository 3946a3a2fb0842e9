"""Train the bundled model from nothing: `python -m models.mini.train vae`, then `latents`, then `dit`.

Each stage resumes where it stopped; loss curves are written as pictures beside its state. `decoder` goes on with the
VAE's decoder alone, so that the latents a denoiser was trained on stay valid. `captioner` and `tiny_decoder` need
the latents alone (the latter of long clips), `rewriter` none of the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from models.mini.latents import LONG, cache_latents
from models.mini.scene import FRAMES
from models.mini.train_captioner import train_captioner
from models.mini.train_causal import train_causal, train_distil
from models.mini.train_dit import train_dit
from models.mini.train_rewriter import train_rewriter
from models.mini.train_tiny_decoder import train_tiny_decoder
from models.mini.train_vae import train_vae
from models.mini.training import Run, spawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    stages = ["vae", "decoder", "latents", "dit", "causal", "distil", "rewriter", "captioner", "tiny_decoder"]
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"), help="states, caches and curves")
    parser.add_argument("--minutes", type=float, default=30, help="budget of the stage over all its resumptions")
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes that share gradients")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--clips", type=int, default=3000, help="clips to cache (latents)")
    parser.add_argument(
        "--frames", type=int, default=FRAMES, help=f"frames of a cached clip; {LONG} for causal training"
    )
    parser.add_argument("--start", type=Path, help="begin with this checkpoint's weights instead of from nothing")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser first (wants a C++ compiler)")
    options = parser.parse_args()
    run = Run(
        options.folder,
        options.stage,
        options.minutes,
        workers=options.workers,
        learning_rate=options.learning_rate,
        start=options.start,
        compile=options.compile,
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
