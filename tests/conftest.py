"""Fixtures for everyone: tiny real checkpoints, and the bundles that `rushes export` makes of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from exports import Exports, build
from postgres import Cluster, programs, running_cluster
from receiver import Receiver, receiving
from unfinished import Unfinished

from models.bundle import Bundle

if TYPE_CHECKING:
    import httpx
    from service import Service
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

    from serving.pipeline.local import LocalPipeline
    from serving.pipeline.stages import VideoSpec

_EXPORTS: pytest.StashKey[Exports] = pytest.StashKey()


def _checkpoint(factory: pytest.TempPathFactory, name: str) -> Path:
    path = factory.mktemp("checkpoint") / name
    build(name, path)
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory, "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(request: pytest.FixtureRequest) -> Bundle:
    return request.config.stash[_EXPORTS].bundle("tiny")


@pytest.fixture(scope="session")
def tiny_causal_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory, "tiny_causal")


@pytest.fixture(scope="session")
def tiny_causal_bundle(request: pytest.FixtureRequest) -> Bundle:
    return request.config.stash[_EXPORTS].bundle("tiny_causal")


@pytest.fixture(scope="session")
def tiny_experts_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory, "tiny_experts")


@pytest.fixture(scope="session")
def tiny_experts_bundle(request: pytest.FixtureRequest) -> Bundle:
    return request.config.stash[_EXPORTS].bundle("tiny_experts")


@pytest.fixture(scope="session")
def tiny_ltx_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory, "tiny_ltx")


@pytest.fixture(scope="session")
def tiny_ltx_bundle(request: pytest.FixtureRequest) -> Bundle:
    return request.config.stash[_EXPORTS].bundle("tiny_ltx")


@pytest.fixture(scope="session")
def tiny_cogvideox_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory, "tiny_cogvideox")


@pytest.fixture(scope="session")
def tiny_cogvideox_bundle(request: pytest.FixtureRequest) -> Bundle:
    return request.config.stash[_EXPORTS].bundle("tiny_cogvideox")


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
async def pipeline(tiny_bundle: Bundle) -> AsyncIterator[LocalPipeline]:
    """All stages of it in this process."""
    from pipelines import opened_pipeline

    async with opened_pipeline(tiny_bundle) as opened:
        yield opened


@pytest.fixture
def spec(tiny_bundle: Bundle) -> Callable[..., VideoSpec]:
    """`small_spec` of it, for `pipeline`."""
    from pipelines import small_spec

    return partial(small_spec, tiny_bundle)


@pytest.fixture
def service(tiny_bundle: Bundle, tmp_path: Path) -> Service:
    """The API over a store of its own, without anybody who makes videos."""
    from service import Service

    return Service(tiny_bundle, tmp_path)


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """In this process; as a server does, it answers an unexpected error instead of raising it into the test."""
    import httpx

    transport = httpx.ASGITransport(service.api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as opened:
        yield opened


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """Over a real socket, which hands a stream on while it is made."""
    from service import served

    async with served(service.api) as opened:
        yield opened


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as opened:
        yield opened


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Unfinished(), "unfinished")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    from processes import OneServiceAtATime

    if config.option.dist != "loadfile":
        return None
    made = OneServiceAtATime(config, log)
    config.pluginmanager.get_plugin("unfinished").watch(made)
    return made


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    cache = session.config.cache
    assert cache is not None
    exports = session.config.stash[_EXPORTS] = Exports(lambda name: cache.mkdir(f"{name}-bundle"))
    exports.begin(dict.fromkeys(name for item in session.items for name in _wanted(item)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if exports := session.config.stash.get(_EXPORTS, None):
        exports.end()


def _wanted(item: pytest.Item) -> list[str]:
    """The bundles that a test needs."""
    names = getattr(item, "fixturenames", ())
    return [name.removesuffix("_bundle") for name in names if name.startswith("tiny") and name.endswith("_bundle")]
