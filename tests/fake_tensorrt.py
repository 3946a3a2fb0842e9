"""A double of TensorRT's Python API, as thin as it can be: plans name ONNX files, and calls are recorded.

Executing reads inputs from the addresses that were set and writes outputs to theirs, by ONNX Runtime on the CPU. So
what an engine binds wrongly comes out wrong.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum, IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from export.shapes import size_of
from serving.engines.cuda import Cuda

STREAM = 7
_KINDS = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64", "tensor(uint8)": "UINT8"}
_TYPES = {"FLOAT": np.float32, "INT64": np.int64, "UINT8": np.uint8}


def write_plan(path: Path, graph: Path, profiles: Sequence[Mapping[str, Any]], **said: Any) -> Path:
    """`said`: memory (bytes), refittable, streamable (bytes), capturable."""
    path.write_text(json.dumps({"graph": str(graph), "profiles": profiles, **said}))
    return path


class FakeCuda(Cuda):
    """The CPU, with a stream that does everything at once."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.module: FakeTensorRT | None = None

    def name(self) -> tuple[str, tuple[int, int]]:
        return "Imagined GPU", (9, 0)

    @contextmanager
    def work(self) -> Iterator[None]:
        yield

    def synchronize(self) -> None:
        pass

    def capture(self, work: Callable[[], bool]) -> Callable[[], None] | None:
        assert self.module is not None
        self.module.capturing = captured = []
        done = work()
        self.module.capturing = None
        return captured[0] if done else None

    def _new_stream(self) -> Any:
        class Stream:
            cuda_stream = STREAM

        return Stream()


class FakeTensorRT(ModuleType):
    """Stands in for the module `tensorrt`; `calls` are (method, arguments)."""

    class ILogger:
        class Severity(IntEnum):
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2

        def __init__(self) -> None:
            pass

        def log(self, severity: Any, message: str) -> None:
            raise NotImplementedError

    class TensorIOMode(Enum):
        INPUT = 1
        OUTPUT = 2

    class ExecutionContextAllocationStrategy(Enum):
        STATIC = 0
        USER_MANAGED = 2

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__("tensorrt")
        self.__version__ = "11.4.0"
        self.calls: list[tuple[Any, ...]] = []
        self.capturing: list[Callable[[], None]] | None = None
        cuda.module = self
        self.Runtime = lambda log: _Runtime(self, log)
        self.Refitter = lambda engine, log: _Refitter(self, engine)
        self.Weights = lambda array: array

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


class _Runtime:
    def __init__(self, module: FakeTensorRT, log: Any) -> None:
        self._module, self._log = module, log

    def deserialize_cuda_engine(self, data: bytes) -> _Engine | None:
        try:
            said = json.loads(data)
        except ValueError:
            self._log.log(FakeTensorRT.ILogger.Severity.ERROR, "magic tag\ndoes not match")
            return None
        return _Engine(self._module, said)


class _Kind:
    def __init__(self, name: str) -> None:
        self.name = name


class _Engine:
    def __init__(self, module: FakeTensorRT, said: Mapping[str, Any]) -> None:
        self.module, self.said = module, said
        self.model = onnx.load(said["graph"])
        self.load()
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(said["profiles"])
        self.device_memory_size_v2 = said.get("memory", 0)
        self.refittable = said.get("refittable", False)
        self.streamable_weights_size = said.get("streamable", 0)

    def load(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.model.SerializeToString(), options)
        self.inputs = {tensor.name: tensor for tensor in self.session.get_inputs()}
        self.outputs = {tensor.name: tensor for tensor in self.session.get_outputs()}
        self.tensors = self.inputs | self.outputs

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight_streaming_budget_v2":
            self.module.calls.append((name, value))
        super().__setattr__(name, value)

    def get_weight_streaming_automatic_budget(self) -> int:
        return int(self.streamable_weights_size // 2)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return FakeTensorRT.TensorIOMode.INPUT if name in self.inputs else FakeTensorRT.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> _Kind:
        return _Kind(_KINDS[self.tensors[name].type])

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1 if isinstance(dim, str) else dim for dim in self.tensors[name].shape]

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        shapes: list[list[int]] = self.said["profiles"][index].get(name) or [self.get_tensor_shape(name)] * 3
        return shapes

    def create_execution_context(self, strategy: Any) -> _Context:
        self.module.calls.append(("create_execution_context", strategy.name))
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine, self._calls = engine, engine.module.calls
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile = -1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._calls.append(("set_optimization_profile_async", index, stream))
        self._profile, self._shapes = index, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile >= 0, "no profile was selected"
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shapes[name] = shape
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._calls.append(("set_tensor_address", name, address))
        self._addresses[name] = address
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self._calls.append(("set_device_memory", address, size))

    def get_tensor_shape(self, name: str) -> list[int]:
        symbols: dict[str, int] = {}
        for given, shape in self._shapes.items():
            for dim, size in zip(self._engine.inputs[given].shape, shape, strict=True):
                if isinstance(dim, str):
                    match = re.fullmatch(r"(?:(\d+)\*)?(\w+)", dim)
                    assert match is not None
                    symbols[match[2]] = size // int(match[1] or 1)
        return [size_of(dim, symbols) for dim in self._engine.tensors[name].shape]

    def execute_async_v3(self, stream: int) -> bool:
        self._calls.append(("execute_async_v3", stream))
        assert self._addresses.keys() == self._engine.tensors.keys(), "not everything has an address"
        module, shapes, addresses = self._engine.module, dict(self._shapes), dict(self._addresses)
        if module.capturing is not None:
            if not self._engine.said.get("capturable", True):
                return False
            module.capturing.append(lambda: self._compute(shapes, addresses))
            return True
        self._compute(shapes, addresses)
        return True

    def _compute(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        engine = self._engine
        feeds = {
            name: _view(addresses[name], shape, _TYPES[engine.get_tensor_dtype(name).name])
            for name, shape in shapes.items()
        }
        names = list(engine.outputs)
        for name, value in zip(names, engine.session.run(names, feeds), strict=True):
            _view(addresses[name], value.shape, value.dtype)[...] = value


class _Refitter:
    def __init__(self, module: FakeTensorRT, engine: _Engine) -> None:
        self._module, self._engine = module, engine
        self._tensors = {tensor.name: tensor for tensor in engine.model.graph.initializer}

    def get_all_weights(self) -> list[str]:
        return list(self._tensors)

    def set_named_weights(self, name: str, weights: Any) -> bool:
        before = numpy_helper.to_array(self._tensors[name])
        if before.size != weights.size or before.dtype != weights.dtype:
            return False
        self._tensors[name].CopyFrom(numpy_helper.from_array(weights.reshape(before.shape), name))
        return True

    def get_missing_weights(self) -> list[str]:
        return []

    def refit_cuda_engine(self) -> bool:
        self._module.calls.append(("refit_cuda_engine",))
        self._engine.load()
        return True


def _view(address: int, shape: Sequence[int], dtype: Any) -> Any:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)
