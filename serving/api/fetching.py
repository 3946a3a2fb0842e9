"""Pictures that a request names by URL: fetched once, bounded, and never from inside the service's own network."""

from __future__ import annotations

import asyncio
import base64
import binascii
from pathlib import Path

import httpx

from serving.jobs.targets import BadTarget, resolve

_SECONDS = 20.0


class FetchError(ValueError):
    """What the URL stands for can't be had; the message says why."""


async def fetch(url: str, target: Path, *, max_bytes: int, allow_private: bool) -> None:
    """Write what an `http`, `https` or base64 `data` URL stands for to `target`. Raises `FetchError`."""
    if url[:5].lower() == "data:":
        await asyncio.to_thread(target.write_bytes, _inline(url, max_bytes))
        return
    try:
        async with asyncio.timeout(_SECONDS):
            await _download(url, target, max_bytes, allow_private)
    except BadTarget as error:
        raise FetchError(f"the URL won't be called: {error}") from None
    except TimeoutError:
        raise FetchError(f"the URL did not answer within {_SECONDS:.0f} s") from None
    except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise FetchError(f"the URL can't be reached ({type(error).__name__})") from None


def _inline(url: str, max_bytes: int) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise FetchError("the data URL is not of the form data:image/png;base64,…")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise FetchError("the data URL is not valid base64") from None
    if len(content) > max_bytes:
        raise FetchError(f"it has more than {max_bytes} bytes")
    return content


async def _download(url: str, target: Path, max_bytes: int, allow_private: bool) -> None:
    place = await resolve(url, allow_private=allow_private)
    # The address that was looked at is called, by the name that the certificate must be for.
    parsed = httpx.URL(url)
    headers = {"Host": parsed.netloc.decode("ascii"), "User-Agent": "rushes"}
    async with httpx.AsyncClient(timeout=_SECONDS, trust_env=False, follow_redirects=False) as client:
        request = client.build_request(
            "GET", parsed.copy_with(host=place.address), headers=headers, extensions={"sni_hostname": place.host}
        )
        response = await client.send(request, stream=True)
        try:
            if not response.is_success:
                raise FetchError(f"the URL answered {response.status_code}")
            size = 0
            with target.open("wb") as file:
                async for piece in response.aiter_bytes():
                    size += len(piece)
                    if size > max_bytes:
                        raise FetchError(f"it has more than {max_bytes} bytes")
                    file.write(piece)
        finally:
            await response.aclose()
