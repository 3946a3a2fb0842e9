"""The database behind the stores: SQLite that several processes may share, or PostgreSQL; and its migrations."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, Table, create_engine, event, inspect, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError, SQLAlchemyError

from serving.metrics import STORE

_BUSY_SECONDS = 30
# One file a step; no package, for Alembic runs its files in a context of its own.
_MIGRATIONS = Path(__file__).parent / "migrations"
# Any number that nothing else in the database locks by.
_MIGRATION_LOCK = 0x72757368
_BEFORE_ALEMBIC = "0001"


class DatabaseError(OSError):
    """The database can't be used; the message says what to do about it."""


class DatabaseAway(DatabaseError):  # noqa: N818
    """It doesn't answer; that may pass."""


class Database:
    """Transactions for reading and for writing, and a schema that is known to be the newest."""

    def __init__(self, url: str) -> None:
        """Use `open`, unless the schema is to be upgraded."""
        try:
            parsed = make_url(url)
            if parsed.drivername in ("postgres", "postgresql"):
                parsed = parsed.set(drivername="postgresql+psycopg")
            self.is_sqlite = parsed.get_backend_name() == "sqlite"
            self.engine = _sqlite(url) if self.is_sqlite else create_engine(parsed, pool_pre_ping=True)
        except (ArgumentError, NoSuchModuleError) as error:
            raise DatabaseError(f"no database can be reached by this URL: {error}") from None
        except ModuleNotFoundError as error:
            raise DatabaseError(f"{error.name} is missing: pip install 'rushes[postgres]'") from None
        self._writer = self.engine.execution_options(immediate=True)

    @classmethod
    def open(cls, url: str) -> Database:
        """`url` is such as `sqlite:////var/lib/rushes/videos.db` or `postgresql://user@host/name`.

        An SQLite database is made and upgraded on the spot. Any other must be the newest already: a start must not
        change what older replicas are still working with. Raises `DatabaseError`, for one that doesn't answer
        `DatabaseAway`.
        """
        database = cls(url)
        try:
            if database.is_sqlite:
                database.upgrade()
            else:
                database.check()
        except OperationalError as error:
            database.dispose()
            raise DatabaseAway(f"the database can't be reached: {str(error.orig).strip()}") from error
        return database

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that writes nothing."""
        with STORE.time(SQLAlchemyError, operation="read"), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is committed at the end of the block, and undone if that raises."""
        with STORE.time(SQLAlchemyError, operation="write"), self._writer.begin() as connection:
            yield connection

    def insert_new(self, connection: Connection, table: Table, values: Mapping[str, Any]) -> bool:
        """Insert a row unless one with its primary key is there already; whether it was inserted."""
        query = self._insert(table).on_conflict_do_nothing().returning(*table.primary_key)
        return connection.execute(query, dict(values)).first() is not None

    def insert_all_new(self, connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert the rows whose primary key, and whatever else is unique of them, isn't there already."""
        if rows:
            # As parameters of one statement: building a statement for each row costs ten times what inserting it does.
            connection.execute(self._insert(table).on_conflict_do_nothing(), [dict(row) for row in rows])

    def _insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def dispose(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def upgrade(self) -> str:
        """Run the migrations that are missing, all or none of them; the version that it ends with.

        Several processes may do this at once: one does it, the others wait.
        """
        with self.write() as connection:  # SQLite's immediate transaction is a lock of its own
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            if _version(connection) != newest_version():
                if _version(connection) is None and inspect(connection).has_table("videos"):
                    command.stamp(_config(connection), _BEFORE_ALEMBIC)
                migrate_to(connection, "head")
        return newest_version()

    def check(self) -> None:
        """Raises `DatabaseError` when the schema isn't the one that this version works with."""
        with self.read() as connection:
            version = _version(connection)
        if version != newest_version():
            found = "is empty" if version is None else f"has schema {version}"
            raise DatabaseError(f"the database {found}, and {newest_version()} is needed: run `rushes db upgrade`")


def migrate_to(connection: Connection, version: str) -> None:
    """Run the migrations up to `version` in the connection's transaction."""
    command.upgrade(_config(connection), version)


def newest_version() -> str:
    """The schema that this version works with."""
    version = ScriptDirectory.from_config(_config()).get_current_head()
    assert version is not None
    return version


def _version(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _config(connection: Connection | None = None) -> Config:
    config = Config(attributes={"connection": connection})
    # Alembic reads a percent sign as the start of a placeholder.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _sqlite(url: str) -> Engine:
    engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: Any) -> None:
        # Python's own transaction handling begins late and never IMMEDIATE; SQLAlchemy's documented way around it.
        connection.isolation_level = None
        _use_wal(connection)
        # The default in WAL mode may forget the last commits when the power fails.
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later would fail at once, without waiting, if another wrote between.
        immediate = connection.get_execution_options().get("immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch the database file to WAL, once for its life. SQLite's own busy timeout does not cover the switch, and
    several processes may open a new database at once."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
