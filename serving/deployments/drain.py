"""What a pod does before it is ended: `python -m serving.deployments.drain SECONDS`, as Kubernetes' preStop hook.

Ray is told that this node goes. Ray Serve then starts its replicas elsewhere and ends those here when what they have in
hand is finished; Kubernetes would end them in the middle of it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# What Ray calls the processes of Serve's replicas.
_REPLICA = b"ray::ServeReplica:"
_LOOK_SECONDS = 1.0


def replicas_here(processes: Path = Path("/proc")) -> int:
    """How many replicas run on this machine, which a pod has to itself."""
    count = 0
    for command in processes.glob("[0-9]*/cmdline"):
        try:
            count += command.read_bytes().startswith(_REPLICA)
        except OSError:  # it has just ended
            continue
    return count


def drain(seconds: float, replicas: Callable[[], int] = replicas_here) -> bool:
    """Tell Ray, and wait for at most so long; whether every replica is gone."""
    give_up_at = time.monotonic() + seconds
    told = subprocess.run(
        [
            "ray",
            "drain-node",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=its pod is being ended",
            f"--deadline-remaining-seconds={round(seconds)}",
        ],
        check=False,
    )
    if told.returncode:
        return False
    while replicas():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


if __name__ == "__main__":
    sys.exit(not drain(float(sys.argv[1])))
