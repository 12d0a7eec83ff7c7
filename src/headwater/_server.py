"""The process that listens: a thin shell of sockets and threads around the shard and, in a job's first server, the coordinator.

One thread per connection reads a request, carries it out and answers. Payloads go from the socket straight into the
worker's inbox and from the state straight to the socket.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import msgspec
import numpy as np

from headwater import _limits
from headwater._consistency import Consistency
from headwater._coordinator import Coordinator
from headwater._dense import Foreseen, Shard
from headwater._errors import (
    HeadwaterError,
    PeerLostError,
    ProtocolError,
    SettingError,
    UnreachableError,
    WaitTimeoutError,
    warn,
)
from headwater._keeper import Keeper, fold, open_store
from headwater._listener import Listener
from headwater._messages import (
    AnyMessage,
    Apply,
    Attach,
    Attached,
    Beat,
    Declare,
    Done,
    Enroll,
    Failed,
    FeedLost,
    Hello,
    Here,
    Hold,
    Initialised,
    LeaseTake,
    Leave,
    MakeRoom,
    Pin,
    Pull,
    Pulled,
    Push,
    Put,
    Recall,
    Register,
    Release,
    Report,
    Restore,
    Resume,
    Room,
    Seal,
    ServerAddress,
    SetAside,
    Sides,
    SnapshotTake,
    State,
    StateGet,
    StateSet,
    StatsGet,
    Unpin,
    Waiting,
)
from headwater._snapshots import Snapshots
from headwater._table import Rooms
from headwater._transport import (
    Address,
    Connection,
    connect,
    host_name,
    process_label,
    request,
)
from headwater.durability import Durability

ROLES = ("worker", "data", "table", "beat", "observer", "server", "coordinator", "leader")


class Server(Listener):
    """A running server. Close it, or use it as a context manager; closing twice is fine.

    join: the coordinator's address; None: this process holds the coordinator, for `servers` servers and `workers` workers
    (0: as many as the first worker says).
    durability: what the job survives, None: nothing; the same for every server, with `store`, a folder that all of them reach, and
    `index`, this server's place, from 0. resumes: go on from what the store holds; else it must be empty. follows: be the follower of the
    server with this index, or that server where there is none. is_apart: hold the coordinator alone.
    """

    def __init__(
        self,
        listen_on: Address | None = None,
        *,
        token: str = "",
        join: Address | None = None,
        consistency: Consistency | None = None,
        workers: int = 0,
        servers: int = 1,
        threads: int | None = None,
        level: str = "auto",
        durability: Durability | None = None,
        store: str = "",
        index: int = -1,
        resumes: bool = False,
        follows: bool = False,
        is_apart: bool = False,
    ) -> None:
        if not 0 <= workers <= _limits.WORKERS or not 1 <= servers <= _limits.SERVERS:
            raise SettingError(
                f"Expected up to {_limits.WORKERS} workers and 1 to {_limits.SERVERS} servers, got {workers} and {servers}."
            )
        self.shard = Shard(threads=threads or len(os.sched_getaffinity(0)), level=level)
        self._join, self._index, self._follows = join, 0 if join is None else index, follows
        self._keeper, keep = None, None
        self._let_go: Callable[[], None] = lambda: None  # of the store
        if durability is not None:
            if durability.kind == "replicated" and join is None and not is_apart:
                raise SettingError(
                    "Expected the coordinator apart from the servers of a replicated job, got both in one."
                )
            # In a replicated job two servers have the same place, and the coordinator sees to it that there are no more.
            place = -1 if durability.kind == "replicated" and not is_apart else self._index
            has_log = durability.kind == "log"
            files, path, self._let_go = open_store(store, place, resumes=resumes or follows, has_log=has_log)
            tell_lost = self._lose_follower if join is not None else lambda _: None
            self._keeper = self.shard.keeper = Keeper(self.shard, files, path, durability, token, tell_lost)
            if join is None:
                keep = Snapshots(files, path, durability, partial(fold, files, path))
        self.coordinator: Coordinator | None = None
        if join is None:
            self.coordinator = Coordinator(
                None if is_apart else self.shard, consistency=consistency, workers=workers, servers=servers, keep=keep
            )
        super().__init__(token)
        try:
            if listen_on is not None:
                self._listen(listen_on)
            if self.coordinator is not None:
                if not is_apart:
                    self.coordinator.add_server(self.address)
                if keep is not None:
                    threading.Thread(
                        target=keep.keep_taking, args=(self.coordinator,), name="snapshots", daemon=True
                    ).start()
            elif join is not None:
                self._enroll(join, _limits.CONNECT_S)
        except BaseException:
            self.close()
            raise

    def _enroll(self, join: Address, patience_s: float) -> None:
        """Join a job as a further server; the coordinator then connects back to us. Its end is ours."""
        connection = connect(join, patience_s)
        self.keep(connection)
        tcp = self.address.tcp
        if tcp and connection.own_host and Address.parse(tcp).host in ("0.0.0.0", "::"):
            # Listening everywhere: workers find us where the coordinator does.
            tcp = str(Address.parse(tcp)._replace(host=connection.own_host))
            self.address = ServerAddress(tcp, self.address.unix, self.address.host)
        follows = self._follows and self._keeper is not None and self._keeper.begin_following() > 0
        try:
            request(connection, Hello(self.token, "server", 0, label=process_label()))
            request(connection, Enroll(self.address, self._index, follows))
        except BaseException:
            self.drop(connection)
            raise
        threading.Thread(target=self._watch, args=(join, connection), name="watch", daemon=True).start()

    def _watch(self, join: Address, connection: Connection) -> None:
        """The end of the coordinator is ours, unless the job is durable: then it is started again, and we go on."""
        with contextlib.suppress(HeadwaterError):
            connection.receive()
        self.drop(connection)
        deadline = time.monotonic() + (_limits.REJOIN_S if self._keeper is not None else 0.0)
        while time.monotonic() < deadline and not self._closing.is_set():
            try:
                self._enroll(join, 0.0)
                return
            except (UnreachableError, PeerLostError):
                self._closing.wait(_limits.AGAIN_S)
            except HeadwaterError as error:
                warn(f"the coordinator does not take this server back: {error}")
                break
        self.stopped.set()

    def _lose_follower(self, index: int) -> None:
        """Tell the coordinator, which would take the follower for us; it may have done so, if it has lost us. Raises PeerLostError then, or
        UnreachableError."""
        assert self._join is not None
        connection = connect(self._join)
        try:
            connection.set_timeout(_limits.SILENCE_S)
            request(connection, Hello(self.token, "server", 0))
            request(connection, FeedLost(index, self.address))
        finally:
            connection.close()

    def begin_following(self) -> int:
        """Have what a server does from now on, and nothing that another has sent before; returns what its records are known by."""
        if self._keeper is None:
            raise ProtocolError("Expected a leader at its follower, got one at a server of a job without durability.")
        return self._keeper.begin_following()

    def follow(self, head: bytes, blobs: list[np.ndarray], life: int, *, is_near: bool) -> None:
        """Have what the server that this one follows is about to acknowledge. is_near: that is on this machine."""
        assert self._keeper is not None
        self._keeper.follow(head, blobs, life, is_near=is_near)

    def _handler(self, connection: Connection, hello: Hello) -> _Handler:
        if hello.role not in ROLES:
            raise ProtocolError(f"Expected a role of {', '.join(ROLES)}, got {hello.role!r}.")
        return _Handler(self, connection, hello)

    def _ending(self) -> None:
        if self.coordinator is not None:
            self.coordinator.close()  # first: that workers' connections end now does not mean that they have left

    def _ended(self) -> None:
        if self._keeper is not None:
            self._keeper.close()
        self._let_go()

    def __repr__(self) -> str:
        return f"<Server {self.address.tcp or self.address.unix or 'embedded'} commit={self.shard.commit}>"


class _Handler:
    """What one peer may ask, and the answers."""

    def __init__(self, server: Server, connection: Connection, hello: Hello) -> None:
        self._server, self._shard, self._coordinator = server, server.shard, server.coordinator
        self._connection, self._hello = connection, hello
        self._identity, self.role = hello.identity, hello.role
        self._is_member = False
        self._life = 0  # of the follower, as it was when its leader began to send
        self._enrolled: tuple[int, Connection] | None = None  # a server's place, and the way back to it
        self._incoming: np.ndarray | None = None  # a plane that a Put brings
        # Of a server that this one follows, for its records: rooms that it writes to, and what brings the rest.
        self._rooms = Rooms()
        self._fed = [np.empty(0, np.uint8) for _ in range(2)]
        self._carried = False  # whether a payload came with the push
        self._desk = server.shard.tables.desk(hello.identity) if hello.role == "table" else None
        self._foreseen: Foreseen | None = None  # the commit that the arriving push completes

    def welcome(self) -> None:
        """Take the peer in, or raise."""
        answer: AnyMessage = Done()
        if self.role in ("worker", "observer"):
            answer = self._job().hello(self._hello, self._connection, self._connection.send)
        elif self.role == "beat":
            self._job().beat(self._identity, self._connection)
        elif self.role in ("data", "table"):
            answer = Here(self._server.address)
        elif self.role == "coordinator" and self._coordinator is not None:
            raise ProtocolError("Expected the coordinator at the job's further servers, got it at its own.")
        elif self.role == "leader":
            self._life = self._server.begin_following()
        self._is_member = True
        self._connection.send(answer)

    def handle(self) -> bool:
        """Carry out one request. Returns whether more may come. Errors of the caller are answered, not raised."""
        try:
            message = self._connection.receive(self._sink, arrived=self._arrived).message
        except WaitTimeoutError:
            # Only a beat is waited for with a limit. A beat connection that ends says nothing: the worker's own one ends too,
            # after what was sealed on it has been read.
            self._job().leave(self._identity, self._connection)
            raise
        try:
            return self._dispatch(message)
        except (PeerLostError, ProtocolError):
            raise
        except HeadwaterError as error:
            self._connection.send(Failed(type(error).__name__, str(error)))
            return True

    def _dispatch(self, message: AnyMessage) -> bool:
        if self._desk is not None:
            self._connection.send(*self._desk.handle(message, can_share=self._connection.can_share))
            return True
        match message:
            case Push():
                self._note_push(message.sequence)
                self._answer(Done())
            case Seal():
                self._seal(message)
            case Pull():
                self._pull(message)
            case Put():
                if self._incoming is None:
                    raise ProtocolError("Expected Put with a payload, got none.")
                self._shard.write(message.plane, self._incoming, self._identity)
                self._incoming = None
                self._answer(Done())
            case Beat():
                pass
            case Attach():
                fds = self._shard.attach(self._identity, share=message.share and self._connection.can_share)
                self._connection.send(Attached(len(fds)), fds=fds)
            case Sides():
                fds = self._shard.sides(self._identity, message.known)
                self._connection.send(Attached(len(fds)), fds=fds)
            case Register():
                self._answer(self._job().register(self._identity, message, self._connection.send))
            case Declare():
                self._answer(self._job().declare(self._identity, message, self._connection.send))
            case Initialised():
                self._answer(self._job().initialised(self._identity, message, self._connection.send))
            case LeaseTake():
                self._answer(self._job().lease(self._identity, message, self._connection))
            case Leave():
                self._job().end(self._identity)
                self._answer(Done())
            case Hold():
                self._answer(self._job().hold(self._identity, self._connection.send, writes=message.writes))
            case Resume():
                self._job().resume(self._identity)
                self._answer(Done())
            case SetAside() if self.role != "coordinator":
                self._answer(self._job().set_aside(self._identity, self._connection.send))
            case Release() if self.role != "coordinator":
                self._job().release(self._identity)
                self._answer(Done())
            case MakeRoom():
                with _at_work(self._connection):
                    self._shard.make_side()
                self._answer(Done())
            case Report():
                self._job().report(self._identity, message.figures)
            case StateGet():
                self._answer(State(dict(self._job().state)))
            case StateSet():
                self._job().set_state(message.key, message.value)
                self._answer(Done())
            case StatsGet():
                self._answer(self._job().stats())
            case SnapshotTake():
                self._answer(self._job().take_snapshot(self._connection.send))
            case Enroll() if self.role == "server":
                self._enroll(message)
            case FeedLost() if self.role == "server":
                self._job().lose_feed(message.index, message.address)
                self._answer(Done())
            case Room(room=0 | 1, share=True) if self.role == "leader" and self._connection.can_share:
                self._connection.send(*self._rooms.make_room(message, can_share=True))
            case Apply() if self.role == "leader":
                payload, self._incoming = self._incoming, None
                blobs = self._blobs(message, payload)
                self._server.follow(message.head, blobs, self._life, is_near=message.shared > 0)
                self._answer(Done())
            case Recall() | Restore() | Pin() | Unpin() if self.role == "coordinator":
                with _at_work(self._connection):
                    answer = self._shard.handle(message)
                self._answer(answer)
            case _ if self.role == "coordinator":
                self._answer(self._shard.handle(message))
            case _:
                raise ProtocolError(f"Expected a request that a {self.role} may make, got {type(message).__name__}.")
        return True

    def _answer(self, message: AnyMessage) -> None:
        self._connection.send(message)

    def _sink(self, message: AnyMessage, size: int) -> memoryview:
        """Say where a payload goes."""
        if self._desk is not None:
            return self._desk.sink(message, size)
        is_worker = self.role in ("worker", "data")
        if isinstance(message, (Seal, Push)) and is_worker:
            inbox = self._shard.inbox(self._identity, size)
            self._carried, self._foreseen = True, None
            if isinstance(message, Seal) and message.pull == "sent" and size > _limits.PIECE_BYTES:
                self._foreseen = self._job().foresee(self._identity, message)
            return inbox
        if isinstance(message, Apply) and self.role == "leader" and size == sum(message.sizes) - message.shared:
            self._fed.reverse()  # the other one may be applied still
            if self._fed[0].nbytes < size:
                self._fed[0] = np.empty(size, np.uint8)
            self._incoming = self._fed[0][:size]
            return memoryview(self._incoming)
        if isinstance(message, Put) and is_worker:
            expected = self._shard.plane_bytes(message.plane)
            if size == expected:
                self._incoming = np.empty(size, np.uint8)
                return memoryview(self._incoming)
            raise ProtocolError(f"Expected {expected} bytes of {message.plane}, got {size}.")
        raise ProtocolError(f"Expected {type(message).__name__} without payload, got {size} bytes.")

    def _blobs(self, message: Apply, payload: np.ndarray | None) -> list[np.ndarray]:
        """Return a record's blobs where they lie."""
        ends, shared = np.cumsum((0, *message.sizes)), message.shared
        rest = np.empty(0, np.uint8) if payload is None else payload
        if shared + rest.nbytes != ends[-1] or shared not in ends:
            raise ProtocolError(
                f"Expected a record of {ends[-1]} bytes, got another of {rest.nbytes}: {message.sizes}."
            )
        room = self._rooms.piece(message.room, 0, shared) if shared else rest
        return [room[a:b] if b <= shared else rest[a - shared : b - shared] for a, b in pairwise(map(int, ends))]

    def _arrived(self, ready: int, size: int) -> None:
        """So much of a payload has come. Where it is the last push of a commit, what came is applied and goes back at once."""
        sent = 0 if self._foreseen is None else self._foreseen.done
        if self._foreseen is None or (ready < size and ready - sent < _limits.PIECE_BYTES):
            return
        piece = self._shard.advance(self._foreseen, ready)
        if not piece.nbytes:
            return
        if sent == 0:
            self._connection.send_head(Pulled(self._shard.commit + 1), size)
        self._connection.send_more(piece)

    def _note_push(self, sequence: int) -> None:
        carried, self._carried = self._carried, False
        self._shard.pushed(self._identity, sequence, carried)

    def _seal(self, seal: Seal) -> None:
        if seal.pushes or self._carried:
            self._note_push(seal.sequence)
        committed = self._job().seal(self._identity, seal, self._connection)
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen.has_counted:
            self._connection.send(committed)  # the parameters have gone before
            return
        if seal.pull == "sent":
            self._connection.send(committed, self._shard.pull_sent(self._identity)[1])
            return
        if seal.pull == "own":
            committed = msgspec.structs.replace(committed, side=self._shard.pull_own(self._identity)[1])
        self._connection.send(committed)

    def _pull(self, pull: Pull) -> None:
        if pull.own:
            self._answer(Pulled(*self._shard.pull_own(self._identity)))
        elif pull.plane == "aside":
            self._connection.send(Pulled(self._shard.commit), self._shard.read_aside())
        elif pull.plane == "parameters" and self.role in ("worker", "data"):
            commit, view = self._shard.pull_sent(self._identity)
            self._connection.send(Pulled(commit), view)
        else:
            commit, copy = self._shard.read(pull.plane)
            self._connection.send(Pulled(commit), memoryview(copy))

    def _enroll(self, message: Enroll) -> None:
        same_host = message.address.host == host_name()
        address = message.address.unix if same_host and message.address.unix else message.address.tcp
        back = connect(Address.parse(address))
        self._server.keep(back)
        back.set_timeout(_limits.SILENCE_S)
        job = self._job()
        try:
            request(back, Hello(self._server.token, "coordinator", 0))
            self._enrolled = (
                job.add_server(message.address, back, self._connection, index=message.index, follows=message.follows),
                back,
            )
        except BaseException:
            self._server.drop(back)
            raise
        self._answer(Done())

    def _job(self) -> Coordinator:
        if self._coordinator is None:
            raise ProtocolError("Expected a request to the job's coordinator at the job's first server, got it here.")
        return self._coordinator

    def close(self) -> None:
        """The connection has ended: the death of what was behind it."""
        if self._desk is not None:
            self._shard.tables.leave(self._desk)
        if self._coordinator is None or not self._is_member:
            return
        if self.role == "worker":
            self._coordinator.leave(self._identity, self._connection)
        elif self._enrolled is not None:
            self._server.drop(self._enrolled[1])
            if not self._coordinator.lose_follower(*self._enrolled):
                self._coordinator.lose_server(*self._enrolled)
        self._coordinator.resume(self._identity)
        self._coordinator.release(self._identity)


@contextlib.contextmanager
def _at_work(connection: Connection) -> Iterator[None]:
    """Say now and then that this takes long, which silence would not tell from death."""
    is_done, start = threading.Event(), time.monotonic()

    def say() -> None:
        while not is_done.wait(_limits.REPORT_WAIT_S):
            with contextlib.suppress(PeerLostError):
                connection.send(Waiting(time.monotonic() - start, ()))

    thread = threading.Thread(target=say, name="at work", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()
