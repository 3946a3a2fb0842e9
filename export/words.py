"""The graphs that read and speak words: the rewriter's, if the checkpoint's directory has a `rewriter/` folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.export import Dim

from export.onnx import ExportError
from models.bundle import GraphName, RewriterInfo
from models.graph import Feeds, Graph
from models.spelling import MAX_NGRAMS

if TYPE_CHECKING:
    from models.mini.words import WordDecoder

REWRITER = "rewriter"


def rewriter(checkpoint: Path) -> tuple[RewriterInfo, tuple[Graph, Graph]] | None:
    """The manifest's section and both graphs, or None. Raises `ExportError` for a folder that can't be read."""
    folder = checkpoint / REWRITER
    if not folder.is_dir():
        return None
    # Other checkpoints need nothing of the bundled model's training code.
    from models.mini.rewriter import Rewriter
    from models.mini.words import MAX_WORDS

    try:
        module = Rewriter.load(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ExportError(f"{folder} can't be read: {error}") from error
    config = module.config
    info = RewriterInfo(
        words=tuple(config["words"]),
        starts=config["choices"],
        max_words=MAX_WORDS,
        buckets=config["buckets"],
        max_prompt_words=config["max_prompt_words"],
    )
    random = torch.Generator().manual_seed(5)

    def feeds(lengths: tuple[int, ...], words: int) -> Feeds:
        ngrams = torch.randint(1, info.buckets + 1, (len(lengths), words, MAX_NGRAMS), generator=random)
        fewer = torch.randint(1, MAX_NGRAMS + 1, (len(lengths), words, 1), generator=random)
        ngrams[torch.arange(MAX_NGRAMS).expand_as(ngrams) >= fewer] = 0
        for row, length in zip(ngrams, lengths, strict=True):
            row[length:] = 0
        return {"ngrams": ngrams}

    most = info.max_prompt_words
    batch, words = Dim("batch", min=1, max=1024), Dim("words", min=1, max=most)
    encoder = Graph(
        name="rewriter_encoder",
        module=module.encoder,
        example=feeds((5, 3), 5),
        outputs=("memory", "memory_mask"),
        dynamic_shapes={"ngrams": {0: batch, 1: words}},
        weights="rewriter.weights",
        cases=(feeds((1,), 1), feeds((most, 2, 9), most), feeds((7,), 7)),
    )
    return info, (encoder, word_decoder("rewriter_decoder", module.decoder, config["width"], most))


def word_decoder(name: GraphName, module: WordDecoder, width: int, longest: int) -> Graph:
    """A `WordDecoder` over a memory of up to `longest` tokens."""
    from models.mini.words import MAX_WORDS

    random = torch.Generator().manual_seed(6)
    ids_there = module.embedding.num_embeddings

    def feeds(batch: int, length: int, lengths: tuple[int, ...]) -> Feeds:
        tokens = max(lengths)
        return {
            "ids": torch.randint(1, ids_there, (batch, length), generator=random),
            "memory": torch.randn(batch, tokens, width, generator=random),
            "memory_mask": (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long(),
        }

    batch, length, tokens = (
        Dim("batch", min=1, max=1024),
        Dim("length", min=1, max=MAX_WORDS),
        Dim("tokens", min=1, max=longest),
    )
    return Graph(
        name=name,
        module=module,
        example=feeds(2, 5, (7, 4)),
        outputs=("logits",),
        dynamic_shapes={
            "ids": {0: batch, 1: length},
            "memory": {0: batch, 1: tokens},
            "memory_mask": {0: batch, 1: tokens},
        },
        weights=f"{name.partition('_')[0]}.weights",
        cases=(feeds(1, 1, (1,)), feeds(3, MAX_WORDS, (2, longest, 5)), feeds(1, 9, (11,))),
    )
