"""What a family says about one of its graphs: a module, its named inputs and outputs, and where it is tried out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from models.bundle import GraphName
from models.stored import Stored

# More cells than any model was trained for.
MOST = 4096

Feeds = dict[str, Tensor]


@dataclass(frozen=True)
class Graph:
    """A module to be exported.

    `example` has every dynamic dimension at two or more: torch takes a size of 1 for a constant, silently. `cases` are
    other shapes, with batch 1 and odd sizes, at which the file is run against the module. With `stored` weights the
    module has only placeholders of them: it can be traced, not run.
    """

    name: GraphName
    module: nn.Module
    example: Feeds
    outputs: tuple[str, ...]
    dynamic_shapes: dict[str, Any]
    weights: str
    cases: tuple[Feeds, ...]
    exportable: AbstractContextManager[None] = field(default_factory=nullcontext)
    stored: Stored | None = None

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"

    def reference(self, feeds: Feeds) -> dict[str, Tensor]:
        """What the module gives in torch."""
        with torch.no_grad():
            out = self.module(*feeds.values())
        return dict(zip(self.outputs, out if isinstance(out, tuple) else (out,), strict=True))


def multiple(factor: int, name: str, most: int) -> object:
    """A dimension that is `factor` times a whole number up to `most`."""
    dim = Dim(name, min=1, max=most)
    return dim if factor == 1 else factor * dim


def padded_text_encoder(module: nn.Module, text_encoder: Any, max_tokens: int) -> Graph:
    """The graph of a text encoder that sees the padding: the text's length is part of what it says, so it is fixed.

    `module` takes `input_ids` and `attention_mask` int64 `[batch, max_tokens]`.
    """
    random = torch.Generator().manual_seed(1)
    vocabulary = int(text_encoder.config.vocab_size)

    def feeds(lengths: list[int]) -> Feeds:
        mask = (torch.arange(max_tokens) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(2, vocabulary, mask.shape, generator=random) * mask
        return {"input_ids": ids, "attention_mask": mask}

    shape = {0: Dim("batch", min=1, max=1024)}
    return Graph(
        name="text_encoder",
        module=module,
        example=feeds([5, 8]),
        outputs=("hidden_states",),
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
        weights="text_encoder.weights",
        cases=(feeds([1]), feeds([3, max_tokens, 1]), feeds([4, 5, 6, 7]), feeds([max_tokens] * 5)),
    )
