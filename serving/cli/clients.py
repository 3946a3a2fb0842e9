"""A service that runs elsewhere: `rushes submit`, `watch`, `list` and `cancel`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.cli.terminal import DEFAULT_URL, FAILED, ApiKey, Url, console, fail, output_file, said_in_one_line


def submit(
    requests: Annotated[Path, typer.Argument(help="A JSON object a line, as OpenAI's batches have them.", exists=True)],
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and save the answers.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    window: Annotated[str, typer.Option(help="What isn't made within so many hours isn't made.")] = "24h",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where --wait saves the answers.", show_default="NAME.out.jsonl"),
    ] = None,
) -> None:
    """Send a file of requests to a running service, to be made when it has time; prints the batch's id.

    With --wait, prints where the answers are instead. Requests that failed are in a file beside them, and make the exit
    code 1.
    """
    from serving.client import Rushes
    from serving.submission import wait as until_ended

    answers = output or requests.with_suffix(".out.jsonl")
    with said_in_one_line():
        if wait:
            output_file(answers)
        with Rushes(url, api_key, retry_seconds=0) as client:
            batch = client.create_batch(requests, completion_window=window)
        if not wait:
            print(batch["id"])
            return
        with Rushes(url, api_key) as client:  # it may take a day, and the service be restarted meanwhile
            console.print(f"{batch['id']} goes on, whether anybody waits or not")
            batch = until_ended(client, batch, console)
            for file_id, path in (
                (batch["output_file_id"], answers),
                (batch["error_file_id"], answers.with_suffix(".errors.jsonl")),
            ):
                if file_id:
                    client.save_file(file_id, path)
                    print(path)
    counts = batch["request_counts"]
    if counts["completed"] < counts["total"]:
        fail(f"{counts['total'] - counts['completed']} of {counts['total']} were not made", FAILED)


def watch(
    video_id: Annotated[str, typer.Argument(help="The video's id.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where its fragments go as they come; - is stdout.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Show how a video comes on, and play or save it while it is made: `rushes watch ID -o - | ffplay -`."""
    from serving import remote
    from serving.client import AsyncRushes

    with said_in_one_line():
        if output is not None and output != remote.STDOUT:
            output_file(output)
        remote.watch(AsyncRushes(url, api_key), video_id, output, console)


def list_videos(
    limit: Annotated[int, typer.Option(min=1, help="How many, the latest first.")] = 20,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List the videos of a running service."""
    from serving import remote
    from serving.client import Rushes

    with said_in_one_line(), Rushes(url, api_key, retry_seconds=0) as client:
        for line in remote.lines(client, limit):
            print(line)


def cancel(
    video_ids: Annotated[list[str], typer.Argument(help="The videos' ids.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Cancel videos of a running service; prints how each stands then."""
    from serving.client import Rushes

    with said_in_one_line(), Rushes(url, api_key, retry_seconds=0) as client:
        for video_id in video_ids:
            print(video_id, client.cancel(video_id)["status"])
