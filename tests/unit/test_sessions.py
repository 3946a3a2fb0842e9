"""What a causal session asks of the engine, call after call; the engine here is arithmetic (tests/arithmetic.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from arithmetic import MANIFEST, outputs, text

from models.bundle import AdapterInfo, GraphInfo, ImageInfo, Manifest, NamedLoraInfo, SamplerInfo, TensorInfo
from serving.engines.engine import Array
from serving.pipeline.geometry import chunk_from, first_frame
from serving.pipeline.request import make_spec
from serving.pipeline.sessions import Session, open_session, skipped_steps
from serving.pipeline.shortcuts import GUIDANCE_CACHES, GuidanceCache
from serving.pipeline.sources import GOES_ON_STRENGTH, PICTURE_STRENGTH
from serving.pipeline.stages import DenoiseRequest, EncodedSource, LatentChunk


def request(**asked: Any) -> DenoiseRequest:
    return DenoiseRequest("video", make_spec(MANIFEST, "a ball", **{"seed": 7, **asked}), text(1), text(-1))


def calls(session: Session, scale: float = 0.1) -> Iterator[tuple[dict[str, Array], list[LatentChunk]]]:
    while session.calls_done < session.calls:
        left = session.rows_left - session.rows
        feeds = {name: array.copy() for name, array in session.feeds().items()}
        yield feeds, session.take(outputs(feeds, scale))
        assert session.rows_left == left
    assert left == 0


def test_each_chunk_is_denoised_shown_and_then_seen_clean() -> None:
    session = open_session(MANIFEST, request(seconds=2))
    assert (session.chunks, session.calls) == (3, 8)
    made = list(calls(session))
    first_step, second_step = (float(t) for t in (1000, 1000 * 0.75))
    assert [float(feeds["timestep"][0]) for feeds, _ in made] == [
        *[first_step, second_step, 0] * 2,
        *[first_step, second_step],
    ]
    assert [int(feeds["write_index"][0]) for feeds, _ in made] == [0, 0, 0, 1, 1, 1, 2, 2]
    shown = [(call, chunk.index, chunk.last) for call, (_, chunks) in enumerate(made) for chunk in chunks]
    assert shown == [(1, 0, False), (4, 1, False), (7, 2, True)]
    for call in (1, 4):
        np.testing.assert_array_equal(made[call + 1][0]["latents"][0], made[call][1][0].latents)


def test_the_cache_holds_the_sink_and_the_window_of_every_row() -> None:
    session = open_session(MANIFEST, request(seconds=5, guidance_scale=2.0))
    remembered: dict[int, Array] = {}
    for feeds, _ in calls(session):
        chunk = int(feeds["write_index"][0])
        # What the noisy passes gave was not kept: within a chunk nothing changes.
        np.testing.assert_array_equal(feeds["cache"], remembered.setdefault(chunk, feeds["cache"]))
    assert len(remembered) == 7
    for chunk, cache in remembered.items():
        for row in (0, 1):
            held = sorted({int(value) for value in np.unique(cache[row]) if value})
            assert held == [1 + past + 100 * row for past in MANIFEST.window.remembered(chunk)]
            assert cache.shape[3] == 9


def test_noise_depends_on_seed_chunk_and_step_alone() -> None:
    """So a chunk can be made again, later and elsewhere, from the cache alone."""

    def noises(scale: float, **asked: Any) -> list[Array]:
        return [
            feeds["latents"][0]
            for feeds, _ in calls(open_session(MANIFEST, request(seconds=3, **asked)), scale)
            if feeds["timestep"][0] == 1000
        ]

    first, second = noises(0.1), noises(5.0)
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left, right)
    whole = [noise for noise in first if noise.shape == first[0].shape]
    assert len({noise.tobytes() for noise in whole}) == len(whole) > 3
    assert abs(np.corrcoef(whole[0].ravel(), whole[1].ravel())[0, 1]) < 0.2
    assert not np.array_equal(first[0], noises(0.1, seed=8)[0])


def test_a_longer_video_begins_as_a_shorter_one_and_no_call_is_larger() -> None:
    def shown(seconds: int) -> list[bytes]:
        return [c.latents.tobytes() for _, cs in calls(open_session(MANIFEST, request(seconds=seconds))) for c in cs]

    short, long = shown(2), shown(60)
    assert long[: len(short)] == short
    session = open_session(MANIFEST, request(seconds=3600))
    sizes = {name: array.nbytes for name, array in session.feeds().items()}
    for n, (feeds, _) in enumerate(calls(session)):
        assert {name: array.nbytes for name, array in feeds.items()} == sizes
        if n == 60:
            break


def test_the_last_chunk_may_be_short() -> None:
    session = open_session(MANIFEST, request(seconds=1))
    assert session.tokens_per_row == 3 * 4
    frames = [feeds["latents"].shape[2] for feeds, _ in calls(session)]
    assert frames == [3, 3, 3, 2, 2]
    assert session.tokens_per_row == 2 * 4


def test_the_prompt_changes_between_chunks_and_the_negative_one_does_not() -> None:
    # Chunks begin at frame 0, 9, 21, 33 … of 16 a second.
    scenes = ((33 / 16, text(3)), (0.1, text(2)), (99.0, text(4)))
    session = open_session(MANIFEST, replace(request(seconds=4, guidance_scale=2.0), scenes=scenes))
    for feeds, _ in calls(session):
        chunk = int(feeds["write_index"][0])
        expected = 1 if chunk < 1 else 2 if chunk < 3 else 3
        assert np.unique(feeds["encoder_hidden_states"][0]) == [expected]
        assert np.unique(feeds["encoder_hidden_states"][1]) == [-1]


def test_a_scene_begins_with_the_first_chunk_that_begins_in_it() -> None:
    for fps in (16, 24, 30):
        manifest = MANIFEST.model_copy(update={"fps": fps})
        for chunk in range(1, 200):
            start = first_frame(manifest, chunk)
            assert chunk_from(manifest, start / fps) == chunk
            assert chunk_from(manifest, (start - 0.5) / fps) == chunk
            assert chunk_from(manifest, (start + 0.5) / fps) == chunk + 1
    assert [chunk_from(MANIFEST, seconds) for seconds in (0, 0.001, 1 / 16)] == [0, 1, 1]


def test_what_a_rollout_cannot_do_is_refused() -> None:
    both_ways = MANIFEST.model_copy(update={"rollout": "bidirectional", "causal": None})
    with pytest.raises(ValueError, match="its prompt can't change"):
        open_session(both_ways, replace(request(), scenes=((1.0, text(2)),)))
    with pytest.raises(ValueError, match="no context window"):
        _ = both_ways.window
    with pytest.raises(ValueError, match="unconditional embedding"):
        open_session(MANIFEST, replace(request(guidance_scale=2.0), unconditional=None))


WHOLE = MANIFEST.model_copy(
    update={
        "rollout": "bidirectional",
        "causal": None,
        "sampler": SamplerInfo(name="unipc", shift=3.0, num_inference_steps=8, guidance_scale=2.0),
    }
)


def begun(
    manifest: Manifest, frames: int, *, strength: float | None = None, seconds: int = 2, value: float = 0.5
) -> DenoiseRequest:
    """A request for 33 frames (9 latent ones) that begins from so many, each of one value: `value` plus its number."""
    spec = make_spec(manifest, "a ball", seconds=seconds, seed=7, num_inference_steps=8)
    spec = replace(spec, source="videos/a/source", source_frames=1 + 4 * (frames - 1), strength=strength)
    source = np.full((4, frames, 4, 4), value, np.float32) + np.arange(frames, dtype=np.float32)[:, None, None]
    return DenoiseRequest("video", spec, text(1), text(-1), source=EncodedSource(source))


@pytest.mark.parametrize("manifest", [MANIFEST, WHOLE], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("given", [1, 3, 4, 8])
def test_given_frames_stay_as_they_are_and_the_rest_is_made(manifest: Manifest, given: int) -> None:
    asked = begun(manifest, given)
    session, plain = open_session(manifest, asked), open_session(manifest, replace(asked, source=None))
    expected = session.calls
    made = list(calls(session))
    assert len(made) == expected == session.calls_done
    assert asked.source is not None
    latents = np.concatenate([chunk.latents for _, chunks in made for chunk in chunks], axis=1)
    assert latents.shape == (4, 9, 4, 4)
    np.testing.assert_array_equal(latents[:, :given], asked.source.latents)
    # A given chunk takes one call: the one that the chunks after it look back on.
    saved = 8 * (given // 3)
    if manifest.rollout == "bidirectional":
        saved = skipped_steps(8, GOES_ON_STRENGTH if given > 1 else PICTURE_STRENGTH)
    assert plain.calls - expected == saved
    indices = [chunk.index for _, chunks in made for chunk in chunks]
    assert indices == [0, 1, 2]
    assert made[-1][1][-1].last


@pytest.mark.parametrize("manifest", [MANIFEST, WHOLE], ids=["causal", "bidirectional"])
def test_given_frames_are_seen_at_the_noise_level_of_the_step(manifest: Manifest) -> None:
    asked = begun(manifest, 4)
    for feeds, _ in calls(open_session(manifest, asked)):
        # UniPC asks the model at whole timesteps below the sigma that the latents have.
        sigma = float(feeds["timestep"][0]) / 1000
        if manifest.rollout == "causal" and int(feeds["write_index"][0]) == 0:
            assert sigma == 0
            np.testing.assert_array_equal(feeds["latents"][0].mean((0, 2, 3)), [0.5, 1.5, 2.5])
        elif manifest.rollout == "bidirectional":
            given = feeds["latents"][0, :, :4]
            mean = (1 - sigma) * (0.5 + np.arange(4))
            np.testing.assert_allclose(given.mean((0, 2, 3)), mean, atol=3 * sigma / 8 + 0.01)


def test_a_continuation_begins_near_the_last_frame_that_is_given() -> None:
    first = open_session(WHOLE, begun(WHOLE, 4, value=9.0)).feeds()
    sigma = float(first["timestep"][0]) / 1000
    assert sigma < 0.9
    mean = (1 - sigma) * (9.0 + np.minimum(np.arange(9), 3))
    np.testing.assert_allclose(first["latents"][0].mean((0, 2, 3)), mean, atol=3 * sigma / 8 + 0.01)


@pytest.mark.parametrize("manifest", [MANIFEST, WHOLE], ids=["causal", "bidirectional"])
def test_a_draft_begins_at_its_noise_level(manifest: Manifest) -> None:
    session = open_session(manifest, begun(manifest, 9, strength=0.5))
    first = session.feeds()
    # Four of eight steps are left; with the shift of 3, half of the way is a noise level of 0.75.
    assert float(first["timestep"][0]) == pytest.approx(750, abs=1)
    assert session.calls == (3 * 5 - 1 if manifest.rollout == "causal" else 4)
    shown = first["latents"].shape[2]
    np.testing.assert_allclose(first["latents"][0].mean((0, 2, 3)), 0.25 * (0.5 + np.arange(shown)), atol=3 * 0.75 / 8)
    nothing_kept = open_session(manifest, begun(manifest, 9, strength=1.0, value=9.0)).feeds()["latents"]
    from_noise = open_session(manifest, replace(begun(manifest, 9), source=None)).feeds()["latents"]
    np.testing.assert_allclose(nothing_kept, from_noise, atol=1e-4)


def test_a_draft_always_has_a_step() -> None:
    assert [skipped_steps(20, strength) for strength in (1.0, 0.75, 0.5, 0.01)] == [0, 5, 10, 19]
    assert skipped_steps(1, 0.5) == 0


def test_a_source_that_does_not_fit_is_refused() -> None:
    for asked, said in (
        (begun(WHOLE, 9), "none is left to make"),
        (begun(WHOLE, 8, strength=0.5), "a draft has 8 latent frames, the video 9"),
        (
            replace(begun(WHOLE, 1), source=EncodedSource(np.zeros((4, 1, 4, 6), np.float32))),
            "the source's latents are",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            open_session(WHOLE, asked)


def by_frame(manifest: Manifest) -> Manifest:
    """As TI2V-5B: the denoiser takes a timestep for each latent frame."""
    timestep = TensorInfo(name="timestep", dtype="float32", shape=("batch", "frames"))
    return manifest.model_copy(update={"graphs": {"denoiser": GraphInfo(file="d", inputs=(timestep,), outputs=())}})


def test_a_picture_is_clean_and_at_timestep_0_where_the_model_knows_it_so() -> None:
    manifest = by_frame(WHOLE)
    asked = begun(manifest, 1)
    assert asked.source is not None
    session = open_session(manifest, asked)
    for feeds, _ in calls(session):
        assert feeds["timestep"].shape == feeds["latents"].shape[:1] + feeds["latents"].shape[2:3]
        assert not feeds["timestep"][:, 0].any()
        assert feeds["timestep"][:, 1:].all()
        np.testing.assert_array_equal(feeds["latents"][0, :, :1], asked.source.latents)
    plain = open_session(manifest, replace(asked, source=None))
    assert plain.feeds()["timestep"].all()


def paired(seconds: int, patch_frames: int) -> tuple[Session, list[LatentChunk], np.ndarray]:
    """As CogVideoX: chunks are pairs of latent frames behind a first one, and perhaps so are the patches."""
    latent = MANIFEST.latent.model_copy(update={"group": 2, "patch_frames": patch_frames})
    manifest = Manifest.model_validate(
        WHOLE.model_dump() | {"latent": latent.model_dump(), "chunk_latent_frames": 2, "fps": 8}
    )
    spec = make_spec(manifest, "a ball", seed=7, seconds=seconds, guidance_scale=1.0)
    session = open_session(manifest, DenoiseRequest("video", spec, text(1), None))
    made = [(feeds["latents"], chunks) for feeds, chunks in calls(session)]
    assert [first_frame(manifest, index) for index in range(3)] == [0, 9, 17]
    return session, made[-1][1], made[-1][0]


@pytest.mark.parametrize("patch_frames", [1, 2])
def test_chunks_of_pairs_begin_with_one_frame_more(patch_frames: int) -> None:
    session, chunks, seen = paired(3, patch_frames)
    assert [chunk.latents.shape[1] for chunk in chunks] == [3, 2, 2]
    assert session.chunks == 3
    # What is added to fill the patches comes first, and is not shown.
    assert seen.shape[2] == 7 + patch_frames - 1
    together = np.concatenate([chunk.latents for chunk in chunks], axis=1)
    assert np.abs(np.corrcoef(together.ravel(), seen[0, :, patch_frames - 1 :].ravel())[0, 1]) > 0.99


PICTURED = WHOLE.model_copy(
    update={
        "graphs": {
            "denoiser": GraphInfo(
                file="denoiser.onnx",
                inputs=tuple(
                    TensorInfo(name=name, dtype="float32", shape=("batch",))
                    for name in ("latents", "condition", "image_hidden_states", "lora_scales")
                ),
                outputs=(),
            )
        },
        "image": ImageInfo(side=32),
        "loras": tuple(
            NamedLoraInfo(name=name, files=(AdapterInfo(name="f", sha256="0" * 64, scale=1),)) for name in ("a", "b")
        ),
    }
)


@pytest.mark.parametrize("guidance_cache", GUIDANCE_CACHES)
def test_a_picture_is_seen_as_channels_in_every_row_and_nothing_of_it_is_put_into_the_latents(
    guidance_cache: GuidanceCache,
) -> None:
    asked = begun(PICTURED, 9)
    source = replace(asked.source or EncodedSource(np.zeros(0, np.float32)), hidden_states=np.ones((5, 4), np.float32))
    asked = replace(asked, source=source, spec=replace(asked.spec, source_frames=1, lora=(("b", 0.5),)))
    asked = replace(asked, spec=replace(asked.spec, guidance_cache=guidance_cache))
    session = open_session(PICTURED, asked)
    plain = open_session(WHOLE, replace(asked, source=None, spec=replace(asked.spec, lora=())))
    assert session.calls == plain.calls
    seen: list[int] = []
    for (feeds, _), (bare, _) in zip(calls(session), calls(plain), strict=True):
        np.testing.assert_array_equal(feeds["latents"], bare["latents"])
        assert feeds.keys() - bare.keys() == {"condition", "image_hidden_states", "lora_scales"}
        rows = len(feeds["latents"])
        seen.append(rows)
        for row in range(rows):
            np.testing.assert_array_equal(feeds["condition"][row, :4, :, 0, 0], [[1] + [0] * 8] * 4)
            np.testing.assert_array_equal(feeds["condition"][row, 4:], source.latents)
        np.testing.assert_array_equal(feeds["image_hidden_states"], np.ones((rows, 5, 4)))
        np.testing.assert_array_equal(feeds["lora_scales"], [[0, 0.5]] * rows)
    assert seen == ([2, *[2, 1] * 4] if guidance_cache == "alternate" else [2] * 8)[: len(seen)]


def test_what_no_picture_can_be_made_of_is_refused() -> None:
    whole = begun(PICTURED, 9)
    for wrong, said in (
        (replace(whole, source=None), "a video of one picture, and of nothing else"),
        (begun(PICTURED, 1), "a video of one picture"),
        (begun(PICTURED, 9, strength=0.5), "a video of one picture"),
        (replace(whole, spec=replace(whole.spec, source_frames=1)), "the picture's hidden states"),
    ):
        with pytest.raises(ValueError, match=said):
            open_session(PICTURED, wrong)
    with pytest.raises(ValueError, match="tiny has no LoRA 'c'"):
        open_session(WHOLE, replace(begun(WHOLE, 4), spec=replace(begun(WHOLE, 4).spec, lora=(("c", 1.0),))))
