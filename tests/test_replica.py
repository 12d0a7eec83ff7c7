"""Copies of tables: they equal what they follow, whatever happens to it and to them."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import table_model
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import PATIENCE_S, TOKEN, Job, start_job

import headwater as hw
from headwater import _limits, errors
from headwater._lookup import Changes
from headwater._messages import Hello, PushRows, ReplicaStats, ServedTable
from headwater._replica import metrics_of
from headwater._transport import Address, connect, request

SEEN = np.arange(-3, 13)


def changes_of(source: table_model.Table, limit: int) -> Changes:
    ids, rows, _, _, deleted, step, restart, more = source.changes("copy", limit)
    return Changes(ids, rows, deleted, restart, more, step)


def rows_of(source: table_model.Table) -> dict[int, bytes]:
    return {i: row.value.tobytes() for i, row in source.rows.items()}


def assert_equals(copy: hw.TableCopy, rows: dict[int, bytes], initial: bytes) -> None:
    found, missing = copy.look_up(SEEN)
    assert [row.tobytes() for row in found] == [rows.get(int(i), initial) for i in SEEN]
    assert missing == sum(int(i) not in rows for i in SEEN)
    assert len(copy) == len(rows)


@settings(max_examples=30)
@given(data=st.data())
def test_a_copy_equals_the_table_that_it_follows_and_what_that_was_while_everything_comes_anew(
    data: st.DataObject,
) -> None:
    source = table_model.Table(3, "sgd", [0.5], initial="constant", scale=0.25, expire_steps=4)
    copy = hw.TableCopy("items", 3, initial=hw.Constant(0.25))
    initial = np.full(3, 0.25, np.float32).tobytes()
    ids = st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True)
    source.track("copy")
    last: dict[int, bytes] = {}  # what it held before everything began to come anew
    is_anew = True
    for step in range(1, 25):
        some = np.array(data.draw(ids), np.int64)
        match data.draw(st.sampled_from(["push", "push", "delete", "follow", "follow", "restart"])):
            case "push":
                gradients = np.full((len(some), 3), step, np.float32)
                source.push(some, gradients, np.array([0.5, 0.0, 0.0, 0.0]), step=step, now=0.0)
            case "delete":
                source.delete(some)
            case "restart":
                last = (
                    last if is_anew else {int(i): copy.pull(i).tobytes() for i in SEEN if not copy.look_up([i]).missing}
                )
                source.track("copy")
                is_anew = True
            case "follow":
                changes = changes_of(source, data.draw(st.integers(1, 6)))
                copy.apply(changes)
                is_anew = is_anew and changes.more
                if not changes.more:
                    assert_equals(copy, rows_of(source), initial)
        source.sweep(step=step, now=0.0)
        if is_anew:
            assert_equals(copy, last, initial)


@pytest.mark.parametrize("initial", [hw.Uniform(0.5), hw.Normal(0.1), hw.Constant(2.0)], ids=str)
def test_an_id_without_a_row_has_the_value_that_training_sees_and_is_counted(initial: hw.Uniform) -> None:
    with hw.connect(consistency=hw.asp()) as session:
        table = session.table("items", 5, initial=initial, seed=-7)
        copy = hw.TableCopy.of(table.spec)
        copy.rows(np.array([3]), np.ones((1, 5), np.float32))
        found, missing = copy.look_up([[1, 2], [3, 1]])
        np.testing.assert_array_equal(found[[0, 0, 1], [0, 1, 1]], table.pull([1, 2, 1]))
    np.testing.assert_array_equal(found[1, 0], np.ones(5))
    assert missing == 3
    assert copy.stats()[2:] == (1, 4, 3)
    copy.delete(np.array([3, 4]))
    assert copy.look_up(3).missing == 1
    assert copy.pull(np.empty((0, 2), np.int64)).shape == (0, 2, 5)


def test_readers_beside_updates_see_whole_rows_of_which_none_is_ever_missing() -> None:
    """Also while everything comes anew. A row holds one number everywhere, which never falls."""
    copy, ids = hw.TableCopy("items", 96, initial=hw.Constant(-1.0)), np.arange(3000)
    has_ended = threading.Event()

    def write(value: int) -> None:
        rows = np.full((len(ids), 96), value, np.float32)
        if value % 8:
            copy.rows(ids, rows)
            return
        for part in range(3):
            mine = slice(1000 * part, 1000 * (part + 1))
            copy.apply(Changes(ids[mine], rows[mine], ids[:0], part == 0, part < 2, value))

    def read(seed: int) -> int:
        chance, last, rounds = np.random.default_rng(seed), np.zeros(len(ids), np.float32), 0
        while not has_ended.is_set() or not rounds:
            some = chance.permutation(ids)[:700]
            found, missing = copy.look_up(some)
            assert not missing
            assert np.all(found == found[:, :1])
            assert np.all(found[:, 0] >= last[some])
            last[some], rounds = found[:, 0], rounds + 1
        return rounds

    write(1)
    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read, seed) for seed in range(3)]
        for value in range(2, 120):
            write(value)
        has_ended.set()
        assert all(reader.result(PATIENCE_S) for reader in readers)


def train(table: hw.Table, session: hw.Session, seed: int) -> None:
    chance = np.random.default_rng(seed)
    for _ in range(4):
        ids = chance.integers(0, 9000 + 3000 * seed, 3000)
        table.push(ids, chance.normal(size=(3000, 4)).astype(np.float32))
        session.step()


@pytest.mark.parametrize(("transport", "servers"), [("shm", 1), ("tcp", 2)])
@pytest.mark.parametrize("consistency", [hw.asp(), hw.bsp()], ids=str)
def test_a_replica_equals_the_export_after_evictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str, servers: int, consistency: hw.Consistency
) -> None:
    monkeypatch.setattr(_limits, "LOOK_S", 0.05)
    policy = hw.RowPolicy(budget_bytes=1 << 20, expire_steps=20)
    with start_job(servers=servers, transport=transport, consistency=consistency) as job, job.connect() as session:
        table = session.table("items", 4, optimizer=hw.optim.Adam(lr=0.1), policy=policy)
        train(table, session, 0)
        with (
            hw.Replica(job.address, token=TOKEN, listen="tcp://127.0.0.1:0", interval_s=1e-3) as replica,
            hw.lookup(replica.address.tcp, token=TOKEN, transport="tcp" if transport == "tcp" else None) as reader,
        ):
            assert len(replica.table("items")) == table.stats().rows
            later = session.table("later", 2)
            for seed in range(1, 6):
                train(table, session, seed)
                later.push([seed], np.ones((1, 2), np.float32))
            session.step()
            replica.wait()
            stats = table.stats()
            assert stats.evicted > 1000
            assert table.export(tmp_path / "rows.safetensors") == len(replica.table("items"))
            ids = np.arange(24_000)
            expected = table.pull(ids, touch=False)
            found, missing = reader.look_up("items", ids)
            np.testing.assert_array_equal(found, expected)
            assert missing == len(ids) - stats.rows
            np.testing.assert_array_equal(reader.pull("items", ids[:6].reshape(2, 3)), expected[:6].reshape(2, 3, 4))
            seen = reader.stats()
            assert seen.tables[0].rows == stats.rows
            assert seen.tables[0].step == stats.step
            assert 0 < seen.tables[0].lag_p50_s <= seen.tables[0].lag_p99_s < PATIENCE_S
            assert (seen.tables[0].lookups, seen.tables[0].missing) == (
                2,
                missing + reader.look_up("items", ids[:6]).missing,
            )
            deadline = time.monotonic() + PATIENCE_S
            while len(replica.stats().tables) < 2:  # a table that was declared later is found
                assert time.monotonic() < deadline
            replica.wait()
            np.testing.assert_array_equal(reader.pull("later", SEEN), later.pull(SEEN, touch=False))


def test_streams_end_with_their_replicas() -> None:
    """A table has six."""
    with start_job() as job, job.connect() as session:
        session.table("items", 2, consistency=hw.asp()).push([1], np.ones((1, 2), np.float32))
        for _ in range(8):
            with hw.Replica(job.address, token=TOKEN) as replica:
                assert len(replica.table("items")) == 1


@contextmanager
def served(folder: Path) -> Iterator[tuple[hw.Replica, Job]]:
    """Yield a replica that listens on a Unix socket in the folder and has row 1 of "items", and its job."""
    with start_job() as job, job.connect() as session:
        table = session.table("items", 2, consistency=hw.asp(), initial=hw.Constant(0.5))
        table.push([1], np.ones((1, 2), np.float32))
        with hw.Replica(job.address, token=TOKEN, listen=f"unix://{folder}/r") as replica:
            yield replica, job


def test_bad_lookups_are_refused_and_the_next_one_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tmp_path) as (replica, _):
        address = replica.address.unix
        with pytest.raises(errors.AuthenticationError, match="job's token"):
            hw.lookup(address, token="another")
        with hw.lookup(address, token=TOKEN) as reader:
            with pytest.raises(errors.LayoutError, match="Expected ids that are integers, got float64"):
                reader.pull("items", [0.5])
            with pytest.raises(errors.SettingError, match="Expected one of the replica's tables, 'items', got 'users'"):
                reader.pull("users", [1])
            with monkeypatch.context() as patch:
                patch.setattr(_limits, "ROOM_BYTES", 64)
                with pytest.raises(errors.LayoutError, match="at most 64 bytes, got 456: split it"):
                    reader.pull("items", np.arange(25))
            assert reader.pull("items", 1).shape == (2,)
            assert reader.pull("items", []).shape == (0, 2)
        with pytest.raises(errors.ClosedError, match="got one that is closed"):
            reader.pull("items", [1])
        with pytest.raises(errors.ProtocolError, match=r"this is a replica; look up with hw\.lookup"):
            hw.connect(address, token=TOKEN)
        stranger = connect(Address.parse(address))
        request(stranger, Hello(TOKEN, "table", 1))
        with pytest.raises(errors.ProtocolError, match="rows are pushed to the job"):
            request(stranger, PushRows(0, 0, 0, 0, ()))
        stranger.close()
        with pytest.raises(errors.SettingError, match="Expected one of the replica's tables"):
            replica.table("users")


def test_bad_replicas_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADWATER_ADDRESS", raising=False)
    with pytest.raises(errors.SettingError, match="address of a running job"):
        hw.Replica()
    with served(tmp_path) as (_, job):
        with pytest.raises(errors.SettingError, match="interval_s above 0"):
            hw.Replica(job.address, token=TOKEN, interval_s=0)
        with pytest.raises(errors.AuthenticationError, match="job's token"):
            hw.Replica(job.address, token="another")
        with pytest.raises(errors.WaitTimeoutError, match="no end of users: does any worker declare them"):
            hw.Replica(job.address, token=TOKEN, tables=["users"], timeout_s=0.05)
        with pytest.raises(errors.AddressError, match="Is another server running there"):
            hw.Replica(job.address, token=TOKEN, listen=f"unix://{tmp_path}/r")
        with ExitStack() as stack:
            for _ in range(5):  # and the one that is there
                stack.enter_context(hw.Replica(job.address, token=TOKEN))
            with pytest.raises(errors.SettingError, match="at most 6 consumers"):
                hw.Replica(job.address, token=TOKEN)


def test_a_reader_finds_a_replica_again_and_says_when_there_is_none(tmp_path: Path) -> None:
    with served(tmp_path) as (replica, job):
        reader = hw.lookup(replica.address.unix, token=TOKEN, timeout_s=0.05)
        expected = reader.pull("items", SEEN)
        for connection in list(replica._connections):
            connection.close()
        np.testing.assert_array_equal(reader.pull("items", SEEN), expected)
        replica.close()
        with pytest.raises(errors.UnreachableError, match="Expected a server at unix"):
            reader.pull("items", SEEN)
        with hw.Replica(job.address, token=TOKEN, listen=f"unix://{tmp_path}/r"):
            np.testing.assert_array_equal(reader.pull("items", SEEN), expected)
        reader.close()
        reader.close()


def test_a_reader_is_shared_by_threads_and_used_in_a_forked_child(tmp_path: Path) -> None:
    with served(tmp_path) as (replica, _), hw.lookup(replica.address.unix, token=TOKEN) as reader:
        expected = reader.pull("items", SEEN)
        with ThreadPoolExecutor(3) as pool:
            for found in pool.map(lambda i: reader.pull("items", np.roll(SEEN, i)), range(60)):
                assert sorted(found[:, 0]) == sorted(expected[:, 0])
        child = os.fork()
        if child == 0:
            os._exit(0 if np.array_equal(reader.pull("items", SEEN), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
        np.testing.assert_array_equal(reader.pull("items", SEEN), expected)


def test_a_copy_stands_where_a_table_does_for_inference_and_is_not_trained() -> None:
    copy = hw.TableCopy("items", 4, initial=hw.Constant(0.5))
    copy.rows(np.array([7, 8]), np.array([[1, 1, 1, 1], [2, 2, 2, 2]], np.float32))
    ids = torch.tensor([[7, 8], [8, 9]])
    embedding, bags = hw.torch.Embedding(copy), hw.torch.EmbeddingBag(copy, mode="sum").eval()
    with torch.no_grad():
        assert embedding(ids)[..., 0].tolist() == [[1, 2], [2, 0.5]]
        assert bags(ids)[:, 0].tolist() == [3, 2.5]
    assert copy.stats().missing == 2
    with pytest.raises(errors.UsageError, match="read-only copy of table 'items'"):
        embedding(ids).sum().backward()
    with pytest.raises(errors.UsageError, match="read-only copy"):
        copy.push([7], np.ones((1, 4), np.float32))
    with pytest.raises(errors.LayoutError, match=r"values of float32 \(1, 4\), got float32 \(1, 3\)"):
        copy.rows(np.array([7]), np.ones((1, 3), np.float32))
    with pytest.raises(errors.SettingError, match="dim from 1"):
        hw.TableCopy("items", 0)


def test_metrics_are_prometheus_text() -> None:
    """Version 0.0.4: every sample belongs to a metric with help and type, and names may hold anything."""
    table = ServedTable('a"b\\c\n', 2, 3, 99, 7, 0.5, 0.25, 0.75, 5, 1, 1, 4, 8, 2)
    text = metrics_of(ReplicaStats((table,), "lost"))
    assert text.endswith("\n")
    kinds: set[str] = set()
    samples = {}
    for line in text.splitlines():
        if found := re.fullmatch(r"# TYPE (\w+) (?:gauge|counter)", line):
            kinds.add(found[1])
        elif not line.startswith("# HELP "):
            sample = re.fullmatch(r'(\w+)(\{(?:\w+="(?:[^"\\\n]|\\["\\n])*",?)*\})? (\S+)', line)
            assert sample is not None, line
            assert sample[1] in kinds
            samples[sample[1] + (sample[2] or "")] = float(sample[3])
    name = r'{table="a\"b\\c\n"'
    assert samples["headwater_replica_up"] == 0
    assert samples[f"headwater_replica_missing_total{name}}}"] == 2
    assert samples[f'headwater_replica_lag_seconds{name},quantile="0.99"}}'] == 0.75
