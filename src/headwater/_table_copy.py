"""A read-only copy of a table's values in this process's memory: what a replica serves, and what a published version is loaded into.

Readers and the one who writes need not agree on anything: rows are written a few at a time, each wholly or not at all, under a lock that a
lookup waits for no longer than a few rows take. With a delta stream that starts over, the rows are gathered aside while the old ones
are served, and take their place at once when the last has come; until then both are in memory.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, NoReturn

import numpy as np

from headwater import _kernels
from headwater._consistency import asp
from headwater._errors import LayoutError, UsageError
from headwater._lookup import Batch, Changes, as_ids
from headwater._rows import AnyInitial, RowPolicy, TableSpec, Uniform
from headwater.optim import SGD

_SLICE_ROWS = 1024  # written under one lock, about 0.1 ms


class Found(NamedTuple):
    """The rows of a lookup."""

    rows: np.ndarray  # float32 (*ids.shape, dim)
    missing: int  # so many of the ids have no row: theirs hold the initial value


class CopyStats(NamedTuple):
    """A copy at a glance: sizes now, and counts since it was made."""

    rows: int
    bytes: int  # of memory: rows, index, and what is allocated and not yet used; both sets while one is gathered aside
    lookups: int
    ids: int  # looked up, repeated ones too
    missing: int  # of those, without a row


class TableCopy:
    """Rows by id, read-only for whoever looks them up. It can be shared between threads; one at a time writes.

    An id without a row has its initial value, the same that training sees: a function of (seed, id, position). It is counted. A row
    takes 4·dim + 16 bytes, its share of the index, and of memory that grows ahead of its use. `hw.torch.Embedding` takes a copy as
    it takes a table, to infer.
    """

    def __init__(
        self, name: str, dim: int, *, initial: AnyInitial | None = None, seed: int = 0, threads: int = 1
    ) -> None:
        """Make an empty copy.

        dim, initial, seed: those of the table; initial None: Uniform(0.01), as of tables. threads: for lookups of more than
        2,048 ids. Raises SettingError.
        """
        self.spec = TableSpec(name, dim, SGD(lr=0.0), initial or Uniform(), seed, RowPolicy(), asp())
        self.name, self.dim, self._threads = name, dim, threads
        self._kernel = self._new_kernel()
        self._aside: _kernels.Table | None = None  # gathers everything anew
        self._counting = threading.Lock()
        self._lookups = self._ids = self._missing = 0

    @classmethod
    def of(cls, spec: TableSpec, *, threads: int = 1) -> TableCopy:
        """Make an empty copy of the table with these settings."""
        return cls(spec.name, spec.dim, initial=spec.initial, seed=spec.seed, threads=threads)

    def _new_kernel(self) -> _kernels.Table:
        initial = self.spec.initial
        return _kernels.Table(
            self.dim, "sgd", [], seed=self.spec.seed, initial=initial.kind, scale=initial.scale, threads=self._threads
        )

    # Look up.

    def pull(self, ids: Any) -> np.ndarray:
        """Return the rows of `ids` as they are now: float32 (*ids.shape, dim), yours.

        ids: integers of any dtype and shape, repeats allowed. Each row is as one write left it; two rows may be of different moments.
        Raises LayoutError for ids that are no integers.
        """
        return self.look_up(ids).rows

    def look_up(self, ids: Any) -> Found:
        """Return the rows of `ids` as `pull` does, and how many of the ids have none."""
        flat = as_ids(ids, f"table {self.name!r}")
        out = np.empty((len(flat), self.dim), np.float32)
        missing = self.pull_into(flat, out)
        return Found(out.reshape(*np.shape(ids), self.dim), missing)

    def pull_into(self, ids: np.ndarray, out: np.ndarray) -> int:
        """Set out, float32 (n, dim), to the rows of ids, int64 (n,); returns how many have none."""
        missing = len(ids) - self._kernel.pull(ids, out, touch=False, now=0.0)
        with self._counting:
            self._lookups += 1
            self._ids += len(ids)
            self._missing += missing
        return missing

    # What adapters use.

    def batch(self, ids: Any) -> Batch:
        """Return ids, and those that are distinct."""
        flat = as_ids(ids, f"table {self.name!r}")
        distinct, ends, inverse = _kernels.unique(flat)
        return Batch(flat, distinct, [0, *ends.tolist()], inverse)

    def pull_batch(self, batch: Batch, *, touch: bool = False, is_distinct: bool = False) -> np.ndarray:
        """Return the rows of a batch's ids, float32 (n, dim), or one for each that is distinct, (u, dim). touch: changes nothing."""
        return self.pull(batch.distinct if is_distinct else batch.ids)

    def push_batch(self, batch: Batch, gradients: np.ndarray, *, is_distinct: bool = False) -> NoReturn:
        """Refuse: a copy is not trained."""
        raise UsageError(
            f"Expected a table to push to, got a read-only copy of table {self.name!r}: train with session.table(), and look copies "
            "up in eval() or under no_grad()."
        )

    def push(self, ids: Any, gradients: np.ndarray, **_: Any) -> NoReturn:
        """Refuse: a copy is not trained. Raises UsageError."""
        self.push_batch(self.batch(ids), gradients)

    # Write.

    def rows(self, ids: np.ndarray, values: np.ndarray) -> None:
        """Write rows: ids int64 (k,), distinct; values float32 (k, dim). Raises LayoutError, and has then written nothing."""
        self._write(self._target, self._checked(ids, values), values)

    def replace(self, ids: np.ndarray, values: np.ndarray) -> None:
        """Let these be all rows, arrays as in `rows`, at once for whoever looks them up. Raises LayoutError; nothing has changed then."""
        self._checked(ids, values)
        kernel = self._new_kernel()
        self._write(kernel, ids, values)
        self._kernel, self._aside = kernel, None

    def all_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all rows, ids int64 (k,) in rising order and values float32 (k, dim), yours; nobody may write meanwhile."""
        ids, values = [np.empty(0, np.int64)], [np.empty((0, self.dim), np.float32)]
        cursor = 0
        while cursor >= 0:
            some, rows, _, _, cursor = self._kernel.export(cursor)
            ids.append(some)
            values.append(rows)
        found = np.concatenate(ids)
        order = np.argsort(found)
        return found[order], np.concatenate(values)[order]

    def delete(self, ids: np.ndarray) -> None:
        """Drop the rows of ids, int64 (m,); those that have none stay without."""
        self._delete(self._target, as_ids(ids, f"table {self.name!r}"))

    def apply(self, changes: Changes) -> None:
        """Follow a table: do what its next `changes` say. Of rows that come with the optimizer's state the value is kept.

        After a restart lookups find what there was until everything has come, that is until changes without `more`.
        """
        values = changes.rows[:, : self.dim]
        ids = self._checked(changes.ids, values)
        if changes.restart:
            self._aside = self._new_kernel()
        self._delete(self._target, changes.deleted)
        self._write(self._target, ids, values)
        if self._aside is not None and not changes.more:
            self._kernel, self._aside = self._aside, None

    @property
    def _target(self) -> _kernels.Table:
        """What is written to."""
        return self._kernel if self._aside is None else self._aside

    def _checked(self, ids: np.ndarray, values: np.ndarray) -> np.ndarray:
        flat = as_ids(ids, f"table {self.name!r}")
        if values.dtype != np.float32 or values.shape != (len(flat), self.dim):
            raise LayoutError(
                f"Expected values of float32 {(len(flat), self.dim)}, got {values.dtype} {values.shape} — table {self.name!r}."
            )
        return flat

    @staticmethod
    def _write(kernel: _kernels.Table, ids: np.ndarray, values: np.ndarray) -> None:
        nothing, never = np.zeros(_SLICE_ROWS, np.float32), np.zeros(_SLICE_ROWS, np.int64)
        for start in range(0, len(ids), _SLICE_ROWS):
            some = ids[start : start + _SLICE_ROWS]
            rows = np.ascontiguousarray(values[start : start + _SLICE_ROWS])
            kernel.put(some, rows, nothing[: len(some)], never[: len(some)], step=1, now=0.0)

    @staticmethod
    def _delete(kernel: _kernels.Table, ids: np.ndarray) -> None:
        for start in range(0, len(ids), _SLICE_ROWS):
            kernel.delete(ids[start : start + _SLICE_ROWS])

    # At a glance.

    def stats(self) -> CopyStats:
        """Return sizes and counts."""
        kernel, aside = self._kernel, self._aside
        size = kernel.bytes + (aside.bytes if aside is not None else 0)
        with self._counting:
            return CopyStats(kernel.stats()["rows"], size, self._lookups, self._ids, self._missing)

    def __len__(self) -> int:
        return self._kernel.stats()["rows"]

    def __deepcopy__(self, _: dict[int, Any]) -> TableCopy:
        """A copied model looks up the same rows."""
        return self

    def __reduce__(self) -> Any:
        raise UsageError(f"Expected the copy of table {self.name!r} to stay in its process, got it to be pickled.")

    def __repr__(self) -> str:
        return f"<TableCopy {self.name!r} dim={self.dim} rows={len(self)}>"
