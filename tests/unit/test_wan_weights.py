"""Self-Forcing's, CausVid's and LongLive's files: loaded onto the same transformer, and rolled out as they do it.

The reference knows nothing of this project's causal code: it is diffusers' transformer over the whole video, each frame
with its own timestep, absolute positions, and the full block-causal mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny import CHANNELS, TEXT_DIM, tiny_transformer
from torch import Tensor

from models.bundle import Positions
from models.families import UnsupportedCheckpointError
from models.wan import rotate
from models.wan_causal import CausalDenoiser
from models.wan_weights import load_weights, to_diffusers
from models.window import ContextWindow

TOLERANCE = 1e-4
CHUNKS, STEPS = 7, (1000.0, 600.0)

# As in Wan's own code, whose blocks call the norm before cross-attention norm3 and the one before the MLP norm2.
ORIGINAL_NAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".norm2.", ".norm3."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    ("proj_out.", "head.head."),
)


def original_name(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in ORIGINAL_NAMES:
        name = name.replace(ours, theirs)
    return name.replace("scale_shift_table", "modulation")


def original(transformer: Any, prefix: str = "model.") -> dict[str, Tensor]:
    return {prefix + original_name(name): value for name, value in transformer.state_dict().items()}


@pytest.fixture(scope="module")
def trained() -> Any:
    torch.manual_seed(0)
    return tiny_transformer(layers=2)


@pytest.fixture
def untrained() -> Any:
    torch.manual_seed(1)
    return tiny_transformer(layers=2)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    "layout",
    [
        lambda model: {"generator_ema": original(model), "generator": {"model.head.head.bias": torch.zeros(1)}},
        lambda model: {"generator": original(model, "model._fsdp_wrapped_module."), "critic": {}},
        lambda model: {"model": original(model, "")},
        lambda model: original(model, "model.diffusion_model."),
        lambda model: {"generator_ema": {f"model.{name}": value for name, value in model.state_dict().items()}},
        lambda model: {name: value.double() for name, value in model.state_dict().items()},
    ],
    ids=["self-forcing", "longlive", "causvid", "comfy", "diffusers-below-a-prefix", "diffusers"],
)
def test_every_layout_loads(layout: Any, trained: Any, untrained: Any, tmp_path: Path) -> None:
    assert not same(trained, untrained)
    torch.save(layout(trained), tmp_path / "weights.pt")
    load_weights(untrained, tmp_path / "weights.pt")
    assert same(trained, untrained)


def test_names_are_all_known(trained: Any) -> None:
    names = set(original(trained, ""))
    assert "blocks.0.self_attn.norm_q.weight" in names
    assert "blocks.1.norm3.bias" in names
    assert not any("attn1" in name or "to_q" in name or "condition_embedder" in name for name in names)
    assert to_diffusers(original(trained)).keys() == trained.state_dict().keys()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda weights: weights.pop("model.blocks.1.ffn.0.bias"), "lacks blocks.1.ffn.net.0.proj.bias"),
        (lambda weights: weights.update({"model.blocks.9.norm3.bias": torch.zeros(1)}), "has blocks.9.norm2.bias"),
        (lambda weights: weights.update({"model.head.head.bias": torch.zeros(3)}), "as [3] instead of [32]"),
        (lambda weights: weights.clear(), "more)"),
    ],
)
def test_weights_of_another_model_are_refused(spoil: Any, words: str, trained: Any, tmp_path: Path) -> None:
    weights = original(trained)
    spoil(weights)
    torch.save({"generator_ema": weights}, tmp_path / "weights.pt")
    with pytest.raises(UnsupportedCheckpointError) as caught:
        load_weights(trained, tmp_path / "weights.pt")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut off", b"\x80\x04K\x01."])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_files_that_are_no_weights(data: bytes, name: str, trained: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnsupportedCheckpointError, match="can't be read"):
        load_weights(trained, tmp_path / name)


def test_a_pickle_that_would_run_code_is_refused(trained: Any, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "touched",)

    torch.save({"generator": Evil()}, tmp_path / "weights.pt")
    with pytest.raises(UnsupportedCheckpointError, match="can't be read"):
        load_weights(trained, tmp_path / "weights.pt")
    assert not (tmp_path / "touched").exists()


class Masked:
    """Self-attention with a mask over tokens, and cross-attention without one."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, _: Any = None, rotary_emb: Any = None
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(context).unflatten(2, (attn.heads, -1))
        mask = None
        if rotary_emb is not None:
            query, key, mask = rotate(query, *rotary_emb), rotate(key, *rotary_emb), self.mask
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
        )
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2, 3)))


def whole_sequence(transformer: Any, window: ContextWindow, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """The last chunk's velocity, all frames in one call; `timestep` `[chunks]`."""
    chunks, tokens = len(timestep), window.chunk_frames * latents.shape[3] * latents.shape[4] // 4
    mask = torch.zeros(chunks, chunks, dtype=torch.bool)
    for chunk in range(chunks):
        recent = range(max(0, chunk - window.window_chunks), chunk + 1)
        mask[chunk, [*range(min(window.sink_chunks, chunk)), *recent]] = True
    original_processors = transformer.attn_processors
    transformer.set_attn_processor(Masked(mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)))
    try:
        per_token = timestep.repeat_interleave(tokens).expand(len(latents), -1)
        velocity: Tensor = transformer(latents, per_token, text, return_dict=False)[0]
    finally:
        transformer.set_attn_processor(original_processors)
    return velocity[:, :, -window.chunk_frames :]


def noise(chunk: int, step: int) -> Tensor:
    return torch.randn(2, CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(100 * chunk + step))


def step_to(latents: Tensor, velocity: Tensor, step: int, chunk: int) -> Tensor:
    """Self-Forcing's sampler: predict the clean latents, and noise them again for the next step."""
    clean = latents - STEPS[step] / 1000 * velocity
    if step + 1 == len(STEPS):
        return clean
    sigma = STEPS[step + 1] / 1000
    return (1 - sigma) * clean + sigma * noise(chunk, step + 1)


def plain_rollout(transformer: Any, window: ContextWindow, text: Tensor) -> Tensor:
    done: list[Tensor] = []
    for chunk in range(CHUNKS):
        latents = noise(chunk, 0)
        for step, timestep in enumerate(STEPS):
            times = torch.tensor([0.0] * chunk + [timestep])
            velocity = whole_sequence(transformer, window, torch.cat([*done, latents], dim=2), times, text)
            latents = step_to(latents, velocity, step, chunk)
        done.append(latents)
    return torch.cat(done, dim=2)


def cached_rollout(denoiser: CausalDenoiser, text: Tensor) -> Tensor:
    cache, done = denoiser.empty_cache(2, noise(0, 0)), []
    for chunk in range(CHUNKS):
        latents, index = noise(chunk, 0), torch.full((2,), chunk)
        for step, timestep in enumerate(STEPS):
            velocity, _ = denoiser(latents, torch.full((2,), timestep), text, cache, index)
            latents = step_to(latents, velocity, step, chunk)
        _, clean = denoiser(latents, torch.zeros(2), text, cache, index)
        cache = denoiser.write(cache, clean, chunk)
        done.append(latents)
    return torch.cat(done, dim=2)


@pytest.mark.parametrize(
    ("window", "positions"),
    [
        (ContextWindow(3, 0, 6), "window"),  # Self-Forcing: all seven chunks, nothing leaves
        (ContextWindow(3, 0, 2), "window"),  # its sliding window: no sinks, so both rules are one
        (ContextWindow(3, 0, 2), "absolute"),
        (ContextWindow(3, 1, 2), "absolute"),  # LongLive: a window behind a sink that stays at the video's start
        (ContextWindow(3, 2, 3), "absolute"),
    ],
)
@torch.no_grad()
def test_a_rollout_is_a_plain_one_with_the_full_mask(
    window: ContextWindow, positions: Positions, trained: Any, untrained: Any, tmp_path: Path
) -> None:
    torch.save({"generator_ema": original(trained)}, tmp_path / "self_forcing.pt")
    load_weights(untrained, tmp_path / "self_forcing.pt")
    text = torch.randn(2, 5, TEXT_DIM, generator=torch.Generator().manual_seed(3))
    expected = plain_rollout(trained, window, text)
    got = cached_rollout(CausalDenoiser(untrained, window, positions), text)
    assert got.shape == (2, CHANNELS, 3 * CHUNKS, 4, 4)
    assert (got - expected).abs().max() <= TOLERANCE
    assert expected.std() > 0.1


@torch.no_grad()
def test_the_two_rules_differ_once_a_chunk_has_left(trained: Any) -> None:
    text = torch.randn(2, 5, TEXT_DIM, generator=torch.Generator().manual_seed(3))
    window = ContextWindow(3, 1, 2)
    moving, staying = (cached_rollout(CausalDenoiser(trained, window, rule), text) for rule in ("absolute", "window"))
    difference = (moving - staying).abs().amax(dim=(0, 1, 3, 4))
    assert difference[: 3 * 4].max() <= 1e-5
    assert difference[3 * 4 :].max() > 1e-3


@torch.no_grad()
def test_sinks_far_behind_the_tables_end_stay_there(trained: Any) -> None:
    denoiser = CausalDenoiser(trained, ContextWindow(3, 1, 2), "absolute")
    latents, text = noise(0, 0), torch.randn(2, 5, TEXT_DIM, generator=torch.Generator().manual_seed(3))
    cache = torch.randn(denoiser.empty_cache(2, latents).shape, generator=torch.Generator().manual_seed(4))
    # The same slot of the ring, a thousand chunks and a million on.
    one, other = (
        denoiser(latents, torch.full((2,), 500.0), text, cache, torch.full((2,), chunk))[0] for chunk in (1001, 1000001)
    )
    assert torch.equal(one, other)
