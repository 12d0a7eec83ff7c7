"""One contract for every kind of connection; addresses; who may connect."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from headwater._errors import (
    AddressError,
    AuthenticationError,
    LayoutError,
    PeerLostError,
    ProtocolError,
    SettingError,
    UnreachableError,
    WaitTimeoutError,
)
from headwater._messages import AnyMessage, Done, Failed, Leave, Pull, Pulled, Push, Put, Report, encode
from headwater._transport import (
    Address,
    Connection,
    SocketConnection,
    check_user,
    connect,
    listen,
    memory_pair,
    request,
)
from headwater._wire import pack_header

LARGE = 9_000_001  # bytes: more than any socket's buffers, and no round number


class Pair(NamedTuple):
    """The two ends of a connection."""

    ours: Connection
    theirs: Connection


def socket_pair(address: Address) -> Pair:
    with closing(listen(address)) as listener:
        if address.kind == "tcp":
            address = address._replace(port=listener.getsockname()[1])
        ours = connect(address, 5.0)
        return Pair(ours, SocketConnection(listener.accept()[0]))


@pytest.fixture(params=["memory", "unix", "tcp"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    if request.param == "memory":
        made = Pair(*memory_pair())
    elif request.param == "unix":
        made = socket_pair(Address("unix", str(tmp_path / "socket"), 0))
    else:
        made = socket_pair(Address("tcp", "127.0.0.1", 0))
    for end in made:
        end.set_timeout(20.0)  # instead of hanging
    yield made
    for end in made:
        end.close()


class Background:
    """Runs a function beside the test; `result` waits for its end and returns, or raises, what it did."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._error: Exception | None = None
        try:
            self._value = self._function()
        except Exception as error:  # noqa: BLE001 - handed to the test
            self._error = error

    def result(self) -> Any:
        self._thread.join(20.0)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
        return self._value


class Sink:
    """Takes payloads, and notes what it was asked."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.asked: list[tuple[AnyMessage, int]] = []

    def __call__(self, message: AnyMessage, size: int) -> memoryview:
        self.asked.append((message, size))
        return memoryview(self.data)


def pattern(size: int) -> bytes:
    return bytes(range(251)) * (size // 251 + 1)


# The contract.


def test_messages_arrive_in_order_both_ways(pair: Pair) -> None:
    for end, other in (pair, pair[::-1]):
        for sequence in range(100):
            end.send(Push(sequence))
        assert [other.receive().message for _ in range(100)] == [Push(sequence) for sequence in range(100)]


@pytest.mark.parametrize("size", [1, 100, 1 << 14, (1 << 14) + 1, 1 << 16, LARGE])
def test_payload_goes_where_the_sink_says(pair: Pair, size: int) -> None:
    data = pattern(size)[:size]
    sender = Background(lambda: pair.theirs.send(Put("master"), memoryview(data)))
    sink = Sink(size)
    assert pair.ours.receive(sink).message == Put("master")
    sender.result()
    assert sink.asked == [(Put("master"), size)]
    assert sink.data == data


def test_empty_payload_asks_for_no_place(pair: Pair) -> None:
    pair.ours.send(Put("master"), memoryview(b""))
    sink = Sink(0)
    pair.theirs.receive(sink)
    assert sink.asked == []


def test_large_payloads_go_there_and_back(pair: Pair) -> None:
    data = pattern(LARGE)[:LARGE]

    def answer() -> None:
        for _ in range(3):
            sink = Sink(LARGE)
            pair.theirs.receive(sink)
            pair.theirs.send(Pulled(1), memoryview(sink.data))

    answering = Background(answer)
    for sequence in range(3):
        sink = Sink(LARGE)
        assert request(pair.ours, Push(sequence), sink, memoryview(data)).message == Pulled(1)
        assert sink.data == data
    answering.result()


def test_small_frames_and_payloads_follow_one_another_unmixed(pair: Pair) -> None:
    sizes = [0, 1, 70_000, 3, 0, 16_384, 200_000, 5]

    def send() -> None:
        for i, size in enumerate(sizes):
            pair.theirs.hold(Report({"i": float(i)}))
            pair.theirs.send(Push(i), memoryview(pattern(size)[i : i + size]) if size else None)

    sender = Background(send)
    for i, size in enumerate(sizes):
        assert pair.ours.receive().message == Report({"i": float(i)})
        sink = Sink(size)
        assert pair.ours.receive(sink).message == Push(i)
        assert sink.data == pattern(size)[i : i + size]
    sender.result()


def test_what_was_held_back_goes_before_what_is_sent(pair: Pair) -> None:
    pair.ours.hold(Push(1))
    pair.ours.hold(Push(2), memoryview(b"abc"))
    pair.ours.send(Push(3))
    sink = Sink(3)
    assert [pair.theirs.receive(sink).message for _ in range(3)] == [Push(1), Push(2), Push(3)]
    assert sink.data == b"abc"


def test_what_was_held_back_goes_on_flush(pair: Pair) -> None:
    pair.ours.hold(Push(1))
    pair.ours.flush()
    assert pair.theirs.receive().message == Push(1)


def test_what_was_held_back_goes_before_waiting(pair: Pair) -> None:
    def answer() -> AnyMessage:
        message = pair.theirs.receive().message
        pair.theirs.send(Done())
        return message

    answering = Background(answer)
    pair.ours.hold(Pull())
    assert pair.ours.receive().message == Done()
    assert answering.result() == Pull()


def test_answers_to_pipelined_requests_all_arrive(pair: Pair) -> None:
    """An end may keep answers back while further requests lie before it, but not for ever."""
    for sequence in range(50):
        pair.ours.send(Push(sequence))
    for sequence in range(50):
        assert pair.theirs.receive().message == Push(sequence)
        pair.theirs.send(Pulled(sequence))
    pair.theirs.set_timeout(0.01)
    with pytest.raises(WaitTimeoutError):
        pair.theirs.receive()
    assert [pair.ours.receive().message for _ in range(50)] == [Pulled(sequence) for sequence in range(50)]


def test_answer_may_begin_before_the_request_is_whole(pair: Pair) -> None:
    """Each end has only one thread, and far more is on its way than the sockets can hold."""
    there, back = Sink(LARGE), Sink(LARGE)
    sizes: list[int] = []

    def arrived(ready: int, size: int) -> None:
        if not sizes:
            pair.theirs.send_head(Pulled(1), size)
        pair.theirs.send_more(memoryview(there.data)[sum(sizes) : ready])
        sizes.append(ready - sum(sizes))

    def answer() -> AnyMessage:
        message = pair.theirs.receive(there, arrived=arrived).message
        pair.theirs.send(Done())
        return message

    answering = Background(answer)
    pair.ours.hold(Put("master"), memoryview(pattern(LARGE)[:LARGE]))
    assert pair.ours.receive(back).message == Pulled(1)
    assert pair.ours.receive().message == Done()
    assert answering.result() == Put("master")
    assert there.data == back.data == pattern(LARGE)[:LARGE]
    assert sum(sizes) == LARGE


def test_payload_that_nobody_expects_is_refused(pair: Pair) -> None:
    pair.ours.send(Done(), memoryview(b"abc"))
    with pytest.raises(ProtocolError, match=r"Expected Done without payload, got 3 bytes\."):
        pair.theirs.receive()


def test_error_of_the_sink_reaches_the_receiver(pair: Pair) -> None:
    def sink(message: AnyMessage, size: int) -> memoryview:
        raise LayoutError(f"Expected 8 bytes, got {size}.")

    pair.ours.send(Push(1), memoryview(b"abc"))
    with pytest.raises(LayoutError, match="Expected 8 bytes, got 3"):
        pair.theirs.receive(sink)


def test_wait_has_a_limit_and_goes_on_afterwards(pair: Pair) -> None:
    pair.ours.set_timeout(0.01)
    with pytest.raises(WaitTimeoutError, match="Expected an answer from"):
        pair.ours.receive()
    pair.theirs.send(Pulled(1))
    pair.ours.set_timeout(20.0)
    assert pair.ours.receive().message == Pulled(1)


def test_request_raises_what_the_peer_answers(pair: Pair) -> None:
    pair.theirs.send(Failed("SettingError", "Expected bsp."))
    with pytest.raises(SettingError, match=r"Expected bsp\."):
        request(pair.ours, Leave())
    assert pair.theirs.receive().message == Leave()


def test_close_wakes_the_peer_that_waits(pair: Pair) -> None:
    waiting = Background(pair.theirs.receive)
    pair.ours.close()
    with pytest.raises(PeerLostError, match="ended"):
        waiting.result()


def test_close_wakes_a_thread_that_waits_in_it(pair: Pair) -> None:
    is_near = threading.Event()

    def wait() -> None:
        is_near.set()
        pair.ours.receive()

    waiting = Background(wait)
    assert is_near.wait(20.0)
    pair.ours.close()
    with pytest.raises(PeerLostError):
        waiting.result()


def test_what_was_sent_before_the_end_still_arrives(pair: Pair) -> None:
    pair.ours.send(Push(1))
    pair.ours.send(Push(2))
    pair.ours.close()
    assert [pair.theirs.receive().message for _ in range(2)] == [Push(1), Push(2)]
    for _ in range(2):
        with pytest.raises(PeerLostError):
            pair.theirs.receive()


def test_nothing_can_be_sent_once_the_end_is_known(pair: Pair) -> None:
    pair.ours.close()
    with pytest.raises(PeerLostError):
        pair.theirs.receive()
    with pytest.raises(PeerLostError):
        pair.theirs.send(Push(1))


def test_closed_connection_says_so_and_closes_twice(pair: Pair) -> None:
    pair.ours.close()
    pair.ours.close()
    with pytest.raises(PeerLostError):
        pair.ours.send(Push(1))
    with pytest.raises(PeerLostError):
        pair.ours.send(Put("master"), memoryview(bytes(100_000)))
    with pytest.raises(PeerLostError):
        pair.ours.receive()
    pair.ours.set_timeout(1.0)


def memory_file(content: bytes) -> int:
    fd = os.memfd_create("headwater-test")
    os.write(fd, content)
    return fd


def test_descriptors_travel_within_a_machine(pair: Pair) -> None:
    if not pair.ours.can_share:
        assert not pair.theirs.can_share
        return
    fds = [memory_file(b"one"), memory_file(b"two")]
    pair.ours.send(Done(), fds=fds)
    for fd in fds:
        os.close(fd)
    received = pair.theirs.receive(with_fds=True)
    assert received.message == Done()
    assert [os.pread(fd, 9, 0) for fd in received.fds] == [b"one", b"two"]
    for fd in received.fds:
        os.close(fd)
    pair.ours.send(Done())
    assert pair.theirs.receive(with_fds=True).fds == ()


@pytest.mark.parametrize("is_read", [True, False])
def test_descriptors_that_nobody_takes_are_closed(pair: Pair, is_read: bool) -> None:
    """The fixture that looks for what a test leaves behind would find them."""
    if pair.ours.can_share:
        fd = memory_file(b"one")
        pair.ours.send(Done(), fds=[fd])
        os.close(fd)
        if is_read:
            assert pair.theirs.receive().fds == ()
        pair.theirs.close()


# What only sockets can do to one another.


@pytest.fixture(params=[socket.AF_UNIX, socket.AF_INET])
def raw(request: pytest.FixtureRequest) -> Iterator[tuple[SocketConnection, socket.socket]]:
    """A connection whose peer is a bare socket."""
    if request.param == socket.AF_UNIX:
        one, two = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            one = socket.create_connection(listener.getsockname())
            two, _ = listener.accept()
    connection = SocketConnection(one)
    connection.set_timeout(20.0)
    yield connection, two
    connection.close()
    two.close()


def frame(message: AnyMessage, payload_bytes: int = 0) -> bytes:
    control = encode(message)
    return pack_header(len(control), payload_bytes) + control


def test_frame_may_come_byte_by_byte(raw: tuple[SocketConnection, socket.socket]) -> None:
    connection, peer = raw
    sender = Background(lambda: [peer.send(bytes([byte])) for byte in frame(Push(70_000)) * 2])
    assert [connection.receive().message for _ in range(2)] == [Push(70_000)] * 2
    sender.result()


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 20])
def test_wait_that_ends_within_a_frame_goes_on_afterwards(
    raw: tuple[SocketConnection, socket.socket], cut: int
) -> None:
    connection, peer = raw
    data = frame(Push(70_000))
    peer.sendall(data[:cut])
    connection.set_timeout(0.01)
    for _ in range(2):
        with pytest.raises(WaitTimeoutError):
            connection.receive()
    peer.sendall(data[cut:])
    connection.set_timeout(20.0)
    assert connection.receive().message == Push(70_000)


def test_wait_that_ends_within_a_payload_ends_the_connection(raw: tuple[SocketConnection, socket.socket]) -> None:
    connection, peer = raw
    peer.sendall(frame(Push(1), 10) + b"12345")
    connection.set_timeout(0.01)
    with pytest.raises(PeerLostError):
        connection.receive(Sink(10))
    with pytest.raises(PeerLostError):
        connection.receive(Sink(10))


def test_death_within_a_frame_is_the_end(raw: tuple[SocketConnection, socket.socket]) -> None:
    connection, peer = raw
    peer.sendall(frame(Push(1))[:-1])
    peer.close()
    with pytest.raises(PeerLostError):
        connection.receive()


def test_death_within_a_payload_says_how_far_it_came(raw: tuple[SocketConnection, socket.socket]) -> None:
    connection, peer = raw
    peer.sendall(frame(Push(1), 10) + b"12345")
    peer.close()
    with pytest.raises(PeerLostError, match="after 5 of 10 payload bytes"):
        connection.receive(Sink(10))


def test_reset_is_the_end(raw: tuple[SocketConnection, socket.socket]) -> None:
    connection, peer = raw
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    with pytest.raises(PeerLostError):
        connection.receive()


def test_wait_has_a_limit_where_neither_way_moves(raw: tuple[SocketConnection, socket.socket]) -> None:
    connection, peer = raw
    connection.set_timeout(0.05)
    connection.hold(Put("master"), memoryview(bytes(LARGE)))
    with pytest.raises(WaitTimeoutError):
        connection.receive()
    rest = Background(
        lambda: len(peer.recv(LARGE, socket.MSG_WAITALL))
    )  # and what was not sent yet goes with the next wait
    peer.sendall(frame(Done()))
    connection.set_timeout(20.0)
    assert connection.receive().message == Done()
    connection.flush()
    assert rest.result() == LARGE


def test_what_was_held_back_is_lost_with_the_connection(raw: tuple[SocketConnection, socket.socket]) -> None:
    connection, _ = raw
    connection.hold(Put("master"), memoryview(bytes(LARGE)))
    connection.close()
    with pytest.raises(PeerLostError):
        connection.receive()


def test_payload_may_be_reused_after_send(raw: tuple[SocketConnection, socket.socket]) -> None:
    """Also where the peer's next request has come already, and small frames are kept back."""
    connection, peer = raw
    peer.sendall(frame(Pull()) + frame(Pull()))
    connection.receive()
    data = bytearray(LARGE)
    reading = Background(lambda: peer.recv(LARGE, socket.MSG_WAITALL))
    connection.send(Put("master"), memoryview(data))
    data[:] = b"x" * LARGE
    assert b"x" not in reading.result()[len(frame(Put("master"))) :]


def test_death_while_sending_is_the_end(raw: tuple[SocketConnection, socket.socket]) -> None:
    connection, peer = raw
    sending = Background(lambda: connection.send(Put("master"), memoryview(bytes(LARGE))))
    assert peer.recv(16)
    peer.close()
    with pytest.raises(PeerLostError):
        sending.result()


def test_large_control_message_is_received_whole(raw: tuple[SocketConnection, socket.socket]) -> None:
    connection, peer = raw
    message = Put("x" * 300_000)
    sender = Background(lambda: peer.sendall(frame(Push(1)) + frame(message) + frame(Push(2))))
    assert [connection.receive().message for _ in range(3)] == [Push(1), message, Push(2)]
    sender.result()


def test_dropping_a_copy_leaves_the_connection_alive(raw: tuple[SocketConnection, socket.socket]) -> None:
    """What a forked child does with its parent's connections."""
    connection, peer = raw
    copy = SocketConnection(socket.socket(fileno=os.dup(connection.fileno())))
    copy.abandon()
    peer.sendall(frame(Push(1)))
    assert connection.receive().message == Push(1)


# Addresses.


@pytest.mark.parametrize(
    ("text", "address", "is_local"),
    [
        ("tcp://127.0.0.1:7077", Address("tcp", "127.0.0.1", 7077), True),
        ("tcp://localhost:0", Address("tcp", "localhost", 0), True),
        ("tcp://[::1]:7077", Address("tcp", "::1", 7077), True),
        ("tcp://10.0.0.5:7077", Address("tcp", "10.0.0.5", 7077), False),
        ("tcp://0.0.0.0:7077", Address("tcp", "0.0.0.0", 7077), False),
        ("tcp://[fe80::2]:1", Address("tcp", "fe80::2", 1), False),
        ("unix:///run/headwater.sock", Address("unix", "/run/headwater.sock", 0), True),
    ],
)
def test_address_reads_as_it_prints(text: str, address: Address, is_local: bool) -> None:
    assert Address.parse(text) == address
    assert str(address) == text
    assert address.is_local is is_local


def test_address_without_a_kind_is_tcp() -> None:
    assert Address.parse("host:7077") == Address("tcp", "host", 7077)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "tcp://",
        "tcp://host",
        "tcp://:7077",
        "tcp://host:x",
        "tcp://host:65536",
        "tcp://host:-1",
        "tcp://[::1:7077",
        "unix://",
        "unix://relative/path",
        "http://host:80",
    ],
)
def test_wrong_address_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="Expected an address such as tcp://"):
        Address.parse(text)


@pytest.fixture(params=["unix", "tcp"])
def deaf(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Address]:
    """An address at which nobody listens."""
    if request.param == "unix":
        yield Address("unix", str(tmp_path / "socket"), 0)
        return
    with socket.socket() as sock:  # bound, so that nobody else listens there either
        sock.bind(("127.0.0.1", 0))
        yield Address("tcp", *sock.getsockname())


@pytest.mark.parametrize("timeout_s", [0.0, 0.2])
def test_nobody_there_is_said_in_time(deaf: Address, timeout_s: float) -> None:
    start = time.monotonic()
    with pytest.raises(UnreachableError, match=f"Expected a server at {deaf}, got: .*, tried for {timeout_s:g} s"):
        connect(deaf, timeout_s)
    assert time.monotonic() - start < timeout_s + 2.0


def test_server_that_is_still_starting_is_waited_for(tmp_path: Path) -> None:
    address = Address("unix", str(tmp_path / "socket"), 0)
    connecting = Background(lambda: connect(address, 20.0))
    with closing(listen(address)), closing(connecting.result()) as connection:
        assert connection.peer == str(address)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_address_in_use_is_said(kind: str, tmp_path: Path) -> None:
    address = Address("unix", str(tmp_path / "socket"), 0) if kind == "unix" else Address("tcp", "127.0.0.1", 0)
    with closing(listen(address)) as first:
        if kind == "tcp":
            address = address._replace(port=first.getsockname()[1])
        with pytest.raises(AddressError, match=f"Cannot listen on {address}: .*already in use.*Port 0 takes any"):
            listen(address)


@pytest.mark.parametrize("text", ["tcp://203.0.113.1:0", "unix:///no/such/folder/socket", f"unix:///tmp/{'x' * 200}"])
def test_impossible_address_is_said(text: str) -> None:
    with pytest.raises(AddressError, match="Cannot listen on"):
        listen(Address.parse(text))


def test_unix_socket_is_its_owners_alone(tmp_path: Path) -> None:
    address = Address("unix", str(tmp_path / "socket"), 0)
    mask = os.umask(0)
    try:
        with closing(listen(address)):
            mode = (tmp_path / "socket").stat().st_mode
    finally:
        after = os.umask(mask)
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert after == 0  # listening changes the mask for a moment only


def test_peer_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    one, two = socket.socketpair()
    with one, two:
        check_user(one)
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        with pytest.raises(AuthenticationError, match=f"Expected a peer of user {user + 1}, got user {user}"):
            check_user(one)


def test_peer_over_tcp_has_no_user(
    raw: tuple[SocketConnection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, peer = raw
    if peer.family == socket.AF_INET:
        monkeypatch.setattr(os, "geteuid", lambda: -1)
        check_user(peer)
