"""The service and what it keeps: `rushes serve`, `reload`, `db` and `keys`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli.terminal import BAD_INPUT, Config, alone, console, plain, said_in_one_line
from serving.config import ConfigError, ServiceConfig, bundled, load_config, parse_config

if TYPE_CHECKING:
    from serving.jobs.keys import KeyStore


def serve(
    config: Config = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the store and the videos live.")] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            parser=bundled,
            metavar="PATH",
            help="Serve this bundle alone, under its own name: a directory, or mini-causal, which live sessions need.",
        ),
    ] = None,
) -> None:
    """Run the service on this machine until Ctrl-C, which finishes the videos in hand; a second one hands them back.

    `rushes reload` makes it read its configuration again.
    """
    from serving.foreground import serve_until_interrupted

    def read() -> ServiceConfig:
        settings = load_config(config) if config else ServiceConfig()
        given = {"host": host, "port": port, "data_dir": data_dir}
        values = settings.model_dump() | {key: value for key, value in given.items() if value is not None}
        if bundle is not None:
            values["models"] = alone(bundle)
        return parse_config(values, "options")

    with said_in_one_line():
        serve_until_interrupted(read(), console, read)


def reload_service(
    config: Config = None,
    data_dir: Annotated[Path | None, typer.Option(help="As the service was started with; instead of --config.")] = None,
) -> None:
    """Load, unload and roll models of the running service, as its configuration now says; prints what it did.

    A bundle that is damaged or doesn't start is refused, and everything is served on as before. Videos that are running
    end on the model that they began with.
    """
    from serving.reloading import reload

    with said_in_one_line():
        settings = load_config(config) if config else ServiceConfig()
        for line in reload(data_dir or settings.data_dir).split(", "):
            print(line)


def validate(
    files: Annotated[
        list[Path], typer.Argument(help="A service's configuration, a Serve YAML, or manifests with a RayService.")
    ],
    gpu_memory_gib: Annotated[
        float | None, typer.Option(min=1, help="Of each GPU, where the file doesn't say which GPU it is.")
    ] = None,
) -> None:
    """Check files before anything is applied: misspelt keys, which Ray and Kubernetes drop without a word, replicas
    that no node can take, times that contradict each other, missing bundles, sizes beyond a GPU's memory.

    Prints a line for each finding; ends with 2 when there is one that isn't only a warning.
    """
    from serving.validation.files import check_file

    failed = False
    with said_in_one_line():
        for file in files:
            for finding in check_file(file, gpu_memory_gib):
                failed |= finding.certain
                kind = "error" if finding.certain else "warning"
                print(f"{file}: {kind}: {f'{finding.where}: ' if finding.where else ''}{finding.message}")
    if failed:
        raise typer.Exit(BAD_INPUT)


def upgrade_database(config: Config = None) -> None:
    """Bring the database to the newest schema. With SQLite, the service does that itself when it starts."""
    from serving.jobs.database import Database

    with said_in_one_line():
        settings = load_config(config) if config else ServiceConfig()
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        print(f"schema {Database(settings.resolved_store_url).upgrade()}")


def create_key(
    name: Annotated[str, typer.Argument(help="Whose it is, for the list.")],
    per_minute: Annotated[int | None, typer.Option(min=1, help="Videos it may ask for in a minute.")] = None,
    unfinished: Annotated[int | None, typer.Option(min=1, help="Videos it may have queued and running.")] = None,
    running: Annotated[
        int | None, typer.Option(min=1, help="Videos of it that are made at a time; others of it wait.")
    ] = None,
    webhook_url: Annotated[
        str | None, typer.Option(help="What to call when any of its videos or batches has ended.")
    ] = None,
    config: Config = None,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    with said_in_one_line():
        if webhook_url is not None:
            _check_webhook(webhook_url, load_config(config) if config else ServiceConfig())
        key, secret = _key_store(config).create(
            name[:256],
            max_per_minute=per_minute,
            max_unfinished=unfinished,
            max_running=running,
            webhook_url=webhook_url,
        )
        console.print(f"{key.id} {plain(key.name)}")
        print(secret)


def list_keys(config: Config = None) -> None:
    """Print every key's id, name and state; not the key, which nobody knows."""
    with said_in_one_line():
        for key in _key_store(config).list():
            print(f"{key.id}  {'revoked' if key.revoked_at else 'active '}  {key.name}")


def revoke_key(key_id: Annotated[str, typer.Argument(help="As the list shows it.")], config: Config = None) -> None:
    """Close a key for good, at once and on every replica. Its videos stay."""
    with said_in_one_line():
        if not _key_store(config).revoke(key_id):
            raise ConfigError(f"there is no key {key_id}")
        print(key_id)


def _check_webhook(url: str, settings: ServiceConfig) -> None:
    from serving.jobs.targets import BadTarget, check_url

    if settings.webhooks.secret is None:
        raise ConfigError("--webhook-url needs webhooks.secret in the configuration, or RUSHES_WEBHOOK_SECRET")
    try:
        check_url(url, allow_private=settings.webhooks.allow_private)
    except BadTarget as error:
        raise ConfigError(f"--webhook-url can't be called: {error}") from None


def _key_store(config: Path | None) -> KeyStore:
    from serving.jobs.database import Database
    from serving.jobs.keys import KeyStore

    settings = load_config(config) if config else ServiceConfig()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    return KeyStore(Database.open(settings.resolved_store_url))
