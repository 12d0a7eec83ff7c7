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
from functools import partial

import msgspec
import numpy as np

from headwater import _kernels, _limits
from headwater._book import Book, Change
from headwater._dense import Pinned, Shard
from headwater._errors import (
    HeadwaterError,
    HostError,
    PeerLostError,
    ProtocolError,
    SettingError,
    StorageError,
    UnreachableError,
    warn,
)
from headwater._files import Files, RemoteFiles, claim, open_files
from headwater._log import Entry, Log, LogEnd, LogReader, begin_of
from headwater._memory import stack_buffers
from headwater._messages import (
    AnyMessage,
    Apply,
    Assign,
    Attached,
    Done,
    Failed,
    FeedTo,
    Flip,
    Hello,
    OpenTable,
    PagePut,
    Persist,
    Pin,
    Recall,
    Recalled,
    Restore,
    Restored,
    Room,
    ServerAddress,
    SnapshotBegin,
    SnapshotGet,
    SnapshotState,
    Unpin,
)
from headwater._sealed import File
from headwater._snapshot import Manifest, TableWriter, find, open_manifest, read_dense, read_table, write_dense
from headwater._snapshots import Rest, Snapshots, decode_book
from headwater._table import Part, Pushed, Rows, Tables
from headwater._transport import Address, Connection, connect, host_name, request
from headwater.durability import Durability

_CONSUMER = "\0snapshot"  # of the tables' delta streams
_ROUNDS = 8  # of changes, before the rest is written between two commits however much it is
_FEW_ROWS = 1 << 15  # that are left to Pin
_SHRINKS = 0.75  # a round to so much of the one before; else further ones are of no use


class Step(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A commit, or several that were applied in one pass.

    Blobs: the summed gradient of each spec and slice; ids and gradients of each table.
    """

    change: Change
    specs: tuple[tuple[bytes, tuple[tuple[float, ...], ...]], ...]  # cells, and the scalars of each
    tables: tuple[tuple[int, tuple[float, ...], float], ...]  # table, scalars, time


class Back(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To a follower: the job is at this commit, and what goes beyond is given up: another server lacked it."""

    commit: int


_records = msgspec.msgpack.Decoder(Step | Pushed | PagePut)
_fed = msgspec.msgpack.Decoder(Step | Pushed | PagePut | Back)


class Keeper:
    """Keeps one shard. Its requests come from the coordinator, one at a time; `note` from any thread.

    tell_lost: tells the coordinator that the follower of the server with this index has not got all, before more is acknowledged; raises
    where that must not be.
    """

    def __init__(
        self,
        shard: Shard,
        files: Files,
        path: str,
        durability: Durability,
        token: str = "",
        tell_lost: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._shard, self._files, self._path, self._token, self._tell_lost = shard, files, path, token, tell_lost
        self._persists = durability.kind != "snapshot"
        self._has_log, self._is_replicated = durability.kind == "log", durability.kind == "replicated"
        self._log: Log | None = None
        self._index = 0
        self._writing: _Writing | None = None
        # Replicated: what a follower needs to take over.
        self._book: Book | None = None
        self._pending: Change | None = None  # of what is prepared
        self._feed: Feed | None = None  # our follower
        self._next_feed: Feed | None = None  # which begins with the next pinned state
        self._is_closed = self._is_fed_anew = False
        self._leads = False  # it has had commits of its own to keep
        self._is_uncertain = False  # restored from a snapshot, with which the job may not have gone on
        self._queued: list[tuple[bytes, list[np.ndarray]]] | None = []  # what came before the state it goes on from
        self._applying: _Applying | None = None  # the record that it was fed last, if that is not done
        self.life = 0  # rises when what it was fed is of no use any more
        self._turn = threading.Lock()  # of what a follower applies, and of what begins or ends here
        self._take_notes()

    def handle(self, request: AnyMessage) -> AnyMessage | None:
        """Carry out what concerns the store; None where the shard has the answer."""
        if not isinstance(request, (Recall, Restore)):
            self._is_uncertain = False
        match request:
            case Recall():
                return self._recall(request)
            case Restore():
                return self._restore(request)
            case Persist():
                return self._persist(request)
            case SnapshotBegin():
                with self._turn:
                    self._give_up()
                    if self._is_closed:
                        raise PeerLostError("Expected a running server, got one that was closed.")
                    self._writing = _Writing(self._shard, self._files, request.folder, self._index)
                return Done()
            case Pin():
                writing = self._being_written()
                with self._shard.tables.still():  # what is kept from now on goes on from it
                    writing.pin(self._log)
                    before = self._feed
                    if self._is_fed_anew:
                        self._feed, self._next_feed, self._is_fed_anew = self._next_feed, None, False
                if before is not None and before is not self._feed:
                    before.close()
                if self._is_replicated:
                    self._book = decode_book(request.book)
                return Done()
            case FeedTo():
                self._is_fed_anew = True
                if self._next_feed is not None:
                    self._next_feed.close()
                self._next_feed = (
                    None if request.address is None else Feed.to(request.address, self._token, self._lose_follower)
                )
                return Done()
            case Flip() if self._pending is not None and self._book is not None:
                self._book, self._pending = self._book.after(self._pending), None
            case SnapshotGet():
                return self._being_written().state()
            case Unpin():
                self._give_up()
                if self._log is not None and request.commit >= 0:
                    self._log.drop_before(request.commit)
                return Done()
        return None

    def _being_written(self) -> _Writing:
        if self._writing is None:
            raise StorageError("Expected a snapshot that is being written, got none: this server went back meanwhile.")
        return self._writing

    def _give_up(self) -> None:
        """Forget the snapshot that is being written, if one is."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.end()

    # Coming back.

    def _manifest(self, snapshot: str) -> Manifest:
        return open_manifest(self._files, f"{self._path}/{snapshot}")

    def _recall(self, request: Recall) -> Recalled:
        """Find how far the log goes on from a snapshot, or this server from what it has."""
        if not request.snapshot:
            with self._turn, suppress(HeadwaterError):
                self._finish()
            if self._book is None or self._is_uncertain:
                return Recalled(-1)
            return Recalled(self._book.commit if self._pending is None else self._pending.commit, self._book.commit)
        self._stop()
        manifest = self._manifest(request.snapshot)
        book = decode_book(manifest.book)
        found, _ = self._records(request.index, book, _rest(manifest, request.index))
        commits = [record.change.commit for record, _ in found if isinstance(record, Step)]
        return Recalled(max(commits, default=book.commit))

    def _records(
        self, index: int, book: Book, rest: Rest
    ) -> tuple[list[tuple[Step | Pushed | PagePut, Entry]], LogEnd]:
        """Return the records that go on from a snapshot, and where the log ends.

        A file begins where the state was when it was made: commits beyond that in the files before it were given up.
        """
        found: list[tuple[Step | Pushed | PagePut, Entry]] = []
        reader = LogReader(self._files, self._path, index, *(rest.log or (book.commit,)))
        file = ""
        for entry in reader:
            record = _records.decode(entry.head)
            if entry.file != file:
                file = entry.file
                found = _up_to(begin_of(file), found)
            if not isinstance(record, Step) or record.change.serial > book.serial:
                found.append((record, entry))
        if reader.end.file not in ("", file):  # nothing is in the last one yet
            found = _up_to(begin_of(reader.end.file), found)
        return found, reader.end

    def _restore(self, request: Restore) -> Restored:
        """Become what the store holds, or keep what is here, and go on from there."""
        if request.is_warm:
            return self._stay(request)
        book, end = self.come_back(request)
        if book is not None and request.history:
            book = msgspec.structs.replace(book, history=request.history)
        if self._has_log:
            try:
                self._log = Log(self._files, self._path, request.index, request.commit, end, request.count)
            except StorageError as error:  # with which the snapshot has nothing to do: an older one would not help
                raise HostError(str(error)) from error
        if self._is_replicated:
            self._drop_feeds()
            self._pending, self._is_uncertain = None, not request.follows
            with self._turn:
                self._book, queued, self._queued = book, self._queued or [], None
                if not request.follows:
                    queued, self.life = [], self.life + 1  # whoever fed this one is no more
                for head, blobs in queued:
                    self._follow(head, blobs)
        return Restored(b"" if book is None else msgspec.msgpack.encode(book))

    def _stay(self, request: Restore) -> Restored:
        """Be at a commit from what is here: that of the state, or of what is prepared."""
        self._give_up()
        with self._turn:
            self._finish()
            if self._book is None:
                raise PeerLostError(
                    "Expected a server with the state that it had, got one that begins to follow another."
                )
            self._queued, self._leads, self.life = None, True, self.life + 1  # whoever fed this one is no more
            self._settle(request.commit)
            self._index = request.index
        if self._feed is not None:  # before anything is said anew
            self._feed.send(msgspec.msgpack.encode(Back(request.commit)), [])
        return Restored(msgspec.msgpack.encode(self._book))

    def _settle(self, commit: int) -> None:
        """Be at a commit, that of the state or of what is prepared."""
        if self._pending is not None and self._pending.commit > commit:
            self._pending = None
        self._shard.settle(commit)
        self._pending = None

    def _lose_follower(self) -> None:
        if not self._is_closed:
            self._tell_lost(self._index)

    def begin_following(self) -> int:
        """Make ready for the state of another server; returns what its records are known by, 0 where this one leads by now."""
        with self._turn:
            if not self._leads:
                with suppress(HeadwaterError):
                    self._finish()
                self._book = self._pending = None
                self._queued = []
                self.life += 1
            return 0 if self._leads else self.life

    def follow(self, head: bytes, blobs: list[np.ndarray], life: int, *, is_near: bool) -> None:
        """Apply a record of the server that this one follows, or keep it until its state is here.

        On return the record is here, and is applied whatever the leader does; a large one beside what follows, until the next comes: its
        blobs are not to be written before that has returned. is_near: the leader is on this machine, and needs cores meanwhile. life: when
        its connection began. Raises PeerLostError where that is over: the record was under way for long; and what the record
        before it led to.
        """
        with self._turn:
            if self._leads or life != self.life:
                raise PeerLostError("Expected a record of a server that is followed, got one from before.")
            self._finish()
            if self._queued is not None:
                self._queued.append((head, [blob.copy() for blob in blobs]))
            elif sum(blob.nbytes for blob in blobs) < _limits.PIECE_BYTES:
                self._follow(head, blobs)
            else:
                threads = max(1, self._shard.threads // 2) if is_near else self._shard.threads
                self._applying = _Applying(partial(self._follow, head, blobs, threads))

    def _finish(self) -> None:
        """Wait until what came is applied. Where that failed, this follower has nothing to go on from."""
        applying, self._applying = self._applying, None
        if applying is not None:
            try:
                applying.wait()
            except BaseException:
                self._book = self._pending = None
                raise

    def _follow(self, head: bytes, blobs: list[np.ndarray], threads: int | None = None) -> None:
        """A commit is prepared beside the state, and becomes it with the next one: not every server may have it yet."""
        record = _fed.decode(head)
        if isinstance(record, Back):
            self._settle(record.commit)
            return
        if not isinstance(record, Step):
            self._apply(record, blobs)
            return
        assert self._book is not None
        if record.change.serial <= self._book.serial:
            return
        if self._pending is not None:
            self._shard.handle(Flip(self._pending.commit, self._shard.is_prepared))
        if record.change.commit == self._book.commit:
            self._book = self._book.after(record.change)
            return
        self._prepare_again(record, blobs, threads)
        self._pending = record.change

    def come_back(self, request: Restore) -> tuple[Book | None, LogEnd | None]:
        """Become what the store holds; returns the book that belongs to it, None where there was nothing, and where the log ends."""
        self._stop()
        end = None
        shard = self._shard
        book: Book | None = None
        shard.forget()
        self._take_notes()
        if request.snapshot:
            manifest, folder = self._manifest(request.snapshot), f"{self._path}/{request.snapshot}"
            book = decode_book(manifest.book)
            if book.tensors is not None and book.optimizer is not None:
                shard.handle(Assign(book.tensors, book.optimizer, request.index, request.count, book.consistency))
                read_dense(self._files, folder, manifest, shard.part, shard.master_planes(), threads=shard.threads)
                shard.loaded(manifest.commit)
            else:
                shard.commit = manifest.commit
            rests = [_rest(manifest, i) for i in range(manifest.servers)]
            for number, spec in enumerate(book.tables):
                shard.handle(OpenTable(number, spec, request.index, request.count))
                rows = shard.tables.tables[number]
                rows.begin(max((rest.steps[number] for rest in rests), default=0))
                for some in read_table(self._files, folder, manifest, number, request.index, request.count):
                    rows.restore(some)
            # Tables are pinned by each server at a moment of its own: what another has counted may be still to come here.
            for rest in rests if request.count != manifest.servers else rests[request.index : request.index + 1]:
                shard.tables.sequences.update({(i, t): s for i, t, s in rest.sequences})
            if self._has_log and request.count == manifest.servers:
                records, end = self._records(request.index, book, rests[request.index])
                book = self._replay(book, records, request.commit, request.count)
                if end.torn:
                    warn(
                        f"the log ends at byte {end.offset} of {end.file}: {end.torn}; nothing acknowledged is missing"
                    )
        shard.settle(shard.commit)
        self._index = request.index
        return book, end

    def _replay(
        self, book: Book, records: Iterable[tuple[Step | Pushed | PagePut, Entry]], limit: int, count: int
    ) -> Book:
        """Apply commits up to this one again, and all that tables have acknowledged."""
        shard = self._shard
        for record, entry in records:
            if isinstance(record, Step):
                tables = [table for table, _, _ in record.tables]
                is_known = not record.specs or book.tensors is not None
            else:
                tables, is_known = [record.table], True
            if not is_known or entry.servers != count or any(table not in shard.tables.tables for table in tables):
                raise StorageError(
                    f"Expected a snapshot that {entry.file} goes on from, got an older one, of when less was registered or there "
                    "were other servers: put back the files of the newer one."
                )
            if isinstance(record, Step) and record.change.commit > limit:
                continue
            if isinstance(record, Step):
                self._prepare_again(record, entry.blobs())
                shard.handle(Flip(record.change.commit, shard.is_prepared))
                book = book.after(record.change)
            else:
                self._apply(record, entry.blobs())
        return book

    def _prepare_again(self, step: Step, blobs: list[np.ndarray], threads: int | None = None) -> None:
        """Prepare what a commit did here; `Flip` follows."""
        tables = self._shard.tables
        blobs = self._shard.prepare_again(step.specs, blobs, threads=threads)
        means, now = [], 0.0
        for (number, scalars, now), ids, gradients in zip(step.tables, blobs[::2], blobs[1::2], strict=True):  # noqa: B007
            kept = ids.copy(), gradients.copy()  # until the flip, by when other records lie where this one did
            means.append((number, Part(kept[0].view(np.int64), _matrix(kept[1], tables.tables[number]), scalars)))
        tables.gather_again(means, now)

    def _apply(self, record: Pushed | PagePut, blobs: list[np.ndarray]) -> None:
        """Apply what counted at once, unless it has."""
        tables = self._shard.tables
        rows = tables.tables[record.table]
        if isinstance(record, PagePut):
            rows.put(record, blobs[0])
        elif not tables.has_counted(record.identity, record.table, record.sequence):
            rows.push(Part(blobs[0].view(np.int64), _matrix(blobs[1], rows), record.scalars), now=record.now)
            tables.count(record.identity, record.table, record.sequence)

    # Writing down.

    @property
    def wants_sums(self) -> bool:
        """Whether what commits do is written down, or sent to a follower."""
        return self._has_log or self._feed is not None

    def room(self, size: int) -> np.ndarray | None:
        """Return memory for the next commit's summed gradients, uint8, from where they need not be copied; None: there is none."""
        return None if self._feed is None else self._feed.room(size)

    def _persist(self, request: Persist) -> Done:
        """Write down what is prepared and gathered; returns when it survives."""
        self._leads = True
        # What was refused may be prepared still.
        specs, sums = self._shard.prepared_sums() if request.swap and self.wants_sums else ((), [])
        parts, now = self._shard.tables.gathered()
        step = Step(
            request.change,
            tuple((spec.cells, spec.rows) for spec in specs),
            tuple((table, part.scalars, now) for table, part in parts),
        )
        arrays = [*sums, *(array for _, part in parts for array in (part.ids, part.gradients))]
        self._write(step, arrays)()
        if self._is_replicated and self._book is not None:
            if request.change.commit == self._book.commit:  # between two commits: no flip follows
                self._book = self._book.after(request.change)
            else:
                self._pending = request.change
        return Done()

    def _take_notes(self) -> None:
        """Write down what the tables acknowledge from now on."""
        tables = self._shard.tables
        tables.note = partial(self.note, tables) if self._persists else None

    def note(self, tables: Tables, record: Pushed | PagePut, arrays: Sequence[np.ndarray]) -> Callable[[], None]:
        """Write down what a table is about to acknowledge, in the order of application; returns what waits until it survives.

        Raises PeerLostError where the job has come back meanwhile without these tables: nothing of it counts, and it is to be said again.
        """
        if tables is not self._shard.tables:
            raise PeerLostError("Expected a request of the job as it is now, got one from before a server was lost.")
        self._is_uncertain = False
        return self._write(record, arrays)

    def _write(self, record: Step | Pushed | PagePut, arrays: Sequence[np.ndarray]) -> Callable[[], None]:
        blobs = [memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)) for array in arrays]
        head, log = msgspec.msgpack.encode(record), self._log
        if log is None:
            if self._has_log:
                raise PeerLostError("Expected a log to write to, got none: this server begins anew.")
            if self._feed is not None:
                self._feed.send(head, blobs)  # in the order of application
            return lambda: None
        ticket = log.append(head, blobs)

        def wait() -> None:
            try:
                log.sync(ticket)
            except StorageError as error:
                if self._log is log:
                    raise
                raise PeerLostError("Expected the server to go on, got one that went back: ask again.") from error

        return wait

    def _stop(self) -> None:
        """From here on what workers say to the tables as they were counts nowhere, and they are told so."""
        self._give_up()
        with self._shard.tables.still():
            self._shard.tables.is_over = True
        self._close_log()

    def _close_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            log.close()

    def close(self) -> None:
        """Write no more."""
        with self._turn:
            self._is_closed = True
        self._stop()
        self._drop_feeds()

    def _drop_feeds(self) -> None:
        """There is no follower any more."""
        for feed in (self._feed, self._next_feed):
            if feed is not None:
                feed.close()
        self._feed = self._next_feed = None


def open_store(
    store: str, index: int, *, resumes: bool, has_log: bool = False
) -> tuple[Files, str, Callable[[], None]]:
    """Return the store as one server sees it, and what gives its place in it up. index: -1: it is claimed by nobody.

    Raises SettingError where there is none, it cannot hold a log, another process has that place, or a job lies there that is not to go on.
    """
    if not store:
        raise SettingError("Expected a store for a durable job, got none: give it a folder.")
    files, path = open_files(store)
    if has_log and isinstance(files, RemoteFiles):
        raise SettingError(
            f"Expected a folder on a disk for a log, got {store}, where a file is there only once it is whole: use durability snapshot or "
            "replicated there."
        )
    files.make_folder(path)
    let_go = claim(files, f"{path}/lock-{index}") if index >= 0 else lambda: None
    if not resumes and (find(files, path) or any(name.startswith(f"log-{index}-") for name in files.list(path))):
        let_go()
        raise SettingError(f"Expected an empty store, got a job in {store}: resume it, or give another folder.")
    return files, path, let_go


class Feed:
    """The way to a follower: records go there one by one, and each is answered. It can be shared between threads.

    Once it is lost nothing is sent: until another follower is there, what is acknowledged survives as under `snapshot`.
    """

    def __init__(self, connection: Connection, lose: Callable[[], None]) -> None:
        self._connection, self._tell = connection, lose
        self._turn = threading.Lock()
        self._is_lost = False
        self._rooms: dict[int, _kernels.Arena] = {}  # memory of the follower's
        self._number = 0  # of the one for the next record

    @classmethod
    def to(cls, address: ServerAddress, token: str, lose: Callable[[], None]) -> Feed:
        """Connect to a follower. lose: says that it is one no more. Raises UnreachableError, WaitTimeoutError."""
        near = address.host == host_name() and address.unix
        connection = connect(Address.parse(near or address.tcp), 0.0)  # it listens, or has died
        try:
            connection.set_timeout(_limits.FOLLOWER_S)
            request(connection, Hello(token, "leader", 0))
        except PeerLostError as error:  # which would end the connection of whoever asks: that is not who is lost
            connection.close()
            raise UnreachableError(f"Expected a follower at {address.tcp or address.unix}, got its end.") from error
        except BaseException:
            connection.close()
            raise
        return cls(connection, lose)

    def room(self, size: int) -> np.ndarray | None:
        """Return memory that the follower reads where it lies, uint8, for the first blobs of a commit's record; None: they travel."""
        if not self._connection.can_share or size < _limits.PIECE_BYTES or self._is_lost:
            return None
        with self._turn:
            arena = self._rooms.get(self._number)
            if arena is None or arena.array.nbytes < size:
                try:
                    self._connection.send(Room(self._number, size, True))
                    received = self._connection.receive(with_fds=True)
                except HeadwaterError as error:
                    self._lose(error)
                    return None
                if not isinstance(received.message, Attached):
                    self._lose(ProtocolError(f"Expected room for a record, got {received.message}."))
                    return None
                arena = self._rooms[self._number] = stack_buffers(list(received.fds), [size], private=False)
            return arena.array[:size]

    def send(self, head: bytes, blobs: Sequence[memoryview]) -> None:
        """Let the follower have a record; returns when it has. What lies in the room does not travel."""
        with self._turn:
            if self._is_lost:
                return
            shared = self._shared(blobs)
            message = Apply(head, tuple(blob.nbytes for blob in blobs), self._number, sum(b.nbytes for b in shared))
            try:
                self._connection.send_head(message, sum(message.sizes) - message.shared)
                for blob in blobs[len(shared) :]:
                    self._connection.send_more(blob)
                self._connection.flush()
                answer = self._connection.receive().message
            except HeadwaterError as error:
                self._lose(error)
                return
            if isinstance(answer, Failed):
                self._lose(answer.exception())
            elif shared:
                self._number = 1 - self._number  # what lies in this one may be applied still

    def _shared(self, blobs: Sequence[memoryview]) -> Sequence[memoryview]:
        """Return those of the first blobs that lie in the room."""
        room = self._rooms.get(self._number)
        if room is None:
            return ()
        place = room.array.__array_interface__["data"][0]
        for i, blob in enumerate(blobs):
            if np.frombuffer(blob, np.uint8).__array_interface__["data"][0] != place or not blob.nbytes:
                return blobs[:i]
            place += blob.nbytes
        return blobs

    def _lose(self, why: HeadwaterError) -> None:
        self._connection.close()  # first: an answer that comes too late is none to what is sent next
        self._tell()  # before anything is acknowledged that it lacks
        warn(f"a follower is lost: {why} Until there is another, what is acknowledged survives as under snapshot.")
        self._is_lost = True

    def close(self) -> None:
        """Send no more."""
        self._connection.close()


class _Applying:
    """Something that a thread of its own does."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="apply", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._act()
        except BaseException as error:  # noqa: BLE001 - whoever waits raises it
            self._error = error

    def wait(self) -> None:
        """Return when it is done. Raises what it has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


class _Folded:
    """Servers in this process that come back from a store."""

    def __init__(self, files: Files, path: str, name: str) -> None:
        count = open_manifest(files, f"{path}/{name}").servers
        shards = [Shard(threads=len(os.sched_getaffinity(0))) for _ in range(count)]
        self._keepers = [Keeper(shard, files, path, Durability("log")) for shard in shards]
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
    """Make one snapshot of a snapshot and the logs that go on from it; returns its name. For a job that is not running."""
    snapshots = Snapshots(files, path, Durability("log"), str)
    return snapshots.take(_Folded(files, path, name)).path.rpartition("/")[2]


def newest(files: Files, path: str) -> str:
    """Return the folder of a snapshot that has all that a store holds, its logs included; makes one where it must.

    Raises StorageError where there is none that can be read, SettingError where the job is running.
    """
    let_go = claim(files, f"{path}/lock-0")
    try:
        names = find(files, path)
        if not names:
            raise StorageError(f"Expected a snapshot in {path}, got none.")
        has_log = any(name.startswith("log-") for name in files.list(path))
        return f"{path}/{fold(files, path, names[0]) if has_log else names[0]}"
    finally:
        let_go()


class _Writing:
    """One snapshot's part being written, by a thread of its own."""

    def __init__(self, shard: Shard, files: Files, folder: str, index: int) -> None:
        self._shard, self._files, self._folder, self._index = shard, files, folder, index
        self._is_due = self._is_whole = self._has_ended = False
        self._error = ""
        self._pinned: Pinned | None = None
        self._is_pinned = threading.Event()
        self._writers: dict[int, TableWriter] = {}  # by table; of the thread, and of `pin` while that waits for it
        self._rest = Rest()
        self._files_written: list[File] = []
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)
        self._thread.start()

    def state(self) -> SnapshotState:
        """Say how far it is."""
        rest = msgspec.msgpack.encode(self._rest)
        return SnapshotState(self._is_due, self._is_whole, tuple(self._files_written), rest, self._error)

    def pin(self, log: Log | None) -> None:
        """This is the state to write: set it aside. What is kept from now on goes on from it."""
        tables = self._shard.tables
        self._pinned = self._shard.pin()
        try:
            for number, rows in sorted(tables.tables.items()):
                self._write_changes(number, rows)  # to its file, not aside: it may be much
        except HeadwaterError as error:
            self._error = str(error)
        steps = tuple(rows.step for _, rows in sorted(tables.tables.items()))
        if log is not None:
            log.rotate(self._shard.commit)
        sequences = tuple((i, t, s) for (i, t), s in tables.sequences.items())
        self._rest = Rest(steps, sequences, None if log is None else log.place)
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
            self._shard.make_room()
            for number, rows in sorted(self._shard.tables.tables.items()):
                self._write_rows(number, rows)
            self._is_due = True
            self._is_pinned.wait()
            if self._has_ended or self._error:
                return
            for _, writer in sorted(self._writers.items()):
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

    def _write_rows(self, number: int, rows: Rows) -> None:
        """Write a table's rows, and then what has changed meanwhile, until that is little or becomes no less."""
        before = 0
        for _ in range(_ROUNDS):
            found = rows.stats()
            count = self._write_changes(number, rows, found.rows + found.spilled_rows)
            if count <= _FEW_ROWS or (before and count > _SHRINKS * before) or self._has_ended:
                break
            before = count

    def _write_changes(self, number: int, rows: Rows, limit: int | None = None) -> int:
        """Write what has changed since the last call, at first that is everything; returns how many rows.

        limit: about so many: a table that changes faster than it is written always has more.
        """
        if number not in self._writers:
            self._writers[number] = self._new_writer(number, rows)
            rows.kernel.track(_CONSUMER)
        count = 0
        for change in rows.changes_since(_CONSUMER):
            if change.restart:  # more was deleted than the table remembers: all rows come again
                self._writers[number] = self._new_writer(number, rows)
            writer = self._writers[number]
            writer.deleted(change.deleted)
            writer.rows(*change.rows)
            count += len(change.rows.ids)
            if limit is not None and (count >= limit or self._has_ended):
                break
        return count

    def _new_writer(self, number: int, rows: Rows) -> TableWriter:
        return TableWriter(self._files, self._folder, self._index, number, rows.spec)


def _up_to(
    commit: int, found: list[tuple[Step | Pushed | PagePut, Entry]]
) -> list[tuple[Step | Pushed | PagePut, Entry]]:
    return [each for each in found if not isinstance(each[0], Step) or each[0].change.commit <= commit]


def _rest(manifest: Manifest, server: int) -> Rest:
    return msgspec.msgpack.decode(manifest.parts[server], type=Rest)


def _matrix(raw: np.ndarray, rows: Rows) -> np.ndarray:
    return raw.view(np.float32).reshape(-1, rows.spec.dim)
