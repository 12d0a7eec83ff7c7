"""Tables through the session: the same rows whatever the way they travel, and nothing of what does not count."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import table_model
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import start_job

import headwater as hw
from headwater import _kernels, _limits, errors
from headwater._messages import Done, PushRows

Rows = dict[int, bytes]
ASP, BSP = hw.asp(), hw.bsp()
OPTIMIZERS = [
    hw.optim.SGD(lr=0.5, weight_decay=0.1),
    hw.optim.Adagrad(lr=0.5, lr_decay=0.1),
    hw.optim.RowwiseAdagrad(lr=0.5, initial_accumulator_value=0.1),
    hw.optim.Adam(lr=0.5),
    hw.optim.FTRL(lr=0.5, l1=0.01, l2=0.1),
]
#: (transport, servers); memory: a server in this process.
WAYS = [("memory", 1), ("shm", 1), ("tcp", 1), ("shm", 2), ("tcp", 3)]
EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63), 12_345_678_901]
tables = pytest.mark.parametrize("make", [table_model.Table, _kernels.Table], ids=["model", "native"])
ways = pytest.mark.parametrize(("transport", "servers"), WAYS)


@contextmanager
def job(transport: str = "memory", servers: int = 1, workers: int = 1, consistency: Any = ASP) -> Iterator[Any]:
    """Yield a function that runs a body once per worker, each with a session of its own."""
    if transport != "memory":
        with start_job(workers=workers, servers=servers, transport=transport, consistency=consistency) as started:
            yield started.run
        return
    assert servers == workers == 1
    with hw.connect(consistency=consistency) as session:
        yield lambda body: [body(session)]


@contextmanager
def alone(consistency: Any = ASP) -> Iterator[hw.Session]:
    with hw.connect(consistency=consistency) as session:
        yield session


def ones(*shape: int) -> npt.NDArray[np.float32]:
    return np.ones(shape, np.float32)


def batches(seed: int, count: int, dim: int = 3) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Return ids with repeats, of many shapes, and gradients for them."""
    random = np.random.default_rng(seed)
    shapes = [(7,), (3, 4), (1, 1, 1), (50,)]
    found = []
    for i in range(count):
        ids = random.choice([*EXTREMES, *range(2, 40)], shapes[i % len(shapes)])
        found.append((ids, random.standard_normal((*ids.shape, dim)).astype(np.float32)))
    return found


def everything(table: hw.Table) -> Rows:
    """Return every row, value and state, to the last bit."""
    found = {}
    for (ids, _, rows, _), _ in table.pages():
        for i, row in zip(ids.tolist(), rows, strict=True):
            assert i not in found
            found[i] = row.tobytes()
    return found


# The table itself: the same contract for the native one and for its model.


def make_table(make: Callable[..., Any], optimizer: Any = OPTIMIZERS[0], dim: int = 3, **options: Any) -> Any:
    return make(dim, optimizer.kind, optimizer.row_slots(dim), seed=5, scale=0.25, **options)


def pull(table: Any, ids: Any, dim: int = 3, *, now: float = 0.0, touch: bool = True) -> npt.NDArray[np.float32]:
    out = np.empty((len(ids), dim), np.float32)
    table.pull(np.array(ids, np.int64), out, touch=touch, now=now)
    return out


def push(table: Any, ids: Any, gradients: Any, step: int, optimizer: Any = OPTIMIZERS[0], now: float = 0.0) -> None:
    row = np.array(optimizer.row(optimizer.scalars(), step))
    table.push(np.array(ids, np.int64), np.asarray(gradients, np.float32), row, step=step, now=now)


@tables
def test_an_initial_value_depends_on_the_id_alone(make: Any) -> None:
    table = make_table(make)
    first = pull(table, EXTREMES)
    assert (np.abs(first) <= 0.25).all()
    assert len(np.unique(first)) == first.size
    np.testing.assert_array_equal(pull(make_table(make), EXTREMES[::-1])[::-1], first)
    assert table.stats()["rows"] == 0
    assert table.stats()["misses"] == len(EXTREMES)


@tables
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.kind)
def test_each_row_makes_steps_of_its_own(make: Any, optimizer: Any) -> None:
    table = make_table(make, optimizer)
    ids = [4, -9, 7]
    start = pull(table, ids)
    model = make_table(table_model.Table, optimizer)
    for i, value in zip(ids, start, strict=True):
        model.rows[i] = table_model.Row(value.copy(), model.slots.copy())
    random = np.random.default_rng(3)
    for step in range(1, 8):
        some = sorted({0, step % 3})
        gradients = random.standard_normal((len(some), 3)).astype(np.float32)
        for either in (table, model):
            push(either, [ids[k] for k in some], gradients, step, optimizer)
    np.testing.assert_allclose(pull(table, ids), pull(model, ids), rtol=2e-5, atol=2e-6)
    assert not np.isclose(pull(table, ids), start).any()


@tables
def test_a_row_comes_with_its_last_needed_sighting(make: Any) -> None:
    table = make_table(make, admit_after=3)
    start = pull(table, [1, 2])
    for step in (1, 2):
        push(table, [1, 2], ones(2, 3), step)
    np.testing.assert_array_equal(pull(table, [1, 2]), start)
    push(table, [2], ones(1, 3), 3)
    assert (pull(table, [2]) < start[1]).all()
    np.testing.assert_array_equal(pull(table, [1]), start[:1])
    assert (table.stats()["rows"], table.stats()["admitted"], table.stats()["refused"]) == (1, 1, 4)


@tables
@pytest.mark.parametrize("rule", [{"expire_steps": 3}, {"expire_s": 3.0}], ids=str)
def test_a_row_unseen_for_too_long_is_gone(make: Any, rule: Any) -> None:
    table = make_table(make, **rule)
    start = pull(table, [1, 2])
    push(table, [1, 2], ones(2, 3), 1, now=1.0)
    for step in range(2, 8):
        pull(table, [1], now=float(step))
        push(table, [3], ones(1, 3), step, now=float(step))
    while table.sweep(step=7, now=7.0):
        pass
    assert (pull(table, [1], now=7.0) < start[0]).all()
    np.testing.assert_array_equal(pull(table, [2], now=7.0), start[1:])
    assert table.stats()["expired"] == 1


@tables
def test_deleted_rows_are_new_ones_when_they_come_back(make: Any) -> None:
    table = make_table(make)
    start = pull(table, EXTREMES)
    push(table, EXTREMES, ones(len(EXTREMES), 3), 1)
    assert table.delete(np.array([0, 5, -1], np.int64)) == 2
    assert table.stats()["rows"] == len(EXTREMES) - 2
    np.testing.assert_array_equal(pull(table, [0, -1]), start[:2])


@tables
def test_exported_rows_make_the_same_table(make: Any) -> None:
    table, twin = (make_table(make, OPTIMIZERS[3]) for _ in range(2))
    push(table, range(100), ones(100, 3), 1, OPTIMIZERS[3])
    cursor, pages = 0, 0
    while cursor >= 0:
        ids, rows, counts, last_seen, cursor = table.export(cursor, 7)
        twin.put(ids, rows, counts, last_seen, step=1, now=0.0)
        pages += 1
    assert pages > 2
    for either in (table, twin):
        push(either, range(50, 150), ones(100, 3), 2, OPTIMIZERS[3])
    assert pull(table, range(150)).tobytes() == pull(twin, range(150)).tobytes()


@tables
@settings(max_examples=20)
@given(data=st.data())
def test_changes_make_a_replica_that_equals_the_table(make: Any, data: st.DataObject) -> None:
    """After any interleaving of insert, update, delete, expiry and re-insert, and of asking."""
    table, replica = make_table(make, expire_steps=4), dict[int, bytes]()
    ids = st.lists(st.integers(0, 12), min_size=1, max_size=6, unique=True)
    push(table, [1], ones(1, 3), 1)
    table.track("replica")
    table.track("nobody asks")
    for step in range(2, 20):
        some = np.array(data.draw(ids), np.int64)
        match data.draw(st.sampled_from(["push", "push", "delete", "pull", "follow"])):
            case "push":
                push(table, some, ones(len(some), 3), step)
            case "delete":
                table.delete(some)
            case "pull":
                pull(table, some)
            case "follow":
                follow(replica, lambda: shared(table.changes("replica", 5)))
        table.sweep(step=step, now=0.0)
    while table.sweep(step=19, now=0.0):
        pass
    follow(replica, lambda: shared(table.changes("replica", 5)))
    exported, rows, *_ = table.export(0, 1 << 16)
    assert replica == {i: row.tobytes() for i, row in zip(exported.tolist(), rows, strict=True)}


def shared(changes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a session gets of a table's changes."""
    ids, rows, _, _, deleted, step, restart, more = changes
    return ids, rows, deleted, restart, more, step


def follow(replica: Rows, changes: Callable[[], Any]) -> None:
    """Do what a consumer has to do."""
    more = True
    while more:
        ids, rows, deleted, restart, more, _ = changes()
        if restart:
            replica.clear()
        for i in deleted.tolist():
            replica.pop(i, None)
        replica.update({i: row.tobytes() for i, row in zip(ids.tolist(), rows, strict=True)})


@pytest.mark.parametrize("ids", [table_model, _kernels], ids=["model", "native"])
def test_ids_are_grouped_by_server_and_put_back(ids: Any) -> None:
    some = np.array([5, 3, 5, *EXTREMES, 3], np.int64)
    distinct, ends, inverse = ids.unique(some, 3)
    np.testing.assert_array_equal(distinct[inverse], some)
    assert len(set(distinct.tolist())) == len(distinct) == ends[-1]
    homes = ids.bucket_of(distinct).astype(int) * 3 // 256
    assert (np.diff(homes) >= 0).all()
    np.testing.assert_array_equal(ends, [(homes <= server).sum() for server in range(3)])


# The ways to a table.


def train(session: hw.Session, table: hw.Table, seed: int = 1, count: int = 6) -> None:
    """Push some batches, each as this worker's next step where the table waits for it."""
    for ids, gradients in batches(seed, count, table.dim):
        rows = table.pull(ids)
        assert rows.shape == (*ids.shape, table.dim)
        table.push(ids, gradients + rows)
        if table.spec.is_staged:
            session.step()


def test_rows_are_the_same_to_the_last_bit_however_they_travel() -> None:
    results = []
    for consistency in (ASP, BSP):
        for transport, servers in WAYS:
            with job(transport, servers, consistency=consistency) as run:

                def body(session: hw.Session) -> Rows:
                    table = session.table("items", 3, optimizer=hw.optim.Adagrad(lr=0.5), seed=9)
                    train(session, table)
                    return everything(table)

                results += run(body)
    assert len(results[0]) > 20
    assert all(rows == results[0] for rows in results)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.kind)
def test_under_bsp_two_workers_make_the_same_bits_on_any_number_of_servers(optimizer: Any) -> None:
    results = []
    for transport, servers in [("shm", 1), ("tcp", 2), ("shm", 3), ("shm", 1)]:
        with job(transport, servers, workers=2, consistency=BSP) as run:

            def body(session: hw.Session) -> Rows:
                table = session.table("items", 3, optimizer=optimizer)
                train(session, table, seed=session.index)
                return everything(table)

            results += run(body)
    assert len(results[0]) > 20
    assert all(rows == results[0] for rows in results)


@ways
def test_any_integers_of_any_shape_are_ids(transport: str, servers: int) -> None:
    def body(session: hw.Session) -> None:
        table = session.table("items", 2, optimizer=hw.optim.SGD(lr=1.0))
        first = table.pull(EXTREMES)
        for ids in (
            np.array(EXTREMES),
            np.array([[1, 255], [0, 1]], np.uint8),
            np.array(7, np.int16),
            np.array([2**64 - 1], np.uint64),
            np.arange(20)[::-3],
            [[1], [2]],
            3,
        ):
            rows = table.pull(ids)
            assert rows.shape == (*np.shape(ids), 2)
            assert rows.dtype == np.float32
        np.testing.assert_array_equal(table.pull(np.array([2**64 - 1], np.uint64))[0], first[1])  # -1
        table.push(EXTREMES, ones(6, 2))
        np.testing.assert_array_equal(table.pull(EXTREMES), first - 1)
        assert (table.stats().rows, table.stats().step) == (6, 1)

    with job(transport, servers) as run:
        run(body)


@ways
def test_an_empty_batch_does_nothing(transport: str, servers: int) -> None:
    def body(session: hw.Session) -> None:
        table = session.table("items", 2)
        assert table.pull([]).shape == (0, 2)
        assert table.pull(np.empty((0, 3), np.int32)).shape == (0, 3, 2)
        table.push([], np.empty((0, 2), np.float32))
        table.prefetch([])
        assert (table.stats().rows, table.stats().step) == (0, 0)

    with job(transport, servers) as run:
        run(body)


def test_gradients_of_equal_ids_are_summed() -> None:
    with alone() as session:
        table = session.table("items", 2, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
        table.push(np.full(1_000_000, 7), ones(1_000_000, 2))
        np.testing.assert_array_equal(table.pull([7, 8]), [[-1e6, -1e6], [0, 0]])
        assert table.stats().step == 1


def test_every_server_has_a_part_and_rows_grow_with_their_batches() -> None:
    with start_job(servers=3, transport="shm", consistency=ASP) as started:

        def body(session: hw.Session) -> None:
            table = session.table("items", 2, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(3.0))
            for count in (1, 10, 5000, 100, 20_000):  # rooms grow on the way
                table.push(np.arange(count), ones(count, 2))
            expected = 3.0 - np.sum([np.arange(20_000) < count for count in (1, 10, 5000, 100, 20_000)], axis=0)
            np.testing.assert_array_equal(table.pull(np.arange(20_000))[:, 0], expected)

        started.run(body)
        parts = [server.shard.tables.tables[0].stats() for server in started.servers]
        assert sum(part.rows for part in parts) == 20_000
        assert all(part.rows > 6000 and part.step == 5 for part in parts)


def test_a_table_has_one_number_of_settings_for_all_workers() -> None:
    def body(session: hw.Session) -> None:
        optimizer = hw.optim.Adagrad(lr=0.25)
        table = session.table("items", 4, optimizer=optimizer, policy=hw.RowPolicy(admit_after=2))
        adopted = session.table("items")
        assert adopted is table
        assert adopted.spec.optimizer == optimizer
        assert session.table("others", 2).spec.optimizer == hw.optim.SGD(lr=0.01)
        assert "Table 'items' dim=4 Adagrad" in repr(table)
        for wish, message in [
            ({"dim": 5}, "Expected dim 4, got 5 — table 'items' is declared already"),
            ({"optimizer": hw.optim.Adagrad(lr=0.5)}, r"Expected optimizer Adagrad\(.*lr=0.25.* got Adagrad\(.*lr=0.5"),
            ({"optimizer": hw.optim.SGD()}, r"got SGD\("),
            ({"initial": hw.Constant(1.0)}, r"Expected initial Uniform\(limit=0.01\), got Constant\(value=1.0\)"),
            ({"seed": 3}, "Expected seed 0, got 3"),
            ({"policy": hw.RowPolicy()}, r"Expected policy RowPolicy\(admit_after=2.*got RowPolicy\(admit_after=1"),
            ({"consistency": hw.asp()}, "Expected consistency bsp, got asp"),
        ]:
            with pytest.raises(errors.SettingError, match=message):
                session.table("items", **wish)  # type: ignore[arg-type]

    with job("shm", 2, workers=2, consistency=BSP) as run:
        run(body)


# What counts, and when.


def test_under_bsp_rows_are_the_weighted_mean_over_the_commits_pushes() -> None:
    def body(session: hw.Session) -> npt.NDArray[np.float32]:
        table = session.table("items", 1, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
        mine = [1, 2] if session.index == 0 else [2, 3]
        table.push(mine, 4 * ones(2, 1) * (session.index + 1))
        np.testing.assert_array_equal(table.pull([1, 2, 3]), np.zeros((3, 1)))  # nothing has happened yet
        session.step(weight=1.0 + 2.0 * session.index)
        session.step()  # nothing is pushed: nothing changes
        return table.pull([1, 2, 3])[:, 0]

    with job("shm", 2, workers=2, consistency=BSP) as run:
        for rows in run(body):
            np.testing.assert_array_equal(rows, [-1.0, -7.0, -6.0])  # 4·¼, 4·¼ + 8·¾, 8·¾


def test_two_workers_equal_one_with_the_larger_batch() -> None:
    ids, gradients = np.arange(12) % 5, np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)

    def body(session: hw.Session) -> npt.NDArray[np.float32]:
        table = session.table("items", 3, optimizer=hw.optim.Adam(lr=0.1))
        mine = list(range(session.index, 12, 2))
        for _ in range(3):
            table.push(ids[mine], gradients[mine] / len(mine))
            session.step()
        return table.pull(range(5))

    def whole(session: hw.Session) -> npt.NDArray[np.float32]:
        table = session.table("items", 3, optimizer=hw.optim.Adam(lr=0.1))
        for _ in range(3):
            table.push(ids, gradients / 12)
            session.step()
        return table.pull(range(5))

    with job("shm", workers=2, consistency=BSP) as two, job(consistency=BSP) as one:
        expected = one(whole)[0]
        for rows in two(body):
            np.testing.assert_allclose(rows, expected, rtol=2e-5)


def test_several_pushes_of_one_step_count_together() -> None:
    with alone(BSP) as session:
        table = session.table("items", 1, optimizer=hw.optim.RowwiseAdagrad(lr=1.0, eps=0.0), initial=hw.Constant(0.0))
        for _ in range(3):
            table.push([1, 1], ones(2, 1))
        session.step()
        np.testing.assert_array_equal(table.pull([1]), [[-1.0]])  # one step, of a gradient of 6
        assert table.stats().step == 1


def test_what_is_staged_for_a_step_that_counts_nowhere_is_dropped() -> None:
    with alone(BSP) as session:
        session.register({"w": np.zeros(2, np.float32)})
        table = session.table("items", 1, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
        table.push([1], 100 * ones(1, 1))
        session.step(weight=0.0)
        table.push([1], 100 * ones(1, 1))
        with pytest.raises(errors.NonFiniteError, match="in 'w'"):
            session.step({"w": np.array([np.nan, 0], np.float32)})
        session.step({"w": np.zeros(2, np.float32)})
        assert (table.stats().rows, table.stats().step) == (0, 0)
        table.push([1], ones(1, 1))
        session.step({})  # no dense gradient at all
        np.testing.assert_array_equal(table.pull([1]), [[-1.0]])
        assert not any(desk.staged for desk in session._peers.server.shard.tables._desks.values())  # type: ignore[union-attr]


def test_a_push_belongs_to_the_step_after_it_also_before_the_answer_to_the_last() -> None:
    with alone(BSP) as session:
        table = session.table("items", 1, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
        for k in range(3):
            table.push([k], ones(1, 1))
            session.push(weight=1.0)  # and on, without waiting
        np.testing.assert_array_equal(table.pull([0, 1, 2, 3]), [[-1], [-1], [-1], [0]])  # which waits
        assert table.stats().step == 3


def test_a_worker_that_leaves_before_its_seal_leaves_nothing() -> None:
    with start_job(workers=2, servers=2, transport="shm", consistency=BSP) as started:
        first, second = started.connect(), started.connect()
        with first, second:
            both = [session.table("items", 1, optimizer=hw.optim.SGD(lr=1.0)) for session in (first, second)]
            pool = [threading.Thread(target=session.step) for session in (first, second)]
            for thread in pool:
                thread.start()
            for thread in pool:
                thread.join()
            both[0].push([1, 2, 3, 4], 100 * ones(4, 1))
            second_start = both[1].pull([1, 2, 3, 4])
            first.close()
            both[1].push([1], ones(1, 1))
            second.step()
            np.testing.assert_array_equal(
                both[1].pull([1, 2, 3, 4])[:, 0], second_start[:, 0] - np.array([1, 0, 0, 0], np.float32)
            )
            assert both[1].stats().rows == 1
            assert len(started.servers[1].shard.tables._desks) == 1


def test_rows_may_be_asynchronous_beside_synchronous_tensors() -> None:
    everybody = threading.Barrier(2)

    def body(session: hw.Session) -> tuple[float, float, float]:
        session.register({"w": np.zeros(1, np.float32)}, hw.optim.SGD(lr=1.0))
        sparse = session.table("sparse", 1, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0), consistency=ASP)
        dense = session.table("dense", 1, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
        for _ in range(3):
            sparse.push([5], ones(1, 1))
            dense.push([5], ones(1, 1))
            assert dense.pull([5])[0, 0] == -float(session.clock)
            session.step({"w": np.ones(1, np.float32)})
        everybody.wait(20.0)
        return float(sparse.pull([5])[0, 0]), float(dense.pull([5])[0, 0]), float(session.parameters["w"][0])

    with job("shm", 2, workers=2, consistency=BSP) as run:
        assert run(body) == [(-6.0, -3.0, -3.0)] * 2


def test_under_ssp_a_push_counts_at_once() -> None:
    with alone(hw.ssp(2)) as session:
        table = session.table("items", 1, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
        table.push([1], ones(1, 1))
        np.testing.assert_array_equal(table.pull([1]), [[-1.0]])
        assert session.clock == 0
        session.step()
        assert session.clock == 1


def test_a_push_that_comes_twice_counts_once() -> None:
    for consistency in (ASP, BSP):
        with alone(consistency) as session:
            table = session.table("items", 1, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
            table.push([1], ones(1, 1))
            link = session._tables.links[0]  # type: ignore[union-attr]
            for sequence in (0, -1):
                link.ask(PushRows(0, sequence, 0, 1, (1.0, 0.0, 0.0, 0.0)), Done)
            session.step()
            np.testing.assert_array_equal(table.pull([1]), [[-1.0]])


def test_learning_rates_travel_with_the_push() -> None:
    with alone() as session:
        table = session.table("items", 1, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
        table.push([1], ones(1, 1), scalars={"lr": 0.5})
        table.push([1], ones(1, 1))
        np.testing.assert_array_equal(table.pull([1]), [[-1.0]])
        table.set_scalars(lr=2.0)
        table.push([1], ones(1, 1))
        np.testing.assert_array_equal(table.pull([1]), [[-3.0]])
        for scalars, message in [
            ({"eps": 1.0}, "Expected some of lr, momentum"),
            ({"lr": -1.0}, "lr 0 or more, got -1.0"),
        ]:
            with pytest.raises(errors.SettingError, match=message):
                table.set_scalars(**scalars)


def test_under_bsp_differing_learning_rates_refuse_the_later_workers_push() -> None:
    def body(session: hw.Session) -> tuple[str, float]:
        table = session.table("items", 1, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
        table.push([1], ones(1, 1), scalars={"lr": 1.0 + session.index})
        try:
            session.step()
        except errors.DisagreementError as error:
            return str(error), float(table.pull([1])[0, 0])
        return "", float(table.pull([1])[0, 0])

    with job("shm", 2, workers=2, consistency=BSP) as run:
        (first, mine), (second, other) = run(body)
        assert (first, mine, other) == ("", -1.0, -1.0)
        assert (
            "same learning rate and other scalars from every worker for table 'items', got others from worker 1"
            in second
        )


@pytest.mark.parametrize(("transport", "servers"), [("shm", 1), ("tcp", 1), ("shm", 2)])
def test_a_push_refused_for_its_rows_leaves_the_tensors_too(transport: str, servers: int) -> None:
    """Over TCP the commit is foreseen, prepared and streamed before its rows are asked about."""
    size = 400_000

    def body(session: hw.Session) -> tuple[list[float], float, list[int]]:
        session.register({"w": np.zeros(size, np.float32)}, hw.optim.SGD(lr=1.0))
        table = session.table("items", 1, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
        accepted, values = [], []
        for step in range(4):
            table.push([1], ones(1, 1), scalars={"lr": 2.0 if session.index == step == 1 else 1.0})
            try:
                session.step({"w": ones(size) * np.float32(1 + 2 * session.index)})
            except errors.DisagreementError:
                assert session.index == step == 1
            accepted.append(session.accepted)
            values.append(session.parameters["w"][0].item())
            assert np.all(session.parameters["w"] == values[-1])
            assert np.all(session.pull()["w"] == values[-1])
        return values, float(table.pull([1])[0, 0]), accepted

    with job(transport, servers, workers=2, consistency=BSP) as run:
        assert run(body) == [([-2.0, -3.0, -5.0, -7.0], -4.0, [2, 1, 2, 2])] * 2


# Ahead of the need.


@ways
def test_a_prefetched_batch_is_what_a_pull_gives(transport: str, servers: int) -> None:
    def body(session: hw.Session) -> None:
        one, two = (session.table(name, 3) for name in ("one", "two"))
        for ids, gradients in batches(4, 6):
            expected = one.pull(ids), two.pull(ids)
            one.prefetch(ids)
            two.prefetch(ids[:1])  # another one's room
            two.push(ids, gradients)
            one.push(np.arange(100, 200), ones(100, 3))  # not of this batch
            assert one.stats().rows >= 100  # asked while the batch is under way
            np.testing.assert_array_equal(one.pull(ids), expected[0])
            one.pull(ids + 1)
            one.prefetch(ids + 1)
            one.prefetch(ids)  # instead
            np.testing.assert_array_equal(one.pull(ids), expected[0])

    with job(transport, servers) as run:
        run(body)


def test_prefetched_rows_are_of_then_under_asp_and_of_now_under_bsp() -> None:
    for consistency, expected in [(ASP, 0.0), (BSP, -1.0)]:
        with alone(consistency) as session:
            table = session.table("items", 1, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
            table.prefetch([1, 2])
            table.push([1], ones(1, 1))
            session.step()
            assert table.pull([1, 2])[0, 0] == expected
            assert table.pull([1, 2])[0, 0] == -1.0


@ways
def test_a_batch_ahead_that_could_not_be_read_is_read_again(
    transport: str, servers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headwater._table import Rows as ServerRows

    pull = ServerRows.pull
    disk_is_broken = [False]

    def broken(self: ServerRows, *arguments: Any, **options: Any) -> int:
        if disk_is_broken[0]:
            raise errors.StorageError("on purpose")
        return pull(self, *arguments, **options)

    monkeypatch.setattr(ServerRows, "pull", broken)

    def body(session: hw.Session) -> None:
        table = session.table("items", 3)
        ids = np.arange(100)
        expected = table.pull(ids)
        for notice in (table.stats, lambda: table.pull(ids + 5), lambda: table.pull(ids)):
            disk_is_broken[0] = True
            table.prefetch(ids[::-1])
            with pytest.raises(errors.StorageError, match="on purpose"):
                notice()
            disk_is_broken[0] = False
            for _ in range(servers):  # each may have something to say
                with contextlib.suppress(errors.StorageError):
                    table.stats()
            np.testing.assert_array_equal(table.pull(ids[::-1]), expected[::-1])
            np.testing.assert_array_equal(table.pull(ids), expected)

    with job(transport, servers) as run:
        run(body)


def test_what_reads_only_leaves_no_trace() -> None:
    with alone() as session:
        table = session.table("items", 1, policy=hw.RowPolicy(expire_steps=2))
        table.push([1, 2], ones(2, 1))
        for _ in range(4):
            table.pull([1])
            table.pull([2], touch=False)
            table.push([9], ones(1, 1))
        assert set(everything(table)) == {1, 9}


# The table as a whole.


@ways
def test_a_replica_follows_a_table_over_all_servers(transport: str, servers: int) -> None:
    def body(session: hw.Session) -> None:
        table = session.table("items", 3, optimizer=hw.optim.Adagrad(lr=0.5), policy=hw.RowPolicy(expire_steps=5))
        replica: Rows = {}
        train(session, table, count=2)
        table.track("replica")
        for seed in range(8):
            train(session, table, seed, count=1 + seed % 3)
            if seed % 3:
                follow(replica, lambda: table.changes("replica", 7))
        follow(replica, lambda: table.changes("replica"))
        assert replica == everything(table)
        assert table.stats().expired > 0
        assert [len(part) for part in table.changes("replica")[:3]] == [0, 0, 0]
        table.track("replica")
        assert table.changes("replica").restart
        table.untrack("replica")
        with pytest.raises(errors.SettingError, match="replica"):
            table.changes("replica")

    with job(transport, servers) as run:
        run(body)


@pytest.mark.parametrize("evict", ["lru", "lfu"])
@pytest.mark.parametrize("consistency", [ASP, BSP], ids=str)
def test_a_replica_follows_what_is_evicted_and_comes_back(consistency: Any, evict: str) -> None:
    def body(session: hw.Session) -> None:
        policy = hw.RowPolicy(budget_bytes=1 << 20, evict=evict, admit_after=2, expire_steps=40, decay=0.5)
        table = session.table("items", 4, optimizer=hw.optim.Adagrad(lr=0.5), policy=policy)
        table.track("replica")
        replica: Rows = {}
        random = np.random.default_rng(7)
        for step in range(60):
            ids = random.integers(0, 3000 + 500 * step, 4000)
            table.push(ids, ones(4000, 4))
            session.step()
            assert table.stats().bytes <= 1 << 20
            if step % 7 == 0:
                follow(replica, lambda: table.changes("replica", 3000))
        follow(replica, lambda: table.changes("replica"))
        assert replica == everything(table)
        stats = table.stats()
        assert min(stats.evicted, stats.admitted, stats.refused) > 1000

    with job("shm", 2, consistency=consistency) as run:
        run(body)


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
@pytest.mark.parametrize("consistency", [ASP, BSP], ids=str)
def test_a_saved_table_goes_on_on_other_servers(tmp_path: Path, suffix: str, consistency: Any) -> None:
    path = tmp_path / f"items.{suffix}"
    settings = {"dim": 3, "optimizer": hw.optim.Adam(lr=0.1)}
    with job("shm", 2, consistency=consistency) as run, job(consistency=consistency) as other:

        def save(session: hw.Session) -> Rows:
            table = session.table("items", **settings)  # type: ignore[arg-type]
            train(session, table)
            assert table.export(path) == table.stats().rows
            train(session, table, 2)
            return everything(table)

        def go_on(session: hw.Session) -> Rows:
            table = session.table("items", **settings)  # type: ignore[arg-type]
            assert table.load(path) == table.stats().rows
            train(session, table, 2)
            return everything(table)

        assert run(save) == other(go_on)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_an_empty_table_can_be_saved(tmp_path: Path, suffix: str) -> None:
    with alone() as session:
        table = session.table("items", 3)
        assert table.export(tmp_path / f"items.{suffix}") == 0
        assert table.load(tmp_path / f"items.{suffix}") == 0


def test_vectors_of_another_tool_become_rows(tmp_path: Path) -> None:
    import safetensors.numpy

    ids, values = np.array([3, -1, 2**63 - 1]), np.arange(6, dtype=np.float32).reshape(3, 2)
    safetensors.numpy.save_file({"ids": ids, "values": values}, tmp_path / "words.safetensors")
    with alone() as session:
        table = session.table("words", 2, optimizer=hw.optim.Adagrad(lr=1.0, initial_accumulator_value=0.5))
        table.push([7, 3], ones(2, 2))
        assert table.load(tmp_path / "words.safetensors") == 3
        np.testing.assert_array_equal(table.pull(ids), values)
        assert set(everything(table)) == {7, *ids.tolist()}
        assert everything(table)[3][-8:] == np.full(2, 0.5, np.float32).tobytes()


def test_files_that_are_no_such_table_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.numpy

    def saved(name: str, **arrays: npt.NDArray[Any]) -> Path:
        safetensors.numpy.save_file(arrays, tmp_path / name)
        return tmp_path / name

    ids = np.arange(2)
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1....")
    with alone() as session:
        table = session.table("items", 2, optimizer=hw.optim.Adagrad())
        for path, message in [
            (tmp_path / "none.safetensors", "Cannot read .*none.safetensors"),
            (torn, "Cannot read .*torn.parquet"),
            (saved("a.safetensors", ids=ids), "'values'"),
            (
                saved("b.safetensors", ids=ids, values=ones(2, 3)),
                r"float32 \(2, 2\) for 'values' .* got float32 \(2, 3\)",
            ),
            (saved("c.safetensors", ids=ids, values=ones(3, 2)), r"got float32 \(3, 2\) — table 'items'"),
            (saved("d.safetensors", ids=ones(2), values=ones(2, 2)), r"Expected int64 \(2,\) for 'ids'"),
            (
                saved("e.safetensors", ids=ids, values=ones(2, 2), state=ones(2, 1)),
                r"Expected float32 \(2, 2\) for 'state'",
            ),
            (saved("f.safetensors", ids=ids, values=ones(2, 2) * np.float32(np.inf)), "Expected finite rows"),
        ]:
            with pytest.raises(errors.StorageError, match=message):
                table.load(path)
        with pytest.raises(errors.LayoutError, match=r"ends in \.safetensors or \.parquet, got items\.csv"):
            table.export("items.csv")
        with pytest.raises(errors.StorageError, match="What was there is still there"):
            table.export(tmp_path / "no folder" / "items.safetensors")
        assert table.stats().rows == 0
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(errors.SettingError, match=r"pip install 'headwater\[parquet\]'"):
            table.export(tmp_path / "items.parquet")


def test_strings_have_ids_for_ever() -> None:
    assert hw.hash_ids(["a", "b", ""]).tolist() == hw.hash_ids(np.array([b"a", b"b", b""], object)).tolist()
    again = subprocess.run(
        [sys.executable, "-c", "import headwater as hw; print(hw.hash_ids(['a', 'é']).tolist())"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert again.stdout.strip() == str(hw.hash_ids(["a", "é"]).tolist())
    assert hw.hash_ids([["x", "y"], ["z", "x"]]).shape == (2, 2)
    assert hw.hash_ids("x") == hw.hash_ids(["x"])[0]
    assert len(set(hw.hash_ids([str(i) for i in range(10_000)]).tolist())) == 10_000
    assert hw.hash_ids([]).shape == (0,)
    for wrong in ([1, 2], ["a", 1], [None]):
        with pytest.raises(errors.LayoutError, match="Expected strings, got"):
            hw.hash_ids(wrong)


# Jobs of tables alone.


@ways
def test_a_job_may_have_tables_only(transport: str, servers: int) -> None:
    def body(session: hw.Session) -> None:
        with pytest.raises(errors.LayoutError, match="Expected at least one tensor to register, got none"):
            session.register({})
        table = session.table("items", 2)
        table.push([1], ones(1, 2))
        assert session.step() == session.clock == 1
        assert session.parameters == {}
        assert session.pull() == {}
        assert session.stats().parameters == 0
        assert table.stats().rows == 1

    with job(transport, servers, consistency=BSP) as run:
        run(body)


def test_workers_of_tables_only_wait_for_each_other() -> None:
    with start_job(workers=2, servers=2, transport="tcp", consistency=BSP) as started:

        def body(session: hw.Session) -> list[float]:
            table = session.table("items", 1, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
            seen = []
            for _ in range(5):
                table.push([session.index], 2 * ones(1, 1))
                session.step()
                seen += table.pull([0, 1])[:, 0].tolist()
            return seen

        assert started.run(body) == [[-float(k // 2 + 1) for k in range(10)]] * 2


# Bad input.


@ways
def test_bad_input_is_named_and_counts_nowhere(transport: str, servers: int) -> None:
    def body(session: hw.Session) -> None:
        table = session.table("items", 2)
        start = table.pull([1, 2, 3])
        nan = ones(4, 2)
        nan[2, 1] = np.nan
        large = np.full((2, 2), 3e38, np.float32)
        cases: list[Any] = [
            ([1.5, 2.0], ones(2, 2), errors.LayoutError, "Expected ids that are integers, got float64"),
            ([True, False], ones(2, 2), errors.LayoutError, "Expected ids that are integers, got bool"),
            (["a"], ones(1, 2), errors.LayoutError, r"hash_ids\(\) takes strings"),
            (
                [1],
                ones(1, 3),
                errors.LayoutError,
                r"Expected gradients of shape \(1, 2\), got \(1, 3\) — table 'items'",
            ),
            ([1, 2], ones(1, 2), errors.LayoutError, r"Expected gradients of shape \(2, 2\), got \(1, 2\)"),
            ([1], np.ones((1, 2)), errors.LayoutError, "Expected gradients of float32 .* got float64"),
            (
                [1, 2, 3, 2],
                nan,
                errors.NonFiniteError,
                "for id 3 at position 1, number 2 of the batch — table 'items', push 0",
            ),
            (
                [4, 4],
                large,
                errors.NonFiniteError,
                "for id 4 at position 0, number 0 of the batch",
            ),  # the sum is infinite
        ]
        for ids, gradients, error, message in cases:
            with pytest.raises(error, match=message):
                table.push(ids, gradients)
        with pytest.raises(errors.LayoutError, match=r"got float64 \(2,\) — table 'items'"):
            table.pull([1.0, 2.0])
        np.testing.assert_array_equal(table.pull([1, 2, 3]), start)
        assert (table.stats().rows, table.stats().step) == (0, 0)

    with job(transport, servers) as run:
        run(body)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"dim": 0}, "Expected a dim from 1 to 65536, got 0 — table 'items'"),
        ({"dim": 2.0}, "Expected a dim from 1 to 65536, got 2.0"),
        ({"name": ""}, "Expected a name of 1 to 200 characters, got ''"),
        ({"seed": 2**63}, "Expected a seed of 64 bits"),
        ({"optimizer": hw.optim.AdamW()}, "Expected SGD, Adagrad, RowwiseAdagrad, Adam or FTRL for a table, got AdamW"),
        ({"optimizer": hw.optim.SGD(momentum=0.9)}, "Expected SGD without momentum=0.9 for a table"),
        ({"optimizer": hw.optim.Adam(clip_norm=1.0)}, "Expected Adam without clip_norm=1.0 for a table"),
        ({"optimizer": "sgd"}, "Expected optimizer as in its documentation, got 'sgd' — table 'items'"),
        ({"initial": 0.5}, "Expected initial as in its documentation, got 0.5"),
        ({"policy": {}}, "Expected policy as in its documentation"),
        ({"consistency": hw.bsp()}, "Expected the job's consistency, asp, or asp, got bsp — table 'items'"),
        ({"dim": None}, "Expected dim for a table that nobody has declared yet, got none"),
        ({"policy": hw.RowPolicy(budget_bytes=10)}, "10.* — table 'items'"),
    ],
)
def test_wrong_settings_are_refused_where_they_are_given(wish: dict[str, Any], message: str) -> None:
    with alone() as session:
        with pytest.raises(errors.SettingError, match=message):
            session.table(**{"name": "items", "dim": 2, **wish})
        assert session.table("items", 2).stats().rows == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hw.RowPolicy(admit_after=0), "Expected admit_after to be a whole number of 1 or more, got 0"),
        (lambda: hw.RowPolicy(expire_steps=1.5), "Expected expire_steps to be a whole number"),  # type: ignore[arg-type]
        (lambda: hw.RowPolicy(expire_s=0.0), "Expected expire_s above 0"),
        (lambda: hw.RowPolicy(expire_s=1.0, expire_steps=1), "Expected expire_steps or expire_s, got both"),
        (lambda: hw.RowPolicy(decay=0.0), "Expected decay above 0 and at most 1"),
        (lambda: hw.RowPolicy(budget_bytes=True), "Expected budget_bytes to be a whole number"),
        (lambda: hw.RowPolicy(when_full="burst"), "Expected when_full='evict' or 'spill'"),
        (lambda: hw.RowPolicy(when_full="spill", budget_bytes=1), "Expected spill_folder and budget_bytes"),
        (lambda: hw.Uniform(-1.0), "Expected limit of 0 or more, got -1.0 — Uniform"),
        (lambda: hw.Normal(float("nan")), "Expected deviation to be finite"),
        (lambda: hw.Constant("one"), "Expected value to be a number"),  # type: ignore[arg-type]
    ],
)
def test_senseless_values_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(errors.SettingError, match=message):
        make()


def test_a_bsp_table_without_steps_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "STAGED_PUSHES", 3)
    with alone(BSP) as session:
        table = session.table("items", 1)
        for _ in range(3):
            table.push([1], ones(1, 1))
        table.push([1], ones(1, 1))
        with pytest.raises(
            errors.UsageError, match=r"they count with session.step\(\).* or declare table 'items' with hw.asp"
        ):
            table.pull([1])
        session.step()
        assert table.stats().step == 1


def test_a_closed_session_has_no_tables() -> None:
    with alone() as session:
        table = session.table("items", 1)
    for use in (
        lambda: table.pull([1]),
        lambda: table.push([1], ones(1, 1)),
        table.stats,
        lambda: session.table("x", 1),
    ):
        with pytest.raises(errors.ClosedError):
            use()


def test_a_worker_that_was_dropped_can_push_no_more() -> None:
    with start_job(transport="shm", consistency=ASP) as started, started.connect() as session:
        table = session.table("items", 1)
        table.push([1], ones(1, 1))
        table.pull([1])
        started.servers[0].coordinator.leave(session._peers.hello.identity)  # type: ignore[union-attr]
        table.push([1], ones(1, 1))
        with pytest.raises(errors.PeerError):
            table.pull([1])


def test_pushes_that_were_made_count_though_the_session_closes_at_once(tmp_path: Path) -> None:
    with start_job(transport="shm", consistency=ASP, folder=tmp_path) as started:
        with started.connect() as session:
            table = session.table("items", 1, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
            for _ in range(20):
                table.push(np.arange(1000), ones(1000, 1))
        with started.connect() as session:
            assert session.table("items").pull([999])[0, 0] == -20.0


def test_every_server_takes_its_share_of_the_budget() -> None:
    with start_job(servers=2, transport="shm", consistency=ASP) as started, started.connect() as session:
        table = session.table("items", 8, policy=hw.RowPolicy(budget_bytes=1 << 21))
        for start in range(0, 100_000, 1000):
            table.push(range(start, start + 1000), ones(1000, 8))
            assert table.stats().bytes <= 1 << 21
        stats = table.stats()
        assert stats.evicted > 50_000
        assert stats.rows + stats.evicted == stats.admitted == 100_000
        assert all(server.shard.tables.tables[0].kernel.bytes <= 1 << 20 for server in started.servers)


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("consistency", [ASP, BSP], ids=str)
def test_a_batch_that_the_budget_cannot_hold_is_refused_and_leaves_nothing(consistency: Any, servers: int) -> None:
    """Two workers' batches that fit, each of them, count both."""
    everybody = threading.Barrier(2)

    def body(session: hw.Session) -> tuple[int, int]:
        policy = hw.RowPolicy(budget_bytes=1 << 20)
        table = session.table("items", 4, optimizer=hw.optim.SGD(lr=1.0), policy=policy)
        limit = table.stats().rows_max
        ids = np.arange(int(1.2 * limit))
        with pytest.raises(
            errors.SettingError, match=r"Expected at most \d+ ids a push at one server, .* — table 'items'"
        ):
            table.push(ids, ones(len(ids), 4))
        assert table.stats().rows == table.stats().step == 0
        everybody.wait(20.0)
        session.step()
        table.push(ids[session.index :: 2], ones(len(ids[session.index :: 2]), 4))
        session.step()
        table.stats()  # and so the push has counted
        everybody.wait(20.0)
        stats = table.stats()
        assert stats.bytes <= 1 << 20
        assert stats.rows + stats.evicted == stats.admitted == len(ids)
        trained, evicted = everything(table), set(ids.tolist())
        evicted -= set(trained)
        first = session.table("like", 4).pull(sorted(evicted)[:5])
        np.testing.assert_array_equal(table.pull(sorted(evicted)[:5]), first)  # as if they had never been there
        return stats.step, stats.rows

    with job("shm", servers, workers=2, consistency=consistency) as run:
        (steps, rows), other = run(body)
        assert (steps, rows) == other
        assert steps == (1 if consistency == BSP else 2)
        assert rows > 1000
