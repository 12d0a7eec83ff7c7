"""Three workers go by the job's clock; the second comes to an end once, and the first waits until it is back.

again.py ACTION: a function below, which worker 1 calls at clock 3
"""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np

import headwater as hw
from headwater import _limits

ONES = {"w": np.ones(40_000, np.float32)}
COUNT = 20
_limits.TERMINATE_S = 1


def say(session: hw.Session, text: str) -> None:
    os.write(1, f"worker {session.index} {text}\n".encode())  # in one piece: other workers print too


def dies(_: hw.Session) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


always_dies = dies_and_fails = dies


def waits(session: hw.Session) -> None:
    session.push(ONES)
    say(session, f"waits as process {os.getpid()}")
    session.wait()


def pauses(session: hw.Session) -> None:
    try:
        say(session, f"pauses as process {os.getpid()}")
        signal.pause()
    finally:
        session.close()
        with hw.connect() as other:  # the index is free: it has left before its connections end
            say(session, f"leaves, and has left: {other.index == session.index}")


def stays(session: hw.Session) -> None:
    has_said = False
    while True:
        try:
            if not has_said:
                has_said = True
                say(session, f"stays as process {os.getpid()}")
            signal.pause()
        except SystemExit:
            say(session, "stays all the same")


def main() -> None:
    action = sys.argv[1]
    with hw.connect() as session:
        is_back = session.index == 1 and "ends" in session.state
        if is_back:
            session.state["is back"] = True
        session.register({"w": np.ones(40_000, np.float32)}, hw.optim.SGD(lr=1.0))
        if is_back:
            say(session, f"is back at clock {session.clock} with {session.parameters['w'].max()}")
            if action == "dies_and_fails":
                raise RuntimeError("on purpose")
        first = session.clock
        while session.clock < COUNT or (action == "always_dies" and session.state.get("ends", 0) < 3):
            is_due = action == "always_dies" and session.clock > first if is_back else session.clock == 3
            if session.index == 1 and is_due:
                session.state["ends"] = session.state.get("ends", 0) + 1
                globals()[action](session)
            if session.index == 0 and session.clock == 3 and action == "waits":
                wait_until_back(session)
                session.step(ONES)
                say(session, f"made the step with {session.accepted}")
            if session.index == 0 and session.clock == 10 and action.startswith("dies"):
                wait_until_back(session)
            session.step(ONES)
        say(session, f"ends at {session.parameters['w'].max()}")


def wait_until_back(session: hw.Session) -> None:
    """Ask until the worker that was killed says so in the job's state, which tells nobody when it changes."""
    while "is back" not in session.state:
        time.sleep(0.01)


if __name__ == "__main__":
    main()
