"""A read replica of a running job's tables: it follows their delta streams and answers lookups.

A thread asks the job for what has changed, a page of each table in turn, and writes it into that table's copy. Streams end with the
connection that they came on, at the servers too. When it is lost, or the job is started again, the replica goes on serving what it has,
says how old that is, connects again and again, and then has everything sent anew.

How late a row is seen: what an asking brings was not there when the job was last asked for all there was, or it would have come then. So
the time from that question, when it was sent, until the row was written here is at least the row's own lag. It takes no
other machine's clock.

A reader's connection speaks as a worker's connection for tables does, of which it knows Declare, Room and PullRows, and StatsGet.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import NoReturn

import numpy as np

from headwater import _limits
from headwater._errors import (
    HeadwaterError,
    PeerLostError,
    ProtocolError,
    SettingError,
    UnreachableError,
    UsageError,
    WaitTimeoutError,
    warn,
)
from headwater._listener import Listener
from headwater._lookup import Table
from headwater._messages import (
    AnyMessage,
    Declare,
    Declared,
    Failed,
    Hello,
    Here,
    PullRows,
    ReplicaStats,
    Room,
    ServedTable,
    Stats,
    StatsGet,
)
from headwater._metrics import escape
from headwater._peers import Peers
from headwater._rows import TableSpec
from headwater._session import Session
from headwater._table import Answer, Rooms
from headwater._table_copy import TableCopy
from headwater._transport import Address, Connection, SocketConnection, new_identity, process_label


class _Observer(Session):
    """A session that never comes back by itself: after a loss the job may have other tables, so its owner looks at it anew."""

    def _come_back(self, error: PeerLostError | UnreachableError) -> NoReturn:
        raise error


class _Served:
    """A table that is followed, over all connections to the job. Written by the thread that follows."""

    def __init__(self, spec: TableSpec, threads: int) -> None:
        self.spec, self.copy = spec, TableCopy.of(spec, threads=threads)
        self.number = -1  # for readers, once it is whole
        self.complete_s = 0.0  # when the job was asked for the last of what it had
        self.step = self.updates = self.deletes = self.restarts = 0
        self.lags: deque[tuple[float, int]] = deque(maxlen=_limits.LAGS)  # seconds, rows

    @property
    def is_whole(self) -> bool:
        """Whether everything has come once."""
        return self.number >= 0

    def stats(self) -> ServedTable:
        """Return the table at a glance."""
        copy, lags = self.copy.stats(), np.array(self.lags or [(0.0, 1)])
        order = np.argsort(lags[:, 0])
        ranks = np.cumsum(lags[order, 1])
        middle, last = (float(lags[order, 0][np.searchsorted(ranks, share * ranks[-1])]) for share in (0.5, 0.99))
        return ServedTable(
            self.spec.name, self.spec.dim, copy.rows, copy.bytes, self.step, time.monotonic() - self.complete_s, middle, last,
            self.updates, self.deletes, self.restarts, copy.lookups, copy.ids, copy.missing,
        )  # fmt: skip


class _Stream:
    """A table's delta stream on one connection to the job."""

    def __init__(self, table: Table, served: _Served, consumer: str) -> None:
        self._table, self.served, self._consumer = table, served, consumer
        self._written = 0  # rows that are not yet seen: while everything comes anew
        self._is_anew = True
        table.track(consumer, ends=True)

    def advance(self) -> bool:
        """Take the next of what has changed; returns whether there is more."""
        served, asked_s = self.served, time.monotonic()
        changes = self._table.changes(self._consumer, _limits.FOLLOW_ROWS, state=False)
        served.copy.apply(changes)
        self._is_anew = (self._is_anew or changes.restart) and changes.more
        served.restarts += changes.restart
        served.updates += len(changes.ids)
        served.deletes += len(changes.deleted)
        self._written += len(changes.ids) + len(changes.deleted)
        if self._written and not self._is_anew:
            if served.complete_s:  # not the first time: those were not updates
                served.lags.append((time.monotonic() - served.complete_s, self._written))
            self._written = 0
        if not changes.more:
            served.complete_s, served.step = asked_s, changes.step
        return changes.more


class Replica(Listener):
    """A read-only copy of a running job's tables in this process, kept up to date. Close it, or use it as a context manager.

    It can be shared between threads. After a loss it serves what it had until the job is back and everything has come anew.
    """

    def __init__(
        self,
        job: str | None = None,
        *,
        listen: str | None = None,
        tables: Collection[str] = (),
        token: str | None = None,
        interval_s: float = _limits.FOLLOW_S,
        threads: int = 1,
        timeout_s: float = 600.0,
    ) -> None:
        """Connect to the job, copy the tables, then listen.

        job: its first server's address; default $HEADWATER_ADDRESS. listen: where readers find it, tcp://HOST:PORT (0: any) or
        unix:///PATH; None: nowhere, and `table` is the way. tables: names, waited for where the job has not declared them yet; none:
        all, also those that are declared later. token: the job's and the readers', default $HEADWATER_TOKEN. interval_s: from one
        asking to the next, at least; and as long as one takes. threads: for lookups of more than 2,048 ids. timeout_s: until the
        tables are here.
        Raises UnreachableError, AuthenticationError, SettingError, WaitTimeoutError.
        """
        address = job or os.environ.get("HEADWATER_ADDRESS")
        if not address:
            raise SettingError("Expected the address of a running job, got none: set HEADWATER_ADDRESS.")
        if not interval_s > 0.0:
            raise SettingError(f"Expected an interval_s above 0, got {interval_s}.")
        super().__init__(os.environ.get("HEADWATER_TOKEN", "") if token is None else token)
        self._job, self._wanted, self._interval_s, self._threads_each = address, tuple(tables), interval_s, threads
        self._target, listen_on = Address.parse(address), None if listen is None else Address.parse(listen)
        self._changed = threading.Condition()  # guards what follows
        self._served: dict[str, _Served] = {}
        self._numbered: dict[int, _Served] = {}
        self._count = 0  # of numbers
        self._has_looked = False
        self.latest: _Desk | None = None  # whose reader has asked last
        self._trouble = ""
        self._refusal: UsageError | None = None  # before everything has come once
        self._session: Session | None = self._connect(returns=False)
        self._follower = threading.Thread(target=self._follow_always, name="follow", daemon=True)
        self._follower.start()
        try:
            self._wait_whole(timeout_s)
            if listen_on is not None:
                self._listen(listen_on)
        except BaseException:
            self.close()
            raise

    # The job's side.

    def _connect(self, *, returns: bool) -> Session:
        hello = Hello(self.token, "observer", new_identity(), label=process_label(), returns=returns)
        return _Observer(Peers(self._target, hello, transport="auto", timeout_s=600.0))

    def _follow_always(self) -> None:
        try:
            while not self._is_closed:
                try:
                    self._session = self._session or self._connect(returns=True)
                    self._follow(self._session)
                except HeadwaterError as error:
                    self._note(str(error))
                    if isinstance(error, UsageError):
                        self._refusal = error
                finally:
                    if self._session is not None:
                        self._session.close()
                    self._session = None
                self._pause(_limits.AGAIN_S)
        finally:
            self._note("it follows no more: please report this")

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_closed, seconds)

    def _follow(self, session: Session) -> None:
        """Follow the tables until the replica is closed. Raises what ends the connection."""
        consumer = f"replica {session._peers.hello.identity:x}"
        streams: dict[int, _Stream] = {}
        looked_s = 0.0
        while not self._is_closed:
            start = time.monotonic()
            if start - looked_s > _limits.LOOK_S or not streams:
                looked_s = start
                self._look(session, streams, consumer)
            more = False
            for stream in streams.values():
                more |= stream.advance()
                self._publish(stream)
            self._note("")
            if not more:
                self._pause(max(self._interval_s, time.monotonic() - start))

    def _look(self, session: Session, streams: dict[int, _Stream], consumer: str) -> None:
        """Begin to follow the tables that are wanted and not yet followed."""
        for number, spec in enumerate(session._ask(StatsGet(), Stats).tables):
            if number in streams or (self._wanted and spec.name not in self._wanted):
                continue
            served = self._served.get(spec.name)
            if served is None or _shape(served.spec) != _shape(spec):
                served = _Served(spec, self._threads_each)
            streams[number] = _Stream(session._table(number, spec), served, consumer)
            with self._changed:
                self._served.setdefault(spec.name, served)
        with self._changed:
            self._has_looked = True
            self._changed.notify_all()

    def _publish(self, stream: _Stream) -> None:
        """Let readers have a table that is whole, in place of one with other settings."""
        served = stream.served
        if served.is_whole or not served.complete_s:
            return
        with self._changed:
            before = self._served[served.spec.name]
            self._numbered.pop(before.number, None)  # whoever knows that number asks anew
            self._served[served.spec.name] = self._numbered[self._count] = served
            served.number = self._count
            self._count += 1
            self._changed.notify_all()

    def _note(self, trouble: str) -> None:
        if trouble == self._trouble or self._is_closed:
            return
        if trouble:
            warn(f"the replica serves what it has, the job at {self._job} does not answer: {trouble}")
        self._trouble = trouble

    def _wait_whole(self, timeout_s: float) -> None:
        def missing() -> set[str]:
            wanted = set(self._wanted) or set(self._served)
            return {name for name in wanted if name not in self._served or not self._served[name].is_whole}

        with self._changed:
            self._changed.wait_for(lambda: self._refusal or (self._has_looked and not missing()), timeout_s)
            if self._has_looked and not missing():
                return
            if self._refusal is not None:
                raise self._refusal
            raise WaitTimeoutError(
                f"Expected to have all tables within {timeout_s:g} s, got no end of {', '.join(sorted(missing())) or 'the job'}: "
                f"{self._trouble or 'does any worker declare them?'}"
            )

    def wait(self, timeout_s: float = _limits.SILENCE_S) -> None:
        """Wait until all that the job has now is here, of the tables that are served. Raises WaitTimeoutError."""
        now = time.monotonic()
        with self._changed:
            served = list(self._numbered.values())
            if not self._changed.wait_for(lambda: all(each.complete_s > now for each in served), timeout_s):
                raise WaitTimeoutError(
                    f"Expected to have what the job at {self._job} has now within {timeout_s:g} s, got an older state: "
                    f"{self._trouble or 'too much changes meanwhile'}"
                )

    # The readers' side.

    def _handler(self, connection: Connection, hello: Hello) -> _Desk:
        if hello.role not in ("table", "data"):
            raise ProtocolError(
                f"Expected a reader, got {hello.role!r}: this is a replica; look up with hw.lookup(), workers connect to the job."
            )
        return _Desk(self, connection)

    def table(self, name: str) -> TableCopy:
        """Return the copy of a table. Raises SettingError for one that is not here."""
        return self._find(name).copy

    def _find(self, name: str) -> _Served:
        with self._changed:
            found = self._served.get(name)
            known = [name for name, served in self._served.items() if served.is_whole]
        if found is None or not found.is_whole:
            raise SettingError(
                f"Expected one of the replica's tables, {', '.join(map(repr, known)) or 'of which there are none yet'}, got {name!r}."
            )
        return found

    def _by_number(self, number: int) -> TableCopy:
        with self._changed:
            found = self._numbered.get(number)
        if found is None:
            raise PeerLostError(f"Expected a table that is served, got number {number}: declare it again.")
        return found.copy

    def stats(self) -> ReplicaStats:
        """Return the replica at a glance."""
        with self._changed:
            served = [each for _, each in sorted(self._served.items()) if each.is_whole]
        return ReplicaStats(tuple([each.stats() for each in served]), self._trouble)

    def metrics(self) -> str:
        """Return `stats` in Prometheus's text format."""
        return metrics_of(self.stats())

    def _ending(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _ended(self) -> None:
        self._follower.join(_limits.CLOSE_S)
        session = self._session
        if session is not None:  # it waits for a job that says nothing
            session._peers.close(leave=False)
            self._follower.join(_limits.CLOSE_S)

    def __repr__(self) -> str:
        names = ", ".join(self._served)
        return f"<Replica of {self._job} {self.address.tcp or self.address.unix or 'in this process'} tables: {names}>"


class _Desk(Rooms):
    """One reader's connection."""

    role = "table"

    def __init__(self, replica: Replica, connection: Connection) -> None:
        super().__init__()
        self._replica, self._connection = replica, connection

    def welcome(self) -> None:
        """Say where else the replica listens."""
        self._connection.send(Here(self._replica.address))

    def handle(self) -> bool:
        """Carry out one request. Errors of the caller are answered, not raised."""
        message = self._connection.receive(self._sink).message
        is_alone, self._replica.latest = self._replica.latest is self, self
        if isinstance(
            self._connection, SocketConnection
        ):  # several that look for requests would wait for the interpreter
            self._connection.spin_s = _limits.LINGER_S if is_alone else 0.0
        try:
            self._connection.send(*self._answer(message))
        except (PeerLostError, ProtocolError):
            raise
        except HeadwaterError as error:
            self._connection.send(Failed(type(error).__name__, str(error)))
        return True

    def _sink(self, message: AnyMessage, size: int) -> memoryview:
        if isinstance(message, PullRows):
            return self.place(message, size, 8 * message.count, room=message.room)
        return self.place(message, size, 0)

    def _answer(self, request: AnyMessage) -> Answer:
        payload = self.take_payload()
        match request:
            case PullRows():
                copy = self._replica._by_number(request.table)
                return self.pull(request, payload, copy.dim, copy.pull_into)
            case Declare():
                served = self._replica._find(request.name)
                return Answer(Declared(served.number, served.spec))
            case Room():
                return self.make_room(request, can_share=self._connection.can_share)
            case StatsGet():
                return Answer(self._replica.stats())
        raise ProtocolError(
            f"Expected a request that a replica answers, got {type(request).__name__}: rows are pushed to the job."
        )

    def close(self) -> None:
        """The connection has ended."""
        self.give_up_rooms()


#: Prometheus's name → its type, what it says, and the field of ServedTable.
_METRICS = {
    "rows": ("gauge", "Rows.", "rows"),
    "bytes": ("gauge", "Memory of the rows, index and growth included.", "bytes"),
    "step": ("gauge", "The table's step number up to which all is here.", "step"),
    "stale_seconds": ("gauge", "All that the job had so long ago is here.", "stale_s"),
    "updates_total": ("counter", "Rows written.", "updates"),
    "deletes_total": ("counter", "Rows dropped.", "deletes"),
    "restarts_total": ("counter", "Times that everything came anew.", "restarts"),
    "lookups_total": ("counter", "Lookups.", "lookups"),
    "ids_total": ("counter", "Ids looked up.", "ids"),
    "missing_total": ("counter", "Of those, without a row.", "missing"),
}


def metrics_of(stats: ReplicaStats) -> str:
    """Return a replica's statistics in Prometheus's text format, version 0.0.4."""
    lines = []

    def add(name: str, kind: str, says: str, samples: Sequence[tuple[str, float]]) -> None:
        lines.extend([f"# HELP headwater_replica_{name} {says}", f"# TYPE headwater_replica_{name} {kind}"])
        lines.extend(f"headwater_replica_{name}{labels} {value:.12g}" for labels, value in samples)

    def labels(table: ServedTable, more: str = "") -> str:
        return f'{{table="{escape(table.name)}"{more}}}'

    add("up", "gauge", "1: it follows the job; 0: it serves what it has.", [("", float(not stats.trouble))])
    for name, (kind, says, field) in _METRICS.items():
        add(name, kind, says, [(labels(table), getattr(table, field)) for table in stats.tables])
    lags = [
        (labels(table, f',quantile="{share}"'), value)
        for table in stats.tables
        for share, value in (("0.5", table.lag_p50_s), ("0.99", table.lag_p99_s))
    ]
    add(
        "lag_seconds",
        "gauge",
        "From a row's update at its server until it was seen here, at most; of the latest rows.",
        lags,
    )
    return "\n".join(lines) + "\n"


def _shape(spec: TableSpec) -> tuple[object, ...]:
    """Return what rows of a copy depend on."""
    return spec.dim, spec.initial, spec.seed
