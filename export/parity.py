"""Does a graph do what the checkpoint does? Every file is run in ONNX Runtime: a clean export proves nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.onnx import ExportError
from models.families import Family
from models.graph import Graph

# fp32 against fp32, outputs of order one.
TOLERANCE = 1e-4
# `frames` are integers: a value near a half may round either way.
LEVELS = 1.0
# Latent frames (or groups of them) a chunk, and (batch, height, width) in latent cells: one, two, three and nine frames
# at two sizes.
CHUNKINGS = ((1,), (2,), (1, 2), (3, 3, 3), (1, 8))
SIZES = ((1, 4, 6), (2, 3, 2))


@dataclass(frozen=True)
class Errors:
    """Absolute errors by output over all shapes: the largest one, and the mean."""

    largest: dict[str, float]
    mean: dict[str, float]


def open_session(path: Path, threads: int = 2) -> Any:
    """An ONNX Runtime session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime does not load {path.name}: {error}") from error


def graph_errors(graph: Graph, session: Any) -> Errors:
    """The errors of every output over the graph's cases. Raises `ExportError` beyond the tolerance."""
    largest, total, count = (dict.fromkeys(graph.outputs, 0.0) for _ in range(3))
    for feeds in (graph.example, *graph.cases):
        shapes = {name: tuple(value.shape) for name, value in feeds.items() if not name.startswith("cache")}
        expected = graph.reference(feeds)
        try:
            got = session.run(list(graph.outputs), {name: value.numpy() for name, value in feeds.items()})
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ExportError(f"The {graph.name} fails at {shapes}: {reason}") from error
        for name, value in zip(graph.outputs, got, strict=True):
            wanted = expected[name].numpy()
            worst, mean = _distance(value, wanted, relative="cache" in name)
            if not worst <= (LEVELS if name == "frames" else TOLERANCE):
                raise ExportError(f"The {graph.name}'s {name} is off by {worst:.2g} against torch at {shapes}.")
            largest[name] = max(largest[name], worst)
            total[name] += mean * wanted.size
            count[name] += wanted.size
    return Errors(largest, {name: total[name] / max(count[name], 1) for name in total})


def stream(
    first: Any, following: Any, latents: Tensor, chunks: Sequence[int], *, opening: int = 1, noise: Tensor | None = None
) -> Iterator[NDArray[Any]]:
    """Decode normalised latents chunk by chunk through two sessions; yields each call's `pixels`.

    `opening` is how many latent frames the first call takes: for an overlapped decoder, the whole first chunk. `noise`,
    like the latents, is for decoders that take some; by default it is none at all.
    """
    wants_noise = any(given.name == "noise" for given in first.get_inputs())
    noise = torch.zeros_like(latents) if noise is None else noise

    def feeds(part: slice) -> dict[str, NDArray[Any]]:
        given = {"latents": latents, "noise": noise} if wants_noise else {"latents": latents}
        return {name: value[:, :, part].contiguous().numpy() for name, value in given.items()}

    caches = [output.name for output in first.get_outputs() if output.name.startswith("cache_")]
    state: dict[str, Any] = {}
    start = 0
    for chunk in chunks:
        stop = start + chunk
        if start == 0:
            start = opening
            pixels, *values = first.run(["pixels", *caches], feeds(slice(start)))
            state = dict(zip(caches, values, strict=True))
            yield pixels
        if start < stop:
            outputs = ["pixels", *(f"next_{name}" for name in caches)]
            pixels, *values = following.run(outputs, feeds(slice(start, stop)) | state)
            state = dict(zip(caches, values, strict=True))
            yield pixels
        start = stop


def streaming_error(family: Family, first: Any, following: Any) -> float:
    """The largest absolute error of streamed decoding against decoding of the whole. Raises `ExportError`."""
    random = torch.Generator().manual_seed(4)
    worst = 0.0
    latent = family.latent
    for batch, height, width in SIZES:
        for groups in CHUNKINGS:
            chunks = [latent.group * size + (latent.lead if at == 0 else 0) for at, size in enumerate(groups)]
            latents = torch.randn(batch, latent.channels, sum(chunks), height, width, generator=random)
            with torch.no_grad():
                whole = family.decode(latents).numpy()
            streamed = np.concatenate(list(stream(first, following, latents, chunks, opening=latent.first)), axis=2)
            worst = max(worst, _distance(streamed, whole)[0])
            if not worst <= TOLERANCE:
                raise ExportError(f"Decoding in chunks of {chunks} latent frames is off by {worst:.2g} against one go.")
    return worst


def seam_error(family: Family, first: Any, following: Any, chunk: int) -> tuple[float, float]:
    """What decoding in overlapped chunks costs, in pixels of [-1, 1]: the largest and the mean absolute error.

    Three chunks of `chunk` latent frames against one go. In one chunk there is no seam, and no error is allowed.
    """
    random = torch.Generator().manual_seed(4)
    latents = torch.randn(1, family.latent.channels, 3 * chunk, 4, 6, generator=random)
    with torch.no_grad():
        whole = family.decode(latents).clamp(-1, 1).numpy()
    together, apart = (
        _distance(np.concatenate(list(stream(first, following, latents, chunks, opening=chunks[0])), axis=2), whole)
        for chunks in ((3 * chunk,), (chunk, chunk, chunk))
    )
    if not together[0] <= TOLERANCE:
        raise ExportError(f"Decoding {3 * chunk} latent frames in one go is off by {together[0]:.2g}.")
    return apart


def _distance(got: NDArray[Any], expected: NDArray[Any], relative: bool = False) -> tuple[float, float]:
    """Largest and mean absolute difference; `relative` to the largest value above one, as a cache's may be."""
    if got.shape != expected.shape:
        return float("inf"), float("inf")
    difference = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    scale = max(1.0, float(np.abs(expected).max(initial=0.0))) if relative else 1.0
    return float(difference.max(initial=0.0)) / scale, float(difference.mean()) / scale if difference.size else 0.0
