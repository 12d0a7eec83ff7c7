"""Tables as a Keras layer: its call pulls rows, and what is backward of it pushes their gradients.

The rows live on the servers: the layer has no weights but an empty one, by which gradients come to it. What a push counts for is as in
`_torch_embedding`.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from headwater._errors import SettingError, UsageError
from headwater._keras_steps import BACKEND
from headwater._lookup import Table

if BACKEND == "tensorflow":
    import tensorflow as tf

    def _rows(comes_by: Any, ids: Any, table: Table, is_training: bool) -> Any:
        def pull(ids: np.ndarray) -> np.ndarray:
            return table.pull(ids, touch=is_training)

        def push(ids: np.ndarray, gradients: np.ndarray) -> None:
            table.push(ids, gradients)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def found(empty: Any) -> Any:
            def backward(gradients: Any) -> Any:
                tf.numpy_function(push, [ids, gradients], [])
                return tf.zeros_like(empty)

            rows = tf.numpy_function(pull, [ids], tf.float32)
            rows.set_shape([*ids.shape, table.dim])
            return rows, backward

        return found(comes_by.value)

elif BACKEND == "torch":
    from headwater import _torch_embedding

    def _rows(comes_by: Any, ids: Any, table: Table, is_training: bool) -> Any:
        return _torch_embedding.Embedding(table).train(is_training)(ids) + comes_by.value.sum()


class Embedding(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """As `keras.layers.Embedding`, with any integers as ids and the rows of a table; on TensorFlow and PyTorch.

    In training it pulls and pushes; else it only reads, and leaves no trace in the table. The table's rows are no part of what
    `model.save_weights` writes, and a model with this layer cannot be saved whole.
    """

    def __init__(self, table: Table, **options: Any) -> None:
        if BACKEND == "jax":
            raise SettingError(
                "Expected Keras on TensorFlow or PyTorch for a table, got jax: a step that it compiles cannot wait for rows. Set "
                "KERAS_BACKEND, or pull and push rows beside the model."
            )
        super().__init__(**options)
        self.table = table
        self.supports_jit = False

    def build(self, input_shape: Any) -> None:
        """Make the empty weight."""
        self.comes_by = self.add_weight(shape=(0,), name="comes_by")

    def call(self, ids: Any, training: bool | None = None) -> Any:
        """Return (*ids.shape, dim). Raises LayoutError for ids that are no integers."""
        return keras.ops.cast(_rows(self.comes_by, ids, self.table, bool(training)), self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """Return the shape of what `call` returns."""
        return (*input_shape, self.table.dim)

    def get_config(self) -> dict[str, Any]:
        """Raises UsageError: rows are on the servers."""
        raise UsageError(
            f"Expected a model without tables, got one with {self.table.name!r}: save its weights with save_weights(), and the rows with "
            "session.save()."
        )
