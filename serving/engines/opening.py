"""A bundle's graph as an engine on the provider that the configuration names, checked against the manifest."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from models.bundle import Bundle, GraphName
from models.plans import PLANS, PlanError, RuntimeName, find_plan, gpu_name, graph_digest
from serving.engines.engine import Engine, EngineError
from serving.engines.onnx_runtime import CPU, OnnxRuntimeEngine
from serving.engines.openvino import OPENVINO, OPENVINO_BF16, OpenVinoEngine

if TYPE_CHECKING:
    from serving.engines.cuda import Cuda, SharedMemory

# Providers that run plans; all others are ONNX Runtime's.
NATIVE: tuple[RuntimeName, ...] = ("tensorrt", "tensorrt_rtx")
# Input shapes captured by each engine: two sizes, four batches.
_GRAPHS = 8
_STATE = ("cache_", "next_cache_", "chunk_cache")


@dataclass(frozen=True, slots=True)
class Opener:
    """Opens one stage's engines.

    `provider` is one of ONNX Runtime's execution providers, `openvino` or `openvino_bf16`, `tensorrt` or
    `tensorrt_rtx`; `plans` is where the last two find their plans, and ONNX Runtime's TensorRT keeps its own; by
    default the bundle's directory `plans`.
    """

    bundle: Bundle
    threads: int = 1
    provider: str = CPU
    plans: Path | None = None

    def open(self, *graphs: GraphName) -> list[Engine]:
        """These graphs, which never run at the same time: on a GPU they share the memory for activations.

        Raises `EngineError`, also for a graph that isn't what the manifest says.
        """
        if self.provider not in NATIVE:
            return [self._checked(name, self._onnx(name)) for name in graphs]
        from serving.engines.cuda import Cuda, SharedMemory

        runtime, cuda, memory = self._runtime(graphs[0]), Cuda(), SharedMemory()
        return [self._checked(name, self._native(name, runtime, cuda, memory)) for name in graphs]

    @property
    def _cache(self) -> Path:
        return self.plans or self.bundle.root / PLANS

    def _wanted(self, graph: GraphName) -> list[str]:
        """`pixels` is there to measure parity with; nothing that is served is made of it."""
        return [output.name for output in self.bundle.manifest.graphs[graph].outputs if output.name != "pixels"]

    def _onnx(self, graph: GraphName) -> Engine:
        if self.provider in (OPENVINO, OPENVINO_BF16):
            return OpenVinoEngine(
                self.bundle.path_of(graph),
                threads=self.threads,
                precision="bf16" if self.provider == OPENVINO_BF16 else "f32",
                outputs=self._wanted(graph),
            )
        return OnnxRuntimeEngine(
            self.bundle.path_of(graph),
            threads=self.threads,
            provider=self.provider,
            outputs=self._wanted(graph),
            context_dir=self._cache / graph_digest(self.bundle, graph)[:32],
        )

    def _runtime(self, graph: GraphName) -> ModuleType:
        try:
            return importlib.import_module(self.provider)
        except (ImportError, OSError) as error:  # OSError: its libraries aren't there
            wanted = "pip install 'rushes[tensorrt]'" if self.provider == "tensorrt" else "pip install tensorrt-rtx"
            raise EngineError(f"{graph}: {self.provider} can't be imported ({error}): {wanted}") from error

    def _native(self, graph: GraphName, runtime: ModuleType, cuda: Cuda, memory: SharedMemory) -> Engine:
        from serving.engines.tensorrt import TensorRTEngine

        name: RuntimeName = "tensorrt" if self.provider == "tensorrt" else "tensorrt_rtx"
        model, capability = cuda.name()
        # RTX plans are for a compute capability, and finished on the card itself.
        gpu = gpu_name(model, capability) if name == "tensorrt" else "sm{}{}".format(*capability)
        try:
            plan = find_plan(self._cache, graph, graph_digest(self.bundle, graph), name, str(runtime.__version__), gpu)
        except PlanError as error:
            raise EngineError(str(error)) from error
        outputs = self._wanted(graph)
        return TensorRTEngine(
            plan,
            runtime,
            cuda,
            name=graph,
            outputs=outputs,
            kept=[output for output in outputs if output.startswith(_STATE)],
            memory=memory,
            # Caches would be copied into the captured buffers and out again.
            graphs=0 if any(t.name.startswith("cache") for t in self.bundle.manifest.graphs[graph].inputs) else _GRAPHS,
        )

    def _checked(self, graph: GraphName, engine: Engine) -> Engine:
        info = self.bundle.manifest.graphs[graph]
        said = {tensor.name: (tensor.dtype, len(tensor.shape)) for tensor in info.inputs}
        there = {name: (dtype.name, len(shape)) for name, (dtype, shape) in engine.inputs.items()}
        fixed = [
            name
            for name, (_, shape) in engine.inputs.items()
            for want, have in zip(next((t.shape for t in info.inputs if t.name == name), ()), shape, strict=False)
            if isinstance(want, int) and want != have
        ]
        if said != there or fixed:
            raise EngineError(
                f"{info.file}: its inputs aren't those in the manifest of {self.bundle.root}: export the bundle again"
            )
        return engine
