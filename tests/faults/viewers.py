"""Somebody watches a video through the Python client, and a process dies meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from supervised import SupervisedService

from serving.client import Rushes

# In one video: a decoder and a denoiser; in another: a runner, and the replica that the viewer is connected to. Each
# after so many fragments.
DEATHS: Sequence[Mapping[int, str]] = ({2: "decoder", 5: "denoiser"}, {2: "runner", 5: "api"})


@dataclass(frozen=True)
class Seen:
    """What came, each as it came: which fragments, their bytes, and how many frames were in them."""

    indexes: list[int]
    data: list[bytes]
    frames: int


def watched(service: SupervisedService, body: dict[str, Any], deaths: Mapping[int, str]) -> Seen:
    """All of a new video, whose stream goes through the deaths of processes after so many of its fragments."""
    indexes, data, frames = [], [], 0
    with Rushes(service.url) as rushes:
        video = rushes.create(**body)
        for chunk in rushes.watch(video["id"]):
            indexes.append(chunk.index)
            data.append(chunk.data)
            frames += len(chunk.frames())
            if victim := deaths.get(len(indexes)):
                assert service.kill(victim), victim
    return Seen(indexes, data, frames)


def steered(service: SupervisedService, model: str, deaths: Mapping[int, str], chunks: int) -> Seen:
    """The first chunks of an interactive session, whose stages die at some of them."""
    indexes, data, frames = [], [], 0
    settings = {"model": model, "seed": 7, "size": "64x64", "num_inference_steps": 2}
    with Rushes(service.url) as rushes, rushes.realtime("a red ball", **settings) as live:
        for chunk in live:
            indexes.append(chunk.index)
            data.append(chunk.data)
            frames += len(chunk.frames())
            if victim := deaths.get(chunk.index):
                assert service.kill(victim), victim
            if len(indexes) == chunks:
                break
    return Seen(indexes, data, frames)
