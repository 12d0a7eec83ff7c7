"""Servers that are killed at any moment and started again, and workers that write down how far they are.

The servers are `headwater server` processes, killed by SIGKILL. A worker works until the page says at which step to stop.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

import headwater as hw
from bench.harness import BenchError, Fleet, Process, Step, end_command, read_line
from headwater._connect import connect_session

STUCK_S = 30.0  # without any step: the job hangs
LOOK_S = 0.0005  # between looks at the page
SLOTS = 1 << 14  # so many steps of a worker are told apart
WIDTH = 4  # of a row
PATTERNS = 16


class Page:
    """What workers and the bench tell each other, in memory that they share: a row for each worker, and one for the end."""

    def __init__(self, path: str, workers: int) -> None:
        is_new = not Path(path).exists()
        self._rows = np.memmap(path, np.float64, "w+" if is_new else "r+", shape=(workers + 1, 3))
        if is_new:
            self._rows[-1, 0] = np.inf
        self.path = path

    @property
    def stop(self) -> float:
        """How many steps each worker makes."""
        return float(self._rows[-1, 0])

    def end(self, after: int) -> None:
        """Let all workers stop after the same number of steps. after: more than are made while the page is read and written."""
        self._rows[-1, 0] = self.steps.max() + after

    def note(self, worker: int, steps: int, clock: int) -> None:
        """Say that a step counts. steps: of this worker; they grow even where its clock goes back."""
        self._rows[worker, 1:] = clock, time.monotonic()
        self._rows[worker, 0] = steps  # last: who sees it sees the others

    @property
    def steps(self) -> np.ndarray:
        return np.array(self._rows[:-1, 0])

    @property
    def clocks(self) -> np.ndarray:
        return np.array(self._rows[:-1, 1])

    def wait(self, processes: Sequence[Process]) -> float:
        """Wait until every worker has made a step after now; returns when the first was made. Raises BenchError when the job hangs."""
        before, first = self.steps, 0.0
        deadline = time.monotonic() + STUCK_S
        while (waiting := self.steps <= before).any():
            if not first and not waiting.all():
                first = float(self._rows[:-1, 2][~waiting].min())
            for process in processes:
                if not process.is_alive:
                    process.answer()  # which raises what it died of
            if time.monotonic() > deadline:
                raise BenchError(f"the job hangs: no step of worker {np.flatnonzero(waiting)} in {STUCK_S:.0f} s")
            time.sleep(LOOK_S)
        return first or float(self._rows[:-1, 2].min())


class Servers:
    """The servers of a durable job, and its store on a disk; both are gone when the block ends. durability: as `--durability` takes it.

    Of a replicated job the coordinator has a process of its own; server i and its follower are processes i and i + count, in either order.
    """

    def __init__(self, fleet: Fleet, count: int, durability: str, workers: int, consistency: str = "bsp") -> None:
        self._fleet, self.count, self._durability = fleet, count, durability
        self._first = ["--workers", str(workers), "--servers", str(count), "--consistency", consistency]
        self.is_replicated = durability.startswith("replicated")
        self.store = tempfile.mkdtemp(prefix="headwater-bench-", dir="/var/tmp")
        self._sockets = tempfile.mkdtemp(dir=fleet.folder)
        self.address = f"unix://{self._sockets}/{'coordinator' if self.is_replicated else 0}"
        self._children: list[Popen[str]] = []
        self._coordinator: Popen[str] | None = None
        self._observer: hw.Session | None = None
        self.leaders = list(range(count))  # the process that is server i at the moment

    def __enter__(self) -> Servers:
        if self.is_replicated:
            self._coordinator = self._command("coordinator", [*self._first, *self._kept(0), "--coordinator"])
        self._children = [self._start(i) for i in range(self.count * (1 + self.is_replicated))]
        if self.is_replicated:
            self._observer = connect_session(self.address, role="observer")
        return self

    def _start(self, i: int, *, resumes: bool = False) -> Popen[str]:
        words = ["--join", self.address] if i or self.is_replicated else self._first
        words = words + (self._kept(i % self.count) if self._durability else [])
        words += ["--resume"] if resumes and self._durability else []
        words += ["--follow"] if i >= self.count or (resumes and self.is_replicated) else []
        threads = max(1, len(os.sched_getaffinity(0)) // self.count)
        return self._command(str(i), [*words, "--threads", str(threads)])

    def _kept(self, index: int) -> list[str]:
        return ["--durability", self._durability, "--store", self.store, "--index", str(index)]

    def _command(self, name: str, words: list[str]) -> Popen[str]:
        words = ["server", "--listen", f"unix://{self._sockets}/{name}", *words, "--stop-with-input"]
        environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
        child = self._fleet.command([str(Path(sys.executable).with_name("headwater")), *words], environment)
        line = read_line(child)
        if "listening on" not in line:
            raise BenchError(f"expected `headwater server` to say where it listens, got {line!r}")
        return child

    def wait_whole(self) -> None:
        """Wait until every server of a replicated job has its follower. Raises BenchError when one does not come."""
        deadline = time.monotonic() + STUCK_S
        while self._observer is not None and self._observer.stats().followers < self.count:
            if time.monotonic() > deadline:
                raise BenchError(f"expected every server to have a follower within {STUCK_S:.0f} s")
            time.sleep(0.01)

    def kill(self, *victims: int) -> float:
        """Kill servers' processes at once and start them again; returns when they were killed."""
        when = time.monotonic()
        for i in victims:
            if self._children[i].poll() is not None:
                raise BenchError(f"server {i} ended by itself with exit status {self._children[i].returncode}")
            self._children[i].send_signal(signal.SIGKILL)
        for i in victims:
            end_command(self._children[i])
            Path(self._sockets, str(i)).unlink()
            if self.is_replicated and self.leaders[i % self.count] == i:
                self.leaders[i % self.count] = (i + self.count) % (2 * self.count)
        for i in victims:
            self._children[i] = self._start(i, resumes=True)
        return when

    def choose(self, chance: random.Random) -> list[int]:
        """Draw who is to be killed: one server's process, or one of each."""
        servers = chance.choice([[i] for i in range(self.count)] + [list(range(self.count))])
        return [i + self.count * (self.is_replicated and chance.random() < 0.5) for i in servers]

    def pid(self, i: int) -> int:
        return self._children[i].pid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._observer is not None:
            self._observer.close()
        # The coordinator first: the ends of servers are no losses then.
        for child in [self._coordinator, *self._children]:
            if child is not None:
                end_command(child)
        shutil.rmtree(self.store, ignore_errors=True)


def tables_of(session: hw.Session) -> list[hw.Table]:
    """Declare a table whose pushes belong to the step, and one whose pushes count at once."""
    kinds = {"of the step": None, "at once": hw.asp()}
    settings: dict[str, Any] = {"optimizer": hw.optim.SGD(lr=1.0), "initial": hw.Constant(0.0)}
    return [session.table(name, WIDTH, consistency=kind, **settings) for name, kind in kinds.items()]


class Found(NamedTuple):
    """What a worker says after its life."""

    steps: int  # that it has made
    state: dict[str, np.ndarray]  # of the job


def counting_worker(address: str, path: str, workers: int) -> Step:
    """Return a step that is a whole life, and then says what is found. In that life each step adds 1 to an element, and to a row of each
    table, of its own."""
    session = hw.connect(address, workers=workers)
    share = workers if session.consistency.kind == "bsp" else 1  # of the mean
    tables = tables_of(session)
    session.register({"counts": np.zeros(workers * SLOTS, np.float32)}, hw.optim.SGD(lr=1.0))
    page, steps, begin = Page(path, workers), 0, session.index * SLOTS
    counts = session.gradients["counts"]
    rows = np.empty((1, WIDTH), np.float32)

    def live() -> Found:
        nonlocal steps
        while steps < page.stop:
            slot = begin + steps % SLOTS
            for table in tables:
                rows.fill(-1.0 if table is tables[1] else -share)
                table.push(np.array([slot]), rows)
            counts[slot] = -share
            session.step()
            counts[slot] = 0
            steps += 1
            page.note(session.index, steps, session.clock)
        rows_of = {table.name: table.pull(np.arange(workers * SLOTS)) for table in tables}
        return Found(steps, session.pull() | rows_of)

    return live


def adam_step(session: hw.Session, step: int) -> None:
    """Make the step of this number."""
    rng = np.random.default_rng(step % PATTERNS)
    session.step({name: rng.standard_normal(array.shape, np.float32) for name, array in ADAM.items()})


ADAM = {"w": np.linspace(-1, 1, 4000, dtype=np.float32), "b": np.zeros(5, np.float32)}


def adam_state(session: hw.Session) -> dict[str, np.ndarray]:
    """Return parameters and slots."""
    planes, _ = session.read_optimizer()
    return {f"{plane}/{name}": array for plane, arrays in planes.items() for name, array in arrays.items()}


def adam_worker(address: str, path: str) -> Step:
    """Return a step that is a whole life, and afterwards says what is found; that depends on the number of steps alone."""
    session = hw.connect(address, workers=1)
    session.register(ADAM, hw.optim.Adam(lr=1e-3))
    page, steps = Page(path, 1), 0

    def live() -> Found:
        nonlocal steps
        while steps < page.stop:
            adam_step(session, steps)
            steps += 1
            page.note(0, steps, session.clock)
        return Found(steps, adam_state(session))

    return live


def bare_writer(folder: str, size: int) -> Step:
    """Return a step that appends so many bytes to a file and waits until they are on the disk."""
    file = os.open(f"{folder}/bare", os.O_WRONLY | os.O_CREAT)
    data = np.random.default_rng(0).bytes(size)

    def step() -> None:
        done = 0
        while done < size:
            done += os.write(file, memoryview(data)[done:])
        os.fdatasync(file)

    return step


def resting_worker(address: str, path: str, workers: int, parameters: int, rest_s: float) -> Step:
    """Return a step that is a whole life: Adam, and a sleep in each step, as while a device computes. Only steps that count are noted."""
    session = hw.connect(address, workers=workers)
    session.register({"weights": np.full(parameters, 0.5, np.float32)}, hw.optim.Adam(lr=1e-3))
    session.gradients["weights"].fill(1e-3)
    page, steps = Page(path, workers), 0

    def live() -> None:
        nonlocal steps
        while steps < page.stop:
            time.sleep(rest_s)
            before = session.clock
            session.step()
            if session.clock > before:
                steps += 1
                page.note(session.index, steps, session.clock)
        session.close()  # the other one may have more to make: its last step before the job went back was not answered

    return live


def half_resting_worker(address: str, workers: int, parameters: int, rest_s: float = 0.0) -> Step:
    """Return a step of Adam that sleeps, too; for as long as it takes, unless it is said how long."""
    session = hw.connect(address, workers=workers)
    session.register({"weights": np.full(parameters, 0.5, np.float32)}, hw.optim.Adam(lr=1e-3))
    session.gradients["weights"].fill(1e-3)
    times = []
    for _ in range(max(5, 200_000_000 // parameters)):  # the first ones touch memory
        start = time.perf_counter()
        session.step()
        times.append(time.perf_counter() - start)
    rest_s = rest_s or statistics.median(times)

    def step() -> None:
        time.sleep(rest_s)
        session.step()

    return step
