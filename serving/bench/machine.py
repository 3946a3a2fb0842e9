"""What a figure was measured on: without that it says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_LIBRARIES = ("onnxruntime-gpu", "onnxruntime", "openvino", "ray", "numpy", "av", "torch", "diffusers")
# What decides how fast matrices are multiplied on an x86 CPU.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Machine:
    """`cores` are those that this process may use; `flags` the vector instructions that matter here."""

    cpu: str
    flags: tuple[str, ...]
    cores: int
    memory_gib: float
    system: str
    python: str
    versions: dict[str, str]
    revision: str
    load: float


def this_machine() -> Machine:
    said = _read(_CPUINFO)
    memory = _field(_read(_MEMINFO), "MemTotal").split()
    known = set(_field(said, "flags").split())
    return Machine(
        cpu=_field(said, "model name") or platform.processor() or platform.machine(),
        flags=tuple(flag for flag in _FLAGS if flag in known),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=int(memory[0]) / (1 << 20) if memory else 0.0,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: found for name in _LIBRARIES if (found := _version(name)) is not None},
        revision=_revision(),
        load=os.getloadavg()[0],
    )


def rows(machine: Machine) -> list[tuple[str, str]]:
    """For a table."""
    return [
        ("CPU", f"{machine.cpu} ({', '.join(machine.flags) or 'no vector instructions known'})"),
        ("cores", str(machine.cores)),
        ("memory", f"{machine.memory_gib:.0f} GiB"),
        ("system", machine.system),
        ("Python", machine.python),
        ("libraries", ", ".join(f"{name} {found}" for name, found in machine.versions.items())),
        ("revision", machine.revision),
        ("load before the start", f"{machine.load:.2f}"),
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _revision() -> str:
    """Of the sources that run, with a word about what isn't committed; else the installed version."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root.resolve():
            return f"rushes {_version('rushes')}"
        changed = ", with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return f"rushes {_version('rushes')}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    """The first line's value that begins with this name."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""
