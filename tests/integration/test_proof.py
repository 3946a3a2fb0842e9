"""A bundle is written when a whole video of it is the checkpoint's own, and not otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from export import checkpoint as export_checkpoint_module
from export.checkpoint import export_checkpoint
from export.onnx import ExportError
from export.proof import EQUAL_PSNR, LEAST_PSNR, compare
from models.bundle import Bundle, GraphInfo
from models.graph import Graph

# Exporting takes most of a minute of a free core, and this machine may be busy.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def traced_before(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes minutes: the graphs are those of a bundle that is there, and all that follows is done anew."""

    def copied(graph: Graph, _: Any, folder: Path, *__: Any) -> GraphInfo:
        for name in (graph.file, graph.weights):
            shutil.copy(tiny_bundle.root / name, folder / name)
        return tiny_bundle.manifest.graphs[graph.name]

    monkeypatch.setattr(export_checkpoint_module, "_graph", copied)


@pytest.fixture
def retrained(tiny_checkpoint: Path, tmp_path: Path) -> Callable[[float], Path]:
    def change(factor: float) -> Path:
        path = tmp_path / "checkpoint"
        shutil.copytree(tiny_checkpoint, path)
        (weights,) = (path / "transformer").glob("*.safetensors")
        tensors = load_file(weights)
        tensors["proj_out.weight"] = tensors["proj_out.weight"] * factor
        save_file(tensors, weights, metadata={"format": "pt"})
        return path

    return change


@pytest.mark.usefixtures("traced_before")
def test_the_same_checkpoint_proves_its_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    said: list[str] = []
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", said.append)
    bundle.verify()
    assert bundle.manifest.proof is not None
    assert bundle.manifest.proof.psnr_db >= bundle.manifest.proof.worst_frame_psnr_db >= LEAST_PSNR
    assert "Comparing a whole video" in said


@pytest.mark.usefixtures("traced_before")
def test_a_bundle_of_other_weights_is_not_written(retrained: Callable[[float], Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match=r"A whole video differs from diffusers' pipeline: [\d.]+ dB"):
        export_checkpoint(retrained(1.2), tmp_path / "out" / "bundle")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("traced_before")
def test_without_verification_nothing_is_claimed(retrained: Callable[[float], Path], tmp_path: Path) -> None:
    bundle = export_checkpoint(retrained(1.2), tmp_path / "bundle", verify=False)
    assert bundle.manifest.proof is None


def test_psnr_is_what_it_is_called() -> None:
    frames = np.random.default_rng(0).integers(0, 200, (3, 4, 5, 3)).astype(np.uint8)
    assert compare(frames, frames) == (EQUAL_PSNR, EQUAL_PSNR)
    brighter = frames.copy()
    brighter[1] += 10
    whole, worst = compare(brighter, frames)
    assert worst == pytest.approx(20 * np.log10(255 / 10))
    assert whole == pytest.approx(worst + 10 * np.log10(3))
    assert compare(frames[:2], frames) == (float("-inf"), float("-inf"))
