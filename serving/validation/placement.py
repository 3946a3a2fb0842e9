"""Whether what the replicas ask for can be had: on some node, and all of them at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from serving.config import ServiceConfig
from serving.stage_config import StageConfig
from serving.validation.findings import Finding


@dataclass(frozen=True, slots=True)
class Demand:
    """A deployment's replicas: what each asks Ray for, and how many there are at least and at most.

    `surge` of them are there beside the fewest while an upgrade in place goes on.
    """

    name: str
    num_cpus: float
    num_gpus: float
    label_selector: Mapping[str, str]
    least: int
    most: int
    surge: int = 0


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Equal nodes, as Ray sees them: at most `count`."""

    name: str
    num_cpus: float
    num_gpus: float
    count: int
    labels: Mapping[str, str] = field(default_factory=dict)

    def takes(self, demand: Demand) -> bool:
        """Whether one node has room for one replica."""
        return (
            self.count > 0
            and demand.num_cpus <= self.num_cpus
            and demand.num_gpus <= self.num_gpus
            and all(matches(self.labels.get(key), wanted) for key, wanted in demand.label_selector.items())
        )


def matches(value: str | None, wanted: str) -> bool:
    """Ray's label selectors: `a`, `!a`, `in(a, b)`, `!in(a, b)`."""
    if wanted.startswith("!"):
        return value is None or not matches(value, wanted[1:])
    if wanted.startswith("in(") and wanted.endswith(")"):
        return value in [each.strip() for each in wanted[3:-1].split(",")]
    return value == wanted


def demands_of(config: ServiceConfig) -> list[Demand]:
    """Every deployment that `build_app` makes of it."""

    def stage(name: str, settings: StageConfig) -> Demand:
        scaling = settings.autoscaling
        return Demand(
            name,
            settings.num_cpus,
            settings.num_gpus,
            settings.label_selector,
            scaling.min_replicas,
            scaling.max_replicas,
        )

    if config.fused:
        return [Demand("fused", config.cores(), config.gpus(), config.all_labels(), 1, 1)]
    found = []
    retiring = [f"{model}-retiring" for model in config.retiring]
    for model in [*config.models, *retiring]:
        of_model = [
            stage(f"{model}-text-encoder", config.text_encoder),
            stage(f"{model}-denoiser", config.denoiser),
            stage(f"{model}-decoder", config.decoder),
        ]
        # A retiring stage wakes up for the videos that its bundle has begun.
        found += [replace(each, least=0, surge=1) for each in of_model] if model in retiring else of_model
    for name, part in (("runner", config.runner), ("api", config.api)):
        # The new ones are started before the old ones stop (see `build_app`).
        count = part.replicas
        found.append(Demand(name, part.num_cpus, 0, part.label_selector, count, count, surge=count))
    return found


def check_placement(demands: Sequence[Demand], groups: Sequence[NodeGroup]) -> list[Finding]:
    """What no node can take, and what can't run beside the rest: now, in an upgrade, and at the most."""
    found = []
    for demand in demands:
        if not any(group.takes(demand) for group in groups):
            asked = f"{demand.num_cpus:g} CPU, {demand.num_gpus:g} GPU"
            if demand.label_selector:
                asked += ", " + ", ".join(f"{key}={value}" for key, value in demand.label_selector.items())
            found.append(Finding(demand.name, f"no worker group has a node for a replica of it ({asked})"))
    if found:
        return found
    if left := _left_over([(demand, demand.least) for demand in demands], groups):
        return [Finding(left.name, "the fewest replicas of all deployments don't fit into the largest cluster")]
    if left := _left_over([(demand, demand.least + demand.surge) for demand in demands], groups):
        message = (
            "the largest cluster has no room for an upgrade in place, which starts new API and runner replicas beside "
            "the old ones, and retiring stages beside the new ones: it would wait for ever"
        )
        found.append(Finding(left.name, message, certain=False))
    if left := _left_over([(demand, demand.most) for demand in demands], groups):
        message = "the most replicas don't fit into the largest cluster: the last ones will never start"
        found.append(Finding(left.name, message, certain=False))
    return found


@dataclass(slots=True)
class _Node:
    group: NodeGroup
    cpus: float
    gpus: float

    def has_room_for(self, demand: Demand) -> bool:
        near = 1e-9  # of fractions that add up
        room = self.cpus + near >= demand.num_cpus and self.gpus + near >= demand.num_gpus
        return room and self.group.takes(demand)


def _left_over(counts: Sequence[tuple[Demand, int]], groups: Sequence[NodeGroup]) -> Demand | None:
    """A deployment for which no room is left. The choosiest go first, each to the fullest node that takes it."""
    nodes = [_Node(group, group.num_cpus, group.num_gpus) for group in groups for _ in range(group.count)]
    choosy = sorted(counts, key=lambda each: (-len(each[0].label_selector), -each[0].num_gpus, -each[0].num_cpus))
    for demand, count in choosy:
        for _ in range(count):
            fitting = [node for node in nodes if node.has_room_for(demand)]
            if not fitting:
                return demand
            node = min(fitting, key=lambda each: (each.gpus, each.cpus))
            node.cpus -= demand.num_cpus
            node.gpus -= demand.num_gpus
    return None
