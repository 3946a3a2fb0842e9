"""What a video may leave out, and that it comes out the same however it is interrupted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from arithmetic import MANIFEST, outputs, text
from hypothesis import given, settings
from hypothesis import strategies as st

from models.bundle import Manifest, SamplerInfo
from serving.engines.engine import Array
from serving.jobs.checkpoint import Checkpoint
from serving.pipeline.pricing import work_of
from serving.pipeline.request import InvalidRequest, make_spec
from serving.pipeline.sessions import Session, open_session
from serving.pipeline.shortcuts import CACHES, Cache, guided_steps, reused_steps
from serving.pipeline.stages import DenoiseRequest, LatentChunk, SamplerState

STEPS = 20
BIDIRECTIONAL = MANIFEST.model_copy(
    update={
        "rollout": "bidirectional",
        "causal": None,
        "sampler": SamplerInfo(name="unipc", shift=3.0, num_inference_steps=STEPS, guidance_scale=2.0),
    }
)
CAUSAL = MANIFEST.model_copy(update={"sampler": BIDIRECTIONAL.sampler})


def request(manifest: Manifest, **asked: Any) -> DenoiseRequest:
    return DenoiseRequest("video", make_spec(manifest, "x", seed=7, seconds=1, **asked), text(1), text(-1))


def answer(feeds: dict[str, Array]) -> dict[str, Array]:
    """An engine whose answer depends on the prompt and the noise level too."""
    made = outputs(feeds)
    told = feeds["encoder_hidden_states"][:, 0, 0] + feeds["timestep"] / 1000
    return made | {"velocity": made["velocity"] + told.reshape(-1, 1, 1, 1, 1).astype(np.float32)}


def made(session: Session) -> tuple[list[int], list[LatentChunk | SamplerState]]:
    """The rows of every call, and everything that came out."""
    rows, out = [], []
    while session.calls_done < session.calls:
        feeds = session.feeds()
        assert {len(array) for array in feeds.values()} == {session.rows}
        rows.append(session.rows)
        out += session.take(answer(feeds))
    return rows, out


def latents(session: Session) -> np.ndarray[Any, Any]:
    _, out = made(session)
    return np.concatenate([event.latents for event in out if isinstance(event, LatentChunk)], axis=1)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=60), st.sampled_from(CACHES))
def test_the_first_steps_and_the_last_are_always_asked_for(gaps: list[float], cache: Cache) -> None:
    sigmas = np.cumsum([0, *gaps])[::-1].tolist()
    reused = reused_steps(sigmas, cache)
    assert len(reused) == len(gaps)
    assert not any(reused[:3] + reused[-2:])
    most = {"off": 0, "fast": 1, "faster": 2}[cache]
    assert all(not all(reused[at : at + most + 1]) for at in range(len(reused) - most))


def test_steps_that_are_far_apart_are_all_asked_for() -> None:
    assert not any(reused_steps([1.0, 0.75, 0.5, 0.25, 0.0], "faster"))


def test_guided_steps_are_those_within_the_interval() -> None:
    assert guided_steps(10, (0, 1)) == [True] * 10
    assert guided_steps(10, (0.2, 0.5)) == [False] * 2 + [True] * 3 + [False] * 5
    assert guided_steps(4, (0.5, 1)) == [False, False, True, True]


@pytest.mark.parametrize("manifest", [BIDIRECTIONAL, CAUSAL], ids=["bidirectional", "causal"])
def test_only_guided_steps_have_two_rows(manifest: Manifest) -> None:
    rows, _ = made(open_session(manifest, request(manifest, guidance_interval=[0.2, 0.8])))
    a_chunk = [1] * 4 + [2] * 12 + [1] * 4
    # Between two chunks comes the pass that moves the cache on, of both prompts.
    assert rows == (a_chunk if manifest is BIDIRECTIONAL else [*a_chunk, 2, *a_chunk])


def test_a_guidance_of_one_row_is_none() -> None:
    unguided = latents(open_session(BIDIRECTIONAL, request(BIDIRECTIONAL, guidance_scale=1.0)))
    hardly = request(BIDIRECTIONAL, guidance_interval=[0.96, 1.0])  # no step begins there
    np.testing.assert_allclose(latents(open_session(BIDIRECTIONAL, hardly)), unguided, atol=1e-4)
    assert not np.allclose(latents(open_session(BIDIRECTIONAL, request(BIDIRECTIONAL))), unguided, atol=1e-2)


@pytest.mark.parametrize("manifest", [BIDIRECTIONAL, CAUSAL], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("cache", ["fast", "faster"])
def test_fewer_calls_lead_near_the_same_place(manifest: Manifest, cache: Cache) -> None:
    exact, short = (open_session(manifest, request(manifest, cache=name)) for name in ("off", cache))
    assert short.calls < 0.75 * exact.calls
    expected = latents(exact)
    error = np.abs(latents(short) - expected).mean() / np.abs(expected).mean()
    assert 0 < error < 0.05


@pytest.mark.parametrize("every", [1, 5, 7])
def test_what_is_gone_on_with_ends_in_the_same_bits(every: int) -> None:
    asked = replace(request(BIDIRECTIONAL, cache="faster", guidance_interval=[0.1, 0.7]), state_every=every)
    _, out = made(open_session(BIDIRECTIONAL, asked))
    states = [event for event in out if isinstance(event, SamplerState)]
    whole = [event.latents for event in out if isinstance(event, LatentChunk)]
    assert len(states) >= 2
    for state in states:
        session = open_session(BIDIRECTIONAL, replace(asked, begun=Checkpoint().with_state(state.step, state.state)))
        _, rest = made(session)
        again = [event.latents for event in rest if isinstance(event, LatentChunk)]
        for before, after in zip(whole, again, strict=True):
            np.testing.assert_array_equal(before, after)


def test_a_video_costs_what_it_asks_for() -> None:
    costs = [
        work_of(manifest, make_spec(manifest, "x", seed=7, seconds=1, **asked))
        for manifest in (BIDIRECTIONAL, CAUSAL)
        for asked in ({}, {"guidance_interval": [0.0, 0.5]}, {"cache": "fast"}, {"cache": "faster"})
    ]
    for all_of_it, guided, fast, faster in (costs[:4], costs[4:]):
        assert guided == pytest.approx(0.75 * all_of_it)
        assert faster < fast < all_of_it


@pytest.mark.parametrize("wrong", ["all", 0.5, [0.5], [-0.1, 1], [0, 1.1], [0, 1, 2], ["0", 1], {}])
def test_an_interval_that_is_none_is_refused(wrong: object) -> None:
    with pytest.raises(InvalidRequest, match="guidance_interval must be two numbers"):
        make_spec(BIDIRECTIONAL, "x", guidance_interval=wrong)


@pytest.mark.parametrize("wrong", ["on", "", 1, True, ["fast"]])
def test_a_cache_that_there_is_not_is_refused(wrong: object) -> None:
    with pytest.raises(InvalidRequest, match="cache must be one of off, fast, faster"):
        make_spec(BIDIRECTIONAL, "x", cache=wrong)
