"""How good the bundled model is: `python -m models.mini.evaluate` asks the service for held-out clips and judges them.

The prompts name attribute combinations that training never saw; seeds are fixed and settings are the model's defaults,
so two runs on one bundle give the same figures. Videos come over HTTP, as a user's do. Without `--url` a service of its
own is started and stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import av
import httpx
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from models.mini import world
from models.mini.captions import canonical
from models.mini.judge import Verdict, judge
from models.mini.world import Attributes

Frames = NDArray[np.uint8]

CHECKPOINT = Path(__file__).parent / "checkpoint"
_NAMES = tuple(field.name for field in fields(Attributes))
_START_SECONDS, _VIDEO_SECONDS = 300, 1800


@dataclass(frozen=True, slots=True)
class Scores:
    """Verdicts on clips beside what the clips should show."""

    attributes: list[Attributes]
    verdicts: list[Verdict]

    def wrong(self, index: int) -> list[str]:
        """Names of the attributes that clip `index` has wrong."""
        right = self.verdicts[index].right(self.attributes[index])
        return [name for name in _NAMES if not right[name]]

    def counts(self) -> dict[str, int]:
        """How many clips have each attribute right, and under "all" how many have every one right."""
        wrong = [self.wrong(index) for index in range(len(self.verdicts))]
        return {name: sum(name not in w for w in wrong) for name in _NAMES} | {"all": sum(not w for w in wrong)}

    def accuracies(self) -> dict[str, float]:
        return {name: count / len(self.verdicts) for name, count in self.counts().items()}


def score(attributes: list[Attributes], clips: list[Frames]) -> Scores:
    """Judge clips `[frames, height, width, 3]` that should show `attributes`."""
    if len(attributes) != len(clips):
        raise ValueError(f"{len(clips)} clips for {len(attributes)} attributes")
    return Scores(attributes, [judge(clip) for clip in clips])


def held_out(count: int, seed: int = 0) -> list[Attributes]:
    """The first `count` of the held-out combinations in an order that `seed` fixes."""
    kept = [a for a in world.all_attributes() if a.held_out]
    return [kept[i] for i in np.random.default_rng(seed).permutation(len(kept))[:count]]


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (E. B. Wilson, JASA 22, 1927)."""
    share, weight = right / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


# Videos over HTTP -----------------------------------------------------------------------------------------------------


@contextmanager
def service(bundle: Path | None, console: Console) -> Iterator[str]:
    """URL of a service that lives as long as the context. Raises `RuntimeError` with its last words if it can't."""
    with tempfile.TemporaryDirectory(prefix="rushes-evaluate-") as folder, (Path(folder) / "log").open("w+") as log:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "serving.cli", "serve", "--port", str(port), "--data-dir", f"{folder}/data"]
        if bundle is not None:
            command += ["--bundle", str(bundle)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            with console.status("starting the service"):
                if not _is_up(url, process):
                    log.seek(0)
                    raise RuntimeError(f"the service did not start:\n{log.read()[-2000:]}")
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_up(url: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/v1/models", timeout=5).is_success:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    return False


async def generate(url: str, prompts: list[str], in_flight: int, console: Console) -> list[bytes]:
    """The MP4 of each prompt, its place in the list as its seed. Raises `RuntimeError` when the service fails one."""
    places = asyncio.Semaphore(in_flight)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        with Progress(console=console) as progress:
            bar = progress.add_task("videos", total=len(prompts))

            async def one(seed: int, prompt: str) -> bytes:
                async with places:
                    video = await _make(client, prompt, seed)
                progress.advance(bar)
                return video

            return list(await asyncio.gather(*(one(seed, prompt) for seed, prompt in enumerate(prompts))))


async def _make(client: httpx.AsyncClient, prompt: str, seed: int) -> bytes:
    answer = await client.post("/v1/videos", json={"prompt": prompt, "seed": seed})
    if answer.is_error:
        raise RuntimeError(f"{prompt!r}: {answer.text}")
    video_id = answer.json()["id"]
    async with asyncio.timeout(_VIDEO_SECONDS):
        while True:
            video = (await client.get(f"/v1/videos/{video_id}")).raise_for_status().json()
            if video["status"] not in ("queued", "in_progress"):
                break
            await asyncio.sleep(0.2)
    if video["status"] != "completed":
        raise RuntimeError(f"{prompt!r}: {video['error']}")
    return (await client.get(f"/v1/videos/{video_id}/content")).raise_for_status().content


def decode(video: bytes) -> Frames:
    """All frames `[frames, height, width, 3]` of an MP4."""
    with av.open(io.BytesIO(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# Reconstruction -------------------------------------------------------------------------------------------------------


def reconstruction_psnr(checkpoint: Path, clips: int) -> list[float]:
    """PSNR in dB of held-out clips through the checkpoint's VAE. Raises `ImportError` without the export extra."""
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32).eval()
    figures = []
    for index, attributes in enumerate(held_out(clips, seed=1)):
        clip = world.render(world.make_scene(attributes, np.random.default_rng(index)))
        pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            again = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        figures.append(10 * math.log10(4 / float((again - pixels).square().mean())))
    return figures


# Reports --------------------------------------------------------------------------------------------------------------


def contact_sheet(scores: Scores, clips: list[Frames], path: Path, columns: int = 6) -> None:
    """A PNG with a row for each clip: its caption, what is wrong with it, and frames from first to last."""
    from PIL import Image, ImageDraw

    height, width = clips[0].shape[1:3]
    line = 18
    sheet = Image.new("RGB", (columns * width, len(clips) * (height + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, clip in enumerate(clips):
        top = row * (height + line)
        wrong = scores.wrong(row)
        caption = canonical(scores.attributes[row])
        seen = ", ".join(f"{name}: {getattr(scores.verdicts[row], name)}" for name in wrong)
        draw.text((4, top + 3), f"{row} {caption}", fill="black")
        draw.text((4 + columns * width * 9 // 16, top + 3), seen or "right", fill="firebrick" if wrong else "green")
        for column, frame in enumerate(np.linspace(0, len(clip) - 1, columns).round().astype(int)):
            sheet.paste(Image.fromarray(clip[frame]), (column * width, top + line))
    sheet.save(path)


def table(scores: Scores) -> Table:
    total = len(scores.verdicts)
    shown = Table(title=f"{total} held-out prompts")
    for title in ("attribute", "right", "95 % interval"):
        shown.add_column(title, justify="left" if title == "attribute" else "right")
    for name, count in scores.counts().items():
        low, high = wilson(count, total)
        style = "bold" if name == "all" else None
        shown.add_row(
            name, f"{count / total:.1%}", f"{low:.1%} to {high:.1%}", style=style, end_section=name == "light"
        )
    return shown


def report(scores: Scores, psnr: list[float] | None) -> dict[str, object]:
    """The figures as JSON."""
    total = len(scores.verdicts)
    return {
        "prompts": total,
        "right": {
            name: {"share": count / total, "interval_95": wilson(count, total)}
            for name, count in scores.counts().items()
        },
        "vae_psnr_db": None
        if psnr is None
        else {"mean": float(np.mean(psnr)), "lowest": min(psnr), "clips": len(psnr)},
        "videos": [
            {"seed": index, "prompt": canonical(asked), "seen": asdict(seen), "wrong": scores.wrong(index)}
            for index, (asked, seen) in enumerate(zip(scores.attributes, scores.verdicts, strict=True))
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="serve this bundle; the bundled model when left out")
    parser.add_argument("--url", help="use the service at this address")
    parser.add_argument("--prompts", type=int, default=50, help="how many held-out combinations")
    parser.add_argument("--in-flight", type=int, default=4, help="videos asked for at a time")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="whose VAE is measured")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/evaluation"), help="folder for the contact sheet and JSON"
    )
    options = parser.parse_args()
    if options.url and options.bundle:
        parser.error("--url names a service that has its bundle already: leave --bundle out")
    if options.prompts < 1:
        parser.error("--prompts must be at least 1")
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    wanted = held_out(options.prompts)
    prompts = [canonical(attributes) for attributes in wanted]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the service is stopped too
    try:
        with nullcontext(options.url) if options.url else service(options.bundle, console) as url:
            videos = asyncio.run(generate(url, prompts, options.in_flight, console))
    except (RuntimeError, TimeoutError, httpx.HTTPError) as error:
        sys.exit(f"evaluate: {error or type(error).__name__}")
    clips = [decode(video) for video in videos]
    scores = score(wanted, clips)
    console.print(table(scores))
    psnr = _measure(options.checkpoint, console)
    contact_sheet(scores, clips, options.out / "sheet.png")
    (options.out / "evaluation.json").write_text(json.dumps(report(scores, psnr), indent=2) + "\n")
    console.print(f"{options.out / 'sheet.png'} and {options.out / 'evaluation.json'}")


def _measure(checkpoint: Path, console: Console) -> list[float] | None:
    if not (checkpoint / "vae").is_dir():
        console.print(f"VAE reconstruction: not measured, there is no {checkpoint / 'vae'}")
        return None
    try:
        psnr = reconstruction_psnr(checkpoint, 8)
    except ImportError as error:
        console.print(f"VAE reconstruction: not measured, the export extra is not installed ({error.name})")
        return None
    console.print(
        f"VAE reconstruction of {len(psnr)} held-out clips: {np.mean(psnr):.1f} dB, lowest {min(psnr):.1f} dB"
    )
    return psnr


if __name__ == "__main__":
    main()
