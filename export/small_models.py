"""What a bundle has beside the model itself: a rewriter, a captioner, and the other half of the VAE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export import captioner, words
from export.onnx import ExportError
from models.bundle import CaptionerInfo, RewriterInfo
from models.families import Family
from models.graph import Graph
from models.wan_family import WanFamily


@dataclass(frozen=True)
class SmallModels:
    """Their graphs and the manifest's sections; and of Wan's VAE the encoder, for videos that begin from something."""

    rewriter: RewriterInfo | None
    captioner: CaptionerInfo | None
    graphs: tuple[Graph, ...]

    @classmethod
    def of(cls, checkpoint: Path, family: Family) -> SmallModels:
        """Raises `ExportError` for a folder that can't be read, or a captioner of a family it can't look at."""
        rewriter, captions = words.rewriter(checkpoint), captioner.captioner(checkpoint, family.latent)
        graphs = [*(rewriter[1] if rewriter else ())]
        if captions:
            if not isinstance(family, WanFamily):
                raise ExportError(f"A captioner reads the latents of Wan's VAE, not {family.name}'s.")
            graphs += captions[1]
        if isinstance(family, WanFamily):
            graphs += captioner.encoders(family.checkpoint, family.latent)
        return cls(rewriter[0] if rewriter else None, captions[0] if captions else None, tuple(graphs))
