"""Self-Forcing's, CausVid's and LongLive's files: loaded onto the same transformer, and rolled out as they do it.

The reference is in `tests/self_forcing.py`; that the engine does the same is in `integration/test_self_forcing.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from self_forcing import CHUNKS, cached_rollout, noise, original, plain_rollout
from tiny import CHANNELS, TEXT_DIM, tiny_transformer

from models.bundle import Positions
from models.families import UnsupportedCheckpointError
from models.wan_causal import CausalDenoiser
from models.wan_weights import load_weights, to_diffusers
from models.window import ContextWindow

TOLERANCE = 1e-4


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
