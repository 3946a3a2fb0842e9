"""What TensorRT engines need of a GPU, through torch: tensors, a stream, CUDA graphs, and memory that engines share.

torch is imported when a `Cuda` is made and not before: a service without such engines doesn't have it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from serving.engines.engine import Array, EngineError

_INSTALL = "pip install 'rushes[tensorrt]', on a machine with an NVIDIA GPU"


class Cuda:
    """One device and one stream on it. All tensors of one engine are made here; also its `Arrays`.

    State is made, joined and assigned on the stream that is current outside of `work`. `device` is another one in tests
    alone, which have no GPU.
    """

    def __init__(self, device: str = "cuda") -> None:
        try:
            import torch
        except ImportError as error:
            raise EngineError(f"TensorRT engines need torch for their tensors: {_INSTALL}") from error
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError(f"TensorRT engines need a GPU, and torch {torch.__version__} sees none: {_INSTALL}")
        self._torch = torch
        self._device = torch.device(device)
        self._stream = self._new_stream()
        self._dtypes = {
            np.dtype(name): getattr(torch, name)
            for name in ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
        }
        self._names = {dtype: name for name, dtype in self._dtypes.items()}

    @property
    def stream(self) -> int:
        """The stream's handle. Not the default one, on which TensorRT would synchronise the whole device."""
        return int(self._stream.cuda_stream)

    def name(self) -> tuple[str, tuple[int, int]]:
        """The GPU's name and compute capability."""
        return self._torch.cuda.get_device_name(), self._torch.cuda.get_device_capability()

    def zeros(self, shape: Sequence[int]) -> Any:
        return self._torch.zeros(tuple(shape), dtype=self._torch.float32, device=self._device)

    def join(self, arrays: Sequence[Any]) -> Any:
        if isinstance(arrays[0], np.ndarray):
            return np.concatenate(arrays)
        return arrays[0] if len(arrays) == 1 else self._torch.cat(list(arrays))

    def own(self, array: Any) -> Any:
        return self.tensor(array)

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
        """Contiguous; its memory goes back to torch's allocator with the last reference, for the next call's tensor."""
        return self._torch.empty(tuple(shape), dtype=self._dtypes[dtype], device=self._device)

    def tensor(self, array: Any) -> Any:
        """What was fed, contiguous and on the device: copied only if it is neither."""
        if isinstance(array, np.ndarray):
            array = self._torch.from_numpy(np.ascontiguousarray(array))
        return array.to(self._device).contiguous()

    def array(self, tensor: Any) -> Array:
        """To the host. Waits for the stream."""
        host: Array = tensor.cpu().numpy()
        return host

    def dtype_of(self, array: Any) -> np.dtype[Any]:
        return array.dtype if isinstance(array, np.ndarray) else self._names[array.dtype]

    @contextmanager
    def work(self) -> Iterator[None]:
        """Inside, the stream is torch's current one, behind all that was enqueued before; after it, all is done.

        So whoever has an engine's tensors may use them on any stream, and free them at any time.
        """
        torch = self._torch
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self.synchronize()

    def synchronize(self) -> None:
        self._stream.synchronize()

    def capture(self, work: Callable[[], bool]) -> Callable[[], None] | None:
        """A CUDA graph of what `work` enqueues on the stream, or None when that can't be captured."""
        torch = self._torch
        graph = torch.cuda.CUDAGraph()
        done = False
        try:
            # thread_local: other engines' threads go on using the device meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                done = work()
        except RuntimeError:
            return None
        return graph.replay if done else None

    def _new_stream(self) -> Any:
        return self._torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # untyped in torch


class SharedMemory:
    """Scratch memory for the activations of several engines, which therefore take turns: `turn` is the lock.

    As large as the largest of them needs. It is allocated on first use, so that all of them have said their size.
    """

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self.generation = 0
        self._bytes = 0
        self._buffer: Any = None

    @property
    def bytes(self) -> int:
        return self._bytes

    def reserve(self, size: int) -> None:
        """Say what an engine needs. Growing moves the memory: CUDA graphs of an older `generation` are void."""
        with self.turn:
            if size > self._bytes:
                self._bytes, self._buffer = size, None
                self.generation += 1

    def address(self, cuda: Cuda) -> int:
        """Where it is, aligned as TensorRT wants it: torch's allocator gives multiples of 512 bytes."""
        if self._buffer is None:
            self._buffer = cuda.empty((max(self._bytes, 1),), np.dtype(np.uint8))
        return int(self._buffer.data_ptr())
