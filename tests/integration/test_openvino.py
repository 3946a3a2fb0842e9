"""OpenVINO behind the protocol: the same numbers as ONNX Runtime's, whatever else is in the call."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openvino
import pytest

from models.bundle import Bundle, GraphName
from serving.config import MINI_BUNDLE
from serving.engines.engine import Array, EngineError
from serving.engines.onnx_runtime import CPU, OnnxRuntimeEngine
from serving.engines.opening import FASTEST, Opener, provider_here
from serving.engines.openvino import OPENVINO_BF16, OpenVinoEngine, computes_in_bf16

# Every name that the bundled model's graphs have for a dimension; "2*rows" is one too.
_SIDES = {"batch": 2, "frames": 2, "rows": 2, "columns": 3, "height": 4, "width": 6, "tokens": 64}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(MINI_BUNDLE)


def side(named: int | str) -> int:
    if isinstance(named, int):
        return named
    factor, _, name = named.rpartition("*")
    return int(factor or 1) * _SIDES[name]


def feeds(bundle: Bundle, graph: GraphName) -> dict[str, Array]:
    random = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for tensor in bundle.manifest.graphs[graph].inputs:
        shape = [side(named) for named in tensor.shape]
        if tensor.dtype == "float32":
            made[tensor.name] = random.standard_normal(shape, dtype=np.float32)
        else:
            made[tensor.name] = random.integers(0, 2 if "mask" in tensor.name else 200, shape).astype(tensor.dtype)
    return made | ({"timestep": np.array([900, 50], np.float32)} if "timestep" in made else {})


@pytest.mark.parametrize(
    "graph", ["text_encoder", "denoiser", "decoder_first", "decoder_next", "encoder_first", "encoder_next"]
)
def test_every_graph_gives_what_onnx_runtime_gives(bundle: Bundle, graph: GraphName) -> None:
    fed = feeds(bundle, graph)
    (reference,) = Opener(bundle).open(graph)
    (engine,) = Opener(bundle, provider="openvino").open(graph)
    outputs, expected = engine.run(fed), reference.run(fed)
    assert list(outputs) == list(expected)
    for name, array in outputs.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1 if array.dtype == np.uint8 else 1e-4)


def test_a_row_has_the_same_bits_in_any_company_and_with_any_threads(bundle: Bundle) -> None:
    fed = feeds(bundle, "denoiser")
    (engine,) = Opener(bundle, provider="openvino").open("denoiser")
    (faster,) = Opener(bundle, threads=2, provider="openvino").open("denoiser")
    together = engine.run(fed)["velocity"]
    alone = engine.run({name: array[1:] for name, array in fed.items()})["velocity"]
    np.testing.assert_array_equal(together[1:], alone)
    np.testing.assert_array_equal(together, faster.run(fed)["velocity"])


def test_an_output_outlives_the_next_call(bundle: Bundle) -> None:
    fed = feeds(bundle, "decoder_first")
    (engine,) = Opener(bundle, provider="openvino").open("decoder_first")
    first = engine.run(fed)["frames"]
    kept = first.copy()
    engine.run({"latents": -fed["latents"]})
    np.testing.assert_array_equal(first, kept)


def test_what_it_cannot_take_is_refused_with_the_graphs_name(bundle: Bundle, tmp_path: Path) -> None:
    path = bundle.path_of("decoder_first")
    with pytest.raises(EngineError, match="no such file"):
        OpenVinoEngine(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(EngineError, match=r"^text.onnx: could not be loaded by OpenVINO: [^\n]*$"):
        OpenVinoEngine(tmp_path / "text.onnx")
    with pytest.raises(EngineError, match=r"no output pixel; it has"):
        OpenVinoEngine(path, outputs=["pixel"])
    with pytest.raises(EngineError, match=r"decoder_first.onnx: takes latents, not latent$"):
        OpenVinoEngine(path).run({"latent": np.zeros((1, 32, 1, 2, 2), np.float32)})


def test_bf16_that_the_cpu_does_not_have_is_refused(bundle: Bundle) -> None:
    if computes_in_bf16():
        pytest.skip("this CPU computes in bf16")
    with pytest.raises(EngineError, match=r"doesn't compute in bf16, only FP32.*: use openvino"):
        Opener(bundle, provider=OPENVINO_BF16).open("denoiser")


@pytest.mark.parametrize(("graph", "output"), [("denoiser", "velocity"), ("decoder_first", "frames")])
def test_bf16_where_the_cpu_has_it_is_near_to_fp32(bundle: Bundle, graph: GraphName, output: str) -> None:
    if not computes_in_bf16():
        pytest.skip("this CPU doesn't compute in bf16")
    (exact,), (rounded,) = (Opener(bundle, provider=name).open(graph) for name in (CPU, OPENVINO_BF16))
    fed = feeds(bundle, graph)
    wanted, made = (engine.run(fed)[output].astype(np.float64) for engine in (exact, rounded))
    assert 0 < np.abs(made - wanted).mean() < 0.03 * np.abs(wanted).mean()


def test_the_fastest_on_a_cpu_is_bf16_where_it_has_that_and_openvino_is_installed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_it = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert provider_here(FASTEST) == (OPENVINO_BF16 if has_it else CPU)
    (engine,) = Opener(bundle, provider=FASTEST).open("denoiser")
    assert isinstance(engine, OpenVinoEngine if has_it else OnnxRuntimeEngine)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert provider_here(FASTEST) == CPU
    (engine,) = Opener(bundle, provider=FASTEST).open("denoiser")
    assert isinstance(engine, OnnxRuntimeEngine)


def test_without_openvino_it_says_what_to_install(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"openvino is not installed: pip install 'rushes\[openvino\]'"):
        Opener(bundle, provider="openvino").open("denoiser")
