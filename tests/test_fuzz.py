"""Over 100,000 broken frames: each ends in a clean refusal or is a message, and the server goes on serving."""

from __future__ import annotations

import random
import resource
import socket
import struct
import threading
import typing
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from samples import GOLDEN

import headwater as hw
from headwater import _limits
from headwater._errors import PeerLostError, ProtocolError
from headwater._layout import TensorSpec
from headwater._leases import DataSpec
from headwater._messages import (
    AnyMessage,
    Attach,
    ChangesGet,
    Declare,
    Failed,
    Hello,
    Hold,
    Initialised,
    LeaseTake,
    Leave,
    MakeRoom,
    PageGet,
    PagePut,
    Pull,
    PullRows,
    Push,
    PushRows,
    Put,
    Register,
    Release,
    Report,
    Resume,
    Room,
    Seal,
    SetAside,
    Sides,
    StateGet,
    StateSet,
    StatsGet,
    TableStatsGet,
    Track,
    WarmRows,
    decode,
    encode,
)
from headwater._rows import RowPolicy, batch_bytes, page_bytes
from headwater._transport import Address, SocketConnection, connect
from headwater._wire import HEADER_BYTES, pack_header, unpack_header

SEED = 20_261_123  # change it to look elsewhere; a failure names it, the frame's number and the frame
PURE, SOCKET, SERVED = 80_000, 20_000, 4_000
KINDS = typing.get_args(AnyMessage)
TOKEN = "secret"
SIZES = [0, 1, 15, 255, 1 << 16, _limits.CONTROL_BYTES, _limits.CONTROL_BYTES + 1, (1 << 32) - 1]
SPECS = (TensorSpec("w", (5,), "float32"),)
SGD = hw.optim.SGD(lr=0.5)
SCALARS = (tuple(SGD.scalars().values()),)


def frame(message: AnyMessage, payload: bytes = b"") -> bytes:
    control = encode(message)
    return pack_header(len(control), len(payload)) + control + payload


class Mutator:
    """Makes broken frames of whole ones; the same seed makes the same."""

    def __init__(self, frames: list[bytes], seed: int) -> None:
        self._frames, self._random = frames, random.Random(seed)
        self._ways = [self.flip, self.cut, self.insert, self.remove, self.resize, self.splice, self.control, self.noise]

    def __call__(self) -> bytes:
        data = self.pick()
        for _ in range(self._random.choice([1, 1, 1, 2, 4])):
            data = self._random.choice(self._ways)(data)
        return data

    def pick(self) -> bytes:
        return self._random.choice(self._frames)

    def flip(self, data: bytes) -> bytes:
        changed = bytearray(data or b"\0")
        for _ in range(self._random.choice([1, 1, 2, 8])):
            changed[self._random.randrange(len(changed))] ^= 1 << self._random.randrange(8)
        return bytes(changed)

    def cut(self, data: bytes) -> bytes:
        return data[: self._random.randrange(len(data) + 1)]

    def insert(self, data: bytes) -> bytes:
        at = self._random.randrange(len(data) + 1)
        return data[:at] + self._random.randbytes(self._random.randrange(1, 9)) + data[at:]

    def remove(self, data: bytes) -> bytes:
        at = self._random.randrange(len(data) + 1)
        return data[:at] + data[at + self._random.randrange(1, 9) :]

    def resize(self, data: bytes) -> bytes:
        """Let the header promise something else."""
        control, payload = self._random.choice([len(data), *SIZES]), self._random.choice([*SIZES, 1 << 40, 1 << 60])
        return data[:4] + struct.pack("<IQ", control, self._random.choice([0, payload])) + data[HEADER_BYTES:]

    def splice(self, data: bytes) -> bytes:
        """Go on in the middle of another frame."""
        other = self.pick()
        return self.cut(data) + other[self._random.randrange(len(other)) :]

    def control(self, data: bytes) -> bytes:
        """Break the message under a header that fits it."""
        way = self._random.choice([self.flip, self.insert, self.remove, self.splice])
        control = way(data[HEADER_BYTES:])
        return pack_header(max(len(control), 1), 0) + control

    def noise(self, data: bytes) -> bytes:
        return self._random.randbytes(len(data))


@contextmanager
def replayable(number: int, data: bytes) -> Iterator[None]:
    """Say which frame it was when anything but a refusal happens."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - of any kind
        pytest.fail(f"seed {SEED}, frame {number}, {data.hex()}: {type(error).__name__}: {error}")


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """No frame makes anybody take more memory than messages may have."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


SAMPLES = [frame(message) for message, _ in GOLDEN] + [frame(Push(1), bytes(20)), frame(Put("master"), bytes(20))]


def test_enough_frames_are_broken() -> None:
    assert PURE + SOCKET + SERVED >= 100_000
    mutate = Mutator(SAMPLES, SEED)
    assert sum(mutate() in SAMPLES for _ in range(1000)) < 20


def test_broken_bytes_are_refused_or_a_message() -> None:
    mutate = Mutator(SAMPLES, SEED)
    understood = 0
    for number in range(PURE):
        data = mutate()
        with replayable(number, data):
            understood += read(data) is not None
    assert PURE // 20 < understood < PURE // 2  # neither all nonsense nor all harmless


def read(data: bytes) -> AnyMessage | None:
    """Return the message that a frame holds; None when it is refused or ends early."""
    if len(data) < HEADER_BYTES:
        return None
    try:
        control_bytes, payload_bytes = unpack_header(data)
        assert 0 < control_bytes <= _limits.CONTROL_BYTES
        assert payload_bytes <= _limits.PAYLOAD_BYTES
        message = decode(data[HEADER_BYTES : HEADER_BYTES + control_bytes])
    except ProtocolError:
        return None
    assert type(message) in KINDS
    assert encode(decode(encode(message))) == encode(message)
    return message


def small(message: AnyMessage, size: int) -> memoryview:
    """A sink that knows what it expects, as every real one."""
    if size > 64:
        raise ProtocolError(f"Expected at most 64 bytes, got {size}.")
    return memoryview(bytearray(size))


def test_broken_streams_are_refused_or_messages() -> None:
    mutate = Mutator(SAMPLES, SEED + 1)
    for number in range(SOCKET):
        data = mutate()
        ours, theirs = socket.socketpair()
        with replayable(number, data), closing(SocketConnection(ours)) as connection, theirs:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            try:
                for _ in range(len(data) // HEADER_BYTES + 1):
                    assert isinstance(connection.receive(small).message, KINDS)
                pytest.fail("more messages than bytes")
            except (ProtocolError, PeerLostError):
                pass


# A server that is in use.

GREETINGS: dict[str, list[bytes]] = {
    "stranger": [],
    "worker": [frame(Register(SPECS, SGD)), frame(Attach(share=False))],
    "data": [frame(Attach(share=True))],
    "table": [frame(Room(0, 4096, False)), frame(Room(1, 4096, True))],
    "observer": [],
    "beat": [],
    "server": [],
    "coordinator": [],
}
ROW = hw.optim.Adagrad(lr=0.5)
ROW_SCALARS = tuple(ROW.scalars().values())
#: What workers and readers say.
REQUESTS: list[tuple[AnyMessage, bytes]] = [
    (Register(SPECS, SGD), b""),
    (Register((TensorSpec("w", (1 << 62, 1 << 62), "float32"),), SGD), b""),
    (Initialised(3, (1,), {"key": b"\x01"}), b""),
    (Attach(share=False), b""),
    (Attach(share=True), b""),
    (Sides(0), b""),
    (Sides(-3), b""),
    (Push(0), bytes(64)),
    (Push(0), b""),
    (Seal(0, 1.0, SCALARS, b"", pushes=True, pull="sent"), bytes(64)),
    (Seal(0, 1.0, SCALARS, b"\x80", pushes=False, pull="own"), b""),
    (Seal(0, 0.0, SCALARS), b""),
    (Pull("parameters"), b""),
    (Pull("master"), b""),
    (Pull("parameters", own=True), b""),
    (Put("master"), bytes(64)),
    (Put("parameters"), bytes(64)),
    (Report({"loss": 1.0}), b""),
    (StateSet("key", b"\x01"), b""),
    (StateGet(), b""),
    (StatsGet(), b""),
    (Hold(), b""),
    (Resume(), b""),
    (MakeRoom(), b""),
    (SetAside(), b""),
    (Pull("aside"), b""),
    (Release(), b""),
    (Leave(), b""),
    (LeaseTake(DataSpec("data", 9, 1, 1), 0, False), b""),
    (LeaseTake(DataSpec("data", 9, 1, 1), 5, True), b""),
    (LeaseTake(DataSpec("other", 1 << 62, 1 << 62, 1 << 62, 1 << 62), 0, True), b""),
    (Seal(0, 0.0, SCALARS, used=(("data", 1),)), b""),
    (Declare("items", 2), b""),
    (
        Declare("others", 3, ROW, hw.Normal(0.5), -1, RowPolicy(admit_after=2, expire_steps=3, budget_bytes=1 << 20)),
        b"",
    ),
]
#: And workers on their connections for tables, number 0 being there.
TABLE_REQUESTS: list[tuple[AnyMessage, bytes]] = [
    (Room(0, 4096, True), b""),
    (Room(2, 1 << 36, False), b""),
    (PullRows(0, 0, 3, True), bytes(24)),
    (PullRows(0, 1, 3, False), b""),
    (PullRows(1, 0, 1 << 60, False), bytes(24)),
    (WarmRows(0, 1, 3), b""),
    (PushRows(0, 0, -1, 1, ROW_SCALARS), b"\x07" * 8 + bytes(batch_bytes(1, 2) - 8)),
    (PushRows(0, 1, -1, 0, ROW_SCALARS), b""),
    (PushRows(0, 2, -1, 1, ROW_SCALARS), bytes(batch_bytes(1, 2) - 1) + b"\xff"),
    (Track(0, "replica", True), b""),
    (Track(0, "replica", False), b""),
    (ChangesGet(0, "replica", 1 << 31), b""),
    (PageGet(0, 0, 65536), b""),
    (PageGet(0, -5, -5), b""),
    (PagePut(0, 1, 1), bytes(page_bytes(1, 4))),
    (PagePut(0, 1 << 60, 1), b""),
    (TableStatsGet(0), b""),
]


def ask(server: hw.Server, requests: list[bytes]) -> list[AnyMessage]:
    """Send bytes to the server, end the sending, and return every answer up to the end of the connection."""
    answers = []
    with closing(connect(Address.parse(server.address.unix), 5.0)) as connection:
        connection.set_timeout(20.0)
        with socket.socket(fileno=socket.dup(connection.fileno())) as raw:
            try:
                for data in requests:
                    raw.sendall(data)
                raw.shutdown(socket.SHUT_WR)
            except OSError:  # the server has refused already
                pass
        try:
            while True:
                answers.append(connection.receive(lambda _, size: memoryview(bytearray(size))).message)
        except PeerLostError:
            return answers


def serving_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "serve"}


def test_server_survives_broken_requests_of_everybody(tmp_path: Path) -> None:
    """Before the token and after it, in every role; then a worker that was there all along makes a step as ever."""
    mutate = Mutator([*(frame(*parts) for parts in REQUESTS), *SAMPLES], SEED + 2)
    mutate_tables = Mutator([frame(*parts) for parts in TABLE_REQUESTS], SEED + 3)
    with (
        hw.Server(Address("unix", str(tmp_path / "socket"), 0), token=TOKEN, consistency=hw.asp(), workers=1) as server,
        hw.connect(server.address.unix, token=TOKEN) as session,
    ):
        session.register({"w": np.ones(5, np.float32)}, SGD)
        table = session.table("items", 2, optimizer=ROW)
        before = serving_threads()
        for number in range(SERVED):
            role = list(GREETINGS)[number % len(GREETINGS)]
            breaks = mutate_tables if role == "table" else mutate
            requests = [*(breaks.pick() for _ in range(number % 3)), breaks()]
            hello = [frame(Hello(TOKEN, role, number))] if role != "stranger" else []
            with replayable(number, b"".join(requests)):
                answers = ask(server, hello + GREETINGS[role] + requests)
                assert not any(isinstance(a, Failed) and a.error == "InternalError" for a in answers), answers
        for thread in serving_threads() - before:
            thread.join(20.0)
            assert not thread.is_alive()
        start = session.pull()["w"]
        session.step({"w": np.full(5, 2.0, np.float32)})
        np.testing.assert_array_equal(session.parameters["w"], start - 1.0)
        rows = table.pull([1, 2])
        table.push([1, 2], np.ones((2, 2), np.float32))
        assert (table.pull([1, 2]) < rows).all()
        assert np.isfinite(table.pull([0, int.from_bytes(b"\x07" * 8)])).all()
        assert sum(worker.live for worker in session.stats().workers) == 1
