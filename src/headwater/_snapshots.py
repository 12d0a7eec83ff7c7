"""A job's snapshots, from the coordinator's side: when they are taken, and which one the job goes on from.

    SnapshotBegin   rows of tables are written while training goes on, then what has changed meanwhile, until little is missing
    Pin             between two commits: this is the state. Dense sides are set aside, the last changed rows are copied, logs turn a page
    SnapshotGet     asked until every server has written everything
    job.json        makes it a snapshot
    Unpin           between two commits, on all servers: the sides are free again

Whatever fails on the way leaves a folder without job.json, which counts for nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from headwater._book import Book, new_history
from headwater._errors import HeadwaterError, HostError, InternalError, StorageError, debug, warn
from headwater._files import Files
from headwater._messages import (
    AnyMessage,
    Pin,
    Recall,
    Recalled,
    Restore,
    Restored,
    SnapshotBegin,
    SnapshotGet,
    SnapshotState,
    SnapshotTaken,
    Unpin,
)
from headwater._plan import Plan
from headwater._snapshot import (
    MANIFEST,
    Manifest,
    find,
    open_manifest,
    prune,
    publish,
    snapshot_name,
    verify,
)
from headwater.durability import Durability

POLL_S = 0.02
LOOK_S = 0.1  # between looks at whether one is due
KEEP = 2  # snapshots; the older one is there in case a file of the newer rots

AskEach = Callable[[Callable[[int], AnyMessage]], list[AnyMessage]]


class Rest(msgspec.Struct, frozen=True):
    """What a server's part of a snapshot has besides files."""

    steps: tuple[int, ...] = ()  # of its tables
    sequences: tuple[tuple[int, int, int], ...] = ()  # identity, table, of the last push that counted
    log: tuple[int, int] | None = None  # the place from where its log goes on


class Job(Protocol):
    """What a snapshot needs of its coordinator."""

    def alone(self) -> AbstractContextManager[AskEach]: ...
    def book(self) -> Book: ...


class _Restored:
    """A job that has just come back: nobody else speaks to its servers."""

    def __init__(self, book: Book, ask_each: AskEach) -> None:
        self._book, self._ask_each = book, ask_each

    def alone(self) -> AbstractContextManager[AskEach]:
        return nullcontext(self._ask_each)

    def book(self) -> Book:
        return self._book


class Snapshots:
    """Where a job's snapshots are. It can be shared between threads.

    path: the store, in `files`. fold: makes a snapshot of this one, by name, and of the logs that go on from it, and returns its name.
    """

    def __init__(self, files: Files, path: str, durability: Durability, fold: Callable[[str], str]) -> None:
        self._fold = fold
        self.files, self.path, self.durability = files, path, durability
        self.has_log = durability.kind == "log"
        self.persists = durability.kind != "snapshot"  # each commit is kept before it is acknowledged
        self._is_replicated = durability.kind == "replicated"
        self._taking = threading.Lock()
        self._stopped = threading.Event()
        self._due_s = time.monotonic() + durability.every_s
        self._commit = 0  # of the newest

    def restore(self, count: int, ask_each: AskEach) -> tuple[Book | None, bool]:
        """Let `count` servers be at the same commit; returns the book that goes with it, None where the store is empty, and whether
        all that was acknowledged is in it.

        Raises StorageError when none of the snapshots can be read, HostError when one can and cannot be taken all the same.
        """
        if self._is_replicated:
            recalled = [r for r in ask_each(lambda i: Recall("", i)) if isinstance(r, Recalled)]
            commit = min(r.commit for r in recalled)
            if commit >= 0 and all(commit in (r.commit, r.held) for r in recalled):
                answers = ask_each(lambda i: Restore("", commit, i, count, is_warm=True))
                books = [decode_book(answer.book) for answer in answers if isinstance(answer, Restored)]
                # A change between two commits that some have and the first has not is given up; its number is not used again.
                book = msgspec.structs.replace(books[0], serial=max(book.serial for book in books))
                # The coordinator may have died before there was a snapshot. Whoever takes one waits for us.
                if not self._can_go_back(book):
                    self._take(_Restored(book, ask_each))
                return book, True
        first: StorageError | None = None
        unread: list[str] = []
        for name in find(self.files, self.path):
            try:
                are_others = self._manifest(name).servers != count
                # Logs are of so many servers as have written them.
                book = self._restore(self._fold(name) if self.has_log and are_others else name, count, ask_each)
            except StorageError as error:
                # An older one would not do either, and cost what came between.
                if not self.has_log and self._is_whole(name):
                    raise HostError(str(error)) from error
                first = first or error
                unread.append(name)
                warn(f"{error} Trying an older snapshot.")
                continue
            if self.has_log and are_others:
                self._take(_Restored(book, ask_each))  # from which the new logs go on; whoever takes one waits for us
            if not self.has_log:
                self._give_up(unread)
            return book, self.has_log
        if first is not None:
            raise StorageError(f"Expected a snapshot in {self.path} that can be read, got none: {first}") from first
        ask_each(lambda i: Restore("", 0, i, count))
        return None, True

    def _is_whole(self, name: str) -> bool:
        try:
            verify(self.files, f"{self.path}/{name}", self._manifest(name))
        except StorageError:
            return False
        return True

    def _give_up(self, names: list[str]) -> None:
        """The job goes on without what these snapshots hold. Should one of them be readable another time, it is none any more."""
        for name in names:
            folder = f"{self.path}/{name}"
            try:
                self.files.rename(f"{folder}/{MANIFEST}", f"{folder}/{MANIFEST}.given-up")
                self.files.sync_folder(folder)
            except StorageError as error:
                raise HostError(
                    f"{error} The job cannot go on from an older snapshot while {folder} may come back."
                ) from error

    def _can_go_back(self, book: Book) -> bool:
        """Whether the newest snapshot can be read and is of a job in which as much was registered."""
        names = find(self.files, self.path)
        if not names:
            return book.tensors is None and not book.tables
        try:
            before = decode_book(self._manifest(names[0]).book)
        except StorageError:
            return False
        return (before.tensors, before.optimizer, before.tables) == (book.tensors, book.optimizer, book.tables)

    def _manifest(self, name: str) -> Manifest:
        return open_manifest(self.files, f"{self.path}/{name}")

    def _restore(self, name: str, count: int, ask_each: AskEach) -> Book:
        manifest = self._manifest(name)
        for folder in (f"{self.path}/{name}", self.path):  # who published it may have died before it did so
            self.files.sync_folder(folder)
        commit = manifest.commit
        if self.has_log and manifest.servers == count:
            # What some have not written down was never acknowledged.
            commit = min(r.commit for r in ask_each(lambda i: Recall(name, i)) if isinstance(r, Recalled))
        history = 0 if self.has_log else new_history()  # what came after the snapshot is given up
        answers = ask_each(lambda i: Restore(name, commit, i, count, history=history))
        # The next one is due as if nothing had happened: else a job whose servers die more often than that would get none.
        self._commit, age_s = manifest.commit, (datetime.now(UTC) - manifest.time).total_seconds()
        self._due_s = time.monotonic() + min(max(self.durability.every_s - age_s, 0.0), self.durability.every_s)
        assert isinstance(answers[0], Restored)
        return decode_book(answers[0].book)

    def take(self, job: Job, feeds: Callable[[int], AnyMessage] | None = None) -> SnapshotTaken:
        """Take a snapshot now; returns when it is whole. Raises StorageError; older ones are then as they were.

        feeds: what is said to each server before the state is set aside.
        """
        with self._taking:
            return self._take(job, feeds)

    def _take(self, job: Job, feeds: Callable[[int], AnyMessage] | None = None) -> SnapshotTaken:
        with job.alone() as ask_each:
            newest = next(iter(find(self.files, self.path)), "")
            number = max(job.book().commit, int(newest.rpartition("-")[2] or -1) + 1)
            folder = f"{self.path}/{snapshot_name(number)}"
            self.files.make_folder(folder)
            ask_each(lambda _: SnapshotBegin(folder))
        oldest = -1
        try:
            self._poll(job, lambda state: state.is_due)
            with job.alone() as ask_each:
                book = job.book()
                if feeds is not None:
                    ask_each(feeds)
                ask_each(lambda _: Pin(msgspec.msgpack.encode(book)))
            states = self._poll(job, lambda state: state.is_whole)
            publish(self.files, folder, _manifest(book, states))
            prune(self.files, self.path, KEEP)
            kept = find(self.files, self.path)
            oldest = self._manifest(kept[-1]).commit
        finally:
            with job.alone() as ask_each:
                ask_each(lambda _: Unpin(oldest))
        self._commit, self._due_s = book.commit, time.monotonic() + self.durability.every_s
        return SnapshotTaken(folder, book.commit)

    def _poll(self, job: Job, is_there: Callable[[SnapshotState], bool]) -> list[SnapshotState]:
        while True:
            with job.alone() as ask_each:
                states = [state for state in ask_each(lambda _: SnapshotGet()) if isinstance(state, SnapshotState)]
            for state in states:
                if state.error:
                    raise StorageError(state.error)
            if all(map(is_there, states)):
                return states
            if self._stopped.wait(POLL_S):
                raise InternalError("Expected a snapshot to be taken before the end, got the end.")

    def keep_taking(self, job: Job) -> None:
        """Take one every so often, until `stop`; what goes wrong is said, and tried again next time."""
        every_s = self.durability.every_s
        while every_s and not self._stopped.wait(min(every_s, LOOK_S)):
            if time.monotonic() < self._due_s:
                continue
            book = job.book()
            if (book.optimizer is None and not book.tables) or (book.commit == self._commit and not book.tables):
                continue
            self._due_s = time.monotonic() + every_s
            try:
                start = time.monotonic()
                taken = self.take(job)
                debug(f"snapshot of commit {taken.commit} in {time.monotonic() - start:.1f} s")
            except HeadwaterError as error:
                if not self._stopped.is_set():
                    warn(f"no snapshot this time: {error}")

    def stop(self) -> None:
        """Take no more."""
        self._stopped.set()


def _manifest(book: Book, states: list[SnapshotState]) -> Manifest:
    specs = book.tensors or ()
    steps = Plan.of(book.cohort_of, book.cohorts).steps() if specs else ()
    rests = [msgspec.msgpack.decode(state.rest, type=Rest) for state in states]
    return Manifest.of(
        commit=book.commit,
        servers=len(states),
        consistency=book.consistency,
        optimizer=book.optimizer,
        tensors=specs,
        steps=steps,
        tables=[(spec, max(rest.steps[i] for rest in rests)) for i, spec in enumerate(book.tables)],
        state=book.state,
        files=[file for state in states for file in state.files],
        book=msgspec.msgpack.encode(book),
        parts=[state.rest for state in states],
    )


def decode_book(data: bytes) -> Book:
    """Return a book from its MessagePack. Raises StorageError."""
    try:
        return msgspec.msgpack.decode(data, type=Book)
    except (msgspec.DecodeError, ValueError) as error:
        raise StorageError(
            f"Expected the job's book in the snapshot, got {len(data)} bytes that are none: {error}."
        ) from error
