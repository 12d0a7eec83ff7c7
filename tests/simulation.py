"""Processes, threads, locks, connections, a clock and a disk that a seed decides: a job runs in one thread, the same way each time.

The code of a job is what it is elsewhere. Only the modules it imports from are others: `threading` and `time` are those of the running
`World`, a connection is a queue, and the store is `FaultyFiles`. A thread is a greenlet, and wherever it might wait, or another might
run, the seed decides who goes on. Time stands still while anybody can run.

A process is killed by its *fuse*: so many steps from now, a step being an operation on a file, a lock or a connection. What it has left
to do from there on, `finally` blocks included, has no effect on anything outside it.
"""

from __future__ import annotations

import heapq
import logging
import os
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import greenlet
from faulty_files import FaultyFiles, _File

from headwater import (
    _coordinator,
    _dense,
    _keeper,
    _limits,
    _listener,
    _log,
    _peers,
    _server,
    _session,
    _snapshots,
    _table,
)
from headwater._errors import PeerLostError, UnreachableError, WaitTimeoutError
from headwater._messages import AnyMessage, ServerAddress, decode, encode
from headwater._peers import Peers
from headwater._server import Server
from headwater._transport import Address, Received, Sink, refuse_payload

EPOCH_S = 1_700_000_000.0


class Killed(BaseException):
    """The process ends here."""


class StuckError(AssertionError):
    """Nobody can go on, or somebody goes on for ever."""


class Process:
    """What dies together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_live = True
        self.fuse = -1  # steps until it is killed; negative: it is not to be
        self.ended: Callable[[], None] | None = None  # is told when it is dead
        self.tasks: dict[Task, None] = {}
        self.ends: dict[End, None] = {}

    def __repr__(self) -> str:
        return self.name


class Task:
    """A thread."""

    def __init__(self, world: World, process: Process, act: Callable[[], object], name: str) -> None:
        self.process, self.name = process, name
        self.greenlet = greenlet.greenlet(act, parent=world.hub)
        self.queue: dict[Task, None] | None = None  # in which it waits
        self.turn = 0  # rises when it goes on
        self.is_over = self.was_woken = False
        self.joiners: dict[Task, None] = {}


class World:
    """Everything there is while one schedule runs. Use it as a context manager: then headwater's modules live in it."""

    def __init__(self, seed: int) -> None:
        self.seed, self.random = seed, random.Random(seed)
        self.now = 0.0
        self.switching = self.random.choice((0.02, 0.1, 0.3))  # how often somebody else's turn comes without need
        self.hub = greenlet.getcurrent()
        self.outside = Process("outside")
        self.processes: list[Process] = [self.outside]
        self.dying: list[Process] = []
        self.ready: list[Task] = []
        self.timers: list[tuple[float, int, Task, int]] = []
        self.current: Task | None = None
        self.steps = 0
        self.alarms: list[
            tuple[int, float, Callable[[], object]]
        ] = []  # at which step, and what then happens to everybody
        self.story: list[str] = []  # what happened, for people
        self.files = Disk(self, self.random.randrange(1 << 62))
        self.listeners: dict[str, tuple[Process, Callable[[End], None]]] = {}
        self.threading = SimpleNamespace(
            Lock=lambda: Lock(self), Condition=lambda: Condition(self), Event=lambda: Event(self),
            Thread=lambda **how: Thread(self, **how), current_thread=lambda: self.current,
        )  # fmt: skip
        self.time = SimpleNamespace(
            monotonic=lambda: self.now, time=lambda: EPOCH_S + self.now, sleep=self.sleep, perf_counter=lambda: self.now
        )

    # Who runs.

    def spawn(self, process: Process, act: Callable[[], object], name: str) -> Task:
        """Begin a thread of a process."""

        def run() -> None:
            try:
                act()
            except Killed:
                pass
            finally:
                task.is_over = True
                process.tasks.pop(task, None)
                self.wake(task.joiners)

        task = Task(self, process, run, name)
        process.tasks[task] = None
        self.ready.append(task)
        return task

    def run(self, is_done: Callable[[], bool], limit_s: float, limit_steps: int) -> None:
        """Let everybody go on until that is so. Raises StuckError past a limit, and whatever a thread does not catch."""
        first = self.steps
        while not is_done():
            self._bury()
            if self.alarms and self.steps >= self.alarms[0][0]:
                heapq.heappop(self.alarms)[2]()
                continue
            if self.ready:
                at = self.random.randrange(len(self.ready)) if len(self.ready) > 1 else 0
                self.ready[at], self.ready[-1] = self.ready[-1], self.ready[at]
                self._switch(self.ready.pop())
            elif self.timers:
                self.now, _, task, turn = heapq.heappop(self.timers)[:4]
                if task.turn == turn and not task.is_over and task.process.is_live:
                    if task.queue is not None:
                        task.queue.pop(task, None)
                        task.queue = None
                    self.ready.append(task)
            elif self.alarms:
                heapq.heappop(self.alarms)[2]()
            else:
                raise StuckError(f"Nobody can go on:\n{self.where()}")
            if self.now > limit_s or self.steps - first > limit_steps:
                raise StuckError(f"No end after {self.now:.1f} s and {self.steps - first} steps:\n{self.where()}")

    def _switch(self, task: Task) -> None:
        task.turn += 1
        before, self.current = self.current, task
        try:
            task.greenlet.switch()
        finally:
            self.current = before

    def _bury(self) -> None:
        """Unwind the threads of processes that were killed."""
        if not self.dying:
            return
        dying, self.dying = self.dying, []
        for process in dying:
            while process.tasks:
                task = next(iter(process.tasks))
                process.tasks.pop(task)
                task.is_over = True
                before, self.current = self.current, task
                try:
                    task.greenlet.throw(Killed)
                except (Killed, Exception):  # noqa: BLE001 - the dead have no say
                    pass
                finally:
                    self.current = before
            if process.ended is not None:
                process.ended()
        self.ready = [task for task in self.ready if not task.is_over]

    def start(self, name: str) -> Process:
        """Return a new process."""
        process = Process(name)
        self.processes.append(process)
        return process

    def alarm(self, steps: int, act: Callable[[], object]) -> None:
        """Let something happen to everybody so many steps from now, or when nobody can go on."""
        heapq.heappush(self.alarms, (self.steps + steps, self.random.random(), act))

    def say(self, text: str) -> None:
        """Add to the story."""
        self.story.append(f"{self.steps:6} {self.now:7.2f} s  {self.current.process if self.current else '-'}: {text}")

    def kill(self, process: Process) -> None:
        """End a process: its connections end, and nothing that it does from here on has an effect."""
        if not process.is_live:
            return
        process.is_live = False
        self.dying.append(process)
        self.processes.remove(process)
        self.say(f"{process} ends")
        for end in list(process.ends):
            end.drop()
        for address, (owner, _) in list(self.listeners.items()):
            if owner is process:
                del self.listeners[address]

    def cut(self, process: Process) -> None:
        """Let some connections of a process break; it and whoever is behind them live on."""
        for end in list(process.ends):
            if self.random.random() < 0.7:
                end.has_ended = end.other.has_ended = True
                self.wake(end._readers)
                self.wake(end.other._readers)
        self.say(f"{process} is cut off")

    def step(self) -> None:
        """Something that others can see is about to happen."""
        task = self.current
        if task is None or task.process is self.outside:
            return
        process = task.process
        self.steps += 1
        if process.is_live and process.fuse >= 0:
            process.fuse -= 1
            if process.fuse < 0:
                self.kill(process)
        if not process.is_live:
            raise Killed
        if self.ready and self.random.random() < self.switching:
            self.ready.append(task)
            self._leave(task)

    def wait(self, queue: dict[Task, None], timeout_s: float | None = None) -> bool:
        """Wait in a queue; returns whether somebody woke us before the time was over."""
        task = self.current
        assert task is not None, "outside nobody waits"
        if not task.process.is_live:
            raise Killed
        queue[task] = None
        task.queue = queue
        if timeout_s is not None:
            heapq.heappush(self.timers, (self.now + max(timeout_s, 0.0), self.random.getrandbits(40), task, task.turn))
        self._leave(task)
        was_woken = task not in queue
        queue.pop(task, None)
        return was_woken and task.was_woken

    def _leave(self, task: Task) -> None:
        task.was_woken = False
        self.hub.switch()
        if not task.process.is_live:
            raise Killed

    def wake(self, queue: dict[Task, None]) -> None:
        """Let everybody who waits in a queue go on."""
        for task in list(queue):
            task.queue = None
            task.was_woken = True
            self.ready.append(task)
        queue.clear()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        self.wait({}, seconds)

    def where(self) -> str:
        """Say where everybody is, for people."""
        import traceback

        lines = []
        for process in self.processes:
            for task in process.tasks:
                frames = traceback.extract_stack(task.greenlet.gr_frame) if task.greenlet.gr_frame else []
                stack = " < ".join(
                    f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}"
                    for f in reversed(frames)
                    if "simulation" not in f.filename
                )
                lines.append(f"  {process} {task.name}: {stack}")
        return "\n".join(lines)

    # What modules see of it.

    def connect(self, address: Address, timeout_s: float = 20.0) -> End:
        """Connect to whoever listens there. Raises UnreachableError past the time-out."""
        deadline = self.now + timeout_s
        while True:
            self.step()
            found = self.listeners.get(str(address))
            if found is not None:
                assert self.current is not None
                process, serve = found
                ours, theirs = End(self, self.current.process, str(address)), End(self, process, "a peer")
                ours.other, theirs.other = theirs, ours
                self.spawn(process, partial(serve, theirs), "accept")
                return ours
            if self.now > deadline:
                raise UnreachableError(f"Expected a server at {address}, got none.")
            self.sleep(0.1)

    def _listen(self, server: Server, address: Address) -> None:
        assert self.current is not None
        server.address = ServerAddress(str(address), "", "here")
        serve = partial(server._serve_in_thread, check=lambda: None)
        self.listeners[str(address)] = self.current.process, serve

    def _beat(self, peers: Peers, address: Address) -> None:
        peers._beat = peers._greeted(self.connect(address), "beat")

    def __enter__(self) -> World:
        stack = self._stack = ExitStack()
        modules = (_coordinator, _dense, _keeper, _listener, _log, _peers, _server, _session, _snapshots, _table)
        replaced: list[tuple[object, str, object]] = [
            (module, name, getattr(self, name))
            for module in modules
            for name in ("threading", "time")
            if hasattr(module, name)
        ]
        replaced += [(module, "connect", self.connect) for module in (_server, _peers, _keeper)]
        replaced += [(module, "host_name", lambda: "here") for module in (_listener, _server, _peers, _keeper)]
        replaced += [(_keeper, "open_files", lambda store: (self.files, store))]
        replaced += [(_server.Server, "_listen", lambda server, at: self._listen(server, at))]  # noqa: PLW0108
        replaced += [(_peers.Peers, "_start_beat", lambda peers, at: self._beat(peers, at))]  # noqa: PLW0108
        replaced += [(_limits, "BEAT_LIMIT_S", None)]  # who dies closes its connections
        replaced += [(os, "sched_getaffinity", lambda _: {0})]  # what would share the work with threads of a pool
        if self.seed % 2:  # a follower then applies every record in a thread
            replaced += [(_limits, "PIECE_BYTES", 1)]
        for module, name, value in replaced:
            stack.enter_context(mock.patch.object(module, name, value))
        logger = logging.getLogger("headwater")
        stack.enter_context(mock.patch.multiple(logger, handlers=[_Ear(self)], propagate=False))
        return self

    def __exit__(self, *_: object) -> None:
        for process in list(self.processes):
            self.kill(process)
        self._bury()
        self._stack.close()


class _Ear(logging.Handler):
    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.say(record.getMessage())


class Lock:
    """As of `threading`; whoever waits for it is woken in any order."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._holder: Task | None = None
        self._depth = 0
        self._queue: dict[Task, None] = {}

    def acquire(self) -> bool:
        world = self._world
        world.step()
        task = world.current
        while self._holder is not None:
            assert task is not self._holder, "a lock is taken twice"
            world.wait(self._queue)
        self._holder, self._depth = task, 1
        return True

    def release(self) -> None:
        self._holder, self._depth = None, 0
        if self._queue:
            self._world.wake(self._queue)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Condition(Lock):
    """As of `threading`, with a lock that its holder can take again."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._waiters: dict[Task, None] = {}

    def acquire(self) -> bool:
        if self._holder is not None and self._holder is self._world.current:
            self._depth += 1
            return True
        return super().acquire()

    def release(self) -> None:
        task = self._world.current
        if task is not None and not task.process.is_live:
            return
        assert self._holder is task, "a lock is released by another than its holder"
        self._depth -= 1
        if not self._depth:
            super().release()

    def wait(self, timeout: float | None = None) -> bool:
        assert self._holder is self._world.current
        depth = self._depth
        super().release()
        was_woken = self._world.wait(self._waiters, timeout)
        super().acquire()
        self._depth = depth
        return was_woken

    def wait_for(self, is_so: Callable[[], bool], timeout: float | None = None) -> bool:
        deadline = None if timeout is None else self._world.now + timeout
        while not is_so():
            left = None if deadline is None else deadline - self._world.now
            if left is not None and left <= 0:
                return False
            self.wait(left)
        return True

    def notify_all(self) -> None:
        self._world.wake(self._waiters)


class Event:
    """As of `threading`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_set = False
        self._queue: dict[Task, None] = {}

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._world.wake(self._queue)

    def wait(self, timeout: float | None = None) -> bool:
        self._world.step()
        if not self._is_set:
            self._world.wait(self._queue, timeout)
        return self._is_set


class Thread:
    """As of `threading`."""

    def __init__(
        self,
        world: World,
        target: Callable[..., object],
        args: Sequence[Any] = (),
        name: str = "",
        daemon: bool = False,
        process: Process | None = None,
    ) -> None:
        self._world, self._act, self.name = world, lambda: target(*args), name
        self._process = process
        self._task: Task | None = None

    def start(self) -> None:
        world = self._world
        world.step()
        process = self._process or (world.current.process if world.current is not None else world.outside)
        self._task = world.spawn(process, self._act, self.name)

    def join(self, timeout: float | None = None) -> None:
        task = self._task
        if task is not None and not task.is_over:
            self._world.wait(task.joiners, timeout)


class End:
    """One end of a connection. What was sent before it ended can still be received, as from a socket."""

    can_share = False
    own_host = ""
    has_ended = False  # of the peer, as far as can be seen

    def __init__(self, world: World, process: Process, peer: str) -> None:
        self._world, self._process, self.peer = world, process, peer
        self._inbox: deque[tuple[bytes, bytes | None]] = deque()
        self._readers: dict[Task, None] = {}
        self._is_closed = False
        self._timeout_s: float | None = None
        self._begun: AnyMessage | None = None  # to be sent when its payload is here
        self._missing, self._partial = 0, bytearray()
        self.other: End
        if process.is_live:
            process.ends[self] = None

    def send(self, message: AnyMessage, payload: memoryview | None = None, fds: Sequence[int] = ()) -> None:
        self._world.step()
        if self._is_closed or (self.has_ended and self._world.random.random() < 0.5):
            self.close()
            raise PeerLostError(f"The connection to {self.peer} ended.")
        assert not fds
        if not self.has_ended:  # else it goes nowhere, as into the buffer of a socket
            self.other._arrive(encode(message), bytes(payload) if payload is not None else None)

    hold = send

    def send_head(self, message: AnyMessage, size: int) -> None:
        assert self._begun is None
        self._begun, self._missing = message, size
        self.send_more(memoryview(b""))

    def send_more(self, piece: memoryview) -> None:
        self._partial += piece
        self._missing -= piece.nbytes
        if not self._missing and self._begun is not None:
            begun, payload = self._begun, self._partial
            self._begun, self._partial = None, bytearray()
            self.send(begun, memoryview(payload))

    def _arrive(self, control: bytes, payload: bytes | None) -> None:
        self._inbox.append((control, payload))
        self._world.wake(self._readers)

    def receive(self, sink: Sink | None = None, *, with_fds: bool = False, arrived: object = None) -> Received:
        world = self._world
        world.step()
        while not self._is_closed and not self._inbox:
            if self.has_ended:
                break
            if (
                not world.wait(self._readers, self._timeout_s)
                and not self._inbox
                and not self._is_closed
                and not self.has_ended
            ):
                raise WaitTimeoutError(f"Expected an answer from {self.peer}, got none in {self._timeout_s} s.")
        if self._is_closed or not self._inbox:
            self.close()
            raise PeerLostError(f"The connection to {self.peer} ended.")
        control, payload = self._inbox.popleft()
        message = decode(control)
        if payload:
            (sink or refuse_payload)(message, len(payload))[:] = payload
        return Received(message)

    def set_timeout(self, seconds: float | None) -> None:
        self._timeout_s = seconds

    def flush(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def close(self) -> None:
        if self._process.is_live:
            self.drop()

    def drop(self) -> None:
        """Be closed, whether or not the process lives."""
        if self._is_closed:
            return
        self._is_closed = True
        self._process.ends.pop(self, None)
        self._world.wake(self._readers)
        self.other.has_ended = True
        self._world.wake(self.other._readers)


class Disk(FaultyFiles):
    """The store: each operation is a step of whoever asks for it, and a write may end in the middle."""

    def __init__(self, world: World, seed: int) -> None:
        super().__init__(seed, hook=lambda operation, path: world.step())
        self._world = world

    def after_power_cut(self) -> Disk:
        """Return the disk as the next life finds it."""
        after = Disk(self._world, self._random.randrange(1 << 62))
        after._root = self.cut_power()._root
        return after

    def _write(self, file: _File, view: memoryview) -> int:
        task = self._world.current
        if task is not None and 0 <= task.process.fuse < 2 and view.nbytes > 1:
            super()._write(file, view[: self._random.randrange(view.nbytes)])
            self._world.kill(task.process)
            raise Killed
        return super()._write(file, view)
