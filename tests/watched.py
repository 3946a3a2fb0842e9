"""An engine whose calls a test sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from serving.engines.engine import Array, Engine


class Watched:
    """An engine that calls `before` with the feeds of every call; what it raises is raised as the engine's."""

    def __init__(self, engine: Engine, before: Callable[[Mapping[str, Array]], None]) -> None:
        self._engine, self._before = engine, before
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self._before(feeds)
        return self._engine.run(feeds)
