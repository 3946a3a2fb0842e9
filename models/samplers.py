"""Flow-matching samplers as tables of coefficients, computed once a request on the host.

A sampler advances a request from step to step by a linear map over the current latent `x`, the model's outputs
(conditional `c` and unconditional `u`) and a short history `h` of tensors like `x`:

    (x', h'_0 … h'_n) = M_step · (x, c, u, h_0 … h_n)

Guidance is part of the map, since the guided velocity `u + scale * (c - u)` is linear too. So rows with different
samplers, steps and guidance scales can share one engine call, and whoever holds the tensors does nothing but sums of
products.

`renoise` is the sampler of few-step models (consistency models, arXiv 2303.01469, algorithm 1; DMD2, arXiv 2405.14867;
Self-Forcing, arXiv 2506.08009): each step predicts the clean latent and noises that afresh, so it also adds noise, with
a weight for each step. Its noise levels are evenly spaced before the shift, as Self-Forcing's are.

`ddim` and `dpm` are for models that preserve variance, see `models.diffusion`; their `sigmas` are the noise's weights.

The other tables give what diffusers 0.42 computes: `FlowMatchEulerDiscreteScheduler(shift=…)` and
`UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=…)`, timesteps included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from models.diffusion import BetaSchedule, Levels, ddim_maps, dpm_maps

SamplerName = Literal["euler", "unipc", "renoise", "ddim", "dpm"]
VARIANCE_PRESERVING: Final[tuple[SamplerName, ...]] = ("ddim", "dpm")

Floats = NDArray[np.float64]

# The columns of a table before the history: latent, conditional and unconditional velocity.
LATENT, CONDITIONAL, UNCONDITIONAL, HISTORY = 0, 1, 2, 3

# UniPC starts just below sigma = 1, where log(1 - sigma) still exists (diffusers' own value).
_UNIPC_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class SamplerTable:
    """All that a request needs to be denoised.

    `timesteps` float32 `[steps]` go to the model; `sigmas` float32 `[steps + 1]` are the noise levels, 0 at the end;
    `coefficients` float32 `[steps, 1 + history, 3 + history]` hold one matrix a step; `noise` float32 `[steps]` is how
    much fresh Gaussian noise is added to the latent after the step, mostly 0.
    """

    timesteps: NDArray[np.float32]
    sigmas: NDArray[np.float32]
    coefficients: NDArray[np.float32]
    noise: NDArray[np.float32]

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def history(self) -> int:
        """How many tensors, each as large as the latent, a request carries from step to step."""
        return int(self.coefficients.shape[1]) - 1


def build_table(
    name: SamplerName,
    steps: int,
    *,
    shift: float,
    guidance_scale: float = 1.0,
    num_train_timesteps: int = 1000,
    by_tokens: bool = False,
    terminal: float | None = None,
    betas: BetaSchedule | None = None,
    start: int = 0,
) -> SamplerTable:
    """The table of one request; `guidance_scale` 1 leaves the unconditional column zero.

    `start` steps are left out: the rest begins without a history, from a latent at the noise level `sigmas[0]`.

    `by_tokens` says that `shift` was chosen for the video's size: Euler's schedule then is that of
    `use_dynamic_shifting`, and may be stretched to end at `terminal` before 0. Both are for `euler` alone. `betas` are
    for `ddim` and `dpm`, whose `shift` is that of the signal-to-noise ratio.
    """
    if not 0 <= start < steps:
        raise ValueError(f"a sampler needs at least one step, not {steps} without the first {start}")
    noise = np.zeros(steps - start, np.float32)
    if name == "euler":
        schedule = _dynamic_schedule if by_tokens else _euler_schedule
        sigmas, timesteps = schedule(steps, shift, num_train_timesteps)
        if terminal is not None and steps > 1:
            # diffusers' stretch_shift_to_terminal; one step alone is at sigma 1 and can't be stretched.
            kept = sigmas[:-1].astype(np.float32)
            kept = 1 - (1 - kept) * np.float32((1 - terminal) / (1 - kept[-1]))
            sigmas, timesteps = np.append(kept, 0).astype(np.float64), kept * np.float32(num_train_timesteps)
        sigmas, timesteps = sigmas[start:], timesteps[start:]
        velocity_maps = _euler_maps(sigmas)
    elif name == "renoise":
        sigmas, timesteps = _renoise_schedule(steps, shift, num_train_timesteps)
        sigmas, timesteps = sigmas[start:], timesteps[start:]
        velocity_maps = _renoise_maps(sigmas)
        noise = sigmas[1:].astype(np.float32)
    elif name in VARIANCE_PRESERVING:
        schedule_of = betas or BetaSchedule()
        levels = Levels.of(schedule_of, steps, shift=shift, train=num_train_timesteps, start=start)
        timesteps = schedule_of.timesteps(steps, num_train_timesteps)[start:].astype(np.float32)
        sigmas = np.sqrt(1 - np.append(levels.here, 1.0))
        if name == "ddim":
            velocity_maps = ddim_maps(levels)
        else:
            velocity_maps, weights = dpm_maps(levels)
            noise = weights.astype(np.float32)
    else:
        sigmas, timesteps = _unipc_schedule(steps, shift, num_train_timesteps)
        sigmas, timesteps = sigmas[start:], timesteps[start:]
        velocity_maps = _unipc_maps(sigmas)
    # Column 1 of `velocity_maps` is the guided velocity; split it between the two outputs of the model.
    coefficients = np.insert(velocity_maps, UNCONDITIONAL, velocity_maps[:, :, 1] * (1 - guidance_scale), axis=2)
    coefficients[:, :, CONDITIONAL] *= guidance_scale
    return SamplerTable(timesteps, sigmas.astype(np.float32), coefficients.astype(np.float32), noise)


def advance(
    matrix: NDArray[np.float32],
    state: NDArray[np.float32],
    conditional: NDArray[np.float32],
    unconditional: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """One step of one request: `state` and the result are `[1 + history, …]`, the latent first.

    Sums term after term in float32, so the bits depend neither on a BLAS nor on what else is computed.
    """
    terms = [state[0], conditional, unconditional, *state[1:]]
    advanced = np.zeros_like(state)
    for row, out in zip(matrix, advanced, strict=True):
        for coefficient, term in zip(row, terms, strict=True):
            if coefficient and term is not None:
                out += coefficient * term
    return advanced


def _shifted(sigmas: NDArray[Any], shift: float) -> NDArray[Any]:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _euler_schedule(steps: int, shift: float, train: int) -> tuple[Floats, NDArray[np.float32]]:
    """diffusers shifts twice: the ends of the range when it is made, and every sigma of a request after that."""
    ends = _shifted(np.array([train, 1], np.float32) / np.float32(train), shift)
    sigmas = _shifted(np.linspace(float(ends[0]) * train, float(ends[1]) * train, steps) / train, shift)
    sigmas = sigmas.astype(np.float32)
    return np.append(sigmas, np.float32(0)).astype(np.float64), sigmas * np.float32(train)


def _dynamic_schedule(steps: int, shift: float, train: int) -> tuple[Floats, NDArray[np.float32]]:
    """As `LTXPipeline` and `FluxPipeline` ask for it: sigmas from 1 to 1/steps, shifted once."""
    sigmas = _shifted(np.linspace(1, 1 / steps, steps), shift).astype(np.float32)
    return np.append(sigmas, np.float32(0)).astype(np.float64), sigmas * np.float32(train)


def _renoise_schedule(steps: int, shift: float, train: int) -> tuple[Floats, NDArray[np.float32]]:
    sigmas = _shifted(np.linspace(1, 0, steps + 1), shift)
    return sigmas, (sigmas[:-1] * train).astype(np.float32)


def _unipc_schedule(steps: int, shift: float, train: int) -> tuple[Floats, NDArray[np.float32]]:
    """The timesteps are cut to whole numbers, as diffusers does: the model is asked at floor(1000 sigma)."""
    sigmas = _shifted(np.linspace(1, 1 / train, steps + 1)[:-1], shift)
    if abs(sigmas[0] - 1) < _UNIPC_EPSILON:
        sigmas[0] -= _UNIPC_EPSILON
    timesteps = (sigmas * train).astype(np.int64).astype(np.float32)
    # Through float32, as diffusers keeps them: next to sigma = 1 that rounding shows in log(1 - sigma).
    return np.append(sigmas, 0).astype(np.float32).astype(np.float64), timesteps


def _euler_maps(sigmas: Floats) -> Floats:
    """`x' = x + (sigma' - sigma) v`: `[steps, 1, 2]` over (x, v)."""
    maps = np.ones((len(sigmas) - 1, 1, 2))
    maps[:, 0, 1] = np.diff(sigmas)
    return maps


def _renoise_maps(sigmas: Floats) -> Floats:
    """`x' = (1 - sigma') (x - sigma v)` beside the noise, whose weight is sigma': `[steps, 1, 2]` over (x, v)."""
    clean = 1 - sigmas[1:]
    return np.stack([clean, -clean * sigmas[:-1]], axis=-1)[:, None]


def _unipc_maps(sigmas: Floats) -> Floats:
    """UniPC-2, B2(h), predictor and corrector on x0 predictions (arXiv 2302.04867, algorithms 1 and 2).

    `[steps, 4, 5]` over (x, v, s, m, n), where the history is the last corrected latent `s` and the x0 predictions `m`
    and `n` of one and two steps before. Orders are lowered at both ends: first order in the first and in the last step.
    """
    x, v, s, m, n = np.eye(5)
    steps = len(sigmas) - 1
    maps = np.zeros((steps, 4, 5))
    predictor_order = 0
    for i in range(steps):
        x0 = x - sigmas[i] * v
        corrected = x
        if i:
            # The corrector goes over the same stretch, at the same order, as the predictor that led to `x`.
            corrected = _corrector(sigmas, i, predictor_order, s, m, n, x0)
        predictor_order = min(2, i + 1, steps - i)
        maps[i] = _predictor(sigmas, i, predictor_order, corrected, x0, m), corrected, x0, m
    return maps


def _predictor(
    sigmas: Floats,
    i: int,
    order: int,
    sample: Floats,
    m0: Floats,
    m1: Floats,
) -> Floats:
    """From sigma i to sigma i + 1, from the x0 predictions `m0` at i and `m1` at i - 1."""
    alpha, phi, _, _ = _stretch(sigmas, i)
    result: Floats = sigmas[i + 1] / sigmas[i] * sample - alpha * phi * m0
    if order == 2:
        result = result - alpha * phi * 0.5 * (m1 - m0) / _ratio(sigmas, i)
    return result


def _corrector(
    sigmas: Floats,
    i: int,
    order: int,
    sample: Floats,
    m0: Floats,
    m1: Floats,
    model: Floats,
) -> Floats:
    """From sigma i - 1 to sigma i once more, now that the x0 prediction `model` at i is known."""
    alpha, phi, b1, b2 = _stretch(sigmas, i - 1)
    result: Floats = sigmas[i] / sigmas[i - 1] * sample - alpha * phi * m0
    if order == 1:
        result = result - alpha * phi * 0.5 * (model - m0)
    else:
        ratio = _ratio(sigmas, i - 1)
        rho = np.linalg.solve(np.array([[1.0, 1.0], [ratio, 1.0]]), np.array([b1, b2]))
        result = result - alpha * phi * (rho[0] * (m1 - m0) / ratio + rho[1] * (model - m0))
    return result


def _stretch(sigmas: Floats, i: int) -> tuple[float, float, float, float]:
    """For sigma i to i + 1: alpha at the end, e^-h - 1 (which is also B(h)), and the two right-hand sides of rho."""
    hh = -(_log_snr(sigmas[i + 1]) - _log_snr(sigmas[i]))
    phi1 = math.expm1(hh)
    phi2 = phi1 / hh - 1
    phi3 = phi2 / hh - 0.5
    return 1 - sigmas[i + 1], phi1, phi2 / phi1, 2 * phi3 / phi1


def _ratio(sigmas: Floats, i: int) -> float:
    """How far before sigma i the prediction of i - 1 lies, in units of the stretch that starts at i."""
    start = _log_snr(sigmas[i])
    return (_log_snr(sigmas[i - 1]) - start) / (_log_snr(sigmas[i + 1]) - start)


def _log_snr(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma) if sigma > 0 else math.inf
