"""Keras against parameter servers: `headwater run -n 2 examples/keras_linear.py`, or with `python` alone."""

import keras
import numpy as np

import headwater as hw

x = np.random.default_rng(0).uniform(-1.0, 1.0, (256, 1))
strategy = hw.keras.ParameterServerStrategy()
print(strategy.get_config())
with strategy.scope():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mean_squared_error")
model.fit(x, 2 * x + 1, batch_size=4, epochs=20, verbose=0)
kernel, bias = (w.item() for w in model.get_weights())
print(f"y = {kernel:.2f}x + {bias:.2f}")
