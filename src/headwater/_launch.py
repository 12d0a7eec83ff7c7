"""Where processes run: this machine. Starts servers and workers, watches them, and stops them all, whatever happens.

Nothing outlives it: servers end when the pipe on their standard input closes, which the death of this process does too, and a
worker's session ends with its server.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from headwater._errors import HeadwaterError, HostError, PeerLostError
from headwater._session import Session, connect_session

START_S = 30.0  # a server must say where it listens by then
SETTLE_S = 2.0  # for a server that does not answer to be seen as ended
INTERRUPT_S = 5.0  # then SIGTERM
TERMINATE_S = 3.0  # then SIGKILL


class LocalJob:
    """A job of processes on this machine. A context manager; leaving it ends every process.

    command: what each worker runs. outputs: a folder for one log per worker; None: they write to this process's terminal.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        workers: int,
        servers: int = 1,
        consistency: str | None = None,
        transport: str = "auto",
        outputs: Path | None = None,
    ) -> None:
        self.command, self.worker_count, self.server_count = list(command), workers, servers
        self.consistency, self.transport, self.outputs = consistency, transport, outputs
        self.token = secrets.token_hex(16)
        self.address = ""
        self.servers: list[subprocess.Popen[bytes]] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self._folder = tempfile.mkdtemp(prefix=f"headwater-{os.geteuid()}-{os.getpid()}-")
        self._ended: queue.Queue[tuple[str, int, int]] = queue.Queue()
        self._session: Session | None = None

    def __enter__(self) -> LocalJob:
        try:
            for i in range(self.server_count):
                self._start_server(i)
            self.observer()  # now, so that the end of a server is seen at once later
            for i in range(self.worker_count):
                self._start_worker(i)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_server(self, i: int) -> None:
        listen = "tcp://127.0.0.1:0" if self.transport == "tcp" else f"unix://{self._folder}/{i}"
        command = [sys.executable, "-P", "-m", "headwater", "server", "--listen", listen, "--stop-with-input"]
        command += ["--threads", str(max(1, _cores() // self.server_count))]
        if i == 0:
            command += ["--workers", str(self.worker_count), "--servers", str(self.server_count)]
            command += ["--consistency", self.consistency] if self.consistency else []
        else:
            command += ["--join", self.address]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"HEADWATER_TOKEN": self.token},
            start_new_session=True,
        )
        self.servers.append(process)
        address = _read_address(process)
        if i == 0:
            self.address = address
        self._watch("server", i, process)

    def _start_worker(self, i: int) -> None:
        environment = os.environ | {
            "HEADWATER_ADDRESS": self.address,
            "HEADWATER_TOKEN": self.token,
            "HEADWATER_WORKER": str(i),
            "HEADWATER_WORKERS": str(self.worker_count),
            "HEADWATER_TRANSPORT": self.transport,
            "PYTHONUNBUFFERED": "1",
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // self.worker_count)))
        with contextlib.ExitStack() as stack:
            output: IO[bytes] | None = None
            if self.outputs is not None:
                output = stack.enter_context((self.outputs / f"worker-{i}.log").open("wb"))
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                env=environment,
                start_new_session=True,  # Ctrl+C is for the launcher, which saves first
            )
        self.workers.append(process)
        self._watch("worker", i, process)

    def _watch(self, kind: str, i: int, process: subprocess.Popen[bytes]) -> None:
        def wait() -> None:
            self._ended.put((kind, i, process.wait()))

        threading.Thread(target=wait, name=f"watch {kind} {i}", daemon=True).start()

    def observer(self) -> Session:
        """Return a session that only reads; it lives as long as the job."""
        if self._session is None:
            self._session = connect_session(self.address, token=self.token, role="observer", timeout_s=30.0)
        return self._session

    def wait(self, tick: Callable[[], None] | None = None, tick_s: float = 0.25) -> int:
        """Wait until the last worker has ended; returns the job's exit status.

        0: every worker ended well. A worker that fails before it is in a commit ends the job at once with its status; later
        the others go on, and the job ends with the first bad status. `tick` is called every tick_s.
        """
        status, running = 0, len(self.workers)
        while running:
            try:
                kind, i, code = self._ended.get(timeout=tick_s if tick else None)
            except queue.Empty:
                if tick is not None:
                    tick()
                continue
            if kind == "worker" and code == 0:
                running -= 1
                continue
            has_begun = kind == "worker" and self._has_begun(i)
            is_servers_end = kind == "server" or has_begun is None
            server = self._find_ended_server(SETTLE_S if is_servers_end else SETTLE_S / 2)
            if server is not None:  # which explains the worker's end, too
                _say(f"server {server} ended {_describe(self.servers[server].returncode)}; the job cannot go on.")
                return status or 1
            running, status = running - 1, status or (code if code > 0 else 128 - code)
            if not has_begun:
                _say(f"worker {i} ended {_describe(code)} before its first commit; the job ends.")
                return status
            _say(f"worker {i} ended {_describe(code)}; the others go on.")
        return status

    def _find_ended_server(self, patience_s: float) -> int | None:
        """Return a server that has ended, or does so in the next moments; the one that did not end well, for the others follow it."""
        deadline = time.monotonic() + patience_s
        while True:
            codes = [server.returncode for server in self.servers]  # which the threads that wait for them set
            failed = next((i for i, code in enumerate(codes) if code), None)
            if failed is not None:
                return failed
            if time.monotonic() > deadline:
                return next((i for i, code in enumerate(codes) if code is not None), None)
            time.sleep(0.01)

    def _has_begun(self, i: int) -> bool | None:
        """Whether a worker has pushed, whatever the others have done without it in the meantime; None: no server says."""
        try:
            return any(worker.pushes for worker in self.observer().stats().workers if worker.index == i)
        except PeerLostError:
            return None
        except HeadwaterError:
            return False

    def close(self) -> None:
        """End every process: workers first, then servers. Twice is fine."""
        if self._session is not None:
            self._session.close()
        _stop(self.workers, signal.SIGINT)
        for server in self.servers:
            if server.stdin is not None:
                with contextlib.suppress(OSError):
                    server.stdin.close()
        _stop(self.servers, signal.SIGTERM)
        for server in self.servers:
            if server.stdout is not None:
                server.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def run_job(job: LocalJob, *, save: Path | None = None) -> int:
    """Run a job to its end and return its exit status; Ctrl+C or SIGTERM saves first where a path is given."""
    with terminate_as_interrupt(), job:
        try:
            status = job.wait()
        except KeyboardInterrupt:
            _say("stopping.")
            status = 130
        if save is not None:
            save_job(job, save)
    return status


def save_job(job: LocalJob, path: Path) -> bool:
    """Save what was learnt; returns whether there was anything. A second Ctrl+C gives up."""
    try:
        if not any(worker.pushes for worker in job.observer().stats().workers):
            _say("nothing was learnt yet, so nothing is saved.")
            return False
        job.observer().save(path)
    except HeadwaterError as error:
        _say(f"could not save: {error}")
        return False
    _say(f"saved to {path}")
    return True


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the job as Ctrl+C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _read_address(process: subprocess.Popen[bytes]) -> str:
    """Return the address that a starting server prints."""
    assert process.stdout is not None
    timer = threading.Timer(START_S, process.kill)
    timer.start()
    try:
        line = process.stdout.readline().decode()
    finally:
        timer.cancel()
    _, found, address = line.strip().partition(" listening on ")
    if not found:
        raise HostError(
            f"Expected the server to say where it listens, got {line.strip()!r} and exit status {process.wait()}."
        )
    return address


def _stop(processes: Sequence[subprocess.Popen[bytes]], first: int) -> None:
    for number, patience_s in (
        (first, INTERRUPT_S),
        (signal.SIGTERM, TERMINATE_S),
        (signal.SIGKILL, TERMINATE_S),
    ):
        running = [p for p in processes if p.poll() is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience_s)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _describe(code: int) -> str:
    if code >= 0:
        return f"with exit status {code}"
    with contextlib.suppress(ValueError):
        return f"by {signal.Signals(-code).name}"
    return f"by signal {-code}"


def _say(text: str) -> None:
    print(f"headwater: {text}", file=sys.stderr, flush=True)
