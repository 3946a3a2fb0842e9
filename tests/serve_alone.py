"""The API in a process of its own, without Ray: `python serve_alone.py BUNDLE DATA_DIR`; prints its port."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from service import Service, served

from models.bundle import Bundle


async def main(bundle: Path, data_dir: Path) -> None:
    async with served(Service(Bundle.load(bundle), data_dir).api) as client:
        print(client.base_url, flush=True)
        await asyncio.to_thread(sys.stdin.read)  # until whoever started it closes the pipe


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
