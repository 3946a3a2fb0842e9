"""HLS as players read it: hls.js in a browser, ffmpeg, and the rules that Apple's players hold a playlist to."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Page, chromium, needs_chromium
from making import FPS, Making, queued
from service import Service

HLS_JS = "hls.js@1.7.4"
# Everything that it says at a level above information is kept, and so is every event of an error.
_PAGE = """<!doctype html><video muted></video><script src="/test/hls.js"></script><script>
const said = [], video = document.querySelector("video");
const keep = (...words) => said.push(words.join(" "));
const quiet = () => {};
const player = new Hls({
  startPosition: 0,
  debug: { trace: quiet, debug: quiet, log: quiet, info: quiet, warn: keep, error: keep },
});
player.on(Hls.Events.ERROR, (_, error) => said.push(`${error.details}${error.fatal ? " (fatal)" : ""}`));
player.loadSource(location.hash.slice(1));
player.attachMedia(video);
video.play();
window.said = said;
window.video = video;
window.player = player;
</script>"""
# The test keeps the next chunk back, so playback has to stand still; that is said of the video, not of the playlist.
_STOOD_STILL = re.compile(r"bufferStalled|[Ss]tall|nudge", re.ASCII)


@pytest.fixture
def client(http: httpx.AsyncClient) -> httpx.AsyncClient:
    return http


@pytest.fixture
async def making(service: Service, client: httpx.AsyncClient) -> Making:
    return await Making.begun(service, await queued(client))


@pytest.fixture(scope="module")
def hls_js(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The player, from the npm registry."""
    import subprocess

    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("there is no Node on this machine")
    folder = tmp_path_factory.mktemp("npm")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", HLS_JS]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"{HLS_JS} can't be installed: {done.stderr.strip()[-200:]}")
    return folder / "node_modules" / "hls.js" / "dist" / "hls.min.js"


async def opened(browser: Any, client: httpx.AsyncClient, hls_js: Path, video_id: str) -> Page:
    page = Page(await browser.new_page())
    await page.page.route("**/test/page", lambda route: route.fulfill(body=_PAGE, content_type="text/html"))
    await page.page.route("**/test/hls.js", lambda route: route.fulfill(path=hls_js, content_type="text/javascript"))
    await page.page.route("**/favicon.ico", lambda route: route.fulfill(status=204))
    await page.page.goto(f"{client.base_url}/test/page#/v1/videos/{video_id}/hls/master.m3u8")
    return page


async def said(page: Page) -> list[str]:
    return [line for line in await page.page.evaluate("said") if not _STOOD_STILL.search(line)]


@needs_chromium
async def test_hls_js_plays_the_live_and_the_finished_playlist(
    client: httpx.AsyncClient, making: Making, hls_js: Path
) -> None:
    buffered = "video.buffered.length && video.buffered.end(video.buffered.length - 1)"
    async with chromium() as browser:
        await making.show(0, 1)
        live = await opened(browser, client, hls_js, making.id)
        await live.until("video.currentTime > 0.3")
        assert await live.page.evaluate("player.levels[0].details.partList.length") == 2
        assert await live.page.evaluate("player.levels[0].details.canBlockReload")
        await making.show(2, 3)
        await live.until(f"{buffered} > 2.75")
        await making.complete()
        await live.until("player.levels[0].details.live === false")
        await live.until("video.ended")
        assert await live.page.evaluate("video.currentTime") == pytest.approx(45 / FPS, abs=0.05)
        finished = await opened(browser, client, hls_js, making.id)
        await finished.until("video.ended")
        assert await finished.page.evaluate("video.getVideoPlaybackQuality().totalVideoFrames") >= 44
        for page in (live, finished):
            assert await said(page) == []
            assert page.errors == []


async def probed(url: str) -> tuple[str, str]:
    """How many frames `ffprobe` decodes, and all that it has to say at the level of warnings."""
    command = ["-v", "warning", "-count_frames", "-show_entries", "stream=nb_read_frames,codec_name", "-of", "csv=p=0"]
    process = await asyncio.create_subprocess_exec(
        "ffprobe", *command, url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    return out.decode().strip().splitlines()[0], err.decode()


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="there is no ffprobe: install the `ffmpeg` package")
async def test_ffmpeg_reads_both_without_a_warning(client: httpx.AsyncClient, making: Making) -> None:
    url = str(client.base_url.join(f"/v1/videos/{making.id}/hls/master.m3u8"))
    await making.show(0, 1, 2)
    live = asyncio.create_task(probed(url))
    await making.show(3)
    await making.complete()
    assert await live == ("h264,45", "")
    assert await probed(url) == ("h264,45", "")
