"""The model in the repository: whole, within its size, and diffusers' own."""

from pathlib import Path

import numpy as np
import pytest

from models.bundle import Bundle

MINI = Path(__file__).parents[2] / "models" / "mini"
MAX_BYTES = 80_000_000


def test_the_bundle_is_as_its_manifest_says():
    bundle = Bundle.load(MINI / "bundle")
    bundle.verify()
    assert bundle.manifest.name == "mini"
    for name, graph in bundle.manifest.graphs.items():
        assert graph.parity, name
        # Frames are whole levels: a value near .5 may round either way.
        assert graph.parity.pop("frames", 0) <= 1, name
        assert max(graph.parity.values()) <= 1e-4, name


def test_weights_stay_small():
    files = [f for part in ("bundle", "checkpoint") for f in (MINI / part).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= MAX_BYTES


def test_diffusers_runs_the_checkpoint():
    pytest.importorskip("diffusers", reason="needs the export extra")
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(MINI / "checkpoint")
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        "a large blue cube standing still on a sand floor at noon",
        height=128,
        width=128,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=3.0,
        max_sequence_length=64,
        output_type="np",
    ).frames[0]
    assert frames.shape == (9, 128, 128, 3)
    # At noon the sky is bright and bluish, whatever else four steps can't make yet.
    sky = frames[:, :8].mean((0, 1, 2))
    assert np.isfinite(frames).all()
    assert sky[2] > sky[0]
    assert sky.mean() > 0.4
