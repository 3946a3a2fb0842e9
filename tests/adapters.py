"""LoRA files as diffusers' training scripts save them, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model_state_dict

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def save_adapter(model: Any, folder: Path, seed: int, **config: Any) -> Path:
    """An adapter for `model`, a `WanTransformer3DModel`, which it changes; returns the file."""
    model.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | config))
    torch.manual_seed(seed)
    layers = {name: 0.2 * torch.randn_like(value) for name, value in get_peft_model_state_dict(model).items()}
    WanPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors"
