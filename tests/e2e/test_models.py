"""Models loaded, unloaded and rolled while the service runs: real Ray Serve, tiny bundles."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import pytest
from pipelines import as_stream, made_alone
from repeated import Repeated

from models.bundle import MANIFEST, Bundle, BundleError, sha256_of
from serving.client import Rushes
from serving.config import ConfigError, ServiceConfig
from serving.deployments.fleet import FleetError
from serving.deployments.local import LocalService, free_port, local_service

ASKED: dict[str, Any] = {"prompt": "a red ball moving left", "seconds": 1, "seed": 7, "num_inference_steps": 2}
LIVE: dict[str, Any] = {"size": "64x64", "num_inference_steps": 2}


def changed(bundle: Bundle, path: Path, **manifest: Any) -> Path:
    """A copy whose manifest says something else; its files are listed as they are."""
    shutil.copytree(bundle.root, path)
    said = json.loads((path / MANIFEST).read_bytes()) | manifest
    for name in said["files"]:
        said["files"][name] = {"sha256": sha256_of(path / name), "bytes": (path / name).stat().st_size}
    (path / MANIFEST).write_text(json.dumps(said))
    return path


@dataclass(frozen=True)
class Running:
    service: LocalService
    config: ServiceConfig

    def change(self, **models: Path) -> list[str]:
        return self.service.fleet.change(self.config.model_copy(update={"models": models}))

    def names(self) -> list[str]:
        return [model["id"] for model in httpx.get(f"{self.service.url}/v1/models").json()["data"]]

    def stream(self, **asked: Any) -> bytes:
        with httpx.stream(
            "POST", f"{self.service.url}/v1/videos", json=asked | {"stream": True}, timeout=120
        ) as response:
            data = response.read()
            assert response.status_code == 200, data
            return data


def replicas(app: str) -> set[str]:
    from ray.util import list_named_actors

    names = {str(actor["name"]) for actor in list_named_actors(all_namespaces=True)}
    return {name for name in names if name.startswith(f"SERVE_REPLICA::{app}")}


@pytest.fixture(scope="module")
def running(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    config = ServiceConfig(
        models={"kept": tiny_bundle.root, "rolled": tiny_bundle.root},
        data_dir=tmp_path_factory.mktemp("service"),
        port=free_port(),
    )
    with local_service(config) as service:
        yield Running(service, config)


def test_a_bad_bundle_is_refused_and_the_old_one_serves_on(
    running: Running, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    now = running.service.fleet.change
    names, served = running.names(), dict(running.service.fleet.served)
    flipped = changed(tiny_bundle, tmp_path / "flipped")
    data = bytearray((flipped / "denoiser.weights").read_bytes())
    data[1000] ^= 1
    (flipped / "denoiser.weights").write_bytes(data)
    with pytest.raises(BundleError, match=r"another sha256 .* copy or export it again"):
        running.change(**served | {"rolled": flipped})
    # Its hashes are right, but it is no graph: the new replica finds that, before any request does. The next test rolls
    # the same model again.
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle.root, broken)
    (broken / "denoiser.onnx").write_bytes(b"no graph")
    path = changed(Bundle.load(broken), tmp_path / "unloadable")
    with pytest.raises(FleetError, match=r"rolled can't be started, so nothing was changed: .*denoiser.onnx"):
        running.change(**served | {"rolled": path})
    many = {f"model-{index}": tiny_bundle.root for index in range(20)}
    with pytest.raises(FleetError, match=r"new replicas need 18 CPU beside those that run, and .* are free"):
        running.change(**served | many)
    with pytest.raises(ConfigError, match=r"port can't be changed in a running service"):
        now(running.config.model_copy(update={"port": 1}))
    assert running.names() == names
    assert running.service.fleet.served == served
    assert running.stream(**ASKED, model="kept") == as_stream(made_alone(tiny_bundle, ASKED))
    assert running.stream(**ASKED, model="rolled") == as_stream(made_alone(Bundle.load(served["rolled"]), ASKED))


@pytest.mark.slow
def test_models_come_go_and_change_under_running_videos(
    running: Running, tiny_bundle: Bundle, tiny_causal_bundle: Bundle, tmp_path: Path
) -> None:
    sampler = tiny_bundle.manifest.sampler.model_copy(update={"shift": 9.0}).model_dump(exclude_none=True)
    new = changed(tiny_bundle, tmp_path / "new", sampler=sampler)
    untouched = replicas("rushes-model-kept")
    assert len(untouched) == 3
    # Long enough to be in the denoiser when its model is rolled, and to need the old decoder after that.
    long = ASKED | {"seconds": 3, "num_inference_steps": 40, "model": "rolled"}
    streamed: list[bytes] = []
    watching = threading.Thread(target=lambda: streamed.append(running.stream(**long)))
    watching.start()
    denoiser = running.service.fleet.stage("rolled", "denoiser")
    while not denoiser.sessions.remote().result():
        assert watching.is_alive()
    models = f"{running.service.url}/v1/models"
    with Repeated(lambda: httpx.get(models, timeout=60).raise_for_status()) as asked_for_models:
        said = running.change(kept=tiny_bundle.root, rolled=new, added=tiny_causal_bundle.root)
    watching.join()
    assert said == ["rolled rolled", "loaded added"]
    assert asked_for_models.results
    assert asked_for_models.errors == []
    asked = {key: value for key, value in long.items() if key != "model"}
    assert streamed == [as_stream(made_alone(tiny_bundle, asked))]
    assert running.names() == ["kept", "rolled", "added"]
    assert replicas("rushes-model-kept") == untouched
    assert len(replicas("rushes-model-rolled")) == 3
    before, after = (as_stream(made_alone(bundle, ASKED)) for bundle in (tiny_bundle, Bundle.load(new)))
    assert before != after
    assert running.stream(**ASKED, model="kept") == before
    assert running.stream(**ASKED, model="rolled") == after
    assert len(running.stream(prompt="a ball", seconds=1, model="added")) > 1000
    # A session stays with its model, in the replica of the API that has it, until that model goes.
    kept = {"kept": tiny_bundle.root, "rolled": new, "more": tiny_causal_bundle.root}
    with (
        Rushes(running.service.url) as rushes,
        rushes.realtime("a ball", model="added", **LIVE) as ending,
        ThreadPoolExecutor() as threads,
    ):
        chunks, indices = iter(ending), list[int]()
        adding = threads.submit(running.change, **kept, added=tiny_causal_bundle.root)
        while not adding.done():
            indices.append(next(chunks).index)
        assert adding.result() == ["loaded more"]
        with rushes.realtime("a ball", model="more", **LIVE) as staying:
            # And out again.
            unloading = threads.submit(running.change, **kept)
            indices += [chunk.index for chunk in chunks]
            assert indices == list(range(len(indices)))
            assert ending.end_reason == "model_unloaded"
            others = [chunk.index for chunk in takewhile(lambda _: not unloading.done(), staying)]
            assert unloading.result() == ["unloaded added"]
            assert others == list(range(len(others)))
            assert next(iter(staying)).index > len(others)
    assert running.names() == ["kept", "rolled", "more"]
    assert replicas("rushes-model-added") == set()
    refused = httpx.post(f"{running.service.url}/v1/videos", json=ASKED | {"model": "added"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")
    assert running.change(**kept) == []
