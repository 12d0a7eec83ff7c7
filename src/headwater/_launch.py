"""Where processes run: this machine. Starts servers and workers, watches them, starts workers again, and stops them all.

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
from typing import IO, TYPE_CHECKING, Any

from headwater._connect import connect_session
from headwater._consistency import Consistency
from headwater._errors import HeadwaterError, HostError, PeerLostError
from headwater._session import Session
from headwater._transport import Address
from headwater.durability import Durability

if TYPE_CHECKING:
    from headwater._server import Server

START_S = 30.0  # a server must say where it listens by then
RESTARTS = 3
SETTLE_S = 2.0  # for a server that does not answer to be seen as ended
INTERRUPT_S = 5.0  # then SIGTERM
TERMINATE_S = 3.0  # then SIGKILL


class LocalJob:
    """A job of processes on this machine. A context manager; leaving it ends every process.

    command: what each worker runs. outputs: a folder for one log per worker; None: they write to this process's terminal.
    restarts: how often processes that have died are started again, all together. durability: what the job survives; store: the folder
    it is kept in, None: one that ends with the job. resumes: go on from what the store holds.
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
        restarts: int = RESTARTS,
        durability: Durability | None = None,
        store: str | None = None,
        resumes: bool = False,
    ) -> None:
        self.command, self.worker_count, self.server_count = list(command), workers, servers
        self.consistency, self.transport, self.outputs = consistency, transport, outputs
        self.token = secrets.token_hex(16)
        self.restarts, self.restarted = restarts, 0
        self.address = ""
        self.durability, self.store, self._resumes = durability, store, resumes
        self._addresses: dict[int, str] = {}  # of servers that have said where they listen
        self._begun = [0] * workers  # by index: processes that were in a commit, those that have ended
        self._is_replicated = durability is not None and durability.kind == "replicated"
        self._coordinator: Server | None = None  # of a replicated job, in this process
        self.servers: list[subprocess.Popen[bytes]] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self._folder = tempfile.mkdtemp(prefix=f"headwater-{os.geteuid()}-{os.getpid()}-")
        self._kept = store or ""
        if durability is not None and store is None:  # a server's death is survived, this process's is not
            folder = "/var/tmp" if os.access("/var/tmp", os.W_OK) else None  # on a disk, where /tmp may be memory
            self._kept = tempfile.mkdtemp(prefix=f"headwater-store-{os.geteuid()}-{os.getpid()}-", dir=folder)
        self._ended: queue.Queue[tuple[str, int, int]] = queue.Queue()
        self._session: Session | None = None

    def __enter__(self) -> LocalJob:
        try:
            if self._is_replicated:
                self._start_coordinator()
            for i in range(self.server_count * (1 + self._is_replicated)):
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
        """Start server i; again, where it has died, and then at the same address."""
        listen = "tcp://127.0.0.1:0" if self.transport == "tcp" else f"unix://{self._folder}/{i}"
        listen = self._addresses.get(i, listen)
        for dead in self.servers[i : i + 1]:
            _close_pipes(dead)
            Path(self._folder, str(i)).unlink(missing_ok=True)
        command = [sys.executable, "-P", "-m", "headwater", "server", "--listen", listen, "--stop-with-input"]
        command += ["--threads", str(max(1, _cores() // self.server_count))]
        if i == 0 and not self._is_replicated:
            command += ["--workers", str(self.worker_count), "--servers", str(self.server_count)]
            command += ["--consistency", self.consistency] if self.consistency else []
        else:
            command += ["--join", self.address]
        if self.durability is not None:
            index = i % self.server_count
            command += ["--durability", str(self.durability), "--store", self._kept, "--index", str(index)]
            command += ["--resume"] if self._resumes or i in self._addresses else []
            # Of two processes with one index the later one follows, whichever that is.
            command += ["--follow"] if i >= self.server_count or (self._is_replicated and i in self._addresses) else []
        environment = os.environ | {"HEADWATER_TOKEN": self.token}
        process = _spawn(self.servers, i, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        if i not in self._addresses:  # else nobody waits: it may wait for another that is still to be started again
            self._addresses[i] = _read_address(process)
        if not self._is_replicated:
            self.address = self._addresses[0]
        self._watch("server", i, process)

    def _start_coordinator(self) -> None:
        from headwater._server import Server

        listen = "tcp://127.0.0.1:0" if self.transport == "tcp" else f"unix://{self._folder}/coordinator"
        self._coordinator = Server(
            Address.parse(listen), token=self.token, workers=self.worker_count, servers=self.server_count,
            consistency=Consistency.parse(self.consistency) if self.consistency else None,
            durability=self.durability, store=self._kept, resumes=self._resumes, is_apart=True,
        )  # fmt: skip
        self.address = self._coordinator.address.tcp or self._coordinator.address.unix

    def _start_worker(self, i: int) -> None:
        """Start worker i; again, where it has died: nobody waits for it to join."""
        environment = os.environ | {
            "HEADWATER_ADDRESS": self.address,
            "HEADWATER_TOKEN": self.token,
            "HEADWATER_WORKER": str(i),
            "HEADWATER_WORKERS": str(self.worker_count),
            "HEADWATER_TRANSPORT": self.transport,
            "HEADWATER_LAUNCHER": str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // self.worker_count)))
        with contextlib.ExitStack() as stack:
            output: IO[bytes] | None = None
            if self.outputs is not None:
                mode = "ab" if i < len(self.workers) else "wb"
                output = stack.enter_context((self.outputs / f"worker-{i}.log").open(mode))
            errors = subprocess.STDOUT if output is not None else None
            process = _spawn(
                self.workers, i, self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment
            )
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
        """Wait until the last worker has ended; returns the job's exit status. `tick` is called every tick_s.

        0: every worker ended well, in the end. Else the first bad status of what was not started again.
        """
        status, running = 0, len(self.workers)
        while running:
            try:
                kind, i, code = self._ended.get(timeout=tick_s if tick else None)
            except queue.Empty:
                if tick is not None:
                    tick()
                continue
            match self._decide(kind, i, code):
                case "start again":
                    self.restarted += 1
                    (self._start_worker if kind == "worker" else self._start_server)(i)
                case "go on":
                    running, status = running - 1, status or _status(code)
                case "end":
                    return status or (1 if kind == "server" else _status(code))
        return status

    def _decide(self, kind: str, i: int, code: int) -> str:
        """Say what follows from the end of a process: "start again", "go on" without it, or "end" the job.

        A worker that fails before its index was in a commit ends the job: it would fail again. So would one that was started again
        and fails by itself, not by a signal, before it was in one; the others go on without it.
        """
        if kind == "worker" and code == 0:
            return "go on"
        if kind == "server" and self.durability is not None and self.restarted < self.restarts:
            restart = f"restart {self.restarted + 1} of {self.restarts}"
            _say(f"server {i} ended {_describe(code)}; it is started again, {restart}.")
            return "start again"
        begun = self._count_begun(i) if kind == "worker" else None
        patience_s = SETTLE_S if begun is None else SETTLE_S / 2 if code > 0 else 0.0  # no server's end sends a signal
        server = self._find_ended_server(patience_s) if self.durability is None or kind == "server" else None
        if server is not None:  # which explains the worker's end, too
            _say(f"server {server} ended {_describe(self.servers[server].returncode)}; the job cannot go on.")
            return "end"
        end = f"{kind} {i} ended {_describe(code)}"
        if not begun:
            _say(f"{end} before its first commit; the job ends.")
            return "end"
        has_begun, self._begun[i] = begun > self._begun[i], begun
        if not has_begun and 0 < code < 128:
            _say(f"{end} before its first commit; the others go on.")
            return "go on"
        if self.restarted >= self.restarts:
            _say(f"{end}; the others go on.")
            return "go on"
        _say(f"{end}; it is started again, restart {self.restarted + 1} of {self.restarts}.")
        return "start again"

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

    def _count_begun(self, i: int) -> int | None:
        """How many processes of a worker have pushed, whatever the others have done in the meantime; None: no server says."""
        try:
            return sum(worker.pushes > 0 for worker in self.observer().stats().workers if worker.index == i)
        except PeerLostError:
            return None
        except HeadwaterError:
            return 0

    def close(self) -> None:
        """End every process: workers first, then servers. Twice is fine."""
        if self._session is not None:
            self._session.close()
        _stop(self.workers, signal.SIGINT)
        for server in self.servers:
            _close_pipes(server)
        if self._coordinator is not None:
            self._coordinator.close()  # first: the ends of servers are no losses now
        _stop(self.servers, signal.SIGTERM)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self.store is None and self._kept:
            shutil.rmtree(self._kept, ignore_errors=True)


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
        if job.store is not None:
            keep_job(job)
    return status


def keep_job(job: LocalJob) -> None:
    """Take a last snapshot, so that the store holds what was learnt."""
    try:
        taken = job.observer().take_snapshot()
    except HeadwaterError as error:
        _say(f"no last snapshot: {error}")
    else:
        _say(f"kept in {taken}; --resume goes on from there")


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


def _spawn(
    processes: list[subprocess.Popen[bytes]], i: int, command: Sequence[str], **how: Any
) -> subprocess.Popen[bytes]:
    """Start a process and put it into place i, both or neither: one that is interrupted in between would be nobody's to end.

    Ctrl+C is for the launcher, which saves first.
    """
    came: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = [(number, signal.signal(number, lambda number, _: came.append(number))) for number in numbers]
    try:
        processes[i : i + 1] = [subprocess.Popen(command, start_new_session=True, **how)]
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
    return processes[i]


def _read_address(process: subprocess.Popen[bytes]) -> str:
    """Return the address that a starting server prints."""
    assert process.stdout is not None
    timer = threading.Timer(START_S, process.kill)
    timer.daemon = True  # an interrupt may come before there is anybody to cancel it
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


def _close_pipes(server: subprocess.Popen[bytes]) -> None:
    """Which ends it, if it still lives."""
    for pipe in (server.stdin, server.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


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


def _status(code: int) -> int:
    """Return the exit status that a shell would give."""
    return code if code >= 0 else 128 - code


def _describe(code: int) -> str:
    if code >= 0:
        return f"with exit status {code}"
    with contextlib.suppress(ValueError):
        return f"by {signal.Signals(-code).name}"
    return f"by signal {-code}"


def _say(text: str) -> None:
    sys.stderr.write(f"headwater: {text}\n")  # in one piece, which print does not: workers write there too
    sys.stderr.flush()
