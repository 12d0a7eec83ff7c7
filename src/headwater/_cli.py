"""The command line."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from headwater import __version__
from headwater._errors import HeadwaterError

if TYPE_CHECKING:
    from headwater._listener import Listener

_AFTER_SCRIPT = {"ignore_unknown_options": True, "allow_interspersed_args": False}


class _Commands(click.Group):
    """Turns the errors that users can mend into one line and exit status 2."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except HeadwaterError as error:
            click.echo(f"headwater: {error}", err=True)
            ctx.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="headwater")
def main() -> None:
    """A parameter server for people who train models in Python."""


@main.command(context_settings=_AFTER_SCRIPT)
@click.option("-n", "--workers", default=1, show_default=True, type=click.IntRange(1), help="Worker processes.")
@click.option("-s", "--servers", default=1, show_default=True, type=click.IntRange(1), help="Server processes.")
@click.option(
    "--consistency",
    metavar="bsp|ssp:S|asp",
    help="How closely workers keep together; default: as the script says, or bsp.",
)
@click.option(
    "--transport",
    type=click.Choice(["auto", "tcp"]),
    default="auto",
    show_default=True,
    help="auto: shared memory.",
)
@click.option(
    "--restarts",
    default=3,
    show_default=True,
    type=click.IntRange(0),
    help="How often workers and servers that died are started again, all together.",
)
@click.option(
    "--durability",
    default="snapshot",
    show_default=True,
    metavar="none|snapshot|log|replicated[:S]",
    help="What the death of a server costs: the job, what was learnt since the last snapshot (every S seconds), or nothing.",
)
@click.option("--store", metavar="FOLDER", help="Keep the job here; default: a folder that ends with it.")
@click.option("--resume", is_flag=True, help="Go on from what the store holds.")
@click.option("--save", type=click.Path(path_type=Path), help="Save the job here at its end, Ctrl+C included.")
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module name, as in python -m.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    workers: int,
    servers: int,
    consistency: str | None,
    transport: str,
    restarts: int,
    durability: str,
    store: str | None,
    resume: bool,
    save: Path | None,
    module: bool,
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Run SCRIPT in local worker processes beside local servers.

    Workers find HEADWATER_ADDRESS, HEADWATER_TOKEN, HEADWATER_WORKER and HEADWATER_WORKERS in their environment, which is where
    headwater.connect() looks. A worker that dies once it is under way is started again with the same HEADWATER_WORKER, and finds the
    job where the others are: let the script go by session.clock. A server that dies is started again, too; workers wait for it. The
    servers stop when the last worker has ended.
    """
    from headwater._consistency import Consistency
    from headwater._launch import LocalJob, run_job
    from headwater.durability import Durability

    if (resume or store is not None) and (store is None or durability == "none"):
        raise click.UsageError("Expected --store and a --durability with --resume, got one without the other.")
    if consistency is not None:
        Consistency.parse(consistency)
    if not module and not Path(script).is_file():
        raise click.BadParameter(f"{script} is no file.", param_hint="SCRIPT")
    command = [sys.executable, *(["-m"] if module else []), script, *arguments]
    job = LocalJob(
        command, workers=workers, servers=servers, consistency=consistency, transport=transport, restarts=restarts,
        durability=None if durability == "none" else Durability.parse(durability), store=store, resumes=resume,
    )  # fmt: skip
    sys.exit(run_job(job, save=save))


@main.command()
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Train on this UTF-8 file.")
@click.option(
    "--minutes", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True), help="How long to train."
)
@click.option("--resume", is_flag=True, help="Go on from where the last demo stopped.")
@click.option("-n", "--workers", default=2, show_default=True, type=click.IntRange(1), help="Worker processes.")
@click.option("-s", "--servers", default=1, show_default=True, type=click.IntRange(1), help="Server processes.")
@click.option(
    "--consistency",
    default="bsp",
    show_default=True,
    metavar="bsp|ssp:S|asp",
    help="How closely workers keep together.",
)
@click.option(
    "--folder", default="headwater-demo", show_default=True, type=click.Path(path_type=Path), help="For the result."
)
def demo(
    text: Path | None, minutes: float, resume: bool, workers: int, servers: int, consistency: str, folder: Path
) -> None:
    """Train a small GPT on real text with local workers, watch it, and read what it writes."""
    from headwater._consistency import Consistency
    from headwater._demo import run_demo

    Consistency.parse(consistency)
    sys.exit(
        run_demo(
            folder, text=text, minutes=minutes, resume=resume, workers=workers, servers=servers, consistency=consistency
        )
    )


@main.command()
@click.option(
    "--listen",
    default="tcp://127.0.0.1:7077",
    show_default=True,
    help="tcp://HOST:PORT (0: any) or unix:///PATH.",
)
@click.option("--join", metavar="ADDRESS", help="Be a further server of the job whose first server is there.")
@click.option(
    "--servers",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Servers of the job, this one included.",
)
@click.option(
    "--workers",
    default=0,
    type=click.IntRange(0),
    help="Workers to wait for; default: as the first worker says.",
)
@click.option("--consistency", metavar="bsp|ssp:S|asp", help="Default: as the first worker says.")
@click.option("--threads", type=click.IntRange(1), help="Kernel threads; default: all cores.")
@click.option(
    "--durability",
    metavar="snapshot|log|replicated[:S]",
    help="What the job survives, with the seconds between snapshots; the same for all its servers. Default: nothing.",
)
@click.option("--store", metavar="FOLDER", default="", help="Where a durable job is kept; all its servers reach it.")
@click.option(
    "--index", type=click.IntRange(0), help="This server's place among those of a durable job; the first's is 0."
)
@click.option("--resume", is_flag=True, help="Go on from what the store holds.")
@click.option("--follow", is_flag=True, help="Be the follower of the server with this index, in a replicated job.")
@click.option("--coordinator", is_flag=True, help="Hold the coordinator alone, as a replicated job needs it.")
@click.option("--stop-with-input", is_flag=True, hidden=True, help="Stop at the end of standard input.")
def server(
    listen: str,
    join: str | None,
    servers: int,
    workers: int,
    consistency: str | None,
    threads: int | None,
    durability: str | None,
    store: str,
    index: int | None,
    resume: bool,
    follow: bool,
    coordinator: bool,
    stop_with_input: bool,
) -> None:
    """Run a server until SIGTERM or Ctrl+C.

    Every peer must show HEADWATER_TOKEN. On this machine alone one is made up where none is set; elsewhere it must be set.
    """
    from headwater._consistency import Consistency
    from headwater._server import Server
    from headwater._transport import Address
    from headwater.durability import Durability

    if durability is not None and join and index is None:
        raise click.UsageError("Expected --index for a further server of a durable job, got none.")
    address = Address.parse(listen)
    token = os.environ.get("HEADWATER_TOKEN", "")
    made_up = not token
    if made_up and (join or not address.is_local):
        raise click.UsageError(
            "Expected HEADWATER_TOKEN in the environment, got none: other machines could reach this server."
        )
    token = token or secrets.token_hex(16)
    _stop_as_interrupted()
    with Server(
        address,
        token=token,
        join=Address.parse(join) if join else None,
        consistency=Consistency.parse(consistency) if consistency else None,
        workers=workers,
        servers=servers,
        threads=threads,
        durability=Durability.parse(durability) if durability is not None else None,
        store=store,
        index=-1 if index is None else index,
        resumes=resume,
        follows=follow,
        is_apart=coordinator,
    ) as running:
        words = [f"headwater server listening on {running.address.tcp or running.address.unix}"]
        if made_up:
            words.append(
                f"workers need: export HEADWATER_ADDRESS={running.address.tcp or running.address.unix} HEADWATER_TOKEN={token}"
            )
        _serve_until_told(running, words, stop_with_input=stop_with_input)


@main.command()
@click.option("--job", envvar="HEADWATER_ADDRESS", required=True, help="A running job; default: $HEADWATER_ADDRESS.")
@click.option(
    "--listen",
    default="tcp://127.0.0.1:7078",
    show_default=True,
    help="tcp://HOST:PORT (0: any) or unix:///PATH.",
)
@click.option("--tables", metavar="NAME,…", default="", help="Only these; default: all that the job has or will have.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="For large lookups.")
@click.option("--stop-with-input", is_flag=True, hidden=True, help="Stop at the end of standard input.")
def replica(job: str, listen: str, tables: str, threads: int, stop_with_input: bool) -> None:
    """Serve a copy of a running job's embedding tables, kept up to date, until SIGTERM or Ctrl+C.

    Readers connect with headwater.lookup(). They and this process show the job's HEADWATER_TOKEN. When the job is lost, what there was is
    served until it is back.
    """
    from headwater._replica import Replica

    names = [name for name in tables.split(",") if name]
    _stop_as_interrupted()
    with Replica(job, listen=listen, tables=names, threads=threads) as running:
        copied = ", ".join(f"{table.name} ({table.rows:,} rows)" for table in running.stats().tables) or "none yet"
        words = [f"headwater replica listening on {running.address.tcp or running.address.unix}", f"tables: {copied}"]
        _serve_until_told(running, words, stop_with_input=stop_with_input)


@main.command()
@click.argument("path")
def inspect(path: str) -> None:
    """Say what the saved job or the store at PATH holds, and whether all of it is sound.

    Reads every byte. Exit status 1: something is not as it was written.
    """
    from headwater._files import open_files
    from headwater._snapshot import describe

    text, is_sound = describe(*open_files(path))
    click.echo(text, nl=False)
    sys.exit(0 if is_sound else 1)


@main.command()
@click.option("--address", envvar="HEADWATER_ADDRESS", required=True, help="The job's; default: $HEADWATER_ADDRESS.")
def snapshot(address: str) -> None:
    """Let a running durable job take a snapshot now, beside training; says where it lies.

    The job's token is in HEADWATER_TOKEN.
    """
    from headwater._connect import connect_session

    with connect_session(address, role="observer") as session:
        click.echo(session.take_snapshot())


@main.command()
@click.argument("store")
@click.argument("folder")
def restore(store: str, folder: str) -> None:
    """Make FOLDER of what STORE holds, its log included: a saved job, as session.load() and other tools read it.

    The job must not be running. What was at FOLDER, a saved job or nothing, is replaced when all is there.
    """
    from headwater._files import open_files
    from headwater._keeper import newest
    from headwater._snapshot import copy

    files, path = open_files(store)
    commit = copy(files, newest(files, path), *open_files(folder))
    click.echo(f"commit {commit} of {store} is in {folder}")


# Versions.

_store = click.option(
    "--store",
    envvar="HEADWATER_VERSIONS",
    default="versions",
    show_default=True,
    metavar="FOLDER",
    help="Where versions are: a folder or an fsspec URL; default: $HEADWATER_VERSIONS.",
)


@main.command()
@click.argument("source", envvar="HEADWATER_ADDRESS")
@_store
@click.option("--tag", help="Let this tag point at it.")
@click.option(
    "--metric", "metrics", multiple=True, metavar="NAME=NUMBER", help="Keep a number with it; may be repeated."
)
@click.option("--attach", multiple=True, type=click.Path(path_type=Path), help="Copy this file beside the weights.")
def publish(source: str, store: str, tag: str | None, metrics: tuple[str, ...], attach: tuple[Path, ...]) -> None:
    """Publish the parameters of SOURCE as a version.

    SOURCE is a running job's address, default $HEADWATER_ADDRESS, or the folder of a saved job or of a job's store. A job's token is in
    HEADWATER_TOKEN.
    """
    from headwater._connect import connect_session
    from headwater._publishing import read_saved
    from headwater._versions import Versions

    numbers = {name: _number(name, text) for name, _, text in (metric.partition("=") for metric in metrics)}
    if source.startswith(("tcp://", "unix://")):
        with connect_session(source, role="observer") as session:
            version = session.publish(tag, store=store, metrics=numbers, attach=attach).result()
        assert version is not None
    else:
        arrays, dtypes, commit = read_saved(source)
        version = Versions(store).publish(arrays, dtypes=dtypes, commit=commit, metrics=numbers, tag=tag, attach=attach)
    click.echo(f"version {version.id}, of commit {version.commit:,}, is in {store}" + (f", as {tag}" if tag else ""))


@main.command()
@_store
def versions(store: str) -> None:
    """List the versions in a store, and their tags."""
    from headwater._versions import Versions, describe

    click.echo(describe(Versions(store)), nl=False)


@main.command()
@_store
@click.argument("name")
@click.argument("version", required=False)
@click.option("--remove", is_flag=True, help="Remove the tag.")
def tag(store: str, name: str, version: str | None, remove: bool) -> None:
    """Let the tag NAME point at VERSION, a number or another tag; back to an older one is how to roll back.

    Without VERSION, say where it points.
    """
    from headwater._versions import Versions

    known = Versions(store)
    if remove:
        known.untag(name)
    elif version is None:
        click.echo(known.resolve(name))
    else:
        click.echo(f"{name} is version {known.tag(name, version)}")


@main.command()
@_store
@click.argument("one")
@click.argument("other")
def diff(store: str, one: str, other: str) -> None:
    """Say how version OTHER differs from version ONE, numbers or tags. Exit status 1: it does."""
    from headwater._versions import Versions, describe_differences

    text, are_same = describe_differences(Versions(store), one, other)
    click.echo(text, nl=False)
    sys.exit(0 if are_same else 1)


@main.command()
@_store
@click.argument("version")
@click.argument("folder")
def fetch(store: str, version: str, folder: str) -> None:
    """Make FOLDER of VERSION, a number or a tag: model.safetensors and what was attached, as other tools load them."""
    from headwater._versions import Versions

    found = Versions(store).fetch(version, folder)
    click.echo(f"version {found.id} is in {folder}")


@main.command()
@click.option(
    "--model",
    "spec",
    required=True,
    metavar="MODULE:FUNCTION",
    help="What builds the model, a torch.nn.Module or a Keras model.",
)
@_store
@click.option(
    "--tag", default="prod", show_default=True, help="Answer with the version of this tag, whichever that is."
)
@click.option("--canary", metavar="TAG:PERCENT", help="Answer so many requests with the version of another tag.")
@click.option("--name", help="The model's name in URLs; default: the module's.")
@click.option("--listen", "url", default="http://127.0.0.1:8000", show_default=True, help="http://HOST:PORT (0: any).")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs, such as cuda:0.")
@click.option(
    "--pins",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    help="Versions in memory that only /versions/ID asks for.",
)
@click.option(
    "--batch", default=64, show_default=True, type=click.IntRange(1), help="Rows that are run together at most."
)
@click.option(
    "--batch-wait-ms",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Let a request wait for others while the model is idle.",
)
@click.option(
    "--body-mib", default=64, show_default=True, type=click.IntRange(1), help="What a request may have at most."
)
@click.option("--fleet", is_flag=True, help="Change versions together with the other replicas of this store and tag.")
@click.option(
    "--fleet-url", metavar="URL", help="Where `headwater promote` reaches this replica; default: where it listens."
)
def serve(
    spec: str, store: str, tag: str, canary: str | None, name: str | None, url: str, device: str, pins: int, batch: int,
    batch_wait_ms: float, body_mib: int, fleet: bool, fleet_url: str | None,
) -> None:  # fmt: skip
    """Answer requests with a model's published versions over HTTP, until SIGTERM or Ctrl+C.

    The Open Inference Protocol, version 2, which clients of KServe and Triton speak: POST /v2/models/NAME/infer. The tag's version is
    changed under load, without a failed request, whenever the tag moves. Where other machines reach it HEADWATER_TOKEN must be set; it
    guards what replicas are told, not inference. A job's address as the store means where it publishes. Needs pip install
    'headwater[serve]'.
    """
    try:
        from headwater._http import Canary, ModelServer, listen, url_of
    except ImportError as error:
        raise click.UsageError(
            f"Expected Starlette, uvicorn and httptools, got: {error}. pip install 'headwater[serve]'"
        ) from error
    from headwater._fleet import check_url
    from headwater._models import open_model
    from headwater._subscription import open_versions

    token = os.environ.get("HEADWATER_TOKEN", "")
    parsed = Canary.parse(canary) if canary is not None else None
    make = open_model(spec, device)
    sock = listen(url, token)
    name = name or spec.partition(":")[0].rpartition(".")[2]
    server = ModelServer(
        name, make, open_versions(store), tag=tag, canary=parsed, token=token, pins=pins, rows=batch,
        wait_s=batch_wait_ms / 1e3, body_bytes=body_mib << 20,
        fleet_url=check_url(fleet_url or url_of(sock)) if fleet or fleet_url else "",
    )  # fmt: skip
    click.echo(f"headwater serves {url_of(sock)}/v2/models/{name}")
    sys.stdout.flush()
    server.run(sock)


@main.command()
@click.argument("version")
@_store
@click.option("--tag", default="prod", show_default=True, help="The tag that the fleet serves.")
@click.option(
    "--timeout-s",
    default=300.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="For replicas to prepare.",
)
@click.option(
    "--forget", multiple=True, metavar="URL", help="Strike a replica that is gone for good from the fleet, first."
)
def promote(version: str, store: str, tag: str, timeout_s: float, forget: tuple[str, ...]) -> None:
    """Let the tag name VERSION, a number or another tag, on every replica of a fleet or on none.

    Every replica first fetches, verifies and builds it aside; when all have, the tag moves and they turn. A replica that misses that
    answers 503 until it has caught up, by itself. Exit status 2: nothing has changed. The replicas' token is in HEADWATER_TOKEN. To
    roll back, promote the former version.
    """
    from headwater._fleet import Fleet, asker, check_url
    from headwater._fleet import promote as steps
    from headwater._subscription import open_versions

    versions = open_versions(store)
    fleet, number = Fleet(versions, tag), versions.get(versions.resolve(version)).id
    with fleet.alone():
        for url in forget:
            fleet.unregister(check_url(url))
        running = steps(fleet, number, asker(os.environ.get("HEADWATER_TOKEN", "")), prepare_s=timeout_s)
        try:
            while True:
                next(running)
        except StopIteration as done:
            promoted = done.value
    told = promoted.replicas - len(promoted.absent)
    where = (
        f"on {told} of {promoted.replicas} replicas" if promoted.replicas else "in the store; no replica is registered"
    )
    click.echo(f"{tag} is version {number} {where}; it was {promoted.previous}.")
    for url in promoted.absent:
        click.echo(f"{url} did not hear of it: it answers nothing until it has caught up.")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"{name}={text} is no NAME=NUMBER.", param_hint="--metric") from None


def _stop_as_interrupted() -> None:
    """Let SIGTERM, until something else is to become of it, do what Ctrl+C does: who is still starting cleans up, too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _serve_until_told(running: Listener, words: list[str], *, stop_with_input: bool) -> None:
    """Say what there is to say, and run until SIGTERM, Ctrl+C or, where it is wanted, the end of standard input."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: running.stopped.set())
    for line in words:
        click.echo(line)
    sys.stdout.flush()
    if stop_with_input:
        threading.Thread(target=_stop_with_input, args=(running.stopped,), daemon=True).start()
    running.stopped.wait()
    running.close()


def _stop_with_input(stopped: threading.Event) -> None:
    while os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    stopped.set()
