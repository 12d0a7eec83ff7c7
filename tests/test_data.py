"""Leased data: every item of every epoch is used exactly once, whoever comes and goes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from jobs import PATIENCE_S, TOKEN, Job, start_job

import headwater as hw
from headwater import _limits, errors
from headwater._coordinator import Coordinator
from headwater._leases import Leases

ITEMS, EPOCHS = 40, 3
WORKERS = Path(__file__).parent / "workers"
places = pytest.mark.parametrize(("transport", "servers"), [("shm", 1), ("shm", 2), ("tcp", 1)])
consistencies = pytest.mark.parametrize("consistency", [hw.bsp(), hw.ssp(1), hw.asp()], ids=str)
Use = tuple[int, int]  # epoch, item


def every_use(items: int = ITEMS, epochs: int = EPOCHS) -> Counter[Use]:
    return Counter((epoch, item) for epoch in range(epochs) for item in range(items))


def register(session: hw.Session) -> None:
    """Register a parameter for each use of each item: its value is how often it was used, where each push is a commit."""
    session.register({"w": np.zeros((EPOCHS, ITEMS), np.float32)}, hw.optim.SGD(lr=1.0))


def use(session: hw.Session, uses: list[Use]) -> None:
    gradient = np.zeros((EPOCHS, ITEMS), np.float32)
    for at in uses:
        gradient[at] -= 1
    session.step({"w": gradient})


def train(session: hw.Session, data: hw.LeasedData, used: Counter[Use], steps: int = 1 << 30) -> None:
    """Make steps, at most so many; what they use is noted when they count."""
    for _, items in zip(range(steps), data, strict=False):
        uses = [(data.epoch, int(item)) for item in items]
        use(session, uses)
        used.update(uses)


def die(session: hw.Session) -> None:
    """End the worker's connections without a word."""
    if session._peers._heartbeat is not None:
        session._peers._heartbeat.stop()
    session.abandon()


def coordinator_of(job: Job) -> Coordinator:
    coordinator = job.servers[0].coordinator
    assert coordinator is not None
    return coordinator


# Coming and going.


@consistencies
@places
def test_what_a_dead_worker_did_not_use_others_use(consistency: hw.Consistency, transport: str, servers: int) -> None:
    used = [Counter[Use]() for _ in range(3)]

    def work(session: hw.Session) -> Any:
        register(session)
        data = session.shard(range(ITEMS), epochs=EPOCHS, batch_size=3, shuffle=True, seed=5, piece=5)
        everybody_has_some.wait(PATIENCE_S)
        if session.index == 1:
            train(session, data, used[1], steps=3)
            next(data)  # never pushed
            die(session)
            return None
        train(session, data, used[session.index])
        return session.pull()["w"]

    everybody_has_some = threading.Barrier(3)
    with start_job(workers=3, consistency=consistency, transport=transport, servers=servers) as job:
        first, _, last = job.run(work)
    assert used[0] + used[1] + used[2] == every_use()
    assert used[1].total() == 9
    np.testing.assert_array_equal(first > 0, True)
    if consistency.kind != "bsp":  # whose commits are means
        np.testing.assert_array_equal(last, 1.0)


@consistencies
def test_a_joiner_gets_its_share(consistency: hw.Consistency) -> None:
    used = [Counter[Use](), Counter[Use]()]
    has_joined = threading.Event()

    def join(job: Job) -> None:
        with job.connect() as session:
            register(session)
            data = session.shard(range(ITEMS), epochs=EPOCHS, batch_size=1, piece=4)
            has_joined.set()
            train(session, data, used[1])

    with start_job(workers=1, consistency=consistency) as job, job.connect() as session:
        register(session)
        data = session.shard(range(ITEMS), epochs=EPOCHS, batch_size=1, piece=4)
        train(session, data, used[0], steps=ITEMS)
        joiner = threading.Thread(target=join, args=(job,))
        joiner.start()
        deadline = time.monotonic() + PATIENCE_S
        while not has_joined.is_set() and time.monotonic() < deadline:  # a joiner waits for the end of the step
            session.step({"w": np.zeros((EPOCHS, ITEMS), np.float32)}, weight=0.0)
        train(session, data, used[0])
        joiner.join(PATIENCE_S)
    assert used[0] + used[1] == every_use()
    assert used[1].total() >= 4


def test_a_push_of_weight_0_and_a_refused_one_use_their_items_too() -> None:
    with start_job(consistency=hw.asp()) as job:
        with job.connect() as session:
            register(session)
            data = session.shard(range(ITEMS), epochs=1)
            next(data)
            session.step({"w": np.zeros((EPOCHS, ITEMS), np.float32)}, weight=0.0)
            next(data)
            with pytest.raises(errors.NonFiniteError):
                session.step({"w": np.full((EPOCHS, ITEMS), np.nan, np.float32)})
            next(data)
        with job.connect() as session:
            assert list(session.shard(range(ITEMS), epochs=1)) == list(range(2, ITEMS))


@consistencies
@places
def test_who_runs_out_waits_for_what_a_death_leaves(consistency: hw.Consistency, transport: str, servers: int) -> None:
    """It is not waited for meanwhile, and goes on from what the parameters are then."""
    items: list[list[int]] = [[], []]

    def step(session: hw.Session) -> None:
        session.step({"w": np.full(1, -1.0, np.float32)})

    def work(session: hw.Session) -> None:
        session.register({"w": np.zeros(1, np.float32)}, hw.optim.SGD(lr=1.0))
        data = session.shard(range(6), epochs=1, piece=3)
        everybody_has_some.wait(PATIENCE_S)
        for item in data if session.index == 0 else itertools.islice(data, 2):
            items[session.index].append(item)
            if len(items[0]) == 4:
                assert session.parameters["w"] == (6 if consistency.kind == "bsp" else 8)
            step(session)
        if session.index == 1:
            if consistency.kind == "bsp":
                step(session)  # beside the other's last
            coordinator = coordinator_of(job)
            with coordinator._changed:
                assert coordinator._changed.wait_for(
                    lambda: any(worker.is_idle for worker in coordinator._workers.values()), PATIENCE_S
                )
            for _ in range(3):
                step(session)
            die(session)

    everybody_has_some = threading.Barrier(2)
    with start_job(workers=2, consistency=consistency, transport=transport, servers=servers) as job:
        job.run(work)
    assert sorted(items[0] + items[1]) == list(range(6))
    assert len(items[0]) == 4


def test_a_wait_says_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "REPORT_WAIT_S", 0.05)
    with start_job(workers=2) as job, job.connect() as holder, job.connect(timeout_s=0.1) as waiting:
        holder.shard(range(2), epochs=1, piece=2)
        data = waiting.shard(range(2), epochs=1, piece=2)
        with pytest.raises(
            errors.WaitTimeoutError, match=r"Expected Leased within 0\.1 s, got none: waiting for worker 0"
        ):
            next(data)


def test_workers_that_gather_gradients_do_not_wait_for_each_other() -> None:
    """Each holds items that it has not pushed, and asks for more."""

    def work(session: hw.Session) -> list[int]:
        session.register({"w": np.zeros(1, np.float32)})
        found = list(session.shard(range(8), epochs=1, piece=2))
        session.step({"w": np.ones(1, np.float32)})
        return found

    with start_job(workers=2) as job:
        first, second = job.run(work)
    assert sorted(first + second) == list(range(8))


def test_with_an_optimizer_on_the_workers_nobody_waits_for_data() -> None:
    """Who waited would miss commits, and nobody keeps the parameters that it would go on from."""
    with start_job(workers=2) as job, job.connect() as first, job.connect() as second:
        for session in (first, second):
            session.register({"w": np.zeros(1, np.float32)}, hw.optim.Mean())
        first.shard(range(4), epochs=1, piece=4)
        assert list(second.shard(range(4), epochs=1, piece=4)) == []


# The position, and going back.


@pytest.mark.parametrize("is_loaded", [False, True])
def test_going_back_to_an_earlier_commit_uses_again_what_it_had_not_used(is_loaded: bool) -> None:
    with start_job() as job, job.connect() as session:
        register(session)
        if is_loaded:
            loader: Any = torch.utils.data.DataLoader(range(ITEMS), batch_size=4, shuffle=True)  # type: ignore[arg-type]
            data = session.shard(loader, epochs=2, piece=3)
        else:
            data = session.shard(range(ITEMS), epochs=2, batch_size=4, shuffle=True, piece=3)
        used = Counter[Use]()
        train(session, data, used, steps=4)
        leases = coordinator_of(job).leases
        kept, state = used.copy(), msgspec.msgpack.encode(leases["data"])
        train(session, data, used, steps=7)
        leases["data"] = msgspec.msgpack.decode(state, type=Leases)
        leases["data"].go_back()
        data.roll_back(0)
        train(session, data, kept)
        assert kept == every_use(epochs=2)


def test_a_job_goes_on_where_workers_that_are_gone_have_stopped() -> None:
    used = Counter[Use]()
    with start_job(consistency=hw.asp()) as job:
        for _ in range(4):
            with job.connect() as session:
                register(session)
                train(session, session.shard(range(ITEMS), epochs=EPOCHS, batch_size=7), used, steps=5)
    assert used == every_use()


def test_a_loop_that_was_left_goes_on() -> None:
    with hw.connect() as session:
        data = session.shard("abcdef", epochs=1)
        assert next(data) == "a"
        assert [item for item, _ in zip(data, range(2), strict=False)] == ["b", "c"]
        assert list(data) == ["e", "f"]  # zip has taken one more
        assert list(data) == []


def test_an_item_that_cannot_be_read_is_read_again() -> None:
    class Flaky(list[int]):
        fails = True

        def __getitem__(self, index: Any) -> Any:
            if index == 2 and self.fails:
                raise OSError("no such item")
            return super().__getitem__(index)

    with hw.connect() as session:
        items = Flaky([0, 10, 20, 30])
        data = session.shard(items, epochs=1)
        found = [next(data), next(data)]
        for _ in range(2):
            with pytest.raises(OSError, match="no such item"):
                next(data)
        items.fails = False
        assert [*found, *data] == [0, 10, 20, 30]


# Order.


@pytest.mark.parametrize(("batch_size", "unit"), [(None, 0), (3, [0, 1, 2])])
def test_units_are_items_or_lists_of_them(batch_size: int | None, unit: Any) -> None:
    with hw.connect() as session:
        data = session.shard(range(7), epochs=1, batch_size=batch_size)
        assert next(data) == unit
        assert [*data][-1] == (6 if batch_size is None else [6])


def test_shuffled_order_follows_from_seed_and_epoch() -> None:
    def order(seed: int) -> list[list[int]]:
        with hw.connect() as session:
            found: list[list[int]] = [[], []]
            data = session.shard(range(8), epochs=2, shuffle=True, seed=seed)
            for item in data:
                found[data.epoch].append(item)
            return found

    first = order(0)
    assert first == order(0) == [[6, 3, 5, 0, 7, 2, 1, 4], [3, 1, 0, 4, 5, 6, 7, 2]]
    assert first[0] != first[1]
    assert all(sorted(epoch) == list(range(8)) for epoch in first)
    assert order(1) != first


# DataLoaders.


class Squares(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index * index


def test_a_data_loader_yields_its_own_batches() -> None:
    def collate(items: list[int]) -> str:
        return "+".join(map(str, items))

    with hw.connect() as session:
        ordered = torch.utils.data.DataLoader(Squares(), batch_size=4, collate_fn=collate)
        assert list(session.shard(ordered, epochs=1, name="ordered")) == ["0+1+4+9", "16+25+36+49", "64+81"]
        shuffled: Any = torch.utils.data.DataLoader(Squares(), batch_size=4, shuffle=True, drop_last=True)
        found = list(session.shard(shuffled, epochs=2, name="shuffled"))
        assert [len(batch) for batch in found] == [4] * 4
        for epoch in (found[:2], found[2:]):
            assert len(set(torch.cat(epoch).tolist())) == 8


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_model_is_the_jobs_after_its_worker_has_waited_for_data(transport: str) -> None:
    """The optimizer's parameters lie where the session reads, which the other's three last commits have changed."""

    def work(session: hw.Session) -> list[float]:
        model = torch.nn.Linear(1, 1)
        optimizer = hw.torch.Optimizer(model, hw.optim.SGD(lr=0.1), session=session)
        everybody_is_there.wait(PATIENCE_S)
        loader: Any = torch.utils.data.DataLoader(range(9), batch_size=1)  # type: ignore[arg-type]
        for batch in session.shard(loader, epochs=1, piece=3):
            optimizer.zero_grad()
            model(batch.float()[:, None] / 9).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()

    everybody_is_there = threading.Barrier(2)
    with start_job(workers=2, transport=transport) as job:
        first, second = job.run(work)
    assert first == second


def test_loader_processes_read_ahead_and_what_they_read_for_a_dead_worker_is_read_again() -> None:
    with start_job(workers=2) as job:
        environment = os.environ | {"HEADWATER_ADDRESS": job.address, "HEADWATER_TOKEN": TOKEN}
        command = [sys.executable, str(WORKERS / "leased.py")]
        running = [
            subprocess.Popen([*command, *extra], env=environment, stdout=subprocess.PIPE, text=True)
            for extra in (["3"], [])
        ]
        outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in running]
    assert [process.returncode for process in running] == [9, 0], outputs
    used = Counter(tuple(map(int, line.split())) for output in outputs for line in output.splitlines())
    assert used == Counter((epoch, item) for epoch in range(2) for item in range(50))
    assert outputs[0].count("\n") == 3 * 4


# What is refused.


class Stream(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def loader_of(dataset: Any, **options: Any) -> Callable[[], Any]:
    return lambda: torch.utils.data.DataLoader(dataset, **options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Stream, {}, "got a Stream: of one that can only be iterated"),
        (loader_of(Stream(), batch_size=2), {}, "got a Stream: of one that can only be iterated"),
        (lambda: iter([1]), {}, "got a list_iterator"),
        (loader_of(Squares(), sampler=[1, 2]), {}, "got one with list and batch_size 1"),
        (loader_of(Squares(), batch_sampler=[[1, 2]]), {}, "batch_size None"),
        (loader_of(Squares(), batch_size=None), {}, "batch_size None"),
        (
            loader_of(Squares(), sampler=torch.utils.data.RandomSampler(Squares(), replacement=True)),
            {},
            "got one with RandomSampler",
        ),
        (loader_of(Squares()), {"batch_size": 2}, "Expected a DataLoader's own batch_size and shuffle"),
        (loader_of(Squares(), batch_size=11, drop_last=True), {}, "Expected at least one full batch"),
        (lambda: [1], {"batch_size": 0}, "Expected a batch size of 1 or more, got 0"),
        (lambda: [1], {"piece": 0}, "Expected at least one item, epoch and unit per piece"),
        (list, {}, "Expected at least one item, epoch and unit per piece"),
    ],
)
def test_data_that_cannot_be_leased_is_refused(make: Callable[[], Any], options: dict[str, Any], message: str) -> None:
    with hw.connect() as session:
        with pytest.raises(errors.SettingError, match=message):
            session.shard(make(), epochs=1, **options)
        session.shard([1], epochs=1)


def test_other_settings_than_the_jobs_are_refused_and_both_are_named() -> None:
    with start_job(workers=2) as job, job.connect() as first, job.connect() as second:
        first.shard(range(20), epochs=2, batch_size=5, piece=1)
        with pytest.raises(errors.SettingError) as caught:
            second.shard(range(21), epochs=2, shuffle=True, piece=1)
        for part in (
            "Expected 20 items in batches of 5, 2 epochs, pieces of 1 (data 'data')",
            "got 21 items, 2 epochs, pieces of 1, shuffled with seed 0 (data 'data')",
        ):
            assert part in str(caught.value)
        assert next(second.shard(range(20), epochs=2, batch_size=5, piece=1)) == [5, 6, 7, 8, 9]


def test_a_name_is_leased_once_in_a_session() -> None:
    with hw.connect() as session:
        session.shard([1], epochs=1)
        with pytest.raises(errors.UsageError, match="Expected a name for each leased dataset, got 'data' twice"):
            session.shard([1], epochs=1)


def test_use_of_data_that_was_not_leased_is_refused() -> None:
    with start_job() as job, job.connect() as session:
        register(session)
        data = session.shard(range(ITEMS), epochs=1, piece=2)
        data.used = 3
        with pytest.raises(errors.ProtocolError, match="Expected 0 to 2 used units, what the worker got, got 3"):
            use(session, [])


def test_datasets_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "DATASETS", 1)
    with hw.connect() as session:
        session.shard([1], epochs=1)
        with pytest.raises(errors.SettingError, match="Expected at most 1 leased datasets, got one more, 'more'"):
            session.shard([1], epochs=1, name="more")
