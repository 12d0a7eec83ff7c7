"""A job in this process that is kept in a store: each step takes 1 from every element, until so many have been made.

kept.py STORE DURABILITY STEPS
"""

import sys

import numpy as np

import headwater as hw

store, kind, steps = sys.argv[1], hw.durability.Durability.parse(sys.argv[2]), int(sys.argv[3])
with hw.connect(durability=kind, store=store, resume=True) as session:
    session.register({"w": np.zeros(4, np.float32)}, hw.optim.SGD(lr=1.0))
    while session.clock < steps:
        session.step({"w": np.ones(4, np.float32)})
        print(f"made step {session.clock} ", flush=True)
    print(f"ends at {session.clock} {session.parameters['w'][0]}", flush=True)
