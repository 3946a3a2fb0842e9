"""Clients that people have beside the Python SDK: the npm `openai` package, and LiteLLM's proxy in between."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from service import WholeService

from models.bundle import Bundle
from serving.deployments.local import free_port
from serving.pipeline.local import LocalPipeline

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

# The newest that runs on Node 20.
NPM_PACKAGE = "openai@6.49.0"
SCRIPT = Path(__file__).with_name("sdk.mjs")
# LiteLLM pins versions of much that the service uses: it is looked for in another environment.
LITELLM_PYTHON = os.environ.get("RUSHES_LITELLM_PYTHON") or (sys.executable if find_spec("litellm") else None)
START_SECONDS = 180


@pytest.fixture
async def url(tiny_bundle: Bundle, tmp_path: Path) -> AsyncIterator[str]:
    async with (
        LocalPipeline.open(tiny_bundle) as pipeline,
        WholeService(tiny_bundle, pipeline, tmp_path).running() as client,
    ):
        yield str(client.base_url.join("/v1"))


async def output_of(*command: str, cwd: Path, **environment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


@pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="there is no Node on this machine")
async def test_the_npm_package(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "npm"
    folder.mkdir()
    failed, _, said = await output_of("npm", "install", "--no-audit", "--no-fund", NPM_PACKAGE, cwd=folder)
    if failed:
        pytest.skip(f"{NPM_PACKAGE} can't be installed: {said.strip().splitlines()[0]}")
    shutil.copy(SCRIPT, folder)
    failed, out, said = await output_of("node", SCRIPT.name, cwd=folder, RUSHES_URL=url)
    assert not failed, said
    assert json.loads(out) == {
        "status": "completed",
        "mp4": "ftyp",
        "thumbnail": "image/webp",
        "remixed": True,
        "listed": True,
        "deleted": True,
        "refused": [True, "size", "invalid_value"],
        "batch": ["completed", {"total": 1, "completed": 1, "failed": 0}],
        "answers": 1,
        "models": ["tiny", "sora-2"],
    }


@asynccontextmanager
async def litellm_proxy(url: str, folder: Path, key: str) -> AsyncIterator[str]:
    """The proxy's URL, for who has this key; it knows the service's model as `rushes`."""
    assert LITELLM_PYTHON is not None
    config = folder / "litellm.yaml"
    parameters = {"model": "openai/tiny", "api_base": url, "api_key": "unused"}
    # A list names no model, and LiteLLM 1.108 asks api.openai.com for it whatever the models' `api_base` is
    # (`OpenAIVideoConfig.get_complete_url`): it takes a path of its own.
    passed_on = [{"path": "/rushes/videos", "target": f"{url}/videos", "headers": {}}]
    settings = {
        "model_list": [{"model_name": "rushes", "litellm_params": parameters}],
        "general_settings": {"pass_through_endpoints": passed_on},
    }
    config.write_text(json.dumps(settings))
    port = free_port()
    command = [str(Path(LITELLM_PYTHON).with_name("litellm")), "--config", str(config), "--port", str(port)]
    environment = {"LITELLM_MASTER_KEY": key, "NO_PROXY": "*", "PYTHONPATH": ""}
    with (folder / "litellm.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, "--host", "127.0.0.1", cwd=folder, env=os.environ | environment, stdout=log, stderr=log
        )
        try:
            async with asyncio.timeout(START_SECONDS), httpx.AsyncClient(trust_env=False) as client:
                while True:
                    with suppress(httpx.TransportError):
                        if (await client.get(f"http://127.0.0.1:{port}/health/liveliness")).is_success:
                            break
                    assert process.returncode is None, (folder / "litellm.log").read_text()
                    await asyncio.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


@pytest.mark.skipif(LITELLM_PYTHON is None, reason="RUSHES_LITELLM_PYTHON names no Python with litellm[proxy]")
async def test_litellms_proxy_routes_to_the_service(url: str, tmp_path: Path) -> None:
    key = f"sk-{secrets.token_hex(32)}"
    async with (
        litellm_proxy(url, tmp_path, key) as proxy,
        openai.AsyncOpenAI(base_url=proxy, api_key=key) as sdk,
        openai.AsyncOpenAI(base_url=url, api_key="unused") as direct,
    ):
        asked: dict[str, Any] = {"size": "64x64", "seconds": "1", "extra_body": {"num_inference_steps": 2, "seed": 7}}
        video = await sdk.videos.create(prompt="a red ball", model="rushes", **asked)
        while video.status in ("queued", "in_progress"):
            await asyncio.sleep(0.05)
            video = await sdk.videos.retrieve(video.id)
        assert (video.status, video.seconds) == ("completed", "1")
        content = (await sdk.videos.download_content(video.id)).read()
        (made,) = [one.id async for one in direct.videos.list()]
        assert content == (await direct.videos.download_content(made)).read()
        listed = await sdk.get(proxy.removesuffix("/v1") + "/rushes/videos", cast_to=httpx.Response)
        assert [one["id"] for one in listed.json()["data"]] == [made]
