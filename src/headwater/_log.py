"""One server's push log: records that are appended, made durable many at a time, and read again in the next life.

    log    = file*                      log-SERVER-COMMIT.hwl, and .hwl.1, .hwl.2 … when a life began at the same commit as the one before
    file   = start record*              what lies behind the end that the next file names was never acknowledged
    start  = "HEADWLOG" format:u32 server:u32 commit:u64 life:u32          this file's name again
             servers:u32                                                   so many wrote a log each in this life
             previous-life:u32 previous-commit:u64 previous-end:u64        the file before, how many of its bytes count; 0: none is before
             sum:u64                                                       XXH3-64 of what stands before it in `start`
    record = "HWRC" head-bytes:u32 blobs:u32 payload-bytes:u64
             synced:u64                  so many bytes of this file were known to be durable when this record was appended
             head-sum:u64                XXH3-64 of sizes and head
             payload-sum:u64             XXH3-64 of the blobs, one after the other
             sum:u64                     XXH3-64 of what stands before it in `record`, seeded with the record's offset in the file
             sizes:u64*                  of each blob
             head blob*

All numbers are little-endian, nothing is padded. The record that `append(b"push", [b"abc", b""])` leaves at offset 60 of a new file:

    48575243 04000000 02000000 0300000000000000 3c00000000000000    "HWRC", 4 bytes of head, 2 blobs of 3 bytes together, 60 are durable
    55c1799ae19ba844 50392f89945faf78 e468da86b142db59              the sums of head, payload and header
    0300000000000000 0000000000000000 70757368 616263               sizes 3 and 0, "push", "abc"

A power cut may leave any part of what was not synced: a short record, or a hole. A flipped bit looks alike, and is told from it by
`synced`: where a later record says that a bad one had been durable, something acknowledged is damaged, and that is an error. Where none
does, the log ends there.
"""

from __future__ import annotations

import re
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from xxhash import xxh3_64, xxh3_64_intdigest

from headwater._errors import ClosedError, InternalError, StorageError
from headwater._files import Files, byte_views

if TYPE_CHECKING:
    from typing_extensions import Buffer

FORMAT = 2
_FILE_MAGIC, _RECORD_MAGIC = b"HEADWLOG", b"HWRC"
_START = struct.Struct("<8sIIQIIIQQ")
_RECORD = struct.Struct("<4sIIQQQQ")
_SUM = struct.Struct("<Q")
_START_BYTES, _RECORD_BYTES = _START.size + _SUM.size, _RECORD.size + _SUM.size
_WINDOW = 1 << 18  # read at once where heads are scanned
AHEAD_BYTES = 1 << 24  # a sync of bytes for which there is room on the disk already takes a fifth of the time


class _Place(NamedTuple):
    """What a file's name says; they sort as the files follow each other."""

    commit: int
    life: int


class _Start(NamedTuple):
    """What a file begins with, besides its name."""

    servers: int
    previous: tuple[_Place, int] | None  # the file before, and how many of its bytes count


class LogEnd(NamedTuple):
    """Where a log ends; `file` is empty when there is none."""

    file: str
    offset: int
    torn: str  # why what lies behind is no record; empty when nothing does
    known: int = 0  # so many bytes of the file are known to be durable


@dataclass(frozen=True, slots=True)
class Entry:
    """A record. The blobs stay on disk until they are asked for."""

    head: bytes
    file: str
    offset: int
    end: int  # LogEnd(file, end, "") is a log that ends with this record
    servers: int  # that wrote down the same
    _files: Files
    _sizes: tuple[int, ...]
    _sum: int
    _synced: int

    def blobs(self) -> list[np.ndarray]:
        """Read the blobs, each a new uint8 array. Raises StorageError when they are not what was appended."""
        arrays = self._read()
        if arrays is None:
            raise _damage(self.file, self.offset, "its payload is damaged")
        return arrays

    def _read(self) -> list[np.ndarray] | None:
        arrays, digest, position = [], xxh3_64(), self.end - sum(self._sizes)
        for size in self._sizes:
            array = np.empty(size, np.uint8)
            if self._files.read_into(self.file, position, memoryview(array)) < size:
                return None
            digest.update(array)
            arrays.append(array)
            position += size
        return arrays if digest.intdigest() == self._sum else None


class LogReader:
    """The records of a server's log, from files that start at commit `since`, at that in `life`, or later, oldest first.

    Heads are checked as they are read; payloads by `Entry.blobs`, and here only those at the end that no later record says were durable.
    Iterating raises StorageError where something that had been acknowledged is damaged or missing; after it, `end` says where the log ends.
    """

    def __init__(self, files: Files, folder: str, server: int, since: int = 0, life: int = 0) -> None:
        self.end = LogEnd("", 0, "")
        self._files, self._folder, self._server, self._since = files, folder, server, _Place(since, life)

    def __iter__(self) -> Iterator[Entry]:
        for path, servers, limit in self._chain():
            yield from self._records(path, servers, limit)

    def _chain(self) -> list[tuple[str, int, int | None]]:
        """Return the files to read, how many servers wrote, and how many bytes count, unknown for the last: each names the one before."""
        places = [place for place in _places(self._files, self._folder, self._server) if place >= self._since]
        torn, limit, chain = "", None, list[tuple[str, int, int | None]]()
        place = places[-1] if places else None
        while place is not None and place >= self._since:
            path = _path(self._folder, self._server, place)
            if place not in places:
                raise _damage(path, 0, "it is missing")
            window = _Window(self._files, path)
            start = _read_start(window, path, self._server, place)
            if not isinstance(start, str):
                chain.append((path, start.servers, limit))
                place, limit = start.previous or (None, 0)
            elif chain or not _behind(window, _START_BYTES)[1]:
                raise _damage(path, 0, start)
            else:  # power was cut while it was made: nothing was ever in it
                torn = f"{path}: {start}"
                places.pop()
                place = places[-1] if places else None
        self.end = LogEnd("", 0, torn)
        return chain[::-1]

    def _records(self, path: str, servers: int, limit: int | None) -> Iterator[Entry]:
        window = _Window(self._files, path)
        stop = window.size if limit is None else limit
        if window.size < stop:
            raise _damage(path, window.size, f"it is short of {stop - window.size} bytes")
        offset, known, torn = _START_BYTES, 0, ""
        held = deque[Entry]()  # not known to have been durable
        while offset < stop and not torn:
            entry = self._entry(window, path, servers, offset, stop)
            if isinstance(entry, str):
                claimed, is_empty = _behind(window, offset)
                torn, known = entry, max(known, claimed)
                if limit is not None or known > offset:
                    raise _damage(path, offset, torn)
                if is_empty:  # what was to be written next
                    torn = ""
                    break
            else:
                held.append(entry)
                known, offset = max(known, entry._synced), entry.end
            while held and (limit is not None or held[0].end <= known):
                yield held.popleft()
        for entry in held:
            if entry._read() is None:
                offset, torn = entry.offset, "its payload is damaged"
                break
            yield entry
        self.end = LogEnd(path, offset, torn or self.end.torn, known)

    def _entry(self, window: _Window, path: str, servers: int, offset: int, stop: int) -> Entry | str:
        """Return the record at the offset, or what is wrong with it."""
        fields = _record(window.at(offset, _RECORD_BYTES), offset)
        if fields is None:
            return "its header is damaged"
        head_bytes, count, payload_bytes, synced, head_sum, payload_sum = fields
        start = offset + _RECORD_BYTES
        end = start + 8 * count + head_bytes + payload_bytes
        if end > stop:
            return "it is cut short"
        data = window.at(start, 8 * count + head_bytes)
        if xxh3_64_intdigest(data) != head_sum:
            return "its head is damaged"
        sizes = struct.unpack_from(f"<{count}Q", data)
        return Entry(data[8 * count :], path, offset, end, servers, self._files, sizes, payload_sum, synced)


class Log:
    """A server's log, open for appending; begins a new file. Calls may come from any thread.

    After a failed write, sync or rotation nobody knows what is on the disk: every later append, rotation and wait for what was not yet
    durable raises StorageError. Close it, and go on with what a LogReader finds.

    after: where the log of earlier lives ends; what lies behind is given up. Found by reading when it is None. servers: how many write a
    log each: what they write belongs together.
    """

    def __init__(
        self, files: Files, folder: str, server: int, commit: int, after: LogEnd | None = None, servers: int = 1
    ) -> None:
        self._files, self._folder, self._server, self._servers = files, folder, server, servers
        self._turn = threading.Lock()  # of who appends
        self._changed = threading.Condition()  # guards what follows
        self._failure: BaseException | None = None
        self._is_syncing = False
        self._appended = self._durable = 0  # records
        self._end = self._synced = 0  # bytes of this file
        self._previous, given_up = self._taken_over(commit, after)
        self._open(commit)
        for place in given_up:  # only now, the last one first: each says how much of the one before it counts
            files.remove(_path(folder, server, place))
            files.sync_folder(folder)

    @property
    def place(self) -> tuple[int, int]:
        """The commit that this file's records follow, and the life: where a LogReader finds what is appended from here on."""
        return self._place

    def append(self, head: bytes, blobs: Sequence[Buffer] = ()) -> int:
        """Write one record; returns the ticket to sync it by. The blobs are the caller's again on return. Raises StorageError."""
        views, sizes = byte_views(blobs), [memoryview(blob).nbytes for blob in blobs]
        digest = xxh3_64()
        for view in views:
            digest.update(view)
        table = struct.pack(f"<{len(sizes)}Q", *sizes)
        head_sum = xxh3_64_intdigest(table + head)
        with self._turn:
            self._check()
            with self._latched():
                record = _RECORD.pack(
                    _RECORD_MAGIC, len(head), len(sizes), sum(sizes), self._synced, head_sum, digest.intdigest()
                )
                record += _SUM.pack(xxh3_64_intdigest(record, self._end))
                self._writer.write(record, table, head, *views)
            with self._changed:
                self._end = self._writer.size
                self._appended += 1
                return self._appended

    def sync(self, ticket: int) -> None:
        """Return when the record of this ticket is durable. One sync of the file serves all who wait. Raises StorageError."""
        with self._changed:
            self._changed.wait_for(lambda: self._durable >= ticket or not self._is_syncing)
            if self._durable >= ticket:
                return
            self._check()
            self._is_syncing = True
            appended, end = self._appended, self._end
        try:
            with self._latched():
                self._writer.sync()  # a rotation waits for this before it takes another writer
            with self._changed:
                self._durable, self._synced = appended, end
        finally:
            with self._changed:
                self._is_syncing = False
                self._changed.notify_all()

    def rotate(self, commit: int) -> None:
        """Make all durable and go on in a new file, that of the records after this commit. Raises StorageError."""
        with self._turn:
            self._check()
            with self._latched():
                self.sync(self._appended)
                self._writer.close()
                self._previous = self._place, self._end
                self._open(commit)

    def drop_before(self, commit: int) -> None:
        """Remove the files that a LogReader from this commit on does not read. Raises StorageError."""
        for place, successor in pairwise(_places(self._files, self._folder, self._server)):
            if place.commit < commit and successor.commit <= commit:
                self._files.remove(_path(self._folder, self._server, place))

    def close(self) -> None:
        """Close the file; what was not synced may be lost. Every later call but this raises."""
        with self._turn:
            with self._changed:
                self._changed.wait_for(lambda: not self._is_syncing)
                self._failure = self._failure or ClosedError("it was closed.")
                self._changed.notify_all()
            self._writer.close()

    def _taken_over(self, commit: int, after: LogEnd | None) -> tuple[tuple[_Place, int] | None, list[_Place]]:
        """Make what earlier lives left durable; returns where it ends, and what lies behind that, the last one first."""
        places = _places(self._files, self._folder, self._server)
        for place in reversed(places):
            if after is not None and after.file:
                break
            reader = LogReader(self._files, self._folder, self._server, *place)
            deque(reader, maxlen=0)
            after = reader.end
        previous = None
        if after is not None and after.file:
            self._files.write_again(after.file, after.known, after.offset)
            self._files.sync_folder(self._folder)
            last = next(place for place in places if _path(self._folder, self._server, place) == after.file)
            previous = last, after.offset
        while previous is not None and previous[0].commit > commit and previous[1] == _START_BYTES:
            previous = self._before(previous[0])  # a life in which another server was not back yet when all ended
        return previous, [place for place in reversed(places) if previous is None or place > previous[0]]

    def _before(self, place: _Place) -> tuple[_Place, int] | None:
        """Return which file comes before a sound one, and where it ends."""
        path = _path(self._folder, self._server, place)
        start = _read_start(_Window(self._files, path), path, self._server, place)
        assert not isinstance(start, str), start
        return start.previous

    def _open(self, commit: int) -> None:
        lives = [place.life for place in _places(self._files, self._folder, self._server) if place.commit == commit]
        self._place = _Place(commit, max(lives, default=-1) + 1)
        (previous_commit, previous_life), previous_end = self._previous or ((0, 0), 0)
        if self._previous is not None and self._place <= self._previous[0]:
            raise InternalError(
                f"Expected a log that goes on after commit {previous_commit}, got one from {commit} on."
            )
        start = _START.pack(
            _FILE_MAGIC, FORMAT, self._server, commit, self._place.life, self._servers, previous_life, previous_commit,
            previous_end,
        )  # fmt: skip
        path = _path(self._folder, self._server, self._place)
        self._writer = self._files.create(path, ahead=AHEAD_BYTES)
        try:
            self._writer.write(start, _SUM.pack(xxh3_64_intdigest(start)))
            self._writer.sync()
            self._files.sync_folder(self._folder)
        except BaseException:
            self._writer.close()
            with suppress(StorageError):  # nobody knows what would be left of it after a power cut
                self._files.remove(path)
            raise
        self._end = self._synced = self._writer.size

    def _check(self) -> None:
        if self._failure is not None:
            raise StorageError(
                f"Expected a log that works in {self._folder}, got one that stopped: {self._failure} "
                "What was not yet durable may be lost: start this server again, it goes on with what is."
            ) from self._failure

    @contextmanager
    def _latched(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()
            raise


class _Window:
    """A file read in pieces that are worth a call."""

    def __init__(self, files: Files, path: str) -> None:
        self.size = files.size(path)
        self._files, self._path = files, path
        self._start, self._data = 0, bytearray()

    def at(self, offset: int, count: int) -> bytes:
        """Return so many bytes from the offset on, fewer at the end of the file."""
        count = max(0, min(count, self.size - offset))
        if not self._start <= offset <= offset + count <= self._start + len(self._data):
            data = bytearray(min(max(count, _WINDOW), self.size - offset))
            del data[self._files.read_into(self._path, offset, memoryview(data)) :]
            self._start, self._data = offset, data
        return bytes(memoryview(self._data)[offset - self._start :][:count])


def _places(files: Files, folder: str, server: int) -> list[_Place]:
    names = (re.fullmatch(rf"log-{server}-(\d{{12,}})\.hwl(?:\.(\d+))?", name) for name in files.list(folder))
    return sorted(_Place(int(name[1]), int(name[2] or 0)) for name in names if name)


def begin_of(file: str) -> int:
    """Return the commit that the records of a file, by its name, follow."""
    return int(file.rpartition("/")[2].split("-")[2].split(".")[0])


def _path(folder: str, server: int, place: _Place) -> str:
    return f"{folder}/log-{server}-{place.commit:012}.hwl" + (f".{place.life}" if place.life else "")


def _read_start(window: _Window, path: str, server: int, place: _Place) -> _Start | str:
    """Return a file's start, or what is wrong with it."""
    data = window.at(0, _START_BYTES)
    if len(data) < _START_BYTES or xxh3_64_intdigest(data[: -_SUM.size]) != _SUM.unpack(data[-_SUM.size :])[0]:
        return "its header is damaged"
    magic, number, owner, commit, life, servers, previous_life, previous_commit, previous_end = _START.unpack_from(data)
    if magic != _FILE_MAGIC or number != FORMAT:
        raise StorageError(f"Expected format {FORMAT} in {path}, got {number}: use the headwater that wrote it.")
    if (owner, commit, life) != (server, *place):
        raise StorageError(f"Expected {path} to be what its name says, got that of server {owner}, commit {commit}.")
    return _Start(servers, (_Place(previous_commit, previous_life), previous_end) if previous_end else None)


def _record(data: bytes, offset: int) -> tuple[int, ...] | None:
    """Return a record header's fields after the magic; None when it is none, or was written for another offset."""
    if len(data) < _RECORD_BYTES or not data.startswith(_RECORD_MAGIC):
        return None
    whole = xxh3_64_intdigest(data[: -_SUM.size], offset) == _SUM.unpack(data[-_SUM.size :])[0]
    return _RECORD.unpack_from(data)[1:] if whole else None


def _behind(window: _Window, offset: int) -> tuple[int, bool]:
    """Return how many bytes were durable at least, by what records behind this offset say, and whether nothing but zeros is there."""
    known, is_empty = 0, True
    while offset < window.size:
        data = window.at(offset, _WINDOW)
        is_empty = is_empty and not data.strip(b"\0")
        for found in re.finditer(_RECORD_MAGIC, data):
            fields = _record(window.at(offset + found.start(), _RECORD_BYTES), offset + found.start())
            known = max(known, fields[3]) if fields else known
        offset += max(1, len(data) - len(_RECORD_MAGIC) + 1)
    return known, is_empty


def _damage(file: str, offset: int, what: str) -> StorageError:
    return StorageError(
        f"Expected the record at byte {offset} of {file} as it was acknowledged, got a damaged log: {what}. Put back a copy of "
        "the file, or move the log files away to go on from the last snapshot, without what came after it."
    )
