"""Where a bundle is made: beside its place, and moved there whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from export.onnx import ExportError
from models.bundle import MANIFEST


def check_place(output: Path) -> None:
    """Raises `ExportError` for a place that holds anything but a bundle."""
    if output.exists() and not (output / MANIFEST).is_file() and not _is_empty(output):
        raise ExportError(f"{output} exists and is no bundle: choose another place.")


@contextmanager
def replaced(output: Path) -> Iterator[Path]:
    """A directory to fill, which takes `output`'s place at the end of the block; if that raises, nothing changed."""
    check_place(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)
        _replace(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _replace(folder: Path, output: Path) -> None:
    """Put a finished bundle in place; an older one is moved aside first, since a directory can't be overwritten."""
    if not output.exists():
        folder.rename(output)
        return
    old = Path(mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
    output.rename(old / output.name)
    try:
        folder.rename(output)
    except BaseException:
        (old / output.name).rename(output)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
