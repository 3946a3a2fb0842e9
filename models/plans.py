"""The engine cache: TensorRT plans in a directory, each under a key that changes with whatever it was built from.

A plan only fits the TensorRT version and the GPU it was built with. So beside each `KEY.plan` lies a `KEY.json` that
says what it is; `export` writes both, serving looks through the records. A plan without its record doesn't count: the
record is written last, and each file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError

from models.bundle import Bundle, GraphName, sha256_of

# Where a bundle's plans are when nobody says otherwise.
PLANS = "plans"

RuntimeName = Literal["tensorrt", "tensorrt_rtx"]
Flag = Literal["refit", "weight_streaming", "tf32"]
# Of one input: its least, usual and largest shape.
Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Profile = dict[str, Range]


class PlanError(ValueError):
    """There is no plan to run, or it can't be used. One line: what is wrong, and what to do about it."""


class MissingPlanError(PlanError):
    """There is none yet."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlanBasis(_Strict):
    """All that a plan depends on."""

    graph: GraphName
    graph_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="See `graph_digest`.")
    runtime: RuntimeName
    version: str = Field(description="TensorRT's own.")
    gpu: str = Field(description="See `gpu_name`.")
    profiles: tuple[Profile, ...]
    flags: tuple[Flag, ...] = ()

    @property
    def key(self) -> str:
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class PlanInfo(_Strict):
    """`KEY.json`: what a plan was built from, and what came of it."""

    format: Literal[1] = 1
    basis: PlanBasis
    bundle: str = Field(description="The name of the bundle's model.")
    bytes: PositiveInt
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    seconds: NonNegativeFloat = Field(description="How long building took.")


def graph_digest(bundle: Bundle, graph: GraphName) -> str:
    """The sha256 of a graph with its weights, from the manifest's own figures.

    A graph names its weight files as plain text, so those are the bundle's files whose name occurs in it.
    """
    files, data = bundle.manifest.files, bundle.path_of(graph).read_bytes()
    name = bundle.manifest.graphs[graph].file
    parts = [name, *sorted(other for other in files if other != name and other.encode() in data)]
    return hashlib.sha256("\n".join(files[part].sha256 for part in parts).encode()).hexdigest()


def gpu_name(name: str, capability: tuple[int, int]) -> str:
    """What a native plan is tied to: such as `NVIDIA H100 80GB HBM3, sm90`."""
    return f"{name}, sm{capability[0]}{capability[1]}"


def find_plan(cache: Path, graph: GraphName, digest: str, runtime: RuntimeName, version: str, gpu: str) -> Path:
    """The newest plan of this graph for this TensorRT and GPU, its size and sha256 checked. Raises `PlanError`."""
    path, info = newest_plan(cache, graph, digest, runtime, version, gpu)
    if path.stat().st_size != info.bytes or sha256_of(path) != info.sha256:
        raise PlanError(f"The plan {path} is not what its record says: delete it and build it again.")
    return path


def newest_plan(
    cache: Path, graph: GraphName, digest: str, runtime: RuntimeName, version: str, gpu: str
) -> tuple[Path, PlanInfo]:
    """As `find_plan`, but not checked, which would read all of it. Raises `MissingPlanError`."""
    of_graph = [(path, info) for path, info in _records(cache) if info.basis.graph_sha256 == digest]
    fitting = [
        (path, info)
        for path, info in of_graph
        if (info.basis.runtime, info.basis.version, info.basis.gpu) == (runtime, version, gpu)
    ]
    if not fitting:
        others = sorted({f"{i.basis.runtime} {i.basis.version} on {i.basis.gpu}" for _, i in of_graph})
        there = f", only for {'; '.join(others)}" if others else ""
        raise MissingPlanError(
            f"There is no plan of the {graph} for {runtime} {version} on {gpu} in {cache}{there}: "
            "make one with `rushes export tensorrt BUNDLE`."
        )
    return max(fitting, key=lambda found: found[0].stat().st_mtime)


def store_plan(cache: Path, info: PlanInfo, plan: bytes) -> Path:
    """Put a plan and its record into the cache; returns the plan's path."""
    path = cache / f"{info.basis.key}.plan"
    write_whole(path, plan)
    write_whole(path.with_suffix(".json"), (info.model_dump_json(indent=1) + "\n").encode())
    return path


def stored_plan(cache: Path, basis: PlanBasis) -> Path | None:
    """The plan that was built from exactly this, if it is there."""
    path = cache / f"{basis.key}.plan"
    return path if path.is_file() and path.with_suffix(".json").is_file() else None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that others see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".partial", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def fitting_profile(profiles: tuple[Profile, ...], shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The first profile that takes these input shapes; an input that a profile doesn't name has no dynamic size."""

    def fits(shape: tuple[int, ...], ends: Range) -> bool:
        least, _, most = ends
        return len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        )

    for index, profile in enumerate(profiles):
        if all(fits(shape, profile[name]) for name, shape in shapes.items() if name in profile):
            return index
    return None


def _records(cache: Path) -> Iterator[tuple[Path, PlanInfo]]:
    """Every plan with a readable record; what another version wrote is not ours to read."""
    for path in sorted(cache.glob("*.json")):
        plan = path.with_suffix(".plan")
        try:
            info = PlanInfo.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        if plan.is_file():
            yield plan, info


def open_log(runtime: ModuleType) -> Any:
    """A logger for TensorRT that keeps the `last` error: its calls only say that there was one."""

    class Log(runtime.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.last = "no reason was given"

        def log(self, severity: Any, message: str) -> None:
            if severity in (runtime.ILogger.Severity.ERROR, runtime.ILogger.Severity.INTERNAL_ERROR):
                self.last = " ".join(message.split())

    return Log()
