"""One per job: membership, settings, and the moment a commit happens. Touches no tensor.

The consistency policy decides which pushes make a commit, and `_execution` carries the decision out on every server. One thread at a time
executes; whichever thread completes a commit does it, so with one worker there is no hand-over.

Where the job is durable and a server is lost, workers' connections are ended, what was sealed and not committed is forgotten, and when
every server is there again all go to the same commit (`_recovery`). Workers come back by themselves and say again what did not count.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import msgspec

from headwater import _limits
from headwater._book import Book, Change, Counted, new_history
from headwater._consistency import Commit, Consistency, Policy, PushEntry, bsp
from headwater._dense import Foreseen, Shard
from headwater._errors import (
    HeadwaterError,
    InternalError,
    LayoutError,
    PeerLostError,
    ProtocolError,
    SettingError,
    WaitTimeoutError,
    warn,
)
from headwater._execution import Execution, Refusals, Trained
from headwater._layout import Layout, TensorSpec, difference
from headwater._leases import DataSpec, Leases
from headwater._messages import (
    Assign,
    Committed,
    Declare,
    Declared,
    Detach,
    Failed,
    FeedTo,
    Held,
    Hello,
    Initialised,
    Leased,
    LeaseTake,
    LetWrite,
    OpenTable,
    Persist,
    Register,
    Registered,
    Release,
    Restore,
    Seal,
    ServerAddress,
    SetAside,
    SnapshotGet,
    SnapshotTaken,
    Stats,
    Waiting,
    Welcome,
    WorkerStats,
)
from headwater._plan import Plan
from headwater._rows import TableSpec, spec_of
from headwater._rows import difference as table_difference
from headwater._servers import Server, Servers, hear
from headwater._snapshots import AskEach, Snapshots
from headwater._transport import Connection
from headwater.optim import AnyOptimizer

#: Tells a waiting peer for whom it waits; raises when the peer is gone.
Tell = Callable[[Waiting], None]


class Worker:
    """A worker as the coordinator knows it; kept after it has left, for the statistics."""

    def __init__(self, hello: Hello, index: int) -> None:
        self.identity, self.index, self.label = hello.identity, index, hello.label
        self.live = True
        self.connections: list[Connection] = []
        self.sealed = self.answered = -1  # sequence of the last push that was sealed, whose clock is closed
        self.commit = 0  # the commit that closed it
        self.read = 0  # the commit this worker's next gradient is computed from
        self.refusal: HeadwaterError | None = None
        self.is_away = False  # a server was lost; it is expected to come back
        self.used: tuple[tuple[str, int], ...] = ()  # of leased data, by the pushes up to the sealed one
        self.is_idle = False  # waits for data
        self.accepted = self.clock = self.staleness = self.staleness_max = self.pushes = self.refused = 0
        self.figures: dict[str, float] = {}

    def adopt(self, counted: Counted) -> None:
        """Be what the book says of it."""
        self.index, self.sealed, self.answered = counted.index, counted.sequence, counted.sequence
        self.commit, self.clock, self.accepted = counted.commit, counted.clock, counted.accepted
        self.refusal = None
        if counted.refused is not None:
            self.refusal = Failed(*counted.refused).exception()

    def counted(self) -> Counted:
        """Return what the book says of it."""
        return Counted(
            self.index, self.answered, self.commit, self.clock, self.accepted, _as_text(self.refusal), self.live
        )

    def __str__(self) -> str:
        return f"worker {self.index} ({self.label})"


class Coordinator:
    """The job. It can be shared between threads."""

    def __init__(
        self,
        shard: Shard | None,
        *,
        consistency: Consistency | None,
        workers: int,
        servers: int,
        keep: Snapshots | None = None,
    ) -> None:
        self._shard = shard
        self._consistency, self._expected = consistency, workers
        self._keep = keep
        self._changed = threading.Condition()
        self._policy: Policy | None = None
        self._workers: dict[int, Worker] = {}
        self._servers = Servers(shard, servers, self.lose_server)
        self._structure_s = 0.0
        self._structure = 0  # rises when there is something new to register or declare
        self._is_ready = False  # every server is there, at the same commit
        self._generation = 0  # rises when a server is lost
        self._layout: Layout | None = None
        self._optimizer: AnyOptimizer | None = None
        self._plan: Plan | None = None
        self._tables: list[TableSpec] = []
        self._serial = 0  # of the last change of the book
        self._leases_written = b""
        self._history = 0
        self._unnoted: set[int] = set()  # identities that have come or gone since a change of the book was written down
        self._initialiser: int | None = None
        self._is_initialised = False
        self._commit = self._side = 0
        self._queue: deque[Commit] = deque()
        self._settling = 0  # first snapshots of what was registered or declared that are being taken
        self._reserved = 0  # who wants to speak to the servers before the next commit
        self._holder: tuple[int, float] | None = None
        self._publisher: int | None = None  # for whom the parameters are set aside
        self._failure: HeadwaterError | None = None
        self._checked: tuple[tuple[float, ...], ...] | None = None  # scalars found valid last
        self._refused = 0
        self._execution = Execution(self._servers.ask, lambda identity: str(self._workers[identity]))
        self._start_s = time.monotonic()
        self._lost_s = [
            self._start_s
        ] * servers  # when each was lost last without a follower; at the start nobody is there
        self.state: dict[str, bytes] = {}
        self.leases: dict[str, Leases] = {}  # by the dataset's name

    # Membership.

    def add_server(
        self, address: ServerAddress, *connections: Connection, index: int = -1, follows: bool = False
    ) -> int:
        """Take in a server and return its index, which is free for it.

        connections: on which it answers, and that on which it came: it notices that it is lost when they end. None: it is in this process.
        follows: where there is one by this index, it is to follow that; it waits for that one, and for another follower to go, for RETURN_S
        each at most. Raises PeerLostError when it has ended meanwhile.
        """
        with self._changed:
            newcomer = Server(address, connections)
            self._lose_if_ended(index)
            if follows and 0 <= index < self._servers.count:
                self._await_place(index, newcomer)
            free = self._servers.missing()
            if follows and connections and self._servers.get(index) is not None:
                self._add_follower(index, newcomer)
                return index
            if not free:
                raise SettingError(
                    f"Expected {self._servers.count} servers in this job, got one more: start it with --servers."
                )
            if index >= 0 and index not in free:
                raise SettingError(f"Expected server {index} to be missing, got another one by that number.")
            index = index if index >= 0 else free[0]
            self._servers.here[index] = newcomer
            if len(free) == 1 and self._failure is None:
                if self._keep is None:
                    self._is_ready = True
                else:  # which may take long, and whoever waits is told
                    self._start_assembling(self._keep)
            self._changed.notify_all()
            return index

    def _lose_if_ended(self, index: int) -> None:
        """Lose a server by this index whose end nobody has noticed yet."""
        server = self._servers.get(index)
        if server is not None and server.has_ended:
            self.lose_server(index)

    def _await_place(self, index: int, newcomer: Server) -> None:
        """Let a follower-to-be wait for whoever leads, who may be about to come back: in that place it would be empty.

        And for an earlier follower that has died to make room: one that is joining notices that by itself, one that is there is looked at.
        """
        self._changed.notify_all()
        patience_s = time.monotonic() + _limits.RETURN_S
        while self._failure is None:
            if newcomer.has_ended:
                raise PeerLostError("Expected a server that waits for its place to live, got its end.")
            self._lose_if_ended(index)
            follower = self._servers.followers.get(index)
            if follower is not None and follower.has_ended:
                self.lose_follower(index)
            if self._servers.here[index] is None:
                until_s = self._lost_s[index] + _limits.RETURN_S
            elif index in self._servers.joining:
                until_s = patience_s
            else:
                return
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return
            self._changed.wait(left_s)

    def lose_server(self, index: int, connection: Connection | None = None) -> None:
        """A server has died. Everybody is told; where the job is durable it goes on when the server is back.

        connection: the one that has ended; where another has taken its place nothing is lost.
        """
        with self._changed:
            server = self._servers.here[index]
            if server is None or (connection is not None and server.connection is not connection):
                return
            server.close()
            if not self._servers.replace(index):
                self._lost_s[index] = time.monotonic()
            if self._keep is None:
                self._fail(
                    PeerLostError(
                        f"Expected every server of the job to live, got the end of server {index}: start the job again."
                    )
                )
                return
            self._is_ready = False
            self._generation += 1
            self._queue.clear()
            self._holder = None
            for worker in self._workers.values():
                if worker.live:
                    self._send_away(worker)
            if not self._servers.missing():
                warn(f"server {index} is lost; its follower takes over")
                self._start_assembling(self._keep)
            self._changed.notify_all()

    def _add_follower(self, index: int, follower: Server) -> None:
        """Bring a follower to the state of its server, beside training; from then on it has each commit before it is acknowledged."""
        self._check_failure()  # else it would come again and again
        if index in self._servers.followers or index in self._servers.joining or self._keep is None:
            raise SettingError(f"Expected server {index} to have no follower, got another one.")
        self._servers.joining[index] = follower
        threading.Thread(
            target=self._join_follower, args=(index, follower, self._keep), name="follower", daemon=True
        ).start()

    def _join_follower(self, index: int, follower: Server, keep: Snapshots) -> None:
        connection = follower.connection
        assert connection is not None
        generation = self._generation
        try:
            with self._changed:  # before that there is nothing to follow
                self._wait(
                    lambda: (self._is_ready and self._is_initialised and not self._settling) or follower.has_ended,
                    list,
                    lambda _: None,
                )
                if follower.has_ended:
                    raise PeerLostError("Expected the follower to live, got its end.")
                generation, structure = self._generation, self._structure
            taken = keep.take(self, lambda i: FeedTo(follower.address) if i == index else SnapshotGet())
            name = taken.path.rpartition("/")[2]
            connection.send(Restore(name, taken.commit, index, self._servers.count, follows=True))
            answer = hear(connection).message
            if isinstance(answer, Failed):
                raise answer.exception()
            with self._changed:
                if (generation, structure) != (self._generation, self._structure) or follower.has_ended:
                    raise PeerLostError("Expected follower and job to stay as they are while it joins, got others.")
                self._servers.followers[index] = follower
                if len(self._servers.followers) == self._servers.count:
                    self._structure_s = -math.inf  # all were there: who is lost from now on is not waited for
                self._changed.notify_all()
        except HeadwaterError as error:
            if not isinstance(self._failure, PeerLostError):
                warn(f"no follower for server {index} yet: {error}")
            follower.close()  # it comes again
        finally:
            with self._changed:
                del self._servers.joining[index]
                self._changed.notify_all()

    def _await_followers(self, tell: Tell) -> None:
        """Where the job is replicated, let nobody train before every server has a follower; but not for long."""
        if self._keep is None or self._keep.durability.kind != "replicated" or not self._is_initialised:
            return
        self._wait(
            lambda: (
                len(self._servers.followers) == self._servers.count
                or time.monotonic() > self._structure_s + _limits.RETURN_S
            ),
            lambda: [
                f"a follower of server {i}" for i in range(self._servers.count) if i not in self._servers.followers
            ],
            tell,
        )

    def lose_follower(self, index: int, connection: Connection | None = None) -> bool:
        """A follower has died, or has not got all; it may come again. Returns whether there was one, and this."""
        with self._changed:
            was_there = self._servers.lose_follower(index, connection)
            self._changed.notify_all()
            return was_there

    def lose_feed(self, index: int, address: ServerAddress) -> None:
        """The server at this address cannot reach its follower, and is about to acknowledge what that lacks. Raises PeerLostError where
        the server is lost itself, and the follower may be in its place."""
        with self._changed:
            self._lose_if_ended(index)  # its follower has all that was acknowledged until now
            server = self._servers.get(index)
            if server is None or server.address != address:
                raise PeerLostError(f"Expected server {index} as the job has it, got one that it has lost.")
            self.lose_follower(index)

    def _send_away(self, worker: Worker) -> None:
        """End a worker's connections; it comes back, or is let go."""
        worker.is_away = True
        connections, worker.connections = worker.connections, []
        for connection in connections:
            connection.close()

    def _start_assembling(self, keep: Snapshots) -> None:
        arguments = (keep, self._generation)
        threading.Thread(target=self._assemble, args=arguments, name="assemble", daemon=True).start()

    def _assemble(self, keep: Snapshots, generation: int) -> None:
        """Every server is there: let all be at the same commit, and begin or go on. generation: of which that is so."""
        try:
            with self.alone(restores=True) as ask_each:
                if generation != self._generation:
                    return  # one was lost and replaced meanwhile, which has a thread of its own
                book, is_all = keep.restore(self._servers.count, ask_each)
                with self._changed:
                    if generation != self._generation:
                        return
                    is_decided = book is not None or self._policy is not None
                    if book is not None:
                        self._consistency, self._expected = book.consistency, self._expected or book.expected
                    else:  # nothing was kept: begin anew
                        history = 0 if keep.has_log else new_history()
                        book = Book(self._consistency or bsp(), self._expected or 1, history=history)
                    self._adopt_book(book, is_all=is_all)
                    if not is_decided:
                        self._policy = None  # the first to come decides
                    self._is_ready = True
                    self._changed.notify_all()
        except PeerLostError:
            pass  # one was lost meanwhile; the next that comes begins again
        except HeadwaterError as error:
            warn(str(error))
            with self._changed:
                self._fail(error)
        except BaseException as error:
            with self._changed:
                self._fail(InternalError(f"The job did not come back: {error!r}. Please report this."))
            raise

    def _adopt_book(self, book: Book, *, is_all: bool) -> None:
        """Be at the commit of a book. Workers that live in it are expected to come back. is_all: nothing acknowledged is missing."""
        self._layout = self._optimizer = self._plan = None
        self._is_initialised = book.tensors is not None
        if book.tensors is not None:
            self._layout, self._optimizer = Layout(book.tensors), book.optimizer
            self._plan = Plan.of(book.cohort_of, book.cohorts)
        self._queue.clear()
        self._tables, self.state = list(book.tables), dict(book.state)
        self._serial, self._leases_written, self._history = book.serial, book.leases, book.history
        self.leases = msgspec.msgpack.decode(book.leases, type=dict[str, Leases]) if book.leases else {}
        if not is_all:  # who held what is not what they hold now
            for leases in self.leases.values():
                leases.go_back()
        self._commit, self._side, self._initialiser = book.commit, 0, None
        self._execution.forget()
        policy = self._policy = Policy(book.consistency, self._expected or book.expected)
        policy.commit = book.commit
        for worker in self._workers.values():
            worker.sealed = worker.answered = -1
        for identity, counted in book.workers.items():
            if identity not in self._workers:
                worker = self._workers[identity] = Worker(Hello("", "worker", identity, label="?"), counted.index)
                worker.live = worker.is_away = counted.live
            worker = self._workers[identity]
            worker.adopt(counted)
            if worker.live:
                policy.join(identity, worker.index, sequence=counted.sequence, clock=counted.clock)
            if worker.live != counted.live:
                self._unnoted.add(identity)
        for leases in self.leases.values():
            for identity in leases.holders():  # who is gone holds nothing; if it comes back it hears of that
                if identity not in self._workers or not self._workers[identity].live:
                    leases.give_back(identity)
        away = [worker for worker in self._workers.values() if worker.live]
        policy.begin([w.index for w in self._workers.values() if not w.live] if away else [])
        if self._workers:
            self._start_letting_go()

    def _start_letting_go(self) -> None:
        threading.Thread(target=self._let_go, args=(self._generation,), name="return", daemon=True).start()

    def _let_go(self, generation: int) -> None:
        """Wait for workers to come back, and let those go who do not; nor is anybody waited for who had not come yet.

        Where none lived in the book, time counts from the first one: the others may have been done.
        """
        with self._changed:
            policy = self._policy  # None: the store was empty
            while policy and not policy.members and generation == self._generation and self._failure is None:
                self._changed.wait()
            deadline = time.monotonic() + _limits.RETURN_S
            while (policy and not policy.started) or any(
                worker.live and worker.is_away for worker in self._workers.values()
            ):
                if generation != self._generation or self._failure is not None:
                    return
                if time.monotonic() < deadline:
                    self._changed.wait(deadline - time.monotonic())
                    continue
                if policy is not None:
                    policy.expected = 1  # before they leave: that may complete a commit
                for worker in list(self._workers.values()):
                    if worker.live and worker.is_away:
                        self._leave(worker.identity)
                if policy is not None:
                    self._queue.extend(policy.resume())
                self._drain()
                self._changed.notify_all()
                return

    def book(self) -> Book:
        """Return the job as it is after the last commit. The caller sees to it that none is under way."""
        with self._changed:
            plan = self._plan
            return Book(
                self._consistency or bsp(), self._expected or 1, self._commit,
                self._layout.specs if self._layout is not None and self._is_initialised else None,
                self._optimizer, tuple(self._tables),
                plan.cohorts if plan else (), plan.cells if plan else b"",
                {w.identity: w.counted() for w in self._workers.values() if w.answered >= 0 or w.live},
                dict(self.state), self._encoded_leases(), self._serial, self._history,
            )  # fmt: skip

    def close(self) -> None:
        """The server in this process closes: whoever waits here waits no longer."""
        if self._keep is not None:
            self._keep.stop()
        with self._changed:
            self._fail(PeerLostError("Expected a running server, got one that was closed."))

    def hello(self, hello: Hello, connection: Connection, tell: Tell) -> Welcome:
        """Take in a worker or an observer, once every server is there; or take back a worker whose connection had ended."""
        with self._changed:
            self._wait(lambda: self._is_ready, self._missing_servers, tell)
            policy = self._adopt(hello)
            index = -1
            if hello.role == "worker":
                worker = self._workers.get(hello.identity)
                if worker is not None and hello.returns:
                    self._return(worker)
                else:
                    if hello.returns and not policy.started:  # the job is not new: others may have been done with it
                        self._start_letting_go()
                    worker = self._workers[hello.identity] = Worker(hello, self._place(hello))
                worker.connections = [connection]
                index = worker.index
            servers = tuple(server.address for server in self._servers.here if server is not None)
            if not self._is_ready:
                raise PeerLostError("Expected every server of the job to live, got the end of one: ask again.")
            kept = "" if self._keep is None else str(self._keep.durability)
            leased = {name: leases.counts(hello.identity) for name, leases in self.leases.items()}
            return Welcome(
                index, policy.expected, policy.consistency, servers, kept, self._shard is None, leased, self._history
            )

    def _return(self, worker: Worker) -> None:
        """Take a worker back. What it has sealed and what is not committed is forgotten: it says it again."""
        was_away = worker.is_away
        self._send_away(worker)
        self._when_idle()
        if not was_away and self._keep is not None and (self._layout is not None or self._tables):
            # Nobody: why it came back is not known, and a server that is silent shows now.
            self._servers.ask(Detach(-1))
        if not worker.live:
            self._unnoted.add(worker.identity)
            if any(w.live and w.index == worker.index for w in self._workers.values()):
                worker.index = self._free_index()
        worker.live, worker.is_away = True, False
        if self._initialiser == worker.identity and not self._is_initialised:
            self._initialiser = None  # it did not hear that it was asked
        self._changed.notify_all()
        worker.sealed = worker.answered
        self._require_policy().withdraw(worker.identity)

    def _missing_servers(self) -> list[str]:
        return [f"server {i}" for i in self._servers.missing()]

    def _adopt(self, hello: Hello) -> Policy:
        """Settings live here; a peer's wish decides where nobody has decided yet, and must agree afterwards."""
        consistency = self._consistency or hello.consistency or bsp()
        expected = self._expected or hello.workers or 1
        if hello.consistency not in (None, consistency):
            raise SettingError(
                f"Expected consistency {consistency}, the job's, got {hello.consistency}: leave it out in connect()."
            )
        if hello.workers not in (0, expected):
            raise SettingError(f"Expected {expected} workers, the job's number, got {hello.workers}.")
        if self._policy is not None:
            return self._policy
        policy = Policy(consistency, expected)
        if hello.role == "worker":
            self._policy, self._consistency, self._expected = policy, consistency, expected
        return policy

    def _place(self, hello: Hello) -> int:
        if hello.identity in self._workers:
            raise ProtocolError("Expected a new identity from a new connection, got one that is known.")
        holder = next((w for w in self._workers.values() if w.live and w.index == hello.index), None)
        has_ended = holder is not None and any(connection.has_ended for connection in holder.connections)
        if holder is not None and not holder.is_away and not has_ended:
            raise SettingError(f"Expected HEADWATER_WORKER to be free, got {hello.index}, which is {holder}.")
        if holder is not None:
            self._leave(holder.identity)  # its process was started again
        free = self._free_index()
        return hello.index if hello.index >= 0 else free

    def _free_index(self) -> int:
        taken = {w.index for w in self._workers.values() if w.live}
        if len(taken) >= _limits.WORKERS:
            raise SettingError(f"Expected at most {_limits.WORKERS} workers, got one more.")
        return next(i for i in range(len(taken) + 1) if i not in taken)

    def beat(self, identity: int, connection: Connection) -> None:
        """Note a worker's heartbeat connection, which is closed when the worker is dropped."""
        with self._changed:
            self._require(identity).connections.append(connection)

    def leave(self, identity: int, connection: Connection | None = None, *, close: bool = True) -> None:
        """Let a worker go, dead or done: nobody waits for it any more. A second time is fine.

        connection: the one that has ended; where the worker has others by now it stays. close: end its connections too. That comes
        first, so that nothing torn is sent on them.
        """
        with self._changed:
            self._leave(identity, connection, close=close)

    def _leave(self, identity: int, connection: Connection | None = None, *, close: bool = True) -> None:
        """`leave` of a caller that holds the lock, once: else a commit would be carried out under it."""
        worker = self._workers.get(identity)
        if worker is None or not worker.live or (connection is not None and connection not in worker.connections):
            return
        worker.live = worker.is_away = False
        self._unnoted.add(identity)
        if close:
            for each in worker.connections:
                each.close()
        worker.connections = []  # which are large; the worker is kept
        if self._holder is not None and self._holder[0] == identity:
            self._holder = None
        if self._initialiser == identity and not self._is_initialised:
            self._initialiser = None
        if self._policy is not None:
            self._queue.extend(self._policy.leave(identity))
        self._drain()
        if worker.answered >= worker.sealed:
            self._detach(identity)
        self._changed.notify_all()

    def _detach(self, identity: int) -> None:
        """Let every server forget a worker whose pushes are all answered, and others have the data that it leaves."""
        for leases in self.leases.values():
            leases.give_back(identity)
        if (self._layout is None and not self._tables) or self._failure is not None or not self._is_ready:
            return
        try:
            while self._servers.are_busy:
                self._changed.wait()
            if self._is_ready and not self._workers[identity].live:
                self._servers.ask(Detach(identity))
        except PeerLostError:
            pass  # which has its own consequences
        except HeadwaterError as error:
            self._fail(error)

    # Registration.

    def register(self, identity: int, register: Register, tell: Tell) -> Registered:
        """Agree on the layout. The first worker initialises it; the others wait until it has."""
        with self._changed:
            worker = self._require(identity)
            self._wait(lambda: not self._settling, lambda: ["the first snapshot"], tell)
            if self._layout is None:
                self._when_idle()  # nobody else speaks to the servers; and another may have registered meanwhile
            if self._layout is None:
                self._assign(register)
            self._compare(register)
            while not self._is_initialised or self._settling:
                # Where it is this one, it did not hear that it was asked.
                if self._initialiser in (None, identity) and not self._is_initialised:
                    self._when_idle()  # nobody else speaks to the servers; and another may have been asked meanwhile
                    self._require(identity)
                    if self._initialiser not in (None, identity) or self._is_initialised:
                        continue
                    self._servers.ask(LetWrite(identity))
                    self._initialiser = identity
                    self._changed.notify_all()  # it may ask again already, on another connection
                    return Registered(True)
                self._wait(
                    lambda: not self._settling if self._is_initialised else self._initialiser in (None, identity),
                    lambda: [str(self._workers[w]) for w in (self._initialiser,) if w is not None],
                    tell,
                )
            # The others are in the middle of a step. A joiner waits for its end: if it began now, they would wait for its whole one.
            policy = self._require_policy()
            commit = policy.commit
            self._wait(
                lambda: (
                    policy is not self._policy
                    or policy.commit != commit
                    or not policy.is_under_way
                    or identity in policy.members
                ),
                lambda: [str(self._workers[w]) for w in policy.late()],
                tell,
            )
            self._await_followers(tell)
            self._require(identity)
            return self._join(worker)

    def initialised(self, identity: int, values: Initialised, tell: Tell) -> Registered:
        """The initial values lie on every server: open the job."""
        with self._changed:
            self._when_idle()  # nobody else speaks to the servers
            worker = self._require(identity)
            if self._layout is None or len(values.steps) not in (0, len(self._layout.specs)):
                raise ProtocolError("Expected initial values of what is registered.")
            policy = self._require_policy()
            plan = Plan.start([spec.group for spec in self._layout.specs], values.steps)
            if self._is_initialised and self._holder is not None and self._holder[0] == identity:
                self._plan = plan
                self._keep_structure(tell)
                return Registered(False, self._workers[identity].clock, self._side)
            if self._initialiser != identity or self._is_initialised:
                raise ProtocolError("Expected initial values from the worker that was asked for them, once.")
            self._plan = plan
            policy.commit = max(policy.commit, values.commit)  # a job may have come back from before it had tensors
            self.state.update(values.state)
            self._commit, self._side = policy.commit, self._execution.flip(policy.commit, swap=False)
            self._is_initialised = True
            self._keep_structure(tell)
            self._changed.notify_all()
            self._await_followers(tell)
            return self._join(worker)

    def take_snapshot(self, tell: Tell, feeds: FeedTo | None = None) -> SnapshotTaken:
        """Take a snapshot now. Raises StorageError; SettingError where the job has no store."""
        keep = self._keep
        if keep is None:
            raise SettingError("Expected a job with a store, got one without: start it with --durability.")
        found: list[SnapshotTaken | HeadwaterError] = []

        def take() -> None:
            try:
                found.append(keep.take(self, None if feeds is None else lambda _: feeds))
            except HeadwaterError as error:
                found.append(error)
            with self._changed:
                self._changed.notify_all()

        with self._changed:
            threading.Thread(target=take, name="snapshot", daemon=True).start()
            self._wait(lambda: bool(found), lambda: ["a snapshot"], tell)
        (taken,) = found
        if isinstance(taken, HeadwaterError):
            raise taken
        return taken

    def take_last_snapshot(self) -> None:
        """Where the job has a store, let it hold what was learnt: the job ends."""
        if self._keep is not None and (self._layout is not None or self._tables):
            try:
                self._keep.take(self)
            except HeadwaterError as error:
                warn(f"no last snapshot: {error}")

    def _keep_structure(self, tell: Tell) -> None:
        """What the log's records rest on has changed, so it is in a snapshot before anybody uses it; no log leads there from older ones."""
        if self._keep is None:
            return
        self._settling += 1
        self._structure, self._structure_s = self._structure + 1, time.monotonic()
        generation = self._generation
        try:
            self._servers.drop_followers()
            with self._unlocked():
                self.take_snapshot(tell, FeedTo(None))
        except HeadwaterError as error:
            if generation != self._generation:
                raise PeerLostError(
                    "Expected every server of the job to live, got the end of one: ask again."
                ) from error
            self._fail(error)
            raise
        finally:
            self._settling -= 1
            self._changed.notify_all()

    def _assign(self, register: Register) -> None:
        layout = Layout(register.tensors)
        consistency = self._require_policy().consistency
        if register.optimizer.kind == "mean" and consistency.kind != "bsp":
            raise SettingError(f"Expected bsp for an optimizer that runs on the workers, got {consistency}.")
        self._servers.ask_each(
            lambda i: Assign(register.tensors, register.optimizer, i, self._servers.count, consistency)
        )
        self._layout, self._optimizer = layout, register.optimizer

    def _compare(self, register: Register) -> None:
        assert self._layout is not None
        assert self._optimizer is not None
        differs = difference(self._layout.specs, register.tensors)
        if differs:
            raise LayoutError(f"Expected the model that the job's first worker registered, got another: {differs}.")
        if register.optimizer.structure() != self._optimizer.structure():
            raise SettingError(f"Expected the job's optimizer {self._optimizer}, got {register.optimizer}.")

    def _join(self, worker: Worker) -> Registered:
        assert self._optimizer is not None
        policy = self._require_policy()
        if self._optimizer.kind == "mean" and policy.commit > 0 and worker.answered < 0:
            raise SettingError(
                "Expected every worker at the start: with where='worker' nobody keeps the parameters for one that joins later."
            )
        self._when_idle()
        self._require(worker.identity)  # it may have died meanwhile
        member = policy.members.get(worker.identity)
        worker.clock = member.clock if member else policy.join(worker.identity, worker.index, sequence=worker.answered)
        worker.read = self._commit
        self._changed.notify_all()
        return Registered(False, worker.clock, self._side, self._commit, worker.answered)

    def declare(self, identity: int, wanted: Declare, tell: Tell) -> Declared:
        """Agree on a table. The first to declare it decides; a wish that is None is for what the table has."""
        with self._changed:
            self._require(identity)
            self._wait(lambda: not self._settling, lambda: ["the first snapshot"], tell)
            if all(spec.name != wanted.name for spec in self._tables):
                self._when_idle()  # nobody else speaks to the servers; and another may have declared it meanwhile
                self._wait(
                    lambda: not self._settling and not self._servers.are_busy, lambda: ["the first snapshot"], tell
                )
            for number, spec in enumerate(self._tables):
                if spec.name == wanted.name:
                    differs = table_difference(spec, wanted)
                    if differs:
                        raise SettingError(
                            f"Expected {differs} — table {spec.name!r} is declared already: give it the same settings, or leave "
                            "them out."
                        )
                    return Declared(number, spec)
            number, spec = len(self._tables), self._new_table(wanted)
            self._servers.ask_each(lambda i: OpenTable(number, spec, i, self._servers.count))
            self._tables.append(spec)
            self._keep_structure(tell)
            self._await_followers(tell)
            return Declared(number, spec)

    def _new_table(self, wanted: Declare) -> TableSpec:
        if len(self._tables) >= _limits.TABLES:
            raise SettingError(f"Expected at most {_limits.TABLES} tables, got one more.")
        if wanted.dim is None:
            raise SettingError(
                f"Expected dim for a table that nobody has declared yet, got none — table {wanted.name!r}."
            )
        job = self._require_policy().consistency
        if wanted.consistency not in (None, job) and wanted.consistency.kind != "asp":
            raise SettingError(
                f"Expected the job's consistency, {job}, or asp, got {wanted.consistency} — table {wanted.name!r}."
            )
        return spec_of(wanted, job, dim=wanted.dim)

    # Pushes and commits.

    def seal(self, identity: int, seal: Seal, connection: Connection) -> Committed:
        """Let a push count; returns when its clock is closed and the worker may run its next step."""
        with self._changed:
            worker = self._require(identity, connection)
            policy = self._require_policy()
            if seal.sequence != worker.answered:  # else it has counted, and the answer was lost
                self._check_seal(identity, seal)
                worker.refusal = None
                commits, refusal = policy.push(_entry(identity, seal))
                worker.sealed, worker.used = seal.sequence, seal.used
                if refusal is not None:
                    self._refuse(worker, refusal)
                self._queue.extend(commits)

            def is_closed() -> bool:
                self._drain(worker, seal.sequence)
                return worker.answered >= seal.sequence and policy.is_released(identity)

            self._wait(is_closed, lambda: self._missing(identity), connection.send)
            text = _as_text(worker.refusal)
            refused = None if text is None else Failed(*text)
            return Committed(worker.commit, worker.clock, self._side, worker.accepted, worker.staleness, refused)

    def foresee(self, identity: int, seal: Seal) -> Foreseen | None:
        """Begin to apply the commit that a push which still arrives is about to complete; None where that cannot be told.

        It is only a guess: whoever joins, leaves or loads before the push is whole makes it another commit.
        """
        with self._changed:
            if (
                self._shard is None
                or self._servers.count > 1
                or self._servers.are_busy
                or self._queue
                or self._is_held()
            ):
                return None
            if self._plan is None or getattr(self._optimizer, "clip_norm", None) is not None:
                return None  # the norm is known only when the gradient is whole
            try:
                self._require(identity)
                self._check_seal(identity, seal)
            except HeadwaterError:
                return None  # said when the push is whole
            pushes = self._require_policy().completed_by(_entry(identity, seal))
            if not pushes:
                return None
            assert self._optimizer is not None
            spec, _ = self._plan.next(self._optimizer, pushes)
            return self._shard.foresee(spec) if spec.rows else None

    def _missing(self, identity: int) -> list[str]:
        """Name those that hold a worker up."""
        policy = self._require_policy()
        late = [str(self._workers[w]) for w in policy.waiting_for(identity)]
        return late + [f"worker {i}, which has not come yet" for i in policy.missing()]

    def _check_seal(self, identity: int, seal: Seal) -> None:
        if self._layout is None or self._optimizer is None or not self._is_initialised:
            raise ProtocolError("Expected parameters to be registered before a push.")
        if self._holder is not None and self._holder[0] == identity:
            raise ProtocolError("Expected Resume before a push of whoever holds commits back.")
        if not (math.isfinite(seal.weight) and seal.weight >= 0):
            raise SettingError(f"Expected a weight of 0 or more, got {seal.weight}.")
        if seal.absent and len(seal.absent) != -(-len(self._layout.specs) // 8):
            raise LayoutError(
                f"Expected one bit per tensor, got {len(seal.absent)} bytes for {len(self._layout.specs)} tensors."
            )
        for name, used in seal.used:
            if name not in self.leases:
                raise ProtocolError(f"Expected the use of data that is leased, got data {name!r}.")
            self.leases[name].check(identity, used)
        if seal.scalars == self._checked:
            return
        names = self._optimizer.scalar_names
        if len(seal.scalars) != self._layout.groups or any(len(row) != len(names) for row in seal.scalars):
            raise LayoutError(
                f"Expected {self._layout.groups} parameter groups with {', '.join(names)}, got {seal.scalars}."
            )
        for row in seal.scalars:
            self._optimizer.check(dict(zip(names, row, strict=True)))
        self._checked = seal.scalars

    def _drain(self, worker: Worker | None = None, sequence: int = -1) -> None:
        """Execute queued commits; with a worker, only until its own push is answered: then another thread's turn comes."""
        while self._queue and self._may_commit():
            if worker is not None and worker.answered >= sequence:
                break
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), _limits.QUEUE_COMMITS))]
            self._servers.begin()
            self._changed.release()
            failure: HeadwaterError | None = None
            refusals: Refusals | None = None
            try:
                refusals = self._execute(batch)
            except PeerLostError as error:
                if self._keep is None:
                    failure = error
            except HeadwaterError as error:
                failure = error
            except BaseException as error:
                failure = InternalError(f"A commit failed: {error!r}. Please report this.")
                raise
            finally:
                self._changed.acquire()
                self._servers.end()
                if failure is not None:
                    self._fail(failure)
                self._changed.notify_all()
            if failure is None and refusals is not None:
                self._record(batch, refusals)

    def _may_commit(self) -> bool:
        is_free = not self._servers.are_busy and not self._reserved and not self._is_held()
        return is_free and self._is_ready and self._failure is None

    def _execute(self, batch: Sequence[Commit]) -> Refusals:
        assert self._layout is not None
        assert self._optimizer is not None
        assert self._plan is not None
        persists = self._keep is not None and self._keep.persists
        done = self._execution.run(
            batch,
            Trained(self._layout, self._optimizer, self._plan, self._tables),
            partial(self._change, batch) if persists else None,
        )
        self._commit, self._side, self._plan = batch[-1].number, done.side, done.plan
        return done.refusals

    def _record(self, batch: Sequence[Commit], refusals: Refusals) -> None:
        for identity, counted in self._counted(batch, refusals).items():
            worker = self._workers[identity]
            worker.pushes += 1
            worker.staleness = max(counted.commit - 1 - worker.read, 0)
            worker.staleness_max = max(worker.staleness_max, worker.staleness)
            worker.read = batch[-1].number
            if identity in refusals:
                self._refuse(worker, refusals[identity])
            worker.adopt(counted)
            if not worker.live:
                self._detach(identity)

    def _counted(self, batch: Sequence[Commit], refusals: Refusals) -> dict[int, Counted]:
        """Return what these commits make of the workers whose clocks they close."""
        is_bsp = self._require_policy().consistency.kind == "bsp"
        found = {}
        for commit in batch:
            for identity, sequence in commit.closes:
                worker = self._workers[identity]
                for name, used in worker.used:
                    self.leases[name].use(identity, used)
                why = refusals.get(identity) or worker.refusal
                found[identity] = Counted(
                    worker.index, sequence, batch[-1].number,
                    commit.number if is_bsp else worker.clock + 1,
                    sum(p.worker not in refusals for p in commit.pushes),
                    _as_text(why), worker.live,
                )  # fmt: skip
        return found

    def _change(self, batch: Sequence[Commit], refusals: Refusals, plan: Plan) -> Change:
        """Return what the book is told of these commits."""
        assert self._plan is not None
        is_split = plan.cells is not self._plan.cells
        return self._next_change(
            batch[-1].number,
            self._counted(batch, refusals),
            cohorts=plan.cohorts,
            cohort_of=plan.cells if is_split else None,
        )

    def _next_change(self, commit: int, workers: dict[int, Counted], **changes: Any) -> Change:
        """Return the next change of the book, of workers that have come or gone since the last one, too."""
        self._serial += 1
        for identity in self._unnoted:
            worker = self._workers[identity]
            workers[identity] = msgspec.structs.replace(workers.get(identity, worker.counted()), live=worker.live)
        self._unnoted.clear()
        leases = self._encoded_leases()
        if leases != self._leases_written:
            changes["leases"] = self._leases_written = leases
        return Change(commit, self._serial, workers, **changes)

    def _encoded_leases(self) -> bytes:
        return msgspec.msgpack.encode(self.leases) if self.leases else b""

    def _keep_change(self, *, has_state: bool = False) -> None:
        """Between two commits, write down what has changed besides; returns when it survives."""
        if self._keep is not None and self._keep.persists:
            with self._unlocked(), self.alone() as ask_each:
                with self._changed:  # as it is now: what others have changed meanwhile may be written already
                    change = self._next_change(self._commit, {}, state=dict(self.state) if has_state else None)
                ask_each(lambda _: Persist(change, False))

    def end(self, identity: int) -> None:
        """A worker has ended its data: let it go, for good."""
        self.leave(identity, close=False)
        with self._changed:
            if self._is_ready and self._unnoted and self._is_initialised:
                with suppress(PeerLostError):  # then the others are told with the next change, or wait for it a while
                    self._keep_change()

    def _refuse(self, worker: Worker, why: HeadwaterError) -> None:
        worker.refusal = why
        worker.refused += 1
        self._refused += 1

    @contextmanager
    def alone(self, *, restores: bool = False) -> Iterator[AskEach]:
        """Between two commits, keep the next one waiting and speak to the servers.

        restores: before they are what the store holds. Raises PeerLostError where they are not, and what has ended the job.
        """
        with self._changed:
            self._reserved += 1
            try:
                while self._servers.are_busy:
                    self._check_failure()
                    self._changed.wait()
                self._check_failure()
                if not self._is_ready and not restores:
                    raise PeerLostError("Expected every server of the job to live, got the end of one: ask again.")
                self._servers.begin()
            finally:
                self._reserved -= 1
                self._changed.notify_all()
        try:
            yield self._servers.ask_each
        finally:
            with self._changed:
                self._servers.end()
                self._drain()
                self._changed.notify_all()

    # Data.

    def lease(self, identity: int, wanted: LeaseTake, connection: Connection) -> Leased:
        """Lease a worker a piece of a dataset; None: there is none now or, where it would have waited for one, none to come.

        Who waits is not waited for: what it waits for is that the others push, under BSP and SSP too.
        """
        with self._changed:
            worker, policy = self._require(identity, connection), self._require_policy()
            leases = self._adopt_data(wanted.spec)
            if worker.answered < 0:  # else the book knows it
                self._unnoted.add(identity)
            piece = leases.take(identity, wanted.had)
            if piece is not None:
                self._keep_change()
            # With an optimizer on the workers nobody may miss a commit: such a worker ends its data instead of waiting.
            may_wait = wanted.wait and (self._optimizer is None or self._optimizer.kind != "mean")
            if piece is not None or not may_wait or not self._at_work(leases, worker):
                return Leased(piece)
            is_member = identity in policy.members
            if is_member:
                self._queue.extend(policy.pause(identity))
            worker.is_idle = True
            self._drain()
            self._changed.notify_all()

            def is_decided() -> bool:
                nonlocal piece
                self._require(identity)  # the dead get nothing
                piece = leases.take(identity, wanted.had)
                return piece is not None or not self._at_work(leases, worker)

            try:
                self._wait(is_decided, lambda: [str(w) for w in self._at_work(leases, worker)], connection.send)
            finally:
                worker.is_idle = False
            if piece is not None:
                self._keep_change()
            return Leased(piece, self._join(worker) if is_member else None)

    def _adopt_data(self, spec: DataSpec) -> Leases:
        if spec.name not in self.leases and len(self.leases) >= _limits.DATASETS:
            raise SettingError(f"Expected at most {_limits.DATASETS} leased datasets, got one more, {spec.name!r}.")
        leases = self.leases.setdefault(spec.name, Leases(spec))
        if leases.spec != spec:
            raise SettingError(
                f"Expected {leases.spec}, as the job's first worker has it, got {spec}: give every worker the same, or another name."
            )
        return leases

    def _at_work(self, leases: Leases, but: Worker) -> list[Worker]:
        """Return the others who hold data and do not wait themselves: what they do not use may come free."""
        found = [self._workers[holder] for holder in leases.holders()]
        return [worker for worker in found if worker is not but and not worker.is_idle]

    # Readers, figures, waiting.

    def hold(self, identity: int, tell: Tell, *, writes: bool = False) -> Held:
        """Keep commits waiting so that several planes can be read together, or written by a worker, for HOLD_S at most."""
        with self._changed:
            self._wait(
                lambda: self._is_ready and not self._servers.are_busy and not self._is_held(but=identity),
                lambda: ["another reader"],
                tell,
            )
            self._holder = (identity, time.monotonic() + _limits.HOLD_S)
            if writes:
                self._require(identity)
                self._servers.ask(LetWrite(identity))
            return self._described()

    def _described(self) -> Held:
        specs: tuple[TensorSpec, ...] = self._layout.specs if self._layout else ()
        steps = self._plan.steps() if self._plan else ()
        return Held(self._commit, steps, specs, self._optimizer, tuple(self._tables))

    def set_aside(self, identity: int, tell: Tell) -> Held:
        """Set the parameters aside, for one publisher at a time; commits go on beside them until `release`."""
        with self._changed:
            self._wait(lambda: self._publisher in (None, identity), lambda: ["another publication"], tell)
            self._publisher = identity
        with self.alone() as ask_each:
            ask_each(lambda _: SetAside())
            return self._described()

    def release(self, identity: int) -> None:
        """Let commits write over what was set aside for this publisher, if anything was."""
        with self._changed:
            if self._publisher != identity:
                return
        with suppress(HeadwaterError), self.alone() as ask_each:  # servers that come back have nothing set aside
            ask_each(lambda _: Release())
        with self._changed:
            self._publisher = None
            self._changed.notify_all()

    def resume(self, identity: int) -> None:
        """Let commits go on."""
        with self._changed:
            if self._holder is not None and self._holder[0] == identity:
                self._holder = None
            self._drain()
            self._changed.notify_all()

    def _is_held(self, but: int | None = None) -> bool:
        """Whether a reader keeps commits waiting, and is not `but`."""
        return self._holder is not None and self._holder[0] != but and time.monotonic() < self._holder[1]

    def report(self, identity: int, figures: dict[str, float]) -> None:
        """Keep a worker's figures for the statistics."""
        with self._changed:
            self._require(identity).figures.update(figures)

    def set_state(self, key: str, value: bytes | None) -> None:
        """Change one key of the job's small dictionary; None removes it."""
        with self._changed:
            size = sum(len(k) + len(v) for k, v in self.state.items()) + len(key) + len(value or b"")
            if value is not None and size > _limits.STATE_BYTES:
                raise SettingError(
                    f"Expected a job state of at most {_limits.STATE_BYTES} bytes, got {size} with {key!r}."
                )
            if value is None:
                self.state.pop(key, None)
            else:
                self.state[key] = value
            self._keep_change(has_state=True)

    def stats(self) -> Stats:
        """Return the job at a glance."""
        with self._changed:
            policy = self._policy or Policy(self._consistency or bsp(), self._expected or 1)
            rows = [
                WorkerStats(
                    w.index,
                    w.label,
                    w.live,
                    w.clock,
                    w.staleness,
                    w.staleness_max,
                    w.pushes,
                    w.refused,
                    dict(w.figures),
                )
                for w in sorted(self._workers.values(), key=lambda w: w.index)
            ]
            size = self._layout.wire_bytes if self._layout else 0
            pushes = sum(w.pushes for w in self._workers.values())
            return Stats(
                self._commit, time.monotonic() - self._start_s, self._layout.parameters if self._layout else 0,
                pushes * size, pushes * size, self._refused, policy.consistency, self._servers.count, tuple(rows),
                tuple(self._tables), len(self._servers.followers),
            )  # fmt: skip

    def live_workers(self) -> int:
        """How many workers are there now."""
        with self._changed:
            return sum(w.live for w in self._workers.values())

    def _wait(self, is_ready: Callable[[], bool], missing: Callable[[], list[str]], tell: Tell) -> None:
        """Wait for a condition; every REPORT_WAIT_S the peer is told for whom."""
        if is_ready():
            return
        start = last = time.monotonic()
        generation = self._generation
        while not is_ready():
            self._check_failure()
            if self._generation != generation:
                raise PeerLostError("Expected every server of the job to live, got the end of one: ask again.")
            self._changed.wait(_limits.REPORT_WAIT_S)
            now = time.monotonic()
            if now - last >= _limits.REPORT_WAIT_S:
                last = now
                waiting = Waiting(now - start, tuple(missing()))
                with self._unlocked():
                    tell(waiting)
        self._check_failure()

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        self._changed.release()
        try:
            yield
        finally:
            self._changed.acquire()

    def _when_idle(self) -> None:
        """Wait until every commit that is decided is carried out."""
        deadline = time.monotonic() + _limits.HOLD_S
        self._drain()
        while self._servers.are_busy or self._queue or not self._is_ready:
            self._check_failure()
            if not self._changed.wait(0.1) and time.monotonic() > deadline:
                raise WaitTimeoutError(f"Expected a commit to end within {_limits.HOLD_S} s.")
            self._drain()

    def _fail(self, error: HeadwaterError) -> None:
        """The outcome of a commit is unknown on some server: latch the error and refuse all further work."""
        self._failure = self._failure or error
        self._changed.notify_all()

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))

    def _require(self, identity: int, connection: Connection | None = None) -> Worker:
        """Return a worker that is a member. connection: it has spoken on this one, which may be from before it came back."""
        self._check_failure()
        worker = self._workers.get(identity)
        if worker is None or not worker.live:
            kind = ProtocolError if self._keep is None else PeerLostError  # of a durable job: it comes back
            raise kind("Expected a worker of this job, got one that is unknown, or was declared dead: start it again.")
        if connection is not None and connection not in worker.connections:
            raise PeerLostError("Expected to hear a worker as it is now, got what it said before it came back.")
        return worker

    def _require_policy(self) -> Policy:
        if self._policy is None:
            raise ProtocolError("Expected a worker to say Hello first.")
        return self._policy


def _as_text(error: HeadwaterError | None) -> tuple[str, str] | None:
    return None if error is None else (type(error).__name__, str(error))


def _entry(identity: int, seal: Seal) -> PushEntry:
    return PushEntry(identity, seal.sequence, seal.weight, seal.scalars, seal.absent)
