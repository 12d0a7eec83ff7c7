"""Bad input: one clear error that says what was expected, what came and what to do; nothing is lost and nobody else is disturbed."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import TOKEN, Arrays, Job, assert_equal_bits, read_all, start_job

import headwater as hw
from headwater import _limits, errors
from headwater._messages import Hello, Push, Seal, encode
from headwater._transport import Address, SocketConnection, connect
from headwater._wire import VERSION, pack_header

WORKERS = Path(__file__).parent / "workers"
ONES = {"w": np.ones((4, 3), np.float32)}
SGD = hw.optim.SGD(lr=1.0)

servers = pytest.mark.parametrize("servers", [1, 2])


def register(session: hw.Session) -> None:
    session.register({"w": np.zeros((4, 3), np.float32), "v": np.zeros(20_000, np.float32)}, SGD)


def step_ones(session: hw.Session) -> None:
    session.step(ONES)


def value(session: hw.Session) -> float:
    """Return the one value that w holds everywhere."""
    w = session.pull(["w"])["w"]
    assert (w == w[0, 0]).all()
    return float(w[0, 0])


def run_pair(job: Job, faulty: Callable[[hw.Session], None], steps: int = 3) -> None:
    """Run a worker that errs beside one that only steps, and show that each makes its steps."""

    def work(session: hw.Session) -> None:
        register(session)
        for _ in range(steps):
            if session.index == 0:
                faulty(session)
            else:
                step_ones(session)
        assert session.clock == steps

    job.run(work)


# Gradients that do not fit.


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (
            {"w": np.ones((3, 4), np.float32)},
            r"Expected a gradient of float32 \(4, 3\), got float32 \(3, 4\) — tensor 'w'",
        ),
        ({"w": np.ones((4, 3))}, r"Expected a gradient of float32 \(4, 3\), got float64 \(4, 3\) — tensor 'w', push 0"),
        ({"u": np.ones(3, np.float32)}, "Expected a gradient for a registered name, got 'u': registered are 'w', 'v'"),
    ],
)
@servers
def test_a_gradient_of_the_wrong_shape_dtype_or_name_is_refused_before_anything_is_sent(
    gradients: Arrays, message: str, servers: int
) -> None:
    def faulty(session: hw.Session) -> None:
        if session.clock == 0:
            with pytest.raises(errors.LayoutError, match=message):
                session.step({"v": np.full(20_000, np.nan, np.float32), **gradients})
        step_ones(session)

    with start_job(workers=2, servers=servers) as job:
        run_pair(job, faulty)
        with job.connect(role="observer") as reader:
            assert reader.stats().refused == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@servers
def test_a_gradient_that_is_not_finite_counts_nowhere_and_closes_the_clock(
    bad: float, clip_norm: float | None, transport: str, servers: int
) -> None:
    """The bad element lies in the last block, on the last server; the first server has then already applied its part."""
    start = {"first": np.zeros(20_000, np.float32), "last": np.zeros(20_000, np.float32)}

    def work(session: hw.Session) -> Arrays:
        session.register(start, hw.optim.Adam(lr=0.5, clip_norm=clip_norm))
        gradients = {name: np.ones(20_000, np.float32) for name in start}
        session.step(gradients)
        if session.index == 0:
            gradients["last"][19_999] = bad
            with pytest.raises(
                errors.NonFiniteError, match=r"'last' \(20000,\) at element 19999 — worker 0 .*, push 1"
            ):
                session.step(gradients)
        else:
            session.step({name: np.full(20_000, 3.0, np.float32) for name in start})
            assert session.accepted == 1
        assert session.clock == 2
        return {name: array.copy() for name, array in session.parameters.items()}

    with hw.connect() as alone:
        alone.register(start, hw.optim.Adam(lr=0.5, clip_norm=clip_norm))
        for gradient in (1.0, 3.0):
            alone.step({name: np.full(20_000, gradient, np.float32) for name in start})
        expected = alone.pull()
    with start_job(workers=2, servers=servers, transport=transport) as job:
        for found in job.run(work):
            assert_equal_bits(found, expected)
        with job.connect(role="observer") as reader:
            stats = reader.stats()
    assert [stats.refused, *(worker.refused for worker in stats.workers)] == [1, 1, 0]


@servers
def test_a_commit_of_which_every_push_is_bad_leaves_the_state_as_it_was(servers: int) -> None:
    def work(session: hw.Session) -> None:
        session.register({"w": np.zeros(40_000, np.float32)}, hw.optim.Adam())
        session.step({"w": np.ones(40_000, np.float32)})
        before = read_all(session)
        with pytest.raises(errors.NonFiniteError, match="skip the step"):
            session.step({"w": np.full(40_000, np.nan, np.float32)})
        assert session.clock == 2
        assert_equal_bits(read_all(session), before)

    with start_job(workers=2, servers=servers) as job:
        job.run(work)


@pytest.mark.parametrize("consistency", [hw.asp(), hw.ssp(1)], ids=str)
@servers
def test_without_a_barrier_only_the_bad_pushes_are_lost(consistency: hw.Consistency, servers: int) -> None:
    def work(session: hw.Session) -> None:
        register(session)
        start = session.clock  # a late one begins where the slowest is
        for step in range(20):
            if session.index == 0 and step % 4 == 1:
                with pytest.raises(errors.NonFiniteError):
                    session.step({"v": np.full(20_000, np.inf, np.float32), **ONES})
            else:
                step_ones(session)
        assert session.clock == start + 20

    with start_job(workers=3, servers=servers, consistency=consistency) as job:
        job.run(work)
        with job.connect() as late, job.connect(role="observer") as reader:
            register(late)
            assert value(late) == -55.0
            stats = reader.stats()
    assert [stats.refused, stats.commit] == [5, 60]


def test_a_gradient_outside_the_push_is_not_looked_at() -> None:
    with hw.connect() as session:
        register(session)
        session.gradients["v"][:] = np.nan
        step_ones(session)
        assert value(session) == -1.0


# Scalars and weights.


@servers
def test_workers_that_disagree_in_the_learning_rate_are_both_named(servers: int) -> None:
    refused = []

    def work(session: hw.Session) -> None:
        register(session)
        try:
            session.step(ONES, scalars={"lr": 0.5 if session.index else 0.25})
        except errors.DisagreementError as error:
            refused.append((session.index, str(error)))
        assert session.clock == 1
        session.step(ONES, scalars={"lr": 0.5})
        assert session.clock == 2

    with start_job(workers=3, servers=servers) as job:
        job.run(work)
        with job.connect() as late:
            register(late)
            odd = [index for index, _ in refused]  # whichever came second disagrees
            assert odd in ([0], [1, 2], [2, 1])
            assert value(late) == -0.5 - (0.5 if odd == [0] else 0.25)
    for index, message in refused:
        assert set(map(int, re.findall(r"worker (\d)", message))) == {0, index} or 0 in odd
        assert "0.25" in message
        assert "0.5" in message
        assert "same schedule" in message


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_weight_that_makes_no_sense_is_refused(weight: float, transport: str) -> None:
    def faulty(session: hw.Session) -> None:
        with pytest.raises(errors.SettingError, match="Expected a weight of 0 or more, got"):
            session.step(ONES, weight=weight)
        step_ones(session)

    with start_job(workers=2, transport=transport) as job:
        run_pair(job, faulty)


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ({"rate": 0.1}, "Expected lr, momentum, dampening, weight_decay for 1 parameter groups, got"),
        ([{"lr": 0.1}] * 2, "for 1 parameter groups"),
        ({"lr": -0.1}, "Expected lr 0 or more, got -0.1"),
        ({"lr": np.nan}, "Expected lr 0 or more, got nan"),
        ({"momentum": 0.5}, "Expected momentum to stay 0"),
    ],
)
def test_scalars_that_make_no_sense_are_refused_and_not_kept(scalars: Any, message: str) -> None:
    def faulty(session: hw.Session) -> None:
        with pytest.raises(errors.SettingError, match=message):
            session.step(ONES, scalars=scalars)
        step_ones(session)

    with start_job(workers=2) as job:
        run_pair(job, faulty)


# Workers that do not belong to the job.


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"w": (4, 3, "float32")}, r"tensor 'v' \(20000,\) is missing"),
        ({"w": (4, 3, "float32"), "v": (20_000, "float32"), "u": (1, "float32")}, r"tensor 'u' \(1,\) is unknown"),
        ({"w": (4, 3, "float64"), "v": (20_000, "float32")}, r"'w': expected float32 \(4, 3\).*, got float64 \(4, 3\)"),
        ({"w": (3, 4, "float32"), "v": (20_000, "float32")}, r"'w': expected float32 \(4, 3\).*, got float32 \(3, 4\)"),
        ({"v": (20_000, "float32"), "w": (4, 3, "float32")}, "the tensors come in another order"),
    ],
)
def test_another_model_is_refused_by_its_first_difference(arrays: dict[str, Any], message: str) -> None:
    with start_job(workers=1) as job, job.connect() as first, job.connect() as second:
        register(first)
        with pytest.raises(errors.LayoutError, match=message):
            second.register({name: np.zeros(shape[:-1], shape[-1]) for name, shape in arrays.items()}, SGD)
        step_ones(first)
        first.close()  # else the other would wait for the end of its next step
        register(second)
        assert value(second) == -1.0


@pytest.mark.parametrize(
    "optimizer", [hw.optim.Adam(), hw.optim.SGD(momentum=0.9), hw.optim.SGD(clip_norm=1.0), hw.optim.SGD(maximize=True)]
)
def test_another_optimizer_is_refused(optimizer: hw.optim.AnyOptimizer) -> None:
    with start_job(workers=1) as job, job.connect() as first, job.connect() as second:
        register(first)
        with pytest.raises(errors.SettingError, match=r"Expected the job's optimizer SGD\(.*, got .*\("):
            second.register(first.pull(), optimizer)
        step_ones(first)


def test_another_consistency_or_number_of_workers_is_refused() -> None:
    with start_job(workers=1, consistency=hw.ssp(2)) as job, job.connect() as first:
        register(first)
        with pytest.raises(errors.SettingError, match=r"Expected consistency ssp:2, the job's, got bsp: leave it out"):
            job.connect(consistency=hw.bsp())
        with pytest.raises(errors.SettingError, match="Expected 1 workers, the job's number, got 5"):
            job.connect(workers=5)
        step_ones(first)


def test_a_workers_place_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_WORKER", "0")
    with start_job(workers=1) as job, job.connect() as first:
        register(first)
        with pytest.raises(errors.SettingError, match="Expected HEADWATER_WORKER to be free, got 0, which is worker 0"):
            job.connect()
        step_ones(first)


@pytest.mark.parametrize("token", ["", "another", "a töken"])
@pytest.mark.parametrize("role", ["worker", "observer", "server", "coordinator", "data", "beat"])
def test_a_peer_without_the_token_is_refused_on_every_kind_of_socket(token: str, role: str) -> None:
    with start_job(workers=1) as job, job.connect() as first:
        register(first)
        for address in (job.servers[0].address.tcp, job.servers[0].address.unix):
            with pytest.raises(errors.AuthenticationError, match="Expected the job's token, got another or none: set"):
                hw.connect(address, token=token, role=role)
        step_ones(first)


def test_a_second_registration_is_refused() -> None:
    with hw.connect() as session:
        register(session)
        with pytest.raises(errors.UsageError, match="Expected one registration per session, got another"):
            register(session)
        step_ones(session)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "Expected at least one tensor to register, got none"),
        ({"w": np.zeros(3, np.int64)}, "Expected one of float32, float64, bfloat16, float16, got int64 — tensor 'w'"),
        ({"w": np.zeros((2, 0), np.float32)}, r"Expected a tensor with elements, got shape \(2, 0\) — tensor 'w'"),
    ],
)
def test_tensors_that_make_no_sense_are_refused(arrays: Arrays, message: str) -> None:
    with hw.connect() as session:
        with pytest.raises(errors.LayoutError, match=message):
            session.register(arrays, SGD)
        register(session)
        step_ones(session)


# Bytes that are not this protocol.


def frame(control: bytes, payload_bytes: int = 0) -> bytes:
    return pack_header(len(control), payload_bytes) + control


HELLO = encode(Hello(TOKEN, "worker", 12345))
GARBAGE = {
    "random": np.random.default_rng(0).bytes(5000),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "version": struct.pack("<2sBBIQ", b"HW", 9, 0, len(HELLO), 0) + HELLO,
    "huge payload": struct.pack("<2sBBIQ", b"HW", VERSION, 0, len(HELLO), 1 << 60) + HELLO,
    "huge control": struct.pack("<2sBBIQ", b"HW", VERSION, 0, (1 << 32) - 1, 0) + HELLO,
    "no control": struct.pack("<2sBBIQ", b"HW", VERSION, 0, 0, 0),
    "not a message": frame(b"\xc1" * 20),
    "payload nobody asked for": frame(HELLO, 1 << 39) + bytes(1000),
    "not a greeting": frame(encode(Push(0))),
    "push before registration": frame(HELLO) + frame(encode(Push(0)), 1 << 39),
    "seal before registration": frame(HELLO) + frame(encode(Seal(0, 1.0, ((),)))),
    "truncated header": b"HW\x01",
    "truncated message": frame(HELLO)[:-3],
    "truncated payload": frame(HELLO) + frame(encode(Push(0)), 1000) + bytes(10),
}


def read_to_end(sock: socket.socket) -> bytes:
    """Return what the peer says until it ends the connection, by closing or by a reset."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            found += piece
    return found


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_garbage_ends_its_own_connection_and_nothing_else(kind: str, transport: str) -> None:
    with start_job(workers=1) as job, job.connect() as session:
        register(session)
        step_ones(session)
        address = job.servers[0].address
        with contextlib.closing(raw_socket(address.tcp if transport == "tcp" else address.unix)) as sock:
            sock.settimeout(30)
            with contextlib.suppress(ConnectionError):
                sock.sendall(GARBAGE[kind])
                sock.shutdown(socket.SHUT_WR)
            answer = read_to_end(sock)
        if not kind.startswith("truncated"):
            assert b"Expected" in answer
        step_ones(session)
        assert value(session) == -2.0


def raw_socket(text: str) -> socket.socket:
    address = Address.parse(text)
    if address.kind == "tcp":
        return socket.create_connection((address.host, address.port))
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(address.host)
    return sock


def test_a_connection_that_never_says_hello_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "HANDSHAKE_S", 0.1)
    with start_job(workers=1) as job, contextlib.closing(raw_socket(job.address)) as sock:
        sock.settimeout(30)
        read_to_end(sock)


def test_a_push_of_the_wrong_size_is_refused_before_memory_is_taken() -> None:
    with start_job(workers=1) as job, job.connect() as session:
        register(session)
        connection = connect(Address.parse(job.address))
        with contextlib.closing(connection):
            connection.send(Hello(TOKEN, "data", session._peers.hello.identity))
            connection.receive()
            connection.send_head(Push(0), 1 << 39)
            connection.flush()
            answer = connection.receive().message
        assert "Expected a push of" in str(answer)
        step_ones(session)


@contextlib.contextmanager
def false_server(answer: bytes) -> Iterator[str]:
    """Listen, and answer the first greeting with these bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                sock.sendall(answer)
                sock.shutdown(socket.SHUT_WR)
                read_to_end(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(30)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "got bytes beginning b'HT': is this another program's port"),
        (GARBAGE["version"], "Expected protocol version 2, got 9: install the same headwater on workers and servers"),
        (GARBAGE["huge payload"], "got a header promising .* and 1152921504606846976"),
        (frame(HELLO), "Expected Welcome, got Hello"),
        (b"", "ended"),
    ],
)
def test_a_server_of_another_kind_or_version_is_told_apart(answer: bytes, message: str) -> None:
    with false_server(answer) as address, pytest.raises(errors.PeerError, match=message):
        hw.connect(address, token=TOKEN, transport="tcp")


def test_a_client_of_another_version_learns_which_one_is_expected() -> None:
    with start_job(workers=1) as job, contextlib.closing(raw_socket(job.address)) as sock:
        sock.sendall(GARBAGE["version"])
        connection = SocketConnection(sock)
        assert "Expected protocol version 2, got 9: install the same headwater" in str(connection.receive().message)


# Places.


def test_a_port_in_use_is_named() -> None:
    with start_job() as job:
        with pytest.raises(errors.AddressError, match=rf"Cannot listen on {job.address}: .*Is another server running"):
            hw.Server(Address.parse(job.address), token=TOKEN)
        done = subprocess.run(
            [sys.executable, "-m", "headwater", "server", "--listen", job.address],
            env=os.environ | {"HEADWATER_TOKEN": TOKEN},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"headwater: Cannot listen on {job.address}")
    assert "Traceback" not in done.stderr


def test_an_unreachable_server_is_named_and_so_is_the_time_it_was_tried(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for address in (f"tcp://127.0.0.1:{port}", f"unix://{tmp_path}/none"):
        with pytest.raises(errors.UnreachableError, match=rf"Expected a server at {address}, got: .*, tried for 0.1 s"):
            hw.connect(address, token=TOKEN, timeout_s=0.1)


def test_a_server_that_ends_is_noticed_at_the_next_step() -> None:
    with start_job() as job, job.connect() as session:
        register(session)
        job.servers[0].close()
        with pytest.raises(errors.PeerLostError, match="ended"):
            step_ones(session)
        with pytest.raises((errors.PeerLostError, errors.ClosedError)):
            step_ones(session)


def test_a_further_server_that_ends_fails_the_job_by_its_name() -> None:
    with start_job(servers=2) as job, job.connect() as session:
        session.register({"w": np.zeros(40_000, np.float32)}, SGD)
        job.servers[1].close()
        with pytest.raises(errors.PeerLostError):
            session.step({"w": np.ones(40_000, np.float32)})


# Workers that are waited for.


@servers
def test_a_worker_that_never_arrives_is_named(monkeypatch: pytest.MonkeyPatch, servers: int) -> None:
    monkeypatch.setattr(_limits, "REPORT_WAIT_S", 0.05)
    with start_job(workers=3, servers=servers) as job, job.connect(timeout_s=0.2) as first, job.connect() as second:
        register(first)
        register(second)
        with pytest.raises(errors.WaitTimeoutError) as caught:
            step_ones(first)
        assert "within 0.2 s, got none: waiting for worker 1" in str(caught.value)
        assert "worker 2, which has not come yet, at clock 0. Start what is missing" in str(caught.value)


def test_a_server_that_never_arrives_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "REPORT_WAIT_S", 0.05)
    with (
        hw.Server(Address("tcp", "127.0.0.1", 0), token=TOKEN, servers=2) as server,
        pytest.raises(errors.WaitTimeoutError, match=r"within 0.2 s, got none: waiting for server 1, at clock 0"),
    ):
        hw.connect(server.address.tcp, token=TOKEN, timeout_s=0.2)


def test_one_server_too_many_is_refused() -> None:
    with start_job(servers=2) as job, pytest.raises(errors.SettingError, match="Expected 2 servers in this job, got"):
        hw.Server(Address("tcp", "127.0.0.1", 0), token=TOKEN, join=Address.parse(job.address))


def test_a_slow_worker_is_reported_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_limits, "REPORT_WAIT_S", 0.05)
    reported = threading.Event()

    def note(_: logging.LogRecord) -> bool:
        reported.set()
        return True

    caplog.handler.addFilter(note)

    def faulty(session: hw.Session) -> None:
        assert reported.wait(30)
        step_ones(session)

    with start_job(workers=2) as job:
        run_pair(job, faulty, steps=1)
    assert re.match(r"waiting for worker 0 \(.*\), 0 s so far", caplog.messages[0])


def test_a_joiner_waits_for_the_step_that_others_are_in_and_they_do_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_limits, "REPORT_WAIT_S", 0.05)
    is_reported, has_joined = threading.Event(), threading.Event()

    def note(_: logging.LogRecord) -> bool:
        is_reported.set()
        return True

    caplog.handler.addFilter(note)

    def join(job: Job) -> tuple[int, int]:
        with job.connect() as session:
            register(session)
            clock = session.clock
            has_joined.set()
            step_ones(session)
            return clock, session.accepted

    with start_job(workers=1) as job, job.connect() as session, ThreadPoolExecutor(1) as pool:
        register(session)
        step_ones(session)
        joiner = pool.submit(join, job)
        assert is_reported.wait(30)
        step_ones(session)
        assert (session.clock, session.accepted) == (2, 1)
        assert has_joined.wait(30)
        step_ones(session)
        assert (session.clock, session.accepted) == (3, 2)
        assert joiner.result(30) == (2, 2)
    assert re.match(r"waiting for worker 0 \(.*\), 0 s so far", caplog.messages[0])


def test_the_server_keeps_no_connection_of_a_worker_that_has_left() -> None:
    """They hold large buffers, and workers may come and go for weeks; what is kept is for the statistics."""
    with start_job(workers=1) as job:
        for _ in range(3):
            with job.connect() as session:
                register(session)
                step_ones(session)
        coordinator = job.servers[0].coordinator
        assert coordinator is not None
        assert [worker.connections for worker in coordinator._workers.values()] == [[], [], []]


@servers
def test_a_worker_that_has_ended_its_data_is_not_waited_for(servers: int) -> None:
    def work(session: hw.Session) -> None:
        register(session)
        for _ in range(2 + 3 * session.index):
            step_ones(session)

    with start_job(workers=3, servers=servers) as job:
        job.run(work)
        with job.connect() as late:
            register(late)
            assert late.clock == 8
            assert value(late) == -8.0


def test_a_sealed_push_counts_though_its_worker_leaves() -> None:
    def work(session: hw.Session) -> None:
        register(session)
        if session.index == 0:
            session.push(ONES)
            session.close()
        else:
            step_ones(session)
            assert session.accepted == 2
            assert value(session) == -1.0

    with start_job(workers=2) as job:
        job.run(work)


# A session that is used as it must not be.


def test_a_closed_session_says_so() -> None:
    session = hw.connect()
    register(session)
    session.close()
    session.close()
    verbs: list[Callable[[], object]] = [
        lambda: session.push(ONES),
        lambda: session.step(ONES),
        session.wait,
        session.pull,
        session.stats,
        lambda: session.save("nowhere"),
        lambda: session.state["x"],
        lambda: session.report(loss=1.0),
        lambda: session.gradients,
        lambda: session.parameters,
        lambda: register(session),
    ]
    for verb in verbs:
        with pytest.raises(errors.ClosedError, match="Expected an open session, got one that is closed"):
            verb()


def test_an_unregistered_session_says_what_is_missing(tmp_path: Path) -> None:
    with hw.connect() as session:
        verbs: list[Callable[[], object]] = [
            lambda: session.push(ONES),
            lambda: session.step(ONES),
            session.wait,
            session.pull,
            lambda: session.save(tmp_path / "saved"),
            lambda: session.gradients,
        ]
        for verb in verbs:
            with pytest.raises(errors.UsageError, match="registered parameters, got"):
                verb()
        register(session)
        step_ones(session)


def test_a_forked_child_is_told_to_connect_itself_and_the_parent_goes_on() -> None:
    done = subprocess.run(
        [sys.executable, str(WORKERS / "fork.py")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    child, parent = done.stdout.splitlines()
    assert child == (
        "ClosedError: Expected the session to be used in the process that made it, got a forked child: connect() there, "
        "or start DataLoader workers that only read data."
    )
    assert parent == "parent at clock 2"


def test_a_model_converted_after_construction_is_refused_by_parameter() -> None:
    for convert in (
        lambda model: model.to(torch.float64),
        lambda model: model.half(),
        lambda model: setattr(model.weight, "data", model.weight.detach().clone()),
    ):
        model = torch.nn.Linear(3, 2)
        with hw.connect() as session:
            optimizer = hw.torch.Optimizer(model, SGD, session=session)
            convert(model)
            with pytest.raises(errors.LayoutError, match=r"Expected parameter 'weight' in the session's memory as"):
                optimizer.step()


# Settings.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hw.ssp(-1), "Expected a staleness of 0 or more, for ssp only, got -1"),
        (lambda: hw.Consistency("lockstep"), "Expected consistency bsp, ssp or asp, got 'lockstep'"),
        (lambda: hw.Consistency("bsp", 2), "for ssp only, got 2 for bsp"),
        (lambda: hw.Consistency.parse("ssp"), "Expected ssp with its staleness, such as ssp:3, got ssp alone"),
        (lambda: hw.Consistency.parse("ssp:x"), "Expected bsp, asp or ssp:STALENESS such as ssp:3, got 'ssp:x'"),
        (lambda: hw.connect(transport="rdma"), "Expected transport auto, shm or tcp, got 'rdma'"),
        (lambda: hw.connect("http://localhost:1"), "tcp://"),
        (lambda: hw.connect("localhost"), "tcp://"),
        (lambda: hw.Server(workers=-1), "Expected up to 1024 workers and 1 to 256 servers, got -1 and 1"),
        (lambda: hw.Server(servers=0), "got 0 and 0"),
        (lambda: hw.Server(Address("tcp", "127.0.0.1", 0)), "Expected a token where a server listens, got none"),
        (lambda: hw.optim.SGD(lr=-1.0), "Expected lr 0 or more, got -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(errors.SettingError, match=message):
        call()


def test_environment_variables_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_WORKER", "first")
    with pytest.raises(errors.SettingError, match="Expected HEADWATER_WORKER to be a whole number"):
        hw.connect()


def test_shared_memory_where_there_is_none_is_refused() -> None:
    with start_job(workers=1) as job:
        far = job.servers[0].address
        assert job.servers[0].coordinator is not None
        (server,) = job.servers[0].coordinator._servers.here
        assert server is not None
        server.address = type(far)(far.tcp, far.unix, "another host")
        with (
            job.connect(transport="shm") as session,
            pytest.raises(errors.SettingError, match="transport='shm': leave"),
        ):
            register(session)


def test_a_dataset_smaller_than_the_job_is_refused() -> None:
    message = "at least one item for each of 3 workers, got a dataset of 2"
    with start_job(workers=3) as job, job.connect() as session, pytest.raises(errors.SettingError, match=message):
        session.shard([1, 2])


def test_pulling_an_unknown_name_is_refused() -> None:
    with hw.connect() as session:
        register(session)
        with pytest.raises(errors.LayoutError, match="Expected names that are registered, got 'u'"):
            session.pull(["w", "u"])


def test_too_large_a_state_is_refused_and_the_old_one_kept() -> None:
    with hw.connect() as session:
        session.state["kept"] = 1
        with pytest.raises(errors.SettingError, match="Expected a job state of at most 1048576 bytes, got"):
            session.state["huge"] = "x" * (1 << 20)
        assert dict(session.state) == {"kept": 1}


# Saved jobs.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with hw.connect() as session:
        register(session)
        step_ones(session)
        session.save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", ["job.json", "model-0.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "torn", "garbage"])
def test_a_damaged_save_is_refused_by_file(saved: Path, name: str, damage: str) -> None:
    file = saved / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5] if damage == "torn" else b"garbage")
    with hw.connect() as session:
        with pytest.raises(errors.StorageError, match=rf"Cannot read {file}"):
            session.load(saved)
        register(session)
        assert value(session) == 0.0


def test_a_save_of_another_model_or_optimizer_is_refused(saved: Path) -> None:
    for arrays, optimizer, message in (
        ({"u": np.zeros(3, np.float32)}, SGD, "this model's parameters, got other names"),
        (
            {"w": np.zeros((3, 4), np.float32), "v": np.zeros(20_000, np.float32)},
            SGD,
            r"saved for 'w', got float32 \(4, 3\)",
        ),
        (
            {"w": np.zeros((4, 3), np.float32), "v": np.zeros(20_000, np.float32)},
            hw.optim.Adam(),
            "saved state of Adam",
        ),
    ):
        with hw.connect() as session:
            session.load(saved)
            with pytest.raises(errors.StorageError, match=message):
                session.register(arrays, optimizer)


def test_loading_after_registration_is_refused(saved: Path) -> None:
    with hw.connect() as session:
        register(session)
        with pytest.raises(errors.UsageError, match=r"Expected load\(\) before parameters are registered"):
            session.load(saved)


def test_a_save_that_cannot_be_written_says_what_is_still_there(saved: Path) -> None:
    with hw.connect() as session:
        register(session)
        with pytest.raises(errors.StorageError, match=r"Cannot save to .*What was there before is still there"):
            session.save(saved / "job.json" / "inside")
