"""models.2: Keras on each backend, two workers against one process, and against TensorFlow's own parameter servers.

The model: 25 M float32 parameters in dense layers, batch 32, SGD, `model.train_on_batch` with one batch again and again. Two workers with
one thread each make two batches a step, BSP; the one process makes one batch a step with both cores. All steps are of 32 samples,
and all processes' are counted, so steps/s compare as samples/s do.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.core import Answer, start_server
from bench.harness import Contestant, Fleet, Step, interleave
from bench.report import Check

STEPS = "steps/s of 32 samples"

WIDTH, LAYERS, BATCH = 2500, 4, 32  # 25 M parameters


def make_model() -> Any:
    import keras

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(WIDTH, activation="relu") for _ in range(LAYERS)]
    return keras.Sequential([keras.Input((WIDTH,)), *layers])


def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((BATCH, WIDTH)).astype(np.float32) for _ in range(2))  # type: ignore[return-value]


def training_step(model: Any) -> Step:
    x, y = batch()
    return lambda: model.train_on_batch(x, y)


def alone() -> Step:
    """Return a step of plain Keras."""
    model = make_model()
    model.compile(optimizer="sgd", loss="mean_squared_error")
    return training_step(model)


def worker(address: str, workers: int) -> Step:
    """Return a step of Keras against the servers."""
    import headwater as hw

    strategy = hw.keras.ParameterServerStrategy(session=hw.connect(address, workers=workers))
    model = make_model()
    with strategy.scope():
        model.compile(optimizer="sgd", loss="mean_squared_error")
    return training_step(model)


#: Backend → what keeps a worker to one thread of two, beside OMP_NUM_THREADS.
ONE_THREAD = {
    "tensorflow": {"TF_NUM_INTRAOP_THREADS": "1"},
    "jax": {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"},
    "torch": {},
}


def backends(fleet: Fleet) -> Answer:
    """models.2"""
    cores = str(len(os.sched_getaffinity(0)))
    contestants = []
    for backend, threads in ONE_THREAD.items():
        address, _ = start_server(fleet)
        chosen = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        workers = [
            fleet.start("bench.keras.worker", address, 2, **chosen, **threads, HEADWATER_WORKER=str(i))
            for i in range(2)
        ]
        one = fleet.start("bench.keras.alone", **chosen, OMP_NUM_THREADS=cores)
        contestants += [Contestant(f"headwater, {backend}", workers), Contestant(f"one process, {backend}", [one])]
    contestants.append(tensorflow_servers(fleet))
    samples = interleave(*contestants)
    samples.show(STEPS)
    ratio = samples.ratio
    checks = [Check("times TensorFlow's ParameterServerStrategy", ratio("headwater, tensorflow", TENSORFLOW), 3)]
    checks += [
        Check(
            f"of one process with both cores, {backend} (samples/s)",
            ratio(f"headwater, {backend}", f"one process, {backend}"),
            0.7,
        )
        for backend in ONE_THREAD
    ]
    return checks, samples.medians(STEPS)


TENSORFLOW = "TensorFlow's servers"


def tensorflow_servers(fleet: Fleet) -> Contestant:
    """Start a cluster of two workers and a parameter server."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        chief, *places = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    cluster = {"chief": [chief], "worker": places[:2], "ps": places[2:]}
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    member = "bench.peers.tf_ps.cluster_member"
    members = [fleet.start(member, cluster, "worker", i, **quiet, **ONE_THREAD["tensorflow"]) for i in range(2)]
    members.append(fleet.start(member, cluster, "ps", 0, **quiet))
    for each in members:
        each.ready()
    return Contestant(TENSORFLOW, [fleet.start("bench.peers.tf_ps.coordinator", cluster, **quiet)], worth=8)


FIGURES: dict[str, tuple[str, str, Callable[[Fleet], Answer]]] = {
    "models.2": (
        "Keras, 25 M parameters, batch 32, 2 workers, against TensorFlow's own servers",
        "times its steps/s",
        backends,
    ),
}
