"""`headwater demo`: train a small GPT on real text with two workers, watch it, and read what it writes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from headwater._display import Display
from headwater._errors import HeadwaterError, SettingError
from headwater._launch import LocalJob, save_job, terminate_as_interrupt

_SAMPLE_CHARACTERS = 400


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
    """Train, save, sample; returns the exit status. Ctrl+C saves what was learnt."""
    if importlib.util.find_spec("torch") is None:
        raise SettingError("Expected PyTorch for the demo, got none: pip install 'headwater[torch]'.")
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
    processes = f"{servers} server{'s' * (servers > 1)} and {workers} worker{'s' * (workers > 1)}"
    console.print(f"Starting {processes}; their output goes to {folder}/worker-*.log", highlight=False)
    with terminate_as_interrupt(), job:
        try:
            with Display("GPT", console) as display:
                status = job.wait(lambda: _tick(job, display))
                _tick(job, display)
        except KeyboardInterrupt:
            console.print("Stopping.")
            status = 130
        if status not in (0, 130):
            _show_logs(console, folder)
            return status
        if not save_job(job, saved):
            return status
    if status == 0:
        console.rule("the model writes")
        sample = [*script, *source, "--resume", str(saved), "--sample", str(_SAMPLE_CHARACTERS)]
        status = subprocess.run(sample, check=False).returncode
        console.rule()
    _say_next(console, saved, [*(["--text", str(text)] if text else [])])
    return status


def _tick(job: LocalJob, display: Display) -> None:
    try:
        display.update(job.observer().stats())
    except HeadwaterError:
        return  # the job is ending; its exit status says how


def _show_logs(console: Console, folder: Path) -> None:
    for log in sorted(folder.glob("worker-*.log")):
        lines = log.read_text(errors="replace").splitlines()[-15:]
        console.print(f"{log}:", *lines, sep="\n  ", markup=False, highlight=False)


def _say_next(console: Console, saved: Path, source: list[str]) -> None:
    # As this person can type it: in a virtual environment that is not active the command is no word yet.
    command = "headwater" if shutil.which("headwater") else os.path.relpath(Path(sys.executable).with_name("headwater"))
    again = " ".join([command, "demo", "--resume", *source])
    console.print(
        f"The model is {saved}/model.safetensors. Next:\n"
        f"  {again}\n"
        f"  {command} run -n 2 {os.path.relpath(example_path())} --minutes 2\n"
        f"  {command} demo --text your-own.txt",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
