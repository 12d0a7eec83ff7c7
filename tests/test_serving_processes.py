"""`headwater serve` and `headwater promote` as people run them, with NVIDIA's client, and with clients that mean no good."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from headwater import _limits
from headwater._versions import Versions

PATIENCE_S = 60.0
TESTS = Path(__file__).parent
TOKEN = "a token for tests"
HEADWATER = [sys.executable, "-m", "headwater"]
#: The same with little patience.
HURRIED = [
    sys.executable,
    "-c",
    "from headwater import _cli, _limits; _limits.HEAD_S = _limits.BODY_S = 0.2; _cli.main()",
]


class Process:
    """A server of a Telling."""

    def __init__(self, store: Path, *options: str, command: Sequence[str] = HEADWATER) -> None:
        words = [*command, "serve", "--model", "served:build", "--store", str(store), "--name", "m", *options]
        environment = os.environ | {"HEADWATER_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        self.popen = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=TESTS)

    def wait(self) -> Process:
        """Return when it listens."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line.startswith("headwater serves http://127.0.0.1:"), line
        self.address = line.split("//")[1].split("/")[0]
        return self

    def infer(self) -> int:
        """Return the version that answers; raises what the client raises."""
        with client(self.address) as asking:
            return version_of(asking.infer("m", [x()]))

    def send(self, number: int) -> None:
        self.popen.send_signal(number)


@contextmanager
def running(store: Path, count: int, *options: str, command: Sequence[str] = HEADWATER) -> Iterator[list[Process]]:
    """Run servers; they are ended at last."""
    with ExitStack() as stack:
        options = ("--listen", "http://127.0.0.1:0", *options)
        processes = [Process(store, *options, command=command) for _ in range(count)]
        for process in processes:
            stack.callback(end, process)
        yield [process.wait() for process in processes]


def end(process: Process) -> None:
    process.popen.kill()
    process.popen.communicate()


@contextmanager
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient(
        address, concurrency=4, connection_timeout=PATIENCE_S, network_timeout=PATIENCE_S
    )
    try:
        yield made
    finally:
        made.close()


def x(*, is_binary: bool = True) -> triton.InferInput:
    given = triton.InferInput("x", [2, 3], "FP32")
    given.set_data_from_numpy(np.ones((2, 3), np.float32), binary_data=is_binary)
    return given


def version_of(result: triton.InferResult) -> int:
    """Return the version that an answer names; every layer must have been of it."""
    version = int(result.get_response()["model_version"])
    assert result.as_numpy("y").tolist() == [[float(version**2)] * 3] * 2
    assert result.as_numpy("first").tolist() == result.as_numpy("second").tolist() == [[float(version)] * 3] * 2
    return version


def wait_until(asking: Any, *, is_ready: bool) -> None:
    """Ask until it says so: nothing tells a client when a server's answer will be another."""
    deadline = time.monotonic() + PATIENCE_S
    while asking.is_server_ready() is not is_ready:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_ready(process: Process) -> None:
    with client(process.address) as asking:
        wait_until(asking, is_ready=True)


@pytest.mark.slow
def test_triton_client_speaks_to_it_and_bad_clients_do_not_harm_it(tmp_path: Path) -> None:
    served.publish(tmp_path, 1, "prod")
    served.publish(tmp_path, 2)
    with running(tmp_path, 1) as (server,), client(server.address) as asking:
        wait_until_ready(server)
        assert asking.is_server_live()
        assert asking.is_model_ready("m")
        assert asking.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        assert asking.get_model_metadata("m")["inputs"][0]["name"] == "x"
        for is_binary in (True, False):
            wanted = [triton.InferRequestedOutput(name, binary_data=is_binary) for name in ("y", "first", "second")]
            result = asking.infer("m", [x(is_binary=is_binary)], outputs=wanted, request_id="a request")
            assert version_of(result) == 1
            assert result.get_response()["id"] == "a request"
        assert version_of(asking.infer("m", [x()], model_version="2")) == 2
        assert [version_of(each.get_result()) for each in [asking.async_infer("m", [x()]) for _ in range(8)]] == [1] * 8
        with pytest.raises(InferenceServerException, match=r"\[404\] Expected a version that is kept, got 9"):
            asking.infer("m", [x()], model_version="9")

        host, _, port = server.address.partition(":")
        for start in (b"GET", b"\0\1\2\3", b"GET / HTTP/1.1\r\nx: " + b"x" * 2 * _limits.REQUEST_HEAD_BYTES):
            with socket.create_connection((host, int(port)), PATIENCE_S) as sock:
                sock.sendall(start)
                if start != b"GET":  # which may become something yet
                    assert sock.recv(4096).startswith(b"HTTP/1.1 400 ")
        assert version_of(asking.infer("m", [x()])) == 1

        with socket.create_connection(
            (host, int(port)), PATIENCE_S
        ) as sock:  # a request that is under way when it is to stop
            sock.sendall(
                b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(served.request())
            )
            asking.is_server_live()
            server.send(signal.SIGTERM)
            wait_until(asking, is_ready=False)
            sock.sendall(served.request())
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        assert server.popen.wait(PATIENCE_S) == 0


@pytest.mark.slow
def test_clients_that_are_slow_are_let_go(tmp_path: Path) -> None:
    served.publish(tmp_path, 1, "prod")
    with running(tmp_path, 1, command=HURRIED) as (server,):
        wait_until_ready(server)
        host, _, port = server.address.partition(":")
        for start, answer in (
            (b"", b""),
            (b"GET /v2 HTTP/1.1\r\nHo", b""),
            (b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\nContent-Length: 99\r\n\r\n{", b"HTTP/1.1 408 "),
        ):
            with socket.create_connection((host, int(port)), PATIENCE_S) as sock:
                sock.sendall(start)
                assert server.infer() == 1  # nobody waits for them
                assert sock.makefile("rb").read().startswith(answer)  # to its end
        assert server.infer() == 1


def promote(store: Path, version: int, *options: str) -> subprocess.CompletedProcess[str]:
    words = [*HEADWATER, "promote", str(version), "--store", str(store), *options]
    environment = os.environ | {"HEADWATER_TOKEN": TOKEN}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=False)


@pytest.mark.slow
def test_a_fleet_changes_together_or_not_at_all(tmp_path: Path) -> None:
    """One replica is stopped, then goes on; one is killed, and struck from the fleet."""
    served.publish(tmp_path, 1, "prod")
    served.publish(tmp_path, 2)
    with running(tmp_path, 3, "--fleet") as servers:
        for server in servers:
            wait_until_ready(server)
        first, second, third = servers
        done = promote(tmp_path, 2)
        assert done.stdout == "prod is version 2 on 3 of 3 replicas; it was 1.\n", done.stderr
        assert [server.infer() for server in servers] == [2, 2, 2]

        second.send(signal.SIGSTOP)
        done = promote(tmp_path, 1, "--timeout-s", "0.5")
        assert done.returncode == 2
        assert f"http://{second.address}: no answer within 0.5 s" in done.stderr
        second.send(signal.SIGCONT)
        assert [server.infer() for server in servers] == [2, 2, 2]

        third.send(signal.SIGKILL)
        third.popen.wait(PATIENCE_S)
        assert "1 that did not; nothing has changed" in promote(tmp_path, 1).stderr
        done = promote(tmp_path, 1, "--forget", f"http://{third.address}")
        assert done.stdout == "prod is version 1 on 2 of 2 replicas; it was 2.\n", done.stderr
        assert [first.infer(), second.infer()] == [1, 1]
        assert Versions(tmp_path).resolve("prod") == 1
