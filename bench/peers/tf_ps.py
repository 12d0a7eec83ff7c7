"""TensorFlow's own parameter servers: tf.distribute.ParameterServerStrategy on a cluster of processes, with a training loop of its own.

The model and the batch are those of `bench.keras`, without Keras, whose version 3 has no part in it. Workers push when they have
computed, and wait for nobody.
"""

from __future__ import annotations

import json
import os
from typing import Any

import tensorflow as tf

from bench.harness import Step
from bench.keras import LAYERS, WIDTH, batch

AT_ONCE = 8  # steps that are scheduled before any is waited for

_kept: list[Any] = []


def cluster_member(cluster: dict[str, list[str]], task: str, index: int) -> str:
    """Be a worker or a parameter server."""
    _kept.append(tf.distribute.Server(cluster, job_name=task, task_index=index, protocol="grpc"))
    return "up"


def coordinator(cluster: dict[str, list[str]]) -> Step:
    """Return a step that lets the workers make AT_ONCE steps."""
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "chief", "index": 0}})
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    with strategy.scope():
        weights = [tf.Variable(tf.random.normal((WIDTH, WIDTH), stddev=WIDTH**-0.5)) for _ in range(LAYERS)]
        biases = [tf.Variable(tf.zeros(WIDTH)) for _ in range(LAYERS)]
    x, y = (tf.constant(array) for array in batch())

    def replica() -> None:
        with tf.GradientTape() as tape:
            hidden = x
            for weight, bias in zip(weights, biases, strict=True):
                hidden = tf.nn.relu(tf.matmul(hidden, weight) + bias)
            loss = tf.reduce_mean(tf.square(hidden - y))
        for variable, gradient in zip(weights + biases, tape.gradient(loss, weights + biases), strict=True):
            variable.assign_sub(0.01 * gradient)

    @tf.function  # type: ignore[untyped-decorator]
    def training_step() -> None:
        strategy.run(replica)

    scheduler = tf.distribute.coordinator.ClusterCoordinator(strategy)

    def step() -> None:
        for _ in range(AT_ONCE):
            scheduler.schedule(training_step)
        scheduler.join()

    return step
