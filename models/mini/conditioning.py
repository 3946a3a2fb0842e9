"""Prompts as the denoiser's text states, and both networks begun from an earlier checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from tokenizers import Tokenizer
from torch import nn
from transformers import UMT5EncoderModel

from models.mini.networks import TEXT_LENGTH, build_text_encoder


class Captioned(nn.Module):
    """Token ids to `encoder_hidden_states`, padded with zeros as `WanPipeline` pads them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder = build_text_encoder(tokenizer.get_vocab_size())

    def forward(self, prompts: list[str]) -> torch.Tensor:
        rows = [encoding.ids[:TEXT_LENGTH] for encoding in self.tokenizer.encode_batch(prompts)]
        longest = max(map(len, rows))
        device = self.encoder.shared.weight.device
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows]).to(device)
        lengths = torch.tensor([len(row) for row in rows]).to(device)
        mask = (torch.arange(longest, device=device)[None] < lengths[:, None]).long()
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        return nn.functional.pad(hidden, (0, 0, 0, TEXT_LENGTH - longest))


def start_from(checkpoint: Path, text: Captioned, transformer: WanTransformer3DModel) -> None:
    """Copy a diffusers checkpoint's weights; words that both tokenizers know keep their embedding."""
    transformer.load_state_dict(WanTransformer3DModel.from_pretrained(checkpoint / "transformer").state_dict())
    known = UMT5EncoderModel.from_pretrained(checkpoint / "text_encoder").state_dict()
    words = Tokenizer.from_file(str(checkpoint / "tokenizer" / "tokenizer.json")).get_vocab()
    state = text.encoder.state_dict()
    for name, value in known.items():
        if value.shape == state[name].shape:
            state[name] = value
            continue
        for word, index in text.tokenizer.get_vocab().items():
            if word in words:
                state[name][index] = value[words[word]]
    text.encoder.load_state_dict(state)
