"""`headwater demo`: train a small GPT on real text with two workers, watch it, serve it, and read what it writes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from headwater._display import Display
from headwater._errors import HeadwaterError, SettingError
from headwater._launch import LocalJob, save_job, terminate_as_interrupt
from headwater._messages import Stats
from headwater._publishing import Publication

_EARLY_STEPS = 20


def example_path() -> Path:
    """Return where the GPT example lies: in the installed package, or beside the sources."""
    here = Path(__file__).resolve().parent
    for path in (here / "examples" / "gpt.py", here.parents[1] / "examples" / "gpt.py"):
        if path.is_file():
            return path
    raise SettingError("Expected examples/gpt.py in the package, got none: install headwater again.")


def run_demo(
    folder: Path,
    *,
    text: Path | None,
    minutes: float,
    resume: bool,
    workers: int,
    servers: int,
    consistency: str,
) -> int:
    """Train, save, publish, serve; returns the exit status. Ctrl+C saves what was learnt."""
    missing = [name for name in ("torch", "starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingError(f"Expected {missing[0]} for the demo, got none: pip install 'headwater[torch,serve]'.")
    console = Console()
    saved = folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    script = [sys.executable, str(example_path())]
    source = ["--text", str(text.resolve())] if text else []
    command = [*script, *source, "--minutes", str(minutes)]
    if resume:
        if not saved.is_dir():
            raise SettingError(f"Expected a saved run in {saved} to resume, got none: run without --resume first.")
        command += ["--resume", str(saved)]
    job = LocalJob(command, workers=workers, servers=servers, consistency=consistency, outputs=folder)
    publisher = _Publisher(job, folder)
    processes = f"{servers} server{'s' * (servers > 1)} and {workers} worker{'s' * (workers > 1)}"
    console.print(f"Starting {processes}; their output goes to {folder}/worker-*.log", highlight=False)
    with terminate_as_interrupt(), job:
        try:
            with Display("GPT", console) as display:
                status = job.wait(lambda: _tick(job, display, publisher))
                _tick(job, display, publisher)
        except KeyboardInterrupt:
            console.print("Stopping.")
            status = 130
        if status not in (0, 130):
            _show_logs(console, folder)
            return status
        if not save_job(job, saved):
            return status
        last = publisher.publish_last() if status == 0 else None
    if last is not None:
        console.rule("the model is served, and writes")
        with terminate_as_interrupt():
            try:
                status = _serve(publisher.store, last)
            except KeyboardInterrupt:
                status = 130
        console.rule()
    _say_next(console, saved, publisher.store, [*(["--text", str(text)] if text else [])])
    return status


class _Publisher:
    """Publishes an early version as "prod", to have something to swap, and the last one."""

    def __init__(self, job: LocalJob, folder: Path) -> None:
        self._job, self._tokenizer = job, folder / "tokenizer.json"
        self.store = folder / "versions"
        self._has_begun = False

    def publish_early(self, stats: Stats) -> None:
        """Publish once some steps are made and the workers' tokenizer is known."""
        if self._has_begun or stats.commit < _EARLY_STEPS:
            return
        pieces = self._job.observer().state.get("pieces")
        if pieces is not None:
            self._has_begun = True
            self._tokenizer.write_text(json.dumps(pieces))
            self._publish(stats, "prod")

    def publish_last(self) -> int | None:
        """Publish what was learnt, as "prod" where nothing else is; returns the version's number, None where it could not be."""
        try:
            stats = self._job.observer().stats()
            self.publish_early(stats)
            version = self._publish(stats, None).result() if self._has_begun else None
        except HeadwaterError:
            return None  # which was said
        return None if version is None else version.id

    def _publish(self, stats: Stats, tag: str | None) -> Publication:
        held_out = next((w.figures["held_out"] for w in stats.workers if "held_out" in w.figures), None)
        metrics = {} if held_out is None else {"held_out": held_out}
        return self._job.observer().publish(tag, store=self.store, metrics=metrics, attach=[self._tokenizer])


def _serve(store: Path, last: int) -> int:
    """Serve "prod", let it write over HTTP, and move the tag to the last version meanwhile; returns the exit status."""
    here = str(example_path().parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "headwater", "serve", "--model", "gpt_serving:build", "--store", str(store)]
    server = subprocess.Popen(
        [*command, "--listen", "http://127.0.0.1:0"], stdout=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,  # Ctrl+C is for us, who then end it
    )  # fmt: skip
    try:
        assert server.stdout is not None
        found = re.search(r"http://[^/\s]+", server.stdout.readline())
        if found is None:
            return server.wait() or 1  # it has said why
        client = [sys.executable, str(example_path().with_name("gpt_serving.py")), found[0], "--store", str(store)]
        return subprocess.run([*client, "--next", str(last)], check=False, start_new_session=True).returncode
    finally:
        server.terminate()
        server.wait()


def _tick(job: LocalJob, display: Display, publisher: _Publisher) -> None:
    try:
        stats = job.observer().stats()
        display.update(stats)
        publisher.publish_early(stats)
    except HeadwaterError:
        return  # the job is ending; its exit status says how


def _show_logs(console: Console, folder: Path) -> None:
    for log in sorted(folder.glob("worker-*.log")):
        lines = log.read_text(errors="replace").splitlines()[-15:]
        console.print(f"{log}:", *lines, sep="\n  ", markup=False, highlight=False)


def _say_next(console: Console, saved: Path, store: Path, source: list[str]) -> None:
    # As this person can type it: in a virtual environment that is not active the command is no word yet.
    command = "headwater" if shutil.which("headwater") else os.path.relpath(Path(sys.executable).with_name("headwater"))
    again = " ".join([command, "demo", "--resume", *source])
    console.print(
        f"The model is in {saved}, its versions are in {store}. Next:\n"
        f"  {again}\n"
        f"  {command} run -n 2 {os.path.relpath(example_path())} --minutes 2\n"
        f"  {command} demo --text your-own.txt\n"
        f"  {command} versions --store {store}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
