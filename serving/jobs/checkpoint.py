"""How far a video has been denoised, and what that is as bytes that may be trusted. Pure: nothing here reads or writes.

A checkpoint is kept in pieces, each written once: one for every finished chunk of latents, and one for the sampler's
newest state. A piece names what it is part of, by the bundle and everything that was asked for, and has a hash over all
of it: what a crash, a damaged disk, another model or another request left behind is told apart, and read as nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Part of the identity, so that a version which computes otherwise never goes on from an older one's latents.
_FORMAT = 1
_LARGEST_HEADER_BYTES = 1 << 12


class BadPiece(ValueError):  # noqa: N818
    """Bytes that are not the piece which was looked for."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Enough to go on from, bit for bit.

    `chunks` are finished latents float32 `[channels, frames, height, width]`, from the first on; `whole` says that
    there are no more to come. `state` float32 `[1 + history, channels, frames, height, width]` is what the sampler of a
    bidirectional video holds after `step` steps, and perhaps behind it what the next step's guidance is made with.
    """

    chunks: tuple[Floats, ...] = ()
    whole: bool = False
    state: Floats | None = None
    step: int = 0

    def with_chunk(self, latents: Floats, *, last: bool) -> Self:
        """The next chunk is finished. Nobody needs the sampler's state after the last one."""
        chunks = (*self.chunks, latents)
        return replace(self, chunks=chunks, whole=True, state=None) if last else replace(self, chunks=chunks)

    def with_state(self, step: int, state: Floats) -> Self:
        return replace(self, state=state, step=step)


NOTHING = Checkpoint()


@dataclass(frozen=True, slots=True)
class Piece:
    """One array of a checkpoint: a chunk (`number` is its index, `last` says that it is the last one) or the sampler's
    state (`number` is the step)."""

    array: Floats
    number: int
    last: bool = False


def identity_of(bundle_digest: str, request: Mapping[str, Any]) -> str:
    """A name for all that determines the latents: equal for equal ones, and for no others."""
    told = json.dumps([_FORMAT, bundle_digest, request], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(told.encode()).hexdigest()


def pack(piece: Piece, identity: str) -> bytes:
    """A hash over the rest, a header in JSON, and the array; the first two end with a newline."""
    array = np.ascontiguousarray(piece.array, "<f4")
    header = {"identity": identity, "number": piece.number, "last": piece.last, "shape": array.shape}
    rest = json.dumps(header).encode() + b"\n" + array.tobytes()
    return hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def unpack(data: bytes, identity: str) -> Piece:
    """What `pack` made. Raises `BadPiece` for anything else, and for a piece of another identity."""
    digest, newline, rest = data[:64], data[64:65], memoryview(data)[65:]
    if newline != b"\n" or hashlib.sha256(rest).hexdigest().encode() != digest:
        raise BadPiece("its hash is not that of its bytes")
    end = bytes(rest[:_LARGEST_HEADER_BYTES]).find(b"\n")
    try:
        header = json.loads(bytes(rest[:end]))
        found, number, last = header["identity"], int(header["number"]), bool(header["last"])
        shape = tuple(int(side) for side in header["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadPiece(f"its header can't be read: {error}") from None
    if found != identity:
        raise BadPiece("it belongs to another model or request")
    values = rest[end + 1 :]
    if min(shape, default=0) < 1 or 4 * math.prod(shape) != len(values):
        raise BadPiece(f"{len(values)} bytes are no array of shape {shape}")
    return Piece(np.frombuffer(values, "<f4").reshape(shape), number, last)
