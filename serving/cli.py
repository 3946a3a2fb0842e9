"""The `rushes` command. Everything heavy is imported by the command that needs it, so that `--help` is instant."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.console import Console
from typer.core import TyperGroup

from serving.config import MINI_BUNDLE, ConfigError, ServiceConfig, load_config, parse_config

if TYPE_CHECKING:
    from serving.jobs.keys import KeyStore

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
DEFAULT_URL = "http://127.0.0.1:8000"


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
# Progress and errors go to stderr: what stdout has is the answer, such as a path.
_console = Console(stderr=True, highlight=False, soft_wrap=True)

Bundle = Annotated[Path, typer.Option(help="The bundle to serve; the bundled model when left out.", show_default=False)]
Prompt = Annotated[str, typer.Argument(help="What to show.")]
Seconds = Annotated[int | None, typer.Option(help="Length in whole seconds; the model's default when left out.")]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; the model's default when left out.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file; see serving/config.py for its keys.")]
Url = Annotated[str, typer.Option(help="The service's root.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="RUSHES_API_KEY", show_envvar=True, help="Where the service wants one.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same video; random when left out.")]


class Sampler(StrEnum):
    euler = "euler"
    unipc = "unipc"
    renoise = "renoise"


def main() -> None:
    """The console script."""
    app()


@contextmanager
def _said_in_one_line() -> Iterator[None]:
    """Turn what a user can run into a line on stderr and an exit code; anything else is a bug and stays a traceback."""
    from models.bundle import BundleError
    from serving.client.errors import ApiError, RushesError
    from serving.engines.engine import EngineError
    from serving.pipeline.request import InvalidRequest

    try:
        yield
    except (InvalidRequest, BundleError, ConfigError, ApiError) as error:
        _fail(str(error), BAD_INPUT)
    except (EngineError, OSError, RushesError) as error:
        _fail(str(error), FAILED)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)


def _fail(message: str, code: int) -> None:
    _console.print(f"[red]rushes:[/] {_plain(' '.join(message.split()))}", soft_wrap=True)
    raise typer.Exit(code)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _output_file(path: Path) -> None:
    """Before minutes of work, not after."""
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; name a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"there is no directory {path.absolute().parent}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"{path.absolute().parent} can't be written to")


def _version(asked: bool) -> None:
    if asked:
        print(f"rushes {distribution_version('rushes')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


@app.command()
def generate(
    prompt: Prompt,
    output: Annotated[Path, typer.Option("--output", "-o", help="The MP4 to write.")] = Path("video.mp4"),
    seconds: Seconds = None,
    size: Size = None,
    seed: Seed = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strictly to follow the prompt; 1 is unguided.")] = None,
    negative: Annotated[str, typer.Option(help="What not to show.")] = "",
    scene: Annotated[
        list[str] | None,
        typer.Option(help="SECONDS:PROMPT, another prompt from then on; may be repeated. For causal models."),
    ] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="The sampler; the model's own when left out.")] = None,
    rewrite: Annotated[
        bool | None,
        typer.Option("--rewrite/--no-rewrite", help="Make a detailed prompt of a loose one; on if the model can."),
    ] = None,
    best_of: Annotated[int | None, typer.Option(help="Make so many and keep the one nearest to the prompt.")] = None,
    bundle: Bundle = MINI_BUNDLE,
) -> None:
    """Make one video in this process, without a service."""
    import asyncio
    from dataclasses import replace

    from models.bundle import Bundle as LoadedBundle
    from serving.oneshot import generate_file
    from serving.pipeline.request import make_spec

    with _said_in_one_line():
        _output_file(output)
        loaded = LoadedBundle.load(bundle)
        loaded.verify()
        spec = make_spec(
            loaded.manifest,
            prompt,
            seconds=seconds,
            size=size,
            seed=seed,
            negative_prompt=negative,
            num_inference_steps=steps,
            guidance_scale=guidance,
            rewrite_prompt=rewrite,
            best_of=best_of,
            scene_prompts=[_scene(text) for text in scene or ()],
        )
        if sampler is not None:
            spec = replace(spec, sampler=sampler.value)
        asyncio.run(generate_file(loaded, spec, output, _console))
        _console.print(f"seed {spec.seed}")
        print(output)


@app.command()
def caption(
    video: Annotated[Path, typer.Argument(help="Any video file; its beginning is looked at.")],
    bundle: Bundle = MINI_BUNDLE,
) -> None:
    """Say what a video shows, in the words of the model's training captions."""
    import asyncio

    from models.bundle import Bundle as LoadedBundle
    from serving.oneshot import caption_file

    with _said_in_one_line():
        print(asyncio.run(caption_file(LoadedBundle.load(bundle), video)))


@app.command()
def serve(
    config: Config = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the store and the videos live.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Serve this bundle alone, under its own name.")] = None,
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
            values["models"] = _alone(bundle)
        return parse_config(values, "options")

    with _said_in_one_line():
        serve_until_interrupted(read(), _console, read)


@app.command("reload")
def reload_service(
    config: Config = None,
    data_dir: Annotated[Path | None, typer.Option(help="As the service was started with; instead of --config.")] = None,
) -> None:
    """Load, unload and roll models of the running service, as its configuration now says; prints what it did.

    A bundle that is damaged or doesn't start is refused, and everything is served on as before. Videos that are running
    end on the model that they began with.
    """
    from serving.reloading import reload

    with _said_in_one_line():
        settings = load_config(config) if config else ServiceConfig()
        for line in reload(data_dir or settings.data_dir).split(", "):
            print(line)


@database.command("upgrade")
def upgrade_database(config: Config = None) -> None:
    """Bring the database to the newest schema. With SQLite, the service does that itself when it starts."""
    from serving.jobs.database import Database

    with _said_in_one_line():
        settings = load_config(config) if config else ServiceConfig()
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        print(f"schema {Database(settings.resolved_store_url).upgrade()}")


@keys.command("create")
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
    with _said_in_one_line():
        if webhook_url is not None:
            _check_webhook(webhook_url, load_config(config) if config else ServiceConfig())
        key, secret = _key_store(config).create(
            name[:256],
            max_per_minute=per_minute,
            max_unfinished=unfinished,
            max_running=running,
            webhook_url=webhook_url,
        )
        _console.print(f"{key.id} {_plain(key.name)}")
        print(secret)


@keys.command("list")
def list_keys(config: Config = None) -> None:
    """Print every key's id, name and state; not the key, which nobody knows."""
    with _said_in_one_line():
        for key in _key_store(config).list():
            print(f"{key.id}  {'revoked' if key.revoked_at else 'active '}  {key.name}")


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="As the list shows it.")], config: Config = None) -> None:
    """Close a key for good, at once and on every replica. Its videos stay."""
    with _said_in_one_line():
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


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The MP4 to write.")] = Path("demo.mp4"),
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a red ball bouncing on a sand floor at sunset",
    seconds: Seconds = None,
    seed: Seed = 1,
    bundle: Bundle = MINI_BUNDLE,
) -> None:
    """Start the service, watch it make one video chunk by chunk, save the video, and stop the service."""
    from serving.foreground import run_demo

    with _said_in_one_line():
        _output_file(output)
        run_demo(_alone(bundle), {"prompt": prompt, "seconds": seconds, "seed": seed}, output, _console)
        print(output)


@app.command()
def submit(
    requests: Annotated[Path, typer.Argument(help="A JSON object a line, as OpenAI's batches have them.", exists=True)],
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and save the answers.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Annotated[
        str, typer.Option(envvar="RUSHES_API_KEY", show_envvar=True, help="Where the service wants one.")
    ] = "unused",
    window: Annotated[str, typer.Option(help="What isn't made within so many hours isn't made.")] = "24h",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where --wait saves the answers.", show_default="NAME.out.jsonl"),
    ] = None,
) -> None:
    """Send a file of requests to a running service, to be made when it has time; prints the batch's id.

    With --wait, prints where the answers are instead. Requests that failed are in a file beside them, and make the exit
    code 1.
    """
    import httpx

    from serving import submission

    answers = output or requests.with_suffix(".out.jsonl")
    with _said_in_one_line():
        if wait:
            _output_file(answers)
        try:
            with httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {api_key}"}) as client:
                batch = submission.submit(client, requests, window)
                if not wait:
                    print(batch["id"])
                    return
                batch = submission.wait(client, batch, _console)
                for file_id, path in (
                    (batch["output_file_id"], answers),
                    (batch["error_file_id"], answers.with_suffix(".errors.jsonl")),
                ):
                    if file_id:
                        submission.download(client, file_id, path)
                        print(path)
        except httpx.TransportError as error:
            raise OSError(f"{url} can't be reached: {error}") from None
    counts = batch["request_counts"]
    if counts["completed"] < counts["total"]:
        _fail(f"{counts['total'] - counts['completed']} of {counts['total']} were not made", FAILED)


@app.command()
def watch(
    video_id: Annotated[str, typer.Argument(help="The video's id.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where its fragments go as they come; - is stdout.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Show how a video comes on, and play or save it while it is made: `rushes watch ID -o - | ffplay -`."""
    from serving import remote
    from serving.client import AsyncRushes

    with _said_in_one_line():
        if output is not None and output != remote.STDOUT:
            _output_file(output)
        remote.watch(AsyncRushes(url, api_key), video_id, output, _console)


@app.command("list")
def list_videos(
    limit: Annotated[int, typer.Option(min=1, help="How many, the latest first.")] = 20,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List the videos of a running service."""
    from serving import remote
    from serving.client import Rushes

    with _said_in_one_line(), Rushes(url, api_key, retry_seconds=0) as client:
        Console(highlight=False, soft_wrap=True).print(remote.table(client, limit))


@app.command()
def cancel(
    video_ids: Annotated[list[str], typer.Argument(help="The videos' ids.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Cancel videos of a running service; prints how each stands then."""
    from serving.client import Rushes

    with _said_in_one_line(), Rushes(url, api_key, retry_seconds=0) as client:
        for video_id in video_ids:
            print(video_id, client.cancel(video_id)["status"])


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A diffusers checkpoint, such as WanPipeline's layout.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The bundle's directory; a bundle that is there is replaced.")
    ],
    verify: Annotated[
        bool,
        typer.Option(help="Run every graph against torch at other shapes, and a whole video against diffusers."),
    ] = True,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PART=]PATH[:SCALE]",
            help="A LoRA to merge into the denoiser, and how much of it; may be given several times. PART is "
            "transformer_2 for one that belongs to the second expert.",
        ),
    ] = None,
) -> None:
    """Turn a diffusers checkpoint into a bundle, and prove the bundle equal to it. One that fails is not written.

    `rushes export tensorrt BUNDLE` is another command.
    """
    try:
        from export.checkpoint import export_checkpoint
        from export.lora import Adapter
        from export.onnx import ExportError
    except ImportError as error:
        _fail(f"{error.name} is missing: pip install 'rushes[export]'", BAD_INPUT)
    with _said_in_one_line():
        with _console.status("exporting") as status:
            try:
                export_checkpoint(
                    checkpoint,
                    output,
                    progress=lambda said: status.update(_plain(said)),
                    verify=verify,
                    adapters=[Adapter.parse(text) for text in lora or ()],
                )
            except ExportError as error:
                _fail(str(error), BAD_INPUT)
        print(output)


class Runtime(StrEnum):
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt_rtx"


@app.command("export tensorrt")
def export_tensorrt(
    bundle: Annotated[Path, typer.Argument(help="A bundle's directory.")],
    cache: Annotated[
        Path | None, typer.Option(help="Where plans are kept.", show_default="BUNDLE/plans", metavar="DIR")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="WIDTHxHEIGHT to build fast kernels for; may be repeated. The default size when left out."),
    ] = None,
    any_size: Annotated[bool, typer.Option(help="Also build for every other size within the model's limits.")] = True,
    rows: Annotated[int, typer.Option(min=1, help="The denoiser's largest batch, as `denoiser.max_rows`.")] = 8,
    refit: Annotated[bool, typer.Option("--refit", help="Weights can be changed in the loaded engine.")] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights can stay in host memory: for models beyond the GPU's.")
    ] = False,
    tf32: Annotated[bool, typer.Option("--tf32", help="Faster fp32, with the mantissa of fp16.")] = False,
    graph: Annotated[list[str] | None, typer.Option(help="Build this graph alone; may be repeated.")] = None,
    runtime: Annotated[Runtime, typer.Option(help="tensorrt_rtx is for GeForce and RTX cards.")] = Runtime.tensorrt,
    compute_capability: Annotated[
        str | None, typer.Option(help="For tensorrt_rtx, which needs no GPU to build: such as 8.9.")
    ] = None,
) -> None:
    """Build TensorRT plans of a bundle's graphs, for the GPU of this machine; prints where each one is."""
    from models.bundle import SERVED_GRAPHS
    from models.bundle import Bundle as LoadedBundle
    from models.plans import PLANS

    try:
        from export.onnx import ExportError
        from export.tensorrt import export_plans, open_target
    except ImportError as error:
        _fail(f"{error.name} is missing: pip install 'rushes[export]'", BAD_INPUT)
    if unknown := [name for name in graph or () if name not in SERVED_GRAPHS]:
        _fail(f"--graph must be one of {', '.join(SERVED_GRAPHS)}, not {unknown[0]!r}", BAD_INPUT)
    flags = [name for name, on in (("refit", refit), ("weight_streaming", weight_streaming), ("tf32", tf32)) if on]
    with _said_in_one_line(), _console.status("building") as status:
        sizes = [_size(text) for text in size or ()]
        try:
            plans = export_plans(
                LoadedBundle.load(bundle),
                open_target(runtime.value, compute_capability),
                cache or bundle / PLANS,
                graphs=[name for name in SERVED_GRAPHS if graph is None or name in graph],
                sizes=sizes,
                any_size=any_size,
                rows=rows,
                flags=cast(Any, flags),
                progress=lambda said: status.update(_plain(said)),
            )
        except ExportError as error:
            _fail(str(error), BAD_INPUT)
    for plan in plans:
        print(plan)


@app.command()
def measure(
    bundle: Annotated[Path, typer.Argument(help="A bundle's directory; its manifest is written anew.")],
    threads: Annotated[int, typer.Option(min=1, help="Threads for an engine call, as the service will have.")] = 1,
    provider: Annotated[str, typer.Option(help="ONNX Runtime's execution provider.")] = "CPUExecutionProvider",
) -> None:
    """Measure what a bundle's graphs take on this machine, and keep that in the bundle.

    A service tells by it how long a video will take before it has made one. Its digest becomes another.
    """
    from models.bundle import Bundle as LoadedBundle
    from serving import measuring

    with _said_in_one_line():
        loaded = LoadedBundle.load(bundle)
        loaded.verify()
        with _console.status("measuring") as status:
            cost = measuring.measure(
                loaded, threads=threads, provider=provider, progress=lambda said: status.update(_plain(said))
            )
        measuring.write(loaded, cost)
        _console.print(f"within {100 * cost.worst_error:.0f} % of {len(cost.calls_measured)} calls, {cost.device}")
        print(bundle)


@app.command()
def quantize(
    bundle: Annotated[Path, typer.Argument(help="An fp32 bundle's directory.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The new bundle's directory; a bundle that is there is replaced.")
    ],
    precision: Annotated[
        str,
        typer.Option(
            help="fp16 (for GPUs), int8 (activations by what comes), int8-static (by calibration), int8-weights, "
            "int4-weights."
        ),
    ] = "int8",
) -> None:
    """Make a smaller bundle of an fp32 one, and compare both graph by graph and on a whole video."""
    from models.bundle import Bundle as LoadedBundle
    from models.bundle import Precision

    try:
        from export.onnx import ExportError
        from export.precision import quantize as quantize_bundle
    except ImportError as error:
        _fail(f"{error.name} is missing: pip install 'rushes[export]'", BAD_INPUT)
    if precision not in get_args(Precision):
        _fail(f"--precision must be one of {', '.join(get_args(Precision))}, not {precision!r}", BAD_INPUT)
    with _said_in_one_line():
        with _console.status("converting") as status:
            try:
                quantize_bundle(
                    LoadedBundle.load(bundle),
                    output,
                    cast(Precision, precision),
                    progress=lambda said: status.update(_plain(said)),
                )
            except ExportError as error:
                _fail(str(error), BAD_INPUT)
        print(output)


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle's directory.")],
    json: Annotated[bool, typer.Option("--json", help="The manifest as JSON, for programs.")] = False,
) -> None:
    """Check a bundle's files, and say what it holds and how it was proven."""
    from models.bundle import Bundle as LoadedBundle
    from serving.inspection import describe

    with _said_in_one_line():
        loaded = LoadedBundle.load(bundle)
        loaded.verify()
        if json:
            print(loaded.manifest.model_dump_json(indent=1, exclude_none=True))
        else:
            describe(loaded, Console(highlight=False))


def _size(text: str) -> tuple[int, int]:
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise ConfigError(f"--size must be WIDTHxHEIGHT, not {text!r}")
    return int(width), int(height)


def _scene(text: str) -> dict[str, object]:
    """`4.5:a blue ball` as an entry of `scene_prompts`."""
    start, colon, prompt = text.partition(":")
    try:
        return {"start_seconds": float(start), "prompt": prompt if colon else None}
    except ValueError:
        raise ConfigError(f"--scene must be SECONDS:PROMPT, not {text!r}") from None


def _alone(bundle: Path) -> dict[str, Path]:
    """One bundle as a service's `models`, under its own name."""
    from models.bundle import Bundle as LoadedBundle

    return {LoadedBundle.load(bundle).manifest.name: bundle}


if __name__ == "__main__":
    main()
