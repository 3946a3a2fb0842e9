"""What a run leaves outside its folder while it goes on: few and small files, enough for a checkpoint."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import torch

# Curves, logs and statistics.
REST = "rest.tar"
_SUFFIXES = (".json", ".png", ".log")


class Keep:
    """Copies of `folder`'s averaged weights in fp16 (as checkpoints are stored) and of its small files, in `output`.

    Each file is replaced as a whole, so that one who is killed leaves the copy before.
    """

    def __init__(self, folder: Path, output: Path) -> None:
        self.folder, self.output = folder, output
        output.mkdir(parents=True, exist_ok=True)

    def weights(self, stage: str) -> None:
        averaged = torch.load(self.folder / f"{stage}-averaged.pt", weights_only=True)
        halved = {
            module: {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
            for module, state in averaged.items()
        }
        self._replace(f"{stage}-averaged.pt", lambda partial: torch.save(halved, partial))

    def rest(self) -> None:
        def write(partial: Path) -> None:
            with tarfile.open(partial, "w") as tar:
                for path in sorted(self.folder.iterdir()):
                    if path.suffix in _SUFFIXES:
                        tar.add(path, path.name)

        self._replace(REST, write)

    def _replace(self, name: str, write: Callable[[Path], None]) -> None:
        partial = self.output / "unfinished.partial"
        write(partial)
        partial.replace(self.output / name)


def read_kept(folder: Path, name: str) -> str:
    """A small file of a run, from its folder or from what was kept of it. Raises `FileNotFoundError`."""
    path = folder / name
    if path.exists() or not (folder / REST).exists():
        return path.read_text()
    with tarfile.open(folder / REST) as tar:
        if name not in tar.getnames():
            raise FileNotFoundError(f"{name} is neither in {folder} nor in its {REST}")
        found = tar.extractfile(name)
        assert found is not None
        return found.read().decode()
