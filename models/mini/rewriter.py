"""The rewriter: a loose prompt in, the detailed canonical caption out. Two encoder and two decoder layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.mini.paraphrases import CHOICES
from models.mini.words import Block, WordDecoder, text_of, vocabulary
from models.spelling import MAX_NGRAMS, spell

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class PromptEncoder(nn.Module):
    """`ngrams` int64 `[batch, words, MAX_NGRAMS]` of `models.spelling` to `memory` `[batch, words, width]` and
    `memory_mask` int64 `[batch, words]`; a word without n-grams is padding."""

    def __init__(self, buckets: int, max_words: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(buckets + 1, width)
        self.places = nn.Embedding(max_words, width)
        self.blocks = nn.ModuleList(Block(width, heads, crossed=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ngrams: Tensor) -> tuple[Tensor, Tensor]:
        return self.contextualise(self.embed(ngrams), ngrams[..., 0] > 0)

    def embed(self, ngrams: Tensor) -> Tensor:
        """`[..., MAX_NGRAMS]` to `[..., width]`: each word by itself."""
        there = (ngrams > 0).to(torch.float32)
        total: Tensor = (self.embedding(ngrams) * there[..., None]).sum(-2)
        return total / there.sum(-1, keepdim=True).clamp(min=1.0).sqrt()

    def contextualise(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.places(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x, mask[:, None, None])
        return self.norm(x), mask.to(torch.int64)


class Rewriter(nn.Module):
    """Both halves, and how they are kept on disk: a folder with `config.json` and fp16 safetensors."""

    def __init__(
        self,
        words: Sequence[str],
        choices: int = CHOICES,
        buckets: int = 4096,
        max_prompt_words: int = 64,
        width: int = 96,
        heads: int = 3,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "words": list(words),
            "choices": choices,
            "buckets": buckets,
            "max_prompt_words": max_prompt_words,
            "width": width,
            "heads": heads,
            "layers": layers,
        }
        self.encoder = PromptEncoder(buckets, max_prompt_words, width, heads, layers)
        self.decoder = WordDecoder(len(words), choices, width, heads, layers)

    @classmethod
    def untrained(cls) -> Rewriter:
        return cls(vocabulary())

    @classmethod
    def load(cls, folder: Path) -> Rewriter:
        rewriter = cls(**json.loads((folder / CONFIG).read_text()))
        rewriter.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS).items()})
        return rewriter.eval()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config, indent=1) + "\n")
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)

    def spelled(self, prompts: Sequence[str]) -> Tensor:
        rows = [spell(prompt, self.config["max_prompt_words"], self.config["buckets"]) for prompt in prompts]
        ngrams = np.zeros((len(rows), max(map(len, rows)), MAX_NGRAMS), np.int64)
        for padded, row in zip(ngrams, rows, strict=True):
            padded[: len(row)] = row
        return torch.from_numpy(ngrams[:, :, : max(1, int((ngrams > 0).sum(2).max()))])

    def loss(self, prompts: Sequence[str], targets: list[list[int]], choices: Sequence[int]) -> Tensor:
        ngrams = self.spelled(prompts)
        # A batch has few different words: each is summed up once, a third of the step's time.
        words, places = torch.unique(ngrams.flatten(0, 1), dim=0, return_inverse=True)
        embedded = self.encoder.embed(words)[places].unflatten(0, ngrams.shape[:2])  # type: ignore[no-untyped-call]
        return self.decoder.loss(*self.encoder.contextualise(embedded, ngrams[..., 0] > 0), targets, choices)

    @torch.no_grad()
    def rewrite(self, prompts: Sequence[str], choices: Sequence[int]) -> list[str]:
        """Canonical captions, greedily; `choices` settle what the prompts leave open."""
        memory, mask = self.encoder(self.spelled(prompts))
        spoken = self.decoder.greedy(memory, mask, choices)
        return [text_of([self.config["words"][id] for id in ids]) for ids in spoken]
