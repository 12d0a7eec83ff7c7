"""The ceilings: the kernels alone, on the buffers a server would have, with nobody to wait for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Step
from bench.ours import ROW_OPTIMIZER, optimizer_of
from bench.peers.plain import PlainTable, random_reads
from bench.traffic import BATCH, DIM, KINDS, batches, fill_batches, gradients
from headwater import _kernels
from headwater._memory import SharedBuffer, zeroed


class FusedPass:
    """The kernel with a state of its own: parameters in shared memory, the optimizer's slots in private memory, two sides."""

    def __init__(self, optimizer: str, gradients: Sequence[np.ndarray]) -> None:
        self._settings = optimizer_of(optimizer)
        self._gradients = gradients
        self.size = gradients[0].size
        self.sides = [self._planes(), self._planes()]
        self._scalars = np.array([self._settings.row(self._settings.scalars(), 1)])
        self._coefficients = np.full((1, len(gradients)), 1 / len(gradients))

    def _planes(self) -> list[np.ndarray]:
        slots = [zeroed(4 * self.size).view(np.float32) for _ in self._settings.slots]
        for slot in slots:
            slot.fill(0)  # so that its pages exist
        return [shared_array(self.size, 0.5), *slots]

    def __call__(self, side: int, start: int, stop: int, threads: int) -> None:
        """Sum the gradients of elements [start, stop), step from one side of the state to the other, check.

        With a clip_norm the gradient is measured first, as where the step before was clipped.
        """
        source, target = ([plane[start:stop] for plane in self.sides[i]] for i in (side, 1 - side))
        runs = np.array([[0, stop - start, 0]])
        gradients = [gradient[start:stop].view(np.uint8) for gradient in self._gradients]
        commit = (runs, self._scalars, gradients, self._coefficients)
        kind, flags = self._settings.kind, self._settings.flags
        if self._settings.clip_norm is not None:
            _kernels.square_sums("float32", runs, gradients, self._coefficients, threads=threads, level="auto")
        bad = _kernels.apply(kind, flags, "float32", source, target, [commit], threads=threads, level="auto")
        assert bad is None, f"a gradient of the bench is not finite: {bad}"


def bare_kernel(optimizer: str, parameters: int, workers: int, threads: int) -> Step:
    """Return a step that does all that a server does between two commits. It is worth `workers` worker-steps."""
    apply = FusedPass(optimizer, [shared_array(parameters, 1e-6) for _ in range(workers)])
    side = 0

    def step() -> None:
        nonlocal side
        apply(side, 0, parameters, threads)
        side = 1 - side

    return step


def shared_array(elements: int, value: float) -> np.ndarray:
    """Return float32 memory of the kind that servers and workers share, every page touched."""
    array = SharedBuffer(4 * elements, "bench").array.view(np.float32)
    array.fill(value)
    return array


class Rows:
    """A table's kernel, or a plain array in its place, with all of its rows there."""

    def __init__(self, rows: int, threads: int, *, plain: bool, **policy: Any) -> None:
        self.step = 0
        self.table: Any
        if plain:
            self.table = PlainTable(rows, DIM, threads)
            return
        self.table = table_kernel(threads, **policy)
        for ids in fill_batches(rows):
            self.push(ids, np.zeros((len(ids), DIM), np.float32))

    def pull(self, ids: np.ndarray, out: np.ndarray, **options: Any) -> None:
        self.table.pull(ids, out, touch=True, now=0.0, **options)

    def push(self, ids: np.ndarray, some: np.ndarray) -> None:
        self.step += 1
        scalars = np.array(ROW_OPTIMIZER.row(ROW_OPTIMIZER.scalars(), self.step))
        self.table.push(ids, some, scalars, step=self.step, now=0.0)


def table_kernel(threads: int, **policy: Any) -> _kernels.Table:
    """Return an empty table of the settings that all figures share."""
    settings = (DIM, ROW_OPTIMIZER.kind, ROW_OPTIMIZER.row_slots(DIM))
    return _kernels.Table(*settings, initial="uniform", scale=0.01, threads=threads, **policy)


def bare_table(rows: int, threads: int, plain: bool) -> Step:
    """Return a step that looks a batch's distinct ids up and updates them, of each kind of traffic; it returns the seconds.

    "all" is every kernel that the batch needs: making its ids distinct, handing rows out to each of them, and summing gradients too.
    """
    table = Rows(rows, threads, plain=plain)
    traffic = {kind: cycle(batches(kind, rows, seed=9)) for kind in KINDS}
    raw = gradients(BATCH, 9)
    total, out, each = (np.zeros((BATCH, DIM), np.float32) for _ in range(3))

    def step() -> dict[str, float]:
        found = {}
        for kind in KINDS:
            if not plain:
                ids, _, _ = _kernels.unique(next(traffic[kind]))
                found[f"pull without prefetch, {kind}"] = timed(table.pull, ids, out[: len(ids)], prefetch=False)
            batch = next(traffic[kind])
            unique_s = timed(_kernels.unique, batch)
            ids, _, inverse = _kernels.unique(batch)
            rows_out, summed = out[: len(ids)], total[: len(ids)]
            found[f"pull, {kind}"] = timed(table.pull, ids, rows_out)
            take_s = timed(_kernels.take_rows, rows_out, inverse, each, threads=threads)
            sum_s = timed(_kernels.sum_rows, raw, inverse, summed, threads=threads)
            found[f"table, {kind}"] = found[f"pull, {kind}"] + timed(table.push, ids, summed)
            found[f"all, {kind}"] = found[f"table, {kind}"] + unique_s + take_s + sum_s
        return found

    return step


def timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - start


def growing_table(rows: int, threads: int, plain: bool) -> Step:
    """Return a step that looks up and updates a batch among so many rows; it returns the seconds and the bytes per row."""
    table = Rows(rows, threads, plain=plain)
    traffic = cycle([_kernels.unique(ids)[0] for ids in batches("uniform", rows, seed=9)])
    out, some = np.empty((BATCH, DIM), np.float32), gradients(BATCH, 9)

    def step() -> dict[str, float]:
        ids = next(traffic)
        seconds = timed(table.pull, ids, out[: len(ids)]) + timed(table.push, ids, some[: len(ids)])
        return {"ns per id": 1e9 * seconds / len(ids), "bytes per row": table.table.stats()["bytes"] / rows}

    return step


def inserting_table(rows: int, threads: int) -> Step:
    """Return a step that fills a new table with a budget for about so many rows, then inserts half as many more; returns both rates."""
    budget = rows * (4 * DIM + 4 + 16)
    some = gradients(BATCH, 9)
    scalars = np.array(ROW_OPTIMIZER.row(ROW_OPTIMIZER.scalars(), 1))

    def step() -> dict[str, float]:
        table = table_kernel(threads, budget_bytes=budget)
        made = 0

        def insert() -> None:
            nonlocal made
            table.push(np.arange(made, made + BATCH), some, scalars, step=1, now=0.0)
            made += BATCH

        empty_s = []
        while table.stats()["evicted"] == 0:
            empty_s.append(timed(insert))
        empty = BATCH * (len(empty_s) - 1) / sum(empty_s[:-1])  # the last one has evicted already
        full_s = sum(timed(insert) for _ in range(len(empty_s) // 2))
        return {"while empty": empty, "while full": BATCH * (len(empty_s) // 2) / full_s}

    return step


def spilled_table(rows: int, threads: int, policy: dict[str, Any]) -> Step:
    """Return a step that looks a batch up in a table most of whose rows are on disk; it returns reads of 4 KiB pages per second.

    The rows stay on disk, or come back to memory, so that others leave it. A page that holds several of them is read once: n rows at
    random places of P pages lie in about P·(1 − (1 − 1/P)ⁿ) of them.
    """
    table = Rows(rows, threads, plain=False, **policy)
    traffic = cycle(batches("uniform", rows, seed=9))
    out = np.empty((BATCH, DIM), np.float32)

    def step() -> dict[str, float]:
        found = {}
        for name, touch in (("reads/s, rows that stay on disk", False), ("reads/s, rows that come back", True)):
            ids, _, _ = _kernels.unique(next(traffic))
            there = table.table.stats()
            spilled, pages = there["spilled_rows"] / rows, there["spilled_bytes"] / 4096
            seconds = timed(table.table.pull, ids, out[: len(ids)], touch=touch, now=0.0)
            found[name] = pages * (1 - (1 - 1 / pages) ** (len(ids) * spilled)) / seconds
        return found | {"rows for each in memory": rows / there["rows"]}

    return step


DEPTHS = 1, 16, 64, 256  # reads at once


def disk(folder: str, file_bytes: int) -> Step:
    """Return a step that reads 4 KiB at random places past the page cache, more and more at once; it returns reads per second."""
    path = Path(folder) / "random"
    with path.open("wb") as file:
        chunk = np.random.default_rng(0).bytes(1 << 24)
        for _ in range(file_bytes >> 24):
            file.write(chunk)
        os.fsync(file.fileno())

    def step() -> dict[str, float]:
        return {f"{depth} at once": random_reads(path, 4096, depth, 0.3) for depth in DEPTHS}

    return step
