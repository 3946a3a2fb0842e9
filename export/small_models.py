"""What a bundle has beside the model itself: a rewriter, a captioner, a tiny decoder, the other half of the VAE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export import captioner, words
from export.onnx import ExportError
from models.bundle import CaptionerInfo, LatentInfo, RewriterInfo, TinyDecoderInfo, sha256_of
from models.families import Family
from models.graph import Graph
from models.tiny_decoder import TINY_DECODER, TinyDecoder, tiny_decoders
from models.wan_family import WanFamily


@dataclass(frozen=True)
class SmallModels:
    """Their graphs and the manifest's sections; and of Wan's VAE the encoder, for videos that begin from something."""

    rewriter: RewriterInfo | None
    captioner: CaptionerInfo | None
    tiny_decoder: TinyDecoderInfo | None
    graphs: tuple[Graph, ...]

    @classmethod
    def of(cls, checkpoint: Path, family: Family) -> SmallModels:
        """Raises `ExportError` for what can't be read, or doesn't go with the family's latents."""
        rewriter, captions = words.rewriter(checkpoint), captioner.captioner(checkpoint, family.latent)
        graphs = [*(rewriter[1] if rewriter else ())]
        if captions:
            if not isinstance(family, WanFamily):
                raise ExportError(f"A captioner reads the latents of Wan's VAE, not {family.name}'s.")
            graphs += captions[1]
        if isinstance(family, WanFamily):
            graphs += captioner.encoders(family.checkpoint, family.latent)
        tiny = None
        if (path := checkpoint / TINY_DECODER).is_file():
            decoder = _tiny_decoder(path, family.latent)
            tiny = TinyDecoderInfo(sha256=sha256_of(path), parameters=sum(p.numel() for p in decoder.parameters()))
            graphs += tiny_decoders(decoder)
        return cls(rewriter[0] if rewriter else None, captions[0] if captions else None, tiny, tuple(graphs))


def _tiny_decoder(path: Path, latent: LatentInfo) -> TinyDecoder:
    try:
        decoder = TinyDecoder.load(path)
    except (OSError, ValueError) as error:
        raise ExportError(str(error)) from error
    made = (decoder.channels, decoder.spatial, decoder.temporal)
    if made != (latent.channels, latent.spatial, latent.temporal) or latent.streaming != "exact" or latent.group > 1:
        raise ExportError(
            f"{path.name} decodes {made[0]} channels to {made[1]} x {made[1]} pixels of {made[2]} frames, causally; "
            f"this model's latents are {latent.channels}, {latent.spatial} and {latent.temporal}."
        )
    return decoder
