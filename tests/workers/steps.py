"""A worker whose gradients are all ones; arguments let one worker do something at a step.

steps.py COUNT [WORKER:STEP:ACTION …]     COUNT 0: without end; ACTION: a function below
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import numpy as np

import headwater as hw
from headwater import _limits
from headwater._messages import AnyMessage, Push, Seal, encode
from headwater._wire import pack_header

SIZE = 40_000  # three blocks: two servers have a part each
ONES = {"w": np.ones(SIZE, np.float32)}
_limits.BEAT_INTERVAL_S = 0.1  # the tests' servers are less patient too


def say(session: hw.Session, text: str) -> None:
    os.write(1, f"worker {session.index} {text}\n".encode())  # in one piece: other workers print too


def fail(_: hw.Session) -> None:
    raise RuntimeError("on purpose")


def exit7(_: hw.Session) -> None:
    sys.exit(7)


def pause(session: hw.Session) -> None:
    say(session, f"pauses as process {os.getpid()}")
    signal.pause()


def kill(session: hw.Session) -> None:
    say(session, f"dies at {time.time()}")
    os.kill(os.getpid(), signal.SIGKILL)


def stop(session: hw.Session) -> None:
    say(session, f"stops at {time.time()}")
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_lock(session: hw.Session) -> None:
    """Keep Python's lock, as a long C call does: nothing of this process that is Python runs meanwhile."""
    say(session, "holds the lock")
    ctypes.PyDLL(None).usleep(1_500_000)


def torn(session: hw.Session) -> None:
    """Die when each server has the push but the last, which has half of it."""
    send_pushes(session, halves=True)
    kill(session)


def unsealed(session: hw.Session) -> None:
    """Die when every server has the push and before it is sealed."""
    send_pushes(session, halves=False)
    kill(session)


def sealed(session: hw.Session) -> None:
    """Die once the push is sealed, before the answer is read."""
    session.push(ONES)
    kill(session)


def rows_of(session: hw.Session) -> hw.Table:
    return session.table("rows", 2, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))


def rows(session: hw.Session) -> None:
    """Push rows with the step to come."""
    rows_of(session).push(range(9), np.ones((9, 2), np.float32))


def staged(session: hw.Session) -> None:
    """Die when every server has this step's rows and before the step is sealed."""
    rows_of(session).push(range(5, 20), np.full((15, 2), 1000.0, np.float32))
    session._tables.settle()  # type: ignore[union-attr]
    kill(session)


def show(session: hw.Session) -> None:
    found = rows_of(session).pull(range(9))
    say(session, f"has {rows_of(session).stats().rows} rows of {found.min()} to {found.max()}")


def send_pushes(session: hw.Session, *, halves: bool) -> None:
    session.gradients["w"][:] = 1000.0  # would show if any of it counted
    assert session._dense is not None
    last = len(session._dense._links) - 1
    for i, link in enumerate(session._dense._links):
        sequence = session._sequence + 1
        message: AnyMessage = Push(sequence)
        if session._dense._is_direct and halves:
            message = Seal(sequence, 1.0, tuple(session._scalars), b"", pushes=True, pull="sent")
        control, payload = encode(message), link.pushed or memoryview(b"")
        whole = pack_header(len(control), payload.nbytes) + control + bytes(payload)
        sent = len(whole) // 2 if halves and i == last else len(whole)
        os.write(link.connection.fileno(), whole[:sent])  # type: ignore[attr-defined]


def main() -> None:
    count = int(sys.argv[1])
    actions = {tuple(map(int, text.split(":")[:2])): globals()[text.split(":")[2]] for text in sys.argv[2:]}
    with hw.connect() as session:
        session.register({"w": np.ones(SIZE, np.float32)}, hw.optim.SGD(lr=1.0))
        step = 0
        while step < count or not count:
            action = actions.get((session.index, step))
            if action is not None:
                action(session)
            session.step(ONES)
            if step == 2:
                say(session, "is under way")
            if count:
                say(session, f"made step {step} with {session.accepted} at {time.time()}")
            step += 1
        w = session.pull()["w"]
        say(session, f"ends at {w.min()} {w.max()}")


if __name__ == "__main__":
    main()
