"""A client of replicas: rows by table and id, over TCP or a Unix socket; on one machine ids and rows lie in shared memory.

A lookup changes nothing, so one that is lost with its connection is asked again on another, once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from headwater import _limits
from headwater._errors import ClosedError, LayoutError, PeerLostError, ProtocolError, SettingError, UsageError
from headwater._lookup import as_ids
from headwater._memory import stack_buffers
from headwater._messages import (
    AnyMessage,
    Attached,
    Declare,
    Declared,
    Hello,
    Here,
    PulledRows,
    PullRows,
    ReplicaStats,
    Room,
    StatsGet,
)
from headwater._peers import nearest
from headwater._rows import batch_bytes, rows_at
from headwater._table_copy import Found
from headwater._transport import Address, Connection, connect, host_name, new_identity, request

_M = TypeVar("_M")
_ROOM_BYTES = 1 << 17  # the least that is asked for: 1,000 ids of dim 16 fit


class Reader:
    """A connection to a replica, made by `lookup`. It can be shared between threads, which wait for one another, and used after a fork.

    Close it, or use it as a context manager; closing twice is fine.
    """

    def __init__(self, address: Address, *, token: str, transport: str, timeout_s: float) -> None:
        self._address, self._transport, self._timeout_s = address, transport, timeout_s
        self._hello = Hello(token, "table", new_identity())
        self._is_closed = False
        self._begin()
        with self._lock:
            self._open()

    def _begin(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._connection: Connection | None = None
        self._shares = False
        self._room = np.empty(0, np.uint8)  # as large as the replica's end of it; shared with it, or not looked at
        self._tables: dict[str, Declared] = {}

    def pull(self, table: str, ids: Any) -> np.ndarray:
        """Return the rows of `ids` as the replica has them now: float32 (*ids.shape, dim), yours.

        ids: integers of any dtype and shape, repeats allowed. An id without a row has its initial value, the same that training sees;
        `look_up` tells how many there were. Each row is as one update left it; two rows may be of different moments.
        Raises LayoutError for ids that are no integers, SettingError for a table that is not there, PeerLostError or UnreachableError
        when the replica is gone, WaitTimeoutError when it does not answer.
        """
        return self.look_up(table, ids).rows

    def look_up(self, table: str, ids: Any) -> Found:
        """Return the rows of `ids` as `pull` does, and how many of the ids have none."""
        flat = as_ids(ids, f"table {table!r}")
        found = self._surviving(lambda: self._look_up(table, flat))
        return Found(found.rows.reshape(*np.shape(ids), found.rows.shape[1]), found.missing)

    def stats(self) -> ReplicaStats:
        """Return the replica at a glance: for each table its rows, bytes, how late updates come, lookups."""
        return self._surviving(lambda: self._ask(StatsGet(), ReplicaStats))

    def _look_up(self, table: str, ids: np.ndarray) -> Found:
        declared = self._tables.get(table)
        if declared is None:
            declared = self._tables[table] = self._ask(Declare(table), Declared)
        count, dim = len(ids), declared.spec.dim
        size = batch_bytes(count, dim)
        if self._room.nbytes < size:
            self._make_room(size)
        pull = PullRows(declared.table, 0, count, False)
        out = np.empty((count, dim), np.float32)
        if not self._shares:
            return Found(out, self._ask(pull, PulledRows, memoryview(ids) if count else None, out).missing)
        self._room[: 8 * count].view(np.int64)[...] = ids
        missing = self._ask(pull, PulledRows).missing
        out[...] = self._room[rows_at(count) : size].view(np.float32).reshape(count, dim)
        return Found(out, missing)

    def _make_room(self, size: int) -> None:
        if size > _limits.ROOM_BYTES:
            raise LayoutError(f"Expected a batch of at most {_limits.ROOM_BYTES} bytes, got {size}: split it.")
        size = max(1 << (size - 1).bit_length(), _ROOM_BYTES)
        assert self._connection is not None
        self._room = np.empty(0, np.uint8)
        self._connection.send(Room(0, size, self._shares))
        answer, fds = self._connection.receive(with_fds=True)
        if not isinstance(answer, Attached) or len(fds) != self._shares:
            raise ProtocolError(f"Expected memory for a batch, got {type(answer).__name__} with {len(fds)} buffers.")
        self._room = stack_buffers(list(fds), [size], private=False).array[:size] if fds else np.empty(size, np.uint8)

    def _ask(
        self,
        message: AnyMessage,
        answer: type[_M],
        payload: memoryview | None = None,
        view: np.ndarray | None = None,
    ) -> _M:
        def sink(message: AnyMessage, size: int) -> memoryview:
            if view is None or size != view.nbytes or not isinstance(message, answer):
                raise ProtocolError(f"Expected {answer.__name__}, got {type(message).__name__} with {size} bytes.")
            return memoryview(view).cast("B")

        assert self._connection is not None
        found = request(self._connection, message, sink, payload).message
        if not isinstance(found, answer):
            raise ProtocolError(f"Expected {answer.__name__}, got {type(found).__name__}.")
        return found

    def _surviving(self, act: Callable[[], _M]) -> _M:
        """Ask, and once again on another connection where this one ends."""
        if self._pid != os.getpid():  # a forked child: the connection is its parent's, and so may be the lock
            if self._connection is not None:
                self._connection.abandon()
            self._begin()
        with self._lock:
            if self._is_closed:
                raise ClosedError("Expected an open connection to a replica, got one that is closed.")
            for is_last in (False, True):
                try:
                    if self._connection is None:
                        self._open()
                    return act()
                except UsageError:
                    raise  # the replica has answered
                except BaseException as error:
                    self._drop()  # what is still to come would be taken for the answer to something else
                    if is_last or not isinstance(error, PeerLostError):
                        raise
            raise AssertionError

    def _open(self) -> None:
        address = self._address
        patience_s = min(self._timeout_s, _limits.CONNECT_S)
        if address.kind == "tcp" and address.is_local and self._transport != "tcp":
            address = nearest(address, self._hello, patience_s)
        self._connection = connection = connect(address, patience_s)
        connection.set_timeout(min(self._timeout_s, _limits.SILENCE_S))
        try:
            here = self._ask(self._hello, Here)
        except BaseException:
            self._drop()
            raise
        is_here = connection.can_share and here.address.host == host_name()
        self._shares = is_here and self._transport != "tcp"
        connection.spin_s = _limits.SPIN_S

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, self._room = None, np.empty(0, np.uint8)
        self._tables.clear()

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            self._is_closed = True
            self._drop()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Reader of {self._address}>"


def lookup(
    address: str, *, token: str | None = None, transport: str | None = None, timeout_s: float = _limits.SILENCE_S
) -> Reader:
    """Connect to a replica, to look rows up: `lookup(address).pull("items", ids)`.

    address: where the replica listens. token: the job's, default $HEADWATER_TOKEN. transport: "auto" takes shared memory where it can,
    "tcp" does without; default $HEADWATER_TRANSPORT, or auto. timeout_s: for an answer. Raises UnreachableError, AuthenticationError,
    SettingError.
    """
    transport = transport or os.environ.get("HEADWATER_TRANSPORT") or "auto"
    if transport not in ("auto", "tcp"):
        raise SettingError(f"Expected transport auto or tcp, got {transport!r}.")
    token = os.environ.get("HEADWATER_TOKEN", "") if token is None else token
    return Reader(Address.parse(address), token=token, transport=transport, timeout_s=timeout_s)
