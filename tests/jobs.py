"""Jobs inside the test's own process: servers that listen, and workers that are threads with a session each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

import headwater as hw
from headwater._transport import Address

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
T = TypeVar("T")

TOKEN = "a token for tests"
PATIENCE_S = 60.0  # no wait in a test lasts longer


class Job:
    """Servers that listen, the first with the coordinator; `connect` makes a worker's session."""

    def __init__(self, servers: list[hw.Server], transport: str, workers: int) -> None:
        self.servers, self.transport, self.workers = servers, transport, workers
        self.address = servers[0].address.tcp or servers[0].address.unix

    def connect(self, **options: Any) -> hw.Session:
        """Return a new session of this job."""
        options = {"token": TOKEN, "transport": self.transport, "timeout_s": PATIENCE_S, **options}
        return hw.connect(self.address, **options)

    def run(self, body: Callable[[hw.Session], T]) -> list[T]:
        """Run the body once per worker, in threads; returns what it returned, by worker index."""
        everybody_is_there = threading.Barrier(self.workers)  # else one that ends early gives its index to a late one

        def work(_: int) -> tuple[int, T]:
            with self.connect() as session:
                everybody_is_there.wait(PATIENCE_S)
                return session.index, body(session)

        with ThreadPoolExecutor(self.workers) as pool:
            return [result for _, result in sorted(pool.map(work, range(self.workers)), key=lambda pair: pair[0])]


@contextmanager
def start_job(
    *,
    workers: int = 1,
    servers: int = 1,
    transport: str = "shm",
    consistency: hw.Consistency | None = None,
    folder: Path | None = None,
    **options: Any,
) -> Iterator[Job]:
    """Start servers on TCP, or on Unix sockets in `folder`; options: threads and level of the kernels."""
    options = {"threads": 1, "token": TOKEN, **options}
    with ExitStack() as stack:
        running: list[hw.Server] = []
        for i in range(servers):
            listen = Address("tcp", "127.0.0.1", 0) if folder is None else Address("unix", str(folder / str(i)), 0)
            if i == 0:
                server = hw.Server(listen, consistency=consistency, workers=workers, servers=servers, **options)
            else:
                first = running[0].address
                server = hw.Server(listen, join=Address.parse(first.tcp or first.unix), **options)
            running.append(stack.enter_context(server))
        yield Job(running, transport, workers)


def assert_equal_bits(ours: Arrays, theirs: Arrays) -> None:
    """Assert that two sets of arrays are the same to the last bit."""
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        assert array.tobytes() == theirs[name].tobytes(), f"{name} differs"


def assert_close(ours: Arrays, theirs: Arrays, tolerance: float) -> None:
    """Assert that each tensor differs by no more than this part of its norm."""
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        error = np.linalg.norm(array - theirs[name]) / max(float(np.linalg.norm(theirs[name])), 1e-30)
        assert error <= tolerance, f"{name}: {error}"


def read_all(session: hw.Session) -> Arrays:
    """Return the servers' whole state, by plane and name."""
    planes, steps = session.read_optimizer()
    found = {f"{plane}/{name}": array for plane, arrays in planes.items() for name, array in arrays.items()}
    return {**found, "steps": np.array(list(steps.values()))}
