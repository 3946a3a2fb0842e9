"""What `rushes watch`, `list` and `cancel` do: videos of a service that runs elsewhere."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from serving.client import AsyncRushes, Rushes

STDOUT = Path("-")


def watch(client: AsyncRushes, video_id: str, output: Path | None, console: Console) -> None:
    """Show how the video comes on until it is completed, and write its fragments to `output` as they come.

    Raises `VideoFailed` when it fails.
    """
    asyncio.run(_watch(client, video_id, output, console))


async def _watch(client: AsyncRushes, video_id: str, output: Path | None, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    async with client:
        with Progress(*columns, console=console) as progress, _opened(output) as file:
            showing = asyncio.create_task(_show(client, video_id, progress))
            try:
                if file is not None:
                    async for chunk in client.watch(video_id):
                        file.write(chunk.data if chunk.index else chunk.init + chunk.data)
                        file.flush()
                await showing
                await client.wait(video_id)
            finally:
                showing.cancel()


async def _show(client: AsyncRushes, video_id: str, progress: Progress) -> None:
    bar = progress.add_task("waiting", total=100)
    seconds = 0.0
    async for event in client.events(video_id):
        match event.name:
            case "queued":
                progress.update(bar, description=f"{event.data['position']} ahead in the queue")
            case "started":
                progress.update(bar, description="denoising")
            case "progress":
                progress.update(bar, completed=event.data["progress"])
            case "chunk":
                seconds = event.data["start_seconds"] + event.data["seconds"]
                progress.update(bar, description=f"{seconds:.1f} s to watch")
            case "completed":
                progress.update(bar, completed=100)


def _opened(output: Path | None) -> BinaryIO | nullcontext[BinaryIO | None]:
    if output is None:
        return nullcontext(None)
    return nullcontext(sys.stdout.buffer) if output == STDOUT else output.open("wb")


def lines(client: Rushes, limit: int) -> Iterator[str]:
    """A line for each of the latest videos, with nothing cut off."""
    for video in client.list(limit=limit):
        status = video["error"]["code"] if video["error"] else video["status"]
        about = f"{video['model']}  {video['size']}  {video['seconds']} s"
        prompt = " ".join((video["prompt"] or "").split())
        yield f"{video['id']}  {status:<11}  {video['progress']:>3} %  {about}  {prompt}"
