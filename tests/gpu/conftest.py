"""`pytest -m gpu`, on a machine with an NVIDIA GPU and the `tensorrt` extra; elsewhere tests say what is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from export.tensorrt import Target, export_plans, open_target
from models.bundle import SERVED_GRAPHS, Bundle, GraphName


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no NVIDIA GPU on this machine")


@pytest.fixture(scope="session")
def tensorrt(gpu: None) -> ModuleType:
    try:
        return importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        pytest.skip(f"tensorrt can't be imported ({error}): pip install 'rushes[tensorrt]'")


@pytest.fixture(scope="session")
def target(tensorrt: ModuleType) -> Target:
    return open_target("tensorrt")


Plans = Callable[..., Path]


@pytest.fixture(scope="session")
def plans(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Plans:
    """The directory with a bundle's plans: built once for each bundle and set of flags."""
    made: dict[tuple[Any, ...], Path] = {}

    def of(bundle: Bundle, *flags: Any, graphs: tuple[GraphName, ...] = SERVED_GRAPHS) -> Path:
        key = (bundle.digest, flags, graphs)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("plans")
            sizes = [(64, 64), bundle.manifest.limits.default_size]
            export_plans(bundle, target, made[key], graphs=graphs, sizes=sizes, flags=flags)
        return made[key]

    return of


@pytest.fixture(params=["", "causal_", "experts_", "ltx_"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """Each of the tiny families."""
    tiny: Bundle = request.getfixturevalue(f"tiny_{request.param}bundle")
    return tiny
