"""The Wan family: which parts of its pipelines' checkpoints are served, and how each is wrapped for export.

The decoder streams. `AutoencoderKLWan.decode` walks over the latent frames one by one and keeps, for each causal
convolution, the last two frames of its input. Here those caches are tensors of exactly two frames that go in and out of
the graph, which is the same computation: causal padding is zeros, so an empty cache is two zero frames, and so is the
"Rep" mark that `WanResample` leaves after the first latent. Only the first latent has another structure (time is not
upsampled there), hence two graphs: `DecoderFirst` and `DecoderNext`.

Imports torch, diffusers and transformers: for export and training only; serving never imports this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from models.families import UnsupportedCheckpointError, fast_tokenizer, read_index
from models.stored import Stored, skeleton

CACHE_FRAMES = 2
TEXT_ENCODERS = ("UMT5EncoderModel", "T5EncoderModel")
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
# As diffusers tells apart what is the text and what the image in one sequence.
TEXT_BESIDE_IMAGE = 512


@dataclass(frozen=True)
class WanCheckpoint:
    """The parts of a checkpoint, in fp32 on the CPU.

    With `transformer_2` (Wan 2.2 A14B), that one takes the timesteps below `boundary_ratio` of the training schedule.
    With `expand_timesteps` (TI2V-5B) each token has its own timestep, 0 in frames that are given. Where the transformer
    takes a picture as channels, an `image_encoder` (Wan 2.1) shows it as tokens too; `image_processor` is its config.
    """

    text_encoder: Any
    transformer: Any
    vae: Any
    scheduler: dict[str, Any]
    tokenizer: Path
    transformer_2: Any | None = None
    boundary_ratio: float | None = None
    expand_timesteps: bool = False
    image_encoder: Any | None = None
    image_processor: dict[str, Any] = field(default_factory=dict)
    stored: Mapping[str, Stored] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, *, lazily: bool = False) -> WanCheckpoint:
        """Read a diffusers directory, part by part. Raises `UnsupportedCheckpointError`.

        `lazily`: text encoder and transformers stay on disk, see `models.stored`.
        """
        index = read_index(path)
        if index.get("_class_name") not in PIPELINES:
            raise UnsupportedCheckpointError(
                f"{path} holds a {index.get('_class_name')}, but only {' and '.join(PIPELINES)} are supported."
            )
        experts, boundary = any(index.get("transformer_2") or ()), index.get("boundary_ratio")
        if experts and not (isinstance(boundary, float) and 0 < boundary < 1):
            raise UnsupportedCheckpointError(
                f"{path} has two transformers, so `boundary_ratio` in model_index.json must say where they change, "
                f"not {boundary}."
            )
        tokenizer = fast_tokenizer(path)
        kind = (index.get("text_encoder") or [None, None])[1]
        if kind not in TEXT_ENCODERS:
            raise UnsupportedCheckpointError(f"{path} has the text encoder {kind}: it must be one of {TEXT_ENCODERS}.")
        # Its progress bar would cut through ours.
        transformers.utils.logging.disable_progress_bar()
        local: dict[str, Any] = {"local_files_only": True}
        stored: dict[str, Stored] = {}

        def part(name: str, model: Any, dtype: str = "torch_dtype") -> Any:
            if not lazily:
                return model.from_pretrained(path / name, **{dtype: torch.float32}, **local).eval()
            if dtype == "dtype":
                module, stored[name] = skeleton(
                    lambda: model(model.config_class.from_pretrained(path / name)), path / name
                )
            else:
                module, stored[name] = skeleton(lambda: model.from_config(model.load_config(path / name)), path / name)
            return module

        transformers_there = [
            part(name, WanTransformer3DModel) for name in ("transformer", "transformer_2")[: 1 + experts]
        ]
        looks = {transformer.config.image_dim is not None for transformer in transformers_there}
        if len(looks) > 1 or any(transformer.config.pos_embed_seq_len for transformer in transformers_there):
            raise UnsupportedCheckpointError(f"{path} needs a first and a last picture, or two kinds of pictures.")
        if looks == {True} and not any(index.get("image_encoder") or ()):
            raise UnsupportedCheckpointError(f"{path} needs an image encoder, and model_index.json names none.")
        return cls(
            text_encoder=part("text_encoder", getattr(transformers, kind), "dtype"),
            transformer=transformers_there[0],
            vae=AutoencoderKLWan.from_pretrained(path / "vae", torch_dtype=torch.float32, **local).eval(),
            scheduler=json.loads((path / "scheduler" / "scheduler_config.json").read_text()),
            tokenizer=tokenizer,
            transformer_2=transformers_there[1] if experts else None,
            boundary_ratio=boundary if experts else None,
            expand_timesteps=bool(index.get("expand_timesteps")),
            image_encoder=transformers.CLIPVisionModel.from_pretrained(
                path / "image_encoder", dtype=torch.float32, **local
            ).eval()
            if looks == {True}
            else None,
            image_processor=json.loads((path / "image_processor" / "preprocessor_config.json").read_text())
            if looks == {True}
            else {},
            stored=stored,
        )


class TextEncoder(nn.Module):
    """`input_ids`, `attention_mask` int64 `[batch, tokens]` to `hidden_states` `[batch, tokens, dim]`, zero if masked.

    `WanPipeline` cuts the states off behind the prompt and pads with zeros, which is the same.
    """

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.text_encoder(input_ids, attention_mask).last_hidden_state
        return states * attention_mask.unsqueeze(-1).to(states.dtype)


class Denoiser(nn.Module):
    """`latents` `[batch, channels, frames, height, width]`, `timestep` `[batch]` in 0..1000 and `encoder_hidden_states`
    `[batch, tokens, dim]` to the flow's `velocity`, shaped like the latents.

    `by_frame`: `timestep` is `[batch, frames]`, and 0 for frames that are given (TI2V-5B's first one).
    """

    def __init__(self, transformer: Any, *, by_frame: bool = False) -> None:
        super().__init__()
        self.transformer = transformer
        self.by_frame = by_frame

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
        check_same_batch(latents, timestep, encoder_hidden_states)
        if self.by_frame:
            _, height, width = self.transformer.config.patch_size
            tokens = (latents.shape[3] // height) * (latents.shape[4] // width)
            timestep = timestep.unsqueeze(2).expand(-1, -1, tokens).flatten(1)
        velocity: Tensor = self.transformer(latents, timestep, encoder_hidden_states, return_dict=False)[0]
        return velocity


class PicturedDenoiser(Denoiser):
    """The same with a picture: `condition` `[batch, temporal + channels, frames, height, width]`, see
    `models.pictures`, and `image_hidden_states` `[batch, tokens, dim]` if there is an image encoder."""

    def forward(  # type: ignore[override]
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        condition: Tensor,
        image_hidden_states: Tensor | None = None,
    ) -> Tensor:
        seen = () if image_hidden_states is None else (image_hidden_states,)
        check_same_batch(latents, timestep, encoder_hidden_states, condition, *seen)
        channels = torch.cat([latents, condition], dim=1)
        velocity: Tensor = self.transformer(
            channels, timestep, encoder_hidden_states, image_hidden_states, return_dict=False
        )[0]
        return velocity


class ImageEncoder(nn.Module):
    """`pixels` uint8 `[batch, side, side, 3]` to CLIP's `image_hidden_states` `[batch, tokens, dim]`, before its last
    layer, as `WanImageToVideoPipeline` takes them."""

    mean: Tensor
    std: Tensor

    def __init__(self, image_encoder: Any, processor: Mapping[str, Any]) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        for name in ("mean", "std"):
            values = 255 * torch.tensor(processor[f"image_{name}"])
            self.register_buffer(name, values.view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        values = (pixels.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        states: Tensor = self.image_encoder(values, output_hidden_states=True).hidden_states[-2]
        return states


def check_same_batch(first: Tensor, *others: Tensor) -> None:
    """Each input has its own symbol for the batch; the export must be told that they are one."""
    for other in others:
        torch._check(other.shape[0] == first.shape[0])  # type: ignore[no-untyped-call]


class AttentionProcessor:
    """`WanAttnProcessor`, but rotating with `stack` where that writes in place (ONNX: ScatterND)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        image = None
        if attn.add_k_proj is not None:
            tokens = context.shape[1] - TEXT_BESIDE_IMAGE
            image, context = context[:, :tokens], context[:, tokens:]
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(context).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        out = attention(query, key, value)
        if image is not None:
            key = attn.norm_added_k(attn.add_k_proj(image)).unflatten(2, (attn.heads, -1))
            value = attn.add_v_proj(image).unflatten(2, (attn.heads, -1))
            out = out + attention(query, key, value)
        out = attn.to_out[0](out.flatten(2, 3))
        return attn.to_out[1](out)  # type: ignore[no-any-return]


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of `[batch, tokens, heads, dim]`, also the result's shape; `mask` is added to the scores."""
    query, value = query.transpose(1, 2), value.transpose(1, 2)
    out: Tensor
    if torch.compiler.is_exporting():
        # What becomes of the other in a graph transposes the keys twice, and works out where their axes are each time.
        scores = query * query.shape[-1] ** -0.5 @ key.permute(0, 2, 3, 1)
        out = (scores if mask is None else scores + mask).softmax(dim=-1) @ value
    else:
        out = F.scaled_dot_product_attention(query, key.transpose(1, 2), value, attn_mask=mask)
    return out.transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on neighbouring pairs of `[batch, tokens, heads, dim]`; both of a pair have one angle in `cos` and `sin`."""
    # Each pair's quarter turn is exact, and a matrix: to take neighbours apart and put them together again costs ONNX
    # Runtime on the CPU as much as a third of a layer.
    return x * cos + x @ _quarter_turn(x) * sin


def _quarter_turn(x: Tensor) -> Tensor:
    """`[dim, dim]`, by which each pair (a, b) of `x` becomes (-b, a)."""
    sides = range(x.shape[-1])
    rows = [
        [float(side == pair + 1) if pair % 2 == 0 else -float(side == pair - 1) for side in sides] for pair in sides
    ]
    return torch.tensor(rows, dtype=x.dtype, device=x.device)


class _Caches:
    """Hands each causal convolution its cache, in the order of the walk, and collects the next ones.

    `previous` is None for the first latent: padding with zeros then does what an empty cache would.
    """

    def __init__(self, previous: tuple[Tensor, ...] | None) -> None:
        self.previous = previous
        self.next: list[Tensor] = []

    @property
    def first(self) -> bool:
        return self.previous is None

    def conv(self, conv: Any, x: Tensor) -> Tensor:
        """Apply a `WanCausalConv3d` with a time kernel of three."""
        if self.previous is None:
            self.next.append(torch.cat([torch.zeros_like(x), x], dim=2)[:, :, -CACHE_FRAMES:])
            return conv(x)  # type: ignore[no-any-return]
        cache = self.previous[len(self.next)]
        self.next.append(torch.cat([cache, x], dim=2)[:, :, -CACHE_FRAMES:])
        return conv(x, cache)  # type: ignore[no-any-return]

    def skip(self, x: Tensor) -> None:
        """The convolution is not used on the first latent; it starts on the second, with an empty cache."""
        self.next.append(torch.cat([torch.zeros_like(x)] * CACHE_FRAMES, dim=2))


def _residual_block(block: Any, x: Tensor, caches: _Caches) -> Tensor:
    shortcut = block.conv_shortcut(x)
    x = caches.conv(block.conv1, block.nonlinearity(block.norm1(x)))
    x = caches.conv(block.conv2, block.nonlinearity(block.norm2(x)))
    return x + shortcut  # type: ignore[no-any-return]


def _upsample(resample: Any, x: Tensor, caches: _Caches) -> Tensor:
    batch, channels, frames, height, width = x.shape
    if resample.mode == "upsample3d":
        if caches.first:
            caches.skip(x)
        else:
            x = caches.conv(resample.time_conv, x).reshape(batch, 2, channels, frames, height, width)
            x = torch.stack((x[:, 0], x[:, 1]), dim=3).reshape(batch, channels, 2 * frames, height, width)
            frames = 2 * frames
    x = resample.resample(x.transpose(1, 2).flatten(0, 1))
    return x.unflatten(0, (batch, frames)).transpose(1, 2)  # type: ignore[no-any-return, no-untyped-call]


def _up_block(block: Any, x: Tensor, caches: _Caches) -> Tensor:
    """A `WanResidualUpBlock` (Wan 2.2) or a `WanUpBlock` (Wan 2.1)."""
    before = x
    for resnet in block.resnets:
        x = _residual_block(resnet, x, caches)
    upsampler = block.upsampler if hasattr(block, "upsampler") else (block.upsamplers or [None])[0]
    if upsampler is not None:
        x = _upsample(upsampler, x, caches)
    if getattr(block, "avg_shortcut", None) is not None:
        x = x + _duplicate(block.avg_shortcut, before, caches.first)
    return x


def _duplicate(shortcut: Any, x: Tensor, first: bool) -> Tensor:
    """A `DupUp3D`, with an expand for its `repeat_interleave`, which ONNX would make an index gather of."""
    batch, _, frames, height, width = x.shape
    out, in_time, in_space = shortcut.out_channels, shortcut.factor_t, shortcut.factor_s
    x = x.unsqueeze(2).expand(-1, -1, shortcut.repeats, -1, -1, -1)
    x = x.reshape(batch, out, in_time, in_space, in_space, frames, height, width).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(batch, out, frames * in_time, height * in_space, width * in_space)
    return x[:, :, in_time - 1 :] if first else x


def _decode(vae: Any, latents: Tensor, caches: _Caches) -> Tensor:
    """The walk of `AutoencoderKLWan.decode` over one chunk: pixels `[batch, 3, frames, height, width]` in [-1, 1]."""
    decoder = vae.decoder
    x = caches.conv(decoder.conv_in, vae.post_quant_conv(latents))
    x = _residual_block(decoder.mid_block.resnets[0], x, caches)
    for attention, resnet in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
        x = _residual_block(resnet, attention(x), caches)
    for block in decoder.up_blocks:
        x = _up_block(block, x, caches)
    x = caches.conv(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)))
    if vae.config.patch_size is not None:
        x = unpatchify(x, patch_size=vae.config.patch_size)
    return x.clamp(-1.0, 1.0)


class _Decoder(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        shape = (1, -1, 1, 1, 1)
        self.register_buffer("mean", torch.tensor(vae.config.latents_mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(vae.config.latents_std).view(shape), persistent=False)

    def decode(self, latents: Tensor, caches: _Caches) -> tuple[Tensor, ...]:
        pixels = _decode(self.vae, latents * self.std + self.mean, caches)
        # The cast is the last operation: TensorRT takes uint8 nowhere else.
        frames = ((pixels.permute(0, 2, 3, 4, 1) + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)
        return frames, pixels, *caches.next


class DecoderFirst(_Decoder):
    """The first latent frame, normalised, to `frames` uint8 `[batch, 1, H, W, 3]`, `pixels`, and the caches."""

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return self.decode(latents, _Caches(None))


class DecoderNext(_Decoder):
    """`t` more latent frames and the caches to `frames` uint8 `[batch, 4 t, H, W, 3]`, `pixels`, the next caches."""

    def forward(self, latents: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        check_same_batch(latents, *caches)
        return self.decode(latents, _Caches(caches))
