"""How many replicas each stage gets: on made-up load, and on what a service on two GPUs a stage would see in a day."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID

from serving.deployments.scaling import StagePolicy, VideoPolicy, stats_of
from serving.pipeline.pace import StageState
from serving.scaling import ORDER, Load, Settings, decide, shares_of
from serving.stage_config import ScalingConfig

SETTINGS = Settings(target_seconds=30, cold_start_seconds=60, slack=0.7)
# A denoiser has twenty times the decoder's work, as Wan 1.3B on one kind of GPU.
SHARES = {"text-encoder": 1.0, "denoiser": 100.0, "decoder": 5.0}
IDLE = Load(replicas=1, least=1, most=8)


def loads(**changed: Load) -> dict[str, Load]:
    return {"text-encoder": IDLE, "denoiser": IDLE, "decoder": IDLE} | {
        name.replace("_", "-"): load for name, load in changed.items()
    }


def busy(seconds: float, replicas: int = 1, **more: Any) -> Load:
    return replace(IDLE, replicas=replicas, outstanding_seconds=seconds, in_flight=max(1.0, seconds / 10), **more)


def test_little_work_changes_nothing() -> None:
    assert decide(loads(denoiser=busy(20)), SETTINGS, SHARES) == dict.fromkeys(ORDER, 1)


def test_work_that_is_done_before_a_new_replica_is_there_asks_for_none() -> None:
    assert decide(loads(denoiser=busy(60 + 29)), SETTINGS, SHARES)["denoiser"] == 1
    assert decide(loads(denoiser=busy(60 + 31)), SETTINGS, SHARES)["denoiser"] == 2


def test_the_decoder_is_scaled_for_what_is_being_denoised() -> None:
    wanted = decide(loads(denoiser=busy(3600, most=64)), SETTINGS, SHARES)
    # Of 3600 s of denoising 180 s of decoding come.
    assert wanted == {"text-encoder": 1, "denoiser": 64, "decoder": 4}


def test_nothing_is_guessed_of_a_stage_that_never_ran() -> None:
    assert decide(loads(denoiser=busy(3600)), SETTINGS, {}) == {"text-encoder": 1, "denoiser": 8, "decoder": 1}


def test_bounds_hold() -> None:
    wanted = decide(loads(denoiser=busy(1e6, most=3)), SETTINGS, SHARES)
    assert wanted["denoiser"] == 3
    assert decide({"denoiser": replace(IDLE, replicas=5, least=2)}, SETTINGS, {}) == {"denoiser": 2}


def test_what_waits_for_a_replica_counts_as_much_as_what_has_one() -> None:
    load = busy(20, queued=18.0)
    assert load.work_seconds == pytest.approx(20 + 18 * 10)
    assert decide(loads(denoiser=load), SETTINGS, SHARES)["denoiser"] == 5


def test_just_enough_does_not_come_and_go() -> None:
    for seconds in (90, 75, 65, 64):  # three replicas are 90 s; two would be more than 0.7 full at 42 s
        assert decide(loads(denoiser=busy(seconds, replicas=3)), SETTINGS, SHARES)["denoiser"] == 3
    assert decide(loads(denoiser=busy(40, replicas=3)), SETTINGS, SHARES)["denoiser"] == 2
    assert decide(loads(denoiser=busy(1, replicas=3)), SETTINGS, SHARES)["denoiser"] == 1


def test_streams_that_would_run_dry_ask_for_one_more() -> None:
    late = busy(20, slack_seconds=-0.3)
    assert (late.in_flight, decide(loads(denoiser=late), SETTINGS, SHARES)["denoiser"]) == (2, 2)
    in_time = replace(late, slack_seconds=SETTINGS.stream_seconds)
    assert decide(loads(denoiser=in_time), SETTINGS, SHARES)["denoiser"] == 1
    # One at a time, and never more than there are streams to share them.
    many = replace(late, in_flight=4.0, replicas=2, starting=1)
    assert decide(loads(denoiser=many), SETTINGS, SHARES)["denoiser"] == 2
    assert decide(loads(denoiser=replace(many, starting=0)), SETTINGS, SHARES)["denoiser"] == 3
    alone = replace(late, in_flight=2.0, replicas=2)
    assert decide(loads(denoiser=alone), SETTINGS, SHARES)["denoiser"] == 1
    # What is there stays while anybody is late.
    assert decide(loads(denoiser=replace(many, replicas=3)), SETTINGS, SHARES)["denoiser"] == 3
    assert decide(loads(denoiser=replace(late, most=1)), SETTINGS, SHARES)["denoiser"] == 1


def test_an_idle_model_goes_and_all_its_stages_come_back_together() -> None:
    asleep = Load(replicas=0, least=0, most=4)
    assert decide(dict.fromkeys(ORDER, replace(asleep, replicas=1)), SETTINGS, SHARES) == dict.fromkeys(ORDER, 0)
    stages = dict.fromkeys(ORDER, asleep) | {"text-encoder": replace(asleep, queued=1.0)}
    assert decide(stages, SETTINGS, SHARES) == dict.fromkeys(ORDER, 1)


def test_shares_are_remembered_over_a_restart() -> None:
    ran = {stage: replace(IDLE, busy_seconds=seconds) for stage, seconds in SHARES.items()}
    assert shares_of(ran, {}) == SHARES
    assert shares_of(loads(), SHARES) == SHARES


@given(
    seconds=st.floats(0, 1e5),
    replicas=st.integers(0, 20),
    least=st.integers(0, 3),
    most=st.integers(3, 20),
    queued=st.floats(0, 100),
)
def test_every_answer_is_within_bounds_and_more_work_never_means_fewer(
    seconds: float, replicas: int, least: int, most: int, queued: float
) -> None:
    load = Load(replicas, least, most, seconds, queued, in_flight=1.0)
    (now,) = decide({"denoiser": load}, SETTINGS, SHARES).values()
    (then,) = decide({"denoiser": replace(load, outstanding_seconds=seconds + 100)}, SETTINGS, SHARES).values()
    assert max(least, 1) <= now <= then <= most


def day() -> list[float]:
    """Arrivals of denoising work in each ten seconds: quiet, a rush hour, quiet again."""
    return [0.5] * 60 + [40.0] * 60 + [0.5] * 240


def test_a_rush_hour() -> None:
    """The whole loop on a made-up clock: replicas take their cold start, and each does a second of work a second."""
    stages = {stage: Load(1, 1, 8) for stage in ORDER}
    coming: list[tuple[int, str, int]] = []
    trace: list[dict[str, int]] = []
    work, done = dict.fromkeys(ORDER, 0.0), dict.fromkeys(ORDER, 0.0)
    ready = dict.fromkeys(ORDER, 1)
    for tick, arrived in enumerate(day()):
        for at, stage, count in [each for each in coming if each[0] == tick]:
            ready[stage] = count
            coming.remove((at, stage, count))
        work["denoiser"] += arrived
        for stage, following in (("text-encoder", None), ("denoiser", "decoder"), ("decoder", None)):
            finished = min(work[stage], 10.0 * ready[stage])
            work[stage] -= finished
            done[stage] += finished
            if following:
                work[following] += finished * SHARES[following] / SHARES[stage]
        stages = {
            stage: replace(load, outstanding_seconds=work[stage], in_flight=math.ceil(work[stage] / 10))
            for stage, load in stages.items()
        }
        wanted = decide(stages, SETTINGS, SHARES)
        for stage, count in wanted.items():
            if count > stages[stage].replicas:
                coming.append((tick + 6, stage, count))
            elif count < stages[stage].replicas:
                ready[stage] = count
                coming = [each for each in coming if each[1] != stage]
            stages[stage] = replace(stages[stage], replicas=count)
        trace.append(wanted)
    assert max(step["denoiser"] for step in trace) >= 4  # what 4 s of work a second need
    assert trace[-1] == dict.fromkeys(ORDER, 1)
    assert work["denoiser"] == pytest.approx(0, abs=1)
    changes = sum(a["denoiser"] != b["denoiser"] for a, b in pairwise(trace))
    assert changes < 25, "it swings"


def context(load: Load, **state: Any) -> SimpleNamespace:
    stands = StageState(0, round(load.in_flight), load.outstanding_seconds, load.busy_seconds, load.slack_seconds)
    stats = stats_of(stands)
    assert all(math.isfinite(value) for value in stats.values())
    return SimpleNamespace(
        target_num_replicas=load.replicas,
        current_num_replicas=load.replicas - load.starting,
        capacity_adjusted_min_replicas=load.least,
        capacity_adjusted_max_replicas=load.most,
        total_queued_requests=load.queued,
        aggregated_metrics={name: {"replica": value} for name, value in stats.items()},
        policy_state=state,
    )


def test_the_policy_speaks_rays_language() -> None:
    policy = VideoPolicy(cold_start_seconds=0, target_seconds=10)
    ids = {stage: DeploymentID(f"my-model-{stage}", "rushes") for stage in ORDER}
    api = DeploymentID("api", "rushes")
    ran = {stage: replace(IDLE, busy_seconds=seconds) for stage, seconds in SHARES.items()}
    ran["denoiser"] = replace(ran["denoiser"], outstanding_seconds=400.0, in_flight=4.0)
    contexts = {ids[stage]: context(load) for stage, load in ran.items()} | {api: context(IDLE)}
    wanted, states = policy(contexts)
    assert wanted == {ids["text-encoder"]: 1, ids["denoiser"]: 8, ids["decoder"]: 2, api: 1}
    # The replicas that ran are gone: what they had learnt isn't.
    fresh = {stage: replace(load, busy_seconds=0.0) for stage, load in ran.items()}
    again = {ids[stage]: context(load, **states.get(ids[stage], {})) for stage, load in fresh.items()}
    assert policy(again)[0] == {ids["text-encoder"]: 1, ids["denoiser"]: 8, ids["decoder"]: 2}
    late = contexts | {ids["denoiser"]: context(replace(IDLE, in_flight=3.0, slack_seconds=-1.0))}
    assert policy(late)[0][ids["denoiser"]] == 2
    starting = contexts | {
        ids["denoiser"]: context(replace(IDLE, replicas=2, in_flight=3.0, slack_seconds=-1, starting=1))
    }
    assert policy(starting)[0][ids["denoiser"]] == 2


def test_a_stage_by_itself_is_scaled_by_its_own_work() -> None:
    policy = StagePolicy(**ScalingConfig(cold_start_seconds=0, target_seconds=10).model_dump())
    stage = context(busy(45))
    stage.deployment_name = "my-model-denoiser"
    assert policy(stage) == (5, {})
    stage = context(replace(IDLE, least=0))
    stage.deployment_name = "my-model-decoder"
    assert policy(stage) == (0, {})


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="cold_start"):
        VideoPolicy(cold_start=3)
