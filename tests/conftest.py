"""What every test gets: the same random examples each run, and a check that it leaves nothing behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("headwater", derandomize=True, deadline=None, database=None)
settings.load_profile("headwater")

JOIN_S = 5.0  # a thread whose connection was closed ends at once; this is for a machine with no time


@pytest.fixture(scope="session", autouse=True)
def _torch_is_exact() -> None:
    """Let one thread make MKL's first call: where two make it at once, in one process of a hundred, its first results have 15 bits."""
    torch.tanh(torch.zeros(1))


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread, a child process, a socket or shared memory behind."""
    threads, descriptors, children = set(threading.enumerate()), _descriptors(), _children()
    yield
    for thread in set(threading.enumerate()) - threads:
        thread.join(JOIN_S)
    if _descriptors() - descriptors:  # held by a cycle, an exception with its frames for instance: not kept open
        gc.collect()
        gc.freeze()  # what lives on is not looked through after each test: that takes most of a second
    if _descriptors() - descriptors:
        gc.unfreeze()
        gc.collect()
    left = {thread.name for thread in set(threading.enumerate()) - threads if thread.is_alive()}
    left |= _descriptors() - descriptors | _children() - children
    assert not left, f"left behind: {', '.join(sorted(left))}"


def _descriptors() -> set[str]:
    """Name this process's open sockets and memory files; pipes belong to multiprocessing as well."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target, number = str(entry.readlink()), entry.stat().st_ino
        except OSError:  # the folder's own descriptor
            continue
        if target.startswith(("socket:", "/memfd:")):
            found.add(f"{target} {number}")
    return found


def _children() -> set[str]:
    """Name this process's children, multiprocessing's own helpers left out."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            children = (task / "children").read_text().split()
        except OSError:  # the thread has just ended
            continue
        for child in children:
            command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if "multiprocessing.resource_tracker" not in command and "multiprocessing.forkserver" not in command:
                found.add(f"process {child} {command.strip()}")
    return found
