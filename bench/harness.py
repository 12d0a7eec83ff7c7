"""How the bench measures: contestants take turns.

    process     a real process that builds its step once and runs it when told to
    contestant  the processes that step together; with the servers they need, they are idle between their turns
    turn        every process of a contestant runs its step so many times; the moments at which steps ended come back
    round       one turn of every contestant, in reversed order every other round

So a machine that slows down for a while slows everybody down, and figures are medians over rounds of ratios within a round.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import select
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
import traceback
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple

#: Of every process of a run: one compute thread, as two workers on two cores need.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
ROUNDS = 5
ROUNDS_MIN = 3  # however slow the machine is
BUDGET_S = 110.0  # no round begins later than so long after the first
TURN_S = 1.2  # a turn of a contestant
ANSWER_S = 90.0  # until a process must be ready, or have finished its turn
CLOSE_S = 3.0  # until a process that was asked to end is killed

Step = Callable[[], Any]


class BenchError(Exception):
    """A figure could not be measured; the message says why."""


class Trace(NamedTuple):
    """What one process did in a turn."""

    stamps: list[float]  # when the first step began, then when each ended: seconds, one clock for all processes
    values: list[Any]  # what each step returned


class Process:
    """A process of the bench: `make` is called there and returns a step, or what others must know of a server.

    make: as "bench.peers.echo.echo_server", a name, so that what it needs (PyTorch, say) is imported in that process only.
    """

    def __init__(self, make: str, arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
        self.name = f"{make}{arguments}"
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_live, args=(theirs, make, arguments, environment), daemon=True)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl+C is ours, who then close the pipe
        self._process.start()
        signal.signal(signal.SIGINT, before)
        theirs.close()
        self._made: list[Any] = []

    def ready(self) -> Any:
        """Wait until it is made; returns a server's answer, None for a step."""
        if not self._made:
            self._made.append(self.answer())
        return self._made[0]

    def begin(self, steps: int) -> None:
        """Have it run its step so often; `answer` returns the Trace."""
        self._pipe.send(steps)

    def answer(self) -> Any:
        """Wait for what it has to say. Raises BenchError when it failed, died or takes too long."""
        if not self._pipe.poll(ANSWER_S):
            raise BenchError(f"{self.name} gave no answer within {ANSWER_S:.0f} s")
        try:
            is_fine, answer = self._pipe.recv()
        except EOFError:
            self._process.join(CLOSE_S)
            raise BenchError(f"{self.name} ended with exit code {self._process.exitcode}") from None
        if not is_fine:
            raise BenchError(f"{self.name} failed: {answer}")
        return answer

    @property
    def is_alive(self) -> bool:
        """Whether the process exists."""
        return self._process.is_alive()

    def ask_to_end(self) -> None:
        """Let it end by itself once it is idle."""
        self._pipe.close()

    def end(self, deadline: float) -> None:
        """Wait for its end until the deadline, then kill it."""
        self._process.join(max(deadline - time.perf_counter(), 0))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _live(pipe: Connection, make: str, arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    """The life of a process of the bench."""
    os.environ.update(environment)
    try:
        module, _, function = make.rpartition(".")
        made = getattr(importlib.import_module(module), function)(*arguments)
        pipe.send((True, None if callable(made) else made))
        while True:
            steps = pipe.recv()
            pipe.send((True, run_steps(made, steps)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as error:  # noqa: BLE001 - the parent reports it
        with contextlib.suppress(OSError):
            pipe.send((False, f"{error}\n{traceback.format_exc()}"))
    os._exit(0)  # libraries' threads and exit handlers would wait for peers that have gone


def run_steps(step: Step, count: int) -> Trace:
    """Run a step `count` times, after one that is not measured: it warms the caches and lines the workers up."""
    step()
    values = []
    stamps = [time.perf_counter()]
    for _ in range(count):
        values.append(step())
        stamps.append(time.perf_counter())
    return Trace(stamps, values)


class Fleet:
    """All processes of a figure, and a folder for their files; everything is gone when the block ends, whatever happened."""

    def __init__(self) -> None:
        self._processes: list[Process] = []
        self._commands: list[subprocess.Popen[str]] = []
        self.folder = ""

    def __enter__(self) -> Fleet:
        self.folder = tempfile.mkdtemp(prefix="headwater-bench-")
        return self

    def start(self, make: str, *arguments: Any, **environment: str) -> Process:
        """Start a process of the bench."""
        process = Process(make, arguments, environment)
        self._processes.append(process)
        return process

    def command(self, words: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        """Start a program, in a session of its own so that Ctrl+C reaches us first; its input ends when we do."""
        pipe = subprocess.PIPE
        child = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment, start_new_session=True)
        self._commands.append(child)
        return child

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for process in self._processes:
            process.ask_to_end()
        deadline = time.perf_counter() + CLOSE_S
        for process in self._processes:
            process.end(deadline)
        for child in self._commands:
            end_command(child)
        shutil.rmtree(self.folder, ignore_errors=True)
        signal.signal(signal.SIGINT, before)


def read_line(child: subprocess.Popen[str]) -> str:
    """Wait for a line of a program's output; empty when none comes in time."""
    assert child.stdout is not None
    is_there, _, _ = select.select([child.stdout], [], [], ANSWER_S)
    return child.stdout.readline() if is_there else ""


def end_command(child: subprocess.Popen[str]) -> None:
    """End a program by ending its input, kill it if it does not obey, and reap it."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    try:
        child.wait(CLOSE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()


class Contestant:
    """Processes that step together.

    worth: what one step of one process counts, for instance 2 where it does the work of two workers.
    pace: how many steps each process makes for one of the first; workers that wait for nobody need not be equal.
    """

    def __init__(
        self,
        name: str,
        processes: Sequence[Process],
        *,
        worth: float = 1,
        pace: Sequence[float] = (),
        turn_s: float = TURN_S,
    ) -> None:
        self.name, self.processes, self.worth, self.turn_s = name, list(processes), worth, turn_s
        self._pace = list(pace) or [1.0] * len(processes)
        self._steps = 0
        for process in processes:
            process.ready()

    def turn(self) -> list[Trace]:
        """Run every process for about `turn_s`; the first turn is a short one that finds out how many steps that takes."""
        if self._steps:
            return self._run(self._steps)
        for steps in (3, 30):
            traces = self._run(steps)
            one_s = (traces[0].stamps[-1] - traces[0].stamps[0]) / steps
            if one_s * steps > 0.1:
                break
        self._steps = min(max(round(self.turn_s / one_s), 3), 20_000)
        return traces

    def _run(self, steps: int) -> list[Trace]:
        for process, pace in zip(self.processes, self._pace, strict=True):
            process.begin(max(round(steps * pace), 1))
        return [process.answer() for process in self.processes]

    def rate(self) -> float:
        """Run a turn; returns steps per second, all processes together."""
        return self.worth * joint_rate(self.turn())

    def timings(self) -> dict[str, float]:
        """Run a turn of steps that return seconds by name; returns their medians."""
        found = [value for trace in self.turn() for value in trace.values]
        return {name: statistics.median(value[name] for value in found) for name in found[0]}

    def latency_us(self) -> float:
        """Run a turn; returns the median duration of a step in microseconds."""
        stamps = self.turn()[0].stamps
        return 1e6 * statistics.median(b - a for a, b in pairwise(stamps))


def joint_rate(traces: Sequence[Trace]) -> float:
    """Return the sum of the processes' rates while all of them were at work: until the first of them had finished."""
    limit = min(trace.stamps[-1] for trace in traces)
    total = 0.0
    for stamps, _ in traces:
        steps = max(bisect_right(stamps, limit) - 1, 1)
        total += steps / (stamps[steps] - stamps[0])
    return total


class Spread(NamedTuple):
    """A median and its quartiles."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Summarise; the quartiles are among the values or between two of them."""
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


class Samples(dict[str, list[float]]):
    """What was measured: a value a round, by name."""

    def median(self, name: str) -> float:
        return spread(self[name]).median

    def ratio(self, above: str, below: str) -> float:
        """Return the median of the ratios within a round."""
        return spread([a / b for a, b in zip(self[above], self[below], strict=True)]).median

    def medians(self, unit: str) -> dict[str, float]:
        """Return all medians, the unit in their names."""
        return {f"{name} ({unit})": self.median(name) for name in self}

    def only(self, name: str) -> Samples:
        """Take one measurement out, for it has another unit."""
        return Samples({name: self.pop(name)})

    def show(self, unit: str) -> None:
        """Print medians and quartiles."""
        for name, values in self.items():
            low, median, high = spread(values)
            print(f"  {name:<40} {median:9.4g} [{low:.4g} – {high:.4g}] {unit}, {len(values)} runs", flush=True)


def interleave(
    *contestants: Contestant | Mapping[str, Callable[[], float | dict[str, float]]], rounds: int = ROUNDS
) -> Samples:
    """Take every measurement once a round, in turn: contestants' rates, or anything by name, or several things at once.

    A first round is thrown away. On a machine that is too slow for all rounds there are fewer.
    """
    measures: dict[str, Callable[[], float | dict[str, float]]] = {}
    for each in contestants:
        measures |= {each.name: each.rate} if isinstance(each, Contestant) else each
    samples = Samples()
    start = time.perf_counter()
    for name in measures:
        measures[name]()
    for i in range(rounds):
        if i >= ROUNDS_MIN and time.perf_counter() - start > BUDGET_S:
            break
        for name in reversed(measures) if i % 2 else measures:
            found = measures[name]()
            for key, value in found.items() if isinstance(found, dict) else [(name, found)]:
                samples.setdefault(key, []).append(value)
    return samples
