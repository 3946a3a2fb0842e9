"""Optimisation profiles: the sizes that a plan is built for, from what a bundle's manifest allows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from export.onnx import ExportError
from export.shapes import size_of
from models.bundle import GraphInfo, GraphName, Manifest
from models.plans import Profile, Range

# Rows of one denoiser call, as the service's `denoiser.max_rows` has it.
DEFAULT_ROWS = 8
_FACTOR = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)")


@dataclass(frozen=True)
class Extent:
    """The least, usual and largest value of something in one profile."""

    least: int
    usual: int
    most: int

    @classmethod
    def fixed(cls, value: int) -> Extent:
        return cls(value, value, value)

    @property
    def ends(self) -> tuple[int, int, int]:
        return self.least, self.usual, self.most


def profile_of(graph: GraphInfo, extents: Mapping[str, Extent]) -> Profile:
    """Least, usual and largest shape of every input with dynamic dimensions. Raises `ExportError`."""
    at = [{name: extent.ends[end] for name, extent in extents.items()} for end in range(3)]

    def ends(shape: Sequence[int | str]) -> Range:
        least, usual, most = (tuple(size_of(dim, symbols) for dim in shape) for symbols in at)
        return least, usual, most

    return {
        tensor.name: ends(tensor.shape) for tensor in graph.inputs if any(isinstance(dim, str) for dim in tensor.shape)
    }


def profiles_of(
    manifest: Manifest, name: GraphName, sizes: Sequence[tuple[int, int]] = (), *, any_size: bool, rows: int
) -> tuple[Profile, ...]:
    """One profile for each `(width, height)`, and with `any_size` a last one for whatever the limits allow.

    Fixed sizes make faster kernels, and are what CUDA graphs are captured for; without any, the default size has one.
    `rows` is the largest batch of the denoiser. Raises `ExportError` for a size that the model has not.
    """
    limits = manifest.limits
    for width, height in sizes:
        if not (limits.min_side <= min(width, height) and max(width, height) <= limits.max_side):
            raise ExportError(
                f"{width}x{height} is not within {manifest.name}'s limits of {limits.min_side} to {limits.max_side}."
            )
    fixed = [(Extent.fixed(height), Extent.fixed(width)) for width, height in sizes or [limits.default_size]]
    width, height = limits.default_size
    free = [tuple(Extent(limits.min_side, side, limits.max_side) for side in (height, width))] if any_size else []
    profiles: list[Profile] = []
    for tall, wide in [*fixed, *free]:
        profile = profile_of(manifest.graphs[name], _symbols(manifest, name, tall, wide, rows))
        if profile and profile not in profiles:
            profiles.append(profile)
    return tuple(profiles)


def _symbols(manifest: Manifest, name: GraphName, height: Extent, width: Extent, rows: int) -> dict[str, Extent]:
    """Every symbol of the graph, from the shapes that serving gives to the inputs that it knows."""
    one = Extent.fixed(1)
    batch = Extent(1, min(2, rows), rows) if name.startswith("denoiser") else one
    tokens = Extent.fixed(manifest.text.max_tokens)
    known: dict[str, Sequence[Extent | None]] = {
        "latents": (batch, None, _frames(manifest, name), _cells(manifest, height), _cells(manifest, width)),
        "encoder_hidden_states": (batch, tokens),
        "input_ids": (batch, tokens),
    }
    symbols = {"batch": batch}
    for tensor in manifest.graphs[name].inputs:
        for dim, extent in zip(tensor.shape, known.get(tensor.name, ()), strict=False):
            match = _FACTOR.fullmatch(dim) if isinstance(dim, str) else None
            if match and extent:
                factor = int(match[1] or 1)
                symbols[match[2]] = Extent(*(-(-value // factor) for value in extent.ends))
    return symbols


def _frames(manifest: Manifest, name: GraphName) -> Extent:
    """Latent frames of one call."""
    chunk = manifest.chunk_latent_frames
    if not name.startswith("denoiser") or manifest.causal is not None:
        return Extent(1, chunk, chunk)

    def latent(seconds: int) -> int:
        return 1 + math.ceil(seconds * manifest.fps / manifest.latent.temporal)

    return Extent(1, latent(manifest.limits.default_seconds), latent(manifest.limits.max_seconds))


def _cells(manifest: Manifest, side: Extent) -> Extent:
    """Pixels to latent cells, rounded up to whole patches as serving does."""
    patch, spatial = manifest.latent.patch, manifest.latent.spatial
    return Extent(*(-(-pixels // (spatial * patch)) * patch for pixels in side.ends))
