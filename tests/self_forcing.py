"""Self-Forcing's files and its rollout, written down plainly.

The rollout knows nothing of this project's causal code: it is diffusers' transformer over the whole video, each frame
with its own timestep, absolute positions, and the full block-causal mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from tiny import CHANNELS
from torch import Tensor

from models.wan import rotate
from models.wan_causal import CausalDenoiser
from models.window import ContextWindow

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


def cached_rollout(denoiser: CausalDenoiser, text: Tensor, call: Callable[..., Any] | None = None) -> Tensor:
    """Chunk by chunk over a cache; `call` computes what `denoiser` does, if it isn't to be used itself."""
    call = call or denoiser
    cache, done = denoiser.empty_cache(2, noise(0, 0)), []
    for chunk in range(CHUNKS):
        latents, index = noise(chunk, 0), torch.full((2,), chunk)
        for step, timestep in enumerate(STEPS):
            velocity, _ = call(latents, torch.full((2,), timestep), text, cache, index)
            latents = step_to(latents, velocity, step, chunk)
        _, clean = call(latents, torch.zeros(2), text, cache, index)
        cache = denoiser.write(cache, clean, chunk)
        done.append(latents)
    return torch.cat(done, dim=2)
