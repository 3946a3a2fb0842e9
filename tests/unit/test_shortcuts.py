"""What a video may leave out, and that it comes out the same however it is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from arithmetic import MANIFEST, outputs, text
from hypothesis import given, settings
from hypothesis import strategies as st

from models.bundle import ExpertsInfo, Manifest, SamplerInfo
from serving.engines.engine import Array
from serving.jobs.checkpoint import Checkpoint
from serving.pipeline.pricing import work_of
from serving.pipeline.request import InvalidRequest, make_spec
from serving.pipeline.sessions import Session, open_session
from serving.pipeline.shortcuts import CACHES, GUIDANCE_CACHES, Cache, full_steps, guided_steps, reused_steps
from serving.pipeline.stages import DenoiseRequest, LatentChunk, SamplerState

Engine = Callable[[dict[str, Array]], dict[str, Array]]

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


def apart(feeds: dict[str, Array]) -> dict[str, Array]:
    """As `answer`, but the two prompts' velocities differ by less, the less noise there is."""
    found = answer(feeds)
    level = (1 + feeds["timestep"] / 1000).reshape(-1, 1, 1, 1, 1).astype(np.float32)
    return found | {"velocity": found["velocity"] * level}


def made(session: Session, engine: Engine = answer) -> tuple[list[int], list[LatentChunk | SamplerState]]:
    """The rows of every call, and everything that came out."""
    rows, out, left = [], [], session.rows_left
    while session.calls_done < session.calls:
        feeds = session.feeds()
        assert {len(array) for array in feeds.values()} == {session.rows}
        rows.append(session.rows)
        out += session.take(engine(feeds))
        assert session.rows_left == left - sum(rows)
    assert session.rows_left == 0
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


NO, YES = False, True


def test_every_second_guided_step_is_full_and_the_first_two_and_the_first_of_each_expert() -> None:
    def full(guided: list[bool], reused: list[bool] | None = None, second: list[bool] | None = None) -> list[bool]:
        none = [False] * len(guided)
        return full_steps(guided, reused or none, second or none, "alternate")

    assert full([YES] * 6) == [YES, YES, NO, YES, NO, YES]
    assert full([NO, NO, YES, YES, YES, YES, NO]) == [NO, NO, YES, YES, NO, YES, NO]
    # What asks the model for nothing isn't counted.
    assert full([YES] * 7, [NO, YES, NO, YES, NO, NO, NO]) == [YES, NO, YES, NO, NO, YES, NO]
    assert full([YES] * 6, second=[NO, NO, NO, NO, YES, YES]) == [YES, YES, NO, YES, YES, NO]
    assert full([YES] * 6, second=[NO, NO, NO, YES, YES, YES]) == [YES, YES, NO, YES, NO, YES]
    assert full_steps([NO, YES, YES], [NO, NO, YES], [NO] * 3, "off") == [NO, YES, NO]


@pytest.mark.parametrize("manifest", [BIDIRECTIONAL, CAUSAL], ids=["bidirectional", "causal"])
def test_every_second_guided_step_has_one_row(manifest: Manifest) -> None:
    def rows(**asked: Any) -> list[int]:
        session = open_session(manifest, request(manifest, guidance_cache="alternate", **asked))
        found, _ = made(session)
        assert session.most_rows == max(found)
        return found

    # Each chunk begins with a full step; between two comes the pass that moves the cache on, of both prompts.
    for a_chunk, asked in (
        ([2, *[2, 1] * 9, 2], {}),
        ([1] * 4 + [2, *[2, 1] * 5, 2] + [1] * 4, {"guidance_interval": [0.2, 0.8]}),
        ([1] * 20, {"guidance_scale": 1.0}),
    ):
        between = 2 if max(a_chunk) == 2 else 1
        assert rows(**asked) == (a_chunk if manifest is BIDIRECTIONAL else [*a_chunk, between, *a_chunk])


def test_with_experts_each_begins_with_a_full_step() -> None:
    experts = ExpertsInfo(boundary_timestep=750)
    manifest = BIDIRECTIONAL.model_copy(update={"experts": experts})
    session = open_session(manifest, request(manifest, guidance_cache="alternate"))
    asked: dict[str, list[int]] = {}
    while session.calls_done < session.calls:
        asked.setdefault(session.graph, []).append(session.rows)
        session.take(answer(session.feeds()))
    assert len(asked) == 2
    first, second = asked.values()
    assert first == [2, *[2, 1] * 20][: len(first)]
    assert second == ([2, 1] * 20)[: len(second)]


@pytest.mark.parametrize("manifest", [BIDIRECTIONAL, CAUSAL], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("asked", [{}, {"cache": "faster"}, {"guidance_interval": [0.1, 0.75]}])
def test_a_guidance_that_does_not_change_may_be_kept(manifest: Manifest, asked: dict[str, Any]) -> None:
    """The engine's two velocities differ by as much at every step, so nothing is lost with the second of them."""
    exact, kept = (open_session(manifest, request(manifest, guidance_cache=name, **asked)) for name in GUIDANCE_CACHES)
    np.testing.assert_allclose(latents(kept), latents(exact), atol=1e-4)


@pytest.mark.parametrize("manifest", [BIDIRECTIONAL, CAUSAL], ids=["bidirectional", "causal"])
def test_a_kept_guidance_leads_near_the_same_place(manifest: Manifest) -> None:
    ended = {}
    for name in GUIDANCE_CACHES:
        _, out = made(open_session(manifest, request(manifest, guidance_cache=name)), apart)
        ended[name] = np.concatenate([event.latents for event in out if isinstance(event, LatentChunk)], axis=1)
    error = np.abs(ended["alternate"] - ended["off"]).mean() / np.abs(ended["off"]).mean()
    assert 0 < error < 0.05


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
@pytest.mark.parametrize(
    "shortcuts",
    [
        {"cache": "faster", "guidance_interval": [0.1, 0.7]},
        {"guidance_cache": "alternate"},
        {"cache": "faster", "guidance_interval": [0.1, 0.7], "guidance_cache": "alternate"},
    ],
)
def test_what_is_gone_on_with_ends_in_the_same_bits(every: int, shortcuts: dict[str, Any]) -> None:
    asked = replace(request(BIDIRECTIONAL, **shortcuts), state_every=every)
    _, out = made(open_session(BIDIRECTIONAL, asked), apart)
    states = [event for event in out if isinstance(event, SamplerState)]
    whole = [event.latents for event in out if isinstance(event, LatentChunk)]
    assert len(states) >= 2
    for state in states:
        session = open_session(BIDIRECTIONAL, replace(asked, begun=Checkpoint().with_state(state.step, state.state)))
        _, rest = made(session, apart)
        again = [event.latents for event in rest if isinstance(event, LatentChunk)]
        for before, after in zip(whole, again, strict=True):
            np.testing.assert_array_equal(before, after)


def test_a_causal_video_is_gone_on_with_from_any_chunk_in_the_same_bits() -> None:
    asked = request(CAUSAL, guidance_cache="alternate", guidance_interval=[0.05, 1])
    asked = replace(asked, spec=replace(asked.spec, frames=1 + 16 * 3), scenes=((1.0, text(2)),))
    _, out = made(open_session(CAUSAL, asked), apart)
    whole = tuple(event.latents for event in out if isinstance(event, LatentChunk))
    assert len(whole) > 3
    for finished in range(1, len(whole)):
        session = open_session(CAUSAL, replace(asked, begun=Checkpoint(chunks=whole[:finished])))
        _, rest = made(session, apart)
        again = [event.latents for event in rest if isinstance(event, LatentChunk)]
        for before, after in zip(whole[finished:], again, strict=True):
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("every", [1, 5])
def test_a_guidance_is_kept_only_where_the_next_step_needs_it(every: int) -> None:
    asked = replace(request(BIDIRECTIONAL, guidance_cache="alternate", guidance_interval=[0, 0.5]), state_every=every)
    _, out = made(open_session(BIDIRECTIONAL, asked))
    states = [event for event in out if isinstance(event, SamplerState)]
    plain = open_session(BIDIRECTIONAL, replace(asked, spec=replace(asked.spec, guidance_cache="off")))
    _, exact = made(plain)
    history = next(len(event.state) for event in exact if isinstance(event, SamplerState))
    for state in states:
        needed = 0 < state.step < STEPS / 2 and state.step % 2 == 0
        assert len(state.state) == history + needed
        wrong = state.state[:-1] if needed else np.concatenate([state.state, state.state[:1]])
        with pytest.raises(ValueError, match="is not of this video"):
            open_session(BIDIRECTIONAL, replace(asked, begun=Checkpoint().with_state(state.step, wrong)))


SHORTCUTS: list[dict[str, Any]] = [
    {"guidance_scale": 1.0},
    {"guidance_interval": [0.0, 0.5]},
    {"cache": "fast"},
    {"cache": "faster"},
    {"guidance_cache": "alternate"},
    {"guidance_cache": "alternate", "guidance_interval": [0.2, 0.8]},
    {"guidance_cache": "alternate", "cache": "faster", "guidance_interval": [0.2, 0.8]},
]


@pytest.mark.parametrize("manifest", [BIDIRECTIONAL, CAUSAL], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("asked", [{}, *SHORTCUTS])
def test_a_video_costs_the_rows_that_it_has(manifest: Manifest, asked: dict[str, Any]) -> None:
    def cost(**asked: Any) -> float:
        return work_of(manifest, make_spec(manifest, "x", seed=7, seconds=1, **asked))

    def rows(**asked: Any) -> int:
        return sum(made(open_session(manifest, request(manifest, **asked)))[0])

    assert cost(**asked) / cost() == pytest.approx(rows(**asked) / rows())
    assert (cost(**asked) < cost()) == bool(asked)


@pytest.mark.parametrize("wrong", ["all", 0.5, [0.5], [-0.1, 1], [0, 1.1], [0, 1, 2], ["0", 1], {}])
def test_an_interval_that_is_none_is_refused(wrong: object) -> None:
    with pytest.raises(InvalidRequest, match="guidance_interval must be two numbers"):
        make_spec(BIDIRECTIONAL, "x", guidance_interval=wrong)


@pytest.mark.parametrize("wrong", ["on", "", 1, True, ["fast"]])
def test_a_cache_that_there_is_not_is_refused(wrong: object) -> None:
    with pytest.raises(InvalidRequest, match="cache must be one of off, fast, faster"):
        make_spec(BIDIRECTIONAL, "x", cache=wrong)


@pytest.mark.parametrize("wrong", ["on", "", 1, True, ["alternate"]])
def test_a_guidance_cache_that_there_is_not_is_refused(wrong: object) -> None:
    with pytest.raises(InvalidRequest, match="guidance_cache must be off or alternate"):
        make_spec(BIDIRECTIONAL, "x", guidance_cache=wrong)
