"""The Wan transformer rolled out causally: the same weights, block by block in time, over a cache of keys and values.

Two modules look at one `WanTransformer3DModel` and compute the same thing. `CausalDenoiser` makes one chunk at a time
from a cache: it is what gets exported and what serving runs. `CausalSequence` takes whole videos with a noise level for
each chunk (Diffusion Forcing, arXiv 2407.01392), or with clean chunks behind noisy ones (teacher forcing): it is for
training. Neither has weights of its own, so a bidirectional checkpoint loads unchanged and is saved unchanged.

Keys are cached before RoPE and rotated by their position in the window (see `models.window`) wherever they are used.
Self-Forcing (arXiv 2506.08009), CausVid and LongLive cache them after RoPE, at positions from the video's start. RoPE
only knows differences, so for all but the sinks this is the same. For them there are two rules: by `window` they
stay as far away as they were when the first chunk left (StreamingLLM), by `absolute` they move away with the video's
start, as in those projects. There is no third rule to need, and no position that grows without bound: the tables end
at `rope_max_seq_len` latent frames, and sinks further back stay at that distance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from models.bundle import Positions
from models.families import UnsupportedCheckpointError
from models.wan import AttentionProcessor, attention, check_same_batch, rotate
from models.window import ContextWindow

Rotation = tuple[Tensor, Tensor]
# Layer, query, key and value, these `[batch, chunks, tokens, heads, head_dim]` before RoPE, to `[…, tokens, dim]`.
SelfAttention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class _Causal(nn.Module):
    """What both views share: the walk over the transformer's blocks, with each chunk at its own noise level."""

    def __init__(self, transformer: Any, window: ContextWindow, positions: Positions = "window") -> None:
        super().__init__()
        config = transformer.config
        if config.patch_size[0] != 1:
            raise UnsupportedCheckpointError("A causal rollout needs patches of one latent frame.")
        if (window.capacity + 1) * window.chunk_frames > config.rope_max_seq_len:
            raise UnsupportedCheckpointError(f"The context window is longer than RoPE's {config.rope_max_seq_len}.")
        self.transformer = transformer
        self.window = window
        self.positions = positions
        self.layers = int(config.num_layers)
        self.dim = int(config.num_attention_heads * config.attention_head_dim)

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        _, height, width = self.transformer.config.patch_size
        return latents.shape[3] // height, latents.shape[4] // width

    def walk(
        self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, chunks: int, attend: SelfAttention
    ) -> Tensor:
        """Velocity for `latents` `[batch, channels, chunks * frames, height, width]`, `timestep` `[batch, chunks]`."""
        transformer = self.transformer
        rows, columns = self.grid(latents)
        x = transformer.patch_embedding(latents).flatten(2).transpose(1, 2).unflatten(1, (chunks, -1))
        # A text for every chunk is a text for every (batch, chunk) row of the cross-attention.
        by_chunk = encoder_hidden_states.ndim == 4
        text = encoder_hidden_states.flatten(0, 1) if by_chunk else encoder_hidden_states
        temb, projected, text, _ = transformer.condition_embedder(timestep.flatten(), text)
        temb = temb.unflatten(0, (-1, chunks)).unsqueeze(2)
        modulation = projected.unflatten(1, (6, -1)).unflatten(0, (-1, chunks))
        for layer, block in enumerate(transformer.blocks):
            x = _block(block, x, text, modulation, by_chunk, partial(attend, layer))
        shift, scale = (transformer.scale_shift_table.unsqueeze(1) + temb).chunk(2, dim=2)
        x = (transformer.norm_out(x.float()) * (1 + scale) + shift).type_as(x)
        x = transformer.proj_out(x)
        _, height, width = transformer.config.patch_size
        x = x.reshape(x.shape[0], -1, rows, columns, height, width, latents.shape[1])
        velocity: Tensor = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return velocity

    def rotation(self, frames: Tensor, rows: int, columns: int) -> Rotation:
        """RoPE tables `[…, frames * rows * columns, 1, head_dim]` for temporal indices `[…, frames]`.

        Only absolute positions are ever negative: sinks that are further back than the window's start.
        """
        rope, signed = self.transformer.rope, self.positions == "absolute"
        index = frames.abs().clamp(max=rope.max_seq_len - 1) if signed else frames

        def table(frequencies: Tensor, odd: bool) -> Tensor:
            in_time, in_height, in_width = torch.split(frequencies, [rope.t_dim, rope.h_dim, rope.w_dim], dim=1)
            size = (*frames.shape, rows, columns, -1)
            times = F.embedding(index, in_time)
            if signed and odd:
                times = times * frames.sign().unsqueeze(-1).to(times.dtype)
            parts = (
                times[..., None, None, :].expand(size),
                in_height[:rows, None].expand(size),
                in_width[:columns].expand(size),
            )
            return torch.cat(parts, dim=-1).flatten(-4, -2).unsqueeze(-2)

        return table(rope.freqs_cos, False), table(rope.freqs_sin, True)


def _block(
    block: Any,
    x: Tensor,
    text: Tensor,
    modulation: Tensor,
    by_chunk: bool,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """`WanTransformerBlock.forward` on `[batch, chunks, tokens, dim]`, modulated by `[batch, chunks, 6, dim]`."""
    table = block.scale_shift_table.unsqueeze(0) + modulation.float()
    shift, scale, gate, ff_shift, ff_scale, ff_gate = table.chunk(6, dim=2)

    attn = block.attn1
    normed = (block.norm1(x.float()) * (1 + scale) + shift).type_as(x)
    query, key, value = (
        projection.unflatten(3, (attn.heads, -1))
        for projection in (attn.norm_q(attn.to_q(normed)), attn.norm_k(attn.to_k(normed)), attn.to_v(normed))
    )
    attended = attn.to_out[1](attn.to_out[0](attend(query, key, value)))
    x = (x.float() + attended * gate).type_as(x)

    rows = (0, 1) if by_chunk else (1, 2)
    normed = block.norm2(x.float()).type_as(x).flatten(*rows)
    x = x + AttentionProcessor()(block.attn2, normed, text).view_as(x)

    normed = (block.norm3(x.float()) * (1 + ff_scale) + ff_shift).type_as(x)
    fed: Tensor = (x.float() + block.ffn(normed).float() * ff_gate).type_as(x)
    return fed


@dataclass(frozen=True)
class _Context:
    """How chunks see themselves and what is behind them.

    `current` rotates `[…, chunks, tokens]`, `past` the keys of the window; `mask` is `[…, chunks, past + tokens]`,
    true where there is something to see.
    """

    current: Rotation
    past: Rotation
    mask: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor) -> Tensor:
        """`past_*` are `[batch, chunks or 1, past, heads, head_dim]`; the result `[batch, chunks, tokens, dim]`."""
        batch, chunks, tokens = query.shape[:3]
        past = (-1, chunks, -1, -1, -1)
        keys = torch.cat([rotate(past_key, *self.past).expand(past), rotate(key, *self.current)], dim=2)
        values = torch.cat([past_value.expand(past), value], dim=2)
        # Additive: a boolean mask makes the ONNX graph guard against rows that see nothing, and here is none.
        mask = torch.zeros_like(self.mask, dtype=query.dtype).masked_fill(~self.mask, float("-inf"))
        out = attention(
            rotate(query, *self.current).flatten(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            mask.expand(batch, -1, -1).flatten(0, 1)[:, None, None],
        )
        return out.flatten(2, 3).view(batch, chunks, tokens, -1)


class CausalDenoiser(_Causal):
    """One chunk of each row: the engine's graph.

    `latents` `[batch, channels, frames, height, width]` with up to `chunk_frames` frames; `timestep` `[batch]` in
    0..1000; `encoder_hidden_states` `[batch, tokens, dim]`; `cache` `[batch, layers, 2, cached_frames, rows, columns,
    dim]`, keys before values, where rows and columns count patches; `write_index` int64 `[batch]`, how many chunks of
    the row's video are finished. To `velocity` like the latents, and `chunk_cache` `[batch, layers, 2, frames, rows,
    columns, dim]`, which belongs into the cache at `window.frames_of(write_index)` once the latents are clean and the
    timestep was 0.
    """

    def forward(
        self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, cache: Tensor, write_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        check_same_batch(latents, timestep, encoder_hidden_states, cache, write_index)
        frames, (rows, columns) = latents.shape[2], self.grid(latents)
        context = self._context(write_index, frames, rows, columns)
        # [batch, layers and keys or values, 1, past, dim]: one chunk a row.
        past = cache.flatten(3, 5).flatten(1, 2).unsqueeze(2)
        new: list[Tensor] = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            new.append(torch.stack([key, value], dim=1).flatten(2, 3).flatten(3, 4))
            past_key, past_value = (
                past[:, 2 * layer + part].view(*past.shape[:1], 1, -1, *key.shape[-2:]) for part in (0, 1)
            )
            return context.attend(query, key, value, past_key, past_value)

        velocity = self.walk(latents, timestep.unsqueeze(1), encoder_hidden_states, 1, attend)
        return velocity, torch.stack(new, dim=1).reshape(-1, self.layers, 2, frames, rows, columns, self.dim)

    def empty_cache(self, batch: int, latents: Tensor) -> Tensor:
        """The cache of videos that have not begun, for latents of this size."""
        shape = (batch, self.layers, 2, self.window.cached_frames, *self.grid(latents), self.dim)
        return latents.new_zeros(shape)

    def write(self, cache: Tensor, chunk_cache: Tensor, chunk: int) -> Tensor:
        """The cache with a whole chunk put in, all rows at the same chunk; not in place, so gradients may flow."""
        if chunk_cache.shape[3] != self.window.chunk_frames:
            raise ValueError(f"only whole chunks are cached, not {chunk_cache.shape[3]} frames")
        place = self.window.frames_of(chunk)
        return torch.cat([cache[:, :, :, : place.start], chunk_cache, cache[:, :, :, place.stop :]], dim=3)

    def _context(self, write_index: Tensor, frames: int, rows: int, columns: int) -> _Context:
        """Every slot's position and whether it is filled, from the number of chunks already written."""
        window = self.window
        written = write_index.unsqueeze(1)
        slots = torch.arange(window.capacity, device=write_index.device).unsqueeze(0)
        # Behind the sinks slot s holds the latest chunk that is congruent to it.
        latest = written - 1 - window.sink_chunks
        back = torch.remainder(latest - (slots - window.sink_chunks), window.window_chunks)
        chunk = torch.where(slots < window.sink_chunks, slots, window.sink_chunks + latest - back)
        filled = (slots < written) & (chunk >= slots)
        gone = (written - window.capacity).clamp(min=0)
        behind = gone if self.positions == "absolute" else torch.zeros_like(gone)
        position = torch.where(slots < window.sink_chunks, slots - behind, chunk - gone)
        position = torch.where(filled, position, torch.zeros_like(position))

        within = torch.arange(window.chunk_frames, device=write_index.device)
        past = (position.unsqueeze(2) * window.chunk_frames + within).flatten(1)
        current = write_index.clamp(max=window.capacity).unsqueeze(1) * window.chunk_frames
        current = current + torch.arange(frames, device=write_index.device)
        seen = filled.unsqueeze(2).expand(-1, -1, window.chunk_frames * rows * columns).flatten(1)
        itself = torch.ones_like(seen[:, :1]).expand(-1, frames * rows * columns)
        return _Context(
            current=self.rotation(current.unsqueeze(1), rows, columns),
            past=self.rotation(past.unsqueeze(1), rows, columns),
            mask=torch.cat([seen, itself], dim=1).unsqueeze(1),
        )


class CausalSequence(_Causal):
    """Whole videos in one call, each chunk at its own noise level, for training.

    `latents` `[batch, channels, frames, height, width]`, any number of frames; `timestep` `[batch, chunks]` in 0..1000;
    `encoder_hidden_states` `[batch, tokens, dim]`, or `[batch, chunks, tokens, dim]` for a text that changes. Each
    chunk sees itself and the chunks that `window.remembered` names. Those are the chunks of `latents` at their own
    noise levels, or with `clean_latents`, of the latents' shape, these at timestep 0: what serving's cache holds after
    the clean-context pass. To `velocity` like the latents.
    """

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        clean_latents: Tensor | None = None,
    ) -> Tensor:
        batch, _, frames = latents.shape[:3]
        chunks = -(-frames // self.window.chunk_frames)
        if timestep.shape != (batch, chunks):
            raise ValueError(f"{frames} frames are {chunks} chunks a row, but timestep is {tuple(timestep.shape)}")
        if clean_latents is not None:
            # One walk over both: the clean videos first, whose keys and values all rows then look back on.
            latents = torch.cat([clean_latents, latents])
            timestep = torch.cat([torch.zeros_like(timestep), timestep])
            encoder_hidden_states = torch.cat([encoder_hidden_states, encoder_hidden_states])
        missing = chunks * self.window.chunk_frames - frames
        padded = F.pad(latents, (0, 0, 0, 0, 0, missing))
        context, gather = self._context(chunks, missing, *self.grid(latents), latents.device)
        repeats = 1 if clean_latents is None else 2

        def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            past_key, past_value = (gather(x[:batch]).repeat(repeats, 1, 1, 1, 1) for x in (key, value))
            return context.attend(query, key, value, past_key, past_value)

        velocity = self.walk(padded, timestep, encoder_hidden_states, chunks, attend)
        return velocity[-batch:, :, :frames]

    def _context(
        self, chunks: int, missing: int, rows: int, columns: int, device: torch.device
    ) -> tuple[_Context, Callable[[Tensor], Tensor]]:
        """The window of every chunk, laid out by position, and what gathers `[batch, chunks, tokens, …]` into it."""
        window, tokens = self.window, rows * columns
        places = min(window.capacity, chunks - 1)
        remembered = [window.remembered(chunk) for chunk in range(chunks)]
        sources = [seen + [0] * (places - len(seen)) for seen in remembered]
        index = torch.tensor(sources, device=device, dtype=torch.long).flatten()

        def gather(x: Tensor) -> Tensor:
            if chunks <= window.capacity + 1:
                # Nothing has left the window: position n is chunk n, for every chunk that looks back.
                return x[:, :places].flatten(1, 2).unsqueeze(1)
            return x.index_select(1, index).reshape(len(x), chunks, -1, *x.shape[3:])

        count = torch.tensor([len(seen) for seen in remembered], device=device)
        seen = torch.arange(places, device=device) < count.unsqueeze(1)
        itself = torch.ones(chunks, window.chunk_frames, dtype=torch.bool, device=device)
        itself[-1, window.chunk_frames - missing :] = False
        mask = torch.cat([seen.repeat_interleave(window.chunk_frames, dim=1), itself], dim=1)
        current = count.unsqueeze(1) * window.chunk_frames + torch.arange(window.chunk_frames, device=device)
        past = torch.arange(places * window.chunk_frames, device=device).unsqueeze(0)
        context = _Context(
            current=self.rotation(current, rows, columns),
            past=self.rotation(past, rows, columns),
            mask=mask.repeat_interleave(tokens, dim=1).unsqueeze(0),
        )
        return context, gather
