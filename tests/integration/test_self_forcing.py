"""A checkpoint in Self-Forcing's own layout becomes an engine, and the engine's rollout is a plain one in torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from self_forcing import CHUNKS, cached_rollout, original, plain_rollout
from tiny import CHANNELS, TEXT_DIM, tiny_transformer
from torch import Tensor

from export import parity
from export.onnx import WeightFile, export_graph
from export.settings import CheckpointSettings
from models.families import open_checkpoint
from models.wan_causal import CausalDenoiser
from models.window import ContextWindow
from serving.engines.onnx_runtime import OnnxRuntimeEngine

# Exporting takes most of a minute of a free core, and this machine may be busy.
pytestmark = pytest.mark.timeout(900)

TOLERANCE = 1e-4
# Self-Forcing's sliding window: no sinks, and five of the seven chunks push another one out.
WINDOW = ContextWindow(3, sink_chunks=0, window_chunks=2)


@torch.no_grad()
def test_the_engines_rollout_is_a_plain_one_with_the_full_mask(tiny_causal_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_causal_checkpoint, checkpoint)
    torch.manual_seed(8)
    trained = tiny_transformer(layers=2)
    torch.save({"generator_ema": original(trained, "model._fsdp_wrapped_module.")}, checkpoint / "self_forcing_dmd.pt")
    settings = json.loads((checkpoint / "rushes.json").read_text())
    settings["causal"] = {"weights": "self_forcing_dmd.pt", "sink_chunks": 0, "window_chunks": 2}
    (checkpoint / "rushes.json").write_text(json.dumps(settings))

    plan = CheckpointSettings.load(checkpoint).plan(checkpoint)
    assert plan.window == WINDOW
    graph = next(graph for graph in open_checkpoint(checkpoint, plan).graphs(plan) if graph.name == "denoiser")
    export_graph(graph, WeightFile(tmp_path / graph.weights))
    errors = parity.graph_errors(graph, parity.open_session(tmp_path / graph.file))
    assert max(errors.largest.values()) <= TOLERANCE

    engine = OnnxRuntimeEngine(tmp_path / graph.file)

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs = engine.run({name: value.numpy() for name, value in zip(graph.example, inputs, strict=True)})
        return torch.from_numpy(outputs["velocity"]), torch.from_numpy(outputs["chunk_cache"])

    text = torch.randn(2, 5, TEXT_DIM, generator=torch.Generator().manual_seed(3))
    expected = plain_rollout(trained, WINDOW, text)
    got = cached_rollout(CausalDenoiser(trained, WINDOW), text, call)
    assert got.shape == (2, CHANNELS, 3 * CHUNKS, 4, 4)
    assert (got - expected).abs().max() <= TOLERANCE
    assert expected.std() > 0.1
