"""Memory that two processes on one machine can share: anonymous files (memfd), sealed against resizing.

No names to leak: the memory is gone when the last process that maps it is.
"""

from __future__ import annotations

import fcntl
import os

import numpy as np

from headwater import _kernels
from headwater._layout import PAGE_BYTES, round_up

_F_ADD_SEALS, _SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW = 1033, 1, 2, 4


class SharedBuffer:
    """Zeroed bytes behind a file descriptor that can be passed to another process. Close it, or let it be collected."""

    def __init__(self, size: int, name: str) -> None:
        self.mapped_bytes = round_up(max(size, 1), PAGE_BYTES)
        self.fd = os.memfd_create(f"headwater-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.mapped_bytes)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW | _SEAL_SEAL)
            self.array: np.ndarray = _kernels.Arena([self.fd], [self.mapped_bytes], private=False).array[:size]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up the descriptor; views of the array stay valid."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()


def zeroed(size: int) -> np.ndarray:
    """Return zeroed bytes of this process alone, uint8, beginning on a page: kernels stream only to whole cache lines."""
    return _kernels.Arena([], [round_up(max(size, 1), PAGE_BYTES)], private=True).array[:size]


def stack_buffers(fds: list[int], sizes: list[int], *, private: bool) -> _kernels.Arena:
    """Map several shared buffers as one range of addresses; the descriptors are closed."""
    try:
        return _kernels.Arena(fds, [round_up(max(size, 1), PAGE_BYTES) for size in sizes], private=private)
    finally:
        for fd in fds:
            os.close(fd)


def remap_buffers(arena: _kernels.Arena, fds: list[int], sizes: list[int]) -> None:
    """Map other shared buffers at the addresses of these, so that all views stay valid; the descriptors are closed."""
    try:
        arena.remap(fds, [round_up(max(size, 1), PAGE_BYTES) for size in sizes])
    finally:
        for fd in fds:
            os.close(fd)
