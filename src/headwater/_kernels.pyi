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
) -> tuple[int, int, int] | None:
    """Apply commits in order, in one pass over memory: the state in `source` before them, in `target` after them.

    source, target: planes [wire copy (only bfloat16 and float16), master, slots...], none of the targets overlapping another
        buffer. The gradient of a run is Σ coefficient·contribution in the master dtype, from the left to the right.
    level: one of simd_levels(), or "auto" for the best. blocks: [first, limit), the only blocks to read and write; None: all.
    sums: float64, one per block: gets what `square_sums` returns for the only commit, at hardly any cost beside the pass.

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
