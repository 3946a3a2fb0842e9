"""The tiny bundles, each exported once for each state of the exporter, beside the tests that need none yet.

Tracing a model's graphs takes a minute or two of one core. So the exports begin in processes of their own as soon as it
is known which bundles will be wanted, in that order, and the first test that wants one waits for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.bundle import MANIFEST, Bundle, GraphInfo

if TYPE_CHECKING:
    from export.checkpoint import Progress
    from export.onnx import WeightFile
    from models.graph import Graph

ROOT = Path(__file__).resolve().parent.parent
# Each of several workers (pytest-xdist) has one process for them, and every other worker begins at the other end.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
_AT_ONCE = 1 if _WORKER else 2
_BACKWARDS = _WORKER[-1:] in set("13579")
_LOOK_SECONDS = 0.2
# Of other bundles: graphs that are its own to the last byte, since modules and weights are the same. Tracing them is
# most of an export.
TRACED_IN = "tiny"
SAME: dict[str, frozenset[str]] = {
    "tiny_causal": frozenset({"text_encoder", "decoder_first", "decoder_next", "encoder_first", "encoder_next"}),
    "tiny_experts": frozenset({"text_encoder"}),
}


def build(name: str, path: Path) -> None:
    """Write the checkpoint `name`: the same weights every time."""
    import tiny

    builders: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "tiny": (tiny.build_tiny_checkpoint, {}),
        "tiny_causal": (tiny.build_tiny_checkpoint, {"causal": True}),
        "tiny_experts": (tiny.build_tiny_checkpoint, {"experts": True}),
        "tiny_ltx": (tiny.build_tiny_ltx, {}),
        "tiny_cogvideox": (tiny.build_tiny_cogvideox, {"newer": True}),
    }
    builder, options = builders[name]
    builder(path, **options)


def export(name: str, path: Path, traced: Path) -> None:
    """Export the checkpoint `name` to `path`, in a process of its own, unless another worker's does or has.

    `traced` is where the bundle of `TRACED_IN` is, if it is there yet.
    """
    import torch

    from export.checkpoint import export_checkpoint

    torch.set_num_threads(1)
    with path.with_suffix(".lock").open("w") as lock, tempfile.TemporaryDirectory() as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (path / MANIFEST).exists():
            build(name, Path(folder) / name)
            with _traced_before(SAME.get(name, frozenset()), traced):
                export_checkpoint(Path(folder) / name, path)


@contextmanager
def _traced_before(names: frozenset[str], traced: Path) -> Iterator[None]:
    """Graphs of these names are those that another bundle has, and are proven against the checkpoint all the same."""
    from export import checkpoint, parity

    traces = checkpoint._graph

    def copies(graph: Graph, weights: WeightFile, folder: Path, progress: Progress, verify: bool) -> GraphInfo:
        if graph.name not in names:
            return traces(graph, weights, folder, progress, verify)
        for file in (graph.file, graph.weights):
            shutil.copy(traced / file, folder / file)
        errors = parity.graph_errors(graph, parity.open_session(folder / graph.file))
        proven = {"parity": errors.largest, "mean_error": errors.mean}
        return bundle.manifest.graphs[graph.name].model_copy(update=proven)

    if names and (traced / MANIFEST).exists():
        bundle = Bundle.load(traced)
        checkpoint._graph = copies
    try:
        yield
    finally:
        checkpoint._graph = traces


class Exports:
    """Bundles in `folder`, kept from one run of the tests to the next."""

    def __init__(self, folder: Callable[[str], Path]) -> None:
        """`folder` gives the directory for a checkpoint's bundles."""
        self._folder, self._state = folder, state_of_the_exporter()
        self._pool: ProcessPoolExecutor | None = None
        self._running: dict[str, Future[None]] = {}

    def begin(self, names: Iterable[str]) -> None:
        """Export what of these isn't there."""
        for name in list(names)[:: -1 if _BACKWARDS else 1]:
            if name not in self._running and not (self._path(name) / MANIFEST).exists():
                if self._pool is None:
                    spawn = multiprocessing.get_context("spawn")
                    workers = min(_AT_ONCE, len(os.sched_getaffinity(0)))
                    self._pool = ProcessPoolExecutor(workers, mp_context=spawn)
                self._running[name] = self._pool.submit(export, name, self._path(name), self._path(TRACED_IN))

    def bundle(self, name: str) -> Bundle:
        self.begin([name])
        if name in self._running:
            # Another worker may have it first: what is there is whole.
            while not (self._path(name) / MANIFEST).exists() and not self._running[name].done():
                time.sleep(_LOOK_SECONDS)
            if self._running[name].done():
                self._running[name].result()
        return Bundle.load(self._path(name))

    def end(self) -> None:
        if self._pool is None:
            return
        if not all(future.done() for future in self._running.values()):  # interrupted: what runs takes minutes more
            for worker in list((self._pool._processes or {}).values()):
                worker.terminate()
        self._pool.shutdown(cancel_futures=True)

    def _path(self, name: str) -> Path:
        return self._folder(name) / self._state


def state_of_the_exporter() -> str:
    """A hash of everything that a bundle is made by."""
    digest = hashlib.sha256()
    sources = [path for folder in ("export", "models") for path in sorted((ROOT / folder).glob("*.py"))]
    # What only works on finished bundles.
    others = {"plans.py", "precision.py", "profiles.py", "tensorrt.py"}
    sources = [path for path in sources if path.name not in others]
    sources += [ROOT / "models" / "mini" / name for name in ("captioner.py", "rewriter.py", "words.py")]
    for path in [*sources, ROOT / "tests" / "tiny.py"]:
        digest.update(path.read_bytes())
    for library in ("torch", "diffusers", "transformers", "onnx"):
        digest.update(version(library).encode())
    return digest.hexdigest()[:16]
