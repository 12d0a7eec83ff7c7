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

from headwater import _kernels, _limits
from headwater._errors import (
    ClosedError,
    HeadwaterError,
    LayoutError,
    PeerError,
    PeerLostError,
    ProtocolError,
    WaitTimeoutError,
)
from headwater._memory import remap_buffers, stack_buffers, zeroed
from headwater._messages import AnyMessage, Attached, Done, Room
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
    def _come_back(self, error: PeerLostError) -> None: ...
    def begin_tables(self) -> None: ...
    def _require_open(self) -> None: ...
    def _held(self) -> AbstractContextManager[Any]: ...


class _Owed(NamedTuple):
    """An answer that is still to come, and what was asked."""

    message: AnyMessage
    payload: memoryview | None
    answer: type[Any]
    view: memoryview | None
    room: int


class Link:
    """The way to one server's rows."""

    def __init__(self, session: Session, connection: Connection, *, shares: bool) -> None:
        self._session, self.connection, self.shares = session, connection, shares
        self._rooms: dict[int, np.ndarray] = {}
        self._arenas: dict[int, _kernels.Arena] = {}  # of rooms that are shared
        self.failed: set[int] = set()  #: rooms whose last request was refused
        self.staged: list[tuple[AnyMessage, np.ndarray]] = []  #: pushes that wait for their step, to be said again
        self.tracked: dict[tuple[int, str], AnyMessage] = {}  #: delta streams, to be begun again
        self._owed: deque[_Owed] = deque()
        self._is_broken = False

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Close the connection where an exchange ends half way, by Ctrl+C for instance: what is still to come would be taken for the
        answer to something else."""
        self._check()
        try:
            yield
        except PeerLostError:
            raise
        except BaseException as error:
            if not isinstance(error, HeadwaterError) or isinstance(error, (PeerError, WaitTimeoutError)):
                self._break()
            raise

    def _break(self) -> None:
        self._is_broken = True
        self._owed.clear()
        self.connection.close()

    def _check(self) -> None:
        if self._is_broken:
            raise ClosedError(
                "Expected a connection to the tables, got one that broke off in the middle of a request: connect() again."
            )

    def _surviving(self, act: Callable[[], _M]) -> _M:
        """Do something that may be done twice; where the connection ends and the job is durable, come back and do it again."""
        while True:
            try:
                with self._exchange():
                    return act()
            except PeerLostError as error:
                self._come_back(error)

    def _come_back(self, error: PeerLostError) -> None:
        try:
            self._session._come_back(error)
        except HeadwaterError:
            self._break()
            raise

    def attach_again(self, connection: Connection) -> None:
        """Use another connection: make the rooms again, where they lie, and begin the delta streams again."""
        self.connection, self._is_broken = connection, False
        for number in self._rooms:
            self._make_room(number, self._rooms[number].nbytes)
        for track in self.tracked.values():
            self._ask(track, Done)

    def resume(self, *, stages: bool) -> None:
        """Ask again what is not answered. stages: push again what waits for its step; else that is forgotten."""
        waiting = [message for message, _ in self.staged]
        if self.staged and stages:
            room = self._rooms[0]
            before = room.copy()
            for message, raw in self.staged:
                room[: raw.nbytes] = raw
                self._ask(message, Done, payload=self._travelling(room[: raw.nbytes]))
            room[:] = before
        if not stages:
            self.staged.clear()
        self._owed = deque(owed for owed in self._owed if owed.message not in waiting)
        for owed in self._owed:
            self.connection.send(owed.message, owed.payload)

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
            self._rooms.pop(number, None)
            self._arenas.pop(number, None)
            self._surviving(lambda: self._make_room(number, size))
        return self._rooms[number]

    def _make_room(self, number: int, size: int) -> None:
        self.connection.send(Room(number, size, self.shares))
        attached, fds = self._session._peers.receive(self.connection, Attached)
        if len(fds) != self.shares or len(fds) != attached.fds:
            raise ProtocolError(f"Expected {attached.fds} shared buffers, got {len(fds)}.")
        if not fds:
            self._rooms.setdefault(number, zeroed(size))
        elif number in self._arenas:
            saved = self._rooms[number].copy()
            remap_buffers(self._arenas[number], list(fds), [size])
            self._rooms[number][:] = saved
        else:
            arena = self._arenas[number] = stack_buffers(list(fds), [size], private=False)
            self._rooms[number] = arena.array[:size]

    def _travelling(self, payload: np.ndarray) -> memoryview | None:
        """Return what goes along where memory is not shared."""
        return None if self.shares or not payload.nbytes else memoryview(payload)

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
        target = None if self.shares or view is None else memoryview(view)
        owed = _Owed(message, self._travelling(payload), answer, target, room)
        try:
            with self._exchange():
                self.failed.discard(room)
                self._owed.append(owed)
                self.connection.send(message, owed.payload)
        except PeerLostError as error:
            self._come_back(error)  # which asks again

    def settle(self) -> None:
        """Bring in every answer that is still to come. Raises the first error among them."""
        self._check()
        first: HeadwaterError | None = None
        while self._owed:
            owed = self._owed[0]
            try:
                with self._exchange():
                    self._session._peers.receive(self.connection, owed.answer, owed.view)
            except PeerLostError as error:
                self._come_back(error)
                continue
            except HeadwaterError as error:
                if self._is_broken:
                    raise
                self.failed.add(owed.room)
                first = first or error
            self._owed.popleft()
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
        self.settle()
        return self._surviving(lambda: self._ask(message, answer, size, payload))

    def _ask(
        self,
        message: AnyMessage,
        answer: type[_M],
        size: Callable[[_M], int] | None = None,
        payload: memoryview | None = None,
    ) -> tuple[_M, np.ndarray]:
        held = [np.empty(0, np.uint8)]

        def place(message: AnyMessage) -> memoryview:
            held[0] = np.empty(size(message) if size is not None and isinstance(message, answer) else 0, np.uint8)
            return memoryview(held[0])

        self.connection.send(message, payload)
        return self._session._peers.receive(self.connection, answer, place)[0], held[0]
