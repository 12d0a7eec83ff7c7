"""Redis as a parameter server: a row is a string under its id; workers get rows, make the optimizer's step and set them.

The client is as fast as one in Python can be: keys and rows have one length, so a whole command is one NumPy array of records, and
so is its answer. MGET and MSET of a few thousand keys are pipelined on a Unix socket, which is faster than TCP on the loopback.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np

from bench.harness import BenchError, Step
from bench.traffic import BATCH, DIM, batches, gradients, lookups
from headwater import _kernels

CHUNK = 4096  # keys per command
START_S = 10.0
LR, EPS = 0.05, 1e-10

ROW = np.dtype([("row", np.float32, DIM), ("sum", np.float32)])  # value and row-wise Adagrad's state
KEY = np.dtype([("head", "S4"), ("key", "<i8"), ("tail", "S2")])  # $8 … as RESP wants it
ANSWER = np.dtype([("head", f"S{len(f'${ROW.itemsize}') + 2}"), *[(n, ROW[n]) for n in ("row", "sum")], ("tail", "S2")])
PAIR = np.dtype([("key", KEY), ("value", ANSWER)])


def server_command(folder: str) -> list[str]:
    """Return how to start the server: nothing on disk, a Unix socket in the folder, no threads for I/O: on two
    cores they only take turns with the workers. Raises BenchError where there is none."""
    program = shutil.which("redis-server")
    if program is None:
        raise BenchError(
            "Expected redis-server to compare with, got none on this machine: apt-get install redis-server."
        )
    settings = {"port": 0, "unixsocket": socket_of(folder), "save": "", "appendonly": "no"}
    return [program, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


def socket_of(folder: str) -> str:
    return str(Path(folder) / "redis.sock")


def wait_until_ready(server: subprocess.Popen[str], folder: str) -> None:
    """Return when the server listens. Raises BenchError when it ends, or takes too long."""
    deadline = time.perf_counter() + START_S
    with socket.socket(socket.AF_UNIX) as probe:
        while probe.connect_ex(socket_of(folder)):
            if server.poll() is not None or time.perf_counter() > deadline:
                raise BenchError(f"expected redis-server to listen within {START_S:.0f} s, got none that does")
            time.sleep(0.01)


class Client:
    """One connection; commands are sent by a thread of their own while answers are read, as a pipeline needs."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)

    def get(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows of ids, ROW (n,). Every id must have one."""
        commands = [(b"*%d\r\n$4\r\nMGET\r\n" % (1 + len(part)), _keys(part)) for part in _parts(ids)]
        answers = np.empty(len(ids), ANSWER)

        def read() -> None:
            for start in range(0, len(ids), CHUNK):
                part = answers[start : start + CHUNK]
                self._expect(b"*%d\r\n" % len(part))
                self._read_into(memoryview(part).cast("B"))

        self._exchange(commands, read)
        assert (answers["head"] == b"$%d\r\n" % ROW.itemsize).all()
        rows = np.empty(len(ids), ROW)
        rows["row"], rows["sum"] = answers["row"], answers["sum"]
        return rows

    def set(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Set the rows of ids."""
        commands = []
        for start in range(0, len(ids), CHUNK):
            part = slice(start, start + CHUNK)
            pairs = np.empty(len(ids[part]), PAIR)
            pairs["key"] = _keys(ids[part])
            value = pairs["value"]
            value["head"], value["tail"] = b"$%d\r\n" % ROW.itemsize, b"\r\n"
            value["row"], value["sum"] = rows["row"][part], rows["sum"][part]
            commands.append((b"*%d\r\n$4\r\nMSET\r\n" % (1 + 2 * len(pairs)), pairs))

        def read() -> None:
            for _ in commands:
                self._expect(b"+OK\r\n")

        self._exchange(commands, read)

    def _exchange(self, commands: list[tuple[bytes, np.ndarray]], read: Callable[[], None]) -> None:
        def send() -> None:
            for head, records in commands:
                self._socket.sendall(head)
                self._socket.sendall(memoryview(records).cast("B"))

        sender = threading.Thread(target=send)
        sender.start()
        read()
        sender.join()

    def _expect(self, text: bytes) -> None:
        got = bytearray(len(text))
        self._read_into(memoryview(got))
        if got != text:
            raise BenchError(f"expected {text!r} from Redis, got {bytes(got)!r}")

    def _read_into(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if count == 0:
                raise BenchError("Redis has closed the connection")
            view = view[count:]


def _parts(ids: np.ndarray) -> list[np.ndarray]:
    return [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]


def _keys(ids: np.ndarray) -> np.ndarray:
    keys = np.empty(len(ids), KEY)
    keys["head"], keys["key"], keys["tail"] = b"$8\r\n", ids, b"\r\n"
    return keys


def worker(index: int, folder: str, rows: int, kind: str) -> Step:
    """Return a step that pulls a batch's rows and pushes its gradients; the worker with index 0 makes all rows first."""
    client = Client(socket_of(folder))
    if index == 0:
        for start in range(0, rows, BATCH):
            ids = np.arange(start, min(rows, start + BATCH))
            client.set(ids, np.zeros(len(ids), ROW))
    traffic, raw = cycle(batches(kind, rows, seed=index)), gradients(BATCH, index)
    pulled = np.empty((BATCH, DIM), np.float32)

    def step() -> None:
        ids, _, inverse = _kernels.unique(next(traffic))
        found = client.get(ids)
        _kernels.take_rows(np.ascontiguousarray(found["row"]), inverse, pulled)
        gradient = np.empty((len(ids), DIM), np.float32)
        _kernels.sum_rows(raw, inverse, gradient)
        found["sum"] += np.square(gradient).mean(1)
        found["row"] -= (LR / (np.sqrt(found["sum"]) + EPS))[:, None] * gradient
        client.set(ids, found)

    return step


VALUE = np.dtype(
    [("head", f"S{len(f'${4 * DIM}') + 2}"), ("row", np.float32, DIM), ("tail", "S2")]
)  # a row to serve, as RESP has it
VALUE_PAIR = np.dtype([("key", KEY), ("value", VALUE)])


def reader(folder: str, rows: int, count: int, is_first: bool) -> Step:
    """Return a step that looks `count` rows up by one MGET, at once in one buffer. is_first: it sets all rows before."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(socket_of(folder))

    def ask(command: bytes, records: np.ndarray, size: int) -> memoryview:
        server.sendall(command + records.tobytes())
        answer = memoryview(bytearray(size))
        missing = answer
        while missing:
            missing = missing[server.recv_into(missing) :]
        return answer

    for start in range(0, rows if is_first else 0, CHUNK):
        pairs = np.empty(min(CHUNK, rows - start), VALUE_PAIR)
        pairs["key"] = _keys(np.arange(start, start + len(pairs)))
        pairs["value"] = np.array((b"$%d\r\n" % (4 * DIM), np.ones(DIM, np.float32), b"\r\n"), VALUE)
        assert bytes(ask(b"*%d\r\n$4\r\nMSET\r\n" % (1 + 2 * len(pairs)), pairs, 5)) == b"+OK\r\n"
    traffic = lookups(rows, count)
    head = b"*%d\r\n" % count

    def step() -> None:
        answer = ask(b"*%d\r\n$4\r\nMGET\r\n" % (1 + count), _keys(next(traffic)), len(head) + count * VALUE.itemsize)
        found = np.frombuffer(answer, VALUE, offset=len(head))
        assert found["head"][-1] == b"$%d\r\n" % (4 * DIM)
        np.ascontiguousarray(found["row"])

    return step
