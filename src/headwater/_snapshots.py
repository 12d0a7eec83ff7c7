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
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from headwater._book import Book
from headwater._errors import HeadwaterError, InternalError, StorageError, debug, warn
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
from headwater._snapshot import Manifest, find, open_manifest, prune, publish, snapshot_name
from headwater.durability import Durability

POLL_S = 0.02
KEEP = 2  # snapshots; the older one is there in case a file of the newer rots

AskEach = Callable[[Callable[[int], AnyMessage]], list[AnyMessage]]


class Job(Protocol):
    """What a snapshot needs of its coordinator."""

    def alone(self) -> AbstractContextManager[AskEach]: ...
    def book(self) -> Book: ...


class Snapshots:
    """Where a job's snapshots are. It can be shared between threads.

    path: the store, in `files`. fold: makes a snapshot of this one, by name, and of the logs that go on from it.
    """

    def __init__(self, files: Files, path: str, durability: Durability, fold: Callable[[str], object]) -> None:
        self._fold = fold
        self.files, self.path, self.durability = files, path, durability
        self.has_log = durability.kind != "snapshot"
        self._taking = threading.Lock()
        self._stopped = threading.Event()

    def restore(self, count: int, ask_each: AskEach) -> Book | None:
        """Let `count` servers be at the same commit; returns the book that goes with it, None where the store is empty.

        Raises StorageError when none of the snapshots can be read.
        """
        names = find(self.files, self.path)
        if self.has_log and names and open_manifest(self.files, f"{self.path}/{names[0]}").servers != count:
            self._fold(names[0])  # logs are of so many servers as have written them
            names = find(self.files, self.path)
        last: StorageError | None = None
        for name in names:
            try:
                return self._restore(name, count, ask_each)
            except StorageError as error:
                last = error
                warn(f"{error} Trying an older snapshot.")
        if last is not None:
            raise StorageError(f"Expected a snapshot in {self.path} that can be read, got none: {last}") from last
        ask_each(lambda i: Restore("", 0, i, count))
        return None

    def _restore(self, name: str, count: int, ask_each: AskEach) -> Book:
        manifest = open_manifest(self.files, f"{self.path}/{name}")
        commit = manifest.commit
        if self.has_log and manifest.servers == count:
            # What some have not written down was never acknowledged.
            commit = min(r.commit for r in ask_each(lambda i: Recall(name, i)) if isinstance(r, Recalled))
        answers = ask_each(lambda i: Restore(name, commit, i, count))
        assert isinstance(answers[0], Restored)
        return decode_book(answers[0].book)

    def take(self, job: Job) -> SnapshotTaken:
        """Take a snapshot now; returns when it is whole. Raises StorageError; older snapshots are then as they were."""
        with self._taking:
            newest = next(iter(find(self.files, self.path)), "")
            number = max(job.book().commit, int(newest.rpartition("-")[2] or -1) + 1)
            folder = f"{self.path}/{snapshot_name(number)}"
            self.files.make_folder(folder)
            with job.alone() as ask_each:
                ask_each(lambda _: SnapshotBegin(folder))
            oldest = -1
            try:
                self._poll(job, lambda state: state.is_due)
                with job.alone() as ask_each:
                    book = job.book()
                    ask_each(lambda _: Pin())
                states = self._poll(job, lambda state: state.is_whole)
                publish(self.files, folder, _manifest(book, states))
                prune(self.files, self.path, KEEP)
                kept = find(self.files, self.path)
                oldest = open_manifest(self.files, f"{self.path}/{kept[-1]}").commit
            finally:
                with job.alone() as ask_each:
                    ask_each(lambda _: Unpin(oldest))
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
        last = job.book()
        while every_s and not self._stopped.wait(every_s):
            try:
                book = job.book()
                if (book.optimizer is None and not book.tables) or (book.commit == last.commit and not book.tables):
                    continue
                start = time.monotonic()
                taken = self.take(job)
                last = book
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
    return Manifest.of(
        commit=book.commit,
        servers=len(states),
        consistency=book.consistency,
        optimizer=book.optimizer,
        tensors=specs,
        steps=steps,
        tables=[(spec, 0) for spec in book.tables],
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
