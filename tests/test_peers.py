"""What a peer that shows the token may still not do to the others."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import numpy as np
import pytest
from jobs import TOKEN, start_job

import headwater as hw
from headwater import errors
from headwater._layout import TensorSpec
from headwater._messages import Assign, Attach, Flip, Held, Hello, Hold, Leave, Register, Seal
from headwater._transport import Address, SocketConnection, connect, request

SGD = hw.optim.SGD(lr=1.0)
ONES = {"w": np.ones(3, np.float32)}


@contextmanager
def peer(server: hw.Server, role: str, identity: int = 7) -> Iterator[SocketConnection]:
    """Connect to a server and say Hello."""
    with closing(connect(Address.parse(server.address.unix), 5.0)) as connection:
        connection.set_timeout(20.0)
        request(connection, Hello(TOKEN, role, identity))
        yield connection


def test_server_too_many_is_refused_and_the_job_goes_on() -> None:
    with start_job(servers=2) as job, job.connect() as session:
        session.register({"w": np.zeros(3, np.float32)}, SGD)
        with pytest.raises(errors.SettingError, match="Expected 2 servers in this job, got one more"):
            hw.Server(Address("tcp", "127.0.0.1", 0), token=TOKEN, join=Address.parse(job.address))
        assert session.step(ONES) == 1


def test_connection_of_a_server_that_never_joined_ends_without_harm() -> None:
    with start_job() as job, job.connect() as session:
        session.register({"w": np.zeros(3, np.float32)}, SGD)
        with peer(job.servers[0], "server"):
            pass
        assert session.step(ONES) == 1


def test_coordinator_is_not_taken_from_outside() -> None:
    with start_job() as job, job.connect() as session:
        session.register({"w": np.zeros(3, np.float32)}, SGD)
        with pytest.raises(errors.ProtocolError, match="got it at its own"), peer(job.servers[0], "coordinator"):
            pass
        for message in (Flip(9, False), Assign((TensorSpec("w", (9,), "float32"),), SGD, 0, 1, hw.bsp())):
            with (
                peer(job.servers[0], "data") as connection,
                pytest.raises(errors.ProtocolError, match="a data may make"),
            ):
                request(connection, message)
        assert session.step(ONES) == 1


@pytest.mark.parametrize("role", ["data", "observer", "worker"])
def test_commits_are_held_no_longer_than_the_reader_lives(role: str) -> None:
    with start_job() as job, job.connect() as session:
        session.register({"w": np.zeros(3, np.float32)}, SGD)
        with peer(job.servers[0], role) as connection:
            assert isinstance(request(connection, Hold()).message, Held)
            assert isinstance(request(connection, Hold()).message, Held)  # twice is fine
            if role == "worker":
                request(connection, Leave())
                assert isinstance(request(connection, Hold()).message, Held)
            session.push(ONES)
        assert session.wait() == 1


def test_holder_does_not_push() -> None:
    """It would wait for itself."""
    specs = (TensorSpec("w", (3,), "float32"),)
    with start_job(consistency=hw.asp()) as job, job.connect() as session:
        session.register({"w": np.zeros(3, np.float32)}, SGD)
        with peer(job.servers[0], "worker") as connection:
            request(connection, Register(specs, SGD))
            request(connection, Attach(share=False))
            request(connection, Hold())
            with pytest.raises(errors.ProtocolError, match="Expected Resume before a push"):
                request(connection, Seal(0, 0.0, (tuple(SGD.scalars().values()),)))
        assert session.step(ONES) == 1


def test_model_beyond_all_limits_is_refused_before_memory_is_taken() -> None:
    specs = (TensorSpec("w", (1 << 62, 1 << 62), "float32"),)
    with start_job() as job:
        with peer(job.servers[0], "worker") as connection, pytest.raises(errors.LayoutError, match="Expected at most"):
            request(connection, Register(specs, SGD))
        with job.connect() as session:
            session.register({"w": np.zeros(3, np.float32)}, SGD)
            assert session.step(ONES) == 1


def test_worker_that_waits_is_told_which_server_died() -> None:
    with (
        start_job(workers=2, servers=2) as job,
        ThreadPoolExecutor(2) as pool,
        job.connect() as first,
        job.connect() as second,
    ):
        registered = pool.submit(first.register, {"w": np.zeros(3, np.float32)}, SGD)
        second.register({"w": np.zeros(3, np.float32)}, SGD)
        registered.result()
        first.push(ONES)
        waiting = pool.submit(first.wait)
        job.servers[1].close()
        with pytest.raises(errors.PeerLostError, match="Expected every server of the job to live, got the end of"):
            waiting.result()
