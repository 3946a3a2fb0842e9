"""The `rushes` command. Everything heavy is imported by the command that needs it, so that `--help` is instant."""

from __future__ import annotations

from importlib.metadata import version as distribution_version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from serving.cli import bench, bundles, clients, load, make, service


class _Commands(TyperGroup):
    """`rushes export CHECKPOINT` and `rushes export tensorrt BUNDLE` are two commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[:2] == ["export", "tensorrt"]:
            args = ["export tensorrt", *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    help="Text goes in, video comes out while the rest of it is still being made.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
database = typer.Typer(help="The database that videos are kept in.", no_args_is_help=True)
app.add_typer(database, name="db")
keys = typer.Typer(help="API keys, which requests need where `require_keys` says so.", no_args_is_help=True)
app.add_typer(keys, name="keys")

benchmarks = typer.Typer(help="How fast it is: under load, the engines alone, beside diffusers.", no_args_is_help=True)
app.add_typer(benchmarks, name="bench")

app.command()(make.generate)
app.command()(make.caption)
app.command()(service.serve)
app.command()(service.validate)
app.command()(make.demo)
app.command()(clients.submit)
app.command()(clients.watch)
app.command()(clients.cancel)
app.command()(bundles.export)
app.command()(bundles.measure)
app.command()(bundles.quantize)
app.command()(bundles.inspect)
app.command("reload")(service.reload_service)
app.command("list")(clients.list_videos)
app.command("export tensorrt")(bundles.export_tensorrt)
database.command("upgrade")(service.upgrade_database)
benchmarks.command()(load.load)
benchmarks.command()(bench.engines)
benchmarks.command()(bench.peers)
benchmarks.command()(bench.report)
keys.command("create")(service.create_key)
keys.command("list")(service.list_keys)
keys.command("revoke")(service.revoke_key)


def main() -> None:
    """The console script."""
    app()


def _version(asked: bool) -> None:
    if asked:
        print(f"rushes {distribution_version('rushes')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...
