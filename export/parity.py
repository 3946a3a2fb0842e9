"""Does a graph do what the checkpoint does? Every file is run in ONNX Runtime: a clean export proves nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.onnx import ExportError, Graph
from models.wan import WanCheckpoint

# fp32 against fp32, outputs of order one.
TOLERANCE = 1e-4
# `frames` are integers: a value near a half may round either way.
LEVELS = 1.0
# Latent frames a chunk, and (batch, height, width) in latent cells: one, two, three and nine frames at two sizes.
CHUNKINGS = ((1,), (2,), (1, 2), (3, 3, 3), (1, 8))
SIZES = ((1, 4, 6), (2, 3, 2))


def open_session(path: Path, threads: int = 2) -> Any:
    """An ONNX Runtime session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime does not load {path.name}: {error}") from error


def graph_errors(graph: Graph, session: Any) -> dict[str, float]:
    """The largest absolute error of every output over the graph's cases. Raises `ExportError` beyond the tolerance."""
    errors = dict.fromkeys(graph.outputs, 0.0)
    for feeds in (graph.example, *graph.cases):
        shapes = {name: tuple(value.shape) for name, value in feeds.items() if not name.startswith("cache")}
        expected = graph.reference(feeds)
        try:
            got = session.run(list(graph.outputs), {name: value.numpy() for name, value in feeds.items()})
        except Exception as error:
            raise ExportError(f"The {graph.name} fails at {shapes}: {error}") from error
        for name, value in zip(graph.outputs, got, strict=True):
            error_now = _distance(value, expected[name].numpy(), relative="cache" in name)
            errors[name] = max(errors[name], error_now)
            if not error_now <= (LEVELS if name == "frames" else TOLERANCE):
                raise ExportError(f"The {graph.name}'s {name} is off by {error_now:.2g} against torch at {shapes}.")
    return errors


def stream(first: Any, following: Any, latents: Tensor, chunks: Sequence[int]) -> Iterator[NDArray[np.float32]]:
    """Decode normalised latents chunk by chunk through two sessions; yields each call's `pixels`."""
    caches = [output.name for output in first.get_outputs() if output.name.startswith("cache_")]
    state: dict[str, Any] = {}
    start = 0
    for chunk in chunks:
        stop = start + chunk
        if start == 0:
            pixels, *values = first.run(["pixels", *caches], {"latents": latents[:, :, :1].numpy()})
            state = dict(zip(caches, values, strict=True))
            yield pixels
            start = 1
        if start < stop:
            feeds = {"latents": latents[:, :, start:stop].contiguous().numpy(), **state}
            pixels, *values = following.run(["pixels", *(f"next_{name}" for name in caches)], feeds)
            state = dict(zip(caches, values, strict=True))
            yield pixels
        start = stop


def streaming_error(checkpoint: WanCheckpoint, first: Any, following: Any) -> float:
    """The largest absolute error of streamed decoding against `vae.decode` of the whole. Raises `ExportError`."""
    vae = checkpoint.vae
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    random = torch.Generator().manual_seed(4)
    worst = 0.0
    for batch, height, width in SIZES:
        for chunks in CHUNKINGS:
            latents = torch.randn(batch, mean.shape[1], sum(chunks), height, width, generator=random)
            with torch.no_grad():
                whole = vae.decode(latents * std + mean).sample.numpy()
            streamed = np.concatenate(list(stream(first, following, latents, chunks)), axis=2)
            worst = max(worst, _distance(streamed, whole))
            if not worst <= TOLERANCE:
                raise ExportError(f"Decoding in chunks of {chunks} latent frames is off by {worst:.2g} against one go.")
    return worst


def _distance(got: NDArray[Any], expected: NDArray[Any], relative: bool = False) -> float:
    """The largest absolute difference; `relative` to the largest value if that is above one, as a cache's may be."""
    if got.shape != expected.shape:
        return float("inf")
    difference = float(np.abs(got.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0))
    return difference / max(1.0, float(np.abs(expected).max(initial=0.0))) if relative else difference
