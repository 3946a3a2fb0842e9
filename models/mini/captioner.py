"""The captioner: a clip's latents in, its detailed canonical caption out. A transformer over latent patches."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.mini.rewriter import CONFIG, WEIGHTS
from models.mini.words import Block, WordDecoder, text_of, vocabulary

PATCH = 2
_WAVES = 6


class LatentEncoder(nn.Module):
    """Normalised `latents` `[batch, channels, frames, height, width]` to `memory` `[batch, tokens, width]` and
    `memory_mask` int64 `[batch, tokens]`; height and width even, up to `max_frames` frames.

    A token is a patch of one latent frame beside what changed there since the frame before. Its place is said as a
    share of the picture, so that other sizes look like the one that was trained on.
    """

    def __init__(self, channels: int, max_frames: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Linear(2 * channels * PATCH * PATCH, width)
        self.places = nn.Linear(4 * _WAVES, width)
        self.times = nn.Embedding(max_frames, width)
        self.blocks = nn.ModuleList(Block(width, heads, crossed=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        batch, channels, frames, height, width = latents.shape
        before = torch.cat([latents[:, :, :1], latents[:, :, :-1]], dim=2)
        x = torch.cat([latents, latents - before], dim=1)
        x = x.reshape(batch, 2 * channels, frames, height // PATCH, PATCH, width // PATCH, PATCH)
        x = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
        rows, columns = (_waves(side // PATCH, x.device) for side in (height, width))
        place = torch.cat(
            [
                rows[:, None].expand(-1, columns.shape[0], -1),
                columns[None].expand(rows.shape[0], -1, -1),
            ],
            dim=-1,
        )
        x = self.patches(x) + self.places(place) + self.times(torch.arange(frames, device=x.device))[:, None, None]
        x = x.flatten(1, 3)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), torch.ones_like(x[..., 0], dtype=torch.int64)


def _waves(count: int, device: torch.device) -> Tensor:
    """Sines and cosines of the places of `count` patches, as shares of the whole: `[count, 2 * _WAVES]`."""
    share = (torch.arange(count, device=device) + 0.5) / count
    angles = share[:, None] * (math.pi * 2.0 ** torch.arange(_WAVES, device=device))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Captioner(nn.Module):
    """Both halves, and how they are kept on disk: a folder with `config.json` and fp16 safetensors."""

    def __init__(
        self,
        words: Sequence[str],
        channels: int = 32,
        max_frames: int = 9,
        width: int = 96,
        heads: int = 3,
        layers: int = 3,
        decoder_layers: int = 2,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "words": list(words),
            "channels": channels,
            "max_frames": max_frames,
            "width": width,
            "heads": heads,
            "layers": layers,
            "decoder_layers": decoder_layers,
        }
        self.encoder = LatentEncoder(channels, max_frames, width, heads, layers)
        self.decoder = WordDecoder(len(words), 1, width, heads, decoder_layers)

    @classmethod
    def untrained(cls) -> Captioner:
        return cls(vocabulary())

    @classmethod
    def load(cls, folder: Path) -> Captioner:
        captioner = cls(**json.loads((folder / CONFIG).read_text()))
        captioner.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS).items()})
        return captioner.eval()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config, indent=1) + "\n")
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)

    def loss(self, latents: Tensor, targets: list[list[int]]) -> Tensor:
        memory, mask = self.encoder(latents)
        return self.decoder.loss(memory, mask, targets, [0] * len(targets))

    @torch.no_grad()
    def caption(self, latents: Tensor) -> list[str]:
        """Captions of normalised latents, greedily; only the first `max_frames` frames are looked at."""
        memory, mask = self.encoder(latents[:, :, : self.config["max_frames"]])
        spoken = self.decoder.greedy(memory, mask, [0] * len(latents))
        return [text_of([self.config["words"][id] for id in ids]) for ids in spoken]
