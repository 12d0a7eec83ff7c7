"""What can go wrong goes wrong: disks, processes and people, at the worst moment. Each test is one misfortune."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
import pytest
from jobs import PATIENCE_S, TOKEN, assert_equal_bits, read_all
from test_durability import Cluster, cluster_of, gradient, register, rows_of, undisturbed
from test_processes import WORKERS, Machine, Output

import headwater as hw
from headwater import _limits, durability, errors
from headwater._coordinator import Coordinator
from headwater._files import LocalFiles
from headwater._keeper import Keeper
from headwater._log import LogReader
from headwater._messages import Committed, Restore, ServerAddress
from headwater._snapshots import Snapshots
from headwater._transport import Address, SocketConnection

SGD = hw.optim.SGD(lr=1.0)
STEPS, RESUMED = str(WORKERS / "steps.py"), str(WORKERS / "resumed.py")


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who worked when a store was left come back in no time, or never."""
    monkeypatch.setattr(_limits, "RETURN_S", 2.0)


def flip_bit(path: Path, offset: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


# What is written down.


@pytest.mark.parametrize("servers", [1, 2])
def test_a_refused_push_is_not_replayed(tmp_path: Path, servers: int) -> None:
    bad = gradient(1)
    bad["b"][0] = np.nan  # so that only one of two servers finds it
    with (
        cluster_of(tmp_path, durability.log(0), servers=servers) as cluster,
        cluster.connect() as session,
    ):
        register(session, SGD)
        session.step(gradient(0))
        with pytest.raises(errors.NonFiniteError):
            session.step(bad)
        session.state["a"] = 1
        before = read_all(session)
        cluster.restart(0)
        assert session.state["a"] == 1
        assert_equal_bits(read_all(session), before)


@pytest.mark.parametrize("kind", [durability.snapshot(0), durability.log(0)], ids=str)
def test_an_optimizer_that_was_written_is_kept(tmp_path: Path, kind: durability.Durability) -> None:
    with cluster_of(tmp_path, kind, servers=2) as cluster, cluster.connect() as session:
        register(session, hw.optim.Adam(lr=0.1))
        session.step(gradient(0))
        planes, steps = session.read_optimizer()
        planes = {plane: {name: array * 2 for name, array in arrays.items()} for plane, arrays in planes.items()}
        session.write_optimizer(planes, dict.fromkeys(steps, 7))
        written = read_all(session)
        cluster.restart(1)
        session.pull()
        assert_equal_bits(read_all(session), written)


def test_no_key_of_the_state_is_lost(tmp_path: Path) -> None:
    """Many workers write each its own keys at once, and each key is there in the next life."""
    workers, keys = 4, 25
    with cluster_of(tmp_path, durability.log(0), workers=workers) as cluster:

        def work(session: hw.Session) -> None:
            register(session, SGD)
            for i in range(keys):
                session.state[f"{session.index}-{i}"] = i

        cluster.run(work)
        cluster.restart(0)
        with cluster.connect() as session:
            assert len(session.state) == workers * keys


def test_a_damaged_manifest_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with cluster_of(tmp_path, durability.log(0)) as cluster, cluster.connect() as session:
        register(session, hw.optim.Adam(lr=0.1))
        for step in range(6):
            if step in (2, 4):
                cluster.snapshot()
            session.step(gradient(step))
        newest = max((tmp_path / "store").glob("snapshot-*"))
        cluster.servers[0].close()
        flip_bit(newest / "job.json", 100)
        cluster.servers[0] = cluster.start(0, resumes=True)
        session.step(gradient(6))
        assert_equal_bits(read_all(session), undisturbed(7, hw.optim.Adam(lr=0.1)))
        assert f"{newest}/job.json" in caplog.text


# Other numbers of servers.


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("kind", [durability.snapshot(0), durability.log(0)], ids=str)
def test_a_job_goes_on_with_another_number_of_servers_and_survives_again(
    tmp_path: Path, before: int, after: int, kind: durability.Durability
) -> None:
    optimizer = hw.optim.Adam(lr=0.1)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "store").symlink_to(tmp_path / "a" / "store")
    ids = np.arange(100)
    with cluster_of(tmp_path / "a", kind, servers=before) as cluster, cluster.connect() as session:
        table = rows_of(session, hw.asp())
        register(session, optimizer)
        for step in range(3):
            table.push(ids, np.ones((100, 4), np.float32))
            session.step(gradient(step))
        cluster.snapshot()
        if kind.kind == "log":
            table.push(ids, np.ones((100, 4), np.float32))
            session.step(gradient(3))
    done = 4 if kind.kind == "log" else 3
    with cluster_of(tmp_path / "b", kind, servers=after, resumes=True) as cluster, cluster.connect() as session:
        table = rows_of(session)
        register(session, optimizer)
        assert session.clock == done
        for step in range(done, 6):
            table.push(ids, np.ones((100, 4), np.float32))
            session.step(gradient(step))
            if kind.kind == "log":
                cluster.restart(after - 1)
        assert_equal_bits(read_all(session), undisturbed(6, optimizer))
        assert np.array_equal(table.pull(ids), np.full((100, 4), -6.0, np.float32))


# Death of a server before anything is kept.


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("kind", [durability.snapshot(0), durability.log(0)], ids=str)
def test_a_server_dies_before_anything_is_registered(tmp_path: Path, victim: int, kind: durability.Durability) -> None:
    with cluster_of(tmp_path, kind, servers=2) as cluster, cluster.connect() as session:
        cluster.restart(victim)
        table = rows_of(session)
        cluster.restart(victim)
        register(session, SGD)
        table.push(np.arange(4), np.ones((4, 4), np.float32))
        session.step(gradient(0))
        assert_equal_bits(read_all(session), undisturbed(1, SGD))
        assert np.array_equal(table.pull(np.arange(4)), -np.ones((4, 4), np.float32))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("kind", [durability.snapshot(0), durability.log(0)], ids=str)
@pytest.mark.parametrize("at", ["job.json.part", "model-"])
def test_a_server_dies_during_the_first_snapshot(
    tmp_path: Path, victim: int, kind: durability.Durability, at: str
) -> None:
    tables = kind.kind == "log"  # whose declaration has had a snapshot before
    optimizer = hw.optim.Adam(lr=0.01)
    with cluster_of(tmp_path, kind, servers=2, workers=2) as cluster:
        due, dead, killers = threading.Event(), threading.Event(), []

        def kill() -> None:
            assert due.wait(PATIENCE_S)
            cluster.servers[victim].close()
            dead.set()
            cluster.servers[victim] = cluster.start(victim, resumes=True)

        killers.append(threading.Thread(target=kill))
        killers[0].start()
        assert cluster.servers[0].coordinator is not None
        assert cluster.servers[0].coordinator._keep is not None
        files = cluster.servers[0].coordinator._keep.files

        def delay(operation: str):  # type: ignore[no-untyped-def]
            real = getattr(files, operation)

            def act(path: str, *rest: str, **options: bool):  # type: ignore[no-untyped-def]
                name = path.rpartition("/")[2]
                if name.startswith(at) and is_armed.is_set() and not due.is_set():
                    due.set()
                    dead.wait(1.0)
                return real(path, *rest, **options)

            return act

        files.create, files.make_folder = delay("create"), delay("make_folder")  # type: ignore[method-assign]
        is_armed = threading.Event()
        if not tables:
            is_armed.set()

        def work(session: hw.Session) -> None:
            table = rows_of(session, hw.asp()) if tables else None
            is_armed.set()
            register(session, optimizer)
            for step in range(3):
                if table is not None:
                    table.push(np.arange(4), np.ones((4, 4), np.float32))
                session.step(gradient(step))
            if table is not None:
                session.pull()

        cluster.run(work)
        killers[0].join()
        assert due.is_set()
        with cluster.connect() as session:
            register(session, optimizer)
            assert_equal_bits(read_all(session), undisturbed(3, optimizer))
            if tables:
                assert np.array_equal(rows_of(session).pull(np.arange(4)), np.full((4, 4), -6.0, np.float32))


# Those who know an old state.


@pytest.mark.parametrize("consistency", [hw.bsp(), hw.asp()], ids=str)
def test_a_worker_that_came_after_the_snapshot_goes_back_too(tmp_path: Path, consistency: hw.Consistency) -> None:
    with (
        cluster_of(tmp_path, durability.snapshot(0), consistency=consistency) as cluster,
        cluster.connect() as first,
    ):
        register(first, SGD)
        first.step(gradient(0))
        cluster.snapshot()
        first.close()
        with cluster.connect() as session:
            register(session, SGD)
            data = session.shard(list(range(40)), epochs=1, batch_size=4)
            for i, batch in zip(range(1, 4), data, strict=False):
                assert len(batch) == 4
                session.step(gradient(i))
            cluster.restart(0)
            session.step(gradient(4))  # void
            assert session.lost == 3
            found = []
            for batch in data:
                found += batch
                session.step(gradient(1))
            assert sorted(found) == list(range(40))


def test_rows_pushed_to_a_server_that_lives_while_another_is_started_again_count(tmp_path: Path) -> None:
    """The worker notices nothing of the other's death for it needs only this one."""
    steps = 300
    with cluster_of(tmp_path, durability.log(0), servers=2) as cluster, cluster.connect() as session:
        table = rows_of(session, hw.asp())
        register(session, SGD)
        session.step(gradient(0))
        ids = np.arange(200)
        table.push(ids, np.ones((200, 4), np.float32))
        table.pull(ids)  # when it is there
        owned = cluster.servers[0].shard.tables.tables[0].kernel
        mine = np.intersect1d(ids, owned.export(0, 1000)[0])
        assert 0 < len(mine) < 200
        killer = threading.Thread(target=lambda: deque(map(cluster.restart, [1] * 5), maxlen=0))
        killer.start()
        for _ in range(steps):
            table.push(mine, np.ones((len(mine), 4), np.float32))
        killer.join()
        expected = np.full((200, 4), -1.0, np.float32)
        expected[mine] -= steps
        session.step(gradient(1))
        assert np.array_equal(table.pull(ids), expected)


@pytest.mark.parametrize("kind", [durability.snapshot(0), durability.log(0)], ids=str)
def test_a_save_survives_a_server(tmp_path: Path, kind: durability.Durability) -> None:
    with cluster_of(tmp_path, kind, servers=2) as cluster, cluster.connect() as session:
        table = rows_of(session, hw.asp())
        register(session, SGD)
        table.push(np.arange(50), np.ones((50, 4), np.float32))
        session.step(gradient(0))
        cluster.snapshot()
        pages = type(table).pages
        kills = iter([1, 0])

        def slow(self: hw.Table):  # type: ignore[no-untyped-def]
            for victim in kills:
                cluster.restart(victim)
                break
            yield from pages(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(table), "pages", slow)
            session.save(tmp_path / "saved")
        while session.clock < 2:  # under snapshot the step that was under way is void
            session.step(gradient(1))
        with hw.connect() as alone:
            rows_of(alone, hw.asp())
            alone.load(tmp_path / "saved")
            register(alone, SGD)
            assert_equal_bits(read_all(alone), undisturbed(1, SGD))
            assert np.array_equal(rows_of(alone).pull(np.arange(50)), -np.ones((50, 4), np.float32))


# What is left behind.


def test_sixty_recoveries_leave_nothing(tmp_path: Path) -> None:
    with cluster_of(tmp_path, durability.log(0), servers=2) as cluster, cluster.connect() as session:
        table = rows_of(session, hw.asp())
        register(session, SGD)
        counts = []
        for i in range(60):
            taker = threading.Thread(target=_try, args=(cluster.snapshot,))
            taker.start()
            cluster.restart(1)
            table.push(np.arange(4), np.ones((4, 4), np.float32))
            session.step(gradient(i))
            taker.join()
            if i % 6 == 5:
                gc.collect()  # exceptions hold what their frames hold
                counts.append((len(threading.enumerate()), len(list(Path("/proc/self/fd").iterdir()))))
        session.pull()
        for column in zip(*counts, strict=True):
            assert max(column[5:]) < max(column[:3]) + 10, counts
        assert np.array_equal(table.pull(np.arange(4)), np.full((4, 4), -60.0, np.float32))


def _try(act: Callable[[], None]) -> None:
    with contextlib.suppress(errors.HeadwaterError):
        act()


# The wrong store.


def test_a_store_has_one_job_at_a_time(tmp_path: Path) -> None:
    with cluster_of(tmp_path, durability.log(0), servers=2) as cluster, cluster.connect() as session:
        register(session, SGD)
        for i in range(2):
            with pytest.raises(errors.SettingError, match=f"process {os.getpid()} on .* holds"):
                hw.Server(
                    durability=cluster.kind,
                    store=str(tmp_path / "store"),
                    index=i,
                    resumes=True,
                    join=None if i == 0 else cluster.addresses[0],
                    token=TOKEN,
                )
        session.step(gradient(0))
        assert session.clock == 1


def test_a_store_that_was_used_is_not_begun_anew(tmp_path: Path) -> None:
    with cluster_of(tmp_path, durability.snapshot(0)) as cluster, cluster.connect() as session:
        register(session, SGD)
    with pytest.raises(errors.SettingError, match=r"got a job in .*: resume it"):
        hw.Server(durability=durability.snapshot(0), store=str(tmp_path / "store"))


def test_an_empty_store_is_begun_where_it_is_to_be_resumed(tmp_path: Path) -> None:
    with cluster_of(tmp_path, durability.log(0), resumes=True) as cluster, cluster.connect() as session:
        register(session, SGD)
        session.step(gradient(0))
        assert session.clock == 1


def test_a_store_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    with pytest.raises(errors.StorageError, match="store"):
        hw.Server(durability=durability.snapshot(0), store=str(tmp_path / "store"))
    with pytest.raises(errors.StorageError, match="store/deeper"):
        hw.Server(durability=durability.snapshot(0), store=str(tmp_path / "store" / "deeper"))


def test_a_store_whose_parents_are_missing_is_made(tmp_path: Path) -> None:
    with hw.Server(durability=durability.log(0), store=str(tmp_path / "a" / "b" / "c")):
        assert (tmp_path / "a" / "b" / "c").is_dir()


@pytest.mark.parametrize("text", ["nonsense", "log:soon", "snapshot:-1", "log:nan", ""])
def test_a_durability_that_is_none_is_named(text: str) -> None:
    with pytest.raises(errors.SettingError):
        durability.Durability.parse(text)


# Real processes.


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    assert machine.clean() == ({}, [])


def run_steps(machine: Machine, store: Path | None, *arguments: str, kind: str = "log", servers: int = 2) -> Output:
    """Start two workers whose every step takes 1 from a parameter that is 1 at first."""
    more = ["--store", str(store)] if store is not None else []
    return machine.run(*more, *arguments, servers=servers, restarts=20, durability=kind)


@pytest.mark.parametrize("kind", ["log", "snapshot:0.2"])
def test_all_servers_killed_at_once_are_started_again(machine: Machine, kind: str) -> None:
    output = run_steps(machine, None, STEPS, "60", kind=kind)
    for step, order in ((5, (1, 0)), (20, (0, 1)), (40, (1, 0))):
        output.wait_for(f"worker 0 made step {step} ")
        servers = machine.servers()
        for victim in order:
            os.kill(servers[victim], signal.SIGKILL)
        for _ in order:
            output.wait_for("it is started again")
    assert output.finish() == 0, output.text
    ends = [line for line in output.lines if "ends at" in line]
    assert len(ends) == 2, output.text
    if kind == "log":
        assert all(line.endswith("ends at -59.0 -59.0") for line in ends), ends


@pytest.mark.parametrize("servers", [1, 2])
def test_a_job_killed_as_a_whole_goes_on_from_what_was_acknowledged(
    machine: Machine, tmp_path: Path, servers: int
) -> None:
    output = run_steps(machine, tmp_path / "store", STEPS, "0", servers=servers)
    for _ in range(2):
        output.wait_for("is under way")
    output = run_until_killed(machine, output)
    again = run_steps(machine, tmp_path / "store", "--resume", RESUMED, servers=servers)
    assert again.finish() == 0, again.text
    found = [line.split()[-2:] for line in again.lines if " at clock " in line]
    assert len(found) == 2, again.text
    for clock, value in found:
        assert int(clock) >= 3  # what the first line acknowledged
        assert float(value) == 1.0 - int(clock)


def run_until_killed(machine: Machine, output: Output) -> Output:
    for process in list(machine.processes()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    output.finish()
    return output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay_s", [0.1, 0.5, 0.9, 1.3])
def test_an_interrupted_job_ends_soon_and_goes_on(
    machine: Machine, tmp_path: Path, number: signal.Signals, delay_s: float
) -> None:
    """At whatever moment of its start or its steps; the delays are of no meaning of their own."""
    output = run_steps(machine, tmp_path / "store", STEPS, "0", servers=2)
    time.sleep(delay_s)
    since = time.monotonic()
    output.process.send_signal(number)
    assert output.finish() != 0, output.text
    assert time.monotonic() - since < 10.0
    again = run_steps(machine, tmp_path / "store", "--resume", RESUMED, servers=2)
    assert again.finish() == 0, again.text
    assert len([line for line in again.lines if " at clock " in line]) == 2, again.text


def test_a_finished_job_can_be_resumed(machine: Machine, tmp_path: Path) -> None:
    for more in ([], ["--resume"]):
        output = run_steps(machine, tmp_path / "store", *more, STEPS, "5", servers=1)
        assert output.finish() == 0, output.text
    assert "ends at -9.0 -9.0" in output.text


def test_a_store_in_use_is_said_by_whom(machine: Machine, tmp_path: Path) -> None:
    output = run_steps(machine, tmp_path / "store", STEPS, "0", servers=1)
    for _ in range(2):
        output.wait_for("is under way")
    (server,) = machine.servers()
    other = run_steps(machine, tmp_path / "store", "--resume", STEPS, "5", servers=1)
    assert other.finish() == 2
    assert f"process {server} on " in other.text
    output.process.send_signal(signal.SIGINT)
    assert output.finish() == 130, output.text


# Those who sleep.


def server_process(machine: Machine, store: Path, i: int, servers: int) -> tuple[Output, Address]:
    """Start a real server of a job under log."""
    address = Address("unix", str(machine.folder / str(i)), 0)
    options = ["--join", f"unix://{machine.folder}/0"] if i else ["--servers", str(servers), "--workers", "1"]
    output = machine.start(
        *("-m", "headwater", "server", "--listen", str(address), *options, "--threads", "1"),
        *("--durability", "log:0", "--store", str(store), "--index", str(i)),
        HEADWATER_TOKEN=TOKEN,
    )
    return output, address


def wait_until(is_so: Callable[[], bool]) -> None:
    """Ask until it is so: other processes bring it about, and nothing tells this one when."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("rows", [hw.bsp(), hw.asp()], ids=str)
def test_a_server_that_slept_too_long_comes_back_and_nothing_is_lost(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: hw.Consistency
) -> None:
    optimizer = hw.optim.Adam(lr=0.1)
    common = {"token": TOKEN, "durability": durability.log(0), "store": str(tmp_path / "store"), "threads": 1}
    with hw.Server(Address("unix", str(machine.folder / "0"), 0), servers=2, workers=1, **common) as first:  # type: ignore[arg-type]
        output, _ = server_process(machine, tmp_path / "store", 1, 2)
        output.wait_for("listening on")
        with hw.connect(first.address.unix, token=TOKEN, timeout_s=PATIENCE_S) as session:
            table = rows_of(session, rows)
            register(session, optimizer)
            monkeypatch.setattr(_limits, "SILENCE_S", 0.5)
            session.step(gradient(0))
            assert first.coordinator is not None
            first.coordinator._servers.here[1].connection.set_timeout(0.5)  # type: ignore[union-attr]
            for connection in session._peers._connections():
                connection.set_timeout(0.5)
            for i in range(1, 4):
                generation = first.coordinator._generation
                output.process.send_signal(signal.SIGSTOP)
                wake = threading.Thread(
                    target=_wake, args=(output.process, lambda g=generation: first.coordinator._generation > g)
                )
                wake.start()
                table.push(np.arange(64), np.ones((64, 4), np.float32))
                session.step(gradient(i))
                wake.join()
                session.pull()
            assert session.clock == 4
            assert_equal_bits(read_all(session), undisturbed(4, optimizer))
            assert np.array_equal(table.pull(np.arange(64)), np.full((64, 4), -3.0, np.float32))
    output.process.send_signal(signal.SIGTERM)
    assert output.finish() == 0, output.text


def _wake(process: subprocess.Popen[str], is_time: Callable[[], bool]) -> None:
    try:
        wait_until(is_time)
    finally:
        process.send_signal(signal.SIGCONT)


def test_a_first_server_that_slept_too_long_is_found_again(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, address = server_process(machine, tmp_path / "store", 0, 1)
    output.wait_for("listening on")
    with hw.connect(str(address), token=TOKEN, timeout_s=PATIENCE_S) as session:
        register(session, SGD)
        session.step(gradient(0))
        monkeypatch.setattr(_limits, "SILENCE_S", 0.3)
        session._peers.control.set_timeout(0.3)
        tries: list[int] = []
        reconnect = session._peers.reconnect

        def count(index: int) -> object:
            tries.append(index)
            return reconnect(index)

        monkeypatch.setattr(session._peers, "reconnect", count)
        output.process.send_signal(signal.SIGSTOP)
        wake = threading.Thread(target=_wake, args=(output.process, lambda: len(tries) > 1))
        wake.start()
        session.step(gradient(1))
        wake.join()
        assert session.clock == 2
        assert_equal_bits(read_all(session), undisturbed(2, SGD))
    output.process.send_signal(signal.SIGTERM)
    assert output.finish() == 0, output.text


def test_a_server_that_takes_long_to_come_back_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster_of(tmp_path, durability.log(0), servers=2) as cluster, cluster.connect() as session:
        register(session, SGD)
        session.step(gradient(0))
        monkeypatch.setattr(_limits, "SILENCE_S", 0.3)
        monkeypatch.setattr(_limits, "REPORT_WAIT_S", 0.05)
        come_back = Keeper.come_back

        def slowly(self: Keeper, request: Restore) -> object:
            time.sleep(0.9)  # a slow disk: three times as long as who says nothing is waited for
            return come_back(self, request)

        monkeypatch.setattr(Keeper, "come_back", slowly)
        cluster.restart(1)
        session.step(gradient(1))
        assert session.clock == 2


@pytest.mark.parametrize("consistency", [hw.bsp(), hw.asp()], ids=str)
@pytest.mark.parametrize("kind", [durability.snapshot(0), durability.log(0)], ids=str)
def test_a_worker_that_was_taken_for_dead_goes_on(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    consistency: hw.Consistency,
    kind: durability.Durability,
) -> None:
    """BSP: its stale push counts nowhere. ASP: each counts once."""
    monkeypatch.setattr(_limits, "BEAT_LIMIT_S", 0.7)
    monkeypatch.setattr(_limits, "BEAT_INTERVAL_S", 0.1)
    monkeypatch.setenv("HEADWATER_WORKER", "0")
    ones = {"w": np.ones(40_000, np.float32)}
    with cluster_of(tmp_path, kind, workers=2, consistency=consistency) as cluster, cluster.connect() as session:
        environment = {
            "HEADWATER_ADDRESS": str(cluster.addresses[0]),
            "HEADWATER_TOKEN": TOKEN,
            "HEADWATER_WORKER": "1",
        }
        output = machine.start(STEPS, "6", "1:3:stop", **environment)
        session.register(ones, SGD)
        is_bsp = consistency.kind == "bsp"
        for _ in range(3 if is_bsp else 1):
            session.step(ones)
        output.wait_for(r"stops at ([\d.]+)")
        wait_until(lambda: cluster.servers[0].coordinator.live_workers() == 1)  # type: ignore[union-attr]
        session.step(ones)
        output.process.send_signal(signal.SIGCONT)
        if is_bsp:
            session.close()
        assert output.finish() == 0, output.text
        value = re.search(r"worker 1 ends at (\S+) (\S+)", output.text)
        assert value is not None, output.text
        assert value[1] == value[2]
        if not is_bsp:
            assert float(value[1]) == 1.0 - 6 - 2


# Disks.


def begin_log(folder: Path, steps: int = 6, snapshots: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Leave the store of a job of some steps; returns the state."""
    with cluster_of(folder, durability.log(0)) as cluster, cluster.connect() as session:
        table = rows_of(session, hw.asp())
        session.register(SMALL, hw.optim.Adam(lr=0.1))
        for step in range(steps):
            if step in snapshots:
                cluster.snapshot()
            table.push(np.arange(8), np.ones((8, 4), np.float32))
            session.step(small_gradient(step))
        return {**read_all(session), "rows": table.pull(np.arange(8))}


SMALL = {"w": np.linspace(-1, 1, 50, dtype=np.float32)}


def small_gradient(step: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(step).standard_normal(50).astype(np.float32)}


def states(steps: int) -> list[dict[str, np.ndarray]]:
    """Return the states of an undisturbed job after 0, 1, … steps."""
    found = []
    with hw.connect() as session:
        table = rows_of(session, hw.asp())
        session.register(SMALL, hw.optim.Adam(lr=0.1))
        for step in range(steps):
            found.append(read_all(session))
            table.push(np.arange(8), np.ones((8, 4), np.float32))
            session.step(small_gradient(step))
        return [*found, read_all(session)]


def resumed(folder: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Resume a job; returns its commit and state."""
    with cluster_of(folder, durability.log(0), resumes=True) as cluster, cluster.connect() as session:
        rows_of(session, hw.asp())
        session.register(SMALL, hw.optim.Adam(lr=0.1))
        state = read_all(session)
        assert_equal_bits(session.pull(), {"w": state["master/w"]})  # which a worker reads where it lies
        return session.clock, state


def test_a_torn_log_goes_on_with_its_whole_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Cut at many places, seed 0: in headers, heads, payloads, between records."""
    begin_log(tmp_path / "whole")
    expected = states(6)
    (log,) = [path for path in (tmp_path / "whole" / "store").glob("log-*") if path.stat().st_size > 1000]
    size = log.stat().st_size
    commits = set()
    for cut in sorted(np.random.default_rng(0).integers(64, size, 12)):
        shutil.copytree(tmp_path / "whole" / "store", tmp_path / str(cut) / "store")
        os.truncate(tmp_path / str(cut) / "store" / log.name, cut)
        caplog.clear()
        commit, state = resumed(tmp_path / str(cut))
        assert_equal_bits(state, expected[commit])
        commits.add(commit)
        said = [r.message for r in caplog.records if "log ends" in r.message]
        assert len(said) <= 1
        assert all("byte " in text and log.name in text for text in said)
        assert said or cut in _ends(tmp_path / "whole", log)
    assert len(commits) > 3


def _ends(folder: Path, log: Path) -> set[int]:
    """Return where its records end."""
    reader = LogReader(LocalFiles(), str(folder / "store"), 0, int(log.name.split("-")[2].split(".")[0]))
    return {entry.end for entry in reader} | {56}


def test_a_flipped_bit_is_named_or_an_older_snapshot_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sampled, seed 1: in each file that the newest snapshot has and in the log that goes on from it."""
    expected = begin_log(tmp_path / "whole", snapshots=(2, 4))
    newest = max((tmp_path / "whole" / "store").glob("snapshot-*"))
    rng = np.random.default_rng(1)
    for path in sorted(newest.iterdir()):
        for at in rng.integers(0, path.stat().st_size, 3):
            folder = tmp_path / f"{path.name}-{at}"
            shutil.copytree(tmp_path / "whole" / "store", folder / "store")
            flip_bit(folder / "store" / newest.name / path.name, int(at))
            caplog.clear()
            with cluster_of(folder, durability.log(0), resumes=True) as cluster, cluster.connect() as session:
                table = rows_of(session, hw.asp())
                session.register(SMALL, hw.optim.Adam(lr=0.1))
                state = {**read_all(session), "rows": table.pull(np.arange(8))}
            assert_equal_bits(state, expected)
            assert f"{newest.name}/{path.name}" in caplog.text
            assert "older snapshot" in caplog.text


def test_a_flipped_bit_in_the_log_is_named_with_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sampled, seed 2. At the end, where nobody knows whether it was acknowledged, it is taken for torn."""
    begin_log(tmp_path / "whole")
    expected = states(6)
    (log,) = [path for path in (tmp_path / "whole" / "store").glob("log-*") if path.stat().st_size > 1000]
    for at in np.random.default_rng(2).integers(0, log.stat().st_size, 12):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "whole" / "store", folder / "store")
        flip_bit(folder / "store" / log.name, int(at))
        caplog.clear()
        try:
            commit, state = resumed(folder)
        except errors.StorageError as error:
            said = str(error)
        else:
            said = ""
            assert commit >= 5
            assert_equal_bits(state, expected[commit])
            assert "log ends at byte" in caplog.text
        assert not said or re.search(rf"byte \d+ of .*{log.name}", said), said


def test_a_full_disk_ends_the_log_and_nothing_acknowledged_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(monkeypatch)
    with cluster_of(tmp_path, durability.log(0)) as cluster, cluster.connect() as session:
        session.register(SMALL, hw.optim.Adam(lr=0.1))
        room.left = 2000
        with pytest.raises(errors.StorageError, match=r"log-0-\d+\.hwl.*: No space left on device"):
            _step_on(session)
        acknowledged = session.clock
        with pytest.raises(errors.HeadwaterError), cluster.connect() as other:
            other.register(SMALL, hw.optim.Adam(lr=0.1))
    assert 1 <= acknowledged < 50
    room.left = 1 << 40
    commit, state = resumed(tmp_path)
    assert commit == acknowledged
    assert_equal_bits(state, states(commit)[commit])


def _step_on(session: hw.Session) -> None:
    for step in range(100):
        session.step(small_gradient(step))


@pytest.mark.parametrize("kind", [durability.snapshot(0.05), durability.log(0.05)], ids=str)
def test_a_full_disk_costs_a_snapshot_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: durability.Durability
) -> None:
    room = Room(monkeypatch, lambda path: "/snapshot-" in path)
    with cluster_of(tmp_path, kind) as cluster, cluster.connect() as session:
        session.register(SMALL, SGD)
        room.left = 100
        step = 0
        while "no snapshot this time" not in caplog.text:
            session.step(small_gradient(step))
            step += 1
            assert step < 100_000
        assert "No space left on device" in caplog.text
        with pytest.raises(errors.StorageError, match="No space left"):
            session.take_snapshot()
        session.step(small_gradient(step))
        room.left = 1 << 40
        assert Path(session.take_snapshot(), "job.json").is_file()
        clock = session.clock
    with cluster_of(tmp_path, kind, resumes=True) as cluster, cluster.connect() as session:
        session.register(SMALL, SGD)
        assert session.clock == clock


class Room:
    """A disk that has so many bytes left for files that are written down, without a file system of one's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, counts: Callable[[str], bool] = lambda path: True) -> None:
        self.left = 1 << 40
        writev = os.writev

        def write(fd: int, buffers: list[memoryview]) -> int:
            if not counts(str(Path(f"/proc/self/fd/{fd}").readlink())):
                return writev(fd, buffers)
            if self.left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = writev(fd, [buffers[0][: self.left]])
            self.left -= written
            return written

        monkeypatch.setattr("headwater._files.os.writev", write)


def test_a_store_of_another_model_is_not_begun_with(tmp_path: Path) -> None:
    begin_log(tmp_path)
    with cluster_of(tmp_path, durability.log(0), resumes=True) as cluster:
        with cluster.connect() as session, pytest.raises(errors.LayoutError, match="'w'"):
            session.register({"w": np.zeros(7, np.float32)}, hw.optim.Adam(lr=0.1))
        with cluster.connect() as session, pytest.raises(errors.SettingError, match="Adam"):
            session.register(SMALL, SGD)
        with cluster.connect() as session:
            session.register(SMALL, hw.optim.Adam(lr=0.1))
            assert session.clock == 6


def test_a_job_is_resumed_with_fewer_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster_of(tmp_path, durability.log(0), workers=3) as cluster:

        def work(session: hw.Session) -> None:
            session.register(SMALL, SGD)
            session.step(small_gradient(0))

        cluster.run(work)
    monkeypatch.setattr(_limits, "RETURN_S", 0.3)
    with cluster_of(tmp_path, durability.log(0), workers=1, resumes=True) as cluster, cluster.connect() as session:
        session.register(SMALL, SGD)
        session.step(small_gradient(1))
        assert (session.clock, session.accepted) == (2, 1)


def test_a_push_of_an_old_sequence_is_answered_and_counts_no_second_time(tmp_path: Path) -> None:
    """At the level of messages, before and after a server was started again."""
    with cluster_of(tmp_path, durability.log(0)) as cluster, cluster.connect() as session:
        session.register(SMALL, SGD)
        for step in range(3):
            session.step(small_gradient(step))
        before = read_all(session)
        for _ in range(2):
            old = msgspec.structs.replace(session._seal)
            answer = session._ask(old, Committed)
            assert answer.clock == 3
            assert_equal_bits(read_all(session), before)
            cluster.restart(0)
            session.pull()
        assert len(session.state) == 0  # which comes back first
        session._peers.control.send(msgspec.structs.replace(session._seal, sequence=1))
        with pytest.raises(errors.PeerError, match="counts once"):
            session._peers.receive(session._peers.control, Committed)
        cluster.restart(0)
        with cluster.connect() as other:
            other.register(SMALL, SGD)
            assert_equal_bits(read_all(other), before)


def enrolment(coordinator: Coordinator, name: str, *, follows: bool = True) -> tuple[mock.Mock, Callable[[], int]]:
    """Let server 0, or what is to follow it, ask for its place; returns its connection, and what waits for the answer."""
    connection = mock.Mock(has_ended=False)
    address = ServerAddress(f"tcp://{name}:1", "", name)
    future: Future[int] = Future()

    def ask() -> None:
        try:
            future.set_result(coordinator.add_server(address, connection, index=0, follows=follows))
        except errors.HeadwaterError as error:
            future.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return connection, partial(future.result, PATIENCE_S)


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_follower_that_broke_off_while_it_waited_is_not_in_the_way(
    comes_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for whoever leads to come back, breaks off, and comes again; then the leader is there, or is given up."""
    monkeypatch.setattr(_limits, "RETURN_S", PATIENCE_S if comes_back else 0.3)
    keep = mock.Mock(spec=Snapshots, has_log=False, persists=True, durability=durability.replicated(1))
    keep.restore.return_value = None, False
    keep.take.side_effect = errors.StorageError("no disk")
    coordinator = Coordinator(None, consistency=hw.bsp(), workers=1, servers=1, keep=keep)
    broken, first = enrolment(coordinator, "first")
    broken.has_ended = True
    second_connection, second = enrolment(coordinator, "second")
    if comes_back:
        leader, lead = enrolment(coordinator, "leader", follows=False)
        assert lead() == 0
    assert second() == 0
    with pytest.raises(errors.PeerLostError, match="waits for its place"):
        first()
    (server,) = coordinator._servers.here
    assert server is not None
    assert server.connection is (leader if comes_back else second_connection)
    coordinator.close()


# What rests on the servers.


@pytest.mark.parametrize("kind", [durability.snapshot(0.1), durability.log(0)], ids=str)
def test_each_sample_counts_once_in_the_history_that_survives(tmp_path: Path, kind: durability.Durability) -> None:
    """Sample i adds 1 to element i of what is learnt: the sum is 1 everywhere where each has counted once."""
    size, workers = 600, 2
    with cluster_of(tmp_path, kind, servers=2, workers=workers, consistency=hw.asp()) as cluster:
        restarts = {100: 0, 101: 1, 250: 1, 400: 0, 596: 1}  # once each, by the worker that meets the sample

        def work(session: hw.Session) -> None:
            session.register({"w": np.zeros(size, np.float32)}, SGD)
            for batch in session.shard(list(range(size)), epochs=1, batch_size=3, piece=2):
                for victim in [restarts.pop(i) for i in batch if i in restarts]:
                    cluster.restart(victim)
                change = np.zeros(size, np.float32)
                change[batch] = -1.0
                session.step({"w": change})

        cluster.run(work)
        assert not restarts
        with cluster.connect() as session:
            session.register({"w": np.zeros(size, np.float32)}, SGD)
            found = session.pull()["w"]
            assert np.array_equal(found, np.ones(size, np.float32)), np.flatnonzero(found != 1.0)


@pytest.mark.parametrize("consistency", [hw.bsp(), hw.ssp(2), hw.asp()], ids=str)
@pytest.mark.parametrize("is_noticed", [True, False])
def test_each_sample_counts_once_though_a_worker_is_cut_off_and_comes_back(
    tmp_path: Path, consistency: hw.Consistency, is_noticed: bool
) -> None:
    """Its connection ends in the middle of a step: who is taken for dead gives back what it holds, and hears of that."""
    size, workers = 300, 2
    with cluster_of(tmp_path, durability.log(0), workers=workers, consistency=consistency) as cluster:
        coordinator = cluster.servers[0].coordinator
        assert coordinator is not None
        cuts = {0, 100, 101, 250, size - 1}

        def cut(session: hw.Session) -> None:
            control = session._peers.control
            assert isinstance(control, SocketConnection)
            with socket.socket(fileno=os.dup(control.fileno())) as same:
                same.shutdown(socket.SHUT_RDWR)
            worker = coordinator._workers[session._peers.hello.identity]
            with coordinator._changed:
                assert not is_noticed or coordinator._changed.wait_for(lambda: not worker.live, PATIENCE_S)

        def work(session: hw.Session) -> int:
            session.register({"w": np.zeros(size, np.float32)}, hw.optim.SGD(lr=1.0))
            yielded = 0
            for batch in session.shard(list(range(size)), epochs=1, batch_size=3, piece=2):
                yielded += 1
                change = np.zeros(size, np.float32)
                change[batch] = -1.0
                for _ in cuts.intersection(batch):
                    cuts.difference_update(batch)
                    cut(session)
                session.step({"w": change})
            return yielded

        yielded = sum(cluster.run(work))
        assert not cuts
        assert yielded > size // 3 or not is_noticed
        with cluster.connect() as session:
            session.register({"w": np.zeros(size, np.float32)}, hw.optim.SGD(lr=1.0))
            found = session.pull()["w"]
            means = (1.0, 0.5) if consistency.kind == "bsp" else (1.0,)  # of one push, or of two
            assert np.isin(found, means).all(), np.flatnonzero(~np.isin(found, means))


def test_a_sample_that_was_leased_after_the_job_went_back_counts(tmp_path: Path) -> None:
    """Its step is void, for nobody knows that it began afterwards; so it comes again."""
    with cluster_of(tmp_path, durability.snapshot(0)) as cluster, cluster.connect() as session:
        session.register({"w": np.zeros(10, np.float32)}, SGD)
        for i, batch in enumerate(session.shard(list(range(10)), epochs=1, batch_size=1, piece=1)):
            change = np.zeros(10, np.float32)
            change[batch] = -1.0
            session.step({"w": change})
            if i == 2:
                cluster.restart(0)
        assert np.array_equal(session.pull()["w"], np.ones(10, np.float32))


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("rows", [hw.bsp(), hw.asp()], ids=str)
def test_a_consumer_of_changes_has_all_of_them_after_a_restart(
    tmp_path: Path, servers: int, rows: hw.Consistency
) -> None:
    with cluster_of(tmp_path, durability.log(0), servers=servers) as cluster, cluster.connect() as session:
        table = rows_of(session, rows)
        session.register(SMALL, SGD)
        table.track("c")
        copy: dict[int, np.ndarray] = {}
        for i in range(6):
            table.push(np.arange(i, i + 20), np.ones((20, 4), np.float32))
            session.step(small_gradient(i))
            if i in (2, 3):
                cluster.restart(i % servers)
            change = table.changes("c")
            if change.restart:
                copy.clear()
            copy.update(zip(change.ids.tolist(), change.rows.copy(), strict=True))
        assert sorted(copy) == list(range(25))
        assert np.array_equal(np.stack([copy[i] for i in range(25)]), table.pull(np.arange(25)))


def test_a_prefetch_under_way_survives_a_restart(tmp_path: Path) -> None:
    with cluster_of(tmp_path, durability.log(0), servers=2) as cluster, cluster.connect() as session:
        table = rows_of(session, hw.asp())
        session.register(SMALL, SGD)
        ids = np.arange(100)
        table.push(ids, np.ones((100, 4), np.float32))
        for victim in (0, 1):
            table.prefetch(ids)
            cluster.restart(victim)
            assert np.array_equal(table.pull(ids), np.full((100, 4), -1.0, np.float32))


# torch.


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("where", ["server", "worker"])
def test_torch_learns_the_same_whatever_is_started_again(tmp_path: Path, transport: str, where: str) -> None:
    expected = learn(None, where)
    with cluster_of(tmp_path, durability.log(0), servers=2, transport=transport) as cluster:
        assert learn(cluster, where) == expected


def learn(cluster: Cluster | None, where: str) -> list[float]:
    import torch

    import headwater.torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 300), torch.nn.Tanh(), torch.nn.Linear(300, 90), torch.nn.Linear(90, 1)
    )
    session = hw.connect() if cluster is None else cluster.connect()
    with session:
        base = torch.optim.Adam(model.parameters(), lr=0.01)
        optimizer = headwater.torch.Optimizer(model, base, session=session, where=where)
        losses = []
        for step in range(8):
            data = torch.randn(32, 20, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            before = model(data)
            if cluster is not None and step in (2, 3, 6):
                cluster.restart(step % 2)  # between forward and backward: what autograd has kept must stay as it is
            loss = before.square().mean()
            loss.backward()
            if cluster is not None and step == 5:
                cluster.restart(0)
            optimizer.step()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("rows", [hw.bsp(), hw.asp()], ids=str)
def test_a_full_disk_where_rows_spill_is_named_and_the_job_goes_on_from_its_store(
    tmp_path: Path, rows: hw.Consistency
) -> None:
    """A limit of a file's size stands for the disk's, as in the kernels' tests: that needs no file system and no privilege."""
    (tmp_path / "spill").mkdir()
    policy = hw.RowPolicy(budget_bytes=6 << 20, when_full="spill", spill_folder=str(tmp_path / "spill"))

    def open_table(session: hw.Session) -> hw.Table:
        return session.table("big", 64, optimizer=SGD, initial=hw.Constant(0.0), policy=policy, consistency=rows)

    at, count = 0, 1000
    ones = np.ones((count, 64), np.float32)
    with cluster_of(tmp_path, durability.snapshot(0)) as cluster, cluster.connect() as session:
        table = open_table(session)
        session.register(SMALL, SGD)
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, old[1]))
        try:
            with pytest.raises(errors.StorageError, match=f"{tmp_path}/spill"):  # noqa: PT012
                while at < 40 * count:
                    table.push(np.arange(at, at + count), ones)
                    session.step(small_gradient(0))
                    at += count
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert at > 2 * count
        if rows.kind == "asp":  # one push was refused, nothing else has happened
            table.push(np.arange(at, at + count), ones)
            session.step(small_gradient(0))
            assert np.array_equal(table.pull(np.arange(at, at + count)), -ones)
    with cluster_of(tmp_path, durability.snapshot(0), resumes=True) as cluster, cluster.connect() as session:
        table = open_table(session)
        session.register(SMALL, SGD)
        table.push(np.arange(count), ones)
        session.step(small_gradient(0))
        assert np.array_equal(table.pull(np.arange(count)), -ones)


def test_a_half_written_snapshot_is_passed_over_and_goes_when_a_whole_one_is_there(tmp_path: Path) -> None:
    begin_log(tmp_path, snapshots=(2, 4))
    store = tmp_path / "store"
    newest = max(store.glob("snapshot-*"))
    (newest / "job.json").unlink()
    half = store / "snapshot-000000000005"
    half.mkdir()
    (half / "model-0.safetensors").write_bytes(b"torn")
    with cluster_of(tmp_path, durability.log(0), resumes=True) as cluster, cluster.connect() as session:
        rows_of(session, hw.asp())
        session.register(SMALL, hw.optim.Adam(lr=0.1))
        assert_equal_bits(read_all(session), states(6)[6])
        session.step(small_gradient(6))
        cluster.snapshot()
    names = sorted(path.name for path in store.glob("snapshot-*"))
    assert names[-1] == "snapshot-000000000007"
    assert not {half.name, newest.name} & set(names)
