"""What every training stage shares: two single-threaded workers, an exponential average, a resumable clocked loop.

Two one-thread processes that average their gradients are faster than one process with two threads, by a third
(small layers; measured on two cores).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm

from models.mini.clips import Rendered, follow_parent
from models.mini.device import CPU, Recipe, recipe
from models.mini.keep import Keep
from models.mini.muon import Muon, split

# So many steps in a row without a finite gradient, and a stage ends.
PATIENCE = 20


@dataclass
class Run:
    """One stage of training: where it is kept, for how long it may train, and which worker this is.

    It is saved every `save_every` steps, or every `save_seconds` if these are given: then no samples are judged, and
    nothing is saved to resume it with. `rendered` are clips that other processes render, by frames.
    `begun`: when its time began, as `time.monotonic` has it; by default with the first step.
    """

    folder: Path
    stage: str
    minutes: float
    rank: int = 0
    workers: int = 1
    learning_rate: float = 1e-3
    save_every: int = 100
    start: Path | None = None  # a diffusers checkpoint whose weights a new stage begins with
    compile: bool = False  # the denoiser: a minute or two at first, then steps in two thirds of the time
    device: torch.device = CPU
    begun: float | None = None
    save_seconds: float | None = None
    keep: Keep | None = None
    rendered: Mapping[int, Rendered] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    ended: bool = False
    diverged: bool = False

    @property
    def state_path(self) -> Path:
        return self.folder / f"{self.stage}.pt"

    @property
    def recipe(self) -> Recipe:
        return recipe(self.device, self.stage)

    def judges(self, step: int) -> bool:
        """Whether samples are judged when this step is saved: that takes a while."""
        return not self.save_seconds and step % (5 * self.save_every) == 0


# A step's number and the share of the time that is used, to its loss and what is told of it: scalars.
Step = Callable[[int, float], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def spawn(worker: Callable[..., None], run: Run, *args: Any) -> None:
    """Call `worker(run, *args)` in `run.workers` processes that share gradients over gloo."""
    run.folder.mkdir(parents=True, exist_ok=True)
    meeting = run.folder / f".{run.stage}-{os.getpid()}.meet"
    start_processes(_enter, (worker, run, str(meeting), args), nprocs=run.workers)  # type: ignore[no-untyped-call]
    meeting.unlink(missing_ok=True)


def _enter(rank: int, worker: Callable[..., None], run: Run, meeting: str, args: tuple[Any, ...]) -> None:
    threading.Thread(target=follow_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    torch.manual_seed(1000 + rank)
    run.rank = rank
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=run.workers)
    worker(run, *args)
    dist.destroy_process_group()


class Average:
    """Exponential moving average of the parameters; short at first, so that an early checkpoint is usable."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.999) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the trained values."""
        for parameter, shadow in zip(self.parameters, self.shadow, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)


def learning_rate(progress: float, step: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, flat until 50 % of the budget, then a cosine to 2 %."""
    decay = max(0.0, progress - 0.5) / 0.5
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * min(decay, 1.0)))))


def train(run: Run, modules: dict[str, nn.Module], step_fn: Step, report: Callable[[int], dict[str, float]]) -> None:
    """Train until `run.minutes` of this stage are used up, over all resumptions; saves the averaged weights."""
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = Muon(*split(modules.values()), lr=run.learning_rate)
    average = Average(parameters)
    step, used = 0, 0.0
    if run.state_path.exists():
        state = torch.load(run.state_path, map_location=run.device, weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        optimizer.load_state_dict(state["optimizer"])
        average.shadow = state["average"]
        step, used = state["step"], state["seconds"]
        run.history = state["history"]
    if run.workers > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)
    bar = tqdm(total=run.minutes * 60, initial=used, unit="s", disable=run.rank != 0, mininterval=5)
    begun = time.monotonic() - used if run.begun is None else run.begun
    saved = time.monotonic()
    losses: dict[str, list[torch.Tensor]] = {}
    wrong = 0
    while wrong < PATIENCE:
        used = _clock(run, begun)
        progress = used / (run.minutes * 60)
        if progress >= 1 and step:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, step, run.learning_rate)
        loss, parts = step_fn(step, progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        _share_gradients(parameters, run.workers)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if torch.isfinite(norm):
            # Before the step, so that only weights whose gradient was finite are ever averaged, and so saved.
            average.update(step)
            optimizer.step()
            wrong = 0
        else:
            wrong += 1
        for key, value in parts.items():
            losses.setdefault(key, []).append(value)
        step += 1
        if run.rank == 0 and step % 20 == 0:
            _record(run, step, used, losses)
            bar.n = int(used)
            bar.set_postfix_str(" ".join(f"{k}={v:.4g}" for k, v in run.history[-1].items() if k != "seconds"))
        if run.rank == 0 and _due(run, step, time.monotonic() - saved):
            if losses:
                _record(run, step, used, losses)
            _save(run, modules, optimizer, average, step, used, report)
            saved = time.monotonic()
    run.steps, run.ended, run.diverged = step, True, wrong == PATIENCE
    if not run.diverged and all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        average.update(step)
    if run.rank == 0:
        if losses:
            _record(run, step, used, losses)
        _save(run, modules, optimizer, average, step, used, report)
    bar.close()


def _clock(run: Run, begun: float) -> float:
    """Seconds since `begun`, the same for all workers: they stop at the same step."""
    seconds = time.monotonic() - begun
    if run.workers == 1:
        return seconds
    clock = torch.tensor([seconds])
    dist.broadcast(clock, 0)
    return float(clock)


def _due(run: Run, step: int, seconds: float) -> bool:
    return seconds >= run.save_seconds if run.save_seconds else step % run.save_every == 0


def _record(run: Run, step: int, used: float, losses: dict[str, list[torch.Tensor]]) -> None:
    means = {name: float(torch.stack(values).mean()) for name, values in losses.items()}
    run.history.append({"step": step, "seconds": used} | means)
    losses.clear()


def _share_gradients(parameters: list[nn.Parameter], workers: int) -> None:
    if workers == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= workers
    offset = 0
    for parameter in parameters:
        size = parameter.numel()
        parameter.grad = flat[offset : offset + size].view_as(parameter)
        offset += size


def _save(
    run: Run,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    average: Average,
    step: int,
    used: float,
    report: Callable[[int], dict[str, float]],
) -> None:
    average.swap()
    try:
        # On the CPU, so that whatever loads them needs no GPU.
        averaged = {
            name: {key: value.cpu() for key, value in module.state_dict().items()} for name, module in modules.items()
        }
        _replace(run.folder / f"{run.stage}-averaged.pt", averaged)
        if run.keep:
            run.keep.weights(run.stage)
        run.history[-1].update(report(step))
    finally:
        average.swap()
    if not run.save_seconds:
        state = {
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimizer": optimizer.state_dict(),
            "average": average.shadow,
            "step": step,
            "seconds": used,
            "history": run.history,
        }
        _replace(run.state_path, state)
    (run.folder / f"{run.stage}.json").write_text(json.dumps(run.history))
    plot(run.history, run.folder / f"{run.stage}.png")
    if run.keep:
        run.keep.rest()
    print(run.stage, run.history[-1], flush=True)


def _replace(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Each recorded figure against training minutes, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({key for row in history for key in row} - {"step", "seconds"})
    figure, axes = pyplot.subplots(1, max(1, len(names)), figsize=(4 * max(1, len(names)), 3), squeeze=False)
    for axis, name in zip(axes[0], names, strict=False):
        rows = [row for row in history if name in row]
        axis.plot([row["seconds"] / 60 for row in rows], [row[name] for row in rows])
        axis.set(title=name, xlabel="minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
