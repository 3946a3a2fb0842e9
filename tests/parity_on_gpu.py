"""What the tests on a GPU compare, and how closely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from export.shapes import size_of
from models.bundle import GraphInfo, Manifest
from serving.engines.engine import Array

# fp32 against fp32, relative to the largest value above one; a frame's level may round the other way.
TOLERANCE, LEVELS = 1e-4, 1


def symbols_of(manifest: Manifest, name: str) -> list[dict[str, int]]:
    """One entry a call, within the limits: the smallest size, and two oblong ones with more rows and frames.

    `rows` and `columns` are patches, `height` and `width` latent cells.
    """
    patch = manifest.latent.patch
    least = -(-manifest.limits.min_side // (manifest.latent.spatial * patch))
    calls = []
    for batch, frames, tall, wide in ((1, 1, least, least), (2, 2, least, least + 1), (4, 2, least + 1, least)):
        calls.append(
            {
                "batch": batch if name.startswith("denoiser") else 1,
                "tokens": manifest.text.max_tokens,
                "frames": frames,
                "rows": tall,
                "columns": wide,
                "height": tall * patch,
                "width": wide * patch,
            }
        )
    return calls


def feeds_of(graph: GraphInfo, symbols: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
    """Something plausible for every input."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for tensor in graph.inputs:
        shape = tuple(size_of(dim, symbols) for dim in tensor.shape)
        if tensor.name == "timestep":
            feeds[tensor.name] = rng.uniform(1, 999, shape).astype(np.float32)
        elif tensor.dtype == "int64":
            feeds[tensor.name] = np.ones(shape, np.int64)
        else:
            feeds[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
    return feeds


def assert_close(got: Mapping[str, Any], wanted: Mapping[str, Array]) -> None:
    assert got.keys() == wanted.keys()
    for name, expected in wanted.items():
        value = got[name] if isinstance(got[name], np.ndarray) else got[name].cpu().numpy()
        assert value.shape == expected.shape, name
        assert value.dtype == expected.dtype, name
        error = np.abs(value.astype(np.float64) - expected).max(initial=0.0)
        if expected.dtype == np.uint8:
            assert error <= LEVELS, name
        else:
            assert error <= TOLERANCE * max(1.0, np.abs(expected).max(initial=0.0)), name
