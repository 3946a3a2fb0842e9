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
