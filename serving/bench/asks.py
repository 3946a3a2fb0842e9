"""What a benchmark asks for: bodies of `POST /v1/videos`, and when each is sent."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Detailed enough that no model's rewriter would change what they show.
PROMPTS = (
    "a small red ball bouncing on a grey floor at noon",
    "a large blue cube spinning on a sand floor at sunset",
    "a small cyan cone moving left on a navy floor at night",
    "a large white cube spinning on a sand floor at night, the camera zooms in",
    "a small green cylinder moving right on a grey floor at sunset",
    "a large yellow ball moving closer on a navy floor at noon",
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: the body's fields, and a `label` by which results are told apart."""

    body: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that is sent `at_seconds` after the start, whatever has become of those before it."""

    at_seconds: float
    ask: Ask


def asks(
    count: int, settings: Mapping[str, Any], *, prompts: Sequence[str] = PROMPTS, seed: int | None = 0, label: str = ""
) -> list[Ask]:
    """So many requests with these fields; prompts in turn, seeds from `seed` on, or none for a server without them."""
    given = {name: value for name, value in settings.items() if value is not None}
    return [
        Ask({"prompt": prompt, **given, **({} if seed is None else {"seed": seed + number})}, label)
        for number, prompt in zip(range(count), itertools.cycle(prompts), strict=False)
    ]


def read_prompts(path: Path) -> list[str]:
    """One a line; empty lines are left out. Raises `OSError`, and `ValueError` when there is none."""
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(prompts):
        raise ValueError(f"{path} has no prompt in it")
    return [prompt for prompt in prompts if prompt]


def labels_of(arrivals: Sequence[Arrival]) -> Iterator[str]:
    """Each label once, in the order of its first request."""
    yield from dict.fromkeys(arrival.ask.label for arrival in arrivals)
