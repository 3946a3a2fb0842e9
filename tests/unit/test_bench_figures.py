"""The parts of `rushes bench` that only reckon: arrivals, the viewer, statistics, reports, tables and the document."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.bench import figures
from serving.bench.arrivals import TraceError, at_once, poisson, read_trace
from serving.bench.asks import Ask, asks, read_prompts
from serving.bench.document import DocumentError, filled
from serving.bench.figures import Measured
from serving.bench.following import Outcome
from serving.bench.fragments import fragment_seconds
from serving.bench.machine import this_machine
from serving.bench.observed import between, counts, observed_table
from serving.bench.peers import variants
from serving.bench.processes import NotStarted, server, settings_of
from serving.bench.report import Goals, report
from serving.bench.statistics import Spread, Summary, percentile, steady_rate
from serving.bench.suite import Results
from serving.bench.tables import load_table, seconds, spread, table
from serving.bench.viewer import Arrived, view
from serving.config import ServiceConfig
from serving.deployments.local import free_port
from serving.media.fmp4 import encode_fragment

# A busy machine is no failure.
checked = settings(max_examples=50, deadline=None)
# In microseconds: of nothing shorter can a share be taken.
finite = st.integers(0, 10**9).map(lambda microseconds: microseconds / 1e6)
streams = st.lists(st.builds(Arrived, finite, st.floats(0.01, 10)), min_size=1, max_size=30).map(
    lambda chunks: [
        Arrived(at, chunk.seconds)
        for at, chunk in zip(sorted(chunk.at_seconds for chunk in chunks), chunks, strict=True)
    ]
)


def test_poisson_arrivals_have_the_rate_and_come_again_with_the_same_seed() -> None:
    requests = asks(4000, {})
    arrivals = poisson(requests, 5.0, seed=3)
    times = [arrival.at_seconds for arrival in arrivals]
    gaps = np.diff([0.0, *times])
    assert [arrival.ask for arrival in arrivals] == requests
    assert times == sorted(times) == [arrival.at_seconds for arrival in poisson(requests, 5.0, seed=3)]
    assert times != [arrival.at_seconds for arrival in poisson(requests, 5.0, seed=4)]
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.1)
    assert gaps.std() == pytest.approx(1 / 5, rel=0.1)  # an exponential's deviation is its mean


def test_prompts_take_turns_and_seeds_are_fixed() -> None:
    made = asks(3, {"model": "m", "size": None}, prompts=["a", "b"], seed=10)
    assert [ask.body for ask in made] == [
        {"prompt": "a", "model": "m", "seed": 10},
        {"prompt": "b", "model": "m", "seed": 11},
        {"prompt": "a", "model": "m", "seed": 12},
    ]
    assert "seed" not in asks(1, {}, seed=None)[0].body


def test_a_trace_says_when_and_what(tmp_path: Path) -> None:
    lines = [
        {"at_seconds": 2, "prompt": "late", "seed": 5, "priority": "low", "fields": {"best_of": 2}},
        {"at_seconds": 0.5, "size": "64x64", "seconds": 1, "num_inference_steps": 4, "model": "m", "label": "short"},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    first, second = read_trace(path, prompts=["p", "q"], seed=7)
    assert (first.at_seconds, first.ask.label, second.at_seconds) == (0.5, "short", 2)
    expected = {"prompt": "q", "seed": 8, "size": "64x64", "seconds": 1, "num_inference_steps": 4, "model": "m"}
    assert first.ask.body == expected
    assert second.ask.body == {"prompt": "late", "seed": 5, "priority": "low", "best_of": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}', "at_seconds"),
        ('{"at_seconds": 1}\n{"at_seconds": -1}', "request 2"),
        ('{"at_seconds": 0, "steps": 4}', "steps"),
        ("not json", "request 1"),
        ("\n", "no request"),
    ],
)
def test_a_bad_trace_names_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError, match=said):
        read_trace(path)


def test_prompts_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a ball\n\n  a cube \n")
    assert read_prompts(path) == ["a ball", "a cube"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="no prompt in it"):
        read_prompts(path)


def test_a_viewer_stalls_for_what_comes_late_and_is_put_off_by_it() -> None:
    # Begins at 1 and needs the second chunk at 2; it comes at 2.5, so the third is due at 3.5, and is there.
    seen = view([Arrived(1, 1), Arrived(2.5, 1), Arrived(3.4, 1)])
    assert (seen.start_seconds, seen.late, seen.chunks) == (1, 1, 3)
    assert seen.stall_seconds == pytest.approx(0.5)
    # With a second more of video before the start nothing is late.
    assert view([Arrived(1, 1), Arrived(2.5, 1), Arrived(3.4, 1)], startup_seconds=1.5).smooth


@checked
@given(streams, st.floats(0, 20))
def test_a_viewer_neither_loses_nor_makes_up_time(chunks: list[Arrived], startup: float) -> None:
    seen = view(chunks, startup)
    played = sum(chunk.seconds for chunk in chunks)
    assert seen.start_seconds in [chunk.at_seconds for chunk in chunks]
    assert seen.stall_seconds >= 0
    assert seen.smooth == (seen.stall_seconds == 0)
    # The last picture is never shown before it is there.
    end = seen.start_seconds + played + seen.stall_seconds
    assert end >= chunks[-1].at_seconds + chunks[-1].seconds or math.isclose(
        end, chunks[-1].at_seconds + chunks[-1].seconds
    )


@checked
@given(streams, st.floats(0, 10), st.floats(0, 10))
def test_a_larger_buffer_never_means_more_stalls(chunks: list[Arrived], startup: float, more: float) -> None:
    less, longer = view(chunks, startup), view(chunks, startup + more)
    assert longer.start_seconds >= less.start_seconds
    assert longer.stall_seconds <= less.stall_seconds + 1e-9


@checked
@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    expected = float(np.percentile(values, 100 * share))
    assert percentile(sorted(values), share) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_summaries_and_spreads() -> None:
    summary = Summary.of([3, 1, 2])
    assert summary is not None
    assert (summary.count, summary.mean, summary.least, summary.p50, summary.most) == (3, 2, 1, 2, 3)
    assert Summary.of([]) is None
    assert Spread.of([2, 1, 4]) == Spread(2, 1, 4, 3)
    with pytest.raises(ValueError, match="nothing"):
        Spread.of([])


@checked
@given(st.integers(1, 5), st.floats(0.1, 10), st.integers(1, 8))
def test_a_steady_rate_is_found_behind_a_slow_beginning(burst: int, period: float, bursts: int) -> None:
    """Whole bursts, as batches end: the first and last are left out, however late they are."""
    steady = [10 + number * period for number in range(bursts + 1) for _ in range(burst)]
    times = [*steady, *[steady[-1] + 99] * burst]
    assert steady_rate(times, burst) == pytest.approx(burst / period)


def test_a_rate_of_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        steady_rate([1, 2, 3, 4], 2)
    with pytest.raises(ValueError, match="at once"):
        steady_rate([1, 1, 1], 1)


@pytest.mark.parametrize(("frames", "fps"), [(9, 16), (1, 24), (33, 30)])
def test_a_fragments_boxes_say_how_long_it_plays(frames: int, fps: int) -> None:
    pixels = np.zeros((frames, 16, 16, 3), np.uint8)
    fragment = encode_fragment(pixels, fps=fps, index=3, first_frame=40)
    assert fragment_seconds(fragment.init, fragment.data) == pytest.approx(frames / fps)
    with pytest.raises(ValueError, match="duration"):
        fragment_seconds(fragment.init, fragment.init)


@given(st.binary(max_size=64), st.integers(0, 600))
@checked
def test_a_damaged_fragment_is_a_value_error(junk: bytes, place: int) -> None:
    fragment = encode_fragment(np.zeros((2, 16, 16, 3), np.uint8), fps=16, index=0, first_frame=0)
    data = fragment.data[:place] + junk + fragment.data[place + len(junk) :]
    with suppress(ValueError):
        assert fragment_seconds(fragment.init, data) > 0
    with suppress(ValueError):
        assert fragment_seconds(fragment.init[:place] + junk, fragment.data) > 0


def _outcome(scheduled: float, *times: float, error: str | None = None, label: str = "") -> Outcome:
    """One that was sent and accepted at once, with a second of video in each chunk."""
    return Outcome(
        Ask({}, label),
        scheduled=scheduled,
        sent=scheduled,
        accepted=scheduled,
        ended=times[-1],
        chunks=tuple(Arrived(at, 1.0) for at in times[:-1]),
        video_seconds=float(len(times) - 1),
        error=error,
    )


OUTCOMES = [_outcome(0, 1, 2, 3, 3), _outcome(1, 2, 4, 5, label="a"), _outcome(2, 7, error="timeout", label="a")]


def test_a_report_counts_errors_against_the_goals_and_leaves_them_out_of_the_times() -> None:
    told = report(OUTCOMES, Goals(latency_seconds=3.5, first_chunk_seconds=1.0, startup_seconds=0))
    assert (told.requests, told.completed, told.errors) == (3, 2, {"timeout": 1})
    assert (told.wall_seconds, told.requests_per_second) == (7, 2 / 7)
    assert told.latency is not None
    assert (told.latency.least, told.latency.most) == (3, 4)
    assert told.first_chunk is not None
    assert told.first_chunk.most == 1
    assert told.real_time_factor is not None
    assert told.real_time_factor.most == 1
    assert (told.attained.latency, told.attained.first_chunk, told.attained.both) == (1 / 3, 2 / 3, 1 / 3)
    assert told.viewers is not None
    assert (told.viewers.underruns, told.viewers.without_underrun) == (1, 0.5)
    assert told.viewers.chunk_deadlines_met == pytest.approx(4 / 5)
    assert told.viewers.stall_seconds == pytest.approx(1)
    assert list(told.labels) == ["other", "a"]
    assert told.labels["a"].requests == 2


@checked
@given(st.lists(st.lists(finite, min_size=1, max_size=5), min_size=1, max_size=10))
def test_the_phases_of_a_request_are_all_of_it(requests: list[list[float]]) -> None:
    outcomes = [_outcome(0, *sorted([*times, max(times)])) for times in requests]
    told = report(outcomes)
    assert told.latency is not None
    assert sum(phase.mean for phase in told.phases.values()) == pytest.approx(told.latency.mean, abs=1e-6)


def test_nothing_asked_for_is_no_share() -> None:
    told = report([])
    assert (told.requests, told.latency, told.attained.latency, told.viewers) == (0, None, None, None)
    assert "requests" in load_table(told)


def test_tables_are_whole_whatever_is_in_them() -> None:
    made = table(["a", "b"], [["x|y", "two\nlines"], ["", "1"]])
    head, rule, *rows = made.splitlines()
    assert len({len(line) for line in [head, rule, *rows]}) == 1
    assert rows[0].startswith("| x\\|y | two lines")
    told = load_table(report(OUTCOMES, Goals(latency_seconds=3.5)))
    assert "**a**" in told
    assert "1 x timeout" in told
    assert "33.3 %" in told


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0.0 ms"), (12e-6, "12 µs"), (0.0123, "12.3 ms"), (1.234, "1.23 s"), (123.4, "123 s"), (-0.5, "-500.0 ms")],
)
def test_seconds_have_a_unit_that_fits(value: float, said: str) -> None:
    assert seconds(value) == said


def test_a_spread_says_how_often_it_was_measured() -> None:
    assert spread(Spread.of([1.5])) == "1.5"
    assert spread(Spread.of([1, 2.25, 4])) == "2.25 (1 to 4, of 3)"
    assert spread(Spread.of([1, 2, 4]), time=True) == "2.00 s (1.00 s to 4.00 s, of 3)"


DOCUMENT = (
    "# T\n\n<!-- bench:begin a -->\nold\n<!-- bench:end a -->\nprose\n<!-- bench:begin b -->\n<!-- bench:end b -->\n"
)


def test_a_document_is_filled_between_its_markers_and_nowhere_else() -> None:
    made = filled(DOCUMENT, {"a": "new \\1\n", "b": "text"})
    assert "old" not in made
    assert "<!-- bench:begin a -->\n\nnew \\1\n\n<!-- bench:end a -->\nprose\n" in made
    assert filled(made, {"a": "new \\1", "b": "text"}) == made
    assert filled(DOCUMENT, {}) == DOCUMENT


@pytest.mark.parametrize("document", ["", DOCUMENT + DOCUMENT, DOCUMENT.replace("bench:end a", "bench:end c")])
def test_a_document_without_its_markers_is_left_alone(document: str) -> None:
    with pytest.raises(DocumentError, match="'a'"):
        filled(document, {"a": "new"})


def test_requests_at_once_are_at_zero() -> None:
    assert [arrival.at_seconds for arrival in at_once(asks(3, {}))] == [0, 0, 0]


def test_the_machine_is_named() -> None:
    machine = this_machine()
    assert machine.cpu
    assert machine.cores >= 1
    assert "ray" in machine.versions
    assert machine.revision


def test_the_figures_are_all_there_with_their_bars_and_why_not() -> None:
    measured = [
        Measured(figures.ONE_REQUEST, Spread.of([1.01, 1.02, 1.2]), "33 frames"),
        Measured(figures.FIRST_CHUNK, Spread.of([41.0])),
        Measured(figures.MIXED, None, "no checkpoint was given"),
    ]
    assert [one.kept for one in measured] == [True, False, None]
    rows = figures.figures_table(measured).splitlines()[2:]
    assert len(rows) == len(figures.ALL)
    assert "1.02 (1.01 to 1.2, of 3)" in rows[0]
    assert "33 frames" in rows[0]
    assert "41 ms" in rows[1]
    assert "no checkpoint was given" in "\n".join(rows)
    assert sum("not measured" in row for row in rows) == len(figures.ALL) - 2
    assert json.loads(json.dumps(measured[0].as_json()))["kept"] is True


def test_benchmarks_md_has_a_place_for_every_part_of_a_run() -> None:
    document = (Path(__file__).parents[2] / "BENCHMARKS.md").read_text()
    parts = Results(this_machine()).parts()
    made = filled(document, parts)
    assert filled(made, parts) == made
    assert set(re.findall(r"<!-- bench:begin (\w+) -->", document)) == parts.keys()
    json.loads(Results(this_machine()).as_json())


def test_a_server_that_ends_at_once_is_said_with_its_last_words() -> None:
    with (
        pytest.raises(NotStarted, match=r"http\.server ended with 2.*not-a-port"),
        server(["http.server", "not-a-port"], "http://127.0.0.1:9", "/"),
    ):
        pass


def test_a_server_ends_with_whoever_wanted_it() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    def interrupted() -> None:
        with server(["http.server", str(port), "--bind", "127.0.0.1"], url, "/"):
            assert httpx.get(url).is_success
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_benchmarks_service_is_set_up_as_another_and_keeps_nothing_where_that_does() -> None:
    stages = {"denoiser": {"threads": 2, "provider": "openvino"}, "lease_seconds": 10}
    elsewhere = {"store_url": "postgresql://user@host/name", "artifacts_url": "s3://bucket", "require_keys": True}
    assert settings_of(ServiceConfig.model_validate({**stages, **elsewhere})) == stages
    assert settings_of(ServiceConfig()) == {}


def _page(busy: float, calls: float, rows: float, hits: float) -> str:
    return f"""# TYPE ray_rushes_stage_busy_seconds_total counter
ray_rushes_stage_busy_seconds_total{{model="a",stage="denoiser",ReplicaId="1"}} {busy}
ray_rushes_stage_busy_seconds_total{{model="a",stage="denoiser",ReplicaId="2"}} 1.0
ray_rushes_stage_busy_seconds_total{{model="a",stage="decoder"}} {busy / 2}
# TYPE ray_rushes_stage_call_seconds histogram
ray_rushes_stage_call_seconds_bucket{{stage="denoiser",le="+Inf"}} {calls}
ray_rushes_stage_call_seconds_sum{{stage="denoiser"}} {busy}
ray_rushes_stage_call_seconds_count{{stage="denoiser"}} {calls}
# TYPE ray_rushes_denoiser_batch_rows histogram
ray_rushes_denoiser_batch_rows_sum{{model="a"}} {rows}
ray_rushes_denoiser_batch_rows_count{{model="a"}} {calls}
# TYPE ray_rushes_embeddings_total counter
ray_rushes_embeddings_total{{cache="hit"}} {hits}
ray_rushes_embeddings_total{{cache="miss"}} 3
ray_others_total{{stage="denoiser"}} 7
"""


def test_a_services_own_metrics_are_told_as_what_grew() -> None:
    observed = between(
        counts(_page(2, 10, 20, 0)),
        counts(_page(6, 30, 80, 5)),
        wall_seconds=8,
        completed=4,
        latency_seconds=2.0,
    )
    assert observed.occupancy == {"denoiser": 0.5, "decoder": 0.25}
    assert observed.call_seconds == {"denoiser": 4 / 20}
    assert observed.rows == 3
    assert observed.cached_prompts == 1
    assert observed.by_request == {"denoiser": 1.0, "decoder": 0.5}
    assert observed.rest == pytest.approx(0.5)
    assert "50.0 %" in observed_table(observed)
    assert "500.0 ms are in no engine call" in observed_table(observed)


def test_metrics_that_say_nothing_are_no_error() -> None:
    observed = between({}, {}, wall_seconds=0, completed=0, latency_seconds=None)
    assert (observed.occupancy, observed.rows, observed.rest) == ({}, None, None)
    assert "stage" in observed_table(observed)


def test_diffusers_is_run_in_bf16_where_the_cpu_has_it() -> None:
    assert [variant.name for variant in variants(("avx2", "fma"))] == ["fp32"]
    assert [variant.name for variant in variants(("avx2", "amx_bf16"))] == ["fp32", "bf16"]
