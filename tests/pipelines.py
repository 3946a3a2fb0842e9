"""Pipelines over engines that a process opens once: opening a bundle's takes longer than making most tests' videos."""

from __future__ import annotations

import asyncio
from functools import cache
from pathlib import Path
from typing import Any

from models.bundle import Bundle, GraphName
from serving.engines.engine import Engine
from serving.engines.opening import Opener
from serving.pipeline.captioning import EngineCaptioner
from serving.pipeline.decoding import EngineDecoder
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.encoding import EngineEncoder
from serving.pipeline.local import LocalPipeline
from serving.pipeline.request import make_spec
from serving.pipeline.rewriting import OnnxRewriter
from serving.pipeline.stages import DenoiseRequest, Fragment, VideoSpec
from serving.pipeline.text import EngineTextEncoder

PROMPT = "a red ball bouncing on a sand floor at sunset"


@cache
def _engine(root: Path, digest: str, graph: GraphName) -> Engine:
    return Opener(Bundle.load(root, digest)).open(graph)[0]


def opened_pipeline(bundle: Bundle) -> LocalPipeline:
    """As `LocalPipeline.open`: stages of its own, which end with it, over engines that aren't. They keep nothing, and
    ONNX Runtime lets several threads run one."""

    def engines(*graphs: GraphName) -> list[Engine]:
        return [_engine(bundle.root, bundle.digest, graph) for graph in graphs]

    manifest = bundle.manifest
    (text,) = engines("text_encoder")
    denoiser, *second = engines("denoiser", *(["denoiser_2"] if manifest.experts else []))
    first, following = engines("decoder_first", "decoder_next")
    tiny = engines("tiny_decoder_first", "tiny_decoder_next") if manifest.tiny_decoder else None
    rewriter = captioner = encoder = None
    if manifest.rewriter is not None:
        words = engines("rewriter_encoder", "rewriter_decoder")
        rewriter = OnnxRewriter(words[0], words[1], manifest.rewriter, manifest.limits.max_prompt_characters)
    if manifest.captioner is not None:
        words = engines("captioner_encoder", "captioner_decoder")
        captioner = EngineCaptioner(words[0], words[1], manifest.captioner)
    if manifest.encodes:
        frames = engines("encoder_first", "encoder_next")
        image = engines("image_encoder")[0] if manifest.image is not None else None
        encoder = EngineEncoder(frames[0], frames[1], manifest, image)
    return LocalPipeline(
        bundle,
        EngineTextEncoder(text, bundle.tokenizer, manifest.text),
        EngineDenoiser(denoiser, manifest, second=second[0] if second else None),
        EngineDecoder((first, following), manifest, tiny=(tiny[0], tiny[1]) if tiny else None),
        rewriter,
        captioner,
        encoder,
    )


def small_spec(bundle: Bundle, prompt: str = PROMPT, **asked: Any) -> VideoSpec:
    """Of a video that is soon made, the same every time: as small as may be, and of the prompt as it is."""
    side = bundle.manifest.limits.min_side
    defaults = {"seed": 7, "num_inference_steps": 3, "size": f"{side}x{side}", "rewrite_prompt": False}
    return make_spec(bundle.manifest, prompt, **{**defaults, **asked})


async def request_of(pipeline: LocalPipeline, spec: VideoSpec, video_id: str = "video") -> DenoiseRequest:
    """With both texts, whether its guidance needs them or not."""
    encode = pipeline.text_encoder.encode
    return DenoiseRequest(video_id, spec, await encode(spec.prompt), await encode(spec.negative_prompt))


async def fragments_of(pipeline: LocalPipeline, spec: VideoSpec) -> list[Fragment]:
    """In the order in which they come out."""
    fragments: list[Fragment] = []

    async def sink(fragment: Fragment) -> None:
        fragments.append(fragment)

    await pipeline.generate(spec, sink)
    return fragments


def idle(pipeline: LocalPipeline) -> bool:
    """Whether no video holds memory in it."""
    return pipeline.denoiser.sessions == 0 and pipeline.decoder.sessions == 0


def made_alone(bundle: Bundle, asked: dict[str, Any]) -> list[Fragment]:
    """What one process without Ray makes of a request."""

    async def make() -> list[Fragment]:
        settings = dict(asked)
        async with opened_pipeline(bundle) as pipeline:
            return await fragments_of(pipeline, make_spec(bundle.manifest, settings.pop("prompt"), **settings))

    return asyncio.run(make())


def as_stream(made: list[Fragment]) -> bytes:
    """The bytes that a viewer gets of it."""
    return made[0].init + b"".join(fragment.data for fragment in made)
