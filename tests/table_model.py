"""A plain model of the native table and of what is done with ids: dictionaries and NumPy, nothing clever. No budget, no spilling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
_MASK = (1 << 64) - 1


def mix64(value: int) -> int:
    """Return the mix of a 64-bit number that buckets and stripes are made of."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def bucket_of(ids: Ids) -> npt.NDArray[np.uint8]:
    return np.array([mix64(int(i) & _MASK) >> 56 for i in ids], np.uint8)


def unique(ids: Ids, servers: int = 1) -> tuple[Ids, Ids, npt.NDArray[np.int32]]:
    homes = {
        int(i): int(b) * servers // 256 for i, b in zip(ids, bucket_of(ids), strict=True)
    }  # in order of appearance
    distinct = [i for server in range(servers) for i, home in homes.items() if home == server]
    ends = np.cumsum([sum(home == server for home in homes.values()) for server in range(servers)], dtype=np.int64)
    place = {i: at for at, i in enumerate(distinct)}
    return np.array(distinct, np.int64), ends, np.array([place[int(i)] for i in ids], np.int32)


def same_ids(ids: Any, others: Any) -> bool:
    return bool(np.array_equal(ids, others))


def sum_rows(
    rows: Floats,
    targets: Any,
    out: Floats,
    *,
    sources: Any = None,
    weights: Any = None,
    threads: int = 1,
    level: str = "auto",
) -> bool:
    out[...] = 0
    for i, target in enumerate(targets):
        row = rows[i if sources is None else sources[i]]
        out[target] += row if weights is None else np.float32(weights[i]) * row
    return bool(np.isfinite(out).all())


def take_rows(rows: Floats, sources: Any, out: Floats, *, threads: int = 1) -> None:
    out[...] = rows[sources]


def find_bad(rows: Floats, *, threads: int = 1) -> int:
    bad = np.flatnonzero(~np.isfinite(rows.reshape(-1)))
    return int(bad[0]) if len(bad) else -1


class Row:
    """A row and what is known of it."""

    def __init__(self, value: Floats, state: Floats) -> None:
        self.value, self.state = value, state
        self.count = np.float32(0)
        self.seen = 0


class Consumer(NamedTuple):
    written: dict[int, None]
    deleted: dict[int, None]
    restart: list[bool]


class Table:
    """As `_kernels.Table`."""

    def __init__(
        self, dim: int, optimizer: str, initial_slots: Sequence[float], *, seed: int = 0, initial: str = "uniform",
        scale: float = 0.0, admit_after: int = 1, expire_steps: int = 0, expire_s: float = 0.0, decay: float = 1.0,
        buckets: tuple[int, int] = (0, 256), **_: Any,
    ) -> None:  # fmt: skip
        self.dim, self.optimizer, self.slots = dim, optimizer, np.array(initial_slots, np.float32)
        self.seed, self.initial, self.scale = seed, initial, scale
        self.admit_after, self.expire_steps, self.expire_s, self.decay = admit_after, expire_steps, expire_s, decay
        self.buckets = buckets
        self.rows: dict[int, Row] = {}
        self.sightings: dict[int, float] = {}
        self.consumers: dict[str, Consumer] = {}
        names = {
            "spilled_rows",
            "bytes",
            "budget_bytes",
            "spilled_bytes",
            "rows_max",
            "spilled",
            "loaded",
            "hits",
            "misses",
        }
        self.figures = dict.fromkeys(names | {"admitted", "refused", "evicted", "expired", "deleted"}, 0)
        self.step = 0

    def first(self, i: int) -> Floats:
        """Return an id's initial value."""
        if self.initial == "constant":
            return np.full(self.dim, self.scale, np.float32)
        draws = [mix64((self.seed * 31 + i * 65_599 + position) & _MASK) / 2**64 for position in range(self.dim)]
        return np.array([self.scale * (2 * draw - 1) for draw in draws], np.float32)

    def _clock(self, now: float) -> int:
        return int(now) if self.expire_s else self.step

    def _has_expired(self, row: Row, now: float) -> bool:
        limit = self.expire_s or self.expire_steps
        return bool(limit) and self._clock(now) - row.seen > limit

    def _row(self, i: int, now: float) -> Row | None:
        row = self.rows.get(i)
        if row is not None and self._has_expired(row, now):
            self._drop(i, "expired")
            return None
        return row

    def _drop(self, i: int, why: str) -> None:
        del self.rows[i]
        self.figures[why] += 1
        for consumer in self.consumers.values():
            consumer.written.pop(i, None)
            consumer.deleted[i] = None

    def _wrote(self, i: int) -> None:
        for consumer in self.consumers.values():
            consumer.written[i] = None

    def _check(self, ids: Ids) -> None:
        low, limit = self.buckets
        if any(not low <= bucket < limit for bucket in bucket_of(ids)):
            raise ValueError("an id lives elsewhere")

    def pull(self, ids: Ids, out: Floats, *, touch: bool, now: float, prefetch: bool = True) -> int:
        self._check(ids)
        found = 0
        for i, target in zip(ids.tolist(), out, strict=True):
            row = self._row(i, now)
            target[...] = self.first(i) if row is None else row.value
            found += row is not None
            if row is not None and touch:
                row.seen = self._clock(now)
        self.figures["hits"] += found
        self.figures["misses"] += len(ids) - found
        return found

    def push(self, ids: Ids, gradients: Floats, scalars: Any, *, step: int, now: float) -> None:
        self._check(ids)
        for _ in range(step // 1000 - self.step // 1000):
            for row in self.rows.values():
                row.count *= np.float32(self.decay)
        self.step = step
        for i, gradient in zip(ids.tolist(), gradients, strict=True):
            found = self._row(i, now)
            if found is None:
                self.sightings[i] = self.sightings.get(i, 0) + 1
                if self.sightings[i] < self.admit_after:
                    self.figures["refused"] += 1
                    continue
                found = self.rows[i] = Row(self.first(i), self.slots.copy())
                found.count = np.float32(self.sightings.pop(i) - 1)
                self.figures["admitted"] += 1
            found.count += np.float32(1)
            found.seen = self._clock(now)
            getattr(self, self.optimizer)(found, gradient.copy(), np.asarray(scalars, np.float32))
            self._wrote(i)

    def sgd(self, row: Row, g: Floats, scalars: Floats) -> None:
        row.value -= scalars[0] * (g + scalars[1] * row.value)

    def adagrad(self, row: Row, g: Floats, scalars: Floats) -> None:
        rate, decay, eps = scalars
        g = g + decay * row.value
        row.state += g * g
        row.value -= rate * g / (np.sqrt(row.state) + eps)

    def rowwise_adagrad(self, row: Row, g: Floats, scalars: Floats) -> None:
        rate, decay, eps = scalars
        g = g + decay * row.value
        row.state += np.mean(g * g)
        row.value -= rate * g / (np.sqrt(row.state) + eps)

    def adam(self, row: Row, g: Floats, scalars: Floats) -> None:
        size, decay, keep1, beta2, keep2, correction, eps = scalars
        g = g + decay * row.value
        mean, square = row.state[: self.dim], row.state[self.dim :]
        mean += keep1 * (g - mean)
        square *= beta2
        square += keep2 * g * g
        row.value -= size * mean / (np.sqrt(square) / correction + eps)

    def ftrl(self, row: Row, g: Floats, scalars: Floats) -> None:
        lr, beta, l1, l2 = scalars
        z, n = row.state[: self.dim], row.state[self.dim :]
        sigma = (np.sqrt(n + g * g) - np.sqrt(n)) / lr
        z += g - sigma * row.value
        n += g * g
        shrunk = np.sign(z) * l1 - z
        row.value[...] = np.where(np.abs(z) <= l1, 0, shrunk / ((beta + np.sqrt(n)) / lr + l2))

    def prefetch(self, ids: Ids) -> None:
        self._check(ids)

    def sweep(self, *, step: int, now: float) -> int:
        self.step = max(self.step, step)
        gone = [i for i, row in self.rows.items() if self._has_expired(row, now)]
        for i in gone:
            self._drop(i, "expired")
        return len(gone)

    def delete(self, ids: Ids) -> int:
        gone = [i for i in ids.tolist() if i in self.rows]
        for i in gone:
            self._drop(i, "deleted")
        return len(gone)

    def _whole(self, ids: list[int]) -> Floats:
        rows = [np.concatenate([self.rows[i].value, self.rows[i].state]) for i in ids]
        return np.array(rows, np.float32).reshape(-1, self.dim + len(self.slots))

    def export(self, cursor: int = 0, limit: int = 1 << 16) -> tuple[Ids, Floats, Floats, Ids, int]:
        some = list(self.rows)[cursor : cursor + limit]
        counts, seen = [self.rows[i].count for i in some], [self.rows[i].seen for i in some]
        after = cursor + limit if cursor + limit < len(self.rows) else -1
        return (
            np.array(some, np.int64),
            self._whole(some),
            np.array(counts, np.float32),
            np.array(seen, np.int64),
            after,
        )

    def put(self, ids: Ids, rows: Floats, counts: Any, last_seen: Any, *, step: int, now: float) -> None:
        self._check(ids)
        self.step = max(self.step, step)
        for i, whole, count, seen in zip(ids.tolist(), rows, counts, last_seen, strict=True):
            row = self.rows[i] = Row(whole[: self.dim].copy(), whole[self.dim :].copy())
            row.count, row.seen = np.float32(count), int(seen)
            self._wrote(i)

    def track(self, consumer: str) -> None:
        self.consumers[consumer] = Consumer(dict.fromkeys(self.rows), {}, [True])

    def untrack(self, consumer: str) -> None:
        if self.consumers.pop(consumer, None) is None:
            raise ValueError(f"no consumer {consumer!r}")

    def changes(self, consumer: str, limit: int = 1 << 62) -> tuple[Ids, Floats, Floats, Ids, Ids, int, bool, bool]:
        if consumer not in self.consumers:
            raise ValueError(f"no consumer {consumer!r}")
        written, deleted, restart = self.consumers[consumer]
        some, gone, was = list(written)[:limit], list(deleted), restart[0]
        for i in some:
            del written[i]
        deleted.clear()
        restart[0] = False
        counts = np.array([self.rows[i].count for i in some], np.float32)
        seen = np.array([self.rows[i].seen for i in some], np.int64)
        ids, deleted_ids = np.array(some, np.int64), np.array(gone, np.int64)
        return ids, self._whole(some), counts, seen, deleted_ids, self.step, was, bool(written)

    def stats(self) -> dict[str, int]:
        return {"rows": len(self.rows), "step": self.step, **self.figures}

    @property
    def bytes(self) -> int:
        return math.prod((len(self.rows), self.dim + len(self.slots), 4))


def hash_ids(strings: Sequence[str | bytes]) -> Ids:
    texts = [text.encode() if isinstance(text, str) else text for text in strings]
    values = []
    for text in texts:
        value = len(text)
        for byte in text:
            value = mix64(value ^ byte)
        values.append(value - (value >> 63 << 64))
    return np.array(values, np.int64)
