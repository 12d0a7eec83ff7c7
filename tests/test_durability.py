"""A job outlives its servers: seen from sessions, with servers in this process that are closed and made anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest
from jobs import PATIENCE_S, TOKEN, assert_equal_bits, read_all

import headwater as hw
from headwater import durability
from headwater._transport import Address

SIZE = 40_000  # so that two servers have a part each
INITIAL: dict[str, npt.NDArray[np.float32]] = {
    "w": np.linspace(-1, 1, SIZE, dtype=np.float32),
    "b": np.zeros(5, np.float32),
}
T = TypeVar("T")

kinds = pytest.mark.parametrize("kind", [durability.snapshot(0), durability.log(0)], ids=str)
counts = pytest.mark.parametrize("servers", [1, 2])
transports = pytest.mark.parametrize("transport", ["shm", "tcp"])


class Cluster:
    """Servers that can be killed, as far as that is possible in one process, and started again with the same store."""

    def __init__(
        self, folder: Path, kind: durability.Durability, servers: int, workers: int, transport: str, **options: Any
    ) -> None:
        self.folder, self.kind, self.workers, self.transport, self.options = folder, kind, workers, transport, options
        self.addresses = [Address("unix", str(folder / str(i)), 0) for i in range(servers)]
        if transport == "tcp":
            self.addresses = [Address("tcp", "127.0.0.1", 0)] * servers
        self.servers: list[hw.Server] = []
        for i in range(servers):
            self.servers.append(self.start(i))
            self.addresses[i] = Address.parse(self.servers[i].address.tcp or self.servers[i].address.unix)

    def start(self, i: int, *, resumes: bool = False) -> hw.Server:
        common: dict[str, Any] = {
            "token": TOKEN, "threads": 1, "durability": self.kind, "store": str(self.folder / "store"), "index": i,
            "resumes": resumes,
        }  # fmt: skip
        if i:
            return hw.Server(self.addresses[i], join=self.addresses[0], **common)
        return hw.Server(self.addresses[i], workers=self.workers, servers=len(self.addresses), **common, **self.options)

    def restart(self, i: int) -> None:
        """Kill a server and start it again; returns when the job is whole again."""
        self.servers[i].close()
        self.servers[i] = self.start(i, resumes=True)

    def snapshot(self) -> None:
        assert self.servers[0].coordinator is not None
        self.servers[0].coordinator.take_snapshot(lambda _: None)

    def connect(self) -> hw.Session:
        return hw.connect(str(self.addresses[0]), token=TOKEN, timeout_s=PATIENCE_S, transport=self.transport)

    def run(self, body: Callable[[hw.Session], T]) -> list[T]:
        """Run the body once per worker, in threads; returns what it returned, by worker index."""
        everybody_is_there = threading.Barrier(self.workers)

        def work(_: int) -> tuple[int, T]:
            with self.connect() as session:
                everybody_is_there.wait(PATIENCE_S)
                return session.index, body(session)

        with ThreadPoolExecutor(self.workers) as pool:
            return [result for _, result in sorted(pool.map(work, range(self.workers)), key=lambda pair: pair[0])]


@contextmanager
def cluster_of(
    folder: Path,
    kind: durability.Durability,
    *,
    servers: int = 1,
    workers: int = 1,
    transport: str = "shm",
    **options: Any,
) -> Iterator[Cluster]:
    cluster = Cluster(folder, kind, servers, workers, transport, **options)
    try:
        yield cluster
    finally:
        for server in cluster.servers:
            server.close()


def gradient(step: int, worker: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng([step, worker])
    return {name: rng.integers(-8, 9, a.shape).astype(np.float32) for name, a in INITIAL.items()}


def undisturbed(steps: int, optimizer: hw.optim.AnyOptimizer) -> dict[str, npt.NDArray[Any]]:
    with hw.connect() as session:
        session.register(INITIAL, optimizer)
        for step in range(steps):
            session.step(gradient(step))
        return read_all(session)


@counts
@transports
def test_under_snapshot_a_job_goes_back_and_says_how_far(tmp_path: Path, servers: int, transport: str) -> None:
    optimizer = hw.optim.Adam(lr=0.01)
    with (
        cluster_of(tmp_path, durability.snapshot(0), servers=servers, transport=transport) as cluster,
        cluster.connect() as session,
    ):
        session.register(INITIAL, optimizer)
        for step in range(5):
            session.step(gradient(step))
        cluster.snapshot()
        for step in range(5, 8):
            session.step(gradient(step))
        cluster.restart(servers - 1)
        session.step(gradient(8))  # computed from a state that is no more: it counts nowhere
        assert (session.clock, session.lost) == (5, 3)
        for step in range(5, 9):
            session.step(gradient(step))
        assert_equal_bits(read_all(session), undisturbed(9, optimizer))


@counts
@transports
@pytest.mark.parametrize("victim", [0, -1])
def test_under_log_nothing_is_lost(tmp_path: Path, servers: int, transport: str, victim: int) -> None:
    optimizer = hw.optim.Adam(lr=0.01)
    with (
        cluster_of(tmp_path, durability.log(0), servers=servers, transport=transport) as cluster,
        cluster.connect() as session,
    ):
        session.register(INITIAL, optimizer)
        for step in range(9):
            if step == 3:
                cluster.snapshot()
            if step in (2, 6, 7):
                cluster.restart(victim % servers)
            session.step(gradient(step))
        assert (session.clock, session.lost) == (9, 0)
        assert_equal_bits(read_all(session), undisturbed(9, optimizer))


@counts
@pytest.mark.parametrize("consistency", [hw.bsp(), hw.ssp(2), hw.asp()], ids=str)
def test_each_push_counts_once_whatever_dies_when(tmp_path: Path, servers: int, consistency: hw.Consistency) -> None:
    """Whole numbers, learning rate 1: the sum shows a push that is missing or counted twice, in any order."""
    steps, workers = 60, 3
    with cluster_of(tmp_path, durability.log(0), servers=servers, workers=workers, consistency=consistency) as cluster:
        is_done = threading.Event()

        def harass() -> None:
            rng = np.random.default_rng(0)
            while not is_done.wait(rng.uniform(0.05, 0.3)):
                cluster.restart(int(rng.integers(servers)))

        def work(session: hw.Session) -> None:
            session.register(INITIAL, hw.optim.SGD(lr=1.0))
            for step in range(steps):
                session.step(gradient(step, session.index))

        killer = threading.Thread(target=harass)
        killer.start()
        try:
            cluster.run(work)
        finally:
            is_done.set()
            killer.join()
        with cluster.connect() as session:
            session.register(INITIAL, hw.optim.SGD(lr=1.0))
            share = workers if consistency.kind == "bsp" else 1
            total = sum(gradient(s, w)["b"] for s in range(steps) for w in range(workers)) / share
            assert np.abs(session.pull()["b"] + total).max() <= (1e-3 if share > 1 else 0)


def row_gradients(step: int, worker: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    rng = np.random.default_rng([step, worker, 7])
    return rng.integers(0, 500, 64), rng.integers(-3, 4, (64, 4)).astype(np.float32)


def rows_of(session: hw.Session, consistency: hw.Consistency | None = None) -> hw.Table:
    return session.table("rows", 4, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0), consistency=consistency)


@counts
@transports
@pytest.mark.parametrize("rows", [hw.bsp(), hw.asp()], ids=str)
def test_rows_count_once_whatever_dies_when(tmp_path: Path, servers: int, transport: str, rows: hw.Consistency) -> None:
    """A BSP job with tensors and a table, staged or beside it."""
    steps, workers = 40, 2
    with cluster_of(tmp_path, durability.log(0), servers=servers, workers=workers, transport=transport) as cluster:
        is_done = threading.Event()

        def harass() -> None:
            rng = np.random.default_rng(1)
            while not is_done.wait(rng.uniform(0.05, 0.3)):
                if rng.integers(3):
                    cluster.restart(int(rng.integers(servers)))
                else:
                    cluster.snapshot()

        def work(session: hw.Session) -> None:
            table = rows_of(session, rows)
            session.register(INITIAL, hw.optim.SGD(lr=1.0))
            for step in range(steps):
                ids, gradients = row_gradients(step, session.index)
                table.pull(ids)
                table.push(ids, gradients)
                table.push(ids[:8], gradients[:8])
                session.step(gradient(step, session.index))

        killer = threading.Thread(target=harass)
        killer.start()
        try:
            cluster.run(work)
        finally:
            is_done.set()
            killer.join()
        expected = np.zeros((500, 4))
        for step in range(steps):
            for worker in range(workers):
                ids, gradients = row_gradients(step, worker)
                np.subtract.at(expected, ids, gradients)
                np.subtract.at(expected, ids[:8], gradients[:8])
        with cluster.connect() as session:
            found = rows_of(session).pull(np.arange(500))
            expected /= workers if rows.kind == "bsp" else 1
            assert np.array_equal(found, expected), (found - expected)[(found != expected).any(axis=1)]
