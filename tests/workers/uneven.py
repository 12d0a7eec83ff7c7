"""Each worker has another number of items."""

import sys

import numpy as np

import headwater as hw

with hw.connect() as session:
    session.register({"w": np.ones(3, np.float32)})
    for _ in range(2 + 3 * session.index):
        session.step({"w": np.ones(3, np.float32)})
sys.stdout.write(f"worker {session.index} made {2 + 3 * session.index} steps\n")
