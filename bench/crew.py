"""Workers that are killed at random and come back: a program of its own that prints what the job made of it.

    python -m bench.crew ADDRESS PLAN        PLAN: a `Plan` as JSON

The workers are forked from this process, which has imported all they need and has no thread: so a new one is there in
milliseconds, as on a machine that is kept warm, and thirty of them start without waiting for a core. Alive is a worker whose
process exists.
"""

from __future__ import annotations

import heapq
import os
import random
import signal
import struct
import sys
import time
import traceback
from typing import Any

import msgspec
import numpy as np

import headwater as hw
from headwater._connect import connect_session

PARAMETERS = 10_000
START_S = 60.0  # until all workers have made a step
LOOK_S = 0.002  # between looks at the job while a commit is waited for
_JOINED = struct.Struct("d")


class Plan(msgspec.Struct, frozen=True):
    """What happens to the crew. Times in seconds; a step is a sleep of step_s, as while a device computes."""

    consistency: str
    workers: int
    step_s: float
    kill_every_s: float  # on average; 0: nobody is killed
    away_s: float  # from the death of a worker until its successor's process starts
    warm_s: float  # with kills, and not measured
    window_s: float
    seed: int


class Outcome(msgspec.Struct, frozen=True):
    """What was seen. Times in seconds since the kills began, which is when a step did."""

    accepted: int  # pushes that counted in the window
    opened_s: float  # the window's first moment: of the first commit after the warm-up
    closed_s: float  # and its last: of the first commit after window_s
    alive: float  # share of workers, on average in the window
    kills: list[tuple[float, int]]  # when and whom
    join_s: float  # median, from the start of a process until it is connected


class Crew:
    """The workers' processes, and who of them is to come."""

    def __init__(self, address: str, plan: Plan) -> None:
        self._address, self._plan = address, plan
        self._pids: dict[int, int] = {}  # by worker
        self._reader, self._writer = os.pipe()
        self._changes: list[tuple[float, int]] = []  # in the number of processes
        for index in range(plan.workers):
            self._fork(index)
        self._job = connect_session(address, role="observer")

    def run(self) -> Outcome:
        """Live through the plan."""
        plan, chance = self._plan, random.Random(self._plan.seed)
        deadline = time.monotonic() + START_S
        while sum(worker.pushes > 1 for worker in self._job.stats().workers) < plan.workers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"expected every worker to make a step within {START_S:.0f} s")
            time.sleep(plan.step_s / 10)
        _, start = self._commit()
        os.read(self._reader, 1 << 16)  # the first starts were all at once
        kills: list[tuple[float, int]] = []
        coming: list[tuple[float, int]] = []
        is_fatal = plan.kill_every_s > 0
        until = start + (plan.warm_s if is_fatal else 0.0)
        next_kill = start + chance.expovariate(1 / plan.kill_every_s) if is_fatal else float("inf")

        def live(until: float) -> None:
            """Kill and start workers until then."""
            nonlocal next_kill
            while (now := min(until, next_kill, *(when for when, _ in coming[:1]))) < until:
                time.sleep(max(now - time.monotonic(), 0.0))
                if coming and coming[0][0] == now:
                    self._fork(heapq.heappop(coming)[1])
                    continue
                next_kill += chance.expovariate(1 / plan.kill_every_s)
                if self._pids:
                    victim = chance.choice(sorted(self._pids))
                    self._kill(victim)
                    kills.append((time.monotonic() - start, victim))
                    heapq.heappush(coming, (time.monotonic() + plan.away_s, victim))
            time.sleep(max(until - time.monotonic(), 0.0))

        live(until)
        before, opened = self._commit()
        live(opened + plan.window_s)
        after, closed = self._commit()
        alive = self._mean_alive(opened, closed)
        for index in list(self._pids):
            if os.waitpid(self._pids[index], os.WNOHANG)[0]:
                raise RuntimeError(f"worker {index} ended by itself")
            self._kill(index)
        os.close(self._writer)
        joins = [_JOINED.unpack(entry)[0] for entry in iter(lambda: os.read(self._reader, _JOINED.size), b"")]
        return Outcome(
            after - before, opened - start, closed - start, alive / plan.workers, kills,
            float(np.median(joins)) if joins else 0.0,
        )  # fmt: skip

    def _commit(self) -> tuple[int, float]:
        """Wait for the next commit; returns how many pushes have counted by then, and when that was."""
        commit = self._job.stats().commit
        while (stats := self._job.stats()).commit == commit:
            time.sleep(LOOK_S)
        return sum(worker.pushes - worker.refused for worker in stats.workers), time.monotonic()

    def _fork(self, index: int) -> None:
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            try:
                work(self._address, self._plan, index, self._writer, start)
            except BaseException:  # noqa: BLE001 - all of it ends here
                traceback.print_exc()
            finally:
                os._exit(1)
        self._pids[index] = pid
        self._changes.append((start, 1))

    def _kill(self, index: int) -> None:
        pid = self._pids.pop(index)
        os.kill(pid, signal.SIGKILL)
        self._changes.append((time.monotonic(), -1))
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"worker {index} ended by itself")

    def _mean_alive(self, start: float, stop: float) -> float:
        """Return how many processes there were on average."""
        return sum(change * max(stop - max(when, start), 0.0) for when, change in self._changes) / (stop - start)


def work(address: str, plan: Plan, index: int, joined: int, start: float) -> None:
    """Be a worker until killed."""
    os.environ["HEADWATER_WORKER"] = str(index)
    session = hw.connect(address, workers=plan.workers, consistency=hw.Consistency.parse(plan.consistency))
    os.write(joined, _JOINED.pack(time.monotonic() - start))
    session.register({"weights": np.zeros(PARAMETERS, np.float32)}, hw.optim.SGD(lr=1e-3))
    session.gradients["weights"].fill(1e-3)
    while True:
        time.sleep(plan.step_s)
        session.step()


def main(address: str, plan: str) -> Any:
    """Print the outcome."""
    outcome = Crew(address, msgspec.json.decode(plan, type=Plan)).run()
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
