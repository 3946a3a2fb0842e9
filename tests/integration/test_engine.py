"""ONNX Runtime behind the protocol: it runs what it is told to, where it is told to, or says why not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from models.bundle import Bundle
from serving.engines import onnx_runtime
from serving.engines.engine import Array, EngineError
from serving.engines.onnx_runtime import CPU, CUDA, TENSORRT, OnnxRuntimeEngine, context_file, providers
from serving.engines.opening import Opener


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


@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_a_gpu_that_is_not_there_is_an_error_and_not_the_cpu(
    provider: str, first: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if provider not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime was built without {provider}")
    try:
        onnxruntime.InferenceSession(str(first), providers=[provider]).get_providers().index(provider)
    except ValueError:
        pass
    else:
        pytest.skip("there is a GPU: tests/gpu runs on it")
    capfd.readouterr()
    with pytest.raises(EngineError, match=f"{provider}") as caught:
        OnnxRuntimeEngine(first, provider=provider, context_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert "allback" not in capfd.readouterr().out


def test_what_is_asked_of_the_gpu_providers(tmp_path: Path) -> None:
    exact = (CUDA, {"use_tf32": "0"})
    assert providers(CUDA) == [exact]
    assert providers(CPU) == [CPU]
    context = context_file(Path("denoiser.onnx"), tmp_path / "plans")
    assert context.name == f"denoiser-ort{onnxruntime.__version__}_ctx.onnx"
    (name, options), second = providers(TENSORRT, context)
    assert (name, second) == (TENSORRT, exact)
    assert options["trt_ep_context_file_path"] == str(context)  # type: ignore[index]  # not the plain name
    # The engine is there: it is loaded as it is.
    context.write_bytes(b"")
    assert providers(TENSORRT, context) == [(TENSORRT, {}), exact]


def test_nodes_that_a_provider_leaves_to_the_cpu_are_named(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in another provider's clothes: everything is left to it."""
    monkeypatch.setattr(onnx_runtime, "providers", lambda provider, context: [CPU])
    monkeypatch.setattr(onnx_runtime.ort, "get_available_providers", lambda: ["Imagined", CPU])

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]  # onnxruntime has no types
        def get_providers(self) -> list[str]:
            return ["Imagined", CPU]

    monkeypatch.setattr(onnx_runtime.ort, "InferenceSession", Session)
    with pytest.raises(EngineError, match=r"decoder_first.onnx: Imagined leaves .*Conv.* to the CPU") as caught:
        OnnxRuntimeEngine(first, provider="Imagined")
    assert "Shape" not in str(caught.value)


def test_a_graph_that_is_not_the_manifests_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    graphs = tiny_bundle.manifest.graphs
    swapped = graphs | {
        "decoder_first": graphs["decoder_first"].model_copy(update={"inputs": graphs["denoiser"].inputs})
    }
    wrong = Bundle(tiny_bundle.root, tiny_bundle.manifest.model_copy(update={"graphs": swapped}), tiny_bundle.digest)
    with pytest.raises(EngineError, match=r"decoder_first.onnx: its inputs aren't those in the manifest of .*: export"):
        Opener(wrong).open("decoder_first")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_plans_need_tensorrt_and_a_gpu(name: str, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=f"decoder_first: {name} can't be imported .*: pip install"):
        Opener(tiny_bundle, provider=name).open("decoder_first", "decoder_next")
