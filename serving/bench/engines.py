"""Each engine alone at a request's shapes, and what a whole request takes at the least: `rushes bench engines`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from models.bundle import Bundle
from serving.bench.asks import PROMPTS
from serving.bench.calls import Call, Engines, VideoCalls, replay
from serving.bench.statistics import Spread
from serving.bench.tables import seconds, spread, table
from serving.config import ServiceConfig
from serving.engines.opening import provider_here
from serving.media.fmp4 import encode_fragment
from serving.pipeline.request import decoders_of, make_spec
from serving.pipeline.stages import DecoderName, VideoSpec

ROWS = (1, 2, 3, 4, 5, 6, 7, 8)
_LEAST_TIMES, _MOST_TIMES, _BUDGET_SECONDS = 3, 50, 0.5
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Timed:
    """One kind of call, and what one such call takes in seconds."""

    what: str
    rows: int
    seconds: Spread


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """What a bundle's engines take alone. `whole` and `first_chunk` are of one video without anything beside the
    engines; `real_time_factor` is how many seconds of video they make in a second."""

    bundle: str
    spec: str
    providers: str
    causal: bool
    calls: tuple[Timed, ...]
    encode: Spread
    first_chunk: Spread
    whole: Spread
    real_time_factor: Spread

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def decoder_of(bundle: Bundle) -> DecoderName:
    """A stream's: what a live session has."""
    return decoders_of(bundle.manifest)[-1] if bundle.manifest.rollout == "causal" else "full"


def default_spec(bundle: Bundle, **settings: Any) -> VideoSpec:
    """A request of the model's defaults but for `settings` and the decoder, with a seed, and its prompt as it is."""
    rewrite = None if bundle.manifest.rewriter is None else False
    settings = {"decoder": decoder_of(bundle), **settings}
    return make_spec(bundle.manifest, PROMPTS[0], seed=0, rewrite_prompt=rewrite, **settings)


def time_engines(
    bundle: Bundle,
    spec: VideoSpec,
    config: ServiceConfig,
    *,
    rows: Sequence[int] = ROWS,
    times: int = 3,
    say: Say = print,
) -> EngineTimes:
    """Raises `EngineError`. `times` is how often the whole request is replayed."""
    say(f"recording what {bundle.manifest.name} takes for {describe(spec)}")
    engines = Engines(bundle, config)
    video = asyncio.run(engines.record(spec))
    calls: list[Timed] = []
    for what, call, counts in _kinds(video, rows):
        for count in counts:
            say(f"{what}, {count} row{'s' if count > 1 else ''}")
            calls.append(Timed(what, count, timed(call.with_rows(count).run if count > 1 else call.run)))
    say("encoding to H.264")
    frames, fps = video.chunks[-1].frames, bundle.manifest.fps
    encode = timed(lambda: _seconds(lambda: encode_fragment(frames, fps=fps, index=0, first_frame=0)))
    ends = []
    for number in range(times):
        say(f"replaying a whole request, {number + 1} of {times}")
        ends.append(replay(video))
    return EngineTimes(
        bundle=bundle.manifest.name,
        spec=describe(spec),
        providers=providers(config),
        causal=bundle.manifest.rollout == "causal",
        calls=tuple(calls),
        encode=encode,
        first_chunk=Spread.of([end[0] for end in ends]),
        whole=Spread.of([end[-1] for end in ends]),
        real_time_factor=Spread.of([video.seconds / end[-1] for end in ends]),
    )


def timed(run: Callable[[], float]) -> Spread:
    """Of several runs after one that isn't counted: three at the least, and as many as go into half a second."""
    run()
    taken: list[float] = []
    while len(taken) < _LEAST_TIMES or (sum(taken) < _BUDGET_SECONDS and len(taken) < _MOST_TIMES):
        taken.append(run())
    return Spread.of(taken)


def engines_table(times: EngineTimes) -> str:
    rows = [
        (one.what, str(one.rows), spread(one.seconds, time=True), seconds(one.seconds.median / one.rows))
        for one in times.calls
    ]
    rows.append(("a chunk to H.264", "1", spread(times.encode, time=True), seconds(times.encode.median)))
    whole = [
        ("first chunk: text, its steps, its decoding", spread(times.first_chunk, time=True)),
        ("whole video, decoding beside denoising", spread(times.whole, time=True)),
        ("seconds of video made in a second", spread(times.real_time_factor)),
    ]
    return "\n\n".join(
        [
            f"`{times.bundle}`, {times.spec}, {times.providers}:",
            table(["call", "rows", "takes", "a row"], rows),
            table(["engines alone, one request", "takes"], whole),
        ]
    )


def describe(spec: VideoSpec) -> str:
    guided = f"guidance {spec.guidance_scale:g}" if spec.guidance_scale > 1 else "no guidance"
    said = f"{spec.frames} frames of {spec.width}x{spec.height}, {spec.num_inference_steps} steps, {guided}"
    return said if spec.decoder == "full" else f"{said}, {spec.decoder} decoder"


def providers(config: ServiceConfig) -> str:
    """What runs the stages, and with how many threads."""
    stages = {"text encoder": config.text_encoder, "denoiser": config.denoiser, "decoder": config.decoder}
    said = {
        name: f"{provider_here(stage.provider)} with {stage.threads} thread{'s' if stage.threads > 1 else ''}"
        for name, stage in stages.items()
    }
    if len(set(said.values())) == 1:
        return f"{next(iter(said.values()))} in each stage"
    return ", ".join(f"{name} on {how}" for name, how in said.items())


def _kinds(video: VideoCalls, rows: Sequence[int]) -> Iterable[tuple[str, Call, Sequence[int]]]:
    """Each kind of call of a request once, and for how many rows it is timed: only the denoiser's are batched."""
    yield "encode a prompt", video.text[0], (1,)
    # The last call: a causal model's cache is full by then.
    last = [call for chunk in video.chunks for call in chunk.denoise][-1]
    names = dict.fromkeys(call.graph for chunk in video.chunks for call in chunk.denoise)
    for name in names:
        call = next(c for chunk in reversed(video.chunks) for c in reversed(chunk.denoise) if c.graph == name)
        shape = "x".join(str(side) for side in last.feeds["latents"].shape[2:])
        yield f"{name.replace('_', ' ')} step, latents {shape}", call, rows
    decodes = [call for chunk in video.chunks for call in chunk.decode]
    for call in decodes[:2]:
        count = call.feeds["latents"].shape[2]
        which = "first" if call.graph.endswith("_first") else "next"
        yield f"decode the {which} {count} latent frame{'s' if count > 1 else ''}", call, (1,)
    if len(video.chunks) > 1:
        call = video.chunks[1].decode[0]
        yield f"decode a later chunk, {call.feeds['latents'].shape[2]} latent frames", call, (1,)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
