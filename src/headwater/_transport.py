"""Connections: messages and payloads between two processes, over TCP, Unix sockets or memory.

A connection is used by one thread at a time. `send` may hold small frames back while the peer's next request already
lies in the input buffer; `receive` flushes them before it blocks. So a pipelined push, seal and pull cost one
system call each way.
"""

from __future__ import annotations

import array
import contextlib
import os
import queue
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from headwater import _limits
from headwater._errors import (
    AddressError,
    AuthenticationError,
    PeerLostError,
    ProtocolError,
    SettingError,
    UnreachableError,
    WaitTimeoutError,
)
from headwater._messages import AnyMessage, Failed, decode, encode
from headwater._wire import HEADER_BYTES, pack_header, unpack_header

#: Given a message and the payload's size, return where the payload goes (exactly that size), or raise.
Sink = Callable[[AnyMessage, int], memoryview]
#: Told how many bytes of a payload have come, and of how many, whenever there are more.
Arrived = Callable[[int, int], None]
_READ_BYTES = 1 << 16
_HELD_BYTES = 1 << 14


class Received(NamedTuple):
    """A message that arrived; its payload, if any, lies where the sink said."""

    message: AnyMessage
    fds: tuple[int, ...] = ()  # owned by the receiver


class Connection(Protocol):
    """One end of a two-way stream of messages. PeerLostError closes it."""

    can_share: bool  # whether file descriptors can travel, that is: both ends are on one machine
    peer: str  # for people

    @property
    def has_ended(self) -> bool:
        """Whether the other end is closed already, read or not: a process that dies closes its ends."""

    def send(self, message: AnyMessage, payload: memoryview | None = None, fds: Sequence[int] = ()) -> None:
        """Send; `payload` may be reused on return. Raises PeerLostError."""

    def hold(self, message: AnyMessage, payload: memoryview | None = None) -> None:
        """Keep back until the next send, flush or receive takes it along; `payload` may be reused when that returns.

        A receive reads while it sends, so the peer may answer before it has the whole payload.
        """

    def send_head(self, message: AnyMessage, size: int) -> None:
        """Begin to send a message whose payload of `size` bytes follows piece by piece, by `send_more`."""

    def send_more(self, piece: memoryview) -> None:
        """Send the next piece of the payload; it may be reused on return."""

    def receive(self, sink: Sink | None = None, *, with_fds: bool = False, arrived: Arrived | None = None) -> Received:
        """Wait for the next message. Raises PeerLostError, ProtocolError, WaitTimeoutError.

        with_fds: take descriptors that come along, where `can_share`; else they are dropped. arrived: is told how a payload grows.
        """

    def set_timeout(self, seconds: float | None) -> None:
        """Let receive and send wait so long; None: for ever."""

    def flush(self) -> None:
        """Send what was held back."""

    def abandon(self) -> None:
        """Drop a forked child's copy; the connection goes on in the parent."""

    def close(self) -> None:
        """End the connection; a thread that waits in it gets PeerLostError. Closing twice is fine."""


def refuse_payload(message: AnyMessage, size: int) -> memoryview:
    """The sink of those who expect no payload."""
    raise ProtocolError(f"Expected {type(message).__name__} without payload, got {size} bytes.")


class SocketConnection:
    """A connection over a connected TCP or Unix stream socket, which it owns."""

    def __init__(self, sock: socket.socket, peer: str = "") -> None:
        self._socket = sock
        self.can_share = sock.family == socket.AF_UNIX
        self.peer = peer or _peer_name(sock)
        if not self.can_share:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._input = bytearray(_READ_BYTES)
        self._start = self._stop = 0  # unread bytes of the input buffer
        self._held: deque[bytearray | memoryview] = deque()  # back: small frames run together, and large payloads
        self._timeout_s: float | None = None
        self.spin_s = 0.0  #: how long a receive looks again and again before it sleeps: to be woken takes some 30 µs
        self._fds: list[int] = []

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    @property
    def has_ended(self) -> bool:
        poll = select.poll()
        if self._socket.fileno() < 0:
            return True
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    @property
    def own_host(self) -> str:
        """Our end's address, as the peer sees it where no router rewrites it; empty for Unix sockets."""
        return "" if self.can_share else str(self._socket.getsockname()[0])

    def send(self, message: AnyMessage, payload: memoryview | None = None, fds: Sequence[int] = ()) -> None:
        self.hold(message, payload)
        if fds:
            try:
                self._drop(socket.send_fds(self._socket, list(self._held), list(fds)))
            except OSError as error:
                raise self._lost(error) from error
        if self._start == self._stop or self._holds_much:
            self.flush()

    def hold(self, message: AnyMessage, payload: memoryview | None = None) -> None:
        size = 0 if payload is None else payload.nbytes
        self.send_head(message, size)
        if payload is None:
            return
        if size <= _HELD_BYTES:
            self._hold_small(payload)
        else:
            self._held.append(payload.cast("B"))

    def send_head(self, message: AnyMessage, size: int) -> None:
        control = encode(message)
        self._hold_small(pack_header(len(control), size) + control)

    def send_more(self, piece: memoryview) -> None:
        self._held.append(piece)
        self.flush()

    def flush(self) -> None:
        try:
            while self._held:
                self._drop(self._socket.sendmsg(self._held))
        except OSError as error:
            raise self._lost(error) from error

    def _hold_small(self, data: bytes | memoryview) -> None:
        if not self._held or isinstance(self._held[-1], memoryview):
            self._held.append(bytearray())
        self._held[-1] += data  # type: ignore[operator]

    def _drop(self, sent: int) -> None:
        """Forget so many bytes of what was held back."""
        while self._held and sent >= len(self._held[0]):
            sent -= len(self._held.popleft())
        if sent:
            self._held[0] = self._held[0][sent:]

    @property
    def _holds_much(self) -> bool:
        return any(isinstance(held, memoryview) for held in self._held)

    def receive(self, sink: Sink | None = None, *, with_fds: bool = False, arrived: Arrived | None = None) -> Received:
        if self._stop - self._start < HEADER_BYTES:
            self._fill(HEADER_BYTES, with_fds)
        control_bytes, payload_bytes = unpack_header(self._input, self._start)
        size = HEADER_BYTES + control_bytes  # the header is taken with its message: a wait may end in between
        if self._stop - self._start < size:
            self._fill(size, with_fds)
        stop = self._start + size
        message = decode(memoryview(self._input)[self._start + HEADER_BYTES : stop])
        self._start = stop
        if payload_bytes:
            self._receive_payload((sink or refuse_payload)(message, payload_bytes), arrived)
        if not with_fds:
            return Received(message)
        fds, self._fds = tuple(self._fds), []
        return Received(message, fds)

    def drain(self) -> None:
        """Stop sending, and read for a moment: else unread bytes would reset the connection and take the last answer along."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self.set_timeout(0.2)
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline and self._socket.recv_into(self._input):
                pass

    def set_timeout(self, seconds: float | None) -> None:
        # SO_RCVTIMEO rather than settimeout: the socket stays blocking and a receive stays one system call.
        self._timeout_s = seconds
        value = 0.0 if seconds is None else max(seconds, 1e-3)
        packed = struct.pack("ll", int(value), int(value % 1 * 1e6))
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, packed)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, packed)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def abandon(self) -> None:
        """Close this process's descriptor only: the connection lives on in the process that forked this one."""
        self._socket.close()

    def _fill(self, size: int, with_fds: bool) -> None:
        """Have at least `size` unread bytes in the input buffer; what was held back is sent before this blocks."""
        if with_fds or not self._holds_much:
            self.flush()
        if self._start + size > len(self._input) or self._start == self._stop:
            unread = self._input[self._start : self._stop]
            self._input[: len(unread)] = unread
            self._start, self._stop = 0, len(unread)
        try:
            while self._stop - self._start < size:
                if self._stop == len(self._input):  # grows with what has come, not with what was promised
                    self._input = self._input + bytes(min(self._stop, size - self._stop))
                count = self._read(memoryview(self._input)[self._stop :], with_fds)
                if count == 0:
                    raise self._lost(None)
                self._stop += count
        except BlockingIOError as error:
            raise WaitTimeoutError(f"Expected an answer from {self.peer}, got none in time.") from error
        except OSError as error:
            raise self._lost(error) from error

    def _read(self, view: memoryview, with_fds: bool) -> int:
        if not (with_fds and self.can_share):
            return self._read_into(view)  # descriptors that nobody asked for are dropped by the kernel
        count, ancillary, _, _ = self._socket.recvmsg_into([view], socket.CMSG_SPACE(_limits.DESCRIPTORS * 4))
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds += array.array("i", data[: len(data) - len(data) % 4])
        return count

    def _read_into(self, view: memoryview) -> int:
        """Read what there is; until there is something, send on what was held back."""
        if self._held:
            poll = select.poll()
            if self._socket.fileno() < 0:
                raise ConnectionError("it is closed")
            poll.register(self._socket, select.POLLIN | select.POLLOUT)
            while self._held:
                events = poll.poll(None if self._timeout_s is None else 1e3 * self._timeout_s)
                if not events:
                    raise BlockingIOError("neither way moves")
                if events[0][1] & select.POLLOUT:
                    with contextlib.suppress(BlockingIOError):  # no memory for it just now
                        self._drop(self._socket.sendmsg(self._held, [], socket.MSG_DONTWAIT))
                if events[0][1] & ~select.POLLOUT:
                    break
        deadline = time.perf_counter() + self.spin_s if self.spin_s else 0.0
        while deadline and time.perf_counter() < deadline:
            try:
                return self._socket.recv_into(view, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                os.sched_yield()  # whoever is to answer may need this core
        return self._socket.recv_into(view)

    def _receive_payload(self, target: memoryview, arrived: Arrived | None) -> None:
        ready = min(self._stop - self._start, target.nbytes)
        target[:ready] = memoryview(self._input)[self._start : self._start + ready]
        self._start += ready
        if arrived is not None and ready:
            arrived(ready, target.nbytes)
        try:
            while ready < target.nbytes:
                count = self._read_into(target[ready:])
                if count == 0:
                    raise ConnectionError(f"it closed after {ready} of {target.nbytes} payload bytes")
                ready += count
                if arrived is not None:
                    arrived(ready, target.nbytes)
        except OSError as error:  # half a payload cannot be made good, a time-out included
            raise self._lost(error) from error

    def _lost(self, error: OSError | None) -> PeerLostError:
        if isinstance(error, PeerLostError):
            return error
        self.close()
        return PeerLostError(f"The connection to {self.peer} ended{f': {error}' if error else ''}.")


class MemoryConnection:
    """One end of a connection within a process. Messages are encoded all the same: nothing is shared by accident."""

    can_share = True

    def __init__(
        self, inbox: queue.SimpleQueue[_Item], outbox: queue.SimpleQueue[_Item], peer: str = "this process"
    ) -> None:
        self._inbox, self._outbox, self.peer = inbox, outbox, peer
        self._timeout: float | None = None
        self._is_closed = False
        self._pieces = bytearray()
        self._head: tuple[AnyMessage, int] | None = None

    def send(self, message: AnyMessage, payload: memoryview | None = None, fds: Sequence[int] = ()) -> None:
        if self._is_closed:
            raise PeerLostError(f"The connection to {self.peer} is closed.")
        bulk = None if payload is None else bytes(payload)
        self._outbox.put((encode(message), bulk, tuple(os.dup(fd) for fd in fds)))

    def hold(self, message: AnyMessage, payload: memoryview | None = None) -> None:
        self.send(message, payload)

    def send_head(self, message: AnyMessage, size: int) -> None:
        self._head, self._pieces = (message, size), bytearray()

    def send_more(self, piece: memoryview) -> None:
        assert self._head is not None
        message, size = self._head
        self._pieces += piece
        if len(self._pieces) == size:
            self.send(message, memoryview(self._pieces))

    def receive(self, sink: Sink | None = None, *, with_fds: bool = False, arrived: Arrived | None = None) -> Received:
        try:
            item = None if self._is_closed else self._inbox.get(timeout=self._timeout)
        except queue.Empty:
            raise WaitTimeoutError(f"Expected an answer from {self.peer}, got none in {self._timeout} s.") from None
        if item is None:
            self.close()
            raise PeerLostError(f"The connection to {self.peer} ended.")
        control, bulk, fds = item
        message = decode(control)
        if bulk:
            (sink or refuse_payload)(message, len(bulk))[:] = bulk
            if arrived is not None:
                arrived(len(bulk), len(bulk))
        if not with_fds:
            for fd in fds:
                os.close(fd)
            return Received(message)
        return Received(message, fds)

    def set_timeout(self, seconds: float | None) -> None:
        self._timeout = seconds

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._outbox.put(None)
            with contextlib.suppress(queue.Empty):
                while item := self._inbox.get_nowait():
                    for fd in item[2]:
                        os.close(fd)
            self._inbox.put(None)

    @property
    def has_ended(self) -> bool:
        return self._is_closed

    def abandon(self) -> None:
        """In a forked child the other end's thread does not exist."""
        self._is_closed = True


_Item = tuple[bytes, bytes | None, tuple[int, ...]] | None


def memory_pair() -> tuple[MemoryConnection, MemoryConnection]:
    """Return the two ends of a connection within this process."""
    one: queue.SimpleQueue[_Item] = queue.SimpleQueue()
    two: queue.SimpleQueue[_Item] = queue.SimpleQueue()
    return MemoryConnection(one, two), MemoryConnection(two, one)


class Address(NamedTuple):
    """tcp://HOST:PORT or unix:///PATH."""

    kind: str
    host: str
    port: int

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix://{self.host}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.kind == "unix" or self.host in ("localhost", "::1") or self.host.startswith("127.")

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address. Raises SettingError."""
        try:
            parts = urlsplit(text if "://" in text else f"tcp://{text}")
            if parts.scheme == "unix" and parts.path and not parts.netloc:
                return cls("unix", parts.path, 0)
            if parts.scheme == "tcp" and parts.hostname and parts.port is not None:
                return cls("tcp", parts.hostname, parts.port)
        except ValueError:
            pass
        raise SettingError(
            f"Expected an address such as tcp://127.0.0.1:7077 or unix:///run/headwater.sock, got {text!r}."
        )


def listen(address: Address) -> socket.socket:
    """Return a listening socket; a Unix one is readable and writable by its owner only. Raises AddressError."""
    try:
        if address.kind == "unix":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            mask = os.umask(0o177)
            try:
                sock.bind(address.host)
                sock.listen(128)
            except OSError:
                sock.close()
                raise
            finally:
                os.umask(mask)
            return sock
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return socket.create_server((address.host, address.port), family=family, backlog=128)
    except OSError as error:
        raise AddressError(
            f"Cannot listen on {address}: {error.strerror or error}. Is another server running there? Port 0 takes any free one."
        ) from error


def connect(address: Address, timeout_s: float = _limits.CONNECT_S) -> SocketConnection:
    """Connect, waiting for a server that is still starting. Raises UnreachableError past the time-out."""
    deadline = time.monotonic() + timeout_s
    pause = 0.01
    while True:
        sock = None
        try:
            if address.kind == "unix":
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.connect(address.host)
            else:
                left = max(deadline - time.monotonic(), 1.0)  # one try over a slow line
                sock = socket.create_connection((address.host, address.port), timeout=left)
                sock.settimeout(None)
            return SocketConnection(sock, str(address))
        except OSError as error:
            if sock is not None:
                sock.close()
            if time.monotonic() + pause > deadline or isinstance(error, (PermissionError, socket.gaierror)):
                raise UnreachableError(
                    f"Expected a server at {address}, got: {error.strerror or error}, tried for {timeout_s:g} s. "
                    "Is `headwater server` running there, and does HEADWATER_ADDRESS name it?"
                ) from error
        time.sleep(pause)
        pause = min(pause * 2, 0.5)


def new_identity() -> int:
    """Return a random number that names a process to its peers."""
    return int.from_bytes(os.urandom(8), "little") >> 1


def process_label() -> str:
    """Return this process's host and number, for people."""
    return f"{socket.gethostname()}:{os.getpid()}"


def host_name() -> str:
    """Name this machine and user: processes for which it is equal can share memory."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = Path("/proc/self/ns/mnt").readlink()
        return f"{boot}/{space}/{os.geteuid()}"
    return f"{socket.gethostname()}/{os.geteuid()}"


def check_user(sock: socket.socket) -> None:
    """Refuse a peer on a Unix socket that belongs to another user. Raises AuthenticationError."""
    if sock.family == socket.AF_UNIX:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, user, _ = struct.unpack("3i", raw)
        if user != os.geteuid():
            raise AuthenticationError(f"Expected a peer of user {os.geteuid()}, got user {user}.")


def request(
    connection: Connection, message: AnyMessage, sink: Sink | None = None, payload: memoryview | None = None
) -> Received:
    """Send a message and return its answer. Raises the error that the peer answered with."""
    connection.send(message, payload)
    received = connection.receive(sink)
    if isinstance(received.message, Failed):
        raise received.message.exception()
    return received


def _peer_name(sock: socket.socket) -> str:
    with contextlib.suppress(OSError):
        name = sock.getpeername()
        if isinstance(name, tuple):
            return f"{name[0]}:{name[1]}"
    return "a local peer"
