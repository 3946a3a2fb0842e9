"""Write what training made as a diffusers checkpoint: `python -m models.mini.checkpoint --folder runs/mini`.

`WanPipeline.from_pretrained` loads the result. Weights are stored in fp16; they are computed with in fp32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

from models.mini.captioner import Captioner
from models.mini.captions import build_tokenizer, wrap_tokenizer
from models.mini.conditioning import Captioned
from models.mini.latents import latent_statistics
from models.mini.networks import TEXT_LENGTH, build_scheduler, build_transformer
from models.mini.rewriter import Rewriter
from models.mini.scene import FPS, FRAMES, HEIGHT, WIDTH
from models.mini.train_causal import FEW_STEPS, GUIDANCE, WINDOW
from models.mini.train_tiny_decoder import build_tiny_decoder
from models.mini.train_vae import trained_vae
from models.tiny_decoder import TINY_DECODER

SETTINGS: dict[str, Any] = {
    "name": "mini",
    "fps": FPS,
    "max_tokens": TEXT_LENGTH,
    "chunk_latent_frames": 3,
    "sampler": {"name": "unipc", "num_inference_steps": 20, "guidance_scale": 2.0},
    "limits": {
        "default_size": [WIDTH, HEIGHT],
        "min_side": 64,
        "max_side": 256,
        "size_multiple": 16,
        "default_seconds": (FRAMES - 1) // FPS,
        "max_seconds": 8,
    },
}


STAGES = ("dit", "causal", "distil")


def settings_of(stage: str) -> dict[str, Any]:
    """`rushes.json` for the denoiser that a stage of training leaves."""
    if stage == "dit":
        return SETTINGS
    few = stage == "distil"
    return SETTINGS | {
        "name": "mini-causal",
        "rollout": "causal",
        "causal": {"sink_chunks": WINDOW.sink_chunks, "window_chunks": WINDOW.window_chunks},
        "sampler": {
            "name": "euler",
            "num_inference_steps": FEW_STEPS if few else 12,
            "guidance_scale": 1.0 if few else GUIDANCE,
        },
        "limits": SETTINGS["limits"] | {"max_seconds": 120},
    }


def assemble(folder: Path, stage: str = "dit") -> WanPipeline:
    """The pipeline of the newest averaged weights in a training folder, with the denoiser of one stage."""
    tokenizer = build_tokenizer()
    text, transformer, vae = Captioned(tokenizer), build_transformer(), trained_vae(folder)
    trained = torch.load(folder / f"{stage}-averaged.pt", weights_only=True)
    text.load_state_dict(trained["text"])
    transformer.load_state_dict(trained["transformer"])
    mean, std = latent_statistics(folder)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    return WanPipeline(
        tokenizer=wrap_tokenizer(tokenizer, TEXT_LENGTH),
        text_encoder=text.encoder,
        vae=vae,
        transformer=transformer,
        scheduler=build_scheduler(),
    )


def save(pipeline: WanPipeline, path: Path, stage: str = "dit") -> None:
    """fp16 safetensors whose config says fp32, so that plain loading computes in fp32."""
    pipeline.to(dtype=torch.float16)
    pipeline.text_encoder.config.dtype = "float32"
    pipeline.save_pretrained(path, safe_serialization=True)
    (path / "rushes.json").write_text(json.dumps(settings_of(stage), indent=2) + "\n")


def save_words(folder: Path, path: Path) -> None:
    """The newest averaged rewriter and captioner of a training folder, if it has them, as `path/rewriter` and so on."""
    for name, kind in (("rewriter", Rewriter), ("captioner", Captioner)):
        state = folder / f"{name}-averaged.pt"
        if state.exists():
            module: Rewriter | Captioner = kind.untrained()
            module.load_state_dict(torch.load(state, weights_only=True)[name])
            module.save(path / name)


def save_tiny_decoder(folder: Path, path: Path) -> None:
    """The newest averaged tiny decoder of a training folder, if it has one."""
    state = folder / "tiny_decoder-averaged.pt"
    if state.exists():
        decoder = build_tiny_decoder()
        decoder.load_state_dict(torch.load(state, weights_only=True)["tiny_decoder"])
        decoder.save(path / TINY_DECODER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"))
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--stage", choices=STAGES, default="dit", help="whose denoiser; all but dit are causal")
    parser.add_argument(
        "--only-words", action="store_true", help="rewriter and captioner alone; the rest stays as it is"
    )
    options = parser.parse_args()
    if not options.only_words:
        save(assemble(options.folder, options.stage), options.output, options.stage)
        save_tiny_decoder(options.folder, options.output)
    save_words(options.folder, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
