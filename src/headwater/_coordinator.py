"""One per job: membership, settings, and the moment a commit happens. Touches no tensor.

The consistency policy decides which pushes make a commit; the coordinator carries the decision out on every server:

    Prepare   apply beside the current state; a bad gradient is found here, its push refused, and Prepare said again
    Flip      what was prepared is the state

Both are said to all servers at once and answered by all before the next, so commit n is the same on every server. With
clipping, Norms is asked first. One thread at a time executes; whichever thread completes a commit does it, so with one
worker there is no hand-over.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from headwater import _limits
from headwater._consistency import Commit, Consistency, Policy, PushEntry, bsp
from headwater._dense import Foreseen, Shard
from headwater._errors import (
    DisagreementError,
    HeadwaterError,
    InternalError,
    LayoutError,
    NonFiniteError,
    PeerLostError,
    ProtocolError,
    SettingError,
    WaitTimeoutError,
)
from headwater._layout import Layout, TensorSpec, difference
from headwater._messages import (
    AnyMessage,
    Assign,
    Committed,
    Declare,
    Declared,
    Detach,
    Failed,
    Flip,
    Gather,
    Held,
    Hello,
    Initialised,
    Normed,
    Norms,
    OpenTable,
    Prepare,
    Prepared,
    Register,
    Registered,
    Seal,
    ServerAddress,
    Stats,
    Waiting,
    Welcome,
    WorkerStats,
)
from headwater._plan import Plan, scaled
from headwater._rows import TableSpec, spec_of
from headwater._rows import difference as table_difference
from headwater._transport import Connection, request
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
        self.accepted = self.clock = self.staleness = self.staleness_max = self.pushes = self.refused = 0
        self.figures: dict[str, float] = {}

    def __str__(self) -> str:
        return f"worker {self.index} ({self.label})"


class Coordinator:
    """The job. It can be shared between threads."""

    def __init__(self, shard: Shard, *, consistency: Consistency | None, workers: int, servers: int) -> None:
        self._shard = shard
        self._consistency, self._expected, self._server_count = consistency, workers, servers
        self._changed = threading.Condition()
        self._policy: Policy | None = None
        self._workers: dict[int, Worker] = {}
        self._addresses: list[ServerAddress] = []
        self._remotes: list[Connection] = []
        self._layout: Layout | None = None
        self._optimizer: AnyOptimizer | None = None
        self._plan: Plan | None = None
        self._tables: list[TableSpec] = []
        self._initialiser: int | None = None
        self._is_initialised = False
        self._queue: deque[Commit] = deque()
        self._is_busy = False
        self._holder: tuple[int, float] | None = None
        self._failure: HeadwaterError | None = None
        self._checked: tuple[tuple[float, ...], ...] | None = None  # scalars found valid last
        self._refused = 0
        self._was_clipped = True  # the last commit; a guess at the next one
        self._start_s = time.monotonic()
        self.state: dict[str, bytes] = {}

    # Membership.

    def add_server(self, address: ServerAddress, connection: Connection | None) -> None:
        """Take in a server; None: the one in this process."""
        with self._changed:
            if len(self._addresses) >= self._server_count:
                raise SettingError(
                    f"Expected {self._server_count} servers in this job, got one more: start it with --servers."
                )
            self._addresses.append(address)
            if connection is not None:
                self._remotes.append(connection)
            self._changed.notify_all()

    def lose_server(self, label: str) -> None:
        """A server has died: nothing can be committed any more, and everybody is told."""
        with self._changed:
            self._fail(
                PeerLostError(f"Expected every server of the job to live, got the end of {label}: start the job again.")
            )

    def close(self) -> None:
        """The server in this process closes: whoever waits here waits no longer."""
        with self._changed:
            self._fail(PeerLostError("Expected a running server, got one that was closed."))

    def hello(self, hello: Hello, connection: Connection, tell: Tell) -> Welcome:
        """Take in a worker or an observer, once every server is there."""
        with self._changed:
            self._wait(
                lambda: len(self._addresses) == self._server_count,
                lambda: [f"server {i}" for i in range(len(self._addresses), self._server_count)],
                tell,
            )
            policy = self._adopt(hello)
            index = self._place(hello) if hello.role == "worker" else -1
            if hello.role == "worker":
                worker = self._workers[hello.identity] = Worker(hello, index)
                worker.connections.append(connection)
            return Welcome(index, policy.expected, policy.consistency, tuple(self._addresses))

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
        taken = {w.index for w in self._workers.values() if w.live}
        if len(taken) >= _limits.WORKERS:
            raise SettingError(f"Expected at most {_limits.WORKERS} workers, got one more.")
        if hello.index in taken:
            holder = next(w for w in self._workers.values() if w.live and w.index == hello.index)
            raise SettingError(f"Expected HEADWATER_WORKER to be free, got {hello.index}, which is {holder}.")
        return hello.index if hello.index >= 0 else next(i for i in range(len(taken) + 1) if i not in taken)

    def beat(self, identity: int, connection: Connection) -> None:
        """Note a worker's heartbeat connection, which is closed when the worker is dropped."""
        with self._changed:
            self._require(identity).connections.append(connection)

    def leave(self, identity: int, *, close: bool = True) -> None:
        """Let a worker go, dead or done: nobody waits for it any more. A second time is fine.

        close: end its connections too. That comes first, so that nothing torn is sent on them.
        """
        with self._changed:
            worker = self._workers.get(identity)
            if worker is None or not worker.live:
                return
            worker.live = False
            if close:
                for connection in worker.connections:
                    connection.close()
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
        """Let every server forget a worker whose pushes are all answered."""
        if (self._layout is None and not self._tables) or self._failure is not None:
            return
        try:
            while self._is_busy:
                self._changed.wait()
            self._ask(Detach(identity))
        except HeadwaterError as error:
            self._fail(error)

    # Registration.

    def register(self, identity: int, register: Register, tell: Tell) -> Registered:
        """Agree on the layout. The first worker initialises it; the others wait until it has."""
        with self._changed:
            worker = self._require(identity)
            if self._layout is None:
                self._assign(register)
            self._compare(register)
            while not self._is_initialised:
                if self._initialiser is None:
                    self._initialiser = identity
                    return Registered(True)
                self._wait(
                    lambda: self._is_initialised or self._initialiser is None,
                    lambda: [str(self._workers[w]) for w in (self._initialiser,) if w is not None],
                    tell,
                )
            return self._join(worker)

    def initialised(self, identity: int, values: Initialised) -> Registered:
        """The initial values lie on every server: open the job."""
        with self._changed:
            worker = self._require(identity)
            if self._layout is None or len(values.steps) not in (0, len(self._layout.specs)):
                raise ProtocolError("Expected initial values of what is registered.")
            policy = self._require_policy()
            plan = Plan.start([spec.group for spec in self._layout.specs], values.steps)
            if self._is_initialised and self._holder is not None and self._holder[0] == identity:
                self._plan = plan
                return Registered(False, self._workers[identity].clock, self._shard.side)
            if self._initialiser != identity or self._is_initialised:
                raise ProtocolError("Expected initial values from the worker that was asked for them, once.")
            self._plan = plan
            policy.commit = values.commit
            self.state.update(values.state)
            self._ask(Flip(values.commit, False))
            self._is_initialised = True
            self._changed.notify_all()
            return self._join(worker)

    def _assign(self, register: Register) -> None:
        layout = Layout(register.tensors)
        consistency = self._require_policy().consistency
        if register.optimizer.kind == "mean" and consistency.kind != "bsp":
            raise SettingError(f"Expected bsp for an optimizer that runs on the workers, got {consistency}.")
        for i, remote in enumerate(self._remotes):
            request(remote, Assign(register.tensors, register.optimizer, i + 1, self._server_count, consistency))
        self._shard.handle(Assign(register.tensors, register.optimizer, 0, self._server_count, consistency))
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
        if self._optimizer.kind == "mean" and policy.commit > 0:
            raise SettingError(
                "Expected every worker at the start: with where='worker' nobody keeps the parameters for one that joins later."
            )
        self._when_idle()
        worker.clock = policy.join(worker.identity, worker.index)
        worker.read = self._shard.commit
        self._changed.notify_all()
        return Registered(False, worker.clock, self._shard.side)

    def declare(self, identity: int, wanted: Declare) -> Declared:
        """Agree on a table. The first to declare it decides; a wish that is None is for what the table has."""
        with self._changed:
            self._require(identity)
            if all(spec.name != wanted.name for spec in self._tables):
                self._when_idle()  # nobody else speaks to the servers; and another may have declared it meanwhile
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
            for i, remote in enumerate(self._remotes):
                request(remote, OpenTable(number, spec, i + 1, self._server_count))
            self._shard.handle(OpenTable(number, spec, 0, self._server_count))
            self._tables.append(spec)
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

    def seal(self, identity: int, seal: Seal, tell: Tell) -> Committed:
        """Let a push count; returns when its clock is closed and the worker may run its next step."""
        with self._changed:
            worker = self._require(identity)
            policy = self._require_policy()
            self._check_seal(identity, seal)
            worker.refusal = None
            commits, refusal = policy.push(_entry(identity, seal))
            worker.sealed = seal.sequence
            if refusal is not None:
                self._refuse(worker, refusal)
            self._queue.extend(commits)

            def is_closed() -> bool:
                self._drain(worker, seal.sequence)
                return worker.answered >= seal.sequence and policy.is_released(identity)

            self._wait(is_closed, lambda: self._missing(identity), tell)
            refused = worker.refusal and Failed(type(worker.refusal).__name__, str(worker.refusal))
            return Committed(worker.commit, worker.clock, self._shard.side, worker.accepted, worker.staleness, refused)

    def foresee(self, identity: int, seal: Seal) -> Foreseen | None:
        """Begin to apply the commit that a push which still arrives is about to complete; None where that cannot be told.

        It is only a guess: whoever joins, leaves or loads before the push is whole makes it another commit.
        """
        with self._changed:
            if self._server_count > 1 or self._is_busy or self._queue or self._is_held():
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
        while self._queue and not self._is_busy and self._failure is None and not self._is_held():
            if worker is not None and worker.answered >= sequence:
                break
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), _limits.QUEUE_COMMITS))]
            self._is_busy = True
            self._changed.release()
            failure = None
            try:
                refusals = self._execute(batch)
            except HeadwaterError as error:
                failure = error
            except BaseException as error:
                failure = InternalError(f"A commit failed: {error!r}. Please report this.")
                raise
            finally:
                self._changed.acquire()
                self._is_busy = False
                if failure is not None:
                    self._fail(failure)
                self._changed.notify_all()
            if failure is None:
                self._record(batch, refusals)

    def _execute(self, batch: Sequence[Commit]) -> dict[int, HeadwaterError]:
        """Apply commits on every server, without the pushes that turn out bad. Returns why, by identity.

        A gradient that is not expected to need clipping is measured in the pass that applies it, and where it does, applied again.
        Each other retry leaves out at least one push, so this ends.
        """
        refusals: dict[int, HeadwaterError] = {}
        limit: float | None = getattr(self._optimizer, "clip_norm", None)
        while True:
            pushes = [[p for p in commit.pushes if p.worker not in refusals] for commit in batch]
            specs, plan, kept = [], self._plan, list[int]()
            assert plan is not None
            assert self._optimizer is not None
            is_measured = limit is not None and not self._was_clipped and len(batch) == 1
            for i in [i for i, p in enumerate(pushes) if p]:
                spec, after = plan.next(self._optimizer, pushes[i])
                if not spec.rows:  # none of them has any gradient: nothing changes
                    continue
                if limit is not None and not is_measured:
                    factor = _clip_factor(limit, self._ask(Norms(spec)))
                    self._was_clipped = factor != 1.0
                    spec = scaled(spec, factor)
                specs.append(spec)
                kept.append(i)
                plan = after
            if specs:
                answers = self._ask(Prepare(batch[0].number, tuple(specs), is_measured))
                bad = [a.bad for a in answers if isinstance(a, Prepared) and a.bad is not None]
                if bad:
                    for commit, push, tensor, element in bad:
                        entry = pushes[kept[commit]][push]
                        refusals[entry.worker] = self._bad_push(entry, tensor, element)
                    continue
                if limit is not None and is_measured and _clip_factor(limit, answers) != 1.0:
                    self._was_clipped = True
                    continue
            if self._gather(batch, refusals):
                continue
            self._ask(Flip(batch[-1].number, bool(specs)))
            self._plan = plan
            return refusals

    def _gather(self, batch: Sequence[Commit], refusals: dict[int, HeadwaterError]) -> bool:
        """Let the rows that the batch's pushes have staged count with the flip to come. Returns whether that refuses one more."""
        if not any(spec.is_staged for spec in self._tables):
            return False
        entries = {entry.worker: entry for commit in batch for entry in commit.pushes if entry.worker not in refusals}
        total = sum(entry.weight for entry in entries.values())
        pushes = [
            (worker, sequence, entries[worker].weight / total if worker in entries else 0.0)
            for commit in batch
            for worker, sequence in commit.closes
        ]
        bad = {a.bad for a in self._ask(Gather(tuple(pushes))) if isinstance(a, Prepared) and a.bad is not None}
        for _, push, tensor, element in bad:
            worker = pushes[push][0]
            refusals[worker] = self._bad_push(entries[worker], tensor, element)
        return bool(bad)

    def _bad_push(self, entry: PushEntry, tensor: int, element: int) -> HeadwaterError:
        assert self._layout is not None
        if tensor == -2:
            return DisagreementError(
                f"Expected the same learning rate and other scalars from every worker for table {self._tables[element].name!r}, "
                f"got others from {self._workers[entry.worker]}: give all workers the same schedule, or declare it with hw.asp()."
            )
        if tensor < 0:
            return ProtocolError(
                f"Expected push {entry.sequence} to lie whole on every server before its seal, got none."
            )
        spec = self._layout.specs[tensor]
        return NonFiniteError(
            f"Expected finite gradients, got NaN or infinity in {spec.name!r} {spec.shape} at element {element} — "
            f"{self._workers[entry.worker]}, push {entry.sequence}. The push counts nowhere and the clock is closed; "
            "lower the learning rate, clip, or skip the step."
        )

    def _record(self, batch: Sequence[Commit], refusals: dict[int, HeadwaterError]) -> None:
        is_bsp = self._require_policy().consistency.kind == "bsp"
        for commit in batch:
            for identity, sequence in commit.closes:
                worker = self._workers[identity]
                worker.answered = sequence
                worker.commit = batch[-1].number
                worker.clock = commit.number if is_bsp else worker.clock + 1
                worker.pushes += 1
                worker.accepted = sum(p.worker not in refusals for p in commit.pushes)
                worker.staleness = max(commit.number - 1 - worker.read, 0)
                worker.staleness_max = max(worker.staleness_max, worker.staleness)
                worker.read = batch[-1].number
                if identity in refusals:
                    self._refuse(worker, refusals[identity])
                if not worker.live:
                    self._detach(identity)

    def _refuse(self, worker: Worker, why: HeadwaterError) -> None:
        worker.refusal = why
        worker.refused += 1
        self._refused += 1

    def _ask(self, message: AnyMessage) -> list[AnyMessage]:
        """Say something to every server, this process's last so that they work at the same time; answers in their order."""
        for remote in self._remotes:
            remote.send(message)
        own = self._shard.handle(message)
        answers = [own]
        for remote in self._remotes:
            answer = remote.receive().message
            if isinstance(answer, Failed):
                raise answer.exception()
            answers.append(answer)
        return answers

    # Readers, figures, waiting.

    def hold(self, identity: int, tell: Tell) -> Held:
        """Keep commits waiting so that several planes can be read together, for HOLD_S at most."""
        with self._changed:
            self._wait(lambda: not self._is_busy and not self._is_held(but=identity), lambda: ["another reader"], tell)
            self._holder = (identity, time.monotonic() + _limits.HOLD_S)
            specs: tuple[TensorSpec, ...] = self._layout.specs if self._layout else ()
            steps = self._plan.steps() if self._plan else ()
            tables = tuple(spec.name for spec in self._tables)
            return Held(self._shard.commit, steps, specs, self._optimizer, tables)

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
                self._shard.commit, time.monotonic() - self._start_s, self._layout.parameters if self._layout else 0,
                pushes * size, pushes * size, self._refused, policy.consistency, self._server_count, tuple(rows),
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
        while not is_ready():
            self._check_failure()
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
        while self._is_busy or self._queue:
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

    def _require(self, identity: int) -> Worker:
        self._check_failure()
        worker = self._workers.get(identity)
        if worker is None or not worker.live:
            raise ProtocolError(
                "Expected a worker of this job, got one that is unknown, or was declared dead: start it again."
            )
        return worker

    def _require_policy(self) -> Policy:
        if self._policy is None:
            raise ProtocolError("Expected a worker to say Hello first.")
        return self._policy


def _clip_factor(limit: float, answers: Sequence[AnyMessage]) -> float:
    """Return what a gradient with these sums of squares is multiplied by so that its global norm is at most `limit`."""
    sums = [np.frombuffer(a.sums) for a in answers if isinstance(a, (Normed, Prepared))]
    # fsum is exact before it rounds, so the norm does not depend on how many servers the blocks lie on.
    total = math.fsum(np.concatenate(sums))
    if not math.isfinite(total):
        return 1.0  # a bad element: Prepare finds and names it
    return min(1.0, limit / (math.sqrt(total) + 1e-6))


def _entry(identity: int, seal: Seal) -> PushEntry:
    return PushEntry(identity, seal.sequence, seal.weight, seal.scalars, seal.absent)
