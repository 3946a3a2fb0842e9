"""Whether an endless session leaves the memory of any process of the service as it is.

    python tests/perf/session_memory.py path/to/a/causal/bundle --seconds 600

Starts `rushes serve`, plays interactive sessions, changes their prompts now and then, and prints for each process how
much it holds and how fast that grows: the slope of a line through all that was seen after the first tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from supervised import SupervisedService

from serving.client import AsyncRushes
from serving.deployments.local import free_port

_LOOK_SECONDS = 2.0
_CHUNKS_A_PROMPT = 20
_MIB = 2.0**20


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def play(url: str, until: float, seed: int) -> int:
    """One session; how many chunks it had."""
    count = 0
    settings = {"seed": seed, "size": "64x64", "num_inference_steps": 2}
    async with AsyncRushes(url) as rushes, rushes.realtime("a red ball", **settings) as live:
        async for _ in live:
            count += 1
            if count % _CHUNKS_A_PROMPT == 0:
                await live.change_prompt(f"a cube, the {count}th chunk")
            if time.monotonic() > until:
                break
    return count


async def look(service: SupervisedService, until: float) -> dict[tuple[int, str], list[tuple[float, float]]]:
    seen: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    while time.monotonic() < until:
        for pid, command in (await asyncio.to_thread(service.processes)).items():
            try:
                seen[pid, command].append((time.monotonic(), resident_bytes(pid) / _MIB))
            except OSError:
                continue
        await asyncio.sleep(_LOOK_SECONDS)
    return seen


async def measure(service: SupervisedService, seconds: float, sessions: int) -> None:
    until = time.monotonic() + seconds
    looking = asyncio.create_task(look(service, until))
    chunks = await asyncio.gather(*(play(service.url, until, seed) for seed in range(sessions)))
    seen = await looking
    print(f"{sessions} sessions of {seconds:.0f} s, {sum(chunks)} chunks")
    print(f"{'MiB at first':>12} {'at last':>8} {'MiB a minute':>13}  process")
    for (_, command), points in sorted(seen.items(), key=lambda item: item[0][1]):
        times, held = np.array(points).T
        steady = times > times[0] + seconds / 10
        if steady.sum() > 2:
            slope = np.polyfit(times[steady] / 60, held[steady], 1)[0]
            print(f"{held[steady][0]:12.1f} {held[-1]:8.1f} {slope:13.3f}  {command.strip()[:60]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--sessions", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = {"models": {"causal": asked.bundle}, "data_dir": f"{folder}/data", "port": free_port()}
        with SupervisedService(config, Path(folder)) as service:
            asyncio.run(measure(service, asked.seconds, asked.sessions))
            service.stop()


if __name__ == "__main__":
    main()
