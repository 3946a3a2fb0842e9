"""A PostgreSQL of the tests' own: a cluster in a temporary directory, reached by a socket, with fsync off."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from serving.jobs.database import Database
from serving.jobs.tables import metadata


class Cluster:
    def __init__(self, directory: Path, user: str, control: Callable[[str], None]) -> None:
        self._directory, self._user = directory, user
        self._control = control
        self._databases = 0
        self._cleared: str | None = None

    def url(self, name: str) -> str:
        return f"postgresql://{self._user}@/{name}?host={self._directory}"

    def restart(self) -> None:
        """As after a crash: every connection is cut, and what was not committed is gone."""
        self._control("restart")

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._databases += 1
        self._run("postgres", f"CREATE DATABASE test{self._databases} TEMPLATE template0")
        return self.url(f"test{self._databases}")

    def cleared_database(self) -> str:
        """The URL of a database at the newest schema, with nothing in it: the same each time, which is quicker."""
        if self._cleared is None:
            self._cleared = self.new_database()
            database = Database(self._cleared)
            database.upgrade()
            database.dispose()
        else:
            name = self._cleared.partition("@/")[2].partition("?")[0]
            self._run(name, "TRUNCATE " + ", ".join(metadata.tables))
        return self._cleared

    def _run(self, database: str, statement: str) -> None:
        engine = create_engine(self.url(database).replace("://", "+psycopg://"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()


def programs() -> Path | None:
    """Where `initdb` and `pg_ctl` are: Debian keeps them off the PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    found = shutil.which("initdb")
    for place in [*places, *([Path(found).parent] if found else [])]:
        if (place / "initdb").exists() and (place / "pg_ctl").exists():
            return place
    return None


@contextmanager
def running_cluster(programs: Path) -> Iterator[Cluster]:
    """PostgreSQL refuses to run as root, so there it runs as the user that its package made, or as `nobody`."""
    user = pwd.getpwuid(os.geteuid())
    if user.pw_uid == 0:
        names = [entry.pw_name for entry in pwd.getpwall()]
        user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    # Not pytest's directory: its path may be too long for a socket, and only its owner may enter it.
    directory = Path(tempfile.mkdtemp(prefix="rushes-postgres-"))
    os.chown(directory, user.pw_uid, user.pw_gid)
    data = str(directory / "data")

    def run(*command: str) -> None:
        as_user: dict[str, Any] = (
            {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        )
        done = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **as_user)
        assert done.returncode == 0, done.stdout.decode()

    def control(what: str) -> None:
        command = [str(programs / "pg_ctl"), "-D", data, "-w", "-t", "120"]
        if what != "start":
            command += ["-m", "immediate"]
        if what != "stop":
            command += ["-l", str(directory / "log"), "-o", options]
        run(*command, what)

    options = f"-c listen_addresses='' -k {directory} -c fsync=off -c max_connections=200"
    try:
        run(str(programs / "initdb"), "-D", data, "-A", "trust", "-U", user.pw_name, "-E", "UTF8", "--no-sync")
        control("start")
        try:
            yield Cluster(directory, user.pw_name, control)
        finally:
            control("stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
