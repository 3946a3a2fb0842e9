"""The encoder of `AutoencoderKLWan` as two streaming graphs, like the decoder's in `wan.py`.

`AutoencoderKLWan.encode` takes the first frame, then groups of four, and keeps the last two frames of each causal
convolution's input, and one of each downsampling in time, which the first frame skips.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    patchify,
)
from torch import Tensor, nn

from models.wan import _Caches, _residual_block, check_same_batch

GROUP = 4


class _EncoderCaches(_Caches):
    def downsample(self, conv: Any, x: Tensor) -> Tensor:
        """Apply a `WanResample`'s `time_conv`, of stride two: its window reaches back by one frame."""
        if self.previous is None:
            self.next.append(x[:, :, -1:])
            return x
        cache = self.previous[len(self.next)]
        self.next.append(x[:, :, -1:])
        return conv(torch.cat([cache, x], dim=2))  # type: ignore[no-any-return]


def _resample(resample: Any, x: Tensor, caches: _EncoderCaches) -> Tensor:
    batch, _, frames, _, _ = x.shape
    x = resample.resample(x.transpose(1, 2).flatten(0, 1))
    x = x.unflatten(0, (batch, frames)).transpose(1, 2)  # type: ignore[no-untyped-call]
    return caches.downsample(resample.time_conv, x) if resample.mode == "downsample3d" else x


def _down_block(block: Any, x: Tensor, caches: _EncoderCaches) -> Tensor:
    """A Wan 2.2 block, or one of the layers that Wan 2.1 has in a flat list."""
    if isinstance(block, WanResidualBlock):
        return _residual_block(block, x, caches)
    if isinstance(block, WanResample):
        return _resample(block, x, caches)
    if not isinstance(block, WanResidualDownBlock):
        return block(x)  # type: ignore[no-any-return]  # attention, within a frame
    before = x
    for resnet in block.resnets:
        x = _residual_block(resnet, x, caches)
    if block.downsampler is not None:
        x = _resample(block.downsampler, x, caches)
    return x + block.avg_shortcut(before)  # type: ignore[no-any-return]


class _Encoder(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        shape = (1, -1, 1, 1, 1)
        self.register_buffer("mean", torch.tensor(vae.config.latents_mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(vae.config.latents_std).view(shape), persistent=False)

    def encode(self, frames: Tensor, caches: _EncoderCaches) -> tuple[Tensor, ...]:
        encoder = self.vae.encoder
        x = frames.permute(0, 4, 1, 2, 3) / 127.5 - 1.0
        if self.vae.config.patch_size is not None:
            x = patchify(x, patch_size=self.vae.config.patch_size)
        x = caches.conv(encoder.conv_in, x)
        for block in encoder.down_blocks:
            x = _down_block(block, x, caches)
        x = _residual_block(encoder.mid_block.resnets[0], x, caches)
        for attention, resnet in zip(encoder.mid_block.attentions, encoder.mid_block.resnets[1:], strict=True):
            x = _residual_block(resnet, x if attention is None else attention(x), caches)
        x = caches.conv(encoder.conv_out, encoder.nonlinearity(encoder.norm_out(x)))
        # The distribution's mean; its spread is of no use here.
        latents = self.vae.quant_conv(x).chunk(2, dim=1)[0]
        return (latents - self.mean) / self.std, *caches.next


class EncoderFirst(_Encoder):
    """The first of `frames`, 0 to 255 in float32 `[batch, 1, H, W, 3]`, to normalised `latents` and the caches."""

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        return self.encode(frames, _EncoderCaches(None))


class EncoderNext(_Encoder):
    """Four more `frames` and the caches to one more frame of `latents` and the next caches."""

    def forward(self, frames: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        check_same_batch(frames, *caches)
        return self.encode(frames, _EncoderCaches(caches))
