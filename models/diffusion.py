"""Samplers of models that preserve variance and predict v (arXiv 2202.00512): CogVideoX's DDIM and DPM-Solver++.

A latent is `sqrt(a) x0 + sqrt(1 - a) noise`, and the model says `v = sqrt(a) noise - sqrt(1 - a) x0`; `a` falls from
near 1 to 0 over the training timesteps. The maps have the form of those in `models.samplers`, whose guided velocity is
v here, and give what diffusers' `CogVideoXDDIMScheduler` and `CogVideoXDPMScheduler` compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Spacing = Literal["leading", "linspace", "trailing"]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BetaSchedule:
    """How noise grows in training: betas whose roots are evenly spaced, then a shift of the signal-to-noise ratio.

    `zero_terminal` stretches the result so that nothing but noise is left at the end (arXiv 2305.08891, algorithm 1).
    """

    start: float = 0.00085
    end: float = 0.012
    zero_terminal: bool = True
    spacing: Spacing = "trailing"

    def alphas(self, shift: float, train: int) -> Floats:
        """`a` by timestep, `[train]`."""
        betas = np.linspace(self.start**0.5, self.end**0.5, train) ** 2
        alphas = np.cumprod(1 - betas)
        alphas = alphas / (shift + (1 - shift) * alphas)
        if self.zero_terminal:
            roots = np.sqrt(alphas)
            alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        return alphas

    def timesteps(self, steps: int, train: int) -> NDArray[np.int64]:
        """Those that the model is asked at, from the noisiest on. Raises `ValueError` for more than there are."""
        if steps > train:
            raise ValueError(f"there are {train} timesteps, so no {steps} steps")
        if self.spacing == "linspace":
            return np.linspace(0, train - 1, steps).round()[::-1].astype(np.int64)
        if self.spacing == "leading":
            return (np.arange(steps) * (train // steps))[::-1].astype(np.int64)
        return np.round(np.arange(train, 0, -train / steps)).astype(np.int64) - 1


@dataclass(frozen=True, slots=True)
class Levels:
    """The `a` of each step: where it is, where it goes, and where the step before was (NaN for the first)."""

    here: Floats
    there: Floats
    before: Floats

    @classmethod
    def of(cls, schedule: BetaSchedule, steps: int, *, shift: float, train: int, start: int = 0) -> Levels:
        """A step goes to `train // steps` before its timestep, as in diffusers, which needn't be the next one's.

        The first `start` steps are left out.
        """
        alphas, timesteps = schedule.alphas(shift, train), schedule.timesteps(steps, train)[start:]
        there = timesteps - train // steps
        here = alphas[timesteps]
        return cls(here, np.where(there >= 0, alphas[there], 1.0), np.append(np.nan, here[:-1]))


def ddim_maps(levels: Levels) -> Floats:
    """Deterministic DDIM (arXiv 2010.02502, equation 12): `[steps, 1, 2]` over (x, v)."""
    here, there = levels.here, levels.there
    kept = np.sqrt((1 - there) / (1 - here))
    predicted = np.sqrt(there) - np.sqrt(here) * kept
    return np.stack([kept + predicted * np.sqrt(here), -predicted * np.sqrt(1 - here)], axis=-1)[:, None]


def dpm_maps(levels: Levels) -> tuple[Floats, Floats]:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095): `[steps, 2, 3]` over (x, v, m), and the noise's weight `[steps]`.

    `m` is the prediction of x0 one step before. The first step and one that ends at no noise are of first order.
    """
    x, v, m = np.eye(3)
    maps, noise = np.zeros((len(levels.here), 2, 3)), np.zeros(len(levels.here))
    with np.errstate(divide="ignore"):
        half_log_snr = [0.5 * (np.log(a) - np.log1p(-a)) for a in (levels.here, levels.there, levels.before)]
    for i, (here, there, before) in enumerate(zip(*half_log_snr, strict=True)):
        a, b = levels.here[i], levels.there[i]
        h = there - here
        x0 = np.sqrt(a) * x - np.sqrt(1 - a) * v
        denoised = x0
        if i and b < 1:
            ratio = (here - before) / h
            denoised = (1 + 1 / (2 * ratio)) * x0 - m / (2 * ratio)
        maps[i] = np.sqrt((1 - b) / (1 - a)) * np.exp(-h) * x - np.expm1(-2 * h) * np.sqrt(b) * denoised, x0
        noise[i] = np.sqrt(1 - b) * np.sqrt(-np.expm1(-2 * h))
    return maps, noise
