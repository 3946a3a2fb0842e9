"""The one protocol that every runtime implements: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Engine(Protocol):
    """A compiled graph. `run` is blocking and may be called from any one thread at a time."""

    @property
    def inputs(self) -> Mapping[str, tuple[np.dtype[Any], tuple[int | str, ...]]]:
        """Name to dtype and shape; a string dimension is dynamic."""

    @property
    def outputs(self) -> Sequence[str]: ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every output by name. Raises `EngineError` with the graph's name when the runtime refuses."""


class EngineError(RuntimeError):
    """A graph could not be loaded or run."""
