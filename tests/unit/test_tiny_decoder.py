"""TAEHV's decoder: what its weight files say of it, and that chunk by chunk it makes what it makes in one go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.tiny_decoder import TinyDecoder, TinyFirst, TinyNext

SIZES = {"channels": 8, "widths": (12, 8, 6, 4), "blocks": 2, "strides": (1, 2, 2), "patch": 2}


@pytest.fixture
def decoder() -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder(**SIZES).eval()  # type: ignore[arg-type]  # a mapping of several types


@pytest.mark.parametrize("chunks", [(1,), (1, 1), (1, 2, 3), (1, 5)])
@torch.no_grad()
def test_chunks_are_the_whole(decoder: TinyDecoder, chunks: tuple[int, ...]) -> None:
    latents = torch.randn(2, 8, sum(chunks), 3, 5)
    whole = (decoder(latents) * 2 - 1).clamp(-1, 1)
    assert whole.shape == (2, 3, 1 + 4 * (sum(chunks) - 1), 48, 80)
    first, *others = latents.split(chunks, dim=2)
    frames, pixels, *memories = TinyFirst(decoder)(first)
    assert frames.shape == (2, 1, 48, 80, 3)
    shown = [pixels]
    for part in others:
        _, pixels, *memories = TinyNext(decoder)(part, *memories)
        shown.append(pixels)
    assert torch.allclose(torch.cat(shown, dim=2), whole, atol=1e-6)
    assert whole.std() > 0.01


def test_a_weight_file_says_its_sizes(decoder: TinyDecoder, tmp_path: Path) -> None:
    decoder.save(tmp_path / "kept.safetensors")
    state = load_file(tmp_path / "kept.safetensors")
    # The published files have an encoder too.
    save_file(state | {"encoder.0.weight": torch.zeros(4, 12, 3, 3)}, tmp_path / "both.safetensors")
    loaded = TinyDecoder.load(tmp_path / "both.safetensors")
    assert (loaded.channels, loaded.patch, loaded.spatial, loaded.temporal) == (8, 2, 16, 4)
    latents = torch.randn(1, 8, 2, 4, 4)
    with torch.no_grad():
        assert torch.allclose(loaded(latents), decoder(latents), atol=5e-3)  # kept in fp16


def test_the_names_are_those_of_the_published_files() -> None:
    """As `TAEHV(...).decoder` of github.com/madebyollin/taehv numbers them, with its default sizes."""
    state = TinyDecoder(16).state_dict()
    assert state["decoder.1.weight"].shape == (256, 16, 3, 3)
    assert state["decoder.3.conv.0.weight"].shape == (256, 512, 3, 3)
    assert state["decoder.7.conv.weight"].shape == (256, 256, 1, 1)
    assert state["decoder.8.weight"].shape == (128, 256, 3, 3)
    assert state["decoder.19.conv.weight"].shape == (128, 64, 1, 1)
    assert state["decoder.20.weight"].shape == (64, 64, 3, 3)
    assert state["decoder.22.weight"].shape == (3, 64, 3, 3)
    assert "decoder.20.bias" not in state


def drop(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    "broken",
    [
        lambda state: {"weight": torch.zeros(2)},
        lambda state: state | {"decoder.30.weight": torch.zeros(3, 4, 3, 3)},
        drop("decoder.1.weight"),
        drop("decoder.3.conv.0.weight"),
        drop("decoder.4.conv.2.bias"),
    ],
)
def test_other_files_are_refused(
    decoder: TinyDecoder, tmp_path: Path, broken: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    path = tmp_path / "tiny_decoder.safetensors"
    save_file(broken(dict(decoder.state_dict())), path)
    with pytest.raises(ValueError, match=r"isn't the decoder of a TAEHV|aren't the weights of a TAEHV"):
        TinyDecoder.load(path)


def test_a_file_that_is_no_weight_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny_decoder.safetensors"
    path.write_bytes(b"{}" * 40)
    with pytest.raises(ValueError, match="can't be read"):
        TinyDecoder.load(path)
    with pytest.raises(OSError, match="none"):
        TinyDecoder.load(tmp_path / "none.safetensors")
