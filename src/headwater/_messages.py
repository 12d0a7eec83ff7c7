"""What is said: one frozen struct per message kind. No I/O.

A message travels as a MessagePack array whose first element is its name; bulk bytes follow it as the frame's
payload (`_wire`). Only the kinds that say so below carry a payload. Decoding never runs a peer's code.
"""

from __future__ import annotations

from functools import cache

import msgspec

from headwater._book import Change
from headwater._consistency import Consistency
from headwater._errors import BY_NAME, HeadwaterError, InternalError, ProtocolError
from headwater._layout import TensorSpec
from headwater._leases import DataSpec, Piece
from headwater._rows import AnyInitial, RowPolicy, TableSpec
from headwater._sealed import File
from headwater.optim import AnyOptimizer, RowOptimizer


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages."""


class Hello(Message, frozen=True, tag=True):
    """First on every connection. `role` is worker, beat, observer, server or coordinator."""

    token: str
    role: str
    identity: int  # random, one per process; names its pushes together with their sequence
    index: int = -1  # wanted place among the workers; -1: any
    workers: int = 0  # how many the job should wait for at its start; 0: as the server says
    consistency: Consistency | None = None  # None: whatever the job has
    label: str = ""  # host and pid, for people
    returns: bool = False  # this identity has been here before, and its connection ended


class ServerAddress(Message, frozen=True):
    """Where one server listens; the client chooses."""

    tcp: str
    unix: str
    host: str  # boot id and user: equal to the client's own means that shared memory works


class Here(Message, frozen=True, tag=True):
    """Answer to the Hello of a data connection: where else this server listens."""

    address: ServerAddress


class Welcome(Message, frozen=True, tag=True):
    """Answer to the Hello of a worker or an observer."""

    index: int
    workers: int
    consistency: Consistency
    servers: tuple[ServerAddress, ...]
    durability: str = (
        ""  # as `Durability` reads it: who loses a server asks again; empty: the job ends with its servers
    )
    is_apart: bool = False  # the coordinator is not the first server
    #: Units of each dataset that this worker has used and got. Got fewer than it knows of: they were given back.
    leased: dict[str, tuple[int, int]] = {}
    history: int = 0  # as in the book: another one than before, and what the worker knows of commits is void


class Failed(Message, frozen=True, tag=True):
    """The request was refused; the name of the error's class and its text."""

    error: str
    text: str

    def exception(self) -> HeadwaterError:
        """Return the error to raise on this side."""
        return BY_NAME.get(self.error, InternalError)(self.text)


class Done(Message, frozen=True, tag=True):
    """The request was carried out and there is nothing more to say."""


class Waiting(Message, frozen=True, tag=True):
    """An interim answer: the request is still waiting, `seconds` so far, for those named."""

    seconds: float
    names: tuple[str, ...]


class Beat(Message, frozen=True, tag=True):
    """The sender's process lives."""


class Register(Message, frozen=True, tag=True):
    """To the coordinator: the dense parameters and their optimizer. The first one decides, the others must agree."""

    tensors: tuple[TensorSpec, ...]
    optimizer: AnyOptimizer


class Registered(Message, frozen=True, tag=True):
    """`initialise`: this worker now puts the initial values on every server, then says Initialised."""

    initialise: bool
    clock: int = 0
    side: int = 0
    commit: int = 0  # the job's
    answered: int = -1  # the last push of this worker that closed a clock


class Initialised(Message, frozen=True, tag=True):
    """To the coordinator: every value is in place. `steps` (one per tensor) and `commit` go on from a saved job."""

    commit: int = 0
    steps: tuple[int, ...] = ()
    state: dict[str, bytes] = {}


class Assign(Message, frozen=True, tag=True):
    """Coordinator to server: the whole layout, and which part of it is yours."""

    tensors: tuple[TensorSpec, ...]
    optimizer: AnyOptimizer
    index: int
    count: int
    consistency: Consistency


class Attach(Message, frozen=True, tag=True):
    """To each server, once registered: make ready for this worker's pushes. `share`: through shared memory."""

    share: bool


class Attached(Message, frozen=True, tag=True):
    """`fds` file descriptors come along: the push buffer, then parameter buffers: as many as there are, up to the limit, where they

    are read in place (BSP, or one server), else one for this worker's copies.
    """

    fds: int


class Detach(Message, frozen=True, tag=True):
    """Coordinator to server: this worker is gone."""

    identity: int


class LetWrite(Message, frozen=True, tag=True):
    """Coordinator to server: this worker may Put, and nobody else, until the next Flip. Answer: Done."""

    identity: int


class Put(Message, frozen=True, tag=True):
    """To a server: replace a plane of its state. Payload: the server's part of it."""

    plane: str


class Pull(Message, frozen=True, tag=True):
    """To a server: send a plane. `own`: into this worker's shared parameter buffer instead of a payload."""

    plane: str = "parameters"
    own: bool = False


class Sides(Message, frozen=True, tag=True):
    """To a server: pass parameter buffers after the first `known`. Answer: Attached."""

    known: int


class Pulled(Message, frozen=True, tag=True):
    """Payload: the plane, as it was after `commit`.

    Unasked before a Committed: the parameters as that commit is about to leave them, while its push is still arriving.
    """

    commit: int
    side: int = 0  # where `own` was asked for


class Push(Message, frozen=True, tag=True):
    """To a server: this worker's gradients lie ready. Payload: the server's part, absent in shared memory. Answer: Done.

    Nothing counts before the coordinator has the Seal.
    """

    sequence: int


class Seal(Message, frozen=True, tag=True):
    """To the coordinator: push number `sequence` is whole on every server; let it count. Answer: Committed.

    With one server, whose connection this is, the push and the pull ride along. `pushes`: this is the Push too, with its payload.
    `pull`: "own" or "sent" as of Pull, done before the answer, which carries the payload. Whoever wants it "sent" must read while
    it sends: where this push completes a commit, Pulled comes before the push is whole, and a Committed without payload confirms it.
    `used`: how many units of each leased dataset this worker has used up to here, in total.
    """

    sequence: int
    weight: float
    scalars: tuple[tuple[float, ...], ...]  # one row per parameter group
    absent: bytes = b""  # packed bits, one per tensor, 1: no gradient; empty: all present
    pushes: bool = False
    pull: str = ""
    used: tuple[tuple[str, int], ...] = ()


class Committed(Message, frozen=True, tag=True):
    """The commit that holds the push and the side its result lies on, or why the push was refused. Payload: as asked."""

    commit: int
    clock: int
    side: int
    accepted: int  # pushes in that commit
    staleness: int = 0
    refused: Failed | None = None


class CommitSpec(Message, frozen=True):
    """One commit as a server needs it. Tensors that are treated alike form a *cell*."""

    pushes: tuple[tuple[int, int], ...]  # (identity, sequence), in the order of the sum
    cells: bytes  # int32, one per tensor; -1: nobody has a gradient for it, it stays as it is
    rows: tuple[tuple[float, ...], ...]  # cell → the optimizer's scalars, bias corrections included
    coefficients: bytes  # float64 (cells, pushes): what each push's gradient is multiplied by in the sum; 0: absent


class Prepare(Message, frozen=True, tag=True):
    """Coordinator to server: apply these commits beside the current state."""

    first: int  # number of the first commit
    commits: tuple[CommitSpec, ...]
    norms: bool = False  # also answer the sums of squares of the only commit's gradient


class Prepared(Message, frozen=True, tag=True):
    """`bad`: (commit, push, tensor, element) of the first non-finite gradient element.

    tensor -1: the push is not here; -2: its scalars for table number `element` differ from those of a push before it.
    """

    bad: tuple[int, int, int, int] | None = None
    sums: bytes = b""  # float64, one per block, as of Normed


class Norms(Message, frozen=True, tag=True):
    """Coordinator to server: the sums of squares of this commit's gradient. Answer: Normed."""

    commit: CommitSpec


class Normed(Message, frozen=True, tag=True):
    """float64, one sum per block."""

    sums: bytes


class Flip(Message, frozen=True, tag=True):
    """Coordinator to server: the state is now that after `commit`; `swap`: which is what was prepared."""

    commit: int
    swap: bool


class Flipped(Message, frozen=True, tag=True):
    """The side that is now the state."""

    side: int


class Enroll(Message, frozen=True, tag=True):
    """Server to coordinator: I am here. `index`: my place among the servers; -1: any. `follows`: or the follower of who has it."""

    address: ServerAddress
    index: int = -1
    follows: bool = False


class Recall(Message, frozen=True, tag=True):
    """Coordinator to server: how far can you go from this snapshot of the store? "": from what you have. Answer: Recalled."""

    snapshot: str
    index: int


class Recalled(Message, frozen=True, tag=True):
    """To this commit; -1: nowhere. held: from what it has, to this one as well, and to none between."""

    commit: int
    held: int = -1


class Restore(Message, frozen=True, tag=True):
    """Coordinator to server: become what this snapshot and the commits up to this one make of you. Answer: Restored.

    "" for the snapshot: the store is empty, begin; or, `is_warm`, begin from what you have. `follows`: the job goes on meanwhile, and what
    it does is sent by the server that is followed; else all servers are told so, and what was sent before is given up.
    """

    snapshot: str
    commit: int
    index: int
    count: int
    is_warm: bool = False
    follows: bool = False
    history: int = 0  # that begins here; 0: the snapshot's own


class Restored(Message, frozen=True, tag=True):
    """`book`: MessagePack of the Book that belongs to the state."""

    book: bytes = b""


class Persist(Message, frozen=True, tag=True):
    """Coordinator to server: write down what is gathered, and this change. Answer: Done, when it survives.

    `swap`: and what is prepared. What was prepared and refused, by this server or another, is not.
    """

    change: Change
    swap: bool = False


class SnapshotBegin(Message, frozen=True, tag=True):
    """Coordinator to server: begin to write rows of tables into this folder of the store. Answer: Done, at once."""

    folder: str


class Pin(Message, frozen=True, tag=True):
    """Coordinator to server, between two commits: this is the state to write, and the Book that belongs to it. Answer: Done, at once."""

    book: bytes


class SnapshotGet(Message, frozen=True, tag=True):
    """Coordinator to server. Answer: SnapshotState."""


class SnapshotState(Message, frozen=True, tag=True):
    """`is_due`: few rows are missing, so Pin is cheap; `is_whole`: everything is written, and these are the files."""

    is_due: bool = False
    is_whole: bool = False
    files: tuple[File, ...] = ()
    rest: bytes = b""  # what this server keeps besides, MessagePack
    error: str = ""


class Unpin(Message, frozen=True, tag=True):
    """Coordinator to server, between two commits: the snapshot has ended. `commit`: logs from before this one may go; -1: none."""

    commit: int


class FeedTo(Message, frozen=True, tag=True):
    """Coordinator to server: from the state that is pinned next on, whatever you are to keep is applied by the follower at this address

    first; None: by nobody. Answer: Done.
    """

    address: ServerAddress | None


class FeedLost(Message, frozen=True, tag=True):
    """Server to coordinator: my follower lacks what is acknowledged from now on. Answer: Done; an error where another has my place."""

    index: int
    address: ServerAddress


class Apply(Message, frozen=True, tag=True):
    """Server to its follower: a record as a log would hold it, with blobs of these sizes. Answer: Done, in order.

    So many of the blobs' bytes as are `shared` lie in a room of the follower's, from its begin; the rest is the payload.
    """

    head: bytes
    sizes: tuple[int, ...]
    room: int = 0
    shared: int = 0


class SnapshotTake(Message, frozen=True, tag=True):
    """To the coordinator: take a snapshot now. Answer: SnapshotTaken, when it is whole."""


class SnapshotTaken(Message, frozen=True, tag=True):
    """Where it lies."""

    path: str
    commit: int


class Leave(Message, frozen=True, tag=True):
    """To the coordinator: this worker has ended its data, and leaves the barrier."""


class Hold(Message, frozen=True, tag=True):
    """To the coordinator: no commits until Resume, so that several planes can be read together, or written. Answer: Held."""

    writes: bool = False


class Held(Message, frozen=True, tag=True):
    """What a reader needs to know about the state it now reads."""

    commit: int
    steps: tuple[int, ...]
    tensors: tuple[TensorSpec, ...]
    optimizer: AnyOptimizer | None
    tables: tuple[TableSpec, ...] = ()  # by number


class Resume(Message, frozen=True, tag=True):
    """To the coordinator: commits may go on."""


class MakeRoom(Message, frozen=True, tag=True):
    """To a server: have memory for commits that go on beside parameters that are set aside. Answer: Done."""


class SetAside(Message, frozen=True, tag=True):
    """To the coordinator, and on to every server: set the parameters aside between two commits. Answer: Held; a server's: Done.

    Commits go on beside them. One reader at a time, until Release or the end of its connection; it pulls the plane "aside".
    """


class Release(Message, frozen=True, tag=True):
    """To the coordinator, and on to every server: commits may write over what was set aside. Answer: Done."""


class StateGet(Message, frozen=True, tag=True):
    """To the coordinator: the job's small dictionary. Answer: State."""


class State(Message, frozen=True, tag=True):
    """Values are MessagePack."""

    items: dict[str, bytes]


class StateSet(Message, frozen=True, tag=True):
    """To the coordinator: change one key; None removes it."""

    key: str
    value: bytes | None


class Report(Message, frozen=True, tag=True):
    """To the coordinator: figures for people, kept per worker. No answer."""

    figures: dict[str, float]


class StatsGet(Message, frozen=True, tag=True):
    """To the coordinator. Answer: Stats."""


class WorkerStats(Message, frozen=True):
    """One worker as the coordinator sees it."""

    index: int
    label: str
    live: bool
    clock: int
    staleness: int
    staleness_max: int
    pushes: int
    refused: int
    figures: dict[str, float]


class Stats(Message, frozen=True, tag=True):
    """The job at a glance."""

    commit: int
    seconds: float
    parameters: int
    push_bytes: int
    pull_bytes: int
    refused: int
    consistency: Consistency
    servers: int
    workers: tuple[WorkerStats, ...]
    tables: tuple[TableSpec, ...] = ()  # by number
    followers: int = 0  # of a replicated job's servers: how many have one that holds all that is acknowledged


class LeaseTake(Message, frozen=True, tag=True):
    """To the coordinator: lease this worker, which had so many units till now, a piece of a dataset. Answer: Leased.

    The first one's settings decide, the others' must agree. `wait`: while others work on all that is left; none means then that
    the data has ended, else only that there is nothing at the moment.
    """

    spec: DataSpec
    had: int
    wait: bool


class Leased(Message, frozen=True, tag=True):
    """`rejoined`: the worker was not waited for while it waited; this is where it goes on, from parameters that it pulls anew."""

    piece: Piece | None = None
    rejoined: Registered | None = None


class Declare(Message, frozen=True, tag=True):
    """To the coordinator: a table with these settings; None: as the table has it. The first one decides, the others must agree."""

    name: str
    dim: int | None = None
    optimizer: RowOptimizer | None = None
    initial: AnyInitial | None = None
    seed: int | None = None
    policy: RowPolicy | None = None
    consistency: Consistency | None = None


class Declared(Message, frozen=True, tag=True):
    """The table's number, and its settings."""

    table: int
    spec: TableSpec


class OpenTable(Message, frozen=True, tag=True):
    """Coordinator to server: make this table; yours are the buckets of server `index` of `count`."""

    table: int
    spec: TableSpec
    index: int
    count: int


class Room(Message, frozen=True, tag=True):
    """On a worker's connection for tables: make room of this size for a batch, in place of what this room was before.

    Room 0 is for what is under way, the others for batches that are asked for ahead of their use. `share`: in memory that is
    shared, whose descriptor comes with the answer, Attached. Else batches travel as payloads. Likewise, shared, from a server to its
    follower: rooms 0 and 1, for records.
    """

    room: int
    size: int
    share: bool


class PullRows(Message, frozen=True, tag=True):
    """The rows of the ids that lie in this room, or come as the payload; `touch`: it counts as use. Answer: PulledRows."""

    table: int
    room: int
    count: int
    touch: bool


class PulledRows(Message, frozen=True, tag=True):
    """The rows lie in the room, or are the payload. `missing`: so many ids have none, and their initial values lie there."""

    missing: int = 0


class WarmRows(Message, frozen=True, tag=True):
    """Bring these rows into memory, where they are on disk. Ids as with PullRows. Answer: Done, at once."""

    table: int
    room: int
    count: int


class PushRows(Message, frozen=True, tag=True):
    """The batch in room 0, or the payload: distinct ids and their gradients. Answer: Done.

    `sequence` rises with this worker's pushes to this table. `step`: the push of the dense parameters to whose commit it belongs,
    where the table's pushes are staged.
    """

    table: int
    sequence: int
    step: int
    count: int
    scalars: tuple[float, ...]


class Gather(Message, frozen=True, tag=True):
    """Coordinator to server: what these steps have staged counts in the commit that is flipped next. Answer: Prepared.

    (identity, step, share in the mean); share 0: it counts nowhere.
    """

    pushes: tuple[tuple[int, int, float], ...]


class Track(Message, frozen=True, tag=True):
    """Begin a delta stream of a table by this name, or end it. `ends`: with this connection, if not before."""

    table: int
    consumer: str
    begin: bool
    ends: bool = False


class ChangesGet(Message, frozen=True, tag=True):
    """What has changed since this consumer last asked, at most about `limit` rows. `state`: with the optimizer's. Answer: Changed."""

    table: int
    consumer: str
    limit: int
    state: bool = True


class Changed(Message, frozen=True, tag=True):
    """Payload: `changes` as in `_rows`. `restart`: drop everything first. `more`: ask again. `step`: the table's step number."""

    written: int
    deleted: int
    restart: bool
    more: bool
    step: int


class PageGet(Message, frozen=True, tag=True):
    """Rows of a table from `cursor` on, first 0. Answer: Page."""

    table: int
    cursor: int
    limit: int


class Page(Message, frozen=True, tag=True):
    """Payload: a `page` as in `_rows`. `cursor`: of the next one, -1: this was the last. `step`: the table's step number."""

    count: int
    cursor: int
    step: int


class PagePut(Message, frozen=True, tag=True):
    """Write rows. Payload: a `page`. The table's step number becomes `step` where it is below. Answer: Done."""

    table: int
    count: int
    step: int


class TableStatsGet(Message, frozen=True, tag=True):
    """Answer: TableStats."""

    table: int


class TableStats(Message, frozen=True, tag=True):
    """A table at a glance, over all servers. Sizes now; and since the beginning, counts of what happened."""

    rows: int  # in memory; a row that has expired counts until it is swept away
    spilled_rows: int  # on disk
    bytes: int  # of memory: rows, index, counters, growth
    budget_bytes: int  # 0: none
    spilled_bytes: int
    rows_max: int  # in memory within the budget; 0: no budget
    step: int
    admitted: int
    refused: int  # sightings that got no row yet
    evicted: int
    expired: int
    deleted: int
    spilled: int
    loaded: int
    hits: int  # ids pulled that had a row
    misses: int


class ServedTable(Message, frozen=True):
    """A table of a replica at a glance: as it is now, and counts since the replica began. Times in seconds."""

    name: str
    dim: int
    rows: int
    bytes: int  # of memory: rows, index, growth; while everything comes anew, both sets
    step: int  # the table's, up to which all is here
    stale_s: float  # all that the job had so long ago is here
    lag_p50_s: float  # of the rows that came last: from the update at its server until it was seen here, at most
    lag_p99_s: float
    updates: int  # rows written
    deletes: int
    restarts: int  # how often everything came anew; the first time counts
    lookups: int
    ids: int  # looked up, repeated ones too
    missing: int  # of those, without a row


class ReplicaStats(Message, frozen=True, tag=True):
    """A replica's answer to StatsGet."""

    tables: tuple[ServedTable, ...]
    trouble: str = ""  # why it does not follow the job at the moment; empty: it does


AnyMessage = (
    Hello | Here | Welcome | Failed | Done | Waiting | Beat | Register | Registered | Initialised | Assign | Attach
    | Attached | Sides | Detach | LetWrite | Put | Pull | Pulled | Push | Seal | Committed | Prepare | Prepared | Norms | Normed
    | Flip | Flipped | Enroll | Leave | Hold | Held | Resume | StateGet | State | StateSet | Report | StatsGet | Stats
    | Recall | Recalled | Restore | Restored | Persist | SnapshotBegin | Pin | SnapshotGet | SnapshotState | Unpin
    | FeedTo | FeedLost | Apply | SnapshotTake | SnapshotTaken
    | Declare | Declared | OpenTable | Room | PullRows | PulledRows | WarmRows | PushRows | Gather | Track | ChangesGet
    | Changed | PageGet | Page | PagePut | TableStatsGet | TableStats | LeaseTake | Leased
    | MakeRoom | SetAside | Release
    | ReplicaStats
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()


@cache  # made at the first message rather than at import: it looks at every field of every kind
def _decoder() -> msgspec.msgpack.Decoder[AnyMessage]:
    return msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Return the message's MessagePack."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> AnyMessage:
    """Return the message that `data` holds. Raises ProtocolError."""
    try:
        return _decoder().decode(data)
    except (msgspec.DecodeError, ValueError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"Expected a Headwater message, got {len(data)} bytes that are none: {error}.") from error
