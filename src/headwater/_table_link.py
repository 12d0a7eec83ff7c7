"""The way to one server's tables: a connection, and this worker's rooms at its other end.

Requests about what lies in a room are sent without waiting; their answers come in the same order and are taken when the room is needed
again, or at the latest before the step that they belong to is sealed. So a push costs the worker no wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from headwater import _limits
from headwater._errors import ClosedError, HeadwaterError, LayoutError, PeerError, ProtocolError, WaitTimeoutError
from headwater._memory import stack_buffers, zeroed
from headwater._messages import AnyMessage, Attached, Room
from headwater._peers import Peers
from headwater._transport import Connection

_M = TypeVar("_M")
_ROOM_BYTES = 1 << 16  # the least that is asked for


class Session(Protocol):
    """What tables need of their session."""

    _is_pending: bool
    _sequence: int
    _peers: Peers

    def wait(self) -> int: ...
    def _require_open(self) -> None: ...
    def _held(self) -> AbstractContextManager[Any]: ...


class _Owed(NamedTuple):
    """An answer that is still to come."""

    answer: type[Any]
    view: memoryview | None
    room: int


class Link:
    """The way to one server's rows."""

    def __init__(self, session: Session, connection: Connection, *, shares: bool) -> None:
        self._session, self.connection, self.shares = session, connection, shares
        self._rooms: dict[int, np.ndarray] = {}
        self.failed: set[int] = set()  #: rooms whose last request was refused
        self._owed: deque[_Owed] = deque()
        self._is_broken = False

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Close the connection where an exchange ends half way, by Ctrl+C for instance: what is still to come would be taken for the
        answer to something else."""
        self._check()
        try:
            yield
        except BaseException as error:
            if not isinstance(error, HeadwaterError) or isinstance(error, (PeerError, WaitTimeoutError)):
                self._is_broken = True
                self._owed.clear()
                self.connection.close()
            raise

    def _check(self) -> None:
        if self._is_broken:
            raise ClosedError(
                "Expected a connection to the tables, got one that broke off in the middle of a request: connect() again."
            )

    def room(self, number: int, size: int) -> np.ndarray:
        """Return room for a batch, uint8, when what was asked about it is answered; shared with the server where it can be."""
        if not self.shares or any(owed.room == number for owed in self._owed):
            self.settle()
        found = self._rooms.get(number)
        if found is None or found.nbytes < size:
            if size > _limits.ROOM_BYTES:
                raise LayoutError(f"Expected a batch of at most {_limits.ROOM_BYTES} bytes, got {size}: split it.")
            self.settle()
            size = max(1 << (size - 1).bit_length(), _ROOM_BYTES)
            with self._exchange():
                self.connection.send(Room(number, size, self.shares))
                attached, fds = self._session._peers.receive(self.connection, Attached)
            if len(fds) != self.shares or len(fds) != attached.fds:
                raise ProtocolError(f"Expected {attached.fds} shared buffers, got {len(fds)}.")
            found = stack_buffers(list(fds), [size], private=False).array if fds else zeroed(size)
            self._rooms[number] = found
        return found

    def send(
        self,
        message: AnyMessage,
        payload: np.ndarray,
        answer: type[Any],
        view: np.ndarray | None = None,
        *,
        room: int,
    ) -> None:
        """Ask about what lies in a room; `settle` brings the answer. payload, view: what travels there and back where memory is not
        shared, uint8."""
        if not self.shares:
            self.settle()  # else both ends might wait for the other to read
        with self._exchange():
            self.connection.send(message, None if self.shares or not payload.nbytes else memoryview(payload))
            self.failed.discard(room)
            self._owed.append(_Owed(answer, None if self.shares or view is None else memoryview(view), room))

    def settle(self) -> None:
        """Bring in every answer that is still to come. Raises the first error among them."""
        self._check()
        first: HeadwaterError | None = None
        while self._owed:
            try:
                with self._exchange():
                    owed = self._owed.popleft()
                    self._session._peers.receive(self.connection, owed.answer, owed.view)
            except HeadwaterError as error:
                if self._is_broken:
                    raise
                self.failed.add(owed.room)
                first = first or error
        if first is not None:
            raise first

    def ask(
        self,
        message: AnyMessage,
        answer: type[_M],
        size: Callable[[_M], int] | None = None,
        payload: memoryview | None = None,
    ) -> tuple[_M, np.ndarray]:
        """Ask and wait; returns the answer and its payload, whose size the answer tells. payload: travels there, whatever is shared."""
        held = [np.empty(0, np.uint8)]

        def place(message: AnyMessage) -> memoryview:
            held[0] = np.empty(size(message) if size is not None and isinstance(message, answer) else 0, np.uint8)
            return memoryview(held[0])

        self.settle()
        with self._exchange():
            self.connection.send(message, payload)
            return self._session._peers.receive(self.connection, answer, place)[0], held[0]
