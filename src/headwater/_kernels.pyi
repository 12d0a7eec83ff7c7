"""The native kernels. Nothing here keeps a buffer beyond the call, and every argument is checked before a byte moves.

Wire dtypes: "float32", "float64", "bfloat16", "float16". The master dtype is float64 for float64, else float32.
A buffer is a C-contiguous array of the element type or of bytes; bfloat16 comes as uint16.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

BLOCK: int  # elements: the unit that threads take and that square_sums sums over

#: (runs, scalars, contributions, coefficients):
#:   runs: int64 (k, 3): start (included), stop (not included), row. They follow one another and cover all elements;
#:       row -1 leaves the elements as they are.
#:   scalars: float64 (rows, width), as `optim.Optimizer.row` makes them.
#:   contributions: gradients of the wire dtype, all elements of each.
#:   coefficients: float64 (k, contributions); exactly 0.0: this contribution is absent from this run, it is not read.
Commit: TypeAlias = tuple[Buffer, Buffer, Sequence[Buffer], Buffer]

def simd_levels() -> list[str]:
    """Return the levels that this CPU has, worst first: "baseline", "avx2", "avx512". All give the same bits."""

def apply(
    optimizer: str,
    flags: int,
    wire: str,
    source: Sequence[Buffer],
    target: Sequence[Buffer],
    commits: Sequence[Commit],
    *,
    threads: int,
    level: str,
    blocks: tuple[int, int] | None = None,
    sums: Buffer | None = None,
    aggregated: Sequence[Buffer] | None = None,
    check: bool = True,
) -> tuple[int, int, int] | None:
    """Apply commits in order, in one pass over memory: the state in `source` before them, in `target` after them.

    source, target: planes [wire copy (only bfloat16 and float16), master, slots...], none of the targets overlapping another
        buffer. The gradient of a run is Σ coefficient·contribution in the master dtype, from the left to the right.
    level: one of simd_levels(), or "auto" for the best. blocks: [first, limit), the only blocks to read and write; None: all.
    sums: float64, one per block: gets what `square_sums` returns for the only commit, at hardly any cost beside the pass.
    aggregated: of the master dtype, one per commit: gets what `aggregate` gives, for less: contributions are read once. Of what is
        refused it is garbage.
    check: False takes NaN and infinity as they are; so does a replay of what `aggregate` gave, which may have overflowed.

    Returns None; or, when a contribution that counts holds NaN or infinity, the lowest (commit, contribution, element):
    then `target` is garbage; with `blocks` it may be an element of another block. `source` is never written. Raises ValueError for
    arguments that do not fit; nothing is written.
    """

def square_sums(
    wire: str,
    runs: Buffer,
    contributions: Sequence[Buffer],
    coefficients: Buffer,
    *,
    threads: int,
    level: str,
) -> npt.NDArray[np.float64]:
    """Return the sum of squares of the aggregated gradient of each block, over runs with a row of 0 or more.

    The same at every level and thread count. Not finite when a contribution is not finite.
    """

def aggregate(
    wire: str,
    runs: Buffer,
    contributions: Sequence[Buffer],
    coefficients: Buffer,
    out: Buffer,
    *,
    threads: int,
    level: str,
) -> None:
    """Write the aggregated gradient to `out`, of the master dtype, all elements: zero where the row is -1 or nobody contributes.

    What `apply` computes on its way, to the bit, at every level and thread count. So the commit can be replayed:
    `apply(…, master dtype, [master, slots…], …, [(runs, scalars, [out], ones)], check=False)` gives the same master and slots
    as the commit itself; and a bfloat16 or float16 wire copy is `convert` of that master, but where the row is -1, which
    neither touches. Contributions are not checked: one that is not finite gives an `out` that is not.
    Raises ValueError for arguments that do not fit; nothing is written.
    """

def copy(target: Buffer, source: Buffer, *, threads: int = 1) -> None:
    """Copy bytes between buffers of equal size that do not overlap."""

def convert(target: Buffer, target_dtype: str, source: Buffer, source_dtype: str) -> None:
    """Convert between float32 and bfloat16 or float16, rounding to nearest even."""

class Arena:
    """One range of addresses made of memory files mapped one after another, or of zeroed memory when there are no files.

    Unmapped when the arena and every array made of it are gone.
    """

    def __init__(self, fds: Sequence[int], sizes: Sequence[int], *, private: bool) -> None:
        """Map sizes[i] bytes, a multiple of the page size, of fds[i]; the caller still closes the descriptors.

        private: what is written stays in this process. A file must never shrink while it is mapped (seal it).
        Raises ValueError for sizes that do not fit, OSError when mapping fails.
        """

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The whole range, writable."""

    def remap(self, fds: Sequence[int], sizes: Sequence[int]) -> None:
        """Map other files at the same addresses: arrays made of the arena stay valid and show them. Shared or private, as it was.

        As many files as before and as many bytes together; the caller still closes the descriptors. What was written to a private
        mapping is dropped, and the next write is noted anew. Other threads may read meanwhile: they see old or new bytes.
        Raises ValueError for files or sizes that do not fit, OSError when mapping fails. Then the old files show, as before;
        only when the system runs out of memory in the midst of it, new files first and old ones after.
        """

    def discard_private(self) -> bool:
        """Drop what was written to a private mapping; the files' content shows again. Returns whether there was anything.

        Private mappings are read-only until the first write, which a handler of SIGSEGV notes: so it costs nothing when there
        was none. A system call that writes there, such as a socket's recv_into, fails with EFAULT.
        """

class Heartbeat:
    """A thread that writes `frame` to a duplicate of the socket `fd`, now and then every interval, GIL or no GIL.

    It ends at `stop`, when this object is collected, or when writing fails.
    """

    def __init__(self, fd: int, frame: bytes, interval_s: float) -> None: ...
    def stop(self) -> None:
        """End the thread and wait for its end. Twice is fine."""

    @property
    def alive(self) -> bool:
        """Whether it still beats."""

def bucket_of(ids: Buffer) -> npt.NDArray[np.uint8]:
    """Return the bucket of each id, int64 (n,): the top 8 bits of its 64-bit mix. Bucket b lives on server b·servers // 256."""

def unique(ids: Buffer, servers: int = 1) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return (distinct ids, ends, inverse) of ids, int64 (n,) with n below 2^31.

    distinct: int64 (u,), grouped by server; within a server in order of first appearance.
    ends: int64 (servers,): where in `distinct` each server's ids end (not included).
    inverse: int32 (n,): distinct[inverse] == ids.
    """

def same_ids(ids: Buffer, others: Buffer) -> bool:
    """Whether both, int64 (n,), are the same ids in the same order."""

def sum_rows(
    rows: Buffer,
    targets: Buffer,
    out: Buffer,
    *,
    sources: Buffer | None = None,
    weights: Buffer | None = None,
    threads: int = 1,
    level: str = "auto",
) -> bool:
    """Set out[t] = Σ weights[i] · rows[sources[i]] over the i with targets[i] == t, in ascending i, from zero.

    Returns whether all of them are finite.

    rows: float32 (r, dim). targets: int32 (n,). out: float32 (u, dim), where nothing has t: zeros.
    sources: int32 (n,), default 0, 1, 2, …: then r must be n. weights: float32 (n,), default 1.
    So it sums gradients of equal ids (targets = inverse), pools bags (targets = bag of i, sources = inverse) and spreads a
    bag's gradient (targets = inverse, sources = bag of i). The same bits at every level and thread count.
    Raises ValueError for arguments that do not fit, an index out of range among them; then out is not written.
    """

def take_rows(rows: Buffer, sources: Buffer, out: Buffer, *, threads: int = 1) -> None:
    """Set out[i] = rows[sources[i]]: float32 (r, dim), int32 (n,), float32 (n, dim). Raises ValueError as sum_rows does."""

def find_bad(rows: Buffer, *, threads: int = 1) -> int:
    """Return the flat index of the first NaN or infinity among float32 values of any shape, or -1."""

def hash_ids(strings: Sequence[str | bytes]) -> npt.NDArray[np.int64]:
    """Return a 64-bit hash per string (text as UTF-8): stable over runs, versions and machines; not for security."""

class Table:
    """One server's rows of one table: int64 ids to `dim` float32 values and the optimizer's state.

    It can be shared between threads: calls that change rows exclude each other and readers, and the GIL is released.
    A row exists once a push trained it (after `admit_after` sightings) or `put` wrote it. An id without a row has its initial
    value: a pure function of (seed, id, position). Rows lie in stripes, by their hash; each has its own index, its
    own rows, an equal share of the budget, and gets and loses rows by one thread at a time, in the order of the batch: so the
    same calls give the same rows, evictions and bits, whatever the thread count or SIMD level. (With spilling, what
    `prefetch` brought in by the time of a call decides which rows are in memory, never what they hold.)

    Last seen, of a row: with expire_s the time of the last push, put or touching pull, in whole seconds; otherwise the step.
    Count, of a row: its sightings, that is pushes, in sixteenths, at most 2^20; see `decay`.

    Every call raises ValueError for arguments that do not fit (wrong dtype, shape, an id whose bucket lives elsewhere) before
    anything changes. MemoryError, when the system gives no more: the table is consistent, the push may be applied in part.
    """

    def __init__(
        self,
        dim: int,
        optimizer: str,
        initial_slots: Sequence[float],
        *,
        seed: int = 0,
        initial: str = "uniform",
        scale: float = 0.0,
        admit_after: int = 1,
        expire_steps: int = 0,
        expire_s: float = 0.0,
        decay: float = 1.0,
        budget_bytes: int = 0,
        when_full: str = "evict",
        evict: str = "lru",
        spill_folder: str = "",
        buckets: tuple[int, int] = (0, 256),
        stripes: int = 64,
        threads: int = 1,
        level: str = "auto",
    ) -> None:
        """Make an empty table.

        dim: 1 to 65,536. optimizer, initial_slots: as `optim.Optimizer.kind` and `optim.Optimizer.row_slots(dim)` give them:
            "sgd" (no state), "adagrad" (dim), "rowwise_adagrad" (1), "adam" (2·dim: mean, mean of squares), "ftrl" (2·dim: z, n).
        seed: any 64-bit integer. initial: "constant" (scale everywhere), "uniform" (in [−scale, scale)) or
            "normal" (standard deviation `scale`: a sum of eight uniform numbers, so within 4.9 · scale).
        admit_after: sightings until an id gets its row; 1: at the first. The counters of ids without a row are bounded (an
            eighth of the budget, or of the rows' bytes, and at least 64 kB a table): beyond it the least seen are forgotten.
        expire_steps, expire_s: a row unseen for longer is gone; 0: never. Only one of them.
        decay: counts are multiplied by it once every 1,000 steps, rounded down to a sixteenth. 0 < decay <= 1.
        budget_bytes: 0: no limit. Everything counts, growth too, and `bytes` never exceeds it. ValueError, naming the smallest,
            when it is too small for a page of rows in each stripe.
        when_full: "evict" or "spill" (to an unnamed file in spill_folder, which must exist; OSError when it cannot be made). In
            memory a spilled row costs about 11 bytes.
        evict: "lru" or "lfu": who goes, the worst of a few rows drawn at random.
        buckets: [first, limit) of those whose ids live here. stripes: a power of two up to 64.
        """

    def pull(
        self, ids: Buffer, out: Buffer, *, touch: bool, now: float, numbers: Buffer | None = None, prefetch: bool = True
    ) -> int:
        """Set out, float32 (n, dim), to the rows of ids, int64 (n,), in any order and repeated at will. Return how many had one.

        touch: it counts as seen, and spilled rows come back to memory; without it nothing changes. now: seconds, time.time();
        it matters only with expire_s. numbers: uint32 (n,), set to where the rows lie, for a push of the same ids. prefetch=False is
        for benchmarks: no memory is asked for ahead of its use.
        Raises OSError when a spilled row cannot be read; out is then garbage and no row is lost.
        """

    def push(
        self,
        ids: Buffer,
        gradients: Buffer,
        scalars: Buffer,
        *,
        step: int,
        now: float,
        numbers: Buffer | None = None,
    ) -> None:
        """Take one optimizer step at each id's row; ids without one are counted, admitted, or refused.

        ids: int64 (n,), distinct: of one that is repeated some steps may get lost. gradients: float32 (n, dim), finite (see
        `find_bad`). scalars: float64, as `optim.Optimizer.row(scalars, step)` gives them. step: from 1, below 2^32, never
        falling. numbers: uint32 (n,), where a pull has found the rows; they may have moved since, the result is the same, and so it is
        for any numbers. Raises ValueError for more ids than the budget holds rows; OSError (errno set) when the disk is full or
        fails while spilling: then nothing of the push is applied.
        """

    def prefetch(self, ids: Buffer) -> None:
        """Start to bring spilled rows of ids into memory and return at once; best effort, errors are left to the pull.

        It does not count as seen: what the table says of its rows is the same with and without.
        """

    def sweep(self, *, step: int, now: float) -> int:
        """Look at the next few rows, delete the expired among them and return how many: cheap, call it every step.

        Expired rows not yet swept away count in `rows` but behave as if they were gone.
        """

    def delete(self, ids: Buffer) -> int:
        """Delete the rows of ids; return how many there were."""

    def export(
        self, cursor: int = 0, limit: int = 1 << 16
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64], int]:
        """Return (ids, rows, counts, last seen, next cursor) of up to `limit` rows from `cursor` on; begin with 0, -1 is the end.

        rows: float32 (k, dim + slots), value then state. Spilled rows are read, and stay where they are; expired ones are
        left out. A row comes exactly once when nothing changes the table in between; while it changes, `changes` is the way.
        """

    def put(self, ids: Buffer, rows: Buffer, counts: Buffer, last_seen: Buffer, *, step: int, now: float) -> None:
        """Write whole rows as export gives them: ids distinct, no admission, no optimizer; the budget holds. Errors as with
        push; but with spilling any number of rows will do, and after an OSError some of them may be written.

        Counts are those of `step`, which rows that lie here are brought up to first.
        """

    def track(self, consumer: str) -> None:
        """Begin a delta stream by this name, at most 6 at once; again by the same name: it starts over."""

    def untrack(self, consumer: str) -> None:
        """End it. ValueError when there is none by this name."""

    def changes(
        self, consumer: str, limit: int = 1 << 62
    ) -> tuple[
        npt.NDArray[np.int64],
        npt.NDArray[np.float32],
        npt.NDArray[np.float32],
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
        int,
        bool,
        bool,
    ]:
        """Return (written ids, rows, counts, last seen, deleted ids, step, restart, more) since the consumer last asked.

        Up to about `limit` rows, each once, as they are now: rows, counts and last seen as `export` gives them; step: the
        table's, which the counts are up to date with. The first time all rows are new. To follow: with `restart` drop everything;
        then drop `deleted`, then write `rows`; ask again while `more`, others may use the table meanwhile. Whoever has followed
        until `more` is False equals the table as it was in that call. A touching pull is not a change.

        So a snapshot is `track`, all answers until `more` is False, `untrack`. A table with the same settings, to which each answer
        in turn is brought by `delete(deleted)` and `put(…, step=max(step, 1), now=…)`, has the same ids, values, state and counts
        to the bit, whatever was pushed, put, deleted, evicted, expired, spilled or loaded meanwhile; nothing is evicted on the
        way. Last seen is at least that of the last change: a row that only touching pulls since have kept from expiring may
        be missing. Sightings of ids without a row are not part of it.

        restart: the first time; after an error; and when the log of deleted ids has lost some that the consumer has not read:
        drop all answers so far, and go on. Each stripe's log keeps the latest: without a budget at least 2,048 ids and a sixteenth
        of the stripe's rows, with one about budget_bytes/1024 over all stripes. So it does not happen while fewer are deleted between
        two calls, for every call reads the log of every stripe, whatever its limit.
        Raises ValueError for a name that is not tracked, OSError when a spilled row cannot be read.
        """

    def stats(self) -> dict[str, int]:
        """Return rows (in memory), spilled_rows, bytes, budget_bytes, spilled_bytes (on disk), rows_max (in memory, 0: no budget), step;
        and since the beginning: admitted, refused (sightings without a row), evicted, expired, deleted, spilled, loaded, hits
        and misses (of pulls)."""

    @property
    def bytes(self) -> int:
        """Memory held: rows, index, counters, logs, and what is allocated but not yet used."""
