"""A forked child that touches the session is refused; the parent's session goes on, and goes on after the child's end."""

import os

import numpy as np

import headwater as hw

with hw.connect() as session:
    session.register({"w": np.zeros(3, np.float32)})
    session.step({"w": np.ones(3, np.float32)})
    child = os.fork()
    if child == 0:
        try:
            session.step({"w": np.ones(3, np.float32)})
        except hw.errors.ClosedError as error:
            print(f"ClosedError: {error}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    session.step({"w": np.ones(3, np.float32)})
    print(f"parent at clock {session.clock}")
