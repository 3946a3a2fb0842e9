"""What `rushes submit` does: a file of requests to a running service, and the files of answers back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_LOOK_SECONDS = 1.0
_ENDED = ("completed", "failed", "expired", "cancelled")


class SubmissionError(OSError):
    """The service refused the batch, or could not finish it; the message has a line for each reason."""


def submit(client: httpx.Client, requests: Path, window: str) -> dict[str, Any]:
    """Upload `requests`, a JSON object a line, and start a batch of them. Raises `SubmissionError`."""
    with requests.open("rb") as file:
        uploaded = _answer(
            client.post("/v1/files", files={"file": (requests.name, file)}, data={"purpose": "batch"}, timeout=None)
        )
    asked = {"input_file_id": uploaded["id"], "endpoint": "/v1/videos", "completion_window": window}
    return _answer(client.post("/v1/batches", json=asked))


def wait(client: httpx.Client, batch: dict[str, Any], console: Console) -> dict[str, Any]:
    """Show how far the batch is until it has ended. Raises `SubmissionError` when its file was wrong."""
    columns = (TextColumn("{task.description:11}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(batch["status"], total=None)
        while True:
            counts = batch["request_counts"]
            ended = counts["completed"] + counts["failed"]
            progress.update(bar, description=batch["status"], completed=ended, total=counts["total"] or None)
            if batch["status"] in _ENDED:
                break
            time.sleep(_LOOK_SECONDS)
            batch = _answer(client.get(f"/v1/batches/{batch['id']}"))
    if batch["errors"]:
        lines = [f"line {error['line']}: {error['message']}" for error in batch["errors"]["data"]]
        raise SubmissionError("nothing was made\n" + "\n".join(lines))
    return batch


def download(client: httpx.Client, file_id: str, target: Path) -> None:
    """Save one of the batch's files."""
    with client.stream("GET", f"/v1/files/{file_id}/content") as response:
        if response.is_error:
            response.read()
            _answer(response)
        with target.open("wb") as file:
            for piece in response.iter_bytes():
                file.write(piece)


def _answer(response: httpx.Response) -> dict[str, Any]:
    try:
        body: dict[str, Any] = response.json()
    except ValueError:
        raise SubmissionError(f"{response.url} answered {response.status_code}, and no JSON") from None
    if response.is_error:
        raise SubmissionError(str(body.get("error", {}).get("message", body)))
    return body
