"""One server's part of the dense parameters: a deterministic state machine fed by commits.

    state[n+1] = apply(state[n], commit[n])

The state is *planes* over the server's part of the arena: the parameters as they travel, the master copy (the same bytes
for float32 and float64), the optimizer's slots. It lies on two *sides*: a commit reads one side and writes the other, and
`Flip` makes that the state. Until then nothing has happened, so a commit with a bad gradient leaves no trace.

Who may touch what: a worker's inbox is the worker's from Attach to its push, and the server's from the push to the commit.
In shared memory workers read parameters where they lie. Under BSP the other side is written only once all of them have pushed again.
Else, with one server, there are as many parameter buffers as to leave one that nobody reads; with several, pulls copy.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from headwater import _kernels, _limits
from headwater._consistency import Consistency
from headwater._errors import InternalError, LayoutError, PeerLostError, ProtocolError
from headwater._layout import BLOCK, PAGE_BYTES, Layout, Part, Slice, runs, tensor_at
from headwater._memory import SharedBuffer, zeroed
from headwater._messages import (
    AnyMessage,
    Assign,
    CommitSpec,
    Detach,
    Done,
    Flip,
    Flipped,
    LetWrite,
    Normed,
    Norms,
    Prepare,
    Prepared,
    Release,
    SetAside,
)
from headwater._table import Tables
from headwater.optim import AnyOptimizer

#: (runs, scalars, contributions, coefficients) as `_kernels.apply` takes them.
_KernelCommit = tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray]


class Keeper(Protocol):
    """Answers what concerns the store; None: the shard has the answer. Says whether it wants a commit's sums, and where."""

    @property
    def wants_sums(self) -> bool: ...
    def handle(self, request: AnyMessage) -> AnyMessage | None: ...
    def room(self, size: int) -> np.ndarray | None: ...


class _Worker:
    """What one worker shares with this server."""

    def __init__(
        self, part: Part, inbox: np.ndarray, shared: Sequence[SharedBuffer] = (), outbox: np.ndarray | None = None
    ) -> None:
        self.inbox = inbox  # uint8: its gradients, in the wire dtypes
        self.shared = shared
        self.outbox = outbox  # uint8: where its pulls are copied to; None: they travel, or are read in place
        self.side: int | None = None  # which it reads
        self.contributions = [inbox[s.byte : s.byte + s.wire_bytes] for s in part.slices]
        self.sequence = -1  # of the push that lies in the inbox


_Planes = dict[str, np.ndarray]  # of one slice, by name


class Foreseen:
    """A commit that is applied while the last of its pushes still arrives; made by `Shard.foresee`.

    Like any prepared commit it lies beside the state. It counts if it is the commit that is then made; else nothing has happened.
    """

    def __init__(self, spec: CommitSpec) -> None:
        self.spec = spec
        self.done = 0  # bytes of the part that are applied
        self.has_counted = False


class Pinned(NamedTuple):
    """A state that is set aside: no commit writes over it until `unpin`."""

    commit: int
    side: int
    half: int
    planes: dict[str, list[np.ndarray]]  # "master" and the slots, an array of the master dtype per slice


class Shard:
    """The dense state of one server. It can be shared between threads; `lock` guards the sides."""

    def __init__(self, *, threads: int = 1, level: str = "auto") -> None:
        self.threads, self.level = threads, level
        self.lock = threading.Lock()
        self.keeper: Keeper | None = None
        self._begin()

    def forget(self) -> None:
        """Be as at the beginning, when nothing was assigned."""
        with self.lock:
            self.tables.close()
            self._begin()

    def _begin(self) -> None:
        self.tables = Tables(threads=self.threads, level=self.level)
        self.commit = 0
        self.side = 0  # the parameter buffer that is the state; a commit is made in another
        self._writer: int | None = None  # the identity of who may replace it
        self._half = 0  # likewise of the two copies of everything else
        self._target = self._target_half = 1  # where what is prepared lies
        self.layout: Layout | None = None
        self._workers: dict[int, _Worker] = {}
        self._prepared = False
        self._foreseen: Foreseen | None = None  # any request that changes what it rests on drops it
        self._standing: Foreseen | None = None  # what is prepared was foreseen
        self._runs: dict[tuple[int, bytes], np.ndarray] = {}  # by slice and cells
        self._pinned: Pinned | None = None
        self._aside: int | None = None  # a parameter buffer that a publisher reads
        self._specs: tuple[CommitSpec, ...] = ()  # what is prepared
        self._sums = np.empty(0, np.uint8)  # room for summed gradients
        self._aggregated: list[np.ndarray] | None = None  # those of what is prepared, if they were wanted

    # What the coordinator says.

    def handle(self, request: AnyMessage) -> AnyMessage:
        """Carry out a request of the coordinator and return the answer."""
        if self.keeper is not None:
            answer = self.keeper.handle(request)
            if answer is not None:
                return answer
        with self.lock:
            answer = self.tables.handle(request)
            if answer is not None:
                return answer
            if not isinstance(request, (Prepare, Norms, SetAside, Release)):
                self._foreseen = None
            match request:
                case Prepare():
                    return self._prepare(request)
                case Flip():
                    return self._flip(request)
                case Norms():
                    return self._norms(request)
                case Assign():
                    return self._assign(request)
                case SetAside():
                    self._aside = self.side
                    return Done()
                case Release():
                    self._aside = None
                    return Done()
                case Detach():
                    self._workers.pop(request.identity, None)
                    return Done()
                case LetWrite():
                    self._writer = request.identity
                    return Done()
        raise ProtocolError(f"Expected a coordinator's request, got {type(request).__name__}.")

    def _assign(self, request: Assign) -> Done:
        self.layout = Layout(request.tensors)
        self.part = self.layout.part(request.index, request.count)
        self.optimizer: AnyOptimizer = request.optimizer
        self.consistency: Consistency = request.consistency
        self._wires = [SharedBuffer(self.part.wire_bytes, "parameters") for _ in range(2)]
        self._hidden = [[self._new_planes(s) for s in self.part.slices] for _ in range(2)]
        self._scalars = len(request.optimizer.row(request.optimizer.scalars(), 1))
        self._reads_in_place = request.count == 1 or self.consistency.kind == "bsp"
        self._runs.clear()
        return Done()

    def _prepare(self, request: Prepare) -> Prepared:
        foreseen, self._foreseen = self._foreseen, None
        self._prepared, self._standing, self._aggregated = False, None, None
        self._specs = request.commits
        self._target, self._target_half = self._free_side(), self._free_half()
        for number, spec in enumerate(request.commits):
            missing = self._missing_push(spec)
            if missing is not None:
                return Prepared((number, missing, -1, -1))
        is_whole = foreseen is not None and foreseen.done == self.part.wire_bytes
        if foreseen is not None and is_whole and request.commits == (foreseen.spec,):
            self._prepared, self._standing = True, foreseen
            return Prepared()
        sums = []
        aggregated = (
            self._room_for_sums(request.commits) if self.keeper is not None and self.keeper.wants_sums else None
        )
        count = len(self.part.slices)
        for i, s in enumerate(self.part.slices):
            commits = [self._kernel_commit(spec, i, s) for spec in request.commits]
            is_measured = request.norms and not s.lane.is_averaged
            if is_measured:
                sums.append(np.empty(_blocks_before(s, s.byte + s.wire_bytes)))
            bad = self._apply(
                i,
                commits,
                sums=sums[-1] if is_measured else None,
                aggregated=None if aggregated is None else aggregated[i::count],
            )
            if bad is not None:
                return Prepared(self._locate(bad, s))
        self._prepared, self._aggregated = True, aggregated
        return Prepared(sums=b"".join(array.tobytes() for array in sums))

    def _apply(
        self,
        i: int,
        commits: Sequence[_KernelCommit],
        blocks: tuple[int, int] | None = None,
        sums: np.ndarray | None = None,
        aggregated: Sequence[np.ndarray] | None = None,
    ) -> tuple[int, int, int] | None:
        """Apply commits to slice i, or to some of its blocks, beside the state; returns what `_kernels.apply` does."""
        s = self.part.slices[i]
        source = self._kernel_planes(i, s, self.side, self._half)
        target = self._kernel_planes(i, s, self._target, self._target_half)
        return _kernels.apply(
            *self._step(s), s.lane.dtype, source, target, commits,
            threads=self.threads, level=self.level, blocks=blocks, sums=sums, aggregated=aggregated,
        )  # fmt: skip

    def _step(self, s: Slice) -> tuple[str, int]:
        """Return the kernel's name and flags of the step that a slice's tensors make."""
        return ("mean", 0) if s.lane.is_averaged else (self.optimizer.kind, self.optimizer.flags)

    def _norms(self, request: Norms) -> Normed:
        if self._missing_push(request.commit) is not None:
            return Normed(b"")  # Prepare says so
        sums = []
        for i, s in enumerate(self.part.slices):
            if s.lane.is_averaged:
                continue
            table, _, contributions, coefficients = self._kernel_commit(request.commit, i, s)
            sums.append(
                _kernels.square_sums(
                    s.lane.dtype, table, contributions, coefficients, threads=self.threads, level=self.level
                )
            )
        return Normed(np.concatenate(sums).tobytes() if sums else b"")

    def _flip(self, request: Flip) -> Flipped:
        if request.swap:
            if not self._prepared:
                raise InternalError("Expected a prepared commit before a flip, got none.")
            self.side, self._half = self._target, self._target_half
            if self._standing is not None:
                self._standing.has_counted = True
            self._prepared = False
        self.commit, self._specs, self._aggregated, self._writer = request.commit, (), None, None
        return Flipped(self.side)

    def _free_side(self) -> int:
        """Return a parameter buffer that is not the state and that nobody reads; under BSP workers have pushed before it is theirs."""
        taken = {self.side} | {worker.side for worker in self._workers.values()}
        if self._pinned is not None:
            taken.add(self._pinned.side)
        if self._aside is not None:
            taken.add(self._aside)
        while all(i in taken for i in range(len(self._wires))):
            self._wires.append(SharedBuffer(self.part.wire_bytes, "parameters"))
        return next(i for i in range(len(self._wires)) if i not in taken)

    def _free_half(self) -> int:
        """Likewise for what stays on the server."""
        taken = {self._half} if self._pinned is None else {self._half, self._pinned.half}
        if len(self._hidden) == len(taken):
            self._hidden.append([self._new_planes(s) for s in self.part.slices])
        return next(i for i in range(len(self._hidden)) if i not in taken)

    # What is kept in the store.

    def master_planes(self) -> dict[str, list[np.ndarray]]:
        """Return the state's own memory: "master" and the slots, an array of the master dtype per slice."""
        with self.lock:
            planes = [self._planes(i, s) for i, s in enumerate(self.part.slices)]
            return {name: [p[name] for p in planes] for name in ("master", *self.optimizer.slots)}

    def loaded(self, commit: int) -> None:
        """The master planes were written from outside: let the parameters be as they say."""
        with self.lock:
            self.commit = commit
            self._convert_masters(self.side, self._half)

    def _convert_masters(self, side: int, half: int) -> None:
        for i, s in enumerate(self.part.slices):
            if s.lane.dtype != s.lane.master:
                _kernels.convert(self._wire(side, s), s.lane.dtype, self._hidden[half][i]["master"], s.lane.master)

    def pin(self) -> Pinned:
        """Set the state aside: commits go on beside it."""
        planes = self.master_planes() if self.layout is not None else {}
        with self.lock:
            self._pinned = Pinned(self.commit, self.side, self._half, planes)
            return self._pinned

    def unpin(self) -> None:
        """Let commits write over what was set aside. Said between two commits."""
        with self.lock:
            self._pinned = None

    def make_room(self) -> None:
        """Have memory, touched, for the commits that go on beside a state that is set aside: else the first of them waits for it."""
        if self.layout is None:
            return
        if len(self._hidden) < 3:
            planes = [self._new_planes(s) for s in self.part.slices]
            for array in (array for each in planes for array in each.values()):
                array.view(np.uint8)[::PAGE_BYTES] += 0
            with self.lock:
                self._hidden.append(planes)
        if len(self._wires) < 3:
            self._make_side()

    def make_side(self) -> None:
        """Likewise, for parameters alone that are set aside."""
        with self.lock:
            if self.layout is None:
                return
            readers = len(self._workers) if self._reads_in_place and self.consistency.kind != "bsp" else 0
            missing = 3 + readers + (self._pinned is not None) - len(self._wires)
        for _ in range(missing):
            self._make_side()

    def _make_side(self) -> None:
        wire = SharedBuffer(self.part.wire_bytes, "parameters")
        wire.array[::PAGE_BYTES] = 0
        with self.lock:
            self._wires.append(wire)

    def read_aside(self) -> memoryview:
        """Return this part of the parameters that are set aside, where they lie."""
        with self.lock:
            if self._aside is None:
                raise PeerLostError(
                    "Expected parameters that are set aside, got none: the job has gone back meanwhile."
                )
            return memoryview(self._wires[self._aside].array)

    def prepared_sums(self) -> tuple[tuple[CommitSpec, ...], list[np.ndarray]]:
        """Return what is prepared and, by commit and slice, the summed gradient in the master dtype, valid until the next is prepared."""
        with self.lock:
            specs, arrays, count = self._specs, self._aggregated, len(self.part.slices)
            if arrays is None:  # it was foreseen
                arrays = self._room_for_sums(specs)
                for k, spec in enumerate(specs):
                    for i, s in enumerate(self.part.slices):
                        table, _, contributions, coefficients = self._kernel_commit(spec, i, s)
                        _kernels.aggregate(
                            s.lane.dtype, table, contributions, coefficients, arrays[k * count + i],
                            threads=self.threads, level=self.level,
                        )  # fmt: skip
            return specs, arrays

    def _room_for_sums(self, specs: Sequence[CommitSpec]) -> list[np.ndarray]:
        """Return memory for the summed gradients of commits, by commit and slice, in one piece: a follower's, if it gives any."""
        lies = [(s.lane.master, s.elements) for _ in specs for s in self.part.slices]
        ends = np.cumsum([0, *(count * np.dtype(dtype).itemsize for dtype, count in lies)])
        size = int(ends[-1])
        memory = self.keeper.room(size) if self.keeper is not None else None
        if memory is None:
            if self._sums.nbytes < size:
                self._sums = zeroed(size)
            memory = self._sums
        return [memory[a:b].view(dtype) for (dtype, _), (a, b) in zip(lies, pairwise(ends), strict=True)]

    def prepare_again(
        self,
        specs: Sequence[tuple[bytes, tuple[tuple[float, ...], ...]]],
        blobs: list[np.ndarray],
        *,
        threads: int | None = None,
    ) -> list[np.ndarray]:
        """Prepare commits again whose summed gradients are the first of these arrays, uint8; returns the others. Flip follows.

        specs: of each commit its cells and the scalars of each cell. threads: default all. The same bits as when they were made.
        """
        with self.lock:
            slices = self.part.slices if specs else []
            if slices:
                self._target, self._target_half = self._free_side(), self._free_half()
                for i, s in enumerate(slices):
                    commits = []
                    for k, (cells, rows) in enumerate(specs):
                        table = runs(s, np.frombuffer(cells, np.int32))
                        gradient = blobs[k * len(slices) + i]
                        commits.append((table, self._rows(rows, s), [gradient], np.ones((len(table), 1))))
                    first = 1 if s.lane.dtype != s.lane.master else 0
                    _kernels.apply(
                        *self._step(s), s.lane.master,
                        self._kernel_planes(i, s, self.side, self._half)[first:],
                        self._kernel_planes(i, s, self._target, self._target_half)[first:],
                        commits, threads=threads or self.threads, level=self.level, check=False,
                    )  # fmt: skip
                self._convert_masters(self._target, self._target_half)
            self._prepared = bool(specs)
            return blobs[len(specs) * len(slices) :]

    @property
    def is_prepared(self) -> bool:
        """Whether a flip would change the state."""
        return self._prepared

    def settle(self, commit: int) -> None:
        """Let what is prepared be the state where it is of this commit, else forget it; nobody reads here any more."""
        if self.commit < commit:
            self.handle(Flip(commit, self._prepared))
        with self.lock:
            self._prepared, self._specs, self._foreseen, self._pinned = False, (), None, None
            self.tables.drop_gathered()
            self._workers.clear()
            if self.layout is not None:  # the same side on every server, whatever each has been through
                self._wires[0], self._wires[self.side] = self._wires[self.side], self._wires[0]
                self.side = 0

    # Planes.

    def _new_planes(self, s: Slice) -> _Planes:
        """Make what stays on the server: a master copy where the wire dtype is narrower, and the optimizer's slots."""
        size = s.elements * np.dtype(s.lane.master).itemsize
        names = (*(("master",) if s.lane.dtype != s.lane.master else ()), *self.optimizer.slots)
        planes = {name: zeroed(size).view(s.lane.master) for name in names}
        for slot in self.optimizer.slots:
            # Else no page is touched before it is used.
            if self.optimizer.initial(slot) != 0.0 and not s.lane.is_averaged:
                planes[slot][:] = self.optimizer.initial(slot)
        return planes

    def _wire(self, side: int, s: Slice) -> np.ndarray:
        """Return a slice's parameters as they travel, uint8."""
        return self._wires[side].array[s.byte : s.byte + s.wire_bytes]

    def _planes(self, i: int, s: Slice) -> _Planes:
        """Return a slice's state by name; the parameters are their own master copy where the dtype allows."""
        wire = self._wire(self.side, s)
        own = {"master": wire.view(s.lane.master)} if s.lane.dtype == s.lane.master else {}
        return {"parameters": wire, **own, **self._hidden[self._half][i]}

    def _kernel_planes(self, i: int, s: Slice, side: int, half: int) -> list[np.ndarray]:
        """In the kernel's order: the parameters, the master copy where it is another, the slots."""
        wire, hidden = self._wire(side, s), self._hidden[half][i]
        names = [name for name in hidden if name == "master" or not s.lane.is_averaged]
        return [wire if s.lane.dtype != s.lane.master else wire.view(s.lane.master), *(hidden[name] for name in names)]

    def _missing_push(self, spec: CommitSpec) -> int | None:
        """Return which of the commit's pushes does not lie here, although it was sealed; None: all do."""
        if self.part.slices:
            for i, (identity, sequence) in enumerate(spec.pushes):
                worker = self._workers.get(identity)
                if worker is None or worker.sequence != sequence:
                    return i
        return None

    def _kernel_commit(self, spec: CommitSpec, i: int, s: Slice) -> _KernelCommit:
        key = (i, spec.cells)
        table = self._runs.get(key)
        if table is None:
            if len(self._runs) > 256:
                self._runs.clear()
            table = self._runs[key] = runs(s, np.frombuffer(spec.cells, np.int32))
        shares = np.frombuffer(spec.coefficients).reshape(-1, len(spec.pushes))
        contributions = [self._workers[identity].contributions[i] for identity, _ in spec.pushes]
        return table, self._rows(spec.rows, s), contributions, shares[table[:, 2]]

    def _rows(self, rows: Sequence[tuple[float, ...]], s: Slice) -> np.ndarray:
        """Return the scalars of each cell as a slice's step takes them; cells that lie in other slices have any."""
        width = 0 if s.lane.is_averaged else self._scalars
        return np.array([row if len(row) == width else (0.0,) * width for row in rows], np.float64, ndmin=2)

    def _locate(self, bad: tuple[int, int, int], s: Slice) -> tuple[int, int, int, int]:
        commit, push, element = bad
        assert self.layout is not None
        tensor = tensor_at(s.lane, s.start + element)
        return commit, push, tensor, s.start + element - self.layout.places[tensor][1]

    # What workers say.

    def attach(self, identity: int, *, share: bool) -> list[int]:
        """Make ready for a worker; returns descriptors to pass on (the shard keeps them), none unless `share`."""
        with self.lock:
            self._require_layout()
            size = self.part.wire_bytes
            if not share:
                self._workers[identity] = _Worker(self.part, zeroed(size))
                return []
            gradients = SharedBuffer(size, "gradients")
            if self._reads_in_place:
                self._workers[identity] = _Worker(self.part, gradients.array, [gradients])
                if self.consistency.kind != "bsp":
                    while len(self._wires) < len(self._workers) + 2:  # one for each to read, the state, the next state
                        self._wires.append(SharedBuffer(size, "parameters"))
                return [gradients.fd, *(wire.fd for wire in self._wires[: _limits.DESCRIPTORS - 1])]
            pulled = SharedBuffer(size, "pulled")
            self._workers[identity] = _Worker(self.part, gradients.array, [gradients, pulled], pulled.array)
            return [gradients.fd, pulled.fd]

    def inbox(self, identity: int, size: int) -> memoryview:
        """Return where a push's payload of `size` bytes goes. Raises LayoutError when that is not this part's size."""
        worker = self._worker(identity)
        if size != worker.inbox.nbytes or worker.shared:
            raise LayoutError(f"Expected a push of {worker.inbox.nbytes} bytes, got {size}: the models differ.")
        return memoryview(worker.inbox)

    def pushed(self, identity: int, sequence: int, carried: bool) -> None:
        """Note that push `sequence` lies whole in the worker's inbox; `carried`: it came as a payload."""
        worker = self._worker(identity)
        if carried is bool(worker.shared):
            raise ProtocolError(
                "Expected a push to come as it was agreed at Attach: in shared memory, or as a payload."
            )
        worker.sequence = sequence

    def foresee(self, spec: CommitSpec) -> Foreseen:
        """Begin to apply a commit whose last push has just begun to arrive in its worker's inbox."""
        with self.lock:
            self._target, self._target_half = self._free_side(), self._free_half()
            self._foreseen = Foreseen(spec)
            return self._foreseen

    def advance(self, foreseen: Foreseen, ready: int) -> memoryview:
        """Apply as much as can be, `ready` bytes of the push having come; returns the parameters that are new since the last call.

        Where it turns out to be another commit they are bytes without meaning, but as many.
        """
        with self.lock:
            done, foreseen.done = foreseen.done, _block_end(self.part, ready)
            for i, s in enumerate(self.part.slices):
                blocks = _blocks_before(s, done), _blocks_before(s, foreseen.done)
                if self._foreseen is foreseen and blocks[0] < blocks[1]:
                    bad = self._apply(i, [self._kernel_commit(foreseen.spec, i, s)], blocks)
                    if bad is not None:
                        self._foreseen = None  # found again, with its place, when the push is whole
            return memoryview(self._wires[self._target].array[done : foreseen.done])

    def sides(self, identity: int, known: int) -> list[int]:
        """Return the descriptors of some parameter buffers after the first `known`; the shard keeps them."""
        self._worker(identity)
        with self.lock:
            return [wire.fd for wire in self._wires[max(known, 0) :][: _limits.DESCRIPTORS]]

    def pull_own(self, identity: int) -> tuple[int, int]:
        """Let the worker read the parameters where they lie, until its next pull, or copy them into its shared buffer.

        Returns the commit they are of, and the side that it reads.
        """
        worker = self._worker(identity)
        with self.lock:
            if worker.outbox is not None:
                _kernels.copy(worker.outbox, self._wires[self.side].array, threads=self.threads)
                return self.commit, 0
            worker.side = self.side
            return self.commit, self.side

    def pull_sent(self, identity: int) -> tuple[int, memoryview]:
        """Return the parameters for sending: under BSP where they lie, else copied to the inbox, idle until the next push."""
        worker = self._worker(identity)
        with self.lock:
            wire = self._wires[self.side].array
            if self.consistency.kind == "bsp":
                return self.commit, memoryview(wire)
            _kernels.copy(worker.inbox, wire, threads=self.threads)
            return self.commit, memoryview(worker.inbox)

    def read(self, plane: str) -> tuple[int, np.ndarray]:
        """Return the commit and a copy of this part of a plane, as uint8: "parameters" with its gaps, others without."""
        with self.lock:
            return self.commit, np.concatenate([piece.view(np.uint8) for piece in self._pieces(plane)])

    def write(self, plane: str, data: np.ndarray, identity: int) -> None:
        """Replace a plane, `data` being what `read` returns; the parameters and their master copy change together.

        Raises PeerLostError for a worker that the coordinator has not asked for it, or so long ago that the job has gone on.
        """
        with self.lock:
            if identity != self._writer:
                raise PeerLostError(
                    "Expected values from the worker that the job has asked for them, got them from one that it was before."
                )
            self._foreseen = None
            pieces = [piece.view(np.uint8) for piece in self._pieces(plane)]
            if data.nbytes != sum(piece.nbytes for piece in pieces):
                raise LayoutError(f"Expected {sum(p.nbytes for p in pieces)} bytes of {plane}, got {data.nbytes}.")
            at = 0
            for piece in pieces:
                piece[:] = data[at : at + piece.nbytes]
                at += piece.nbytes
            for i, s in enumerate(self.part.slices):
                planes = self._planes(i, s)
                if s.lane.dtype == s.lane.master:
                    continue
                if plane == "parameters":
                    _kernels.convert(planes["master"], "float32", planes["parameters"], s.lane.dtype)
                elif plane == "master":
                    _kernels.convert(planes["parameters"], s.lane.dtype, planes["master"], "float32")

    def plane_bytes(self, plane: str) -> int:
        """Size of what `write` takes."""
        with self.lock:
            return sum(piece.nbytes for piece in self._pieces(plane))

    def _pieces(self, plane: str) -> list[np.ndarray]:
        self._require_layout()
        if plane == "parameters":
            return [self._wires[self.side].array]
        if plane != "master" and plane not in self.optimizer.slots:
            known = ", ".join(("parameters", "master", *self.optimizer.slots))
            raise LayoutError(f"Expected one of the planes {known}, got {plane!r}.")
        return [np.zeros(0), *(self._planes(i, s)[plane] for i, s in enumerate(self.part.slices))]

    def _worker(self, identity: int) -> _Worker:
        worker = self._workers.get(identity)
        if worker is None:
            raise PeerLostError(
                "Expected a worker that is attached to this server, got one that is not, or is no longer: connect again."
            )
        return worker

    def _require_layout(self) -> None:
        if self.layout is None:
            raise PeerLostError(
                "Expected parameters to be registered first, got a request for their state: register again."
            )


def _block_end(part: Part, byte: int) -> int:
    """Return the end of the last whole block, or of a gap between lanes, that `byte` of the part has reached."""
    for s in part.slices:
        if s.byte <= byte < s.byte + s.wire_bytes:
            return byte - (byte - s.byte) % (BLOCK * s.lane.item_bytes)
    return byte


def _blocks_before(s: Slice, end: int) -> int:
    """Return how many of a slice's blocks lie before this block's end."""
    return -(-min(max(end - s.byte, 0), s.wire_bytes) // (BLOCK * s.lane.item_bytes))
