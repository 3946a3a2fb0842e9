"""Native TensorRT behind the engine protocol: a plan, over torch's CUDA tensors.

Knows nothing of models. Serving reaches it through `serving.engines.opening` and nowhere else, so that neither torch
nor TensorRT is imported where no plan is run. `tensorrt` 10.1 and later, 11, and `tensorrt_rtx` have the same API here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from models.plans import Profile, Range, fitting_profile, open_log
from serving.engines.cuda import Cuda, SharedMemory
from serving.engines.engine import Array, Arrays, EngineError, Inputs, check_feeds, chosen_outputs

_DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
# Shapes that have been seen once, and so are captured when they come again.
_REMEMBERED = 256

_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """A CUDA graph with the buffers that it reads and writes, and the context that must live as long as it."""

    context: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    replay: Callable[[], None]
    generation: int


class TensorRTEngine:
    """One plan on one GPU.

    `outputs` names the outputs to return; all of them when left out. `kept` of those stay on the device, as tensors
    that the next call takes where they are: a cache goes from one call's output to the next one's input without a copy,
    and the buffer before it becomes the next output, so two are in use. `memory` is shared with engines that never run
    at the same time. `graphs` is how many input shapes are captured as CUDA graphs, each when it comes a second time,
    the least recently used out first; what can't be captured runs without.

    Raises `EngineError` in one line.
    """

    def __init__(
        self,
        plan: Path,
        runtime: ModuleType,
        cuda: Cuda,
        *,
        name: str | None = None,
        outputs: Sequence[str] | None = None,
        kept: Sequence[str] = (),
        memory: SharedMemory | None = None,
        graphs: int = 0,
    ) -> None:
        self._name = name or plan.name
        self._trt, self._cuda = runtime, cuda
        self._log = open_log(runtime)
        self._runtime = runtime.Runtime(self._log)  # must outlive the engine
        self._engine = self._load(plan)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        described = {name: self._describe(name) for name in names}
        self._inputs = {name: described[name] for name in names if modes[name] == runtime.TensorIOMode.INPUT}
        self._all = {name: described[name][0] for name in names if modes[name] == runtime.TensorIOMode.OUTPUT}
        self._outputs = chosen_outputs(self._name, list(self._all), outputs)
        self._kept = frozenset(kept)
        self._profiles = tuple(self._profile(index) for index in range(self._engine.num_optimization_profiles))
        self._stream_weights()
        self._memory = memory or SharedMemory()
        self._memory.reserve(self._engine.device_memory_size_v2)
        self._context, self._selected = self._new_context(), -1
        self._max_graphs = graphs
        self._graphs: OrderedDict[_Shapes, _Captured] = OrderedDict()
        # What came once; False: it can't be captured.
        self._seen: OrderedDict[_Shapes, bool] = OrderedDict()

    @property
    def inputs(self) -> Inputs:
        return self._inputs

    @property
    def outputs(self) -> Sequence[str]:
        return self._outputs

    @property
    def arrays(self) -> Arrays:
        """Where state for this engine is made."""
        return self._cuda

    @property
    def captured(self) -> int:
        """How many CUDA graphs there are."""
        return len(self._graphs)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name: arrays, but for the kept ones, which are this engine's tensors. Raises `EngineError`."""
        check_feeds(self._name, self._inputs, feeds, self._cuda.dtype_of)
        shapes = {name: tuple(feed.shape) for name, feed in feeds.items()}
        profile = fitting_profile(self._profiles, shapes)
        if profile is None:
            raise EngineError(
                f"{self._name}: the plan has no profile for {shapes}: build one with `rushes export tensorrt --size`"
            )
        with self._memory.turn:
            try:
                with self._cuda.work():
                    held = {name: self._cuda.tensor(feed) for name, feed in feeds.items()}
                    outputs = self._replayed(held, profile) or self._direct(held, profile)
                    return {
                        name: outputs[name] if name in self._kept else self._cuda.array(outputs[name])
                        for name in self._outputs
                    }
            except RuntimeError as error:  # torch's own: out of memory, a failed kernel
                if isinstance(error, EngineError):
                    raise
                raise EngineError(f"{self._name}: failed on {shapes}: {' '.join(str(error).split())}") from error

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Change weights, by their names in the ONNX graph, between calls. Raises `EngineError`, and then the engine is
        as it was if the names or shapes were wrong; if TensorRT itself failed, it must not be used any more.
        """
        if not self._engine.refittable:
            raise EngineError(f"{self._name}: can't be refitted: build the plan with `rushes export tensorrt --refit`")
        with self._memory.turn:
            refitter = self._trt.Refitter(self._engine, self._log)
            if unknown := sorted(weights.keys() - set(refitter.get_all_weights())):
                raise EngineError(f"{self._name}: has no weights {', '.join(unknown)}")
            held = {name: np.ascontiguousarray(value) for name, value in weights.items()}
            for name, value in held.items():
                if not refitter.set_named_weights(name, self._trt.Weights(value.reshape(-1))):
                    raise EngineError(f"{self._name}: takes no {value.dtype} {list(value.shape)} as {name}")
            if missing := refitter.get_missing_weights():
                raise EngineError(f"{self._name}: weights that belong together are missing: {', '.join(missing)}")
            self._cuda.synchronize()
            # Captured kernels may read weights at addresses that a refit moves.
            self._graphs.clear()
            if not refitter.refit_cuda_engine():
                raise EngineError(f"{self._name}: was not refitted: {self._log.last}")

    def _direct(self, held: Mapping[str, Any], profile: int) -> dict[str, Any]:
        if profile != self._selected:
            self._selected = -1
            self._select(self._context, profile)
            self._selected = profile
        outputs = self._bind(self._context, held)
        self._execute(self._context)
        return outputs

    def _replayed(self, held: Mapping[str, Any], profile: int) -> dict[str, Any] | None:
        """By a CUDA graph, where there is one or can be; None: run it directly."""
        if not self._max_graphs:
            return None
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(held.items()))
        captured = self._graphs.get(shapes)
        if captured is None or captured.generation != self._memory.generation:
            captured = self._capture(shapes, held, profile)
        if captured is None:
            return None
        self._graphs.move_to_end(shapes)
        for name, tensor in held.items():
            captured.inputs[name].copy_(tensor)
        captured.replay()
        # The next replay overwrites the buffers; what isn't kept has been copied to the host by then.
        return {name: value.clone() if name in self._kept else value for name, value in captured.outputs.items()}

    def _capture(self, shapes: _Shapes, held: Mapping[str, Any], profile: int) -> _Captured | None:
        self._graphs.pop(shapes, None)
        if shapes not in self._seen:
            self._seen[shapes] = True
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
            return None
        if not self._seen[shapes]:
            return None
        # A context of its own: a captured graph goes with the shapes and the profile that its context had.
        context = self._new_context()
        self._select(context, profile)
        inputs = {name: tensor.clone() for name, tensor in held.items()}
        outputs = self._bind(context, inputs)
        # TensorRT does the work that a change of shapes makes in the first call, which can't be captured.
        self._execute(context)
        self._cuda.synchronize()
        replay = self._cuda.capture(lambda: bool(context.execute_async_v3(self._cuda.stream)))
        if replay is None:
            self._seen[shapes] = False
            return None
        captured = _Captured(context, inputs, outputs, replay, self._memory.generation)
        self._graphs[shapes] = captured
        if len(self._graphs) > self._max_graphs:
            self._graphs.popitem(last=False)
        return captured

    def _bind(self, context: Any, held: Mapping[str, Any]) -> dict[str, Any]:
        """Shapes and addresses of everything; returns the outputs' tensors, still empty."""
        for name, tensor in held.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(f"{self._name}: refuses {name} {list(tensor.shape)}: {self._log.last}")
            context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for name, dtype in self._all.items():
            shape = tuple(context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise EngineError(f"{self._name}: the shape of {name} depends on data: {list(shape)}")
            outputs[name] = self._cuda.empty(shape, dtype)
            context.set_tensor_address(name, outputs[name].data_ptr())
        # Every time: an engine that shares it may have made it grow, which moves it.
        if size := self._memory.bytes:
            context.set_device_memory(self._memory.address(self._cuda), size)
        return outputs

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._cuda.stream):
            raise EngineError(f"{self._name}: did not run: {self._log.last}")

    def _select(self, context: Any, profile: int) -> None:
        if not context.set_optimization_profile_async(profile, self._cuda.stream):
            raise EngineError(f"{self._name}: profile {profile} can't be selected: {self._log.last}")
        self._cuda.synchronize()

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError(f"{self._name}: no execution context could be made: {self._log.last}")
        return context

    def _load(self, plan: Path) -> Any:
        try:
            engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        except (OSError, RuntimeError) as error:
            raise EngineError(f"{self._name}: can't be read: {' '.join(str(error).split())}") from error
        if engine is None:
            raise EngineError(
                f"{self._name}: {self._trt.__name__} {self._trt.__version__} does not load the plan: {self._log.last}; "
                "build it again with `rushes export tensorrt`"
            )
        return engine

    def _describe(self, name: str) -> tuple[np.dtype[Any], tuple[int | str, ...]]:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise EngineError(f"{self._name}: {name} is of a type that no tensor here has: {kind}")
        shape = tuple(size if size >= 0 else "?" for size in self._engine.get_tensor_shape(name))
        return np.dtype(_DTYPES[kind]), shape

    def _profile(self, index: int) -> Profile:
        def ends(name: str) -> Range:
            least, usual, most = (tuple(dims) for dims in self._engine.get_tensor_profile_shape(name, index))
            return least, usual, most

        dynamic = [name for name, (_, shape) in self._inputs.items() if any(isinstance(size, str) for size in shape)]
        return {name: ends(name) for name in dynamic}

    def _stream_weights(self) -> None:
        """A plan with weights that may stay on the host: as many on the device as it has room for. Before contexts."""
        if self._engine.streamable_weights_size:
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
