"""What most people deploy: diffusers' pipeline behind a FastAPI queue, one worker, one request at a time.

    python -m serving.bench.peer CHECKPOINT --precision fp32 --port 8100

It answers as OpenAI's Videos API does, as far as a client needs that waits for its video, and `POST /alone` runs one
request without the queue and says what it took. torch and diffusers are imported here, when it starts, and nowhere
else in `serving`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException
from numpy.typing import NDArray

from serving.media.fmp4 import encode_fragment

# Pixels uint8 `[frames, height, width, 3]` of a request's body.
Make = Callable[[Mapping[str, Any]], NDArray[np.uint8]]


def load(checkpoint: Path, precision: str, *, compiled: bool) -> tuple[Make, int]:
    """The pipeline as a function, and its frames in a second. `rushes.json` has the defaults, as for an export."""
    import torch
    from diffusers import WanPipeline

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings = json.loads((checkpoint / "rushes.json").read_text())
    limits, sampler, fps = settings["limits"], settings["sampler"], int(settings["fps"])
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    pipeline = WanPipeline.from_pretrained(checkpoint, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.transformer = torch.compile(pipeline.transformer)

    def make(body: Mapping[str, Any]) -> NDArray[np.uint8]:
        width, height = map(int, body["size"].split("x")) if "size" in body else limits["default_size"]
        frames = pipeline(
            prompt=body["prompt"],
            negative_prompt=body.get("negative_prompt", ""),
            width=width,
            height=height,
            num_frames=1 + fps * int(body.get("seconds", limits["default_seconds"])),
            num_inference_steps=int(body.get("num_inference_steps", sampler["num_inference_steps"])),
            guidance_scale=float(body.get("guidance_scale", sampler["guidance_scale"])),
            max_sequence_length=settings["max_tokens"],
            generator=torch.Generator().manual_seed(int(body.get("seed", 0))),
            output_type="np",
        ).frames[0]
        pixels: NDArray[np.uint8] = (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)
        return pixels

    return make, fps


def app(make: Make, fps: int) -> FastAPI:
    """The queue: whoever comes waits until all before have their videos."""
    videos: dict[str, dict[str, Any]] = {}
    queue: asyncio.Queue[tuple[str, Mapping[str, Any]]] = asyncio.Queue()
    thread = ThreadPoolExecutor(1)

    def whole(body: Mapping[str, Any]) -> int:
        """With the same encoder as the service's."""
        return len(encode_fragment(make(body), fps=fps, index=0, first_frame=0).data)

    async def work() -> None:
        while True:
            id, body = await queue.get()
            videos[id]["status"] = "in_progress"
            try:
                await asyncio.get_running_loop().run_in_executor(thread, whole, body)
                videos[id]["status"] = "completed"
            except Exception as error:  # whatever it is, the next one is to be made
                videos[id] |= {"status": "failed", "error": {"code": "failed", "message": str(error)}}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    api = FastAPI(lifespan=lifespan)

    @api.post("/v1/videos")
    async def create(body: dict[str, Any]) -> dict[str, Any]:
        id = f"video_{uuid4().hex}"
        videos[id] = {"id": id, "status": "queued", "seconds": str(body.get("seconds", "")), "error": None}
        queue.put_nowait((id, body))
        return videos[id]

    @api.get("/v1/videos/{id}")
    async def retrieve(id: str) -> dict[str, Any]:
        if id not in videos:
            raise HTTPException(404)
        return videos[id]

    @api.post("/alone")
    async def alone(body: dict[str, Any]) -> dict[str, float]:
        started = time.perf_counter()
        await asyncio.get_running_loop().run_in_executor(thread, make, body)
        return {"seconds": time.perf_counter() - started}

    return api


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compiled", action="store_true", help="torch.compile for the transformer.")
    parser.add_argument("--port", type=int, default=8100)
    options = parser.parse_args()
    make, fps = load(options.checkpoint, options.precision, compiled=options.compiled)
    uvicorn.run(app(make, fps), host="127.0.0.1", port=options.port, log_level="error")


if __name__ == "__main__":
    main()
