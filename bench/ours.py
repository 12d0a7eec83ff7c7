"""Headwater's side: workers whose step is the session's. The servers are started as users start them, by `fleet_server` in `core`."""

from __future__ import annotations

import os
import time

import numpy as np

import headwater as hw
from bench.harness import Step


def optimizer_of(name: str) -> hw.optim.SGD | hw.optim.Adam:
    """Return the settings that the figures name."""
    match name:
        case "sgd":
            return hw.optim.SGD(lr=1e-3)
        case "clipped":
            return hw.optim.SGD(lr=1e-3, clip_norm=1.0)
        case "adam":
            return hw.optim.Adam(lr=1e-3)
        case "adam, clipped":
            return hw.optim.Adam(lr=1e-3, clip_norm=1.0)
    raise ValueError(name)


def connect(address: str, workers: int, consistency: str = "bsp", transport: str = "auto") -> hw.Session:
    """Connect; the worker's index and the token are in the environment."""
    return hw.connect(address, workers=workers, consistency=hw.Consistency.parse(consistency), transport=transport)


def pushing_worker(
    address: str,
    workers: int,
    parameters: int,
    optimizer: str = "sgd",
    consistency: str = "bsp",
    transport: str = "shm",
) -> Step:
    """Return a step that pushes gradients that are already in place and pulls the parameters: nothing but Headwater."""
    session = connect(address, workers, consistency, transport)
    session.register({"weights": np.full(parameters, 0.5, np.float32)}, optimizer=optimizer_of(optimizer))
    session.gradients["weights"].fill(1e-3)
    return session.step


def working_worker(
    address: str, workers: int, consistency: str, parameters: int, work: list[tuple[float, int]]
) -> Step:
    """Return a step that works first. work: by worker, seconds to sleep, as when a device computes, and matrix products."""
    push = pushing_worker(address, workers, parameters, consistency=consistency)
    sleep_s, products = work[int(os.environ["HEADWATER_WORKER"])]
    matrix = np.full((512, 512), 1e-3, np.float32)
    product = np.empty_like(matrix)

    def step() -> None:
        if sleep_s:
            time.sleep(sleep_s)
        for _ in range(products):
            np.matmul(matrix, matrix, out=product)
        push()

    return step
