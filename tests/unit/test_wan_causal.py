"""Two views of the same weights: chunk after chunk over a cache, and whole videos at once. They are one function."""

from __future__ import annotations

import pytest
import torch
from tiny import CHANNELS, TEXT_DIM, tiny_transformer
from torch import Tensor

from models.families import UnsupportedCheckpointError
from models.wan_causal import CausalDenoiser, CausalSequence
from models.window import ContextWindow

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def transformer() -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny_transformer(layers=2)


def video(frames: int, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    chunks = -(-frames // 3)
    return (
        torch.randn(batch, CHANNELS, frames, 4, 6, generator=random),
        torch.rand(batch, chunks, generator=random) * 1000,
        torch.randn(batch, 5, TEXT_DIM, generator=random),
    )


def rolled_out(
    denoiser: CausalDenoiser, latents: Tensor, timestep: Tensor, text: Tensor, clean: Tensor | None = None
) -> Tensor:
    """Chunk by chunk; the cache gets each chunk as it is, or with `clean`, from a second pass at timestep 0."""
    cache = denoiser.empty_cache(len(latents), latents)
    velocities = []
    for n in range(timestep.shape[1]):
        here, index = slice(3 * n, 3 * n + 3), torch.full((len(latents),), n)
        velocity, chunk_cache = denoiser(latents[:, :, here], timestep[:, n], text, cache, index)
        velocities.append(velocity)
        if clean is not None:
            _, chunk_cache = denoiser(clean[:, :, here], torch.zeros(len(latents)), text, cache, index)
        if chunk_cache.shape[3] == 3:
            cache = denoiser.write(cache, chunk_cache, n)
    return torch.cat(velocities, dim=2)


@pytest.mark.parametrize("window", [ContextWindow(), ContextWindow(3, 1, 1), ContextWindow(3, 2, 2)])
@pytest.mark.parametrize("frames", [2, 3, 9, 20, 21])
@pytest.mark.parametrize("teacher", [False, True])
@torch.no_grad()
def test_a_cached_rollout_is_the_whole_sequence(
    transformer: torch.nn.Module, window: ContextWindow, frames: int, teacher: bool
) -> None:
    """Seven chunks at most, so that the window wraps, and last chunks of two frames and three."""
    latents, timestep, text = video(frames)
    clean = video(frames, seed=2)[0] if teacher else None
    whole = CausalSequence(transformer, window)(latents, timestep, text, clean)
    cached = rolled_out(CausalDenoiser(transformer, window), latents, timestep, text, clean)
    assert whole.shape == latents.shape
    assert (whole - cached).abs().max() <= TOLERANCE
    assert whole.std() > 0.1


@torch.no_grad()
def test_one_chunk_is_the_bidirectional_model(transformer: torch.nn.Module) -> None:
    """The weights are used as they are: what a causal model is fine-tuned from is already one for its first chunk."""
    latents, timestep, text = video(3)
    expected = transformer(latents, timestep[:, 0], text, return_dict=False)[0]
    got = CausalSequence(transformer, ContextWindow())(latents, timestep, text)
    assert (got - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_what_comes_later_changes_nothing_before_it(transformer: torch.nn.Module) -> None:
    latents, _, text = video(12)
    same = torch.full((2, 4), 300.0)
    sequence = CausalSequence(transformer, ContextWindow())
    full = sequence(latents, same, text)
    for chunks in (1, 2, 3):
        assert (
            sequence(latents[:, :, : 3 * chunks], same[:, :chunks], text) - full[:, :, : 3 * chunks]
        ).abs().max() < 1e-5
    # In the bidirectional model it does.
    both_ways = transformer(latents, same[:, 0], text, return_dict=False)[0]
    assert (both_ways - full)[:, :, :3].abs().max() > 1e-2


@torch.no_grad()
def test_what_has_left_the_window_is_forgotten_and_the_sink_is_not() -> None:
    latents, timestep, text = video(18)
    # One layer only: through more, a chunk passes on what it saw while that still was in the window.
    sequence = CausalSequence(tiny_transformer(), ContextWindow())
    expected = sequence(latents, timestep, text)[:, :, 15:]
    for chunk, seen in enumerate([True, False, True, True, True, True]):
        changed = latents.clone()
        changed[:, :, 3 * chunk : 3 * chunk + 3] += 1
        difference = (sequence(changed, timestep, text)[:, :, 15:] - expected).abs().max()
        assert difference > 1e-3 if seen else difference == 0, chunk


@torch.no_grad()
def test_rows_of_a_batch_may_be_at_different_chunks(transformer: torch.nn.Module) -> None:
    latents, timestep, text = video(21, batch=1)
    denoiser = CausalDenoiser(transformer, ContextWindow())
    cache, at, alone = denoiser.empty_cache(1, latents), {}, {}
    for n in range(7):
        at[n] = cache
        args = latents[:, :, 3 * n : 3 * n + 3], timestep[:, n], text, cache, torch.tensor([n])
        alone[n], chunk_cache = denoiser(*args)
        cache = denoiser.write(cache, chunk_cache, n)
    mixed = [6, 0, 3, 4, 1]
    together, _ = denoiser(
        torch.cat([latents[:, :, 3 * n : 3 * n + 3] for n in mixed]),
        torch.cat([timestep[:, n] for n in mixed]),
        text.expand(len(mixed), -1, -1),
        torch.cat([at[n] for n in mixed]),
        torch.tensor(mixed),
    )
    assert (together - torch.cat([alone[n] for n in mixed])).abs().max() <= 1e-5


def test_gradients_are_those_of_one_sequence_through_either_view() -> None:
    """Training runs through both, self-rollout through the cache."""
    torch.manual_seed(0)
    transformer = tiny_transformer(layers=2).train()
    latents, timestep, text = video(18)
    names = [name for name, _ in transformer.named_parameters()]

    def gradients(velocity: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(velocity.square().mean(), list(transformer.parameters())))

    window = ContextWindow()
    whole = gradients(CausalSequence(transformer, window)(latents, timestep, text))
    cached = gradients(rolled_out(CausalDenoiser(transformer, window), latents, timestep, text))
    for name, left, right in zip(names, whole, cached, strict=True):
        assert (left - right).abs().max() <= 1e-4 * max(1.0, float(left.abs().max())), name
        assert left.abs().max() > 0, name


@torch.no_grad()
def test_a_text_for_each_chunk(transformer: torch.nn.Module) -> None:
    latents, timestep, text = video(9)
    sequence = CausalSequence(transformer, ContextWindow())
    by_chunk = text.unsqueeze(1).repeat(1, 3, 1, 1)
    expected = sequence(latents, timestep, text)
    assert (sequence(latents, timestep, by_chunk) - expected).abs().max() <= 1e-5
    by_chunk[:, 2] += 1
    changed = (sequence(latents, timestep, by_chunk) - expected).abs().amax(dim=(0, 1, 3, 4))
    assert changed[:6].max() <= 1e-5
    assert changed[6:].min() > 1e-3


@torch.no_grad()
def test_training_runs_under_bf16_autocast(transformer: torch.nn.Module) -> None:
    latents, timestep, text = video(9)
    sequence = CausalSequence(transformer, ContextWindow())
    exact = sequence(latents, timestep, text)
    with torch.autocast("cpu", torch.bfloat16):
        rough = sequence(latents, timestep, text)
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.std()


def test_what_cannot_be_rolled_out_is_refused(transformer: torch.nn.Module) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="RoPE's 64"):
        CausalDenoiser(transformer, ContextWindow(3, 1, 20))
    latents, timestep, text = video(6)
    denoiser = CausalDenoiser(transformer, ContextWindow())
    cache = denoiser.empty_cache(2, latents)
    with pytest.raises(ValueError, match="not 2 frames"):
        denoiser.write(cache, cache[:, :, :, :2], 0)
    with pytest.raises(ValueError, match="2 chunks a row"):
        CausalSequence(transformer, ContextWindow())(latents, timestep[:, :1], text)
