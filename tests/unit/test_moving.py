"""Engines that move to better ones while they are in use: ONNX Runtime before, and after."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from serving.engines.engine import Engine, EngineError, arrays_of, engine_now
from serving.engines.moving import MovingEngine, moving
from serving.engines.onnx_runtime import OnnxRuntimeEngine

LOOK_SECONDS = 0.001
X = {"x": np.arange(4, dtype=np.float32)}


@pytest.fixture
def before(tmp_path: Path) -> list[Engine]:
    return [engine(tmp_path, "Abs"), engine(tmp_path, "Neg")]


@pytest.fixture
def after(tmp_path: Path) -> list[Engine]:
    return [engine(tmp_path, "Sqrt"), engine(tmp_path, "Exp")]


def engine(folder: Path, operation: str) -> Engine:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node(operation, ["x"], ["y"])], operation, [x], [y])
    path = folder / f"{operation}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return OnnxRuntimeEngine(path)


class Plans:
    """Better engines, when the test says so: `found` is what they would be made of."""

    def __init__(self, opens: Callable[[], Sequence[Engine]]) -> None:
        self._opens = opens
        self.found: Hashable | None = None
        self.looked = self.opened = 0

    def find(self) -> Hashable | None:
        self.looked += 1
        if isinstance(self.found, OSError):
            raise self.found
        return self.found

    def open(self) -> Sequence[Engine]:
        self.opened += 1
        return self._opens()

    def look_again(self) -> None:
        """Until it was looked at least once more from here on."""
        seen = self.looked
        until(lambda: self.looked > seen + 1)


def until(holds: Callable[[], bool]) -> None:
    """Bounded by the test's own time limit."""
    while not holds():
        time.sleep(0.001)


def made(engines: Sequence[Engine]) -> list[list[float]]:
    return [each.run(X)["y"].tolist() for each in engines]


def test_engines_move_together_when_all_of_the_better_ones_are_there(
    before: list[Engine], after: list[Engine], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serving.engines.moving")
    plans = Plans(lambda: after)
    engines = moving("decoder", before, plans, LOOK_SECONDS)
    plans.look_again()
    assert made(engines) == made(before)
    assert (engines[0].inputs, engines[0].outputs) == (before[0].inputs, before[0].outputs)
    plans.found = "both"
    until(lambda: engines[1].now is after[1])
    assert engines[0].now is after[0]
    assert made(engines) == made(after)
    assert arrays_of(engines[0]) is arrays_of(after[0])
    until(lambda: "decoder: runs its plans from now on" in caplog.messages)
    assert plans.opened == 1


def test_no_call_waits_for_them_and_one_that_runs_ends_as_it_began(before: list[Engine], after: list[Engine]) -> None:
    opening, may_open = threading.Event(), threading.Event()

    def slowly() -> Sequence[Engine]:
        opening.set()
        may_open.wait()
        return after

    plans = Plans(slowly)
    engines = moving("denoiser", before, plans, LOOK_SECONDS)
    plans.found = "both"
    opening.wait()
    assert made(engines) == made(before)
    running = [engine_now(each) for each in engines]
    may_open.set()
    until(lambda: engines[0].now is after[0])
    assert made(running) == made(before)
    assert made(engines) == made(after)
    # One that doesn't move is itself.
    assert engine_now(after[0]) is after[0]


def test_what_opens_badly_is_said_once_and_tried_again_when_it_has_changed(
    before: list[Engine], after: list[Engine], caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: list[Exception | None] = [EngineError("denoiser: the plan is broken"), MemoryError("no room"), None]

    def opens() -> Sequence[Engine]:
        if error := outcomes.pop(0):
            raise error
        return after

    plans = Plans(opens)
    engines = moving("denoiser", before, plans, LOOK_SECONDS)
    for tries, found in enumerate(("first", "second"), 1):
        plans.found = found
        until(lambda tries=tries: len(caplog.messages) == tries)
        plans.look_again()
        assert plans.opened == tries
        assert made(engines) == made(before)
    assert caplog.messages == [
        "denoiser: goes on as it is until the plans change: denoiser: the plan is broken",
        "denoiser: goes on as it is until the plans change: no room",
    ]
    # A volume that is away is no more than a reason to look again.
    plans.found = OSError("stale file handle")
    until(lambda: len(caplog.messages) == 3)
    plans.look_again()
    assert caplog.messages[2].endswith("stale file handle")
    assert len(caplog.messages) == 3
    plans.found = "third"
    until(lambda: engines[0].now is after[0])


def test_nobody_looks_for_engines_that_nobody_has(before: list[Engine], after: list[Engine]) -> None:
    plans = Plans(lambda: after)
    engines: list[MovingEngine] | None = moving("forgotten", before, plans, LOOK_SECONDS)
    plans.look_again()
    (looking,) = [thread for thread in threading.enumerate() if thread.name == "forgotten-move"]
    assert engines is not None
    engines = None
    gc.collect()
    looking.join()
    assert plans.opened == 0
