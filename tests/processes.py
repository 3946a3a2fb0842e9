"""Which tests share a process of pytest-xdist: those of a file, and all that start services with Ray."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

_SERVICES = ("tests/e2e/", "tests/faults/")


class OneServiceAtATime(LoadFileScheduling):
    """Two services at once would have a dozen processes a core, and take several times as long to start."""

    def remove_node(self, node: WorkerController) -> str | None:
        """A test whose process died has failed. It would be tried again, and that process die too."""
        for tests in self.assigned_work[node].values():
            for test, is_done in tests.items():
                if not is_done:
                    tests[test] = True
                    super().remove_node(node)
                    return str(test)
        return super().remove_node(node)  # type: ignore[no-any-return]

    def _split_scope(self, nodeid: str) -> str:
        return "services" if nodeid.startswith(_SERVICES) else str(super()._split_scope(nodeid))
