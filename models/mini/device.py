"""What differs between training on CPUs and on a GPU: precision, where data lies, batch sizes and learning rates."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A stage's peak learning rate and how many examples a step has of two kinds.

    `part`: crops, short clips, videos without a clean past. `whole`: whole clips, videos with one.
    """

    learning_rate: float
    part: int
    whole: int


# On CPUs a step's time grows with its batch. On a GPU a step is some thousand kernels, of 5 to 10 microseconds to
# launch each, whatever the batch: there a batch is as large as about doubles that time (see the README's estimates).
#
# Learning rates grow with the square root of the batch, but no further than to double. A step of Muon is as long
# however little noise its gradient has, and at 6e-3 its spectral norm for a matrix of width 256 is
# 0.2 * sqrt(256) * 6e-3 = 0.019: Muon's usual 0.02.
RECIPES: dict[str, dict[str, Recipe]] = {
    "cpu": {
        "vae": Recipe(2e-3, 4, 1),
        "decoder": Recipe(2e-3, 4, 1),
        "latents": Recipe(0.0, 8, 8),
        "dit": Recipe(3e-3, 16, 12),
        "captioner": Recipe(2e-3, 32, 32),
        "causal": Recipe(2e-3, 8, 4),
        "distil": Recipe(1e-3, 4, 4),
        "tiny_decoder": Recipe(3e-3, 6, 1),
        "rewriter": Recipe(2e-3, 64, 64),
    },
    "cuda": {
        "vae": Recipe(4e-3, 128, 32),
        "decoder": Recipe(4e-3, 128, 32),
        "latents": Recipe(0.0, 64, 64),
        "dit": Recipe(6e-3, 256, 256),
        "captioner": Recipe(4e-3, 256, 256),
        "causal": Recipe(4e-3, 128, 64),
        "distil": Recipe(2e-3, 64, 64),
        "tiny_decoder": Recipe(6e-3, 96, 32),
        "rewriter": Recipe(2e-3, 64, 64),
    },
}


def recipe(device: torch.device, stage: str) -> Recipe:
    return RECIPES[device.type if device.type in RECIPES else "cuda"][stage]


def prepare(name: str) -> torch.device:
    """The device of that name, set up for training. Raises `ValueError` where there is none."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("PyTorch sees no CUDA device here")
        # TF32 in what autocast leaves in fp32; cuDNN's convolutions take it by default.
        torch.set_float32_matmul_precision("high")
        # The VAE's 3-D convolutions come in few shapes, as it goes over four frames at a time, and cuDNN's first guess
        # at how to do one can be several times slower than its best.
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = 4
    return device


def has_bf16(device: torch.device = CPU) -> bool:
    """Whether matrices are multiplied in bf16 there; a CPU that emulates it would be slower than in fp32."""
    return device.type != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products in bf16, where that is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def placed(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor there; on the CPU they share their memory."""
    return torch.from_numpy(array).to(device)


def peak_memory_gib(device: torch.device) -> float:
    """Most GPU memory that tensors took since this was last asked; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 2**30
