"""The database: what claims read of it, who upgrades it, and what several processes do to it at once."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from postgres import Cluster
from sqlalchemy import create_engine, event, inspect, text

from serving.jobs.database import Database, DatabaseError, migrate_to, newest_version
from serving.jobs.keys import KeyStore
from serving.jobs.store import Idempotency, SqlVideoStore, Video, VideoStatus, new_video_id
from serving.jobs.tables import metadata

SPAWN = multiprocessing.get_context("spawn")


def make_video(**changes: Any) -> Video:
    return Video(id=new_video_id(), model="mini", prompt="a red ball", seconds="2", size="128x128", **changes)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    cluster: Cluster = request.getfixturevalue("postgres_cluster")
    return cluster.new_database()


def plans(database: Database, statements: list[tuple[str, Any]]) -> list[str]:
    """How the database would run each statement, in its own words."""
    with database.read() as connection:
        if database.is_sqlite:
            return [
                "; ".join(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", values))
                for query, values in statements
            ]
        found = [
            connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {query}", values).scalar_one()
            for query, values in statements
        ]
        return [json.dumps(plan) for plan in found]


async def test_no_question_of_a_request_or_a_claim_scans_or_sorts(database_url: str) -> None:
    database = Database.open(database_url)
    store = SqlVideoStore(database)
    with database.write() as connection:
        rows = [make_video(owner=f"key_{n % 10}", created_at=float(n)) for n in range(3000)]
        values = [asdict(row) for row in rows]
        connection.execute(metadata.tables["videos"].insert(), values)
        connection.execute(text("UPDATE videos SET status = 'completed', expires_at = 9 WHERE created_at < 2000"))
    if not database.is_sqlite:
        with database.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text("VACUUM ANALYZE"))

    limited, _ = KeyStore(database).create("dailies", max_running=1, max_unfinished=9, max_per_minute=9)
    held = [await store.create(make_video(owner=limited.id)) for _ in range(3)]

    statements: list[tuple[str, Any]] = []
    event.listen(database.engine, "before_cursor_execute", lambda *call: statements.append((call[2], call[3])))
    created = await store.create(make_video(), Idempotency("key", "digest"))
    await store.get(created.id)
    await store.create(make_video(owner=limited.id))
    await store.request_cancel(held[0].id)
    for owner in (None, "key_3"):
        for order in ("asc", "desc"):
            await store.list(owner=owner, order=order, after=rows[1500].id)  # type: ignore[arg-type]  # an order, as text
            await store.list(owner=owner, order=order)  # type: ignore[arg-type]  # an order, as text
    video = await store.claim("runner", 30)
    assert video is not None
    await store.set_progress(video.id, video.fence, 5)
    await store.complete(video.id, video.fence)
    await store.expired(10)
    await store.remove(video.id)

    asked = [(query, values) for query, values in statements if query.startswith(("SELECT", "UPDATE", "DELETE"))]
    assert len(asked) >= 14
    for (query, _), plan in zip(asked, plans(database, asked), strict=True):
        assert "USE TEMP B-TREE" not in plan, (query, plan)
        assert '"Sort"' not in plan, (query, plan)
        # There a scan is right.
        few_rows = any(table in query for table in (" idempotency", "FROM keys", "FROM live_sessions", "FROM previews"))
        if database.is_sqlite or not few_rows:
            assert "Seq Scan" not in plan, (query, plan)
        if "SCAN" in plan:
            # SQLite says SCAN of a walk along an index from its end, too: a list without a cursor, cut by its limit.
            assert "LIMIT" in query, (query, plan)
            assert "SCAN videos USING INDEX sqlite_autoindex_videos_1" in plan, (query, plan)


def test_the_migrations_end_in_the_tables(empty_url: str) -> None:
    database = Database(empty_url)
    assert database.upgrade() == newest_version()
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    database.dispose()


def test_only_sqlite_is_upgraded_by_a_start(empty_url: str) -> None:
    if empty_url.startswith("sqlite"):
        Database.open(empty_url).dispose()
        return
    with pytest.raises(DatabaseError, match=r"is empty, and .* run `rushes db upgrade`"):
        Database.open(empty_url)
    Database(empty_url).upgrade()
    Database.open(empty_url).dispose()


async def test_a_database_from_before_migrations_keeps_its_videos(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'videos.db'}"
    old = Database(url)
    with old.write() as connection:
        migrate_to(connection, "0001")
        connection.execute(text("DROP TABLE alembic_version"))
        columns = {column["name"] for column in inspect(connection).get_columns("videos")}
        values = {name: value for name, value in asdict(make_video(created_at=5.0)).items() if name in columns}
        names = ", ".join(values)
        row = {**values, "request": "{}", "status": "queued"}
        connection.execute(text(f"INSERT INTO videos ({names}) VALUES ({', '.join(f':{n}' for n in values)})"), row)
    old.dispose()
    video = await SqlVideoStore(url).claim("runner", 30)
    assert video is not None
    assert (video.id, video.created_at, video.priority, video.owner) == (values["id"], 5.0, 0, None)


@pytest.mark.parametrize("url", ["nonsense", "oracledb2://host/name"])
def test_a_url_that_names_no_database(url: str) -> None:
    with pytest.raises(DatabaseError, match="no database"):
        Database.open(url)


def test_sqlite_keeps_what_was_committed_even_if_the_power_fails(tmp_path: Path) -> None:
    with Database.open(f"sqlite:///{tmp_path / 'videos.db'}").read() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar_one() == 2


def _claim_together(url: str, together: Any, results: Any, rounds: int) -> None:
    """Claim and complete `rounds` times, each time at once with the other processes."""

    async def run() -> list[str | None]:
        store = SqlVideoStore(url)
        mine: list[str | None] = []
        for _ in range(rounds):
            together.wait()
            video = await store.claim("runner", 60)
            mine.append(video and video.id)
            if video is not None:
                await store.set_progress(video.id, video.fence, 50)
                await store.complete(video.id, video.fence)
        store.dispose()
        return mine

    results.put(asyncio.run(run()))


def _upgrade_together(urls: list[str], together: Any, results: Any, rounds: int) -> None:
    """Upgrade each of the new databases at once with the other processes."""
    for url in urls:
        together.wait()
        database = Database(url)
        database.upgrade()
        database.dispose()
    results.put([rounds])


async def _in_processes(count: int, target: Callable[..., None], subject: Any, rounds: int) -> list[Any]:
    """What `count` processes that run `target` at once put into their results, one after another."""
    together, results = SPAWN.Barrier(count, timeout=60), SPAWN.Queue()
    running = [SPAWN.Process(target=target, args=(subject, together, results, rounds)) for _ in range(count)]
    for process in running:
        process.start()
    # Joined first, and so few results that they fit into the pipe: a process that dies is seen at once.
    for process in running:
        await asyncio.to_thread(process.join)
    assert [process.exitcode for process in running] == [0] * count
    return [result for _ in running for result in results.get(timeout=10)]


async def test_processes_that_claim_at_once_never_get_the_same_video(database_url: str) -> None:
    store = SqlVideoStore(database_url)
    created = [(await store.create(make_video())).id for _ in range(30)]
    claims = await _in_processes(2, _claim_together, database_url, rounds=15)
    assert sorted(claims, key=str) == sorted(created)
    for video_id in created:
        video = await store.get(video_id)
        assert video is not None
        assert (video.status, video.attempt) == (VideoStatus.COMPLETED, 1)
    store.dispose()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_replicas_that_start_at_once_upgrade_once(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    rounds = 4
    if kind == "sqlite":
        urls = [f"sqlite:///{tmp_path / f'{n}.db'}" for n in range(rounds)]
    else:
        cluster: Cluster = request.getfixturevalue("postgres_cluster")
        urls = [cluster.new_database() for _ in range(rounds)]
    assert await _in_processes(3, _upgrade_together, urls, rounds) == [rounds] * 3
    for url in urls:
        engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.connect() as connection:
            assert connection.execute(text("SELECT version_num FROM alembic_version")).all() == [(newest_version(),)]
        engine.dispose()


async def test_tasks_of_one_process_that_claim_at_once_never_get_the_same_video(database_url: str) -> None:
    store = SqlVideoStore(database_url)
    for _ in range(20):
        await store.create(make_video())
    claims = await asyncio.gather(*(store.claim(f"runner-{n}", 30) for n in range(25)))
    ids = [video.id for video in claims if video is not None]
    assert len(ids) == len(set(ids)) == 20
    store.dispose()
