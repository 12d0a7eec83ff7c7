"""The coordinator's state after a commit: what a job needs besides tensors and rows to go on. Pure values.

    book[n+1] = book[n].after(change[n+1])

A commit's *change* travels to every server with the commit and is kept where the commit is kept, so whoever has a shard's state has
the book that belongs to it: a coordinator that was started again takes it from there.
"""

from __future__ import annotations

import secrets

import msgspec

from headwater._consistency import Consistency
from headwater._layout import TensorSpec
from headwater._rows import TableSpec
from headwater.optim import AnyOptimizer

IDENTITIES = 4096  # that are remembered; the longest silent is forgotten first


def new_history() -> int:
    """Return a number that no other history has."""
    return secrets.randbits(62)


class Counted(msgspec.Struct, frozen=True, array_like=True):
    """The last push of one worker that closed a clock."""

    index: int
    sequence: int
    commit: int  # that it was closed by
    clock: int  # of the worker, after it
    accepted: int = 0
    refused: tuple[str, str] | None = None  # the error's class and text
    live: bool = True


class Change(msgspec.Struct, frozen=True, array_like=True):
    """What some commits, or the coordinator between two commits, change. None: nothing."""

    commit: int
    serial: int  # each change has the next one
    workers: dict[int, Counted] = {}
    cohorts: tuple[tuple[int, int], ...] | None = None
    cohort_of: bytes | None = None
    state: dict[str, bytes] | None = None
    leases: bytes | None = None


class Book(msgspec.Struct, frozen=True):
    """Everything there is to know of a job but its tensors and rows."""

    consistency: Consistency
    expected: int  # workers at the start
    commit: int = 0
    tensors: tuple[TensorSpec, ...] | None = None  # None: not registered
    optimizer: AnyOptimizer | None = None
    tables: tuple[TableSpec, ...] = ()
    cohorts: tuple[tuple[int, int], ...] = ()
    cohort_of: bytes = b""
    workers: dict[int, Counted] = {}  # by identity
    state: dict[str, bytes] = {}
    leases: bytes = b""
    serial: int = 0  # of the last change
    history: int = 0  # another one from each going back on: who knows of another one, knows what is void

    def after(self, change: Change) -> Book:
        """Return the book after a change."""
        workers = self.workers
        if change.workers:
            workers = {key: value for key, value in workers.items() if key not in change.workers} | change.workers
            while len(workers) > IDENTITIES:
                del workers[next(iter(workers))]
        changes = {
            name: value
            for name in ("cohorts", "cohort_of", "state", "leases")
            if (value := getattr(change, name)) is not None
        }
        return msgspec.structs.replace(self, commit=change.commit, serial=change.serial, workers=workers, **changes)
