"""The one protocol that every runtime implements: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Inputs = Mapping[str, tuple[np.dtype[Any], tuple[int | str, ...]]]


class Engine(Protocol):
    """A compiled graph. `run` is blocking and may be called from any one thread at a time."""

    @property
    def inputs(self) -> Inputs:
        """Name to dtype and shape; a string dimension is dynamic."""

    @property
    def outputs(self) -> Sequence[str]: ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every output by name. Raises `EngineError` with the graph's name when the runtime refuses.

        An engine may keep some outputs on its device. These are its own arrays: they can be sliced, assigned to what
        its `Arrays` made, and fed again.
        """


class Arrays(Protocol):
    """How state is made that an engine can take without moving it."""

    def zeros(self, shape: Sequence[int]) -> Array:
        """float32."""

    def join(self, arrays: Sequence[Array]) -> Array:
        """Along the first axis."""

    def own(self, array: Array) -> Array:
        """State that may have been made for an engine before this one: as it is, if it is this one's already."""


class HostArrays:
    """`Arrays` of an engine that takes everything from the host's memory."""

    def zeros(self, shape: Sequence[int]) -> Array:
        return np.zeros(shape, np.float32)

    def join(self, arrays: Sequence[Array]) -> Array:
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    def own(self, array: Array) -> Array:
        return array


HOST = HostArrays()


def arrays_of(engine: Engine) -> Arrays:
    """The engine's own, if it keeps state on a device."""
    arrays: Arrays = getattr(engine, "arrays", HOST)
    return arrays


def engine_now(engine: Engine) -> Engine:
    """What it is at this moment, if it is one that may move: the same throughout a call and what is around it."""
    current: Engine = getattr(engine, "now", engine)
    return current


class EngineError(RuntimeError):
    """A graph could not be loaded or run."""


def chosen_outputs(graph: str, known: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Those that are wanted, or all. Raises `EngineError` for one that the graph doesn't have."""
    if missing := [name for name in wanted or () if name not in known]:
        raise EngineError(f"{graph}: no output {', '.join(missing)}; it has {', '.join(known)}")
    return tuple(known if wanted is None else wanted)


def _dtype_of(array: Array) -> np.dtype[Any]:
    return array.dtype


def check_feeds(
    graph: str, inputs: Inputs, feeds: Mapping[str, Array], dtype_of: Callable[[Any], np.dtype[Any]] = _dtype_of
) -> None:
    """Raises `EngineError` for what is bound by its address: another dtype would be read as this one's bytes."""
    if feeds.keys() != inputs.keys():
        raise EngineError(f"{graph}: takes {', '.join(inputs)}, not {', '.join(feeds)}")
    for name, (dtype, shape) in inputs.items():
        fed = feeds[name]
        fits = len(fed.shape) == len(shape) and all(
            isinstance(want, str) or want == have for want, have in zip(shape, fed.shape, strict=True)
        )
        if dtype_of(fed) != dtype or not fits:
            raise EngineError(f"{graph}: {name} must be {dtype} {list(shape)}, not {dtype_of(fed)} {list(fed.shape)}")
