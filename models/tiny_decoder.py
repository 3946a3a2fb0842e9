"""TAEHV's decoder (Ollin Boer Bohan, MIT; github.com/madebyollin/taehv): latents to frames in a fraction of the VAE's
time, for previews and for real time on small machines, at some cost in sharpness.

It is causal by one frame's memory a block, so that it streams exactly. Here it is made of any widths; a weight file
says its own, so that the published ones (`taew2_1.safetensors` for Wan 2.1, `taew2_2.safetensors` for Wan 2.2) are read
as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from models.graph import MOST, Feeds, Graph

# The file in a checkpoint's directory.
TINY_DECODER = "tiny_decoder.safetensors"
_PREFIX = "decoder."
# How much longer and how much wider each of the three stages makes what it gets.
_SPACE = 2


class _Bound(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _MemoryBlock(nn.Module):
    """Sees each frame beside the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return functional.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class _Grow(nn.Module):
    """Each frame to `stride` of them."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])  # type: ignore[no-any-return]


def _conv(inner: int, outer: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1, bias=bias)


class TinyDecoder(nn.Module):
    """Normalised latents to pixels, over three stages of so many `blocks`, each of which doubles both sides.

    `widths` are the stages' and the output's, `strides` how many frames each stage makes of one, and `patch` x `patch`
    pixels are one output cell.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int] = (256, 128, 64, 64),
        blocks: int = 3,
        strides: Sequence[int] = (1, 2, 2),
        patch: int = 1,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [_Bound(), _conv(channels, widths[0]), nn.ReLU()]
        for width, following, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [_MemoryBlock(width) for _ in range(blocks)]
            layers += [nn.Upsample(scale_factor=_SPACE), _Grow(width, stride), _conv(width, following, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3 * patch * patch))
        self.channels, self.patch = channels, patch
        self.spatial = patch * _SPACE ** len(strides)
        self.temporal = math.prod(strides)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises `OSError` or `ValueError` for a file that can't be read, or that has other layers."""
        try:
            return cls.of(load_file(path))
        except (KeyError, IndexError, RuntimeError) as error:
            said = str(error).strip().partition("\n")[0]
            raise ValueError(f"{path} isn't the decoder of a TAEHV: {said}") from error
        except Exception as error:  # safetensors' own error has no public base
            if isinstance(error, OSError | ValueError):
                raise
            raise ValueError(f"{path} can't be read: {error}") from error

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Self:
        """From weights by TAEHV's names; its encoder's are left out."""
        shapes = {name.removeprefix(_PREFIX): v.shape for name, v in state.items() if name.startswith(_PREFIX)}
        blocks = sorted({int(name.split(".")[0]) for name in shapes if name.endswith(".conv.0.weight")})
        grown = sorted(int(name.split(".")[0]) for name in shapes if name.endswith(".conv.weight"))
        if not blocks or not grown or len(blocks) % len(grown):
            raise ValueError("these aren't the weights of a TAEHV's decoder")
        last = max(int(name.split(".")[0]) for name in shapes)
        module = cls(
            channels=shapes["1.weight"][1],
            widths=[*(shapes[f"{at}.conv.weight"][1] for at in grown), shapes[f"{last}.weight"][1]],
            blocks=len(blocks) // len(grown),
            strides=[shapes[f"{at}.conv.weight"][0] // shapes[f"{at}.conv.weight"][1] for at in grown],
            patch=math.isqrt(shapes[f"{last}.weight"][0] // 3),
        )
        module.load_state_dict({name: v.float() for name, v in state.items() if name.startswith(_PREFIX)})
        return module.eval()

    def save(self, path: Path) -> None:
        """In fp16; computed with in fp32."""
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, path)

    def stream(self, latents: Tensor, memories: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Pixels `[batch, 3, temporal * frames, H, W]`, from 0 to 1 where they are right, and the next memories.

        A memory is the last frame that a block saw, `[batch, 1, width, rows, columns]`; None: there was none.
        """
        batch = latents.shape[0]
        x = latents.transpose(1, 2).flatten(0, 1)
        kept: list[Tensor] = []
        for layer in self.decoder:
            if not isinstance(layer, _MemoryBlock):
                x = layer(x)
                continue
            frames = x.unflatten(0, (batch, -1))  # type: ignore[no-untyped-call]
            before = torch.zeros_like(frames[:, :1]) if memories is None else memories[len(kept)]
            kept.append(frames[:, -1:])
            x = layer(x, torch.cat([before, frames[:, :-1]], dim=1).flatten(0, 1))
        x = functional.pixel_shuffle(x, self.patch).unflatten(0, (batch, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
        return x, kept

    def forward(self, latents: Tensor) -> Tensor:
        """A whole video `[batch, channels, frames, height, width]`: pixels `[batch, 3, 1 + temporal * (frames - 1), H,
        W]`."""
        return self.stream(latents, None)[0][:, :, self.temporal - 1 :]


class _Streamed(nn.Module):
    def __init__(self, decoder: TinyDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def outputs(self, latents: Tensor, memories: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        shown, kept = self.decoder.stream(latents, memories)
        if memories is None:  # of the first latent frame only the last picture is the video's
            shown = shown[:, :, self.decoder.temporal - 1 :]
        pixels = (shown * 2 - 1).clamp(-1.0, 1.0)
        # The cast is the last operation: TensorRT takes uint8 nowhere else.
        frames = ((pixels.permute(0, 2, 3, 4, 1) + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)
        return frames, pixels, *kept


class TinyFirst(_Streamed):
    """The first latent frame, as `models.wan.DecoderFirst`."""

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return self.outputs(latents, None)


class TinyNext(_Streamed):
    """More latent frames and the memories, as `models.wan.DecoderNext`."""

    def forward(self, latents: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        for cache in caches:
            torch._check(cache.shape[0] == latents.shape[0])  # type: ignore[no-untyped-call]
        return self.outputs(latents, caches)


def tiny_decoders(decoder: TinyDecoder) -> tuple[Graph, Graph]:
    """`tiny_decoder_first` and `tiny_decoder_next`, with the inputs and outputs that the VAE's decoders have."""
    random = torch.Generator().manual_seed(11)

    def latents(batch: int, frames: int, height: int, width: int) -> Tensor:
        return torch.randn(batch, decoder.channels, frames, height, width, generator=random)

    with torch.no_grad():
        shown = TinyFirst(decoder)(latents(1, 1, 2, 2))[2:]
    sizes = [(cache.shape[2], cache.shape[3] // 2) for cache in shown]
    names = [f"cache_{index:02}" for index in range(len(sizes))]

    def cached(batch: int, frames: int, height: int, width: int) -> Feeds:
        memories = {
            name: torch.randn(batch, 1, channels, height * scale, width * scale, generator=random).relu()
            for name, (channels, scale) in zip(names, sizes, strict=True)
        }
        return {"latents": latents(batch, frames, height, width), **memories}

    batch, height, width = (Dim(name, min=1, max=MOST) for name in ("batch", "height", "width"))

    def side(dim: Any, scale: int) -> Any:
        return scale * dim if scale > 1 else dim

    cell = {0: batch, 3: height, 4: width}
    first = Graph(
        name="tiny_decoder_first",
        module=TinyFirst(decoder),
        example={"latents": latents(2, 1, 3, 4)},
        outputs=("frames", "pixels", *names),
        dynamic_shapes={"latents": cell},
        weights="tiny_decoder.weights",
        cases=tuple({"latents": latents(*shape)} for shape in [(1, 1, 4, 4), (3, 1, 2, 5), (1, 1, 1, 1), (2, 1, 8, 3)]),
    )
    following = Graph(
        name="tiny_decoder_next",
        module=TinyNext(decoder),
        example=cached(2, 3, 3, 4),
        outputs=("frames", "pixels", *(f"next_{name}" for name in names)),
        dynamic_shapes={
            "latents": cell | {2: Dim("frames", min=1, max=MOST)},
            "caches": tuple({0: batch, 3: side(height, scale), 4: side(width, scale)} for _, scale in sizes),
        },
        weights="tiny_decoder.weights",
        cases=tuple(cached(*shape) for shape in [(1, 1, 4, 4), (3, 2, 2, 5), (1, 4, 1, 3), (2, 1, 8, 3)]),
    )
    return first, following
