"""What the commands share: how they speak, what ends them, and options that several have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serving.config import ConfigError, bundled

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
DEFAULT_URL = "http://127.0.0.1:8000"


# Progress and errors go to stderr: what stdout has is the answer, such as a path.
console = Console(stderr=True, highlight=False, soft_wrap=True)

Bundle = Annotated[
    Path,
    typer.Option(
        parser=bundled,
        metavar="PATH",
        help="A bundle's directory, or mini-causal, the other bundled model; mini when left out.",
        show_default=False,
    ),
]
Prompt = Annotated[str, typer.Argument(help="What to show.")]
Seconds = Annotated[int | None, typer.Option(help="Length in whole seconds; the model's default when left out.")]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; the model's default when left out.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file; see serving/config.py for its keys.")]
Url = Annotated[str, typer.Option(help="The service's root.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="RUSHES_API_KEY", show_envvar=True, help="Where the service wants one.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same video; random when left out.")]


@contextmanager
def said_in_one_line() -> Iterator[None]:
    """Turn what a user can run into a line on stderr and an exit code; anything else is a bug and stays a traceback."""
    from models.bundle import BundleError
    from serving.client.errors import ApiError, RushesError
    from serving.engines.engine import EngineError
    from serving.pipeline.request import InvalidRequest

    try:
        yield
    except (InvalidRequest, BundleError, ConfigError, ApiError) as error:
        fail(str(error), BAD_INPUT)
    except (EngineError, OSError, RushesError) as error:
        fail(str(error), FAILED)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)


def fail(message: str, code: int) -> None:
    console.print(f"[red]rushes:[/] {plain(' '.join(message.split()))}", soft_wrap=True)
    raise typer.Exit(code)


def plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def output_file(path: Path) -> None:
    """Before minutes of work, not after."""
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; name a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"there is no directory {path.absolute().parent}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"{path.absolute().parent} can't be written to")


def alone(bundle: Path) -> dict[str, Path]:
    """One bundle as a service's `models`, under its own name."""
    from models.bundle import Bundle as LoadedBundle

    return {LoadedBundle.load(bundle).manifest.name: bundle}
