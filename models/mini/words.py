"""The words of canonical captions as a closed vocabulary, and the small causal decoder that speaks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from models.mini import captions

PAD, END = 0, 1
SPECIAL = ("", "</s>")
MAX_WORDS = 48


def vocabulary() -> list[str]:
    """Every word that `captions.canonical` can write, behind the special ones; always in the same order."""
    tables: tuple[Mapping[Any, Sequence[str]], ...] = (
        captions.MOTIONS,
        captions.FLOORS,
        captions.LIGHTS,
        captions.CAMERAS,
    )
    phrases = [
        *(w[0] for table in tables for w in table.values()),
        *captions.SIZES,
        *captions.ALL_COLORS,
        *captions.NOUNS,
        *captions.RELATIONS,
        "a , then",
    ]
    return [*SPECIAL, *sorted({word for phrase in phrases for word in phrase.split()})]


def words_of(caption: str) -> list[str]:
    return caption.replace(",", " ,").split()


def text_of(words: Sequence[str]) -> str:
    return " ".join(words).replace(" ,", ",")


def encode(caption: str, index: dict[str, int]) -> list[int]:
    """Ids with the end mark. Raises `KeyError` for a word of no canonical caption."""
    return [*(index[word] for word in words_of(caption)), END]


class Attention(nn.Module):
    """Multi-head attention of `x` `[batch, tokens, width]` over `context`, which is `x` itself when left out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        query = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(x if context is None else context).chunk(2, dim=-1)
        key = key.unflatten(2, (self.heads, -1)).transpose(1, 2)
        value = value.unflatten(2, (self.heads, -1)).transpose(1, 2)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(seen.transpose(1, 2).flatten(2, 3))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block, with attention over a memory if `crossed`."""

    def __init__(self, width: int, heads: int, crossed: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if crossed else 2))
        self.own = Attention(width, heads)
        self.cross = Attention(width, heads) if crossed else None
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.own(self.norms[0](x), mask=mask)
        if self.cross is not None:
            x = x + self.cross(self.norms[1](x), memory, memory_mask)
        return x + self.mlp(self.norms[-1](x))  # type: ignore[no-any-return]


class WordDecoder(nn.Module):
    """`ids` int64 `[batch, length]` (a start mark, then words), `memory` `[batch, tokens, width]` and `memory_mask`
    int64 `[batch, tokens]` to `logits` `[batch, length, words]` of what comes next at each place.

    Start mark i is id `words + i`. Any length up to `MAX_WORDS`.
    """

    def __init__(self, words: int, starts: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.words = words
        self.embedding = nn.Embedding(words + starts, width)
        self.places = nn.Embedding(MAX_WORDS, width)
        self.blocks = nn.ModuleList(Block(width, heads, crossed=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words)

    def forward(self, ids: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1], device=ids.device)
        causal = place[:, None] >= place[None]
        seen = memory_mask[:, None, None].bool()
        x = self.embedding(ids) + self.places(place)
        for block in self.blocks:
            x = block(x, causal, memory, seen)
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def loss(self, memory: Tensor, memory_mask: Tensor, targets: list[list[int]], starts: Sequence[int]) -> Tensor:
        """Mean cross-entropy of the targets' ids (which end with `END`)."""
        length = max(map(len, targets))
        wanted = torch.tensor([ids + [PAD] * (length - len(ids)) for ids in targets]).to(memory.device)
        begun = torch.tensor(starts).to(memory.device)[:, None] + self.words
        logits = self(torch.cat([begun, wanted[:, :-1]], dim=1), memory, memory_mask)
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD)

    @torch.no_grad()
    def greedy(self, memory: Tensor, memory_mask: Tensor, starts: Sequence[int]) -> list[list[int]]:
        """The likeliest word after the likeliest word, without the end mark."""
        ids = torch.tensor(starts).to(memory.device)[:, None] + self.words
        ended = torch.zeros(len(starts), dtype=torch.bool, device=memory.device)
        while ids.shape[1] < MAX_WORDS and not ended.all():
            following = self(ids, memory, memory_mask)[:, -1].argmax(-1)
            following[ended] = END
            ended |= following == END
            ids = torch.cat([ids, following[:, None]], dim=1)
        return [row[: row.index(END)] if END in row else row for row in ids[:, 1:].tolist()]
