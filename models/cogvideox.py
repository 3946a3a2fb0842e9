"""CogVideoX (2B, 5B, 1.5-5B): how its T5, its transformer over text and video in one sequence, and its VAE are wrapped.

The VAE's convolutions are causal, its norms are not: each is over two latent frames at a time, as it was trained, and
over three at the start. So chunks are whole pairs behind a first frame (`LatentInfo.group`), and then decoding chunk by
chunk is exact. `DecoderFirst` takes those three latents, `DecoderNext` any number of pairs and the last two frames of
each convolution's input.

Positions are part of the graph. 2B adds sines and cosines to the patches; the others rotate, and 1.0 scales the grid to
the one that it was trained with, rounding to whole patches: that is a table, by rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from models.wan import check_same_batch, rotate

# Latent frames that the VAE's norms are over, and how many more there are in the first call.
GROUP, LEAD = 2, 1
CACHE_FRAMES = 2


class TextEncoder(nn.Module):
    """`input_ids`, `attention_mask` int64 `[batch, tokens]` to `hidden_states`; as in diffusers, padding is text."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.text_encoder(input_ids, torch.ones_like(attention_mask)).last_hidden_state
        return states


class AttentionProcessor:
    """`CogVideoXAttnProcessor2_0`, but rotating with `stack` where that writes in place (ONNX: ScatterND)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        tokens = encoder_hidden_states.shape[1]
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            project(both).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            cos, sin = (table.unsqueeze(1) for table in image_rotary_emb)
            query, key = (torch.cat([x[:, :tokens], rotate(x[:, tokens:], cos, sin)], dim=1) for x in (query, key))
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2, 3)))
        return out[:, tokens:], out[:, :tokens]


class Denoiser(nn.Module):
    """`latents` `[batch, channels, frames, height, width]`, `timestep` `[batch]` in 0..999 and `encoder_hidden_states`
    `[batch, tokens, dim]` to `velocity` (which is v), shaped like the latents.

    `side` is the largest number of patches a side.
    """

    starts: Tensor
    steps: Tensor

    def __init__(self, transformer: Any, side: int) -> None:
        super().__init__()
        self.transformer = transformer
        config = transformer.config
        self.rotary, self.scaled = bool(config.use_rotary_positional_embeddings), config.patch_size_t is None
        starts, steps = (
            _grids(side, config.sample_height // config.patch_size, config.sample_width // config.patch_size)
            if self.rotary and self.scaled
            else (torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
        )
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("steps", steps, persistent=False)

    @contextmanager
    def exportable(self) -> Iterator[None]:
        """While the graph is traced, `AttentionProcessor` stands in for diffusers' own."""
        original = self.transformer.attn_processors
        self.transformer.set_attn_processor(AttentionProcessor())
        try:
            yield
        finally:
            self.transformer.set_attn_processor(original)

    def forward(self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """The walk of `CogVideoXTransformer3DModel.forward`, with positions that follow the latents' size."""
        check_same_batch(latents, timestep, encoder_hidden_states)
        transformer = self.transformer
        embed, patch, in_time = transformer.patch_embed, transformer.config.patch_size, transformer.config.patch_size_t
        frames, rows, columns = (
            size // p for size, p in zip(latents.shape[2:], (in_time or 1, patch, patch), strict=True)
        )
        temb = transformer.time_embedding(transformer.time_proj(timestep))
        if in_time is None:
            by_frame = latents.transpose(1, 2).flatten(0, 1)
            video = (
                embed.proj(by_frame).flatten(2).transpose(1, 2).reshape(-1, frames * rows * columns, embed.embed_dim)
            )
        else:
            cells = latents.reshape(-1, latents.shape[1], frames, in_time, rows, patch, columns, patch)
            video = embed.proj(cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).flatten(1, 3))
        text = embed.text_proj(encoder_hidden_states)
        if not self.rotary:
            video = video + self._sines(frames, rows, columns)
        rotation = self._rotation(frames, rows, columns) if self.rotary else None
        for block in transformer.transformer_blocks:
            video, text = block(video, text, temb, rotation)
        video = transformer.proj_out(transformer.norm_out(transformer.norm_final(video), temb=temb))
        video = video.reshape(-1, frames, rows, columns, latents.shape[1], in_time or 1, patch, patch)
        velocity: Tensor = video.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return velocity

    def _sines(self, frames: int, rows: int, columns: int) -> Tensor:
        """`get_3d_sincos_pos_embed`: `[frames * rows * columns, dim]`."""
        config, dim = self.transformer.config, self.transformer.patch_embed.embed_dim

        def table(count: int, scale: float, width: int) -> Tensor:
            angles = torch.outer(torch.arange(count, dtype=torch.float32) / scale, _frequencies(width))
            return torch.cat([angles.sin(), angles.cos()], dim=-1)

        scale = config.spatial_interpolation_scale
        in_time = table(frames, config.temporal_interpolation_scale, dim // 4)
        return _combined(in_time, table(rows, scale, dim * 3 // 8), table(columns, scale, dim * 3 // 8), last="rows")

    def _rotation(self, frames: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """`get_3d_rotary_pos_embed`: cosines and sines `[frames * rows * columns, head_dim]`."""
        head = int(self.transformer.config.attention_head_dim)
        place = (slice(rows - 1, rows), slice(columns - 1, columns)) if self.scaled else (slice(1), slice(1))
        (top, left), (down, right) = (table[place].flatten().unbind() for table in (self.starts, self.steps))
        grids = (
            (torch.arange(frames, dtype=torch.float32), head // 4),
            (top + torch.arange(rows, dtype=torch.float32) * down, head // 8 * 3),
            (left + torch.arange(columns, dtype=torch.float32) * right, head // 8 * 3),
        )
        angles = [torch.outer(grid, _frequencies(width)) for grid, width in grids]
        # Each angle turns a pair of neighbours.
        in_time, in_height, in_width = (angle.unsqueeze(-1).expand(-1, -1, 2).flatten(1) for angle in angles)
        both = _combined(in_time, in_height, in_width)
        return both.cos(), both.sin()


def _frequencies(width: int) -> Tensor:
    return 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)


def _combined(in_time: Tensor, in_height: Tensor, in_width: Tensor, last: str = "columns") -> Tensor:
    """Every cell's own three vectors side by side; sines come with the column's before the row's."""
    size = (in_time.shape[0], in_height.shape[0], in_width.shape[0], -1)
    space = [in_height[None, :, None].expand(size), in_width[None, None].expand(size)]
    if last == "rows":
        space.reverse()
    return torch.cat([in_time[:, None, None].expand(size), *space], dim=-1).flatten(0, 2)


def _grids(side: int, base_rows: int, base_columns: int) -> tuple[Tensor, Tensor]:
    """Where the grid starts and how far its points are apart, both ways, for every number of rows and columns."""
    starts, steps = np.zeros((2, side, side, 2))
    for rows in range(1, side + 1):
        for columns in range(1, side + 1):
            size = (rows, columns)
            start, stop = get_resize_crop_region_for_grid(size, base_columns, base_rows)
            for axis, n in enumerate(size):
                starts[rows - 1, columns - 1, axis] = start[axis]
                steps[rows - 1, columns - 1, axis] = (stop[axis] * (n - 1) / n - start[axis]) / max(n - 1, 1)
    return torch.from_numpy(starts).float(), torch.from_numpy(steps).float()


class _Walk:
    """One call of the decoder: `first`, three latents whose first frame is not doubled in time, or pairs."""

    def __init__(self, latents: Tensor, previous: tuple[Tensor, ...] | None) -> None:
        self.latents, self.previous = latents, previous
        self.next: list[Tensor] = []
        # How much longer and wider than the latents the walk's tensor is by now.
        self.in_time = self.in_space = 1

    @property
    def first(self) -> bool:
        return self.previous is None

    def conv(self, conv: Any, x: Tensor) -> Tensor:
        """A `CogVideoXCausalConv3d` with a time kernel of three; the first call repeats the first frame."""
        past = (
            torch.cat([x[:, :, :1]] * CACHE_FRAMES, dim=2) if self.previous is None else self.previous[len(self.next)]
        )
        x = torch.cat([past, x], dim=2)
        self.next.append(x[:, :, -CACHE_FRAMES:])
        return _plain(conv.conv, x)

    def norm(self, norm: Any, x: Tensor) -> Tensor:
        """A `CogVideoXSpatialNorm3D`, over the frames of two latents, or in the first call of all three."""
        if self.first:
            normed = norm.norm_layer(x)
        else:
            groups = x.unflatten(2, (-1, GROUP * self.in_time)).transpose(1, 2)  # type: ignore[no-untyped-call]
            normed = norm.norm_layer(groups.flatten(0, 1)).unflatten(0, groups.shape[:2])
            normed = normed.transpose(1, 2).flatten(2, 3)
        # Pointwise, so it may come before the latents are repeated to the size of x.
        scale, shift = (self._repeated(_plain(conv.conv, self.latents)) for conv in (norm.conv_y, norm.conv_b))
        return normed * scale + shift  # type: ignore[no-any-return]

    def upsample(self, upsampler: Any, x: Tensor) -> Tensor:
        in_time = 2 if upsampler.compress_time else 1
        self.in_time, self.in_space = self.in_time * in_time, self.in_space * 2
        if self.first:
            x = torch.cat([_repeat(x[:, :, :1], 1, 2), _repeat(x[:, :, 1:], in_time, 2)], dim=2)
        else:
            x = _repeat(x, in_time, 2)
        batch, frames = x.shape[0], x.shape[2]
        x = upsampler.conv(x.transpose(1, 2).flatten(0, 1))
        return x.unflatten(0, (batch, frames)).transpose(1, 2)  # type: ignore[no-untyped-call, no-any-return]

    def _repeated(self, x: Tensor) -> Tensor:
        """What is of the latents' size, repeated to the walk's."""
        if not self.first:
            return _repeat(x, self.in_time, self.in_space)
        parts = [_repeat(x[:, :, :1], 1, self.in_space), _repeat(x[:, :, 1:], self.in_time, self.in_space)]
        return torch.cat(parts, dim=2)


def _plain(conv: Any, x: Tensor) -> Tensor:
    """A `CogVideoXSafeConv3d` without its splitting, whose branch on the size of `x` can't be traced."""
    return nn.Conv3d.forward(conv, x)


def _repeat(x: Tensor, in_time: int, in_space: int) -> Tensor:
    """Nearest neighbours, that many times as many in each direction."""
    batch, channels, frames, height, width = x.shape
    if in_time == in_space == 1:
        return x
    x = x[:, :, :, None, :, None, :, None].expand(-1, -1, -1, in_time, -1, in_space, -1, in_space)
    return x.reshape(batch, channels, frames * in_time, height * in_space, width * in_space)


def _residual_block(block: Any, x: Tensor, walk: _Walk) -> Tensor:
    hidden = walk.conv(block.conv1, block.nonlinearity(walk.norm(block.norm1, x)))
    hidden = walk.conv(block.conv2, block.nonlinearity(walk.norm(block.norm2, hidden)))
    if block.in_channels != block.out_channels:
        x = walk.conv(block.conv_shortcut, x) if block.use_conv_shortcut else _plain(block.conv_shortcut, x)
    return hidden + x


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def decode(self, latents: Tensor, previous: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        vae, decoder = self.vae, self.vae.decoder
        latents = latents / vae.config.scaling_factor
        if vae.post_quant_conv is not None:
            latents = _plain(vae.post_quant_conv, latents)
        walk = _Walk(latents, previous)
        x = walk.conv(decoder.conv_in, latents)
        for resnet in decoder.mid_block.resnets:
            x = _residual_block(resnet, x, walk)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = _residual_block(resnet, x, walk)
            for upsampler in block.upsamplers or ():
                x = walk.upsample(upsampler, x)
        x = walk.conv(decoder.conv_out, decoder.conv_act(walk.norm(decoder.norm_out, x)))
        pixels = x.clamp(-1.0, 1.0)
        # The cast is the last operation: TensorRT takes uint8 nowhere else.
        frames = ((pixels.permute(0, 2, 3, 4, 1) + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)
        return frames, pixels, *walk.next


class DecoderFirst(_Decoder):
    """The first three latent frames, normalised, to `frames` uint8 `[batch, 9, H, W, 3]`, `pixels`, and the caches."""

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return self.decode(latents, None)


class DecoderNext(_Decoder):
    """`t` more latents, an even number, and the caches to `4 t` `frames`, `pixels` and the next caches."""

    def forward(self, latents: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        check_same_batch(latents, *caches)
        return self.decode(latents, caches)
