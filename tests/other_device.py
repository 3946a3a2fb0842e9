"""One step of every training stage on a device that isn't the CPU: `python tests/other_device.py FOLDER`.

There need be no such device. Its tensors are fakes that know shape, type and place; operations on tensors of two places
raise, as they do on a GPU. A process of its own, since PyTorch can't forget a device it was once told of.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from models.mini import (
    clips,
    latents,
    mixed,
    networks,
    train_captioner,
    train_causal,
    train_dit,
    train_tiny_decoder,
    train_vae,
)
from models.mini.captions import build_tokenizer
from models.mini.conditioning import Captioned
from models.mini.muon import Muon, split
from models.mini.networks import build_transformer, build_vae
from models.mini.places import CHANNELS
from models.mini.samples import roll_out, sample
from models.mini.scene import FRAMES, HEIGHT, WIDTH
from models.mini.training import Average, Run

DEVICE = "gpu"
STAGES: dict[str, tuple[Any, Any]] = {
    "vae": (train_vae, lambda run: train_vae.train_vae(run, decoder_only=False)),
    "dit": (train_dit, train_dit.train_dit),
    "captioner": (train_captioner, train_captioner.train_captioner),
    "causal": (train_causal, train_causal.train_causal),
    "distil": (train_causal, train_causal.train_distil),
    "tiny_decoder": (train_tiny_decoder, train_tiny_decoder.train_tiny_decoder),
}
# Those that go other ways through a stage's step: the step's number and the share of the time that is used.
STEPS = {
    "vae": [(1, 0.0)],
    "dit": [(0, 0.9)],
    "causal": [(0, 0.0), (5, 0.9)],
    "distil": [(1, 0.0)],
    "tiny_decoder": [(0, 0.0), (0, 1.0)],
}


def shallow(kind: Any, **config: Any) -> Any:
    """The denoiser with no more blocks than its probe wants."""
    return kind(**config | {"num_layers": 4})


def move(module: nn.Module, device: torch.device) -> Any:
    """`Module.to`, which can't turn a fake parameter into one of another device."""
    moved: dict[int, Any] = {}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, value in store.items():
                if value is not None:
                    there = value.detach().to(device)
                    made = nn.Parameter(there, value.requires_grad) if store is part._parameters else there
                    store[name] = moved.setdefault(id(value), made)
    return module


def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor`, which would want the device's own memory."""
    return _tensor(data, **options).to(device)


_tensor = torch.tensor


def prepare(folder: Path) -> dict[int, clips.Rendered]:
    """Latents and clips of noise, and untrained weights."""
    rng = np.random.default_rng(0)
    rendered = {}
    for frames in (FRAMES, clips.LONG):
        shape = (clips.BLOCK, 32, 1 + (frames - 1) // 4, 8, 8)
        labels = np.zeros((clips.BLOCK, shape[2], 4, 4, CHANNELS), np.float16)
        made = rng.standard_normal(shape).astype(np.float16)
        latents._write(latents._path(folder, frames, 0), made, clips.clips_of(0, frames)[0], labels)
        pictures = np.zeros((clips.BLOCK, frames, HEIGHT, WIDTH, 3), np.uint8)
        rendered[frames] = clips.Rendered(frames, pictures, labels, np.ones(1, np.bool_))
    (folder / "latent-statistics.json").write_text(json.dumps([[0.0] * 32, [1.0] * 32]))
    text, transformer = Captioned(build_tokenizer()), build_transformer()
    for stage in ("dit", "causal"):
        state = {"text": text.state_dict(), "transformer": transformer.state_dict()}
        torch.save(state, folder / f"{stage}-averaged.pt")
    torch.save({"vae": build_vae().state_dict()}, folder / "vae-averaged.pt")
    return rendered


def step(folder: Path, stage: str, rendered: dict[int, clips.Rendered]) -> None:
    """Steps of a stage as `training.train` takes them, without what reads a value."""
    module, train_stage = STAGES[stage]

    def train(run: Run, modules: dict[str, nn.Module], step_fn: Any, report: Any) -> None:
        parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        optimizer, average = Muon(*split(modules.values()), lr=1e-3), Average(parameters)
        for index, progress in STEPS.get(stage, [(0, 0.0)]):
            loss, parts = step_fn(index, progress)
            assert {value.device.type for value in [loss, *parts.values(), *parameters]} == {DEVICE}
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            average.update(0)
            optimizer.step()
        average.swap()

    module.train = train
    with FakeTensorMode(allow_non_fake_inputs=True):
        train_stage(Run(folder, stage, 1, device=torch.device(DEVICE), rendered=rendered))


def samples(folder: Path) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        text, transformer = train_causal.load(Run(folder, "dit", 1, device=torch.device(DEVICE)), "dit")
        made = sample(text, transformer, ["a ball", "a cube"], 9, 1, 2.0)
        rolled = roll_out(text, transformer, train_causal.WINDOW, ["a ball", "a cube"], 2, 1, 2.0)
        assert made.device.type == rolled.device.type == DEVICE


def main() -> None:
    folder = Path(sys.argv[1])
    networks.WanTransformer3DModel = partial(shallow, networks.WanTransformer3DModel)
    rendered = prepare(folder)
    _setup_privateuseone_for_python_backend(DEVICE)
    nn.Module.to = move  # type: ignore[method-assign, assignment]
    torch.tensor = tensor  # type: ignore[assignment]
    mixed.autocast = lambda _: nullcontext()  # type: ignore[assignment]
    mixed._in_fp32 = lambda *_: nullcontext()  # type: ignore[assignment]
    for stage in STAGES:
        step(folder, stage, rendered)
        print(stage, time.process_time(), flush=True)
    samples(folder)
    print("samples")
    # That a tensor left behind is found at all.
    levels = train_dit.noise_levels
    train_dit.noise_levels = lambda count, _: levels(count, torch.device("cpu"))
    try:
        step(folder, "dit", rendered)
    except FakeTensorDeviceMismatchError:
        print("found")


if __name__ == "__main__":
    main()
