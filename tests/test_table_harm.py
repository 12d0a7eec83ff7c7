"""What happens to a table's handle when a request breaks off, and what files of other tools become."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from faulty_files import cut_off_spilled
from jobs import start_job

import headwater as hw
from headwater import errors
from headwater._table_link import Link


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("where", ["send", "receive"])
def test_an_interrupted_request_ends_the_connection_and_no_answer_is_taken_for_another(
    transport: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start_job(transport=transport, consistency=hw.asp()) as job, job.connect() as session:
        table = session.table("items", 2, initial=hw.Constant(0.0), optimizer=hw.optim.SGD(lr=1.0))
        for i in (1, 2):
            table.push([i], np.full((1, 2), -i, np.float32))
        assert table.pull([2]).tolist() == [[2.0, 2.0]]
        connection = table._links[0].connection
        call = getattr(connection, where)

        def interrupt(*arguments: object, **options: object) -> object:
            if where == "send":
                call(*arguments, **options)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(connection, where, interrupt)
            with pytest.raises(KeyboardInterrupt):
                table.pull([1])
        for request in (lambda: table.pull([2]), lambda: table.push([1], np.ones((1, 2), np.float32)), table.stats):
            with pytest.raises(errors.ClosedError, match="broke off"):
                request()
        with job.connect() as other:
            assert other.table("items").pull([1, 2]).tolist() == [[1.0, 1.0], [2.0, 2.0]]


def test_a_prefetch_that_fails_leaves_nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    with start_job(transport="tcp", consistency=hw.asp()) as job, job.connect() as session:
        table = session.table("items", 1, initial=hw.Constant(0.0), optimizer=hw.optim.SGD(lr=1.0))
        table.prefetch([1])
        table.pull([1])
        table.push([1], np.full((1, 1), -5, np.float32))

        def refuse(link: Link) -> None:
            raise errors.SettingError("another table's")

        with monkeypatch.context() as patch:
            patch.setattr(Link, "settle", refuse)
            with pytest.raises(errors.SettingError):
                table.prefetch([1])
        assert table.pull([1]).tolist() == [[5.0]]


@pytest.mark.parametrize("policy", [hw.RowPolicy(), hw.RowPolicy(expire_steps=3), hw.RowPolicy(expire_s=60.0)])
def test_a_file_with_ids_and_values_alone_is_read_as_if_seen_now(policy: hw.RowPolicy, tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    ids, values = np.array([3, -1, 2**62]), np.arange(6, dtype=np.float32).reshape(3, 2)
    safetensors.numpy.save_file({"ids": ids, "values": values}, path)
    with hw.connect() as session:
        table = session.table("items", 2, policy=policy)
        assert table.load(path) == 3
        assert np.array_equal(table.pull(ids), values)
        assert table.stats().rows == 3


def test_a_copied_model_has_the_same_table_and_a_pickled_one_is_refused() -> None:
    with hw.connect() as session:
        table = session.table("items", 2)
        model = hw.torch.Embedding(table)
        assert copy.deepcopy(model).table is table
        with pytest.raises(errors.UsageError, match="export"):
            pickle.dumps(model)


@pytest.mark.parametrize("consistency", [hw.asp(), hw.bsp()])
def test_rows_that_do_not_fit_are_on_disk_and_come_back(consistency: hw.Consistency, tmp_path: Path) -> None:
    count, dim = 400_000, 8
    policy = hw.RowPolicy(when_full="spill", budget_bytes=13_000_000, spill_folder=str(tmp_path))
    with start_job(transport="shm", consistency=consistency) as job, job.connect() as session:
        table = session.table("items", dim, initial=hw.Constant(0.0), optimizer=hw.optim.SGD(lr=1.0), policy=policy)
        ids = np.random.default_rng(0).permutation(count).reshape(-1, 10_000)
        for _ in range(2):
            for some in ids:
                table.push(some, -np.repeat(some[:, None], dim, axis=1).astype(np.float32))
                if consistency == hw.bsp():
                    session.step()
        stats = table.stats()
        assert stats.rows + stats.spilled_rows == count
        assert stats.spilled_rows > count // 3
        assert stats.bytes <= 13_000_000
        for some in ids[::7]:
            table.prefetch(some)
            assert np.array_equal(table.pull(some), 2.0 * np.repeat(some[:, None], dim, axis=1))
        assert table.stats().loaded > 0
        assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_under_rows_is_said_and_harms_nobody_else(tmp_path: Path) -> None:
    policy = hw.RowPolicy(when_full="spill", budget_bytes=13_000_000, spill_folder=str(tmp_path))
    with start_job(consistency=hw.asp()) as job, job.connect() as session:
        table, other = session.table("items", 8, policy=policy), session.table("others", 2)
        for ids in np.arange(400_000).reshape(-1, 10_000):
            table.push(ids, np.ones((len(ids), 8), np.float32))
        assert table.stats().spilled_rows > 100_000
        cut_off_spilled(tmp_path)
        with pytest.raises(errors.StorageError, match="Cannot read spilled rows"):
            table.pull(np.arange(0, 400_000, 97), touch=False)
        other.push([1], np.ones((1, 2), np.float32))
        assert other.stats().rows == 1


def test_a_table_that_cannot_spill_is_opened_on_no_server(tmp_path: Path) -> None:
    policy = hw.RowPolicy(when_full="spill", budget_bytes=1 << 24, spill_folder=str(tmp_path / "none"))
    with start_job(servers=2, consistency=hw.asp()) as job, job.connect() as session:
        with pytest.raises(errors.StorageError, match="none"):
            session.table("items", 2, policy=policy)
        table = session.table("items", 2)
        table.push(range(9), np.ones((9, 2), np.float32))
        assert table.stats().rows == 9
