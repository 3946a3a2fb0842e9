"""What each replica does first, so that it can be seen from outside."""

from __future__ import annotations

from ray import serve

from serving.config import ObservabilityConfig
from serving.deployments.metering import start_metering
from serving.logs import start_logging
from serving.tracing import start_tracing


def start_observing(config: ObservabilityConfig) -> None:
    """Logs, measurements and traces of this replica. Raises `TracingError`."""
    start_logging(config.log_format, config.log_level)
    start_metering()
    if config.traces_url is not None:
        start_tracing(config.traces_url, config.traces_share, serve.get_replica_context().replica_tag)
