"""What `rushes submit` does while it waits: how far the batch is."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from serving.client import Rushes
from serving.client.patience import BATCH_ENDED

_LOOK_SECONDS = 1.0


class SubmissionError(OSError):
    """The service could not make anything of the file; the message has a line for each reason."""


def wait(client: Rushes, batch: dict[str, Any], console: Console) -> dict[str, Any]:
    """Show how far the batch is until it has ended. Raises `SubmissionError` when its file was wrong."""
    columns = (TextColumn("{task.description:11}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(batch["status"], total=None)
        while True:
            counts = batch["request_counts"]
            ended = counts["completed"] + counts["failed"]
            progress.update(bar, description=batch["status"], completed=ended, total=counts["total"] or None)
            if batch["status"] in BATCH_ENDED:
                break
            time.sleep(_LOOK_SECONDS)
            batch = client.get_batch(batch["id"])
    if batch["errors"]:
        lines = [f"line {error['line']}: {error['message']}" for error in batch["errors"]["data"]]
        raise SubmissionError("nothing was made\n" + "\n".join(lines))
    return batch
