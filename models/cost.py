"""What a bundle's graphs take on one machine: a small fitted table in the manifest; a video's time follows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

# Beyond this a fit says too little to be kept.
MAX_ERROR = 0.25


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CallSample(_Strict):
    """One denoiser call's shape, and the shortest time that it took."""

    rows: PositiveInt
    tokens: PositiveInt = Field(description="Latent tokens in a row.")
    seconds: PositiveFloat


class ChunkSample(_Strict):
    """One decoded and encoded chunk, and the shortest time that it took."""

    pixels: PositiveInt = Field(description="Over all its frames.")
    seconds: PositiveFloat


class CostInfo(_Strict):
    """Seconds, as `rushes measure` found and fitted them.

    A denoiser call takes `call + rows * (token * tokens + token_pair * tokens**2)`: something for the call, something
    for each token, and attention. A chunk takes `chunk + pixel * pixels`.
    """

    device: str = Field(max_length=200, description="What it was measured on.")
    call: NonNegativeFloat
    token: NonNegativeFloat
    token_pair: NonNegativeFloat
    chunk: NonNegativeFloat
    pixel: NonNegativeFloat
    calls_measured: tuple[CallSample, ...] = Field(min_length=1)
    chunks_measured: tuple[ChunkSample, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.worst_error > MAX_ERROR:
            raise ValueError(f"it is {100 * self.worst_error:.0f} % off its own measurements: measure again")
        return self

    @property
    def worst_error(self) -> float:
        """The largest relative difference from what was measured."""
        calls = [self.call_seconds(one.rows, one.tokens) / one.seconds for one in self.calls_measured]
        chunks = [self.chunk_seconds(one.pixels) / one.seconds for one in self.chunks_measured]
        return max(abs(ratio - 1) for ratio in [*calls, *chunks])

    def call_seconds(self, rows: int, tokens: int) -> float:
        return self.call + rows * (self.token * tokens + self.token_pair * tokens**2)

    def chunk_seconds(self, pixels: float) -> float:
        return self.chunk + self.pixel * pixels


def fit(device: str, calls: Sequence[CallSample], chunks: Sequence[ChunkSample]) -> CostInfo:
    """The table that is nearest to the measurements. Raises `ValueError` when it is too far from one of them."""
    call, token, pair = _fitted(
        [(1.0, one.rows * one.tokens, one.rows * one.tokens**2) for one in calls], [one.seconds for one in calls]
    )
    chunk, pixel = _fitted([(1.0, one.pixels) for one in chunks], [one.seconds for one in chunks])
    return CostInfo(
        device=device,
        call=call,
        token=token,
        token_pair=pair,
        chunk=chunk,
        pixel=pixel,
        calls_measured=tuple(calls),
        chunks_measured=tuple(chunks),
    )


def _fitted(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients of which none is negative, with the least relative error.

    Least squares of every choice of columns: there are seven at most, and the best one without a negative coefficient
    is the solution.
    """
    measured = np.asarray(seconds, np.float64)
    relative = np.asarray(features, np.float64) / measured[:, None]
    scale = np.abs(relative).max(axis=0)
    best, least = [0.0] * relative.shape[1], np.inf
    for count in range(1, relative.shape[1] + 1):
        for chosen in combinations(range(relative.shape[1]), count):
            columns = list(chosen)
            found, *_ = np.linalg.lstsq(relative[:, columns] / scale[columns], np.ones(len(measured)), rcond=None)
            found = found / scale[columns]
            error = float(np.square(relative[:, columns] @ found - 1).sum())
            if (found >= 0).all() and error < least:
                best, least = [0.0] * relative.shape[1], error
                for column, value in zip(columns, found, strict=True):
                    best[column] = float(value)
    return best
