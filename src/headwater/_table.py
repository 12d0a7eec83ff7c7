"""The tables of one server: rows by id, each with its own optimizer step.

A push to a table of an ASP or SSP job is applied when it arrives, as one unit, at most once: it is named (identity, table, sequence).
Under BSP it is *staged*, by the step that it belongs to, until the coordinator says which steps the commit holds (`Gather`)
and that it is the state (`Flip`). Then each touched row makes one step with Σ wᵢ·gᵢ / Σ wᵢ over the commit's pushes, in their
order; a push without a gradient for the row counts as zero. Until then nothing has happened.

Who may touch what: a worker's room is the worker's but between its request and the answer. `Tables.lock` guards the desks and
what is staged and has counted, a table's own lock its step number and the order of its pushes; the rows guard themselves. Within a table's
lock that of `Tables` may be taken, never the other way round.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np

from headwater import _kernels, _limits
from headwater._errors import (
    HeadwaterError,
    HostError,
    NonFiniteError,
    PeerLostError,
    ProtocolError,
    SettingError,
    StorageError,
    UsageError,
)
from headwater._memory import SharedBuffer, zeroed
from headwater._messages import (
    AnyMessage,
    Attached,
    Changed,
    ChangesGet,
    Detach,
    Done,
    Flip,
    Gather,
    OpenTable,
    Page,
    PageGet,
    PagePut,
    Prepared,
    PulledRows,
    PullRows,
    PushRows,
    Room,
    TableStats,
    TableStatsGet,
    Track,
    WarmRows,
)
from headwater._rows import WholeRows, batch_bytes, buckets_of, join_page, page_bytes, rows_at, split_page, too_many

_W = TypeVar("_W")
_WORTH_KNOWING = 1024  # ids, from which on it pays to remember where their rows lie


class Part(NamedTuple):
    """What one push has for some rows of a table."""

    ids: np.ndarray  # int64 (n,), distinct
    gradients: np.ndarray  # float32 (n, dim)
    scalars: tuple[float, ...]
    numbers: np.ndarray | None = None  # uint32 (n,): where a pull has found the rows


class Rows:
    """One table's rows here. It can be shared between threads."""

    def __init__(self, request: OpenTable, *, threads: int, level: str) -> None:
        self.spec, policy = request.spec, request.spec.policy
        self.step = 0
        self._threads, self._level = threads, level
        self.lock = threading.Lock()  # what holds it keeps rows as they are
        self._checked: tuple[float, ...] | None = None  # scalars found valid last
        with self._host():
            self.kernel = _kernels.Table(
                self.spec.dim, self.spec.optimizer.kind, self.spec.initial_state,
                seed=self.spec.seed, initial=self.spec.initial.kind, scale=self.spec.initial.scale,
                admit_after=policy.admit_after, expire_steps=policy.expire_steps or 0, expire_s=policy.expire_s or 0.0,
                decay=policy.decay, budget_bytes=(policy.budget_bytes or 0) // request.count,
                when_full=policy.when_full, evict=policy.evict, spill_folder=policy.spill_folder or "",
                buckets=buckets_of(request.index, request.count), threads=threads, level=level,
            )  # fmt: skip
            self.rows_max = self.kernel.stats()["rows_max"]  # 0: no budget

    @contextmanager
    def _host(self) -> Iterator[None]:
        """Tell what the caller, the disk and the memory are at fault for."""
        where = f"table {self.spec.name!r}"
        try:
            yield
        except HeadwaterError:
            raise
        except ValueError as error:
            raise SettingError(f"{str(error).rstrip('.')} — {where}.") from error
        except OSError as error:
            raise StorageError(
                f"Cannot spill or load rows: {error} — {where}, {self.spec.policy.spill_folder}."
            ) from error
        except MemoryError as error:
            raise HostError(
                f"Expected memory for more rows, got none — {where}: set budget_bytes in its policy."
            ) from error

    def pull(self, ids: np.ndarray, out: np.ndarray, *, touch: bool, numbers: np.ndarray | None = None) -> int:
        """Set out, float32 (n, dim), to the rows of ids; returns how many have none. numbers: uint32 (n,), set to where the rows lie."""
        with self._host():
            return len(ids) - self.kernel.pull(ids, out, touch=touch, now=time.time(), numbers=numbers)

    def warm(self, ids: np.ndarray) -> None:
        """Begin to bring spilled rows into memory, where any can be."""
        if self.spec.policy.when_full == "spill":
            self.kernel.prefetch(ids)

    def check(self, part: Part) -> None:
        """Raise NonFiniteError, or SettingError for more ids than the budget holds or scalars that the optimizer does not take."""
        ids, gradients, scalars, _ = part
        bad = _kernels.find_bad(gradients, threads=self._threads)
        if bad >= 0:
            row, position = divmod(bad, self.spec.dim)
            raise NonFiniteError(
                f"Expected finite gradients, got NaN or infinity for id {ids[row]} at position {position} — "
                f"table {self.spec.name!r}. Nothing of this push counts; lower the learning rate, clip, or skip the step."
            )
        if 0 < self.rows_max < len(ids):
            raise SettingError(too_many(len(ids), self.rows_max, self.spec))
        if scalars != self._checked:
            names = self.spec.optimizer.scalar_names
            if len(scalars) != len(names):
                raise SettingError(f"Expected {', '.join(names)}, got {scalars} — table {self.spec.name!r}.")
            self.spec.optimizer.check(dict(zip(names, scalars, strict=True)))
            self._checked = scalars

    def push(
        self,
        part: Part,
        *,
        now: float | None = None,
        pieces: int = 1,
        is_new: Callable[[], bool] = lambda: True,
        note: Callable[[float], _W] | None = None,
    ) -> _W | None:
        """Let each row make one step. On a StorageError or SettingError nothing has changed, or some of the pieces.

        is_new: asked when nobody else can push; False: nothing is to change. note: called in the order of application, with the time, and
        whether or not it was new; what it returns is returned.
        """
        optimizer = self.spec.optimizer
        with self.lock, self._host():
            now, step = time.time() if now is None else now, self.step + 1
            if is_new():
                row = np.array(optimizer.row(dict(zip(optimizer.scalar_names, part.scalars, strict=True)), step))
                for ids, gradients in zip(
                    np.array_split(part.ids, pieces), np.array_split(part.gradients, pieces), strict=True
                ):
                    numbers = part.numbers if pieces == 1 else None
                    self.kernel.push(ids, gradients, row, step=step, now=now, numbers=numbers)
                self.step = step
                self.kernel.sweep(step=step, now=now)
            return note(now) if note is not None else None

    def mean(self, parts: Sequence[Part], shares: Sequence[float]) -> Part:
        """Return Σ shares·gradients for every row that any part has."""
        whole = parts[0]
        if len(parts) > 1 or shares[0] != 1.0:
            ids = np.concatenate([part.ids for part in parts])
            distinct, _, inverse = _kernels.unique(ids)
            total = np.empty((len(distinct), self.spec.dim), np.float32)
            weights = np.repeat(np.array(shares, np.float32), [len(part.ids) for part in parts])
            gradients = np.concatenate([part.gradients for part in parts])
            _kernels.sum_rows(gradients, inverse, total, weights=weights, threads=self._threads, level=self._level)
            whole = Part(distinct, total, whole.scalars)
        return whole

    def commit(self, whole: Part, now: float | None = None) -> None:
        """Make one step of a mean."""
        # Each push fits the budget, all of them together need not.
        pieces = -(-len(whole.ids) // self.rows_max) if self.rows_max else 1
        self.push(whole, now=now, pieces=max(pieces, 1))

    def begin(self, step: int) -> None:
        """Be at a step, before rows are put back."""
        self.step = step

    def restore(self, rows: WholeRows) -> None:
        """Put back rows that were saved at this step."""
        with self.lock, self._host():
            for i in range(0, len(rows.ids), _limits.PAGE_ROWS):
                ids, last_seen, values, counts = (column[i : i + _limits.PAGE_ROWS] for column in rows)
                self.kernel.put(ids, values, counts, last_seen, step=max(self.step, 1), now=time.time())

    def changes_since(self, consumer: str) -> Iterator[RowChanges]:
        """Yield all that has changed since the consumer last asked, piece by piece; the first time that is everything."""
        more = True
        while more:
            with self._host():
                ids, rows, counts, last_seen, deleted, _, restart, more = self.kernel.changes(
                    consumer, _limits.PAGE_ROWS
                )
            yield RowChanges(deleted, WholeRows(ids, last_seen, rows, counts), restart)

    def put(self, request: PagePut, page: np.ndarray, note: Callable[[float], _W] | None = None) -> _W | None:
        """Write a page of whole rows. note: as with `push`."""
        ids, last_seen, rows, counts = split_page(page, request.count, self.spec.width)
        with self.lock, self._host():
            self.step, now = max(self.step, request.step), time.time()
            seen_now = self.step if self.spec.policy.expire_s is None else int(now)
            last_seen = np.where(last_seen < 0, seen_now, last_seen)
            self.kernel.put(ids, rows, counts, last_seen, step=max(self.step, 1), now=now)
            return note(now) if note is not None else None

    def page(self, request: PageGet) -> Answer:
        """Return the next rows."""
        with self._host():
            ids, rows, counts, last_seen, cursor = self.kernel.export(request.cursor, request.limit)
        return Answer(Page(len(ids), cursor, self.step), join_page(ids, last_seen, rows, counts))

    def track(self, request: Track) -> None:
        """Begin or end a delta stream."""
        with self._host():
            (self.kernel.track if request.begin else self.kernel.untrack)(request.consumer)

    def changes(self, request: ChangesGet) -> Answer:
        """Return what has changed since the consumer last asked."""
        with self._host():
            ids, rows, _, _, deleted, step, restart, more = self.kernel.changes(request.consumer, request.limit)
        columns = rows if request.state else rows[:, : self.spec.dim]
        return Answer(Changed(len(ids), len(deleted), restart, more, step), join_page(ids, deleted, columns))

    def stats(self) -> TableStats:
        """Return what this server has of the table."""
        found = {**self.kernel.stats(), "step": self.step}
        return TableStats(*(found[name] for name in TableStats.__struct_fields__))


class RowChanges(NamedTuple):
    """What has changed of a table."""

    deleted: np.ndarray  # int64 (m,)
    rows: WholeRows
    restart: bool  # everything before this is to be dropped


class Pushed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A push that counts at once, as it is written down."""

    identity: int
    table: int
    sequence: int
    scalars: tuple[float, ...]
    now: float


class Note(Protocol):
    """Writes down what is about to be acknowledged, in the order of application; returns what waits until that survives."""

    def __call__(self, record: Pushed | PagePut, arrays: Sequence[np.ndarray]) -> Callable[[], None]: ...


class Answer(NamedTuple):
    """What to send back."""

    message: AnyMessage
    payload: memoryview | None = None
    fds: tuple[int, ...] = ()  # the desk keeps them


class Rooms:
    """One peer's rooms: memory in which its batches lie, shared with it where it can be. Used by its connection's thread."""

    def __init__(self) -> None:
        self.give_up_rooms()

    def give_up_rooms(self) -> None:
        """Free the memory; what the worker has mapped stays its own."""
        self._rooms: dict[int, np.ndarray] = {}
        self._shared: dict[int, SharedBuffer] = {}  # those that the worker maps too
        self._payload: np.ndarray | None = None  # what came with the request

    def place(self, message: AnyMessage, size: int, expected: int, *, room: int = -1, limit: int = 0) -> memoryview:
        """Say where the request's payload of `size` bytes goes: into a room, or memory of up to `limit` bytes. Raises ProtocolError
        where none, or another, is expected."""
        if room in self._rooms and room not in self._shared:
            limit = self._rooms[room].nbytes
        if size != expected or size > limit:
            raise ProtocolError(f"Expected {min(expected, limit)} bytes with {type(message).__name__}, got {size}.")
        self._payload = np.empty(size, np.uint8) if room < 0 else self._rooms[room][:size]
        return memoryview(self._payload)

    def take_payload(self) -> np.ndarray | None:
        """Return what came with the request."""
        payload, self._payload = self._payload, None
        return payload

    def pull(self, request: PullRows, payload: np.ndarray | None, dim: int, pull: Callable[..., int]) -> Answer:
        """Let pull(ids, out) write the rows into the room and return how many ids have none."""
        out = self._rows(request.room, request.count, dim)
        missing = pull(self._ids(request, request.room, payload), out)
        raw = None if request.room in self._shared else memoryview(out.reshape(-1).view(np.uint8))
        return Answer(PulledRows(missing), raw)

    def make_room(self, request: Room, *, can_share: bool) -> Answer:
        """Make room of the size that is asked for, in place of what this room was."""
        if not 0 <= request.room <= _limits.TABLES or not 0 < request.size <= _limits.ROOM_BYTES:
            raise ProtocolError(f"Expected a room of up to {_limits.ROOM_BYTES} bytes, got {request}.")
        self._shared.pop(request.room, None)
        try:
            if not (request.share and can_share):
                self._rooms[request.room] = zeroed(request.size)
                return Answer(Attached(0))
            buffer = self._shared[request.room] = SharedBuffer(request.size, "rows")
        except (OSError, MemoryError) as error:
            raise HostError(
                f"Expected memory for a batch of {request.size} bytes, got: {error}. Use smaller ones."
            ) from error
        self._rooms[request.room] = buffer.array
        return Answer(Attached(1), None, (buffer.fd,))

    def _ids(self, request: PullRows | WarmRows | PushRows, room: int, payload: np.ndarray | None) -> np.ndarray:
        """Return the ids of a batch, which must have come as it was agreed."""
        if (payload is None) != (room in self._shared or request.count == 0):
            raise ProtocolError(
                "Expected a batch to come as it was agreed with Room: in shared memory, or as a payload."
            )
        return self.piece(room, 0, 8 * request.count).view(np.int64)

    def _rows(self, room: int, count: int, dim: int) -> np.ndarray:
        """Return the rows of a batch, float32 (count, dim)."""
        return self.piece(room, rows_at(count), batch_bytes(count, dim)).view(np.float32).reshape(count, dim)

    def piece(self, room: int, start: int, stop: int) -> np.ndarray:
        """Return so much of a room, uint8. Raises ProtocolError where it has not got that."""
        found = self._rooms.get(room)
        if found is None or not 0 <= start <= stop <= found.nbytes:
            raise ProtocolError(f"Expected a batch that fits its room, got {stop} bytes for room {room}.")
        return found[start:stop]


class _Staged(NamedTuple):
    table: int
    step: int
    part: Part


class Tables:
    """All tables of one server. It can be shared between threads."""

    def __init__(self, *, threads: int, level: str) -> None:
        self._threads, self._level = threads, level
        self.lock = threading.Lock()
        self.tables: dict[int, Rows] = {}
        self.note: Note | None = None
        self.is_over = False  # the server went back: others have taken their place
        self.sequences: dict[tuple[int, int], int] = {}  # by identity and table, of the last push that counted at once
        self._waits: dict[tuple[int, int], Callable[[], None]] = {}  # likewise, what waits until that survives
        self._unwritten: set[tuple[int, int]] = set()  # likewise, those that could not be written down
        self._desks: dict[int, Desk] = {}  # by identity
        self._gathered: tuple[Gather, list[tuple[int, Part]], float] | None = None

    # What the coordinator says.

    def handle(self, request: AnyMessage) -> AnyMessage | None:
        """Carry out what concerns tables; None where the dense state has the answer."""
        match request:
            case OpenTable():
                self.tables[request.table] = Rows(request, threads=self._threads, level=self._level)
                return Done()
            case Gather():
                return self._gather(request)
            case Flip():
                self._flip()
            case Detach():
                self._detach(request.identity)
        return None

    def _gather(self, request: Gather) -> Prepared:
        """Collect what these steps have staged; one whose scalars differ from those before it is named."""
        found: dict[int, list[tuple[Part, float]]] = {}
        with self.lock:
            self._gathered = None
            for i, (identity, step, share) in enumerate(request.pushes):
                desk = self._desks.get(identity)
                if desk is None or share <= 0.0:
                    continue
                for staged in desk.staged:
                    if staged.step != step:
                        continue
                    parts = found.setdefault(staged.table, [])
                    if parts and parts[0][0].scalars != staged.part.scalars:
                        return Prepared((0, i, -2, staged.table))
                    parts.append((staged.part, share))
            means = [
                (table, self.tables[table].mean(*zip(*parts, strict=True))) for table, parts in sorted(found.items())
            ]
            self._gathered = request, means, time.time()
        return Prepared()

    def gather_again(self, means: list[tuple[int, Part]], now: float) -> None:
        """Let these means count with the next flip."""
        with self.lock:
            self._gathered = Gather(()), means, now

    def drop_gathered(self) -> None:
        """Nothing counts with the next flip."""
        with self.lock:
            self._gathered = None

    def gathered(self) -> tuple[list[tuple[int, Part]], float]:
        """Return what counts with the next flip, by table, and its time."""
        with self.lock:
            return ([], 0.0) if self._gathered is None else self._gathered[1:]

    def _flip(self) -> None:
        """Let what was gathered count, and forget what was staged up to these steps."""
        with self.lock:
            gathered, self._gathered = self._gathered, None
            if gathered is None:
                return
            for identity, step, _ in gathered[0].pushes:
                desk = self._desks.get(identity)
                if desk is not None:
                    desk.staged = [staged for staged in desk.staged if staged.step > step]
        for table, whole in gathered[1]:
            self.tables[table].commit(whole, gathered[2])

    def _detach(self, identity: int) -> None:
        """A worker is gone: what it has staged counts nowhere, and nothing more is taken from it."""
        with self.lock:
            desk = self._desks.pop(identity, None)
            if desk is not None:
                desk.is_gone = True
                desk.staged = []

    # What workers say.

    def desk(self, identity: int) -> Desk:
        """Return where a worker is served, on the one connection that it has for it; a later connection takes its place."""
        with self.lock:
            before = self._desks.get(identity)
            desk = self._desks[identity] = Desk(self, identity)
            if before is not None:
                before.is_gone = True
            return desk

    @contextmanager
    def still(self) -> Iterator[None]:
        """Keep all rows as they are, and what is written down of them."""
        with ExitStack() as stack:
            for _, rows in sorted(self.tables.items()):
                stack.enter_context(rows.lock)
            yield

    def write_down(self, record: Pushed | PagePut, arrays: Sequence[np.ndarray]) -> Callable[[], None] | None:
        """Write down what is about to be acknowledged, under its table's lock; returns what waits until it survives."""
        if self.is_over:
            raise _left()
        return None if self.note is None else self.note(record, arrays)

    def has_counted(self, identity: int, table: int, sequence: int) -> bool:
        """Whether a push that counts at once has done so. The longest silent workers are forgotten."""
        return sequence <= self.sequences.get((identity, table), -1)

    def count(
        self, identity: int, table: int, sequence: int, write: Callable[[], Callable[[], None] | None] = lambda: None
    ) -> Callable[[], None] | None:
        """Note, under its table's lock, that a push has counted, and write it down; returns what waits until it survives, as `write` does.

        One that had counted is said again, for its answer was lost: it is written down if that failed, and waited for as the first time.
        """
        key = identity, table
        if self.has_counted(identity, table, sequence) and key not in self._unwritten:
            return self._waits.get(key)
        with self.lock:
            self.sequences.pop(key, None)
            self.sequences[key] = sequence
            while len(self.sequences) > _limits.SEQUENCES:
                oldest = next(iter(self.sequences))
                del self.sequences[oldest]
                self._waits.pop(oldest, None)
                self._unwritten.discard(oldest)
        self._unwritten.add(key)
        wait = write()
        self._unwritten.discard(key)
        if wait is not None:
            self._waits[key] = wait
        return wait

    def close(self) -> None:
        """Take nothing more from anybody: others are in their place."""
        with self.lock:
            for desk in self._desks.values():
                desk.is_gone = True

    def leave(self, desk: Desk) -> None:
        """The worker's connection has ended. What belongs to a step that it sealed still counts."""
        with self.lock:
            desk.give_up_rooms()
            if not desk.staged and self._desks.get(desk.identity) is desk:
                del self._desks[desk.identity]
        desk.end_streams()


class Desk(Rooms):
    """One worker's rooms and pushes; used by its connection's thread."""

    def __init__(self, tables: Tables, identity: int) -> None:
        super().__init__()
        self._tables, self.identity = tables, identity
        self.is_gone = False
        self.staged: list[_Staged] = []
        self._sequences: dict[int, int] = {}  # of the last push that was staged, by table
        self._streams: set[tuple[int, str]] = set()  # that end with this connection: table, consumer
        # By table, where the rows of the last two pulls lie, for two are under way where one is prefetched.
        self._found: dict[int, deque[tuple[tuple[int, bytes], np.ndarray]]] = {}

    def sink(self, message: AnyMessage, size: int) -> memoryview:
        """Say where a request's payload of `size` bytes goes. Raises ProtocolError where none, or another, is expected."""
        expected, limit, room = 0, 0, -1
        match message:
            case PullRows() | WarmRows():
                expected, room = 8 * message.count, message.room
            case PushRows():
                expected, room = batch_bytes(message.count, self._table(message.table).spec.dim), 0
            case PagePut():
                expected, limit = page_bytes(message.count, self._table(message.table).spec.width), _limits.PAGE_BYTES
        return self.place(message, size, expected, room=room, limit=limit)

    def handle(self, request: AnyMessage, *, can_share: bool) -> Answer:
        """Carry out a worker's request."""
        payload = self.take_payload()
        if self._tables.is_over:
            raise _left()
        answer = Answer(Done())
        match request:
            case PullRows():
                rows = self._table(request.table)
                answer = self.pull(request, payload, rows.spec.dim, partial(self._pull, request, rows))
            case PushRows():
                self._push(request, payload)
            case WarmRows():
                self._table(request.table).warm(self._ids(request, request.room, payload))
            case Room():
                answer = self.make_room(request, can_share=can_share)
            case PageGet():
                answer = self._table(request.table).page(request)
            case PagePut():
                if payload is None and request.count:
                    raise ProtocolError("Expected PagePut with a payload, got none.")
                page = np.empty(0, np.uint8) if payload is None else payload
                wait = self._table(request.table).put(
                    request, page, lambda _: self._tables.write_down(request, (page,))
                )
                if wait is not None:
                    wait()
            case ChangesGet():
                answer = self._table(request.table).changes(request)
            case Track():
                self._table(request.table).track(request)
                self._streams.discard((request.table, request.consumer))
                if request.ends:
                    self._streams.add((request.table, request.consumer))
            case TableStatsGet():
                answer = Answer(self._table(request.table).stats())
            case _:
                raise ProtocolError(f"Expected a request about tables, got {type(request).__name__}.")
        return answer

    def end_streams(self) -> None:
        """Note nothing any more for those whose connection has ended."""
        for table, consumer in self._streams:
            with suppress(SettingError, PeerLostError):  # it was ended before, or the table is no more
                self._table(table).track(Track(table, consumer, False))

    def _pull(self, request: PullRows, rows: Rows, ids: np.ndarray, out: np.ndarray) -> int:
        """Pull, and remember where rows lie when they are likely to be pushed: finding them is half of a push's work."""
        if rows.spec.is_staged or not request.touch or len(ids) < _WORTH_KNOWING:
            return rows.pull(ids, out, touch=request.touch)
        numbers = np.empty(len(ids), np.uint32)
        missing = rows.pull(ids, out, touch=True, numbers=numbers)
        self._found.setdefault(request.table, deque(maxlen=2)).append((_sample(ids), numbers))
        return missing

    def _push(self, request: PushRows, payload: np.ndarray | None) -> None:
        rows = self._table(request.table)
        ids = self._ids(request, 0, payload)
        found = dict(self._found.get(request.table, ()))
        numbers = found.get(_sample(ids)) if found and len(ids) >= _WORTH_KNOWING else None
        part = Part(ids, self._rows(0, request.count, rows.spec.dim), request.scalars, numbers)
        rows.check(part)
        if rows.spec.is_staged:
            self._stage(request, part, rows)
            return

        def is_new() -> bool:  # what is under way on a connection that has ended may be said again on another
            if self.is_gone:
                raise _left()
            return not self._tables.has_counted(self.identity, request.table, request.sequence)

        def note(now: float) -> Callable[[], None] | None:
            record = Pushed(self.identity, request.table, request.sequence, part.scalars, now)
            write = partial(self._tables.write_down, record, (part.ids, part.gradients))
            return self._tables.count(self.identity, request.table, request.sequence, write)

        wait = rows.push(part, is_new=is_new, note=note)
        if wait is not None:
            wait()

    def _stage(self, request: PushRows, part: Part, rows: Rows) -> None:
        with self._tables.lock:
            if self.is_gone:
                raise _left()
            if request.sequence <= self._sequences.get(request.table, -1):
                return
            if len(self.staged) >= _limits.STAGED_PUSHES:
                raise UsageError(
                    f"Expected a step after at most {_limits.STAGED_PUSHES} pushes to tables, got none: under BSP they count "
                    f"with session.step() or optimizer.step(); or declare table {rows.spec.name!r} with hw.asp()."
                )
            part = Part(part.ids.copy(), part.gradients.copy(), part.scalars)
            self.staged.append(_Staged(request.table, request.step, part))
            self._sequences[request.table] = request.sequence

    def _table(self, number: int) -> Rows:
        rows = self._tables.tables.get(number)
        if rows is None:
            raise PeerLostError(f"Expected a table that is declared, got number {number}: declare it again.")
        return rows


def _sample(ids: np.ndarray) -> tuple[int, bytes]:
    """Return what most likely differs for other ids; where it does not, looking them up takes longer and finds the same."""
    return len(ids), ids[:: len(ids) // 16].tobytes()


def _left() -> PeerLostError:
    return PeerLostError(
        "Expected a request from a worker of this job as it is now, got one from a worker that has left it, or that does not know "
        "yet that a server was lost: connect again."
    )
