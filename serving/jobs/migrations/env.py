"""Run by Alembic, inside the transaction that `serving.jobs.database` began."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
