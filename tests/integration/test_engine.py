"""ONNX Runtime behind the protocol: it runs what it is told to, where it is told to, or says why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from models.bundle import Bundle
from serving.engines.engine import Array, EngineError
from serving.engines.onnx_runtime import OnnxRuntimeEngine


@pytest.fixture
def first(tiny_bundle: Bundle) -> Path:
    return tiny_bundle.path_of("decoder_first")


@pytest.fixture
def latents(tiny_bundle: Bundle) -> Array:
    shape = (1, tiny_bundle.manifest.latent.channels, 1, 4, 6)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def test_only_the_outputs_that_were_named_come_back(first: Path, latents: Array) -> None:
    everything = OnnxRuntimeEngine(first).run({"latents": latents})
    assert {"frames", "pixels", "cache_00"} < everything.keys()
    named = OnnxRuntimeEngine(first, outputs=["cache_00", "frames"]).run({"latents": latents})
    assert list(named) == ["cache_00", "frames"]
    for name, array in named.items():
        np.testing.assert_array_equal(array, everything[name])


def test_an_array_that_is_not_contiguous_is_read_right(first: Path, latents: Array) -> None:
    engine = OnnxRuntimeEngine(first, outputs=["frames"])
    turned = np.ascontiguousarray(latents.swapaxes(3, 4)).swapaxes(3, 4)
    assert not turned.flags.c_contiguous
    np.testing.assert_array_equal(engine.run({"latents": turned})["frames"], engine.run({"latents": latents})["frames"])


def test_inputs_and_outputs_are_described(first: Path, tiny_bundle: Bundle) -> None:
    engine = OnnxRuntimeEngine(first)
    dtype, shape = engine.inputs["latents"]
    assert dtype == np.float32
    assert shape[1:3] == (tiny_bundle.manifest.latent.channels, 1)
    assert engine.outputs[:1] == ("frames",)


def test_what_the_graph_cannot_take_is_refused_before_it_runs(first: Path, latents: Array) -> None:
    engine = OnnxRuntimeEngine(first)
    for feeds, message in [
        ({"latent": latents}, r"decoder_first.onnx: takes latents, not latent$"),
        ({"latents": latents, "cache_00": latents}, "takes latents, not latents, cache_00"),
        ({"latents": latents.astype(np.float64)}, "latents must be float32 .* not float64"),
        ({"latents": latents[0]}, "latents must be float32"),
        ({"latents": latents[:, 1:]}, "latents must be float32"),
    ]:
        with pytest.raises(EngineError, match=message):
            engine.run(feeds)


def test_what_the_runtime_refuses_names_graph_and_shapes(first: Path, latents: Array) -> None:
    with pytest.raises(EngineError, match=r"decoder_first.onnx: failed on .*\[1, \d+, 1, 0, 6\]"):
        OnnxRuntimeEngine(first).run({"latents": latents[:, :, :, :0]})


def test_a_file_that_is_missing_or_no_graph_is_named(first: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such file"):
        OnnxRuntimeEngine(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(EngineError, match=r"text.onnx: could not be loaded"):
        OnnxRuntimeEngine(tmp_path / "text.onnx")
    with pytest.raises(EngineError, match=r"no output pixel; it has frames"):
        OnnxRuntimeEngine(first, outputs=["pixel"])


def test_a_provider_that_is_not_in_use_is_an_error_and_not_the_cpu(first: Path) -> None:
    """onnxruntime itself only writes a line to stderr and goes on, on the CPU."""
    with pytest.raises(EngineError, match="this onnxruntime has no ImaginaryExecutionProvider"):
        OnnxRuntimeEngine(first, provider="ImaginaryExecutionProvider")
    cuda = "CUDAExecutionProvider"
    if cuda not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built without CUDA")
    try:
        onnxruntime.InferenceSession(str(first), providers=[cuda]).get_providers().index(cuda)
    except ValueError:
        with pytest.raises(EngineError, match="CUDAExecutionProvider was asked for but did not start"):
            OnnxRuntimeEngine(first, provider=cuda)
    else:
        OnnxRuntimeEngine(first, provider=cuda)
