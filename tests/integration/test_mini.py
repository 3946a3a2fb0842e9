"""The model in the repository: whole, within its size, and diffusers' own."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from numpy.typing import NDArray

from models.bundle import Bundle
from serving.media.fmp4 import remux_to_mp4
from serving.media.frames import read_all
from serving.pipeline.local import LocalPipeline
from serving.pipeline.request import make_spec
from serving.pipeline.stages import Fragment, VideoSpec

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


def test_latents_look_as_their_preview_says():
    """To noise that the fit hasn't seen, far better than the mean does."""
    pytest.importorskip("torch", reason="needs the export extra")
    from export import parity, preview

    bundle = Bundle.load(MINI / "bundle")
    colours, fitted = bundle.manifest.preview, preview.fit(bundle.manifest, bundle.root)
    assert colours is not None
    assert np.abs(np.array(colours.factors) - np.array(fitted.factors)).max() < 1e-3
    latents = np.random.default_rng(9).standard_normal((1, 32, 1, 16, 16), np.float32)
    (frames,) = parity.open_session(bundle.root / "decoder_first.onnx").run(["frames"], {"latents": latents})
    seen = frames[0, 0].reshape(16, 16, 16, 16, 3).mean(axis=(1, 3)) / 255
    shown = latents[0, :, 0].transpose(1, 2, 0) @ np.array(colours.factors) + np.array(colours.bias)
    assert np.square(shown - seen).mean() < 0.4 * np.square(seen - seen.mean(axis=(0, 1))).mean()


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


async def test_the_bundle_encodes_the_frames_that_an_extension_begins_with() -> None:
    bundle = Bundle.load(MINI / "bundle")
    asked = {"seconds": 1, "size": "128x128", "seed": 3, "num_inference_steps": 4}
    spec = make_spec(bundle.manifest, "a large red ball moving right on a grey floor at noon", **asked)
    async with LocalPipeline.open(bundle) as pipeline:
        begun = await frames_of(pipeline, spec, None)
        longer = replace(spec, frames=33, source="videos/a/source", source_frames=17)
        shown = await frames_of(pipeline, longer, begun)
    assert (len(begun), len(shown)) == (17, 33)
    noise = float(np.mean((shown[:17] / 255 - begun / 255) ** 2))
    assert -10 * np.log10(noise) > 30


async def frames_of(pipeline: LocalPipeline, spec: VideoSpec, source: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    made: list[Fragment] = []

    async def sink(fragment: Fragment) -> None:
        made.append(fragment)

    await pipeline.generate(spec, sink, source=source)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.mp4"
        remux_to_mp4(made[0].init, (fragment.data for fragment in made), path)
        return read_all(path, spec.width, spec.height, spec.frames)
