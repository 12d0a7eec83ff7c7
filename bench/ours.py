"""Headwater's side: workers whose step is the session's. The servers are started as users start them, by `fleet_server` in `core`."""

from __future__ import annotations

import os
import time
from itertools import cycle
from typing import Any

import numpy as np

import headwater as hw
from bench.harness import Step
from bench.peers.plain import PlainTable
from bench.traffic import BATCH, DIM, batches, fill_batches, gradients, lookups
from headwater import _kernels
from headwater._transport import Address

ROW_OPTIMIZER = hw.optim.RowwiseAdagrad(lr=0.05)


def optimizer_of(name: str) -> hw.optim.SGD | hw.optim.Adam:
    """Return the settings that the figures name."""
    match name:
        case "sgd":
            return hw.optim.SGD(lr=1e-3)
        case "clipped":
            return hw.optim.SGD(lr=1e-3, clip_norm=1.0)
        case "adam":
            return hw.optim.Adam(lr=1e-3)
        case "adam, clipped":
            return hw.optim.Adam(lr=1e-3, clip_norm=1.0)
    raise ValueError(name)


def connect(address: str, workers: int, consistency: str = "bsp", transport: str = "auto") -> hw.Session:
    """Connect; the worker's index and the token are in the environment."""
    return hw.connect(address, workers=workers, consistency=hw.Consistency.parse(consistency), transport=transport)


def pushing_worker(
    address: str,
    workers: int,
    parameters: int,
    optimizer: str = "sgd",
    consistency: str = "bsp",
    transport: str = "shm",
) -> Step:
    """Return a step that pushes gradients that are already in place and pulls the parameters: nothing but Headwater."""
    session = connect(address, workers, consistency, transport)
    session.register({"weights": np.full(parameters, 0.5, np.float32)}, optimizer=optimizer_of(optimizer))
    session.gradients["weights"].fill(1e-3)
    return session.step


def working_worker(
    address: str, workers: int, consistency: str, parameters: int, work: list[tuple[float, int]]
) -> Step:
    """Return a step that works first. work: by worker, seconds to sleep, as when a device computes, and matrix products."""
    push = pushing_worker(address, workers, parameters, consistency=consistency)
    sleep_s, products = work[int(os.environ["HEADWATER_WORKER"])]
    matrix = np.full((512, 512), 1e-3, np.float32)
    product = np.empty_like(matrix)

    def step() -> None:
        if sleep_s:
            time.sleep(sleep_s)
        for _ in range(products):
            np.matmul(matrix, matrix, out=product)
        push()

    return step


def table_worker(address: str, workers: int, kind: str, rows: int, policy: dict[str, Any], is_first: bool) -> Step:
    """Return a step that pulls a batch and pushes its gradients. is_first: it makes all rows before."""
    session = connect(address, workers, "asp", "shm")
    table = open_table(session, policy)
    if is_first:
        fill(table, rows)
    index = session.index
    traffic, raw = cycle(batches(kind, rows, seed=index)), gradients(BATCH, index)

    def step() -> None:
        ids = next(traffic)
        table.pull(ids)
        table.push(ids, raw)

    return step


def training_worker(
    address: str, workers: int, rows: int, policy: dict[str, Any], compute_s: float, batch: int, is_first: bool
) -> Step:
    """Return a step that pulls a batch, lets the next one be on its way, sleeps as while a device computes, and pushes.

    is_first: it makes all rows before.
    """
    session = connect(address, workers, "asp", "shm")
    table = open_table(session, policy)
    if is_first:
        fill(table, rows)
    traffic, raw = cycle([ids[:batch] for ids in batches("zipf", rows, seed=0)]), gradients(batch, 0)
    ids = next(traffic)

    def step() -> None:
        nonlocal ids
        table.pull(ids)
        following = next(traffic)
        table.prefetch(following)
        time.sleep(compute_s)
        table.push(ids, raw)
        ids = following

    return step


#: An id whose row counts the pushes of a run: each adds one to its value.
PROBE = -1


def updating_worker(address: str, rows: int, batch: int, interval_s: float, seconds: float) -> Step:
    """Make all rows, then return a step that pushes gradients for `batch` rows every `interval_s`, for so many seconds.

    It returns for each push the probe's value after it, and a moment before it counted.
    """
    session = connect(address, 1, "asp")
    table = session.table("rows", dim=DIM, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
    for ids in fill_batches(rows):
        table.push(ids, np.full((len(ids), DIM), -1.0, np.float32))
    chance, gradient = np.random.default_rng(0), np.full((batch + 1, DIM), -1.0, np.float32)
    value = 0

    def step() -> list[tuple[int, float]]:
        nonlocal value
        begin, found = time.perf_counter(), []
        for i in range(round(seconds / interval_s)):
            time.sleep(max(begin + i * interval_s - time.perf_counter(), 0.0))
            ids = np.append(chance.choice(rows, batch, replace=False), PROBE)
            value += 1
            found.append((value, time.perf_counter()))
            table.push(ids, gradient)
            table.stats()  # answered when the push has counted
        return found

    return step


def lookup_reader(address: str, rows: int, count: int) -> Step:
    """Return a step that looks `count` rows up at a replica."""
    reader, traffic = hw.lookup(address), lookups(rows, count)
    return lambda: reader.pull("rows", next(traffic))


def watching_reader(address: str, rows: int, count: int, seconds: float) -> Step:
    """Return a step that looks rows up, the probe among them, every millisecond for so many seconds.

    It returns each value of the probe with the moment when it was first seen, the durations of the lookups, and the replica's own lag.
    """
    reader, traffic = hw.lookup(address), lookups(rows, count)

    def step() -> tuple[list[tuple[int, float]], list[float], float]:
        begin, seen, took = time.perf_counter(), [(-1, 0.0)], []
        while time.perf_counter() < begin + seconds:
            ids = next(traffic).copy()
            ids[0] = PROBE
            asked = time.perf_counter()
            value = int(reader.pull("rows", ids)[0, 0])
            now = time.perf_counter()
            took.append(now - asked)
            if value > seen[-1][0]:
                seen.append((value, now))
            time.sleep(1e-3)
        return seen[1:], took, reader.stats().tables[0].lag_p99_s

    return step


def open_table(session: hw.Session, policy: dict[str, Any]) -> hw.Table:
    """Declare the table of all figures."""
    chosen = hw.RowPolicy(**policy)
    return session.table("rows", dim=DIM, optimizer=ROW_OPTIMIZER, initial=hw.Uniform(0.01), policy=chosen)


def fill(table: hw.Table, rows: int) -> None:
    """Let ids 0 … rows − 1 have rows."""
    for ids in fill_batches(rows):
        table.push(ids, np.zeros((len(ids), DIM), np.float32))
    table.pull(ids[:1])  # answered when all of it has counted


def plain_server(rows: int, workers: int) -> str:
    """Be a server whose tables are plain arrays; returns its address. All else is as in any other server."""

    def make(dim: int, *_: Any, threads: int, **__: Any) -> PlainTable:
        return PlainTable(rows, dim, threads)

    _kernels.Table = make  # type: ignore[assignment,misc]
    threads = len(os.sched_getaffinity(0))
    token = os.environ["HEADWATER_TOKEN"]
    server = hw.Server(Address.parse("tcp://127.0.0.1:0"), token=token, workers=workers, threads=threads)
    _kept.append(server)
    return server.address.tcp


_kept: list[hw.Server] = []
