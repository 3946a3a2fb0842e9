"""Write what training made as a diffusers checkpoint: `python -m models.mini.checkpoint --folder runs/mini`.

`WanPipeline.from_pretrained` loads the result. Weights are stored in fp16; they are computed with in fp32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import WanPipeline

from models.mini.captions import build_tokenizer, wrap_tokenizer
from models.mini.conditioning import Captioned
from models.mini.latents import latent_statistics
from models.mini.networks import TEXT_LENGTH, build_scheduler, build_transformer
from models.mini.scene import FPS, FRAMES, HEIGHT, WIDTH
from models.mini.train_vae import trained_vae

SETTINGS = {
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


def assemble(folder: Path) -> WanPipeline:
    """The pipeline of the newest averaged weights in a training folder."""
    tokenizer = build_tokenizer()
    text, transformer, vae = Captioned(tokenizer), build_transformer(), trained_vae(folder)
    trained = torch.load(folder / "dit-averaged.pt", weights_only=True)
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


def save(pipeline: WanPipeline, path: Path) -> None:
    """fp16 safetensors whose config says fp32, so that plain loading computes in fp32."""
    pipeline.to(dtype=torch.float16)
    pipeline.text_encoder.config.dtype = "float32"
    pipeline.save_pretrained(path, safe_serialization=True)
    (path / "rushes.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"))
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "checkpoint")
    options = parser.parse_args()
    save(assemble(options.folder), options.output)
    print(options.output)


if __name__ == "__main__":
    main()
