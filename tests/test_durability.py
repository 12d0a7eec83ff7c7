"""A job outlives its servers: seen from sessions, with servers in this process that are closed and made anew."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from faulty_files import FaultyFiles
from jobs import PATIENCE_S, TOKEN, assert_equal_bits, read_all

import headwater as hw
from headwater import _limits, durability
from headwater._book import Book
from headwater._errors import HostError, PeerLostError, SettingError, StorageError
from headwater._keeper import Back, Feed, Step
from headwater._messages import (
    AnyMessage,
    Done,
    OpenTable,
    PushRows,
    Restore,
    Restored,
    Room,
    SnapshotGet,
    SnapshotState,
)
from headwater._rows import TableSpec, batch_bytes, rows_at
from headwater._snapshot import find, open_manifest
from headwater._snapshots import Rest, Snapshots, _Restored
from headwater._table import RowChanges, Rows, Tables
from headwater._transport import Address

SIZE = 40_000  # so that two servers have a part each
INITIAL: dict[str, npt.NDArray[np.float32]] = {
    "w": np.linspace(-1, 1, SIZE, dtype=np.float32),
    "b": np.zeros(5, np.float32),
    "mean": np.zeros(SIZE, np.float32),
}
T = TypeVar("T")

keeping = pytest.mark.parametrize("kind", [durability.log(0), durability.replicated(1, 0)], ids=lambda kind: kind.kind)
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
        self.followers: list[hw.Server] = []
        self.apart: hw.Server | None = None
        if kind.kind == "replicated":
            address = self.addresses[0]._replace(host=str(folder / "c") if transport == "shm" else "127.0.0.1")
            self.apart = hw.Server(address, workers=workers, servers=servers, is_apart=True, **self.common(), **options)
        self.servers: list[hw.Server] = []
        resumes = self.options.pop("resumes", False)
        for i in range(servers):
            self.servers.append(self.start(i, resumes=resumes))
            self.addresses[i] = Address.parse(self.servers[i].address.tcp or self.servers[i].address.unix)
        for i in range(servers if self.apart else 0):
            self.followers.append(self.start_follower(i))

    @property
    def first(self) -> Address:
        """Where the coordinator is."""
        if self.apart is None:
            return self.addresses[0]
        return Address.parse(self.apart.address.tcp or self.apart.address.unix)

    def common(self) -> dict[str, Any]:
        return {"token": TOKEN, "threads": 1, "durability": self.kind, "store": str(self.folder / "store")}

    def start(self, i: int, *, resumes: bool = False) -> hw.Server:
        common = {**self.common(), "index": i, "resumes": resumes}
        if i or self.apart is not None:
            return hw.Server(self.addresses[i], join=self.first, **common)
        return hw.Server(self.addresses[i], workers=self.workers, servers=len(self.addresses), **common, **self.options)

    def start_follower(self, i: int) -> hw.Server:
        self.started = getattr(self, "started", 0) + 1
        address = Address("tcp", "127.0.0.1", 0)
        if self.transport == "shm":
            address = Address("unix", str(self.folder / f"f{self.started}"), 0)
        return hw.Server(address, join=self.first, follows=True, **self.common(), index=i)

    def restart(self, i: int) -> None:
        """Kill a server and start it again; returns when the job is whole again."""
        if self.apart is None:
            self.servers[i].close()
            self.servers[i] = self.start(i, resumes=True)
            first = self.servers[0].coordinator
            assert first is not None
            with first._changed:
                assert first._changed.wait_for(lambda: first._is_ready, PATIENCE_S)
            return
        coordinator = self.apart.coordinator
        assert coordinator is not None
        with coordinator._changed:  # else the state would be that of the last snapshot
            assert coordinator._changed.wait_for(lambda: i in coordinator._servers.followers, PATIENCE_S)
        self.servers[i].close()
        self.servers[i], self.followers[i] = self.followers[i], self.start_follower(i)

    def snapshot(self) -> None:
        coordinator = (self.apart or self.servers[0]).coordinator
        assert coordinator is not None
        coordinator.take_snapshot(lambda _: None)

    def connect(self) -> hw.Session:
        return hw.connect(str(self.first), token=TOKEN, timeout_s=PATIENCE_S, transport=self.transport)

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
    def harassed(
        self, seed: int, once: Callable[[np.random.Generator], None], longest_s: float = 0.5
    ) -> Iterator[None]:
        """Do something to the cluster at moments that the seed decides, in a thread, for as long as the block runs."""
        is_done = threading.Event()

        def harass() -> None:
            rng = np.random.default_rng(seed)
            while not is_done.wait(rng.uniform(0.1, longest_s)):
                once(rng)

        killer = threading.Thread(target=harass)
        killer.start()
        try:
            yield
        finally:
            is_done.set()
            killer.join()


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
        for server in (cluster.apart, *cluster.servers, *cluster.followers):
            if server is not None:
                server.close()


def register(session: hw.Session, optimizer: hw.optim.AnyOptimizer) -> None:
    """Register what is trained, and what is averaged."""
    session.register(INITIAL, optimizer, averaged=["mean"])


def gradient(step: int, worker: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng([step, worker])
    return {name: rng.integers(-8, 9, a.shape).astype(np.float32) for name, a in INITIAL.items()}


def undisturbed(steps: int, optimizer: hw.optim.AnyOptimizer) -> dict[str, npt.NDArray[Any]]:
    with hw.connect() as session:
        register(session, optimizer)
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
        register(session, optimizer)
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


@keeping
@counts
@transports
@pytest.mark.parametrize("victim", [0, -1])
def test_nothing_is_lost(
    tmp_path: Path, kind: durability.Durability, servers: int, transport: str, victim: int
) -> None:
    optimizer = hw.optim.Adam(lr=0.01)
    with (
        cluster_of(tmp_path, kind, servers=servers, transport=transport) as cluster,
        cluster.connect() as session,
    ):
        register(session, optimizer)
        for step in range(9):
            if step == 3:
                cluster.snapshot()
            if step in (2, 6, 7):
                cluster.restart(victim % servers)
            session.step(gradient(step))
        assert (session.clock, session.lost) == (9, 0)
        assert_equal_bits(read_all(session), undisturbed(9, optimizer))


@keeping
@counts
@pytest.mark.parametrize("consistency", [hw.bsp(), hw.ssp(2), hw.asp()], ids=str)
def test_each_push_counts_once_whatever_dies_when(
    tmp_path: Path, kind: durability.Durability, servers: int, consistency: hw.Consistency
) -> None:
    """Whole numbers, learning rate 1: the sum shows a push that is missing or counted twice, in any order."""
    steps, workers = 60, 3
    with cluster_of(tmp_path, kind, servers=servers, workers=workers, consistency=consistency) as cluster:

        def work(session: hw.Session) -> None:
            register(session, hw.optim.SGD(lr=1.0))
            for step in range(steps):
                session.step(gradient(step, session.index))

        with cluster.harassed(0, lambda rng: cluster.restart(int(rng.integers(servers)))):
            cluster.run(work)
        with cluster.connect() as session:
            register(session, hw.optim.SGD(lr=1.0))
            share = workers if consistency.kind == "bsp" else 1
            total = sum(gradient(s, w)["b"] for s in range(steps) for w in range(workers)) / share
            assert np.abs(session.pull()["b"] + total).max() <= (1e-3 if share > 1 else 0)


@transports
def test_a_follower_gives_up_what_another_server_lacked(
    tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader goes back, and says the commit of that number again, with another content."""
    optimizer = hw.optim.SGD(lr=1.0)
    send = Feed.send
    with (
        cluster_of(tmp_path, durability.replicated(1, 0), transport=transport) as cluster,
        cluster.connect() as session,
    ):
        register(session, optimizer)
        session.step(gradient(0))

        def send_twice(feed: Feed, head: bytes, blobs: Sequence[memoryview]) -> None:
            record = msgspec.msgpack.decode(head, type=Step)
            send(feed, head, [memoryview(bytes(blob.nbytes)) for blob in blobs])
            send(feed, msgspec.msgpack.encode(Back(record.change.commit - 1)), [])
            send(feed, head, blobs)

        monkeypatch.setattr(Feed, "send", send_twice)
        session.step(gradient(1))
        session.step(gradient(2))
        monkeypatch.undo()
        cluster.restart(0)
        assert_equal_bits(read_all(session), undisturbed(3, optimizer))


@counts
@transports
def test_a_worker_that_comes_back_when_others_have_gone_on_reads_what_there_is(
    tmp_path: Path, servers: int, transport: str
) -> None:
    """Whichever of the servers' sides is the state by then."""
    with (
        cluster_of(
            tmp_path, durability.log(0), servers=servers, workers=2, transport=transport, consistency=hw.asp()
        ) as cluster,
        cluster.connect() as first,
        cluster.connect() as second,
    ):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda session: register(session, hw.optim.SGD(lr=1.0)), (first, second)))
        for steps in (1, 2, 3):
            cluster.restart(0)
            for step in range(steps):
                first.step(gradient(step))
            assert_equal_bits(second.pull(), first.pull())
            second.step(gradient(0))
            assert_equal_bits(second.pull(), first.pull())


@transports
@pytest.mark.parametrize("is_joining", [True, False], ids=["joining", "there"])
def test_a_follower_that_died_makes_room_for_the_next(tmp_path: Path, transport: str, is_joining: bool) -> None:
    """Also where it waits for there to be something to follow, and where nobody has noticed its death."""
    with (
        cluster_of(tmp_path, durability.replicated(1, 0), transport=transport) as cluster,
        cluster.connect() as session,
    ):
        if not is_joining:
            register(session, hw.optim.SGD(lr=1.0))
            session.step(gradient(0))
        assert session.stats().followers == (not is_joining)
        for _ in range(3):
            cluster.followers[0].close()
            cluster.followers[0] = cluster.start_follower(0)
        if is_joining:
            register(session, hw.optim.SGD(lr=1.0))
        session.step(gradient(1))
        deadline = time.monotonic() + PATIENCE_S
        while not session.stats().followers:
            assert time.monotonic() < deadline


def row_gradients(step: int, worker: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    rng = np.random.default_rng([step, worker, 7])
    return rng.integers(0, 500, 64), rng.integers(-3, 4, (64, 4)).astype(np.float32)


def rows_of(session: hw.Session, consistency: hw.Consistency | None = None) -> hw.Table:
    return session.table("rows", 4, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0), consistency=consistency)


@keeping
@counts
@transports
@pytest.mark.parametrize("rows", [hw.bsp(), hw.asp()], ids=str)
def test_rows_count_once_whatever_dies_when(
    tmp_path: Path, kind: durability.Durability, servers: int, transport: str, rows: hw.Consistency
) -> None:
    """A BSP job with tensors and a table, staged or beside it."""
    steps, workers = 40, 2
    with cluster_of(tmp_path, kind, servers=servers, workers=workers, transport=transport) as cluster:

        def harass(rng: np.random.Generator) -> None:
            if rng.integers(3):
                cluster.restart(int(rng.integers(servers)))
            else:
                cluster.snapshot()

        def work(session: hw.Session) -> None:
            table = rows_of(session, rows)
            register(session, hw.optim.SGD(lr=1.0))
            for step in range(steps):
                ids, gradients = row_gradients(step, session.index)
                table.pull(ids)
                table.push(ids, gradients)
                table.push(ids[:8], gradients[:8])
                session.step(gradient(step, session.index))

        with cluster.harassed(1, harass):
            cluster.run(work)
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


@counts
@transports
def test_large_records_are_applied_beside_what_follows(
    tmp_path: Path, servers: int, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in memory that both servers share, or travel; and count as ever."""
    monkeypatch.setattr(_limits, "PIECE_BYTES", 1)
    kind = durability.replicated(1, 0)
    test_rows_count_once_whatever_dies_when(tmp_path, kind, servers, transport, hw.bsp())


def test_a_worker_that_comes_back_before_the_loss_is_known_is_not_taken_for_dead(tmp_path: Path) -> None:
    """It sees the end of a server first: until it is back, the others' commit waits for it as before."""
    with cluster_of(tmp_path, durability.log(0), workers=2) as cluster:
        rounds = 20

        def work(session: hw.Session) -> list[int]:
            register(session, hw.optim.SGD(lr=1.0))
            accepted = []
            for step in range(rounds):
                session.push(gradient(step, session.index))
                if session.index == 0:
                    session._come_back(PeerLostError("a server has died"))
                session.wait()
                accepted.append(session.accepted)
            return accepted

        assert cluster.run(work) == [[2] * rounds] * 2


@pytest.mark.parametrize("kind", [durability.snapshot(2), durability.log(2)], ids=str)
def test_snapshots_are_taken_where_servers_die_more_often_than_that(
    tmp_path: Path, kind: durability.Durability
) -> None:
    with cluster_of(tmp_path, kind) as cluster, cluster.connect() as session:
        register(session, hw.optim.SGD(lr=1.0))
        first = sorted((tmp_path / "store").glob("snapshot-*/job.json"))
        deadline = time.monotonic() + 20
        restart_s = 0.0
        while sorted((tmp_path / "store").glob("snapshot-*/job.json")) == first:
            assert time.monotonic() < deadline
            if time.monotonic() > restart_s:
                cluster.restart(0)
                restart_s = time.monotonic() + 1
            session.step(gradient(0))


def test_a_table_that_changes_faster_than_it_is_written_gets_a_snapshot(tmp_path: Path) -> None:
    """Nobody waits for a moment without changes."""
    rows = np.arange(100_000)
    with cluster_of(tmp_path, durability.snapshot(0), consistency=hw.asp()) as cluster, cluster.connect() as session:
        table = rows_of(session)
        table.push(rows, np.ones((len(rows), 4), np.float32))
        table.pull(rows[:1])
        original, written = Rows.changes_since, 0

        def changes_since(self: Rows, consumer: str) -> Iterator[RowChanges]:
            nonlocal written
            for change in original(self, consumer):
                written += len(change.rows.ids)
                assert written < 20 * len(rows)
                yield change
                if not self.lock.locked():  # else this is the state to write
                    table.push(rows, np.ones((len(rows), 4), np.float32))
                    table.pull(rows[:1])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rows, "changes_since", changes_since)
            cluster.snapshot()
        expected = table.pull(rows)
        table.push(rows, np.ones((len(rows), 4), np.float32))
        table.pull(rows[:1])  # it is answered; else it would be said again
        cluster.restart(0)
        assert np.array_equal(table.pull(rows), expected)


def test_a_job_in_this_process_is_kept(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    with hw.connect(store=store) as session:
        register(session, hw.optim.SGD(lr=1.0))
        session.step(gradient(0))
        session.state["epoch"] = 3
        expected = read_all(session)
    with pytest.raises(SettingError, match="Expected an empty store, got a job"):
        hw.connect(store=store)
    for kind in (durability.log(), durability.snapshot(5)):
        with hw.connect(durability=kind, store=store, resume=True) as session:
            register(session, hw.optim.SGD(lr=1.0))
            assert (session.clock, session.index, session.state["epoch"]) == (1, 0, 3)
            assert_equal_bits(read_all(session), expected)
            with pytest.raises(SettingError, match="a store that nobody uses"):
                hw.connect(store=store, resume=True)


def test_a_job_in_this_process_without_anything_leaves_an_empty_store(tmp_path: Path) -> None:
    for _ in range(2):
        hw.connect(store=str(tmp_path / "store")).close()


def test_what_a_job_survives_is_its_own(tmp_path: Path) -> None:
    with cluster_of(tmp_path, durability.log(0)) as cluster:
        address = str(cluster.first)
        with hw.connect(address, token=TOKEN, durability=durability.log(0)) as session:
            assert session.stats().servers == 1
        with pytest.raises(SettingError, match=r"Expected durability log:0, the job's, got snapshot: leave it out"):
            hw.connect(address, token=TOKEN, durability=durability.snapshot())
        with pytest.raises(SettingError, match="for a job in this process only"):
            hw.connect(address, token=TOKEN, store=str(tmp_path / "other"))
    with pytest.raises(SettingError, match="Expected a store with durability"):
        hw.connect(durability=durability.log())
    with pytest.raises(SettingError, match="Expected a folder on a disk for a log, got memory://headwater-tests/log"):
        hw.connect(durability=durability.log(), store="memory://headwater-tests/log")
    with pytest.raises(SettingError, match="Expected the coordinator apart"):
        hw.connect(durability=durability.replicated(), store=str(tmp_path / "third"))


def test_a_snapshot_that_a_job_went_on_without_does_not_come_back() -> None:
    """What could not be read once may be readable the next time; by then it is of a job that has gone another way."""
    files = FaultyFiles()
    snapshots = Snapshots(files, "store", durability.snapshot(0), lambda name: name)
    refuses = False

    def ask_each(message: Callable[[int], AnyMessage]) -> list[AnyMessage]:
        request = message(0)
        if isinstance(request, Restore):
            if refuses:
                raise StorageError("Expected room on another disk, got none.")
            return [Restored(open_manifest(files, f"store/{request.snapshot}").book)]
        whole = SnapshotState(is_due=True, is_whole=True, rest=msgspec.msgpack.encode(Rest()))
        return [whole if isinstance(request, SnapshotGet) else Done()]

    def restored() -> int:
        book, _ = snapshots.restore(1, ask_each)
        assert book is not None
        return book.commit

    for commit in (3, 5):
        snapshots.take(_Restored(Book(hw.bsp(), 1, commit), ask_each))
    assert restored() == 5
    refuses = True  # the snapshot is whole, so an older one would be of no use, and cost what came between
    with pytest.raises(HostError, match="room on another disk"):
        restored()
    refuses = False
    manifest = f"store/{find(files, 'store')[0]}/job.json"
    files.flip(manifest, 9, 1)
    assert restored() == 3
    files.flip(f"{manifest}.given-up", 9, 1)
    assert restored() == 3
    snapshots.take(_Restored(Book(hw.bsp(), 1, 4), ask_each))
    assert restored() == 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_push_that_is_said_again_waits_as_it_did_the_first_time(*, fails: bool) -> None:
    """Its connection may have ended while it was being written down: that it is known does not say that it survives."""
    spec = TableSpec("t", 2, hw.optim.SGD(lr=1.0), hw.Constant(0.0), 0, hw.RowPolicy(), hw.asp())
    tables, waited, written = Tables(threads=1, level="auto"), [0], [0]
    tables.handle(OpenTable(0, spec, 0, 1))

    def survives() -> None:
        waited[0] += 1
        if waited[0] == 1:
            raise PeerLostError("The connection ended.")

    def note(record: object, arrays: object) -> Callable[[], None]:
        written[0] += 1
        if fails:
            raise StorageError("Cannot write.")
        return survives

    tables.note = note
    batch = np.zeros(batch_bytes(1, 2), np.uint8)
    batch[:8].view(np.int64)[:], batch[rows_at(1) :].view(np.float32)[:] = 7, 1.0
    for error in [StorageError, StorageError] if fails else [PeerLostError, None]:
        desk, push = tables.desk(1), PushRows(0, 0, -1, 1, tuple(spec.optimizer.scalars().values()))
        desk.handle(Room(0, batch.nbytes, share=False), can_share=False)
        desk.sink(push, batch.nbytes)[:] = memoryview(batch)
        with pytest.raises(error) if error is not None else nullcontext():
            desk.handle(push, can_share=False)
    assert (written[0], waited[0]) == ((2, 0) if fails else (1, 2))
    rows = np.zeros((1, 2), np.float32)
    tables.tables[0].pull(np.array([7]), rows, touch=False)
    assert rows.tolist() == [[-1.0, -1.0]]
