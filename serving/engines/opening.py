"""A bundle's graph as an engine on the provider that the configuration names, checked against the manifest."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from models.bundle import Bundle, GraphName
from models.plans import (
    PLANS,
    MissingPlanError,
    PlanError,
    RuntimeName,
    find_plan,
    gpu_name,
    graph_digest,
    newest_plan,
)
from serving.engines.engine import Engine, EngineError
from serving.engines.moving import moving
from serving.engines.onnx_runtime import CPU, CUDA, OnnxRuntimeEngine
from serving.engines.openvino import OPENVINO, OPENVINO_BF16, OpenVinoEngine, computes_in_bf16

if TYPE_CHECKING:
    from serving.engines.cuda import Cuda, SharedMemory

# Providers that run plans; all others are ONNX Runtime's.
NATIVE: tuple[RuntimeName, ...] = ("tensorrt", "tensorrt_rtx")
# Whichever is the fastest on a replica's CPU.
FASTEST = "cpu"
# What runs the graphs until there are plans, and how often it is looked for those.
_MEANWHILE = CUDA
_LOOK_SECONDS = 10.0
# Input shapes captured by each engine: two sizes, four batches.
_GRAPHS = 8
_STATE = ("cache_", "next_cache_", "chunk_cache")

_log = logging.getLogger(__name__)


def provider_here(provider: str) -> str:
    """`cpu` as what it is on this machine. Videos differ in their last bits between the two."""
    if provider != FASTEST:
        return provider
    return OPENVINO_BF16 if computes_in_bf16() else CPU


@dataclass(frozen=True, slots=True)
class Opener:
    """Opens one stage's engines.

    `provider` is one of ONNX Runtime's execution providers, `openvino` or `openvino_bf16`, `cpu`, `tensorrt` or
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
            return [self._checked(name, self._onnx(name, self.provider)) for name in graphs]
        return self._plans(graphs).open()

    def start(self, *graphs: GraphName) -> Sequence[Engine]:
        """As `open`, for a stage that goes on: where plans are missing ONNX Runtime's CUDA runs the graphs until all of
        them are there, and moves to them then.

        Raises `EngineError`, also for a plan that is there and can't be used.
        """
        if self.provider not in NATIVE:
            return self.open(*graphs)
        plans = self._plans(graphs)
        missing = plans.missing()
        if missing is None:
            return plans.open()
        try:
            engines = [self._checked(name, self._onnx(name, _MEANWHILE)) for name in graphs]
        except EngineError as error:
            raise EngineError(f"{missing} Nor can {_MEANWHILE} stand in until then: {error}") from error
        _log.warning("%s %s runs the graphs until there are plans of all of them.", missing, _MEANWHILE)
        return moving(graphs[0], engines, plans, _LOOK_SECONDS)

    def _plans(self, graphs: Sequence[GraphName]) -> _Plans:
        from serving.engines.cuda import Cuda

        runtime, cuda = self._runtime(graphs[0]), Cuda()
        model, capability = cuda.name()
        name: RuntimeName = "tensorrt" if self.provider == "tensorrt" else "tensorrt_rtx"
        # RTX plans are for a compute capability, and finished on the card itself.
        gpu = gpu_name(model, capability) if name == "tensorrt" else "sm{}{}".format(*capability)
        wanted = [
            _Wanted(self._cache, graph, graph_digest(self.bundle, graph), name, str(runtime.__version__), gpu)
            for graph in graphs
        ]
        return _Plans(self, wanted, runtime, cuda)

    @property
    def _cache(self) -> Path:
        return self.plans or self.bundle.root / PLANS

    def _wanted(self, graph: GraphName) -> list[str]:
        """`pixels` is there to measure parity with; nothing that is served is made of it."""
        return [output.name for output in self.bundle.manifest.graphs[graph].outputs if output.name != "pixels"]

    def _onnx(self, graph: GraphName, provider: str) -> Engine:
        provider = provider_here(provider)
        if provider in (OPENVINO, OPENVINO_BF16):
            return OpenVinoEngine(
                self.bundle.path_of(graph),
                threads=self.threads,
                precision="bf16" if provider == OPENVINO_BF16 else "f32",
                outputs=self._wanted(graph),
            )
        return OnnxRuntimeEngine(
            self.bundle.path_of(graph),
            threads=self.threads,
            provider=provider,
            outputs=self._wanted(graph),
            context_dir=self._cache / graph_digest(self.bundle, graph)[:32],
        )

    def _runtime(self, graph: GraphName) -> ModuleType:
        try:
            return importlib.import_module(self.provider)
        except (ImportError, OSError) as error:  # OSError: its libraries aren't there
            wanted = "pip install 'rushes[tensorrt]'" if self.provider == "tensorrt" else "pip install tensorrt-rtx"
            raise EngineError(f"{graph}: {self.provider} can't be imported ({error}): {wanted}") from error

    def native(self, graph: GraphName, plan: Path, runtime: ModuleType, cuda: Cuda, memory: SharedMemory) -> Engine:
        """This plan. Raises `EngineError`."""
        from serving.engines.tensorrt import TensorRTEngine

        outputs = self._wanted(graph)
        engine = TensorRTEngine(
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
        return self._checked(graph, engine)

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


class _Wanted(NamedTuple):
    """A plan, as `find_plan` takes it."""

    cache: Path
    graph: GraphName
    digest: str
    runtime: RuntimeName
    version: str
    gpu: str


@dataclass(frozen=True, slots=True)
class _Plans:
    """The plans of graphs that never run at the same time; `Better` engines than those that run meanwhile."""

    opener: Opener
    wanted: Sequence[_Wanted]
    runtime: ModuleType
    cuda: Cuda

    def missing(self) -> str | None:
        """Which plan isn't there, and how to make it."""
        try:
            self._newest()
        except MissingPlanError as error:
            return str(error)
        return None

    def find(self) -> Hashable | None:
        try:
            files = [(path, path.stat()) for path in self._newest()]
        except MissingPlanError:
            return None
        return tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in files)

    def open(self) -> list[Engine]:
        from serving.engines.cuda import SharedMemory

        memory = SharedMemory()
        return [self._engine(wanted, memory) for wanted in self.wanted]

    def _newest(self) -> list[Path]:
        return [newest_plan(*wanted)[0] for wanted in self.wanted]

    def _engine(self, wanted: _Wanted, memory: SharedMemory) -> Engine:
        try:
            return self.opener.native(wanted.graph, find_plan(*wanted), self.runtime, self.cuda, memory)
        except PlanError as error:
            raise EngineError(str(error)) from error
