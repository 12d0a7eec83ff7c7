"""The figure of embedding tables that are served, in the manner of `tables`: a million rows of 16 float32 values, uniform traffic.

A replica follows a training job; one reader looks rows up, 100 or 1,000 a request, over a Unix socket. Redis has the same rows.
The ceilings are a raw echo of the same bytes over the same kind of socket, and the bare lookup.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from bench.core import Answer, start_server
from bench.harness import BenchError, Contestant, Fleet, Samples, interleave, read_line
from bench.report import Check

ROWS = 1_000_000
COUNTS = 100, 1000  # ids a request
UPDATES = 100_000  # rows a second that are pushed
INTERVAL_S = 0.02  # between two pushes
RUN_S, RUNS = 3.0, 5  # of updates


def start_replica(fleet: Fleet, job: str) -> str:
    """Start `headwater replica`; returns its address."""
    command = [
        str(Path(sys.executable).with_name("headwater")),
        "replica",
        "--job",
        job,
        "--listen",
        "tcp://127.0.0.1:0",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    line = read_line(fleet.command([*command, "--stop-with-input"], environment))
    if "listening on" not in line:
        raise BenchError(f"expected `headwater replica` to say where it listens, got {line!r}")
    return line.split()[-1]


def requests(contestant: Contestant, count: int) -> Callable[[], dict[str, float]]:
    """Return what measures a reader: ids/s, and the durations of its requests in microseconds."""

    def measure() -> dict[str, float]:
        stamps = contestant.turn()[0].stamps
        took = 1e6 * np.diff(stamps)
        name = contestant.name
        return {
            f"{name}: ids/s": count * len(took) / (stamps[-1] - stamps[0]),
            f"{name}: p50 µs": float(np.percentile(took, 50)),
            f"{name}: p99 µs": float(np.percentile(took, 99)),
        }

    return measure


def freshness(pushed: list[tuple[int, float]], seen: list[tuple[int, float]]) -> list[float]:
    """Return for each push the seconds until its value of the probe, or a later one, was first seen; infinite: never."""
    values = [value for value, _ in seen]
    return [
        seen[at][1] - moment if (at := bisect_left(values, value)) < len(seen) else float("inf")
        for value, moment in pushed
    ]


def serving(fleet: Fleet) -> Answer:
    """deploy.5"""
    from bench.peers import redis

    redis.wait_until_ready(fleet.command(redis.server_command(fleet.folder), dict(os.environ)), fleet.folder)
    job = start_server(fleet)[0]
    batch = round(UPDATES * INTERVAL_S)
    trainer = fleet.start("bench.ours.updating_worker", job, ROWS, batch, INTERVAL_S, RUN_S)
    trainer.ready()
    replica = start_replica(fleet, job)

    def reader(name: str, make: str, *arguments: object) -> Contestant:
        return Contestant(name, [fleet.start(make, *arguments)])

    measures = {}
    for count in COUNTS:
        echo = fleet.start("bench.peers.echo.lookup_server", f"{fleet.folder}/echo-{count}", count).ready()
        is_first = count == COUNTS[0]
        for contestant in (
            reader(f"headwater, {count}", "bench.ours.lookup_reader", replica, ROWS, count),
            reader(f"Redis, {count}", "bench.peers.redis.reader", fleet.folder, ROWS, count, is_first),
            reader(f"raw echo, {count}", "bench.peers.echo.lookup_worker", echo, count),
        ):
            measures[contestant.name] = requests(contestant, count)
    samples = interleave(measures)
    samples.show("ids/s, µs")

    watcher = fleet.start("bench.ours.watching_reader", replica, ROWS, COUNTS[0], RUN_S)
    watcher.ready()
    watcher.begin(RUNS + 1)  # one more: it sees what the last push led to
    trainer.begin(RUNS)
    pushed, watched = trainer.answer(), watcher.answer().values
    seen = [each for values, _, _ in watched for each in values]
    updates = Samples(
        {
            "p99 of a row's lag (s)": [float(np.percentile(freshness(run, seen), 99)) for run in pushed.values],
            "rows/s pushed": [
                len(run) * batch / (b - a) for run, (a, b) in zip(pushed.values, pairwise(pushed.stamps), strict=True)
            ],
            "p99 of a lag, as the replica bounds it (s)": [bound for _, _, bound in watched[:-1]],
            "p99 of a lookup meanwhile (µs)": [1e6 * float(np.percentile(took, 99)) for _, took, _ in watched[:-1]],
        }
    )
    updates.show("")

    def times(what: str, above: str, below: str, count: int) -> float:
        return samples.ratio(f"{above}, {count}: {what}", f"{below}, {count}: {what}")

    few, many = COUNTS
    checks = [
        Check(f"times Redis's ids/s, {many} ids", times("ids/s", "headwater", "Redis", many), 8),
        Check(f"times Redis's ids/s, {few} ids", times("ids/s", "headwater", "Redis", few), 2),
        *(Check(f"of Redis's p99, {n} ids", times("p99 µs", "headwater", "Redis", n), 1, at_most=True) for n in COUNTS),
        Check("s, p99, from a push until its rows are seen", updates.median("p99 of a row's lag (s)"), 1, at_most=True),
        Check("rows/s pushed meanwhile", updates.median("rows/s pushed"), 0.99 * UPDATES),
    ]
    beside = {f"of a raw echo's ids/s, {n} ids": times("ids/s", "headwater", "raw echo", n) for n in COUNTS}
    medians = {name: values.median(name) for values in (samples, updates) for name in values}
    return checks, beside | medians


#: As of `tables`.
FIGURES: dict[str, tuple[str, str, Callable[[Fleet], Answer]]] = {
    "deploy.5": ("Lookups of a replica's rows against Redis's MGET, 1,000 ids a request", "times its ids/s", serving),
}
