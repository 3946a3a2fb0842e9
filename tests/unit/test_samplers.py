"""The tables against diffusers' schedulers, over whole trajectories."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from models.bundle import SamplerInfo, TokenShift
from models.diffusion import BetaSchedule, Spacing
from models.samplers import SamplerName, advance, build_table

STEPS = [1, 2, 3, 4, 7, 20, 50]
SHIFTS = [1.0, 3.0, 5.0, 8.0]
SHAPE = (4, 3, 6, 8)


def velocity(x: Any, timestep: float, condition: float) -> Any:
    """A field that depends on place, time and condition, bends a trajectory, and works on numpy and torch alike."""
    wave = x.sin() if hasattr(x, "sin") else np.sin(x)
    return 0.7 * x - 0.5 * wave * (timestep / 1000) + condition * (0.3 + 0.2 * x * (1 - timestep / 1000))


def scheduler(name: SamplerName, shift: float) -> Any:
    diffusers = pytest.importorskip("diffusers")
    if name == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )


def noise() -> np.ndarray:
    return np.random.default_rng(3).standard_normal(SHAPE, dtype=np.float32)


@pytest.mark.parametrize("name", ["euler", "unipc"])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_trajectory_is_that_of_diffusers(name: SamplerName, steps: int, shift: float, guidance_scale: float) -> None:
    reference = scheduler(name, shift)
    import torch

    reference.set_timesteps(steps)
    reference.set_begin_index(0)  # as WanPipeline does
    table = build_table(name, steps, shift=shift, guidance_scale=guidance_scale)
    np.testing.assert_array_equal(table.timesteps, reference.timesteps.float().numpy())
    np.testing.assert_allclose(table.sigmas, reference.sigmas.numpy(), atol=1e-7, rtol=0)

    expected = torch.from_numpy(noise())[None]
    state = np.zeros((1 + table.history, *SHAPE), np.float32)
    state[0] = noise()
    for step, t in enumerate(reference.timesteps):
        conditional, unconditional = (velocity(expected, float(t), c) for c in (1.0, -0.4))
        guided = unconditional + guidance_scale * (conditional - unconditional)
        if guidance_scale == 1.0:
            guided = conditional
        expected = reference.step(guided, t, expected, return_dict=False)[0]

        t_table = float(table.timesteps[step])
        state = advance(
            table.coefficients[step],
            state,
            velocity(state[0], t_table, 1.0),
            velocity(state[0], t_table, -0.4) if guidance_scale > 1 else None,
        )
        np.testing.assert_allclose(state[0], expected[0].numpy(), atol=1e-5, rtol=0, err_msg=f"step {step}")


@pytest.mark.parametrize("name", ["euler", "unipc"])
@pytest.mark.parametrize(("steps", "start"), [(20, 5), (20, 19), (7, 1), (3, 2)])
def test_a_later_start_is_that_of_diffusers(name: SamplerName, steps: int, start: int) -> None:
    """As its video-to-video pipelines begin: without a history, at some step of the whole schedule."""
    reference = scheduler(name, 3.0)
    import torch

    reference.set_timesteps(steps)
    reference.set_begin_index(start)
    table = build_table(name, steps, shift=3.0, start=start)
    assert table.steps == steps - start
    np.testing.assert_array_equal(table.timesteps, reference.timesteps[start:].float().numpy())
    np.testing.assert_allclose(table.sigmas, reference.sigmas[start:].numpy(), atol=1e-7, rtol=0)
    expected = torch.from_numpy(noise())[None]
    state = np.zeros((1 + table.history, *SHAPE), np.float32)
    state[0] = noise()
    for step, t in enumerate(reference.timesteps[start:]):
        expected = reference.step(velocity(expected, float(t), 1.0), t, expected, return_dict=False)[0]
        predicted = velocity(state[0], float(table.timesteps[step]), 1.0)
        state = advance(table.coefficients[step], state, predicted, None)
        np.testing.assert_allclose(state[0], expected[0].numpy(), atol=1e-5, rtol=0, err_msg=f"step {step}")


def test_no_start_leaves_nothing_to_do() -> None:
    for start in (-1, 4, 5):
        with pytest.raises(ValueError, match="at least one step"):
            build_table("unipc", 4, shift=3.0, start=start)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_renoise_is_the_plain_loop(steps: int, shift: float, guidance_scale: float) -> None:
    """Predict what is clean, noise it again a little less: as in Self-Forcing's inference pipeline."""
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in np.linspace(1, 0, steps + 1)]
    table = build_table("renoise", steps, shift=shift, guidance_scale=guidance_scale)
    np.testing.assert_allclose(table.timesteps, 1000 * np.array(sigmas[:-1]), rtol=1e-6)
    assert table.timesteps[0] == 1000
    assert table.history == 0
    fresh = np.random.default_rng(4).standard_normal((steps, *SHAPE), dtype=np.float32)
    x, state = noise(), noise()[None]
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        conditional, unconditional = (velocity(x, 1000 * sigma, c) for c in (1.0, -0.4))
        clean = x - sigma * (unconditional + guidance_scale * (conditional - unconditional))
        x = (1 - following) * clean + following * fresh[step]

        t_table = float(table.timesteps[step])
        predictions = [velocity(state[0], t_table, c) for c in (1.0, -0.4)]
        state = advance(table.coefficients[step], state, predictions[0], predictions[1] if guidance_scale > 1 else None)
        state[0] += table.noise[step] * fresh[step]
        np.testing.assert_allclose(state[0], x, atol=1e-5, rtol=0)
    assert table.noise[-1] == 0
    np.testing.assert_allclose(state[0], clean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "dpm"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(
    ("shift", "zero_terminal", "spacing"),
    [(3.0, True, "trailing"), (1.0, True, "trailing"), (1.0, True, "linspace"), (3.0, False, "leading")],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_a_trajectory_of_v_is_that_of_diffusers(
    name: SamplerName, steps: int, shift: float, zero_terminal: bool, spacing: Spacing, guidance_scale: float
) -> None:
    """As `CogVideoXPipeline` walks it, in float64, where its schedule is too."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    kind = diffusers.CogVideoXDDIMScheduler if name == "ddim" else diffusers.CogVideoXDPMScheduler
    reference = kind(
        prediction_type="v_prediction",
        snr_shift_scale=shift,
        rescale_betas_zero_snr=zero_terminal,
        timestep_spacing=spacing,
    )
    reference.set_timesteps(steps)
    betas = BetaSchedule(zero_terminal=zero_terminal, spacing=spacing)
    table = build_table(name, steps, shift=shift, guidance_scale=guidance_scale, betas=betas)
    np.testing.assert_array_equal(table.timesteps, reference.timesteps.float().numpy())
    levels = (1 - reference.alphas_cumprod[reference.timesteps]).sqrt()
    np.testing.assert_allclose(table.sigmas, [*levels.tolist(), 0], atol=1e-6, rtol=0)

    expected = torch.from_numpy(noise().astype(np.float64))[None]
    state = np.zeros((1 + table.history, *SHAPE), np.float32)
    state[0] = noise()
    old, before = None, None
    for step, t in enumerate(reference.timesteps):
        conditional, unconditional = (velocity(expected, float(t), c) for c in (1.0, -0.4))
        guided = unconditional + guidance_scale * (conditional - unconditional)
        if name == "ddim":
            expected = reference.step(guided, t, expected, return_dict=False)[0]
        else:
            # It draws one noise, and from the second order on another one, which is what counts.
            generator = torch.Generator().manual_seed(step)
            draws = 1 if old is None or t < 1000 // steps else 2
            fresh = [torch.randn(expected.shape, generator=generator, dtype=torch.float64) for _ in range(draws)][-1]
            generator.manual_seed(step)
            expected, old = reference.step(guided, old, t, before, expected, generator=generator, return_dict=False)
            before = t
        predictions = [velocity(state[0], float(table.timesteps[step]), c) for c in (1.0, -0.4)]
        state = advance(table.coefficients[step], state, predictions[0], predictions[1] if guidance_scale > 1 else None)
        if table.noise[step]:
            state[0] += table.noise[step] * fresh[0].numpy()
        scale = max(1.0, float(expected.abs().max()))
        np.testing.assert_allclose(state[0] / scale, expected[0].numpy() / scale, atol=1e-5, rtol=0, err_msg=f"{step}")


def test_ddim_adds_no_noise_and_dpm_none_at_the_end() -> None:
    assert not build_table("ddim", 5, shift=3.0).noise.any()
    added = build_table("dpm", 5, shift=3.0).noise
    assert added[:-1].all()
    assert not added[-1]


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match="no 1001 steps"):
        build_table("ddim", 1001, shift=1.0)


def test_only_renoise_adds_noise() -> None:
    assert not build_table("euler", 5, shift=3.0).noise.any()
    assert not build_table("unipc", 5, shift=3.0).noise.any()
    assert build_table("renoise", 5, shift=3.0).noise[:-1].all()


def test_unipc_asks_the_model_at_whole_timesteps() -> None:
    timesteps = build_table("unipc", 20, shift=3.0).timesteps
    assert timesteps[0] == 999
    np.testing.assert_array_equal(timesteps, np.floor(timesteps))


def test_without_guidance_the_unconditional_output_has_no_weight() -> None:
    assert not build_table("unipc", 9, shift=3.0).coefficients[:, :, 2].any()


def test_a_straight_field_is_solved_exactly() -> None:
    """For x(sigma) = x0 + sigma (noise - x0) the velocity is constant, and any step count ends at x0."""
    x0, start = np.full(SHAPE, 0.25, np.float32), noise()
    for name in ("euler", "unipc"):
        table = build_table(name, 6, shift=3.0)
        state = np.zeros((1 + table.history, *SHAPE), np.float32)
        state[0] = start
        for matrix in table.coefficients:
            state = advance(matrix, state, start - x0, None)
        np.testing.assert_allclose(state[0], x0, atol=1e-5)


def test_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        build_table("euler", 0, shift=3.0)


@pytest.mark.parametrize("terminal", [None, 0.1])
@pytest.mark.parametrize("tokens", [12, 1024, 5000])
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_a_schedule_for_the_videos_size_is_that_of_diffusers(steps: int, tokens: int, terminal: float | None) -> None:
    """As `LTXPipeline` asks for it."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

    if steps == 1 and terminal:
        pytest.skip("diffusers divides by zero")
    reference = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=terminal)
    reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    info = SamplerInfo(name="euler", shift=1.0, token_shift=TokenShift(), terminal=terminal, guidance_scale=1.0)
    table = info.table(steps, 1.0, tokens)
    np.testing.assert_allclose(table.timesteps, reference.timesteps.numpy(), rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(table.sigmas, reference.sigmas.numpy(), atol=1e-6)
    np.testing.assert_allclose(table.coefficients[:, 0, 1], np.diff(reference.sigmas.numpy()), atol=1e-6)


def test_one_step_can_not_be_stretched() -> None:
    info = SamplerInfo(name="euler", shift=1.0, token_shift=TokenShift(), terminal=0.1, guidance_scale=1.0)
    assert info.table(1, 1.0, 12).sigmas.tolist() == [1.0, 0.0]
