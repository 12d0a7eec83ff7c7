"""A worker's connection to a job: pull, push, wait."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import msgspec
import numpy as np

from headwater import _limits, _snapshot
from headwater._consistency import Consistency
from headwater._data import LeasedData, Portion, Sized, lease_data
from headwater._dense_link import DenseLink
from headwater._errors import (
    ClosedError,
    HeadwaterError,
    HostError,
    LayoutError,
    PeerLostError,
    SettingError,
    UnreachableError,
    UsageError,
    WaitTimeoutError,
    warn,
)
from headwater._files import Files, open_files
from headwater._layout import AVERAGED, Layout, TensorSpec
from headwater._lookup import Table, Tables
from headwater._messages import (
    AnyMessage,
    Declare,
    Declared,
    Done,
    Held,
    Hold,
    Initialised,
    Leased,
    LeaseTake,
    Pull,
    Pulled,
    Register,
    Registered,
    Report,
    Resume,
    Seal,
    SnapshotTake,
    SnapshotTaken,
    State,
    StateGet,
    StateSet,
    Stats,
    StatsGet,
)
from headwater._peers import Peers
from headwater._plan import pack_absent
from headwater._publishing import Publication, Publisher
from headwater._rows import AnyInitial, RowPolicy, TableSpec, WholeRows, spec_of
from headwater._snapshot import Manifest
from headwater._table_link import Link
from headwater._transport import new_identity
from headwater._versions import KEEP
from headwater.optim import SGD, AnyOptimizer, RowOptimizer

if TYPE_CHECKING:
    from headwater._sealed import File
    from headwater._snapshot import Planes

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


class Saved(NamedTuple):
    """A saved job that this one is to begin from."""

    files: Files
    folder: str
    manifest: Manifest


class Start(NamedTuple):
    """What a job begins with beside the parameters' values, where no saved job was loaded."""

    planes: Mapping[str, Mapping[str, np.ndarray]]  # optimizer slots, by name
    steps: tuple[int, ...]  # that each tensor has made
    state: Mapping[str, Any]  # entries of the job's dictionary


class Session:
    """One worker of a job, made by `connect`. It is used by one thread at a time, in the process that made it.

    Closing twice is fine; an open session is closed when the process ends. A process that dies without closing is noticed by
    the servers, and its unsealed push counts nowhere.
    """

    def __init__(self, peers: Peers) -> None:
        self._pid = os.getpid()
        self._dense: DenseLink | None = None
        self._tables: Tables | None = None
        self._leased: dict[str, LeasedData] = {}
        self._layout: Layout | None = None
        self._optimizer: AnyOptimizer | None = None
        self._saved: Saved | None = None
        self.accepted = 0  #: pushes in the commit that was last waited for
        self.moved: Callable[[], None] | None = (
            None  #: called when `side` has changed elsewhere than in a step; for adapters
        )
        self._sequence = -1
        self._is_pending = False  # a sealed push is not yet answered
        self._wants_pull = False
        self._seal = Seal(-1, 0.0, ())  # the last push
        self._commit = 0  # that held it
        self._is_void = False  # the step that is being computed counts nowhere
        self._is_holding = self._is_registering = False
        self.lost = (
            0  #: commits that this worker knew of and that were taken back, since a server had to go back to a snapshot
        )
        self._is_closed = False
        self._held_s = 0.0  # since when commits are held
        self.staleness = 0  #: commits by others between this worker's last pull and its last push
        self.state = JobState(self)
        self._peers = peers
        self._publisher: Publisher | None = None
        self.untrained: Callable[[], Mapping[str, tuple[np.ndarray, str]]] | None = (
            None  #: returns what a version holds besides what the job has, with dtypes; for adapters
        )
        try:
            welcome = self._peers.greet()
        except BaseException:
            self.close()
            raise
        self._history = welcome.history
        self.index = welcome.index  #: this worker's place among the workers, from 0
        self.workers = welcome.workers  #: how many the job was started for
        self.consistency = welcome.consistency
        _open_sessions.add(self)

    @property
    def clock(self) -> int:
        """Finished steps."""
        return self._peers.clock

    @property
    def servers(self) -> int:
        """How many servers the job has."""
        return len(self._peers.addresses)

    @property
    def registered(self) -> tuple[tuple[TensorSpec, ...], AnyOptimizer] | None:
        """The tensors and the optimizer that were registered here; what adapters use."""
        return None if self._layout is None or self._optimizer is None else (self._layout.specs, self._optimizer)

    # Registration.

    def register(
        self,
        arrays: Mapping[str, np.ndarray],
        optimizer: AnyOptimizer | None = None,
        *,
        averaged: Collection[str] = (),
    ) -> None:
        """Put named arrays under the job's care; the first worker's values are the initial ones, the others adopt them.

        arrays: float32, float64, float16 or bfloat16 (of ml_dtypes; views show its bits), any shape; they are copied. optimizer: what the
        servers do with gradients, as in `headwater.optim`; default SGD(lr=0.01). averaged: names of those that are not trained by
        gradients, such as running statistics: of them workers push values, and each commit makes them the weighted mean of the values
        that were pushed in it; one that a worker leaves out has no part in that. Raises LayoutError or SettingError where the job has
        others.
        """
        unknown = [name for name in averaged if name not in arrays]
        if unknown:
            raise LayoutError(
                f"Expected names of arrays to be averaged, got {unknown[0]!r}: arrays are {_few(arrays)}."
            )
        specs = [
            TensorSpec(name, array.shape, array.dtype.name, AVERAGED if name in averaged else 0)
            for name, array in arrays.items()
        ]
        values = {name: _bits(array) for name, array in arrays.items()}
        self.register_specs(specs, values, optimizer or SGD(lr=0.01))

    def register_specs(
        self,
        specs: Sequence[TensorSpec],
        values: Mapping[str, np.ndarray],
        optimizer: AnyOptimizer,
        *,
        start: Start | None = None,
    ) -> None:
        """Register tensors by their specs; what adapters use. values: arrays as `Layout.views` shapes them (bfloat16: uint16)."""
        self._require_open()
        if self._layout is not None:
            raise UsageError("Expected one registration per session, got another: give one optimizer all parameters.")
        if not specs and not self.has_tables:
            raise LayoutError(
                "Expected at least one tensor to register, got none: does any parameter require a gradient? A job of tables "
                "alone declares them first."
            )
        optimizer.check_dense()
        layout = Layout(specs)
        if self._is_pending:
            self.wait()
        self._is_registering = True
        try:
            self._surviving(partial(self._register, layout, values, optimizer, start))
        finally:
            self._is_registering = False

    def _register(
        self, layout: Layout, values: Mapping[str, np.ndarray], optimizer: AnyOptimizer, start: Start | None
    ) -> None:
        answer = self._ask_once(Register(layout.specs, optimizer), Registered)
        dense = DenseLink(self._peers, layout, self.consistency)
        if answer.initialise:
            answer = self._initialise(layout, dense, values, optimizer, start or Start({}, (), {}))
        dense.begin(answer.side)
        self._peers.clock, self._commit = answer.clock, answer.commit
        self._layout, self._optimizer, self._dense = layout, optimizer, dense
        self._scalars = [tuple(optimizer.scalars().values())] * layout.groups

    def _begin(self, answer: Registered) -> None:
        """Go on from where the job is."""
        assert self._dense is not None
        self._peers.clock, self._commit = answer.clock, answer.commit
        self._surviving(partial(self._dense.begin, answer.side))

    def _initialise(
        self,
        layout: Layout,
        dense: DenseLink,
        values: Mapping[str, np.ndarray],
        optimizer: AnyOptimizer,
        start: Start,
    ) -> Registered:
        """Put this worker's values, or the loaded ones, on every server."""
        if self._saved is None:
            for plane, arrays in {"parameters": values, **start.planes}.items():
                dense.put(plane, arrays)
            state = {key: msgspec.msgpack.encode(value) for key, value in start.state.items()}
            return self._ask_once(Initialised(0, start.steps, state), Registered)
        files, folder, manifest = self._saved
        manifest.check(layout, optimizer)
        whole = layout.part(0, 1)
        planes = {plane: whole.new_plane() for plane in ("master", *optimizer.slots)}
        _snapshot.read_dense(files, folder, manifest, whole, planes)
        for plane, lanes in planes.items():
            dense.put(plane, layout.master_views(lanes))
        self._put_tables(files, folder, manifest)
        return self._ask_once(Initialised(manifest.commit, manifest.steps, manifest.state), Registered)

    def _put_tables(self, files: Files, folder: str, manifest: Manifest) -> None:
        """Put the saved rows of the tables that are declared by now on every server."""
        with self._held() as held:
            tables = {spec.name: (number, spec) for number, spec in enumerate(held.tables)}
        missing = [saved.name for saved in manifest.tables if saved.name not in tables]
        if missing:
            warn(
                f"{folder} holds rows of table {', '.join(missing)}, which nobody has declared yet: they are left out."
            )
        for i, saved in enumerate(manifest.tables):
            if saved.name in tables:
                number, spec = tables[saved.name]
                saved.check(spec)
                table = self._table(number, spec)
                table.put(WholeRows.none(spec.width), saved.step)
                for rows in _snapshot.read_table(files, folder, manifest, i):
                    table.put(rows, saved.step)

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
        self._require_open()
        if self._is_pending:
            self.wait()
        return self._surviving(partial(self._declare, wanted))

    def _declare(self, wanted: Declare) -> Table:
        declared = self._ask_once(wanted, Declared)
        return self._open_tables().table(declared.table, declared.spec)

    def _open_tables(self) -> Tables:
        if self._tables is None:
            opened = [self._peers.open("table", i) for i in range(len(self._peers.addresses))]
            self._tables = Tables(self, [Link(self, connection, shares=shares) for connection, shares in opened])
        return self._tables

    def _table(self, number: int, spec: TableSpec) -> Table:
        """Return a handle on a table that need not be declared here."""
        return Table(self, self._open_tables().links, number, spec)

    @property
    def has_tables(self) -> bool:
        """Whether any table is declared here."""
        return self._tables is not None and self._tables.are_declared

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

        gradients: arrays of the registered shapes and dtypes, copied, of those that are averaged the values themselves; a name left out
        has none. None: all of what stands in `self.gradients`. weight: this push's share in the mean, such as its number of samples; 0
        only closes the clock. scalars: the learning rate and others that change by the step; those left out stay as they were last.
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
        if self._layout is None and self.has_tables:
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
        if self._is_void:
            self._sequence += 1  # what servers hold of this step belongs to no other
            for data in self._leased.values():
                data.roll_back()  # what was yielded for this step comes again
            self.pull_parameters()
            self._drop_step()  # the next one is computed from these, even if the job came back meanwhile
            return
        self._sequence += 1
        used = tuple([(name, data.used) for name, data in self._leased.items()])
        self._seal = Seal(self._sequence, weight, tuple(scalars), absent, used=used)
        self._is_pending, self._wants_pull = True, pull
        try:
            dense.send(self._seal, pull=pull)
        except PeerLostError as error:
            self._come_back(error)

    def wait(self) -> int:
        """Wait until the last push counts and this worker may go on; returns the commit that holds it.

        Raises NonFiniteError or DisagreementError where the push was refused: the clock is closed all the same, and the
        session goes on.
        """
        _, dense = self._require_registered()
        if not self._is_pending:
            return self.clock
        committed = None
        while committed is None:
            try:
                committed = dense.answer(pull=self._wants_pull)
            except PeerLostError as error:
                self._come_back(error)
                if not self._is_pending:  # it counts nowhere: the job went back
                    return self.clock
            except UsageError:
                self._is_pending = False
                raise
            except BaseException:
                self.close()  # what is still to come on the connections would be taken for something else
                raise
        self._is_pending = False
        self._peers.clock, self.staleness, self.accepted = committed.clock, committed.staleness, committed.accepted
        self._commit = committed.commit
        self._drop_step()
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
        self._surviving(dense.pull)
        if self.moved is not None and self.consistency.kind != "bsp":
            self.moved()

    def _copy_in(self, gradients: Mapping[str, np.ndarray]) -> None:
        layout, _ = self._require_registered()
        views, bits = self.gradients, {name: _bits(array) for name, array in gradients.items()}
        for name, array in bits.items():
            view = views.get(name)
            if view is None:
                raise LayoutError(
                    f"Expected a gradient for a registered name, got {name!r}: registered are {_few(views)}."
                )
            if array.shape != view.shape or array.dtype != view.dtype:
                expected, got = layout.specs[layout.index[name]].dtype, gradients[name].dtype
                raise LayoutError(
                    f"Expected a gradient of {expected} {view.shape}, got {got} {array.shape} — tensor {name!r}, "
                    f"push {self._sequence + 1}."
                )
        for name, array in bits.items():
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
            tuple(float(change.get(name, old)) for name, old in zip(names, row, strict=True))
            for change, row in zip(changes, self._scalars, strict=True)
        ]
        for row in rows:  # before they are kept: a later step would be refused for them too
            self._optimizer.check(dict(zip(names, row, strict=True)))
        self._scalars = rows
        return rows

    # The job.

    @overload
    def shard(self, dataset: Sized) -> Portion: ...

    @overload
    def shard(
        self,
        dataset: Any,
        *,
        epochs: int,
        name: str = "data",
        batch_size: int | None = None,
        shuffle: bool | None = None,
        seed: int = 0,
        piece: int | None = None,
    ) -> LeasedData: ...

    def shard(
        self,
        dataset: Any,
        *,
        epochs: int | None = None,
        name: str = "data",
        batch_size: int | None = None,
        shuffle: bool | None = None,
        seed: int = 0,
        piece: int | None = None,
    ) -> Portion | LeasedData:
        """Return this worker's part of a dataset; with `epochs`, an iterator over what is leased to it.

        Without epochs, of a dataset with `len()` and indexing: items index, index + workers, … Nothing is read to be discarded, and
        the part can be pickled into DataLoader workers. Who dies takes its part along.

        With epochs, pieces of the data are leased to whoever asks, and come back when a worker dies: each item is used exactly once
        in each epoch. An item is used when a push that was made after it was yielded counts, also one of weight 0 or one that was
        refused. dataset: with `len()` and indexing, of which items are yielded, or lists of them with `batch_size`, the last one
        as long as it comes; or a PyTorch DataLoader over such a dataset, whose batches are yielded, made by a DataLoader of the same
        options. Every worker gives the same data and settings. name: one for each of several datasets. shuffle: another
        order in each epoch, which follows from `seed`, the same with every loader; a DataLoader has its own setting. piece: how many
        items or batches are leased at once; default a 1/32 of a worker's share, at most 1024. Raises SettingError for data that can
        only be iterated, for samplers of one's own, and where the job has leased this name with other settings.
        """
        if epochs is None:
            return Portion(dataset, self.index, self.workers)
        if name in self._leased:
            raise UsageError(
                f"Expected a name for each leased dataset, got {name!r} twice: go on with the first, or say name=."
            )
        data = lease_data(
            dataset, self._lease, name=name, epochs=epochs, batch_size=batch_size, shuffle=shuffle, seed=seed,
            piece=piece, workers=self.workers,
        )  # fmt: skip
        self._leased[name] = data
        try:
            self._lease(data, wait=False)
        except SettingError:
            del self._leased[name]
            raise
        return data

    def _lease(self, data: LeasedData, *, wait: bool) -> bool:
        """Get data a piece; what was leased is told by how much it had, so that a lost answer is given again."""
        self._require_open()
        if self._is_pending:
            self.wait()
        try:
            # Coming back may take the data back, too: what it had is told anew each time.
            leased = self._surviving(lambda: self._ask_once(LeaseTake(data.spec, data.had, wait), Leased))
        except UsageError:
            raise
        except HeadwaterError:
            self.close()  # the answer is still to come and would be taken for another
            raise
        if leased.rejoined is not None:
            self._begin(leased.rejoined)
            if self.moved is not None:
                self.moved()
        if leased.piece is not None:
            data.add(leased.piece)
        return leased.piece is not None

    def report(self, **figures: float) -> None:
        """Show figures, such as loss=2.3, in the job's display and statistics. Costs no round trip."""
        self._require_open()
        self._peers.control.hold(Report({name: float(value) for name, value in figures.items()}))
        if not self._is_pending:
            self._peers.control.flush()

    def stats(self) -> Stats:
        """Return the job at a glance: commits, bytes, and each worker's clock, staleness and figures."""
        return self._ask(StatsGet(), Stats)

    def take_snapshot(self) -> str:
        """Let the servers of a durable job write a snapshot now; returns where it lies, from their point of view.

        Training goes on meanwhile. Raises SettingError where the job has no store, StorageError when it cannot be written.
        """
        return self._ask(SnapshotTake(), SnapshotTaken).path

    def observer(self) -> Session:
        """Return a session on the same job that only reads; another thread may use it, and closes it."""
        hello = msgspec.structs.replace(
            self._peers.hello, role="observer", identity=new_identity(), index=-1, returns=False
        )
        session = Session(self._peers.beside(hello))
        _open_sessions.discard(session)
        return session

    def publish(
        self,
        tag: str | None = None,
        *,
        store: str | os.PathLike[str] | None = None,
        metrics: Mapping[str, float] | None = None,
        attach: Iterable[str | os.PathLike[str]] = (),
        keep: int = KEEP,
    ) -> Publication:
        """Publish the parameters as they are now as a version; returns once they are set aside, and training may go on.

        tag: what points at the version once it is there, such as "prod". store: a folder or an fsspec URL, default
        $HEADWATER_VERSIONS, or the folder `versions` here. metrics: numbers to be kept with it. attach: files, such as a config
        and a tokenizer, that are copied beside the weights. keep: see `Versions.publish`. The version holds what the job has, in the dtypes
        of the model, and what an adapter knows besides: frozen parameters and buffers. Of each table it holds all rows, as the tensors
        "tables/NAME/ids" and "tables/NAME/values", of the same commit under BSP; this process keeps a copy of them.

        Every worker may call it: the one with index 0 publishes, for the others there is nothing to do. What is written is read from the
        servers beside training; a version that this worker is still writing is waited for. `close` waits, too. What goes wrong later is
        raised by `Publication.result`, and said. Raises SettingError for a tag that cannot be, StorageError for a file that is not there.
        """
        self._require_open()
        if self.index > 0:
            publication = Publication()
            publication.end(None)
            return publication
        if self._is_pending:
            self.wait()
        if self._tables is not None:
            self._tables.settle()
        path = os.fspath(store or os.environ.get("HEADWATER_VERSIONS") or "versions")
        if self._publisher is None or self._publisher.store != path:
            if self._publisher is not None:
                self._publisher.close()
            self._publisher = Publisher(self.observer, path)
        extra = self.untrained() if self.untrained is not None else {}
        return self._publisher.publish(tag, dict(metrics or {}), [Path(p) for p in attach], keep, extra)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save parameters, optimizer state, tables, clock and job state as a folder that `load` reads.

        `model-0.safetensors` holds the parameters under their names. No commit happens meanwhile; but rows of a table that is ASP are each
        as they were when they were read. Written aside and renamed when whole: a failure leaves what was there before.
        """
        self._surviving(lambda: self._save(path))

    def _save(self, path: str | os.PathLike[str]) -> None:
        files, target = open_files(os.fspath(path))
        with _snapshot.replacing(files, target) as folder:
            written: list[File] = []
            tables = []
            with self._held() as held:
                planes = self._read(held)
                state = self._ask(StateGet(), State).items
                for number, spec in enumerate(held.tables):
                    writer = _snapshot.TableWriter(files, folder, 0, number, spec)
                    step = 0
                    for page in self._table(number, spec).pages():
                        writer.rows(*page.rows)
                        step = max(step, page.step)
                        self._keep_holding(held)
                    tables.append((spec, step))
                    written += writer.close()
            written += _snapshot.write_dense(files, folder, 0, Layout(held.tensors).part(0, 1), planes)
            _snapshot.publish(
                files,
                folder,
                Manifest.of(
                    commit=held.commit, servers=1, consistency=self.consistency, optimizer=held.optimizer,
                    tensors=held.tensors, steps=held.steps, tables=tables, state=state, files=written,
                ),
            )  # fmt: skip

    def load(self, path: str | os.PathLike[str]) -> None:
        """Let the job begin from what `save` wrote. Call it in every worker before the parameters are registered.

        The rows of a saved table are written when the parameters are registered, so declare the tables before; a job of tables alone begins
        with their first use, when all of them must be declared. A job that has begun already stays as it is.
        Raises StorageError when the folder is missing or torn; what is of another model, or has another hash than it should, is found and
        raised when the parameters are registered.
        """
        if self._layout is not None:
            raise UsageError("Expected load() before parameters are registered: call it before the optimizer is made.")
        files, target = open_files(os.fspath(path))
        folder = _snapshot.locate(files, target)
        self._saved = Saved(files, folder, _snapshot.open_manifest(files, folder))

    def begin_tables(self) -> None:
        """Begin a job of tables alone that was loaded; what tables do before they are used."""
        if (
            self._saved is not None
            and self._layout is None
            and not self._is_registering
            and not self._saved.manifest.tensors
        ):
            self.register({})

    def read_optimizer(self) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, int]]:
        """Return the servers' master copy and optimizer slots, by plane and name, and each tensor's steps."""
        held, planes = self._surviving(self._read_held)
        layout = Layout(held.tensors)
        names = [spec.name for spec in held.tensors]
        return {plane: layout.master_views(lanes) for plane, lanes in planes.items()}, dict(
            zip(names, held.steps, strict=True)
        )

    def _read_held(self) -> tuple[Held, Planes]:
        with self._held() as held:
            return held, self._read(held)

    def write_optimizer(self, planes: Mapping[str, Mapping[str, np.ndarray]], steps: Mapping[str, int]) -> None:
        """Replace what `read_optimizer` returns, then pull."""
        layout, _ = self._require_registered()
        self._surviving(lambda: self._write(planes, tuple(steps.get(spec.name, 0) for spec in layout.specs)))
        self.pull_parameters()

    def _write(self, planes: Mapping[str, Mapping[str, np.ndarray]], steps: tuple[int, ...]) -> None:
        with self._held(writes=True):
            self._put_planes(planes)
            self._ask(Initialised(0, steps), Registered)

    def _read(self, held: Held) -> Planes:
        """Collect every plane from every server while commits are held, flat, by lane."""
        if not held.tensors and not held.tables:
            raise UsageError("Expected a job with registered parameters, got one that has none yet.")
        layout = Layout(held.tensors)
        planes: dict[str, list[np.ndarray]] = {}
        count = len(self._peers.addresses)
        for plane in ("master", *held.optimizer.slots) if held.optimizer is not None else ():
            planes[plane] = whole = layout.part(0, 1).new_plane()
            for i in range(count):
                part = layout.part(i, count)
                connection = self._peers.reader(i)
                raw = np.empty(part.master_bytes, np.uint8)
                connection.send(Pull(plane))
                self._peers.receive(connection, Pulled, memoryview(raw))
                part.spread(raw, whole)
        return planes

    def _put_planes(self, planes: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        _, dense = self._require_registered()
        for plane, arrays in planes.items():
            dense.put(plane, arrays)

    @contextmanager
    def _held(self, *, writes: bool = False) -> Iterator[Held]:
        """Keep the job's commits waiting. writes: planes are going to be put, too."""
        held = self._ask(Hold(writes), Held)
        if self._is_holding:  # already, and what is around this goes on holding
            yield held
            return
        self._held_s = time.monotonic()
        self._is_holding = True
        try:
            yield held
        finally:
            self._is_holding = False
            if not self._is_closed:
                self._ask(Resume(), Done)

    def _keep_holding(self, held: Held) -> None:
        """Hold on for as long as it takes. Raises WaitTimeoutError when commits have gone on all the same."""
        if time.monotonic() - self._held_s > _limits.HOLD_S / 4:
            self._held_s = time.monotonic()
            if self._ask(Hold(), Held).commit != held.commit:
                raise WaitTimeoutError(
                    f"Expected to read a state within {_limits.HOLD_S} s, got one that changes: save again."
                )

    def close(self) -> None:
        """Leave the job: nobody waits for this worker any more. A push that was sealed still counts."""
        if self._is_closed:
            return
        if self._publisher is not None and self._pid == os.getpid():
            self._publisher.close()
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
        return self._surviving(lambda: self._ask_once(message, answer))

    def _ask_once(self, message: AnyMessage, answer: type[_M]) -> _M:
        self._peers.control.send(message)
        return self._peers.receive(self._peers.control, answer)[0]

    # When a connection ends.

    def _surviving(self, act: Callable[[], _M]) -> _M:
        """Do something that may be done twice; where a connection ends and the job is durable, come back and do it again."""
        while True:
            try:
                return act()
            except (PeerLostError, UnreachableError) as error:
                self._come_back(error)

    def _come_back(self, error: PeerLostError | UnreachableError) -> None:
        """A connection has ended: make all of them again, and say again what did not count. Raises `error` where the job is not durable."""
        if self._is_holding and self._peers.is_durable:
            raise error  # what was held is held no longer: whoever holds begins again
        if self._is_closed or not self._peers.is_durable:
            if self._layout is not None:
                self.close()
            raise error
        deadline = time.monotonic() + self._peers.timeout_s
        while True:
            try:
                self._return()
                return
            except (PeerLostError, UnreachableError, WaitTimeoutError) as again:
                if time.monotonic() > deadline or not _has_launcher():
                    self.close()
                    raise again from error
                time.sleep(_limits.AGAIN_S)
            except BaseException:
                self.close()
                raise

    def _return(self) -> None:
        """Connect as the same worker, and go on where the job is."""
        peers = self._peers
        welcome = peers.reconnect(self.index)
        self.index = welcome.index
        # Where this worker was taken for dead, others have what it held, and may have used it; or the job has forgotten that it was.
        went_back = welcome.history != self._history
        counts = {name: welcome.leased.get(name, (0, 0)) for name in self._leased}
        taken = {name for name, data in self._leased.items() if not counts[name][0] <= data.had <= counts[name][1]}
        tables = self._tables
        if tables is not None:
            for table in tables:
                number = self._ask_once(table.declaration(), Declared).table
                if number != table.number:
                    raise HostError(
                        f"Expected table {table.spec.name!r} to be number {table.number}, as before, got {number}: the job had to "
                        "go back to before it was declared. Start this worker again."
                    )
            tables.attach_again()
        if self._layout is None or self._dense is None or self._optimizer is None:
            if tables is not None:
                tables.resume(stages=True)
            for name in taken:
                self._leased[name].roll_back(counts[name][0])
            self._history = welcome.history
            return
        dense = self._dense
        answer = self._ask_once(Register(self._layout.specs, self._optimizer), Registered)
        if answer.initialise and self._commit > 0:
            raise HostError(
                f"Expected the job to come back with what it had learnt, {self._commit} commits that this worker knows of, got it from "
                "before its tensors were registered: its newest snapshot cannot be read. See to the store, or start this worker again."
            )
        if answer.initialise:  # the servers died before anything was kept: these values are the initial ones again
            values = {name: array.copy() for name, array in self.parameters.items()}
            dense.attach_again(0)
            dense.put("parameters", values)
            answer = self._ask_once(Initialised(), Registered)
        dense.attach_again(answer.side)
        has_counted = self._is_pending and answer.answered == self._sequence
        is_current = has_counted or not (went_back or taken)
        if self.consistency.kind == "bsp" and not has_counted:  # a gradient of another clock is of no use
            is_current = is_current and answer.clock == self.clock
        if tables is not None:
            tables.resume(stages=is_current)
        self._history = welcome.history
        for name in taken if is_current else self._leased:
            self._leased[name].roll_back(counts[name][0])
        if is_current:
            if self._is_pending:
                dense.send(self._seal, pull=self._wants_pull)
            return
        self._tell_lost(answer, went_back=went_back)
        peers.clock, self._commit = answer.clock, answer.commit
        self._is_void = not self._is_pending  # what is being computed is from a state that is no more
        self._is_pending = False

    def _tell_lost(self, answer: Registered, *, went_back: bool) -> None:
        lost = max(self._commit - answer.commit, 0)
        self.lost += lost
        if went_back:
            warn(
                f"a server was started again: the job is at commit {answer.commit}, of what this worker knew {lost} commits are lost"
            )
        else:
            warn(
                f"this worker was taken for dead: its push of clock {self.clock} counts nowhere; it goes on at clock {answer.clock}"
            )

    def _drop_step(self) -> None:
        """The step has counted, or counts nowhere."""
        self._is_void = False
        if self._tables is not None:
            self._tables.drop_step()

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


def _has_launcher() -> bool:
    """Whether there is anybody to start a server of this job again: `headwater run` lives, or it was never there."""
    launcher = environment_number("HEADWATER_LAUNCHER", 0)
    try:
        return not launcher or Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def environment_number(name: str, default: int) -> int:
    """Return a number that the environment has by this name, of 0 or more, or the default."""
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise SettingError(f"Expected {name} to be a whole number of 0 or more, got {text!r}.")
    return int(text)


def _bits(array: np.ndarray) -> np.ndarray:
    """Return an array as `Layout.views` shapes it."""
    return array.view("uint16") if array.dtype.name == "bfloat16" else array


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
