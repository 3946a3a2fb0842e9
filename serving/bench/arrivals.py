"""When requests arrive: by a Poisson process, all at once, or as a trace file says. Open loop: nobody waits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, ValidationError

from serving.bench.asks import PROMPTS, Arrival, Ask


def poisson(asks: Sequence[Ask], rate: float, *, seed: int = 0) -> list[Arrival]:
    """`rate` requests in a second on average, with exponential times between them; the same for the same seed."""
    if rate <= 0:
        raise ValueError(f"the rate must be positive, not {rate}")
    pick = random.Random(seed)
    times = itertools.accumulate(pick.expovariate(rate) for _ in asks)
    return [Arrival(at, ask) for at, ask in zip(times, asks, strict=True)]


def at_once(asks: Sequence[Ask]) -> list[Arrival]:
    return [Arrival(0.0, ask) for ask in asks]


class TraceLine(BaseModel):
    """One line of a trace file. What is left out is the server's default, or for `prompt` the next of the prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    at_seconds: NonNegativeFloat
    prompt: str | None = None
    model: str | None = None
    size: str | None = None
    seconds: int | str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    priority: int | str | None = Field(default=None, description="Sent as it is, to servers that take one.")
    label: str = Field(default="", description="Results are also told for each label.")
    fields: dict[str, Any] = Field(default={}, description="Any other fields of the body.")

    def ask(self, prompt: str, seed: int | None) -> Ask:
        """`prompt` and `seed` are for a line without them."""
        said = self.model_dump(exclude={"at_seconds", "label", "fields"}, exclude_none=True)
        seeded = {} if seed is None else {"seed": seed}
        return Ask({"prompt": prompt, **seeded, **said, **self.fields}, self.label)


class TraceError(ValueError):
    """A trace file that can't be used; the message names the line."""


def read_trace(path: Path, *, prompts: Sequence[str] = PROMPTS, seed: int | None = 0) -> list[Arrival]:
    """By time. Raises `TraceError`, or `OSError` for a file that can't be read."""
    arrivals = []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, (text, prompt) in enumerate(zip(lines, itertools.cycle(prompts), strict=False)):
        try:
            line = TraceLine.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the line"
            raise TraceError(f"{path}, request {number + 1}: {where}: {first['msg']}") from None
        arrivals.append(Arrival(line.at_seconds, line.ask(prompt, None if seed is None else seed + number)))
    if not arrivals:
        raise TraceError(f"{path} has no request in it")
    return sorted(arrivals, key=lambda arrival: arrival.at_seconds)
