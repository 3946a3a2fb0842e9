"""`/v1/realtime`: an endless video on a causal model, steered over a WebSocket while it is made.

A session lives and dies with its connection, in the replica of the API that has it: nothing of it is in the store, and
nobody else can watch it. What is sent is kept by nobody here; see `serving/pipeline/interactive.py` for what is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketDisconnect

from serving.api.auth import Gate
from serving.api.creation import new_spec
from serving.api.errors import ApiError
from serving.api.models import Catalog
from serving.api.places import Places
from serving.api.realtime_events import (
    ClientEvent,
    FragmentAck,
    PromptChange,
    SessionCreate,
    SessionPause,
    SessionResume,
    SessionSettings,
    SessionStop,
    SessionUpdate,
    error_event,
    event_id_of,
    fragment_event,
    parse_event,
    prompt_said,
    read_event,
    server_event,
)
from serving.config import RealtimeConfig
from serving.jobs.ids import new_id
from serving.jobs.keys import LimitReached
from serving.media.fmp4 import codec_string
from serving.pipeline.interactive import Interaction, LiveStages
from serving.pipeline.stages import OtherBundle
from serving.tracing import beginning, below

_log = logging.getLogger(__name__)

# A browser can't set a header: its key comes as a subprotocol beside this one, as OpenAI's does.
PROTOCOL, KEY_PROTOCOL = "realtime", "rushes-api-key."
_CLOSE_SECONDS = 5.0
# A chunk that is being made when its model goes is waited for so long.
_LAST_CHUNK_SECONDS = 60.0
_NORMAL, _GOING_AWAY, _POLICY, _FAILED, _RESTART, _TRY_LATER = 1000, 1001, 1008, 1011, 1012, 1013
_SAID = {
    "stopped": "The client stopped it.",
    "idle": "The client said nothing for too long.",
    "too_long": "It lasted as long as a session may.",
    "failed": "It failed.",
    "refused": "It was refused.",
    "model_replaced": "Its model was replaced: connect again for a session on the new one.",
    "model_unloaded": "Its model is not served any more.",
}


class _Over(Exception):  # noqa: N818 - not an error
    """The session has ended, for the client to hear why."""

    def __init__(self, reason: str, error: ApiError | None = None, close_code: int = _NORMAL) -> None:
        super().__init__(reason)
        self.reason, self.error, self.close_code = reason, error, close_code


def realtime_router(
    gate: Gate, catalog: Catalog, stages: Mapping[str, LiveStages], settings: RealtimeConfig, places: Places
) -> APIRouter:
    """`stages` are those of the models by name."""
    router = APIRouter()

    @router.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        offered = socket.scope.get("subprotocols") or []
        await socket.accept(subprotocol=PROTOCOL if PROTOCOL in offered else None)
        await _Conversation(socket, gate, catalog, stages, settings, places).run()

    return router


class _Conversation:
    """One connection: at first without a session, then with one until it ends."""

    def __init__(
        self,
        socket: WebSocket,
        gate: Gate,
        catalog: Catalog,
        stages: Mapping[str, LiveStages],
        settings: RealtimeConfig,
        places: Places,
    ) -> None:
        self._socket, self._gate, self._catalog = socket, gate, catalog
        self._stages, self._settings, self._places = stages, settings, places
        self._tasks = asyncio.TaskGroup()
        self._interaction: Interaction | None = None
        self._asked: SessionSettings | None = None
        self._owner: str | None = None
        self._place: str | None = None
        self._heard = asyncio.Event()
        self._withdrawn: _Over | None = None
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Until either side ends it. Whatever the reason, no stage works on it after this."""
        try:
            await self._talk()
        except* _Over as overs:
            # Others may have broken off together with it.
            await self._say_farewell(overs)
        except* (WebSocketDisconnect, RuntimeError):
            pass  # the client is gone: the latter is what sending to it raises then
        except* Exception as unexpected:
            _log.error("an interactive session broke off", exc_info=unexpected)
            failed = ApiError(500, "The service made a mistake; its log says more.")
            await self._say_farewell(BaseExceptionGroup("", [_Over("failed", failed, _FAILED)]))
        finally:
            if self._place is not None:
                await self._places.leave(self._place, self._owner)

    async def _talk(self) -> None:
        async with self._tasks as tasks:
            tasks.create_task(self._admit_and_listen())
            tasks.create_task(self._watch_silence())
            tasks.create_task(self._watch_length())

    async def _admit_and_listen(self) -> None:
        try:
            self._owner = await self._gate.owner_of(_key_of(self._socket))
        except ApiError as error:
            raise _Over("refused", error, _POLICY) from None
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", _NORMAL))
            self._heard.set()
            await self._hear(message.get("text"))

    async def _hear(self, text: str | None) -> None:
        """Do what an event says; what is wrong with it is answered, and the session goes on."""
        values: Any = None
        try:
            if text is None:
                raise ApiError(400, "Events are JSON in text messages, not bytes.", code="invalid_type")
            values = read_event(text)
            await self._do(parse_event(values))
        except ApiError as error:
            await self._send(error_event(error, event_id_of(values)))
        except LimitReached as limit:
            refused = ApiError(429, limit.message, code="rate_limit_exceeded")
            await self._send(error_event(refused, event_id_of(values)))
            raise _Over("refused", close_code=_TRY_LATER) from None

    async def _do(self, event: ClientEvent) -> None:
        if isinstance(event, SessionCreate):
            await self._create(event.session)
            return
        interaction = self._interaction
        if interaction is None:
            raise ApiError(400, "There is no session yet: session.create is first.", param="type", code="no_session")
        match event:
            case SessionUpdate(session=change):
                await self._change_prompt(interaction, change)
            case SessionPause():
                interaction.pause()
                await self._send(server_event("session.paused"))
            case SessionResume():
                interaction.resume()
                await self._send(server_event("session.resumed"))
            case SessionStop():
                raise _Over("stopped")
            case FragmentAck(index=index):
                with _refused("index"):
                    interaction.acknowledge(index)

    async def _create(self, asked: SessionSettings) -> None:
        if self._interaction is not None:
            raise ApiError(400, "This connection has a session already.", param="type", code="session_exists")
        with _named():
            spec = new_spec(asked.as_request(), self._catalog)
            model, manifest = self._catalog.resolve(asked.model)
        if manifest.rollout != "causal" or model not in self._stages:
            message = f"{model} is {manifest.rollout}: an interactive session needs a causal model."
            raise ApiError(400, message, param="session.model", code="model_not_causal")
        if asked.decoder is None and manifest.tiny_decoder is not None:
            spec = replace(spec, decoder="tiny")  # what is watched live had better be in time
        session_id = new_id("sess_")
        await self._places.take(session_id, model, self._owner)
        self._place = session_id
        if self._owner is not None:
            self._tasks.create_task(self._watch_key(session_id, self._owner))
        interaction = Interaction(
            session_id, manifest, spec, self._stages[model], buffer_seconds=self._settings.buffer_seconds
        )
        with below(session_id, "prompt"):
            prompt = await interaction.begin()
        self._interaction, self._asked = interaction, asked
        about = {
            "id": interaction.id,
            "object": "realtime.session",
            "model": model,
            "size": f"{spec.width}x{spec.height}",
            "fps": manifest.fps,
            "seed": spec.seed,
            "negative_prompt": spec.negative_prompt,
            "num_inference_steps": spec.num_inference_steps,
            "guidance_scale": spec.guidance_scale,
            "rewrite_prompt": spec.rewrite_prompt,
            "idle_seconds": self._settings.idle_seconds,
            "max_seconds": self._settings.max_seconds,
            "buffer_seconds": self._settings.buffer_seconds,
        }
        await self._send(server_event("session.created", session=about | prompt_said(prompt)))
        self._tasks.create_task(self._make(interaction, model, manifest.fps))
        self._tasks.create_task(self._watch_model(interaction, model))

    async def _change_prompt(self, interaction: Interaction, change: PromptChange) -> None:
        assert self._asked is not None
        with _named():
            new_spec(self._asked.model_copy(update={"prompt": change.prompt}).as_request(), self._catalog)
        with _refused("session.prompt"), below(interaction.id, "prompt"):
            prompt = await interaction.change_prompt(change.prompt)
        await self._send(server_event("session.updated", session={"id": interaction.id, **prompt_said(prompt)}))

    async def _make(self, interaction: Interaction, model: str, fps: int) -> None:
        with beginning(interaction.id, self._socket.headers, "WS /v1/realtime", model=model):
            await self._send_all(interaction, fps)

    async def _send_all(self, interaction: Interaction, fps: int) -> None:
        begun = False
        async with aclosing(interaction.fragments()) as fragments:
            while True:
                try:
                    live = await anext(fragments)
                except StopAsyncIteration:
                    assert self._withdrawn is not None
                    raise self._withdrawn from None
                except OtherBundle:
                    raise _Over("model_replaced", close_code=_RESTART) from None
                except Exception as error:
                    _log.error("%s: the session failed", interaction.id, exc_info=error)
                    said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                    failed = ApiError(500, f"The session failed: {said[:500]}", code="generation_failed")
                    raise _Over("failed", failed, _FAILED) from error
                if not begun:
                    init = live.fragment.init
                    mime = f'video/mp4; codecs="{codec_string(init)}"'
                    await self._send(server_event("init", mime=mime, bytes=len(init)), init)
                    begun = True
                await self._send(fragment_event(live, fps), live.fragment.data)

    async def _watch_silence(self) -> None:
        while True:
            self._heard.clear()
            try:
                async with asyncio.timeout(self._settings.idle_seconds):
                    await self._heard.wait()
            except TimeoutError:
                raise _Over("idle") from None

    async def _watch_model(self, interaction: Interaction, model: str) -> None:
        why = await self._places.withdrawal(model)
        self._withdrawn = _Over(why, close_code=_RESTART if why == "model_replaced" else _GOING_AWAY)
        interaction.finish()
        await asyncio.sleep(_LAST_CHUNK_SECONDS)
        raise self._withdrawn

    async def _watch_key(self, session_id: str, owner: str) -> None:
        await self._places.keep(session_id, owner)
        revoked = ApiError(401, "This API key was revoked.", code="invalid_api_key")
        raise _Over("refused", revoked, _POLICY)

    async def _watch_length(self) -> None:
        await asyncio.sleep(self._settings.max_seconds)
        raise _Over("too_long")

    async def _send(self, event: Mapping[str, Any], data: bytes | None = None) -> None:
        """`data` is the very next message."""
        async with self._sending:
            await self._socket.send_json(event)
            if data is not None:
                await self._socket.send_bytes(data)

    async def _say_farewell(self, overs: BaseExceptionGroup[_Over]) -> None:
        over: BaseException = overs
        while isinstance(over, BaseExceptionGroup):
            over = over.exceptions[0]
        assert isinstance(over, _Over)
        with suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
            # A client that reads nothing hears nothing.
            async with asyncio.timeout(_CLOSE_SECONDS):
                if over.error is not None:
                    await self._socket.send_json(error_event(over.error))
                await self._socket.send_json(
                    server_event("session.ended", reason=over.reason, message=_SAID[over.reason])
                )
                await self._socket.close(over.close_code, over.reason)


def _key_of(socket: WebSocket) -> str:
    """The API key, in a header or among the subprotocols; empty when there is none."""
    scheme, _, secret = socket.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return secret.strip()
    offered = socket.scope.get("subprotocols") or []
    return next((name.removeprefix(KEY_PROTOCOL) for name in offered if name.startswith(KEY_PROTOCOL)), "")


@contextmanager
def _named() -> Iterator[None]:
    """What is wrong with the settings is wrong inside `session`."""
    try:
        yield
    except ApiError as error:
        param = None if error.param is None else f"session.{error.param}"
        raise ApiError(error.status, error.message, param=param, code=error.code) from None


@contextmanager
def _refused(param: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ApiError(400, f"{param} can't be used: {error}.", param=param, code="invalid_value") from None
