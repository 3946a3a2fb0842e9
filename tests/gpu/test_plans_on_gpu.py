"""Plans on a real GPU, against ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from parity_on_gpu import assert_close, feeds_of, symbols_of

from export.tensorrt import Target
from models.bundle import SERVED_GRAPHS, Bundle, GraphName
from models.plans import find_plan, graph_digest
from serving.engines.cuda import Cuda, SharedMemory
from serving.engines.engine import EngineError
from serving.engines.onnx_runtime import OnnxRuntimeEngine
from serving.engines.opening import Opener
from serving.engines.tensorrt import TensorRTEngine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def engine_of(bundle: Bundle, name: GraphName, cache: Path, target: Target, **options: Any) -> TensorRTEngine:
    plan = find_plan(cache, name, graph_digest(bundle, name), target.name, target.version, target.gpu)
    return TensorRTEngine(plan, target.runtime, options.pop("cuda", None) or Cuda(), name=name, **options)


def reference_of(bundle: Bundle, name: GraphName) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle.path_of(name), threads=2)


def test_every_graph_agrees_with_onnx_runtime(bundle: Bundle, target: Target, plans: Any) -> None:
    """A cache is random here, larger than any real one; so errors are relative to the largest value."""
    cache = plans(bundle)
    for name in SERVED_GRAPHS:
        if name not in bundle.manifest.graphs:
            continue
        engine, reference = engine_of(bundle, name, cache, target), reference_of(bundle, name)
        for seed, symbols in enumerate(symbols_of(bundle.manifest, name)):
            feeds = feeds_of(bundle.manifest.graphs[name], symbols, seed)
            wanted = reference.run(feeds)
            assert_close(engine.run(feeds), wanted)


def test_two_runs_are_the_same_bit_for_bit(tiny_bundle: Bundle, target: Target, plans: Any) -> None:
    engine = engine_of(tiny_bundle, "denoiser", plans(tiny_bundle), target)
    feeds = feeds_of(tiny_bundle.manifest.graphs["denoiser"], symbols_of(tiny_bundle.manifest, "denoiser")[1])
    np.testing.assert_array_equal(engine.run(feeds)["velocity"], engine.run(feeds)["velocity"])


def test_a_cache_goes_from_call_to_call_on_the_device(tiny_bundle: Bundle, target: Target, plans: Any) -> None:
    """Ping-pong: a session holds one set of buffers, a call works on two, and no further memory is ever taken."""
    cache = plans(tiny_bundle)
    opener = Opener(tiny_bundle, provider="tensorrt", plans=cache)
    engines = opener.open("decoder_first", "decoder_next")
    references = [reference_of(tiny_bundle, "decoder_first"), reference_of(tiny_bundle, "decoder_next")]
    rng = np.random.default_rng(1)
    states: list[dict[str, Any]] = [{}, {}]
    taken = []
    for chunk, frames in enumerate((1, 3, 2, 3, 3, 3, 3, 3)):
        latents = rng.standard_normal((1, 8, frames, 4, 4)).astype(np.float32)
        shown = []
        for which, pair in enumerate((engines, references)):
            outputs = pair[chunk > 0].run({"latents": latents, **states[which]})
            outputs.pop("pixels", None)
            shown.append({"frames": outputs.pop("frames")})
            states[which] = {"cache_" + name.split("cache_")[1]: value for name, value in outputs.items()}
        assert_close(shown[0], shown[1])
        assert_close(states[0], states[1])
        assert all(isinstance(value, torch.Tensor) and value.is_cuda for value in states[0].values())
        taken.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert taken[-1] == taken[-4]


def test_engines_share_their_scratch_memory(tiny_bundle: Bundle, target: Target, plans: Any) -> None:
    cache, cuda, memory = plans(tiny_bundle), Cuda(), SharedMemory()
    names: list[GraphName] = ["decoder_first", "denoiser"]
    engines = {name: engine_of(tiny_bundle, name, cache, target, cuda=cuda, memory=memory) for name in names}
    alone = {name: engine_of(tiny_bundle, name, cache, target) for name in names}
    calls = {
        name: feeds_of(tiny_bundle.manifest.graphs[name], symbols_of(tiny_bundle.manifest, name)[0]) for name in names
    }
    wanted = {name: alone[name].run(calls[name]) for name in names}
    for _ in range(3):
        for name in names:
            for output, value in engines[name].run(calls[name]).items():
                np.testing.assert_array_equal(value, wanted[name][output])


def test_cuda_graphs_replay_what_calls_compute(tiny_bundle: Bundle, target: Target, plans: Any) -> None:
    cache = plans(tiny_bundle)
    graph = tiny_bundle.manifest.graphs["denoiser"]
    symbols = symbols_of(tiny_bundle.manifest, "denoiser")
    engine = engine_of(tiny_bundle, "denoiser", cache, target, graphs=2, kept=["velocity"])
    plain = engine_of(tiny_bundle, "denoiser", cache, target)
    for round in range(4):
        kept = []
        for seed, sizes in enumerate(symbols[:2]):
            feeds = feeds_of(graph, sizes, 10 * round + seed)
            kept.append((engine.run(feeds)["velocity"], plain.run(feeds)["velocity"]))
        # Compared after the other shape's replay: a kept output is no view of a buffer that is written again.
        for got, wanted in kept:
            assert got.is_cuda
            np.testing.assert_array_equal(got.cpu().numpy(), wanted)
        assert engine.captured == (0 if round == 0 else 2)
    # A third shape: the least recently used graph goes.
    for _ in range(3):
        engine.run(feeds_of(graph, symbols[2]))
    assert engine.captured == 2


def test_cuda_graphs_outlive_a_move_of_the_shared_memory(tiny_bundle: Bundle, target: Target, plans: Any) -> None:
    memory = SharedMemory()
    engine = engine_of(tiny_bundle, "denoiser", plans(tiny_bundle), target, graphs=1, memory=memory)
    feeds = feeds_of(tiny_bundle.manifest.graphs["denoiser"], symbols_of(tiny_bundle.manifest, "denoiser")[1])
    before = [engine.run(feeds)["velocity"] for _ in range(3)]
    memory.reserve(memory.bytes + (64 << 20))
    for _ in range(3):
        np.testing.assert_array_equal(engine.run(feeds)["velocity"], before[-1])


def test_refitted_weights_are_as_good_as_built_ones(
    tiny_bundle: Bundle, target: Target, plans: Any, tmp_path: Path
) -> None:
    engine = engine_of(tiny_bundle, "denoiser", plans(tiny_bundle, "refit", graphs=("denoiser",)), target, graphs=1)
    feeds = feeds_of(tiny_bundle.manifest.graphs["denoiser"], symbols_of(tiny_bundle.manifest, "denoiser")[1])
    before = engine.run(feeds)["velocity"]
    model = onnx.load(tiny_bundle.path_of("denoiser"))
    (bias,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith("proj_out.bias")]
    changed = numpy_helper.to_array(bias) + np.float32(0.5)
    engine.refit({bias.name: changed})
    bias.CopyFrom(numpy_helper.from_array(changed, bias.name))
    onnx.save(model, tmp_path / "denoiser.onnx")
    wanted = OnnxRuntimeEngine(tmp_path / "denoiser.onnx").run(feeds)
    assert_close(engine.run(feeds), wanted)
    assert np.abs(wanted["velocity"] - before).max() > 0.4
    with pytest.raises(EngineError, match="has no weights nobody"):
        engine.refit({"nobody": changed})


def test_streamed_weights_give_the_same(tiny_bundle: Bundle, target: Target, plans: Any) -> None:
    streamed = engine_of(tiny_bundle, "denoiser", plans(tiny_bundle, "weight_streaming", graphs=("denoiser",)), target)
    feeds = feeds_of(tiny_bundle.manifest.graphs["denoiser"], symbols_of(tiny_bundle.manifest, "denoiser")[1])
    assert_close(streamed.run(feeds), reference_of(tiny_bundle, "denoiser").run(feeds))


def test_what_no_profile_takes_is_refused(tiny_bundle: Bundle, target: Target, plans: Any) -> None:
    engine = engine_of(tiny_bundle, "denoiser", plans(tiny_bundle), target)
    symbols = symbols_of(tiny_bundle.manifest, "denoiser")[0]
    graph = tiny_bundle.manifest.graphs["denoiser"]
    with pytest.raises(EngineError, match="no profile for"):
        engine.run(feeds_of(graph, symbols | {"batch": 9}))
    engine.run(feeds_of(graph, symbols))


def test_a_plan_of_another_version_is_refused_in_one_line(
    tiny_bundle: Bundle, target: Target, plans: Any, tmp_path: Path
) -> None:
    cache = plans(tiny_bundle)
    plan = find_plan(cache, "denoiser", graph_digest(tiny_bundle, "denoiser"), target.name, target.version, target.gpu)
    data = bytearray(plan.read_bytes())
    data[:64] = bytes(64)
    (tmp_path / "bad.plan").write_bytes(data)
    with pytest.raises(EngineError, match="build it again with `rushes export tensorrt`") as caught:
        TensorRTEngine(tmp_path / "bad.plan", target.runtime, Cuda())
    assert "\n" not in str(caught.value)
