"""A worker's connection to a job: pull, push, wait."""

from __future__ import annotations

import atexit
import os
import socket
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from headwater._consistency import Consistency
from headwater._data import Portion, Sized
from headwater._dense_link import DenseLink
from headwater._errors import (
    ClosedError,
    HeadwaterError,
    LayoutError,
    SettingError,
    UsageError,
)
from headwater._layout import Layout, TensorSpec
from headwater._lookup import Table, Tables
from headwater._messages import (
    AnyMessage,
    Declare,
    Declared,
    Done,
    Held,
    Hello,
    Hold,
    Initialised,
    Pull,
    Pulled,
    Register,
    Registered,
    Report,
    Resume,
    Seal,
    State,
    StateGet,
    StateSet,
    Stats,
    StatsGet,
)
from headwater._peers import Peers, nearest, warn
from headwater._plan import pack_absent
from headwater._rows import AnyInitial, RowPolicy, spec_of
from headwater._table_link import Link
from headwater._transport import Address
from headwater.optim import SGD, AnyOptimizer, RowOptimizer

if TYPE_CHECKING:
    from headwater._checkpoint import Checkpoint

_M = TypeVar("_M")
_open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


class JobState(MutableMapping[str, Any]):
    """A small dictionary kept by the job: where a joiner finds the step, the vocabulary, the scheduler's state.

    Values are anything MessagePack can hold; each access asks the coordinator.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def _items(self) -> dict[str, bytes]:
        return self._session._ask(StateGet(), State).items

    def __getitem__(self, key: str) -> Any:
        return msgspec.msgpack.decode(self._items()[key])

    def __setitem__(self, key: str, value: Any) -> None:
        self._session._ask(StateSet(key, msgspec.msgpack.encode(value)), Done)

    def __delitem__(self, key: str) -> None:
        if key not in self._items():
            raise KeyError(key)
        self._session._ask(StateSet(key, None), Done)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items())

    def __len__(self) -> int:
        return len(self._items())


class Session:
    """One worker of a job, made by `connect`. It is used by one thread at a time, in the process that made it.

    Closing twice is fine; an open session is closed when the process ends. A process that dies without closing is noticed by
    the servers, and its unsealed push counts nowhere.
    """

    def __init__(self, address: Address | None, *, hello: Hello, transport: str, timeout_s: float) -> None:
        self._pid = os.getpid()
        self._dense: DenseLink | None = None
        self._tables: Tables | None = None
        self._layout: Layout | None = None
        self._optimizer: AnyOptimizer | None = None
        self._saved: Checkpoint | None = None
        self.accepted = 0  #: pushes in the commit that was last waited for
        self._sequence = -1
        self._is_pending = False  # a sealed push is not yet answered
        self._wants_pull = False
        self._is_closed = False
        self.staleness = 0  #: commits by others between this worker's last pull and its last push
        self.state = JobState(self)
        self._peers = Peers(address, hello, transport=transport, timeout_s=timeout_s)
        try:
            welcome = self._peers.greet()
        except BaseException:
            self.close()
            raise
        self.index = welcome.index  #: this worker's place among the workers, from 0
        self.workers = welcome.workers  #: how many the job was started for
        self.consistency = welcome.consistency
        _open_sessions.add(self)

    @property
    def clock(self) -> int:
        """Finished steps."""
        return self._peers.clock

    # Registration.

    def register(self, arrays: Mapping[str, np.ndarray], optimizer: AnyOptimizer | None = None) -> None:
        """Put named arrays under the job's care; the first worker's values are the initial ones, the others adopt them.

        arrays: float32, float64 or float16, any shape; they are copied. optimizer: what the servers do with gradients, as in
        `headwater.optim`; default SGD(lr=0.01). Raises LayoutError or SettingError where the job has others.
        """
        specs = [TensorSpec(name, array.shape, array.dtype.name) for name, array in arrays.items()]
        values = {name: a.view("uint16") if a.dtype.name == "bfloat16" else a for name, a in arrays.items()}
        self.register_specs(specs, values, optimizer or SGD(lr=0.01))

    def register_specs(
        self, specs: Sequence[TensorSpec], values: Mapping[str, np.ndarray], optimizer: AnyOptimizer
    ) -> None:
        """Register tensors by their specs; what adapters use. values: arrays as `Layout.views` shapes them (bfloat16: uint16)."""
        self._require_open()
        if self._layout is not None:
            raise UsageError("Expected one registration per session, got another: give one optimizer all parameters.")
        if not specs and self._tables is None:
            raise LayoutError(
                "Expected at least one tensor to register, got none: does any parameter require a gradient? A job of tables "
                "alone declares them first."
            )
        optimizer.check_dense()
        layout = Layout(specs)
        answer = self._ask(Register(layout.specs, optimizer), Registered)
        self._layout, self._optimizer = layout, optimizer
        self._scalars = [tuple(optimizer.scalars().values())] * layout.groups
        self._dense = DenseLink(self._peers, layout, self.consistency)
        if answer.initialise:
            answer = self._initialise(values)
        self._peers.clock = answer.clock
        self._dense.begin(answer.side)

    def _initialise(self, values: Mapping[str, np.ndarray]) -> Registered:
        """Put this worker's values, or the loaded ones, on every server."""
        layout, dense = self._require_registered()
        saved = self._saved
        if saved is None:
            dense.put("parameters", values)
            return self._ask(Initialised(), Registered)
        assert self._optimizer is not None
        saved.check(layout, self._optimizer)
        self._put_planes(saved.planes)
        return self._ask(Initialised(saved.commit, saved.steps, saved.state), Registered)

    # Tables.

    def table(
        self,
        name: str,
        dim: int | None = None,
        *,
        optimizer: RowOptimizer | None = None,
        initial: AnyInitial | None = None,
        seed: int | None = None,
        policy: RowPolicy | None = None,
        consistency: Consistency | None = None,
    ) -> Table:
        """Declare an embedding table, or adopt one that another worker has declared, and return this worker's handle on it.

        The first worker's settings are the job's; what is left out is as the job has it. dim: float32 elements of a row.
        optimizer: SGD (the default, lr=0.01), Adagrad, RowwiseAdagrad, Adam or FTRL of `headwater.optim`, a step for each row that a
        push touches. initial: what new rows hold, `Uniform(limit)` (the default, 0.01), `Normal` or `Constant`; with `seed`, default 0.
        policy: which ids get rows and which rows go, see `RowPolicy`. consistency: default the job's; `asp()` lets the table's
        pushes count at once beside a BSP or SSP job.
        Raises SettingError, naming the difference, where the table has other settings.
        """
        wanted = Declare(name, dim, optimizer, initial, seed, policy, consistency)
        spec_of(wanted, self.consistency, dim=1 if dim is None else dim)  # which checks it before it travels
        declared = self._ask(wanted, Declared)
        if self._tables is None:
            opened = [self._peers.open("table", i) for i in range(len(self._peers.addresses))]
            self._tables = Tables(self, [Link(self, connection, shares=shares) for connection, shares in opened])
        return self._tables.table(declared)

    @property
    def has_tables(self) -> bool:
        """Whether any table is declared here."""
        return self._tables is not None

    @property
    def has_staged(self) -> bool:
        """Whether pushes to tables wait for this worker's next step."""
        return self._tables is not None and self._tables.has_pushed

    # Push, wait, pull.

    @property
    def gradients(self) -> dict[str, np.ndarray]:
        """Writable views of the push buffer, by name: what is written here is pushed without a copy. Yours until `push`."""
        return self._require_registered()[1].gradients

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """Views of the parameters as last pulled. Where they are read in place they are other arrays after each pull."""
        dense = self._require_registered()[1]
        return dense.sides[dense.side]

    @property
    def sides(self) -> list[dict[str, np.ndarray]]:
        """All sets of parameter views there are; what adapters use."""
        return self._require_registered()[1].sides

    @property
    def side(self) -> int:
        """Which of them `parameters` is now."""
        return self._require_registered()[1].side

    def push(
        self,
        gradients: Mapping[str, np.ndarray] | None = None,
        *,
        weight: float = 1.0,
        scalars: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
    ) -> None:
        """Push gradients by name and let them count; returns at once, `wait` tells when they do.

        gradients: arrays of the registered shapes and dtypes, copied; a name left out has no gradient. None: all of what stands
        in `self.gradients`. weight: this push's share in the mean, such as its number of samples; 0 only closes the clock.
        scalars: the learning rate and others that change by the step; those left out stay as they were last.
        """
        self._push(gradients, weight, scalars, pull=False)

    def _push(
        self,
        gradients: Mapping[str, np.ndarray] | None,
        weight: float,
        scalars: Mapping[str, float] | Sequence[Mapping[str, float]] | None,
        *,
        pull: bool,
    ) -> None:
        if self._layout is None and self._tables is not None:
            self.register({})
        layout, _ = self._require_registered()
        absent = b""
        if gradients is not None:
            self._copy_in(gradients)
            absent = pack_absent([spec.name not in gradients for spec in layout.specs])
        self.push_sealed(weight=weight, scalars=self._rows(scalars), absent=absent, pull=pull)

    def push_sealed(
        self, *, weight: float, scalars: Sequence[tuple[float, ...]], absent: bytes = b"", pull: bool = False
    ) -> None:
        """Push what stands in the push buffer; what adapters use. pull: `wait`, to be called next, also brings the new parameters."""
        _, dense = self._require_registered()
        if self._is_pending:
            self.wait()
        if self._tables is not None:
            self._tables.settle()  # what is staged for this step lies on every server before its seal
        self._sequence += 1
        dense.send(Seal(self._sequence, weight, tuple(scalars), absent), pull=pull)
        self._is_pending, self._wants_pull = True, pull

    def wait(self) -> int:
        """Wait until the last push counts and this worker may go on; returns the commit that holds it.

        Raises NonFiniteError or DisagreementError where the push was refused: the clock is closed all the same, and the
        session goes on.
        """
        _, dense = self._require_registered()
        if not self._is_pending:
            return self.clock
        self._is_pending = False
        try:
            committed = dense.answer(pull=self._wants_pull)
        except UsageError:
            raise
        except HeadwaterError:
            self.close()  # what is still to come on the connections would be taken for something else
            raise
        self._peers.clock, self.staleness, self.accepted = committed.clock, committed.staleness, committed.accepted
        if committed.refused is not None:
            raise committed.refused.exception()
        return committed.commit

    def step(
        self,
        gradients: Mapping[str, np.ndarray] | None = None,
        *,
        weight: float = 1.0,
        scalars: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
    ) -> int:
        """Push, wait, and pull into `self.parameters`; returns the commit. Arguments and errors as of `push` and `wait`."""
        self._push(gradients, weight, scalars, pull=True)
        return self.wait()

    def pull(self, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Return copies of the parameters as they are now on the servers; names: only these."""
        self.pull_parameters()
        found = self.parameters
        unknown = [name for name in names or () if name not in found]
        if unknown:
            raise LayoutError(f"Expected names that are registered, got {unknown[0]!r}.")
        return {name: found[name].copy() for name in (found if names is None else names)}

    def pull_parameters(self) -> None:
        """Bring `self.parameters` up to date."""
        _, dense = self._require_registered()
        if self._is_pending:
            self.wait()
        dense.pull()

    def _copy_in(self, gradients: Mapping[str, np.ndarray]) -> None:
        views = self.gradients
        for name, array in gradients.items():
            view = views.get(name)
            if view is None:
                raise LayoutError(
                    f"Expected a gradient for a registered name, got {name!r}: registered are {_few(views)}."
                )
            if array.shape != view.shape or array.dtype != view.dtype:
                raise LayoutError(
                    f"Expected a gradient of {view.dtype} {view.shape}, got {array.dtype} {array.shape} — tensor {name!r}, "
                    f"push {self._sequence + 1}."
                )
        for name, array in gradients.items():
            views[name][...] = array

    def _rows(self, scalars: Mapping[str, float] | Sequence[Mapping[str, float]] | None) -> list[tuple[float, ...]]:
        if scalars is None:
            return self._scalars
        assert self._optimizer is not None
        names = self._optimizer.scalar_names
        changes = [scalars] * len(self._scalars) if isinstance(scalars, Mapping) else list(scalars)
        if len(changes) != len(self._scalars) or any(name not in names for change in changes for name in change):
            raise SettingError(f"Expected {', '.join(names)} for {len(self._scalars)} parameter groups, got {scalars}.")
        rows = [
            tuple(change.get(name, old) for name, old in zip(names, row, strict=True))
            for change, row in zip(changes, self._scalars, strict=True)
        ]
        for row in rows:  # before they are kept: a later step would be refused for them too
            self._optimizer.check(dict(zip(names, row, strict=True)))
        self._scalars = rows
        return rows

    # The job.

    def shard(self, dataset: Sized) -> Portion:
        """Return this worker's part of a dataset with `len()` and indexing: items index, index + workers, …

        Nothing is read to be discarded, and the part can be pickled into DataLoader workers.
        """
        return Portion(dataset, self.index, self.workers)

    def report(self, **figures: float) -> None:
        """Show figures, such as loss=2.3, in the job's display and statistics. Costs no round trip."""
        self._require_open()
        self._peers.control.hold(Report({name: float(value) for name, value in figures.items()}))
        if not self._is_pending:
            self._peers.control.flush()

    def stats(self) -> Stats:
        """Return the job at a glance: commits, bytes, and each worker's clock, staleness and figures."""
        return self._ask(StatsGet(), Stats)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save parameters, optimizer state, clock and job state as a directory that `load` reads. Tables are saved by `Table.export`; a
        warning names those that the job has.

        `model.safetensors` holds the parameters under their names. Written aside and renamed when whole: a failure leaves what was
        there before.
        """
        with self._held() as held:
            checkpoint = self._read(held)
        if held.tables:
            warn(f"{path} will not hold the rows of table {', '.join(held.tables)}: Table.export() saves them.")
        checkpoint.write(Path(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Let the job begin from what `save` wrote. Call it in every worker before the parameters are registered.

        A job that has begun already stays as it is. Raises StorageError when the directory is missing, torn or of another model.
        """
        if self._layout is not None:
            raise UsageError("Expected load() before parameters are registered: call it before the optimizer is made.")
        from headwater._checkpoint import Checkpoint

        self._saved = Checkpoint.open(Path(path))

    def read_optimizer(self) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, int]]:
        """Return the servers' master copy and optimizer slots, by plane and name, and each tensor's steps."""
        with self._held() as held:
            checkpoint = self._read(held)
        names = [spec.name for spec in held.tensors]
        return checkpoint.planes, dict(zip(names, checkpoint.steps, strict=True))

    def write_optimizer(self, planes: Mapping[str, Mapping[str, np.ndarray]], steps: Mapping[str, int]) -> None:
        """Replace what `read_optimizer` returns, then pull."""
        layout, _ = self._require_registered()
        with self._held():
            self._put_planes(planes)
            self._ask(Initialised(0, tuple(steps.get(spec.name, 0) for spec in layout.specs)), Registered)
        self.pull_parameters()

    def _read(self, held: Held) -> Checkpoint:
        """Collect every plane from every server while commits are held."""
        if not held.tensors or held.optimizer is None:
            raise UsageError("Expected a job with registered parameters, got one that has none yet.")
        from headwater._checkpoint import Checkpoint

        layout = Layout(held.tensors)
        planes: dict[str, dict[str, np.ndarray]] = {}
        for plane in ("master", *held.optimizer.slots):
            planes[plane] = layout.empty_master()
            count = len(self._peers.addresses)
            for i in range(count):
                part = layout.part(i, count)
                raw = np.empty(part.master_bytes, np.uint8)
                connection = self._peers.control if i == 0 else self._peers.open("data", i)[0]
                connection.send(Pull(plane))
                self._peers.receive(connection, Pulled, memoryview(raw))
                part.scatter(raw, planes[plane])
        return Checkpoint(planes, held.steps, held.commit, dict(self._ask(StateGet(), State).items), held.optimizer)

    def _put_planes(self, planes: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        _, dense = self._require_registered()
        for plane, arrays in planes.items():
            dense.put(plane, arrays)

    @contextmanager
    def _held(self) -> Iterator[Held]:
        """Keep the job's commits waiting."""
        held = self._ask(Hold(), Held)
        try:
            yield held
        finally:
            if not self._is_closed:
                self._ask(Resume(), Done)

    def close(self) -> None:
        """Leave the job: nobody waits for this worker any more. A push that was sealed still counts."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._pid != os.getpid():
            return
        if self._tables is not None:
            with suppress(HeadwaterError, OSError):
                self._tables.settle()
        self._peers.close(leave=self._layout is not None and not self._is_pending)

    def abandon(self) -> None:
        """Drop this process's copies of the connections without a word; for forked children."""
        self._peers.abandon()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Session worker {self.index} of {self.workers} {self.consistency} clock={self.clock}>"

    # Asking.

    def _ask(self, message: AnyMessage, answer: type[_M]) -> _M:
        self._require_open()
        if self._is_pending:
            self.wait()
        self._peers.control.send(message)
        return self._peers.receive(self._peers.control, answer)[0]

    def _require_open(self) -> None:
        if self._pid != os.getpid():
            raise ClosedError(
                "Expected the session to be used in the process that made it, got a forked child: connect() there, or start "
                "DataLoader workers that only read data."
            )
        if self._is_closed:
            raise ClosedError("Expected an open session, got one that is closed.")

    def _require_registered(self) -> tuple[Layout, DenseLink]:
        self._require_open()
        if self._layout is None or self._dense is None:
            raise UsageError("Expected registered parameters, got none: call register(), or make an optimizer.")
        return self._layout, self._dense


def connect_session(
    address: str | None = None,
    *,
    consistency: Consistency | None = None,
    workers: int | None = None,
    transport: str | None = None,
    token: str | None = None,
    timeout_s: float = 600.0,
    role: str = "worker",
) -> Session:
    """Connect to a job, or start one inside this process, and return this worker's session.

    address: the job's first server, such as tcp://10.0.0.5:7077; default $HEADWATER_ADDRESS; with neither, a server is embedded
    in this process and the script runs alone. consistency: `bsp()` (default), `ssp(staleness)` or `asp()`; it is the job's, so
    leave it out where the server was told. workers: how many the job waits for at its start; default $HEADWATER_WORKERS.
    transport: "auto" takes shared memory where it can, "shm" insists on it, "tcp" does without; default
    $HEADWATER_TRANSPORT, or auto. token: default
    $HEADWATER_TOKEN. timeout_s: how long any wait may last; past it a WaitTimeoutError says for whom.

    Raises UnreachableError, AuthenticationError, SettingError.
    """
    transport = transport or os.environ.get("HEADWATER_TRANSPORT") or "auto"
    if transport not in ("auto", "shm", "tcp"):
        raise SettingError(f"Expected transport auto, shm or tcp, got {transport!r}.")
    text = address or os.environ.get("HEADWATER_ADDRESS") or None
    hello = Hello(
        token=token if token is not None else os.environ.get("HEADWATER_TOKEN", ""),
        role=role,
        identity=int.from_bytes(os.urandom(8), "little") >> 1,
        index=_environment_number("HEADWATER_WORKER", -1) if role == "worker" else -1,
        workers=(_environment_number("HEADWATER_WORKERS", 0) if workers is None else workers) if text else 0,
        consistency=consistency,
        label=f"{socket.gethostname()}:{os.getpid()}",
    )
    target = Address.parse(text) if text else None
    if target is not None and target.kind == "tcp" and target.is_local and transport != "tcp":
        target = nearest(target, hello, timeout_s)
    return Session(target, hello=hello, transport=transport, timeout_s=timeout_s)


def _environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise SettingError(f"Expected {name} to be a whole number of 0 or more, got {text!r}.")
    return int(text)


def _few(names: Mapping[str, Any]) -> str:
    listed = list(names)[:5]
    return ", ".join(map(repr, listed)) + (", …" if len(names) > len(listed) else "")


def _close_all() -> None:
    for session in list(_open_sessions):
        session.close()


def _close_in_child() -> None:
    """A forked child must not keep the parent's connections open: its death would go unnoticed."""
    for session in list(_open_sessions):
        session.abandon()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_close_in_child)
