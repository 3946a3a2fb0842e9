"""The page in a real browser: what it plays while a video is made, and how each of its views looks.

Set RUSHES_SCREENSHOTS to a directory to keep the pictures that are taken on the way.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from browser import Page, chromium, needs_chromium
from making import FPS, Making, made_fragments, queued
from service import Service, WholeService, until

from models.bundle import Bundle
from serving.media.fmp4 import Codec
from serving.media.previews import jpeg
from serving.pipeline.local import LocalPipeline

pytestmark = needs_chromium

_LOOKS = 20
SIZES = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
# Blue of the frame that is shown after a seek to `seconds`, in the middle of the picture. On a busy machine Chromium
# tells of the seek before it shows the frame.
_BLUE_AT = """async ([seconds]) => {
    const video = document.getElementById("player");
    await new Promise((done) => { video.onseeked = done; video.pause(); video.currentTime = seconds; });
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    const context = canvas.getContext("2d");
    context.drawImage(video, 0, 0);
    const pixels = context.getImageData(8, 8, 48, 48).data;
    let sum = 0;
    for (let at = 2; at < pixels.length; at += 4) sum += pixels[at];
    return sum / (pixels.length / 4);
}"""


@pytest.fixture
def client(http: httpx.AsyncClient) -> httpx.AsyncClient:
    return http


@pytest.fixture
async def browser() -> AsyncIterator[Any]:
    async with chromium() as started:
        yield started


class Viewer(Page):
    async def shows(self, frame: int) -> bool:
        """Whether a seek to a frame shows it before long: each frame's blue is its number's."""
        for _ in range(_LOOKS):
            blue: float = await self.page.evaluate(_BLUE_AT, [(frame + 0.5) / FPS])
            if abs(blue - 5 * frame) < 8:
                return True
        return False


async def opened(browser: Any, client: httpx.AsyncClient, place: str = "", size: str = "desktop") -> Viewer:
    page = Viewer(await browser.new_page(viewport=SIZES[size]))
    await page.page.goto(f"{client.base_url}/{place}")
    return page


async def picture(page: Page, folder: Path, name: str) -> None:
    kept = Path(os.environ.get("RUSHES_SCREENSHOTS", folder))
    shot = await page.page.screenshot(path=kept / f"{name}.png", full_page=True)
    assert len(shot) > 2000


BUFFERED = "document.getElementById('player').buffered.length && document.getElementById('player').buffered.end(0)"


async def test_a_video_plays_while_it_is_made_for_the_first_the_late_and_the_returning_viewer(
    service: Service, client: httpx.AsyncClient, browser: Any, tmp_path: Path
) -> None:
    making = await Making.begun(service, await queued(client))
    first = await opened(browser, client, f"#{making.id}")
    await making.show(0, 1)
    # Two chunks of four are there, and it plays.
    await first.until("document.getElementById('player').currentTime > 0.5")
    for frame in (0, 8, 9, 20):
        assert await first.shows(frame)
    for size in SIZES:
        await first.page.set_viewport_size(SIZES[size])
        await picture(first, tmp_path, f"watching-{size}")

    late = await opened(browser, client, f"#{making.id}")
    await late.until(f"{BUFFERED} > 1.3")
    assert await late.shows(20)
    await first.page.reload()
    await making.show(2)
    for viewer in (first, late):
        await viewer.until(f"{BUFFERED} > 2.0")
        assert await viewer.shows(32)
        # Events reach the page by another way than the bytes.
        await viewer.until("document.querySelectorAll('#lane-decode img').length === 3")

    # What isn't decoded yet can be seen too, until it is.
    await service.storage.previews.put(making.id, 3, jpeg(np.full((32, 32, 3), 128, np.uint8)))
    await late.until("document.querySelector('#lane-decode > img[data-coming=\"3\"]')?.naturalWidth === 32")
    await making.show(3)
    await making.complete()
    await late.until("document.getElementById('state').textContent === 'Finished'")
    await late.until(f"{BUFFERED} > 2.8")
    assert await late.shows(44)
    # Until the stream's end is here, which comes by another way than the state, nobody knows how long it is.
    await late.until(f"Math.abs(document.getElementById('player').duration - {45 / FPS}) < 0.01")
    assert late.errors == []
    assert await late.page.evaluate("document.querySelectorAll('#lane-decode button').length") == 4
    assert await late.page.evaluate("document.querySelector('[data-coming]')") is None


@pytest.mark.parametrize(("codec", "name"), [("av1", "av01.0.00M.08"), ("vp9", "vp09.00.10.08")])
async def test_other_codecs_play_too(
    service: Service, client: httpx.AsyncClient, browser: Any, codec: Codec, name: str
) -> None:
    making = await Making.begun(service, await queued(client, codec=codec))
    assert making.video.request["codec"] == codec
    making.fragments = made_fragments(codec)
    viewer = await opened(browser, client, f"#{making.id}")
    await making.show(0, 1)
    await viewer.until("document.getElementById('player').currentTime > 0.5")
    assert await viewer.shows(20)
    playlist = await client.get(f"/v1/videos/{making.id}/hls/master.m3u8")
    assert f'CODECS="{name}"' in playlist.text
    assert viewer.errors == []


async def test_asking_from_the_keyboard_alone(service: Service, client: httpx.AsyncClient, browser: Any) -> None:
    page = await opened(browser, client)
    await page.until("document.getElementById('model').options.length > 0")
    await page.page.locator("#prompt").focus()
    await page.page.keyboard.type("a red ball")
    await page.page.locator("#seconds").focus()
    await page.page.keyboard.type("1")
    await page.page.keyboard.press("Enter")
    await page.until("location.hash.startsWith('#video_')")
    await page.until("document.getElementById('state').textContent === 'In the queue'")
    assert service.created() == 1
    await page.page.locator("#cancel").press("Enter")
    await page.until("document.getElementById('state').textContent.startsWith('Failed')")


async def test_a_live_session_from_the_keyboard_alone(tiny_causal_bundle: Bundle, browser: Any, tmp_path: Path) -> None:
    async with LocalPipeline.open(tiny_causal_bundle) as pipeline:
        service = WholeService(tiny_causal_bundle, pipeline, tmp_path)
        async with service.running() as client:
            page = await opened(browser, client, "#live")
            await page.until("document.getElementById('live-model').value === 'tiny'")
            state = "document.getElementById('live-state').textContent"
            for field, typed in (("size", "64x64"), ("steps", "2"), ("prompt", "a red ball")):
                await page.page.locator(f"#live-{field}").focus()
                await page.page.keyboard.type(typed)
            await page.page.locator("#live-begin").press("Enter")
            await page.until("document.getElementById('live-player').currentTime > 0.5")
            await page.page.locator("#live-prompt").fill("a blue cube")
            await page.page.locator("#live-begin").press("Enter")
            prompts = "document.querySelectorAll('#live-prompts li')"
            await page.until(f"{prompts}.length === 2 && {prompts}[1].textContent.endsWith(': a blue cube')")
            await page.page.locator("#live-pause").press("Enter")
            await page.until(f"{state} === 'Paused' && document.getElementById('live-player').paused")
            await until(lambda: pipeline.denoiser.outstanding_tokens == 0)
            for size in SIZES:
                await page.page.set_viewport_size(SIZES[size])
                assert await page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                await picture(page, tmp_path, f"live-session-{size}")
            await page.page.locator("#live-pause").press("Enter")
            await page.until(f"{state}.endsWith(' s made')")
            await page.page.locator("#live-stop").press("Enter")
            await page.until(f"{state} === 'Ended. The client stopped it.'")
            # Going elsewhere ends it too.
            await page.page.locator("#live-begin").press("Enter")
            await page.until(f"{state}.endsWith(' s made')")
            await page.page.goto(f"{client.base_url}/#load")
            await until(lambda: pipeline.denoiser.sessions == 0 and pipeline.decoder.sessions == 0)
            assert page.errors == []


async def test_what_is_refused_is_said(service: Service, client: httpx.AsyncClient, browser: Any) -> None:
    page = await opened(browser, client)
    await page.page.locator("#prompt").fill("a red ball")
    await page.page.locator("#size").fill("9999x9999")
    await page.page.get_by_role("button", name="Make it").click()
    await page.until("document.getElementById('refused').textContent.includes('size')")
    assert service.created() == 0


async def test_a_failed_video_says_why(service: Service, client: httpx.AsyncClient, browser: Any) -> None:
    making = await Making.begun(service, await queued(client))
    await making.show(0)
    await making.fail()
    page = await opened(browser, client, f"#{making.id}")
    await page.until("document.getElementById('state').textContent === 'Failed: out of memory'")


@pytest.mark.parametrize("size", list(SIZES))
async def test_every_view_fits(
    service: Service, client: httpx.AsyncClient, browser: Any, tmp_path: Path, size: str
) -> None:
    await queued(client)
    page = await opened(browser, client, size=size)
    for view in ("make", "live", "gallery", "load"):
        await page.page.goto(f"{client.base_url}/#{view}")
        await page.until(f"!document.getElementById('view-{view}').hidden")
        if view == "gallery":
            await page.until("document.querySelectorAll('#videos li').length === 1")
        if view == "load":
            await page.until("document.getElementById('jobs').textContent === '1 queued, 0 being made'")
        # Nothing sticks out to the side.
        assert await page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        await picture(page, tmp_path, f"{view}-{size}")
    assert page.errors == []


async def test_the_page_may_load_nothing_but_its_own(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("main.js", "style.css", "icon.svg"):
        assert (await client.get(f"/static/{name}")).status_code == 200
    for name in ("..%2fapp.py", "nothing.js"):
        assert (await client.get(f"/static/{name}")).status_code == 404
