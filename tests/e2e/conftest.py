"""One Ray for all end-to-end tests: starting it takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from models.bundle import Bundle
from serving.config import ServiceConfig
from serving.deployments.local import LocalService, free_port, local_service
from serving.jobs.store import SqlVideoStore


@dataclass(frozen=True)
class RunningService:
    service: LocalService
    config: ServiceConfig
    store: SqlVideoStore

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.service.url, timeout=120)


@pytest.fixture(scope="session")
def running(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    config = ServiceConfig(
        models={"tiny": tiny_bundle.root}, data_dir=tmp_path_factory.mktemp("service"), port=free_port()
    )
    with local_service(config) as service:
        yield RunningService(service, config, SqlVideoStore(config.resolved_store_url))


@pytest.fixture
def client(running: RunningService) -> Iterator[httpx.Client]:
    with running.client() as opened:
        yield opened
