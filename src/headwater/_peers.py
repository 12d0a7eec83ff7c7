"""How a session reaches its job: the connection to the coordinator, the heartbeat, and those to every server for tensors and for tables."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import msgspec

from headwater import _kernels, _limits
from headwater._errors import HeadwaterError, PeerLostError, ProtocolError, SettingError, WaitTimeoutError, warn
from headwater._messages import (
    AnyMessage,
    Attached,
    Beat,
    Failed,
    Hello,
    Here,
    Leave,
    Pulled,
    ServerAddress,
    Waiting,
    Welcome,
    encode,
)
from headwater._transport import Address, Connection, connect, host_name, request
from headwater._wire import pack_header

if TYPE_CHECKING:
    from headwater._server import Server
    from headwater.durability import Durability

_M = TypeVar("_M")
_C = TypeVar("_C", bound=Connection)
_AGAIN_S = 0.5  # for one try to come back: between two, it is seen whether anybody is left to come back to


class Peers:
    """One session's connections. address: the job's first server; None: it is `server`, in this process.

    owns_server: it ends with this session. durability: what the job is expected to survive; None: whatever that is.
    """

    def __init__(
        self,
        address: Address | None,
        hello: Hello,
        *,
        transport: str,
        timeout_s: float,
        server: Server | None = None,
        owns_server: bool = False,
        durability: Durability | None = None,
    ) -> None:
        self.hello, self.timeout_s, self._durability = hello, timeout_s, durability
        self._address, self._transport = address, transport
        self._pid = os.getpid()
        self.server = server  #: the embedded one
        self.owns_server = owns_server
        self._beat: Connection | None = None
        self._heartbeat: _kernels.Heartbeat | None = None
        self._former: list[Connection] = []  # that others have taken the place of
        self._opened: dict[tuple[str, int], tuple[Connection, bool]] = {}  # by role and server
        self.clock = 0  #: the session's, for what people are told
        self._is_apart = False  # the coordinator is not the first server
        self.is_durable = False  #: whether the job outlives its servers
        self.addresses: tuple[ServerAddress, ...] = ()  #: of the servers, in their order
        self.control = self._open_control()

    def _open_control(self) -> Connection:
        if self.server is not None:
            return self.server.connect_memory()
        assert self._address is not None
        patience_s = _AGAIN_S if self.hello.returns else _limits.CONNECT_S  # who comes back tries again
        return connect(self._address, min(self.timeout_s, patience_s))

    def beside(self, hello: Hello) -> Peers:
        """Return connections of somebody else in this process to the same job."""
        return Peers(self._address, hello, transport=self._transport, timeout_s=self.timeout_s, server=self.server)

    def greet(self) -> Welcome:
        """Say hello to the coordinator, and begin to beat."""
        self.control.set_timeout(_limits.SILENCE_S)
        self.control.send(self.hello)
        welcome = self.receive(self.control, Welcome)[0]
        if self._durability is not None and welcome.durability != str(self._durability):
            raise SettingError(
                f"Expected durability {welcome.durability or 'none'}, the job's, got {self._durability}: leave it out in connect(), or "
                f"start the job with --durability {self._durability}."
            )
        self.addresses, self.is_durable, self._is_apart = welcome.servers, bool(welcome.durability), welcome.is_apart
        if self._address is not None and self.hello.role == "worker":
            self._start_beat(self._address)
        return welcome

    def reconnect(self, index: int) -> Welcome:
        """Make every connection again, as the same worker. Raises as `greet`."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        self._former = list(self._connections())
        self._opened.clear()
        self._beat = self._heartbeat = None
        self.hello = msgspec.structs.replace(self.hello, index=index, returns=True)
        self.control = self._open_control()
        welcome = self.greet()
        for connection in self._former:  # not before: their end would look like this worker's
            connection.close()
        self._former.clear()
        return welcome

    def _start_beat(self, address: Address) -> None:
        beat = self._greeted(connect(address), "beat")
        self._beat = beat
        control = encode(Beat())
        self._heartbeat = _kernels.Heartbeat(
            beat.fileno(), pack_header(len(control), 0) + control, _limits.BEAT_INTERVAL_S
        )

    def open(self, role: str, i: int) -> tuple[Connection, bool]:
        """Return the connection to server i for "data" or "table", and whether it shares memory; all servers the same way."""
        if (role, i) not in self._opened:
            self._opened[role, i] = self._open(role, i)
        return self._opened[role, i]

    def _open(self, role: str, i: int) -> tuple[Connection, bool]:
        """Connect to server i; role "data" takes the control connection where that does."""
        local = all(a.host == host_name() and a.unix for a in self.addresses)
        shares = self.control.can_share if self.server is not None else local and self._transport != "tcp"
        if self._transport == "shm" and not shares:
            raise SettingError("Expected servers on this machine and of this user for transport='shm': leave it out.")
        if i == 0 and self.control.can_share == shares and role == "data" and not self._is_apart:
            return self.control, shares
        if self.server is not None:
            return self._greeted(self.server.connect_memory(), role), shares
        address = self.addresses[i].unix if shares else self.addresses[i].tcp
        if not address:
            raise SettingError(
                "Expected a server that listens on TCP for transport='tcp', got one on a Unix socket only."
            )
        target = Address.parse(address)
        if i == 0 and self._address is not None and not self._is_apart and target.kind == "tcp" == self._address.kind:
            target = self._address
        return self._greeted(connect(target), role), shares

    def _greeted(self, connection: _C, role: str) -> _C:
        connection.set_timeout(_limits.SILENCE_S)
        try:
            request(connection, Hello(self.hello.token, role, self.hello.identity))
        except BaseException as error:
            connection.close()
            if self.is_durable and isinstance(error, ProtocolError):  # its server is about to end
                raise PeerLostError(f"The connection to {connection.peer} ended: {error}") from error
            raise
        return connection

    def reader(self, i: int) -> Connection:
        """Return a connection to server i for one who only reads."""
        return self.control if i == 0 and not self._is_apart else self.open("data", i)[0]

    def _meant(self, error: HeadwaterError) -> HeadwaterError:
        """Return what an answer means: servers of a job that has gone on without this worker do not know it, or what it speaks of."""
        if isinstance(error, ProtocolError) and self.is_durable and self.control.has_ended:
            return PeerLostError(f"The connection to {self.control.peer} ended: {error}")
        return error

    def receive(
        self,
        connection: Connection,
        answer: type[_M],
        view: memoryview | Callable[[AnyMessage], memoryview] | None = None,
    ) -> tuple[_M, tuple[int, ...]]:
        """Return the answer and the descriptors that came along; says for whom it waits, and stops at the time-out.

        view: where the answer's payload goes, or a function of the answer that says so.
        """
        start = time.monotonic()

        def sink(message: AnyMessage, size: int) -> memoryview:
            target = view(message) if callable(view) else view
            if target is None or size != target.nbytes:
                raise ProtocolError(
                    f"Expected {0 if target is None else target.nbytes} bytes with {type(message).__name__}, got {size}."
                )
            return target

        while True:
            try:
                message, fds = connection.receive(sink, with_fds=answer is Attached)
            except WaitTimeoutError as error:
                if not self.is_durable:
                    raise
                raise PeerLostError(f"{error} It is taken for dead.") from error
            if isinstance(message, answer):
                return message, fds
            if isinstance(message, Failed):
                raise self._meant(message.exception())
            if isinstance(message, Pulled):  # comes before the Committed that says whether it holds
                continue
            if not isinstance(message, Waiting):
                raise ProtocolError(f"Expected {answer.__name__}, got {type(message).__name__}.")
            names = ", ".join(message.names) or "the servers"
            if time.monotonic() - start > self.timeout_s:
                raise WaitTimeoutError(
                    f"Expected {answer.__name__} within {self.timeout_s:g} s, got none: waiting for {names}, "
                    f"at clock {self.clock}. Start what is missing, or raise timeout_s in connect()."
                )
            warn(f"waiting for {names}, {message.seconds:.0f} s so far")

    def close(self, *, leave: bool) -> None:
        """End every connection, and the embedded server. leave: say good-bye first."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        try:
            if leave:
                self.control.set_timeout(2.0)
                request(self.control, Leave())
        except (HeadwaterError, OSError):
            pass  # the server is gone, or sees the connection end
        for connection in self._connections():
            connection.close()
        if self.server is not None and self.owns_server:
            if self.server.coordinator is not None:
                self.server.coordinator.take_last_snapshot()
            self.server.close()
        self.server = None  # its memory goes with it

    def abandon(self) -> None:
        """Drop this process's copies of the connections without a word; for forked children."""
        for connection in self._connections():
            connection.abandon()

    def _connections(self) -> Iterator[Connection]:
        yield from [*self._former, self.control]
        if self._beat is not None:
            yield self._beat
        for connection, _ in self._opened.values():
            yield connection


def nearest(address: Address, hello: Hello, timeout_s: float) -> Address:
    """Return the Unix socket of a server on this machine, if it has one for us: one connection for control and data."""
    connection = connect(address, min(timeout_s, _limits.CONNECT_S))
    try:
        connection.set_timeout(_limits.SILENCE_S)
        message = request(connection, msgspec.structs.replace(hello, role="data")).message
        if isinstance(message, Here) and message.address.host == host_name() and message.address.unix:
            return Address.parse(message.address.unix)
    finally:
        connection.close()
    return address
