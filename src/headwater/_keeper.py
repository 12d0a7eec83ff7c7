"""What one server keeps in the store: the log of its commits, and its part of snapshots; and how it comes back from them.

A record of the log is what the commit did here: the sum of its gradients, in the master dtype, with the step's scalars; the
mean gradients of its rows; and the change of the book. Applying it again gives the same bits. Pushes to tables that count at once
have records of their own, named (identity, table, sequence), so that none is applied twice.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import msgspec
import numpy as np

from headwater._book import Book, Change
from headwater._dense import Pinned, Shard
from headwater._errors import HeadwaterError, InternalError, SettingError, warn
from headwater._files import Files, open_files
from headwater._log import Entry, Log, LogEnd, LogReader, begin_of
from headwater._messages import (
    AnyMessage,
    Assign,
    Done,
    OpenTable,
    PagePut,
    Persist,
    Pin,
    Recall,
    Recalled,
    Restore,
    Restored,
    SnapshotBegin,
    SnapshotGet,
    SnapshotState,
    Unpin,
)
from headwater._snapshot import File, Manifest, TableWriter, find, open_manifest, read_dense, read_table, write_dense
from headwater._snapshots import Snapshots, decode_book
from headwater._table import Part, Pushed, RowChanges, Rows
from headwater.durability import Durability

_CONSUMER = "\0snapshot"  # of the tables' delta streams
_ROUNDS = 8  # of changes, before the rest is taken between two commits however much it is
_FEW_ROWS = 1 << 15  # that are left to Pin


class Step(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A commit, or several that were applied in one pass.

    Blobs: the summed gradient of each spec and slice; ids and gradients of each table.
    """

    change: Change
    specs: tuple[tuple[bytes, tuple[tuple[float, ...], ...]], ...]  # cells, and the scalars of each
    tables: tuple[tuple[int, tuple[float, ...], float], ...]  # table, scalars, time


class Rest(msgspec.Struct, frozen=True):
    """What a server's part of a snapshot has besides files."""

    steps: tuple[int, ...] = ()  # of its tables
    sequences: tuple[tuple[int, int, int], ...] = ()  # identity, table, of the last push that counted


_records = msgspec.msgpack.Decoder(Step | Pushed | PagePut)


class Keeper:
    """Keeps one shard. Its requests come from the coordinator, one at a time; `note` from any thread."""

    def __init__(self, shard: Shard, files: Files, path: str, *, has_log: bool) -> None:
        self._shard, self._files, self._path, self._has_log = shard, files, path, has_log
        self._log: Log | None = None
        self._index = 0
        self._writing: _Writing | None = None
        shard.tables.note = self.note if has_log else None

    def handle(self, request: AnyMessage) -> AnyMessage | None:
        """Carry out what concerns the store; None where the shard has the answer."""
        match request:
            case Recall():
                return self._recall(request)
            case Restore():
                return self._restore(request)
            case Persist():
                return self._persist(request)
            case SnapshotBegin():
                self._writing = _Writing(self._shard, self._files, request.folder, self._index)
                return Done()
            case Pin():
                assert self._writing is not None
                self._writing.pin(self._log)
                return Done()
            case SnapshotGet():
                assert self._writing is not None
                return self._writing.state()
            case Unpin():
                if self._writing is not None:
                    self._writing.end()
                    self._writing = None
                if self._log is not None and request.commit >= 0:
                    self._log.drop_before(request.commit)
                return Done()
        return None

    # Coming back.

    def _manifest(self, snapshot: str) -> Manifest:
        return open_manifest(self._files, f"{self._path}/{snapshot}")

    def _recall(self, request: Recall) -> Recalled:
        """Find how far the log goes on from a snapshot."""
        self._close_log()
        book = decode_book(self._manifest(request.snapshot).book)
        found, _ = self._records(request.index, book)
        commits = [record.change.commit for record, _ in found if isinstance(record, Step)]
        return Recalled(max(commits, default=book.commit))

    def _records(self, index: int, book: Book) -> tuple[list[tuple[Step | Pushed | PagePut, Entry]], LogEnd]:
        """Return the records that go on from a snapshot, and where the log ends.

        A file begins where the state was when it was made: commits beyond that in the files before it were given up.
        """
        found: list[tuple[Step | Pushed | PagePut, Entry]] = []
        reader = LogReader(self._files, self._path, index, book.commit)
        begin = -1
        for entry in reader:
            record = _records.decode(entry.head)
            if begin_of(entry.file) != begin:
                begin = begin_of(entry.file)
                found = [each for each in found if not isinstance(each[0], Step) or each[0].change.commit <= begin]
            if not isinstance(record, Step) or record.change.serial > book.serial:
                found.append((record, entry))
        return found, reader.end

    def _restore(self, request: Restore) -> Restored:
        """Become what the store holds, and go on from there."""
        book, end = self.come_back(request)
        if self._has_log:
            self._log = Log(self._files, self._path, request.index, request.commit, end)
        return Restored(b"" if book is None else msgspec.msgpack.encode(book))

    def come_back(self, request: Restore) -> tuple[Book | None, LogEnd | None]:
        """Become what the store holds; returns the book that belongs to it, None where there was nothing, and where the log ends."""
        self._close_log()
        end = None
        shard = self._shard
        book: Book | None = None
        shard.forget()
        if request.snapshot:
            manifest, folder = self._manifest(request.snapshot), f"{self._path}/{request.snapshot}"
            book = decode_book(manifest.book)
            if book.tensors is not None and book.optimizer is not None:
                shard.handle(Assign(book.tensors, book.optimizer, request.index, request.count, book.consistency))
                read_dense(self._files, folder, manifest, shard.part, shard.master_planes())
                shard.loaded(manifest.commit)
            rests = [msgspec.msgpack.decode(part, type=Rest) for part in manifest.parts]
            for number, spec in enumerate(book.tables):
                shard.handle(OpenTable(number, spec, request.index, request.count))
                rows = shard.tables.tables[number]
                rows.begin(max((rest.steps[number] for rest in rests), default=0))
                for some in read_table(self._files, folder, manifest, number, request.index, request.count):
                    rows.restore(some)
            for rest in rests:
                shard.tables.sequences.update({(i, t): s for i, t, s in rest.sequences})
            if self._has_log and request.count == manifest.servers:
                records, end = self._records(request.index, book)
                book = self._replay(book, records, request.commit)
                if end.torn:
                    warn(
                        f"the log ends at byte {end.offset} of {end.file}: {end.torn}; nothing acknowledged is missing"
                    )
        self._index = request.index
        return book, end

    def _replay(self, book: Book, records: Iterable[tuple[Step | Pushed | PagePut, Entry]], limit: int) -> Book:
        """Apply commits up to this one again, and all that tables have acknowledged."""
        shard = self._shard
        for record, entry in records:
            if isinstance(record, Step) and record.change.commit > limit:
                continue
            blobs = entry.blobs()
            match record:
                case Step():
                    blobs = shard.replay(record.change.commit, record.specs, blobs)
                    for (table, scalars, now), ids, gradients in zip(
                        record.tables, blobs[::2], blobs[1::2], strict=True
                    ):
                        rows = shard.tables.tables[table]
                        rows.commit(Part(ids.view(np.int64), _matrix(gradients, rows), scalars), now)
                    book = book.after(record.change)
                case Pushed():
                    if shard.tables.has_counted(record.identity, record.table, record.sequence):
                        continue
                    rows = shard.tables.tables[record.table]
                    rows.push(Part(blobs[0].view(np.int64), _matrix(blobs[1], rows), record.scalars), now=record.now)
                    shard.tables.count(record.identity, record.table, record.sequence)
                case PagePut():
                    shard.tables.tables[record.table].put(record, blobs[0])
        return book

    # Writing down.

    def _persist(self, request: Persist) -> Done:
        """Write down what is prepared and gathered; returns when it survives."""
        specs, sums = self._shard.prepared_sums()
        parts, now = self._shard.tables.gathered()
        step = Step(
            request.change,
            tuple((spec.cells, spec.rows) for spec in specs),
            tuple((table, part.scalars, now) for table, part in parts),
        )
        arrays = [*sums, *(array for _, part in parts for array in (part.ids, part.gradients))]
        self._write(step, arrays)()
        return Done()

    def note(self, record: Pushed | PagePut, arrays: Sequence[np.ndarray]) -> Callable[[], None]:
        """Write down what a table is about to acknowledge, in the order of application; returns what waits until it survives."""
        return self._write(record, arrays)

    def _write(self, record: Step | Pushed | PagePut, arrays: Sequence[np.ndarray]) -> Callable[[], None]:
        log = self._log
        if log is None:
            raise InternalError("Expected a log to write to, got none.")
        blobs = [memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)) for array in arrays]
        ticket = log.append(msgspec.msgpack.encode(record), blobs)
        return lambda: log.sync(ticket)

    def _close_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            log.close()

    def close(self) -> None:
        """Write no more."""
        if self._writing is not None:
            self._writing.end()
        self._close_log()


def open_store(store: str, index: int, *, resumes: bool) -> tuple[Files, str]:
    """Return the store as one server sees it. Raises SettingError where there is none, or a job lies there that is not to go on."""
    if not store:
        raise SettingError("Expected a store for a durable job, got none: give it a folder.")
    files, path = open_files(store)
    files.make_folder(path)
    if not resumes and (find(files, path) or any(name.startswith(f"log-{index}-") for name in files.list(path))):
        raise SettingError(f"Expected an empty store, got a job in {store}: resume it, or give another folder.")
    return files, path


class _Folded:
    """Servers in this process that come back from a store."""

    def __init__(self, files: Files, path: str, name: str) -> None:
        count = open_manifest(files, f"{path}/{name}").servers
        shards = [Shard(threads=len(os.sched_getaffinity(0))) for _ in range(count)]
        self._keepers = [Keeper(shard, files, path, has_log=True) for shard in shards]
        recalled = self._ask_each(lambda i: Recall(name, i))
        commit = min(answer.commit for answer in recalled if isinstance(answer, Recalled))
        for i, keeper in enumerate(self._keepers):
            book, _ = keeper.come_back(Restore(name, commit, i, count))
            shards[i].keeper = keeper
        assert book is not None
        self._book = book

    def _ask_each(self, message: Callable[[int], AnyMessage]) -> list[AnyMessage]:
        answers = [keeper.handle(message(i)) for i, keeper in enumerate(self._keepers)]
        return [answer for answer in answers if answer is not None]

    @contextmanager
    def alone(self) -> Iterator[Callable[[Callable[[int], AnyMessage]], list[AnyMessage]]]:
        yield self._ask_each

    def book(self) -> Book:
        return self._book


def fold(files: Files, path: str, name: str) -> str:
    """Make one snapshot of a snapshot and the logs that go on from it; returns its folder. For a job that is not running."""
    snapshots = Snapshots(files, path, Durability("log"), lambda _: None)
    return snapshots.take(_Folded(files, path, name)).path


class _Writing:
    """One snapshot's part being written, by a thread of its own."""

    def __init__(self, shard: Shard, files: Files, folder: str, index: int) -> None:
        self._shard, self._files, self._folder, self._index = shard, files, folder, index
        self._is_due = self._is_whole = self._has_ended = False
        self._error = ""
        self._pinned: Pinned | None = None
        self._is_pinned = threading.Event()
        self._last: dict[int, list[RowChanges]] = {}  # by table, the last changes
        self._rest = Rest()
        self._files_written: list[File] = []
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)
        self._thread.start()

    def state(self) -> SnapshotState:
        """Say how far it is."""
        rest = msgspec.msgpack.encode(self._rest)
        return SnapshotState(self._is_due, self._is_whole, tuple(self._files_written), rest, self._error)

    def pin(self, log: Log | None) -> None:
        """This is the state to write: set it aside."""
        tables = self._shard.tables
        with tables.still():
            self._pinned = self._shard.pin()
            for number, rows in sorted(tables.tables.items()):
                self._last[number] = list(rows.changes_since(_CONSUMER))
            steps = tuple(rows.step for _, rows in sorted(tables.tables.items()))
            self._rest = Rest(steps, tuple((i, t, s) for (i, t), s in tables.sequences.items()))
            if log is not None:
                log.rotate(self._shard.commit)
        self._is_pinned.set()

    def end(self) -> None:
        """Give up, or forget what is written."""
        self._has_ended = True
        self._is_pinned.set()
        self._thread.join()
        if self._pinned is not None:
            self._shard.unpin()

    def _run(self) -> None:
        try:
            writers = {
                number: self._write_rows(number, rows) for number, rows in sorted(self._shard.tables.tables.items())
            }
            self._is_due = True
            self._is_pinned.wait()
            if self._has_ended:
                return
            for number, writer in writers.items():
                changes = self._last.pop(number, [])
                if any(
                    change.restart for change in changes
                ):  # more was deleted than the table remembers: all rows came again
                    writer = self._new_writer(number, self._shard.tables.tables[number])  # noqa: PLW2901
                _add(writer, changes)
                self._files_written += writer.close()
            pinned = self._pinned
            if pinned is not None and pinned.planes:
                self._files_written += write_dense(
                    self._files, self._folder, self._index, self._shard.part, pinned.planes
                )
            self._is_whole = True
        except HeadwaterError as error:
            self._error = str(error)
        except Exception as error:  # noqa: BLE001 - the coordinator says it
            self._error = f"A snapshot failed: {error!r}. Please report this."
        finally:
            for rows in self._shard.tables.tables.values():
                with suppress(ValueError):  # it was not tracked yet
                    rows.kernel.untrack(_CONSUMER)

    def _new_writer(self, number: int, rows: Rows) -> TableWriter:
        return TableWriter(self._files, self._folder, self._index, number, rows.spec)

    def _write_rows(self, number: int, rows: Rows) -> TableWriter:
        """Write a table's rows, and then what has changed meanwhile until that is little."""
        writer = self._new_writer(number, rows)
        rows.kernel.track(_CONSUMER)
        count = _FEW_ROWS + 1
        for _ in range(_ROUNDS):
            if count <= _FEW_ROWS or self._has_ended:
                break
            count = 0
            for change in rows.changes_since(_CONSUMER):
                writer = self._new_writer(number, rows) if change.restart else writer
                _add(writer, [change])
                count += len(change.rows.ids)
        return writer


def _add(writer: TableWriter, changes: Sequence[RowChanges]) -> None:
    for change in changes:
        writer.deleted(change.deleted)
        writer.rows(*change.rows)


def _matrix(raw: np.ndarray, rows: Rows) -> np.ndarray:
    return raw.view(np.float32).reshape(-1, rows.spec.dim)
