"""`serving.scaling` as Ray Serve's policy for an application, and what each stage tells it.

Ray calls it in its controller, again and again, and applies each deployment's delays and bounds to what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.pipeline.pace import StageState
from serving.scaling import ORDER, Load, Settings, decide, shares_of

_SHARES = "rushes_shares"
# Metrics are finite numbers; nobody scales for what is due so late.
_AMPLE_SECONDS = 3600.0


def stats_of(state: StageState) -> dict[str, float]:
    """What a replica's `record_autoscaling_stats` returns."""
    return {
        "outstanding_seconds": state.outstanding_seconds,
        "in_flight": float(state.in_flight + state.waiting),
        "busy_seconds": state.busy_seconds,
        "slack_seconds": min(state.slack_seconds, _AMPLE_SECONDS),
    }


class VideoPolicy:
    """`policy_function: serving.deployments.scaling:VideoPolicy`; `policy_kwargs` are the fields of `Settings`."""

    def __init__(self, **settings: float) -> None:
        self._settings = Settings(**settings)

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        models: dict[str, dict[str, Any]] = {}
        for deployment in contexts:
            for stage in ORDER:
                if deployment.name.endswith(f"-{stage}"):
                    models.setdefault(deployment.name.removesuffix(f"-{stage}"), {})[stage] = deployment
        # Whatever isn't a stage stays as it is.
        wanted = {deployment: context.target_num_replicas for deployment, context in contexts.items()}
        states: dict[Any, dict[str, Any]] = {}
        for stages in models.values():
            loads = {stage: _load(contexts[deployment]) for stage, deployment in stages.items()}
            known = next(iter(stages.values()))
            shares = shares_of(loads, contexts[known].policy_state.get(_SHARES, {}))
            for stage, replicas in decide(loads, self._settings, shares).items():
                wanted[stages[stage]] = replicas
            states[known] = {_SHARES: shares}
        return wanted, states


class StagePolicy:
    """The same for one stage by itself: it sees nothing of what comes to it from the stage before."""

    def __init__(self, **settings: float) -> None:
        self._settings = Settings(**settings)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        (stage,) = (stage for stage in ORDER if context.deployment_name.endswith(f"-{stage}"))
        return decide({stage: _load(context)}, self._settings, {})[stage], {}


def _load(context: Any) -> Load:
    metrics = context.aggregated_metrics or {}

    def total(name: str) -> float:
        return float(sum((metrics.get(name) or {}).values()))

    slacks = (metrics.get("slack_seconds") or {}).values()
    return Load(
        replicas=context.target_num_replicas,
        least=context.capacity_adjusted_min_replicas,
        most=context.capacity_adjusted_max_replicas,
        outstanding_seconds=total("outstanding_seconds"),
        queued=context.total_queued_requests or 0.0,
        in_flight=total("in_flight"),
        busy_seconds=total("busy_seconds"),
        slack_seconds=float(min(slacks, default=_AMPLE_SECONDS)),
        starting=max(0, context.target_num_replicas - context.current_num_replicas),
    )
