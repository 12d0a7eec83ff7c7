"""What a table is: its settings as values, where its rows live, and how a batch lies in memory. Nothing here touches a row.

    id      := any int64
    bucket  := the top 8 bits of the id's mix (`_kernels.bucket_of`)     the unit of placement
    batch   := ids rows                      as it lies in a worker's room at a server and travels as a payload:
                                             int64 (n,), then float32 (n, dim) from the next multiple of 64 bytes on
    page    := ids last_seen rows counts     rows as they are exported: int64 (k,) twice, float32 (k, dim + state), float32 (k,)
    changes := ids deleted rows              int64 (k,), int64 (m,), float32 (k, dim + state), or (k, dim): whoever follows
                                             does not need counts and last seen, and may do without state

Bucket b of 256 lives on server b·n // 256 of n. Example: 3 ids of dim 2 are 24 bytes, a gap up to 64, and 24 bytes.
"""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar, NamedTuple, TypeAlias

import msgspec
import numpy as np

from headwater._consistency import Consistency
from headwater._errors import SettingError
from headwater._layout import ALIGN_BYTES, round_up
from headwater.optim import SGD, Optimizer, RowOptimizer

BUCKETS = 256
DIM_MAX = 1 << 16
NAME_MAX = 200  # characters


class _Initial(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of initial values: a pure function of (seed, id, position), the same on any server at any time."""

    kind: ClassVar[str]

    @property
    def scale(self) -> float:
        """The kernel's one number."""
        return float(getattr(self, self.__struct_fields__[0]))

    def __post_init__(self) -> None:
        name = self.__struct_fields__[0]
        value = _number(name, getattr(self, name))
        if self.kind != "constant" and value < 0.0:
            raise SettingError(f"Expected {name} of 0 or more, got {value} — {type(self).__name__}.")
        msgspec.structs.force_setattr(self, name, value)


class Uniform(_Initial, frozen=True):
    """New rows are uniform in [−limit, limit)."""

    kind: ClassVar[str] = "uniform"
    limit: float = 0.01


class Normal(_Initial, frozen=True):
    """New rows are nearly normal around 0: the scaled sum of eight uniform numbers."""

    kind: ClassVar[str] = "normal"
    deviation: float = 0.01


class Constant(_Initial, frozen=True):
    """New rows hold one value everywhere."""

    kind: ClassVar[str] = "constant"
    value: float = 0.0


AnyInitial: TypeAlias = Uniform | Normal | Constant


class RowPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which ids get a row, and which rows go. Everything combines; the defaults keep every row for ever.

    admit_after: an id gets its row at its so-manieth sighting, that is push. expire_steps, expire_s: a row unseen for longer is
    deleted; one of the two. decay: counts of sightings are multiplied by it every 1,000 steps of the table. budget_bytes: what
    the table may take in memory over all servers, index and growth included, half a megabyte a server or more; it is never
    exceeded. when_full: "evict", or "spill" to a file in spill_folder on each server's disk: those rows still exist. evict: who
    goes, "lru" the longest unseen or "lfu" the least often seen. An evicted id that comes back is a new one.
    """

    admit_after: int = 1
    expire_steps: int | None = None
    expire_s: float | None = None
    decay: float = 1.0
    budget_bytes: int | None = None
    when_full: str = "evict"
    evict: str = "lru"
    spill_folder: str | None = None

    def __post_init__(self) -> None:
        for name in ("admit_after", "expire_steps", "budget_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SettingError(f"Expected {name} to be a whole number of 1 or more, got {value!r} — RowPolicy.")
        if self.expire_s is not None and not _number("expire_s", self.expire_s) > 0.0:
            raise SettingError(f"Expected expire_s above 0, or None, got {self.expire_s!r} — RowPolicy.")
        if self.expire_s is not None and self.expire_steps is not None:
            raise SettingError("Expected expire_steps or expire_s, got both — RowPolicy: one rule of expiry a table.")
        if not 0.0 < _number("decay", self.decay) <= 1.0:
            raise SettingError(f"Expected decay above 0 and at most 1, got {self.decay} — RowPolicy.")
        if self.when_full not in ("evict", "spill") or self.evict not in ("lru", "lfu"):
            raise SettingError(
                f"Expected when_full='evict' or 'spill' and evict='lru' or 'lfu', got {self.when_full!r} and {self.evict!r}."
            )
        if self.spill_folder is not None:
            msgspec.structs.force_setattr(self, "spill_folder", os.fspath(self.spill_folder))
        if self.when_full == "spill" and (self.spill_folder is None or self.budget_bytes is None):
            raise SettingError(
                "Expected spill_folder and budget_bytes with when_full='spill', got one missing — RowPolicy."
            )


class TableSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A declared table."""

    name: str
    dim: int
    optimizer: RowOptimizer
    initial: AnyInitial
    seed: int
    policy: RowPolicy
    consistency: Consistency

    def __post_init__(self) -> None:
        where = f"table {self.name!r:.99}"
        if not isinstance(self.name, str) or not 0 < len(self.name) <= NAME_MAX:
            raise SettingError(f"Expected a name of 1 to {NAME_MAX} characters, got {self.name!r}.")
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or not 1 <= self.dim <= DIM_MAX:
            raise SettingError(f"Expected a dim from 1 to {DIM_MAX}, got {self.dim!r} — {where}.")
        if not isinstance(self.seed, int) or not -(1 << 63) <= self.seed < 1 << 63:
            raise SettingError(f"Expected a seed of 64 bits, got {self.seed!r} — {where}.")
        for name, kind in (
            ("optimizer", Optimizer),
            ("initial", _Initial),
            ("policy", RowPolicy),
            ("consistency", Consistency),
        ):
            if not isinstance(getattr(self, name), kind):
                raise SettingError(f"Expected {name} as in its documentation, got {getattr(self, name)!r} — {where}.")
        self.optimizer.row_slots(self.dim)

    @property
    def initial_state(self) -> list[float]:
        """The optimizer's state of a new row."""
        return self.optimizer.row_slots(self.dim)

    @property
    def width(self) -> int:
        """Floats of a whole row: the value, then the optimizer's state."""
        return self.dim + len(self.initial_state)

    @property
    def is_staged(self) -> bool:
        """Whether pushes wait for the commit of their step: under BSP."""
        return self.consistency.kind == "bsp"


def spec_of(wanted: Any, job: Consistency, *, dim: int) -> TableSpec:
    """Return the settings of a new table from what is wished; what is not gets its default. Raises SettingError."""

    def chosen(name: str, default: Any) -> Any:
        value = getattr(wanted, name)
        return default if value is None else value

    return TableSpec(
        wanted.name,
        dim,
        chosen("optimizer", SGD(lr=0.01)),
        chosen("initial", Uniform()),
        chosen("seed", 0),
        chosen("policy", RowPolicy()),
        chosen("consistency", job),
    )


def difference(ours: TableSpec, wanted: Any) -> str:
    """Say how wished settings, None being no wish, differ from a table's; empty when they do not."""
    for name in TableSpec.__struct_fields__:
        value = getattr(wanted, name)
        if value is not None and value != getattr(ours, name):
            return f"{name} {getattr(ours, name)}, got {value}"
    return ""


def too_many(count: int, limit: int, spec: TableSpec) -> str:
    """Say that a batch does not fit the budget."""
    return (
        f"Expected at most {limit} ids a push at one server, which is what budget_bytes={spec.policy.budget_bytes} holds, got {count} "
        f"— table {spec.name!r}: raise the budget, or push smaller batches."
    )


def buckets_of(server: int, servers: int) -> tuple[int, int]:
    """Return the buckets [first, limit) that live on this server."""
    return -(-BUCKETS * server // servers), -(-BUCKETS * (server + 1) // servers)


def rows_at(count: int) -> int:
    """Return where the rows of a batch of `count` ids begin, in bytes."""
    return round_up(8 * count, ALIGN_BYTES)


def batch_bytes(count: int, dim: int) -> int:
    """Return the size of a batch, ids and rows."""
    return rows_at(count) + 4 * count * dim


def page_bytes(count: int, width: int) -> int:
    """Return the size of a page of exported rows."""
    return count * (20 + 4 * width)


def changes_bytes(written: int, deleted: int, width: int) -> int:
    """Return the size of a delta."""
    return written * (8 + 4 * width) + deleted * 8


class WholeRows(NamedTuple):
    """Rows as a page holds them."""

    ids: np.ndarray  # int64 (k,)
    last_seen: np.ndarray  # int64 (k,)
    rows: np.ndarray  # float32 (k, dim + state): the value, then the optimizer's state
    counts: np.ndarray  # float32 (k,)

    @classmethod
    def none(cls, width: int) -> WholeRows:
        """Return no rows of this width."""
        nothing = np.empty(0, np.int64)
        return cls(nothing, nothing, np.empty((0, width), np.float32), np.empty(0, np.float32))


def split_page(page: np.ndarray, count: int, width: int) -> WholeRows:
    """Return the rows of a page, uint8."""
    stop = count * (16 + 4 * width)
    return WholeRows(
        page[: 8 * count].view(np.int64),
        page[8 * count : 16 * count].view(np.int64),
        page[16 * count : stop].view(np.float32).reshape(count, width),
        page[stop:].view(np.float32),
    )


def join_page(*arrays: np.ndarray) -> memoryview:
    """Return the bytes of a page, or of changes, for sending."""
    return memoryview(np.concatenate([array.reshape(-1).view(np.uint8) for array in arrays]))


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise SettingError(f"Expected {name} to be a number, got {value!r}.") from None
    if not math.isfinite(number):
        raise SettingError(f"Expected {name} to be finite, got {value!r}.")
    return number
