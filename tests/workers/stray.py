"""Worker 0 writes into the parameters where it should not; every worker prints what it then reads."""

import sys

import numpy as np

import headwater as hw

with hw.connect() as session:
    session.register({"w": np.ones(40_000, np.float32)}, hw.optim.SGD(lr=1.0))
    seen = []
    for _ in range(4):
        if session.index == 0:
            session.parameters["w"][::7] = 99.0
        session.step({"w": np.ones(40_000, np.float32)})
        w = session.parameters["w"]
        seen.append([float(w.min()), float(w.max())])
    session.parameters["w"][:] = 99.0
    seen.append(session.pull()["w"][:1].tolist())
sys.stdout.write(f"worker {session.index} saw {seen}\n")
