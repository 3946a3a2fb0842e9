"""Fixtures for everyone: a tiny real checkpoint, and the bundle that `rushes export` makes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from postgres import Cluster, programs, running_cluster
from receiver import Receiver, receiving

from models.bundle import MANIFEST, Bundle

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import build_tiny_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    build_tiny_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(request: pytest.FixtureRequest) -> Bundle:
    return _exported(request, "tiny_checkpoint")


@pytest.fixture(scope="session")
def tiny_causal_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import build_tiny_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "tiny-causal"
    build_tiny_checkpoint(path, causal=True)
    return path


@pytest.fixture(scope="session")
def tiny_causal_bundle(request: pytest.FixtureRequest) -> Bundle:
    return _exported(request, "tiny_causal_checkpoint")


@pytest.fixture(scope="session")
def tiny_experts_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import build_tiny_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "tiny-experts"
    build_tiny_checkpoint(path, experts=True)
    return path


@pytest.fixture(scope="session")
def tiny_experts_bundle(request: pytest.FixtureRequest) -> Bundle:
    return _exported(request, "tiny_experts_checkpoint")


@pytest.fixture(scope="session")
def tiny_ltx_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import build_tiny_ltx

    path = tmp_path_factory.mktemp("checkpoint") / "tiny-ltx"
    build_tiny_ltx(path)
    return path


@pytest.fixture(scope="session")
def tiny_ltx_bundle(request: pytest.FixtureRequest) -> Bundle:
    return _exported(request, "tiny_ltx_checkpoint")


@pytest.fixture(scope="session")
def tiny_cogvideox_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import build_tiny_cogvideox

    path = tmp_path_factory.mktemp("checkpoint") / "tiny-cogvideox"
    build_tiny_cogvideox(path, newer=True)
    return path


@pytest.fixture(scope="session")
def tiny_cogvideox_bundle(request: pytest.FixtureRequest) -> Bundle:
    return _exported(request, "tiny_cogvideox_checkpoint")


def _exported(request: pytest.FixtureRequest, checkpoint: str) -> Bundle:
    """Exported once for each state of the exporter: pytest's cache keeps it, since tracing takes most of a minute."""
    path = request.config.cache.mkdir(f"{checkpoint}-bundle") / _state_of_the_exporter()  # type: ignore[union-attr]
    if not (path / MANIFEST).exists():
        from export.checkpoint import export_checkpoint

        export_checkpoint(request.getfixturevalue(checkpoint), path)
    return Bundle.load(path)


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Cluster]:
    found = programs()
    if found is None:
        pytest.skip("there is no PostgreSQL on this machine: install the `postgresql` package")
    with running_cluster(found) as cluster:
        yield cluster


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database at the newest schema; what uses it is tested on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'videos.db'}"
    cluster: Cluster = request.getfixturevalue("postgres_cluster")
    return cluster.cleared_database()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as opened:
        yield opened


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test that needs a bundle waits for its export, which takes minutes on a busy machine."""
    for item in items:
        if any(name.startswith("tiny_") and name.endswith("bundle") for name in getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.timeout(900))


def _state_of_the_exporter() -> str:
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
