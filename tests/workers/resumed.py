"""A worker of a job that goes on: says where it is, makes two steps, and ends."""

from __future__ import annotations

import os

import numpy as np

import headwater as hw

ONES = {"w": np.ones(40_000, np.float32)}

with hw.connect() as session:
    session.register(ONES, hw.optim.SGD(lr=1.0))
    w = session.pull()["w"]
    assert w.min() == w.max()
    os.write(1, f"worker {session.index} is at clock {session.clock} {w[0]}\n".encode())
    for _ in range(2):
        session.step(ONES)
