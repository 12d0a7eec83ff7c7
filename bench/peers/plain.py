"""A plain array in the place of a table, in C++ of the bench's own: what the hash costs is what a table needs more than this."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).with_suffix(".cpp")


@cache
def library() -> ctypes.CDLL:
    """Compile plain.cpp for this very machine, and load it."""
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as folder:
        path = f"{folder}/plain.so"
        compiler = os.environ.get("CXX", "c++")
        flags = ["-std=c++17", "-O3", "-march=native", "-pthread", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", path], check=True)
        loaded = ctypes.CDLL(path)
    loaded.random_reads.restype = ctypes.c_double
    return loaded


def _pointer(array: np.ndarray, dtype: Any) -> ctypes.c_void_p:
    assert array.dtype == dtype
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


class PlainTable:
    """Rows 0 … rows − 1, all there from the start, with row-wise Adagrad; pull and push as of `_kernels.Table`."""

    def __init__(self, rows: int, dim: int, threads: int) -> None:
        self.values = np.empty((rows, dim), np.float32)
        self.values.fill(0.01)  # so that its pages exist
        self.sums = np.zeros(rows, np.float32)
        self.sums.fill(0.0)
        self.threads = threads
        self._library = library()

    def stats(self) -> dict[str, int]:
        return {"bytes": self.values.nbytes + self.sums.nbytes, "rows_max": 0}

    def sweep(self, **_: Any) -> int:
        return 0

    def pull(self, ids: np.ndarray, out: np.ndarray, **_: Any) -> int:
        """Ids are not checked to be below the number of rows: that would be time of its own."""
        rows = (_pointer(self.values, np.float32), ctypes.c_int64(self.values.shape[1]))
        batch = (_pointer(ids, np.int64), ctypes.c_int64(len(ids)))
        self._library.plain_pull(*rows, *batch, _pointer(out, np.float32), self.threads)
        return len(ids)

    def push(self, ids: np.ndarray, gradients: np.ndarray, scalars: np.ndarray, **_: Any) -> None:
        """Take a step; scalars: as of `optim.RowwiseAdagrad`."""
        lr, eps = (ctypes.c_float(float(scalars[i])) for i in (0, -1))
        state = (
            _pointer(self.values, np.float32),
            _pointer(self.sums, np.float32),
            ctypes.c_int64(self.values.shape[1]),
        )
        batch = (_pointer(ids, np.int64), _pointer(gradients, np.float32), ctypes.c_int64(len(ids)))
        self._library.plain_push(*state, *batch, lr, eps, self.threads)


def random_reads(path: Path, block: int, depth: int, seconds: float) -> float:
    """Return reads per second of blocks at random places of a file, past the page cache, so many at once. Raises OSError."""
    size = ctypes.c_int64(path.stat().st_size)
    rate = library().random_reads(os.fsencode(path), size, ctypes.c_int64(block), depth, ctypes.c_double(seconds))
    if rate < 0:
        raise OSError(-int(rate), os.strerror(-int(rate)), str(path))
    return float(rate)
