"""A worker's handle on a table: pull and push rows by id.

A batch's ids are made distinct and grouped by server here, before they travel; gradients of equal ids are summed, in order of
appearance. Each server is spoken to on a connection of its own for tables, so that a pull never waits behind a step.
Where memory is shared, ids, rows and gradients are written and read in place, in the worker's room at the server.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from headwater import _kernels, _limits
from headwater._errors import (
    LayoutError,
    NonFiniteError,
    SettingError,
    UsageError,
)
from headwater._messages import (
    AnyMessage,
    Changed,
    ChangesGet,
    Declare,
    Done,
    Page,
    PageGet,
    PagePut,
    PulledRows,
    PullRows,
    PushRows,
    TableStats,
    TableStatsGet,
    Track,
    WarmRows,
)
from headwater._rows import (
    TableSpec,
    WholeRows,
    batch_bytes,
    changes_bytes,
    join_page,
    page_bytes,
    rows_at,
    split_page,
    too_many,
)
from headwater._rows_file import SavedRows, read_rows, write_rows
from headwater._table_link import Link, Session

_M = TypeVar("_M")


class Batch(NamedTuple):
    """Ids as they travel."""

    ids: np.ndarray  # int64 (n,), as they came
    distinct: np.ndarray  # int64 (u,), grouped by server
    bounds: list[int]  # of each server's: it has distinct[bounds[i] : bounds[i + 1]]
    inverse: np.ndarray  # int32 (n,): distinct[inverse] == ids


class Changes(NamedTuple):
    """Rows written and deleted since a consumer last asked.

    To follow a table: with `restart` drop everything; then drop `deleted`, then write `rows`; ask again while `more`. A replica
    that has done so equals the table.
    """

    ids: np.ndarray  # int64 (k,)
    rows: np.ndarray  # float32 (k, dim + state): the value, then the optimizer's state where it was asked for
    deleted: np.ndarray  # int64 (m,)
    restart: bool
    more: bool
    step: int  # the table's step number, then


class PageOfRows(NamedTuple):
    """Some rows, and the table's step number."""

    rows: WholeRows
    step: int


class Tables:
    """A session's tables."""

    def __init__(self, session: Session, links: Sequence[Link]) -> None:
        self._session, self.links = session, links
        self._tables: dict[int, Table] = {}

    def table(self, number: int, spec: TableSpec) -> Table:
        """Return the handle on a declared table, the same each time: it counts the pushes."""
        if number not in self._tables:
            self._tables[number] = Table(self._session, self.links, number, spec)
        return self._tables[number]

    @property
    def are_declared(self) -> bool:
        """Whether this worker has declared any."""
        return bool(self._tables)

    @property
    def has_pushed(self) -> bool:
        """Whether anything is staged for the step to come."""
        step = self._session._sequence + 1
        return any(table.pushed_step == step for table in self._tables.values())

    def settle(self) -> None:
        """Wait until every server has what was pushed."""
        for link in self.links:
            link.settle()

    def __iter__(self) -> Iterator[Table]:
        return iter([table for _, table in sorted(self._tables.items())])

    def attach_again(self) -> None:
        """Connect to servers that were started again."""
        for i, link in enumerate(self.links):
            link.attach_again(self._session._peers.open("table", i)[0])

    def resume(self, *, stages: bool) -> None:
        """Say again what they have not answered. stages: and what is staged for the step that has not counted."""
        for link in self.links:
            link.resume(stages=stages)

    def drop_step(self) -> None:
        """What was staged has counted, or counts nowhere."""
        for link in self.links:
            link.staged.clear()


class Table:
    """Rows by id, kept by the job's servers; made by `session.table`. It is used by the session's thread.

    A row exists once it is first trained. An id without one has its initial value, a function of (seed, id, position) that is the
    same at any time on any number of servers.
    """

    def __init__(self, session: Session, links: Sequence[Link], number: int, spec: TableSpec) -> None:
        self.spec = spec  #: the settings, as the job has them
        self._session, self._links, self.number = session, links, number
        self._sequence = -1
        self.pushed_step = -1  #: the step that the last push belongs to, under BSP
        self._scalars = tuple(spec.optimizer.scalars().values())
        self._last: Batch | None = None
        self._ahead: Batch | None = None
        self._is_under_way = False  # the rows of the batch ahead have been asked for
        self._rows_max: list[int] | None = None  # within the budget of each server

    @property
    def name(self) -> str:
        """The table's name in the job."""
        return self.spec.name

    @property
    def dim(self) -> int:
        """Elements of a row."""
        return self.spec.dim

    # Pull and push.

    def pull(self, ids: Any, *, touch: bool = True) -> np.ndarray:
        """Return the rows of `ids` as they are now: float32 (*ids.shape, dim), yours.

        ids: integers of any dtype and shape, repeats allowed. touch: it counts as use, for eviction and expiry; without it
        nothing changes. Under BSP the rows are those after the last step that was waited for. Raises LayoutError for ids that are no
        integers.
        """
        return self.pull_batch(self.batch(ids), touch=touch).reshape(*np.shape(ids), self.dim)

    def push(self, ids: Any, gradients: np.ndarray, *, scalars: Mapping[str, float] | None = None) -> None:
        """Push a gradient for each id; those of equal ids are summed.

        gradients: float32 (*ids.shape, dim), copied. scalars: the learning rate and others, from now on (see `set_scalars`).
        In an ASP or SSP job it counts at once, as one step of each row. Under BSP it belongs to the worker's next step, with that step's
        weight: it counts with the next `session.step`, whichever that is, or not at all.
        Raises LayoutError, or NonFiniteError naming id and position: then nothing of this push counts. An error of a server is
        raised by the next call that speaks to it, or by `session.step`, which then does nothing itself.
        """
        if scalars is not None:
            self.set_scalars(**scalars)
        if np.shape(gradients) != (*np.shape(ids), self.dim):
            raise LayoutError(
                f"Expected gradients of shape {(*np.shape(ids), self.dim)}, got {np.shape(gradients)} — table {self.name!r}, "
                f"push {self._sequence + 1}."
            )
        self.push_batch(self.batch(ids), gradients)

    def declaration(self) -> Declare:
        """Return what declares the table once more."""
        return Declare(*(getattr(self.spec, name) for name in Declare.__struct_fields__))

    def set_scalars(self, **scalars: float) -> None:
        """Change what the optimizer takes with each push, such as lr=0.01; the others stay. Raises SettingError."""
        names = self.spec.optimizer.scalar_names
        if any(name not in names for name in scalars):
            raise SettingError(f"Expected some of {', '.join(names)}, got {', '.join(scalars)} — table {self.name!r}.")
        changed = {
            **dict(zip(names, self._scalars, strict=True)),
            **{name: float(value) for name, value in scalars.items()},
        }
        self.spec.optimizer.check(changed)
        self._scalars = tuple(changed.values())

    def prefetch(self, ids: Any) -> None:
        """Begin to pull the ids of the next batch, and return at once; `pull` of the same ids then finds them on their way.

        At most one batch ahead. In an ASP table the rows are those of now, so they lack what is pushed until they are used. Under BSP and
        SSP rows are read when they are pulled; only spilled ones come into memory ahead.
        """
        batch = self.batch(ids)
        self._ahead, self._is_under_way = None, False
        is_asp = self.spec.consistency.kind == "asp"
        if is_asp:
            self._ask_for(batch, 1 + self.number, touch=True)
        elif self.spec.policy.when_full == "spill":
            self._ask_for(batch, 1 + self.number, touch=True, only_warm=True)
        self._ahead, self._is_under_way = batch, is_asp  # not where asking has failed

    # What adapters use.

    def batch(self, ids: Any) -> Batch:
        """Return ids as they travel; the work is not done again for those that were pulled or prefetched last."""
        self._session._require_open()
        self._session.begin_tables()
        flat = as_ids(ids, f"table {self.name!r}")
        for known in (self._last, self._ahead):
            if known is not None and _kernels.same_ids(known.ids, flat):
                return known
        if len(flat) >= 1 << 31:
            raise LayoutError(
                f"Expected fewer than 2^31 ids in a batch, got {len(flat)} — table {self.name!r}: split it."
            )
        distinct, ends, inverse = _kernels.unique(flat, len(self._links))
        return Batch(flat.copy(), distinct, [0, *ends.tolist()], inverse)

    def pull_batch(self, batch: Batch, *, touch: bool = True, is_distinct: bool = False) -> np.ndarray:
        """Return the rows of a batch's ids, float32 (n, dim), or one for each that is distinct, (u, dim); yours."""
        rows = self._read(batch, touch=touch)
        if is_distinct:
            return rows.copy()
        out = np.empty((len(batch.ids), self.dim), np.float32)
        _kernels.take_rows(rows, batch.inverse, out)
        return out

    def push_batch(self, batch: Batch, gradients: np.ndarray, *, is_distinct: bool = False) -> None:
        """Push gradients for the ids of a batch, (n, dim), or their sums for those that are distinct, (u, dim)."""
        count = len(batch.distinct if is_distinct else batch.ids)
        gradients = np.asarray(gradients)
        if gradients.dtype != np.float32 or gradients.size != count * self.dim or gradients.shape[-1:] != (self.dim,):
            raise LayoutError(
                f"Expected gradients of float32 for {count} ids of dim {self.dim}, got {gradients.dtype} {gradients.shape} — "
                f"table {self.name!r}, push {self._sequence + 1}."
            )
        self._session._require_open()
        if not count:
            return
        flat = np.ascontiguousarray(gradients).reshape(count, self.dim)
        total = flat
        for link, (start, stop) in zip(self._links, pairwise(batch.bounds), strict=True):
            link.room(0, batch_bytes(stop - start, self.dim))  # what went wrong before is said before anything is sent
        if len(self._links) == 1:  # straight to where the server reads it
            room = self._links[0].room(0, batch_bytes(len(batch.distinct), self.dim))
            total = _rows_in(room, len(batch.distinct), self.dim)
        elif not is_distinct:
            total = np.empty((len(batch.distinct), self.dim), np.float32)
        if is_distinct:
            if total is not flat:
                total[...] = flat
            is_finite = _kernels.find_bad(total) < 0
        else:
            is_finite = _kernels.sum_rows(flat, batch.inverse, total)
        if not is_finite:
            raise self._not_finite(batch, total, flat, is_distinct=is_distinct)
        self._check_budget(batch)
        step = -1
        if self.spec.is_staged:
            step = self.pushed_step = self._session._sequence + 1
        self._sequence += 1
        for i, link in enumerate(self._links):
            mine = slice(batch.bounds[i], batch.bounds[i + 1])
            ids = batch.distinct[mine]
            room = self._write_ids(link, 0, ids)
            if len(self._links) > 1:
                _rows_in(room, len(ids), self.dim)[...] = total[mine]
            message = PushRows(self.number, self._sequence, step, len(ids), self._scalars)
            raw = room[: batch_bytes(len(ids), self.dim)]
            if self.spec.is_staged and self._session._peers.is_durable:
                link.staged.append((message, raw.copy()))
            link.send(message, raw, Done, room=0)

    def _check_budget(self, batch: Batch) -> None:
        """Refuse what one of the servers would, before any of them has it."""
        if self.spec.policy.budget_bytes is None:
            return
        if self._rows_max is None:
            self._rows_max = [answer.rows_max for answer, _ in self._ask_all(TableStatsGet(self.number), TableStats)]
        for limit, (start, stop) in zip(self._rows_max, pairwise(batch.bounds), strict=True):
            if 0 < limit < stop - start:
                raise SettingError(too_many(stop - start, limit, self.spec))

    def _not_finite(
        self, batch: Batch, total: np.ndarray, gradients: np.ndarray, *, is_distinct: bool
    ) -> NonFiniteError:
        row, position = divmod(_kernels.find_bad(total), self.dim)
        where = row
        if not is_distinct:
            places = np.flatnonzero(batch.inverse == row)
            guilty = places[~np.isfinite(gradients[places]).all(axis=1)]
            where = int(guilty[0]) if len(guilty) else int(places[0])
            position = position if not len(guilty) else int(np.flatnonzero(~np.isfinite(gradients[where]))[0])
        return NonFiniteError(
            f"Expected finite gradients, got NaN or infinity for id {batch.distinct[row]} at position {position}, number {where} of "
            f"the batch — table {self.name!r}, push {self._sequence + 1}. Nothing of this push counts; lower the learning rate, "
            "clip, or skip the step."
        )

    def _read(self, batch: Batch, *, touch: bool) -> np.ndarray:
        """Return the rows of the distinct ids, float32 (u, dim), valid until the next request."""
        if self.spec.is_staged and self._session._is_pending:
            self._session.wait()  # clock c reads commit c
        number = 1 + self.number
        is_ahead = batch is self._ahead
        if not (is_ahead and self._is_under_way) or any(number in link.failed for link in self._links):
            number = 0
            self._ask_for(batch, number, touch=touch)
        if is_ahead:
            self._ahead, self._is_under_way = None, False
        found = []
        for link, ids in self._parts(batch):
            found.append(_rows_in(link.room(number, batch_bytes(len(ids), self.dim)), len(ids), self.dim))
            link.settle()
        self._last = batch
        return found[0] if len(found) == 1 else np.concatenate([np.empty((0, self.dim), np.float32), *found])

    def _ask_for(self, batch: Batch, number: int, *, touch: bool, only_warm: bool = False) -> None:
        """Ask each server for its rows, which come into this room; or only to have them in memory."""
        for link, ids in self._parts(batch):
            room = self._write_ids(link, number, ids)
            raw = room[: ids.nbytes]
            if only_warm:
                link.send(WarmRows(self.number, number, len(ids)), raw, Done, room=number)
            else:
                rows = room[rows_at(len(ids)) : batch_bytes(len(ids), self.dim)]
                link.send(PullRows(self.number, number, len(ids), touch), raw, PulledRows, rows, room=number)

    def _parts(self, batch: Batch) -> Iterable[tuple[Link, np.ndarray]]:
        """Yield each server that has any of the ids, and those."""
        for i, link in enumerate(self._links):
            if batch.bounds[i] < batch.bounds[i + 1]:
                yield link, batch.distinct[batch.bounds[i] : batch.bounds[i + 1]]

    def _write_ids(self, link: Link, number: int, ids: np.ndarray) -> np.ndarray:
        room = link.room(number, batch_bytes(len(ids), self.dim))
        room[: ids.nbytes].view(np.int64)[...] = ids
        return room

    # The table as a whole.

    def stats(self) -> TableStats:
        """Return the table at a glance, over all servers: rows, bytes, and how often what has happened."""
        found = [answer for answer, _ in self._ask_all(TableStatsGet(self.number), TableStats)]
        sums = {name: sum(getattr(part, name) for part in found) for name in TableStats.__struct_fields__}
        return TableStats(**{**sums, "step": max(part.step for part in found)})

    def track(self, consumer: str, *, ends: bool = False) -> None:
        """Begin a delta stream by this name, or start it over; `changes` then gives everything first. At most 6 a table.

        ends: with this session, however that ends; else with `untrack` alone.
        """
        track = Track(self.number, consumer, True, ends)
        self._ask_all(track, Done)
        for link in self._links:
            link.tracked[self.number, consumer] = track

    def untrack(self, consumer: str) -> None:
        """End a delta stream: nothing is noted for it any more."""
        self._ask_all(Track(self.number, consumer, False), Done)
        for link in self._links:
            link.tracked.pop((self.number, consumer), None)

    def changes(self, consumer: str, limit: int = 1 << 31, *, state: bool = True) -> Changes:
        """Return what was written and deleted since this consumer last asked, evictions and expiry included.

        limit: about so many rows a server at most; the rest comes when asked `more`. state: rows hold the optimizer's too. Under BSP
        it is the state after one commit.
        """
        width = self.spec.width if state else self.dim

        def size(answer: Changed) -> int:
            return changes_bytes(answer.written, answer.deleted, width)

        with self._still():
            asked = ChangesGet(self.number, consumer, limit, state)
            found = self._ask_all(asked, Changed, size)
            restarts = [answer.restart for answer, _ in found]
            if any(restarts):  # everything is dropped, so everything must come, from every server
                for i, link in enumerate(self._links):
                    if not restarts[i]:
                        link.ask(link.tracked.get((self.number, consumer), Track(self.number, consumer, True)), Done)
                        found[i] = link.ask(asked, Changed, size)
        ids, rows, deleted = [], [], []
        for answer, raw in found:
            start, stop = 8 * answer.written, 8 * (answer.written + answer.deleted)
            ids.append(raw[:start].view(np.int64))
            deleted.append(raw[start:stop].view(np.int64))
            rows.append(raw[stop:].view(np.float32).reshape(-1, width))
        more, step = any(answer.more for answer, _ in found), max(answer.step for answer, _ in found)
        return Changes(np.concatenate(ids), np.concatenate(rows), np.concatenate(deleted), any(restarts), more, step)

    def export(self, path: str | os.PathLike[str]) -> int:
        """Write every row, spilled ones included, to PATH.safetensors or PATH.parquet; returns how many.

        What is in the file says `load`. The rows are gathered in this process's memory, but for Parquet. Written aside and renamed
        when whole. Raises StorageError; then what was there before is still there.
        """
        with self._still():
            pages = (
                SavedRows(ids, rows[:, : self.dim], rows[:, self.dim :], counts, last_seen, step)
                for (ids, last_seen, rows, counts), step in self.pages()
            )
            return write_rows(Path(path), self.spec, pages)

    def pages(self) -> Iterator[PageOfRows]:
        """Yield every row; whoever asks sees to it that no commit happens meanwhile."""
        width = self.spec.width
        for link in self._links:
            cursor = 0
            while cursor >= 0:
                page, raw = link.ask(
                    PageGet(self.number, cursor, _limits.PAGE_ROWS),
                    Page,
                    lambda answer: page_bytes(answer.count, width),
                )
                cursor = page.cursor
                yield PageOfRows(split_page(raw, page.count, width), page.step)

    def load(self, path: str | os.PathLike[str]) -> int:
        """Write the rows of a file that `export` made, or another tool, over those of the table; returns how many. One worker does it.

        With a budget, rows beyond it are evicted as by a push.

        Columns: "ids" int64 (k,), distinct; "values" float32 (k, dim); and where they are there "state" float32 (k, state), "counts"
        float32 (k,), "last_seen" int64 (k,), default now. Without state the optimizer begins afresh. Rows that the file lacks stay.
        Raises StorageError when the file is missing, torn or of another shape; rows that were read before that was found are
        written already.
        """
        written = 0
        with self._still():
            for saved in read_rows(Path(path), self.spec):
                rows = np.concatenate([saved.values, saved.state], axis=1)
                written += self.put(WholeRows(saved.ids, saved.last_seen, rows, saved.counts), saved.step)
        return written

    def put(self, rows: WholeRows, step: int) -> int:
        """Write whole rows over those of the table, whose step becomes `step` where it is below; returns how many."""
        batch = self.batch(rows.ids)
        order = np.empty(len(batch.distinct), np.int64)
        order[batch.inverse] = np.arange(len(batch.ids))
        for i, link in enumerate(self._links):
            mine = order[batch.bounds[i] : batch.bounds[i + 1]]
            for start in range(0, max(len(mine), 1), _limits.PAGE_ROWS):  # where there are none, the step
                some = mine[start : start + _limits.PAGE_ROWS]
                page = join_page(*(column[some] for column in rows))
                link.ask(PagePut(self.number, len(some), step), Done, payload=page)
        return len(batch.distinct)

    def _still(self) -> AbstractContextManager[Any]:
        """Under BSP no commit happens meanwhile."""
        self._session._require_open()
        return self._session._held() if self.spec.is_staged else nullcontext()

    def _ask_all(
        self, message: AnyMessage, answer: type[_M], size: Callable[[_M], int] | None = None
    ) -> list[tuple[_M, np.ndarray]]:
        self._session._require_open()
        return [link.ask(message, answer, size) for link in self._links]

    def __deepcopy__(self, _: dict[int, Any]) -> Table:
        """A copied model looks up the same rows."""
        return self

    def __reduce__(self) -> Any:
        raise UsageError(
            f"Expected table {self.name!r} to stay in its process, got it to be pickled: export() saves its rows."
        )

    def __repr__(self) -> str:
        return f"<Table {self.name!r} dim={self.dim} {self.spec.optimizer} {self.spec.consistency}>"


def as_ids(ids: Any, where: str) -> np.ndarray:
    """Return integers of any dtype and shape as int64 (n,). Raises LayoutError."""
    array = np.asarray(ids)
    if array.dtype.kind not in "iu" and array.size:
        raise LayoutError(
            f"Expected ids that are integers, got {array.dtype} {array.shape} — {where}: hash_ids() takes strings."
        )
    return np.ascontiguousarray(array, np.int64).reshape(-1)


def hash_ids(strings: Any) -> np.ndarray:
    """Return an id for each string: int64, of the shape of what is given. Stable over runs, versions and machines; not for security.

    strings: text or bytes, a sequence or an array of them. Two of n strings share an id with a chance of about n² / 2^65.
    """
    array = np.asarray(strings, object)
    flat = array.reshape(-1).tolist()
    wrong = next((item for item in flat if not isinstance(item, (str, bytes))), None)
    if wrong is not None or None in flat:
        raise LayoutError(f"Expected strings, got {wrong!r}: integers are ids as they are.")
    return _kernels.hash_ids(flat).reshape(array.shape)


def _rows_in(room: np.ndarray, count: int, dim: int) -> np.ndarray:
    return room[rows_at(count) : batch_bytes(count, dim)].view(np.float32).reshape(count, dim)
