"""How a training step of Keras reaches the servers, on each backend.

Keras compiles a whole step, the optimizer in it. A compiled step cannot speak to a server well, so ours only leaves its gradients in
variables, the *outbox*, and the push, the wait and the pull come after it, outside (`docs/decisions/0012-steps-of-keras.md`):

    step := gradients → outbox          compiled: TensorFlow, JAX
            outbox → push → wait → variables

PyTorch compiles nothing: `Optimizer.apply` pushes at once, as it does in a loop of one's own. Variables take the session's memory as it
lies, as PyTorch parameters do: a pull copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from headwater._errors import SettingError

if TYPE_CHECKING:
    from headwater.keras import Optimizer

BACKEND = keras.config.backend()

#: dtype of a variable → that of the arrays in which a session holds it.
_HELD = {"bfloat16": "uint16"}

#: How an iterator over batches ends.
_ENDS: tuple[type[Exception], ...] = (StopIteration,)

if BACKEND == "tensorflow":
    import tensorflow as tf

    _ENDS = (StopIteration, tf.errors.OutOfRangeError)

    def is_traced(tensor: Any) -> bool:
        """Whether a tensor is a name in a graph, and no numbers."""
        return not tf.executing_eagerly()

    def to_numpy(tensor: Any) -> np.ndarray:
        """Return a tensor's numbers as they lie, bfloat16 as uint16."""
        if isinstance(tensor, tf.IndexedSlices):
            tensor = tf.convert_to_tensor(tensor)
        return _held(np.asarray(tensor.read_value() if isinstance(tensor, tf.Variable) else tensor))

    def to_tensor(array: np.ndarray, dtype: str, *, copy: bool = False) -> Any:
        """Return a tensor of the array's memory, or a copy."""
        tensor = tf.convert_to_tensor(array) if copy else tf.experimental.dlpack.from_dlpack(array.__dlpack__())
        return tf.bitcast(tensor, dtype) if dtype in _HELD else tensor

    def assign(variable: Any, tensor: Any) -> None:
        """Let a variable be a tensor's memory."""
        variable.value.assign(tensor)

elif BACKEND == "jax":
    import jax

    def is_traced(tensor: Any) -> bool:
        """Whether a tensor is a name in a graph, and no numbers."""
        return isinstance(tensor, jax.core.Tracer)

    def to_numpy(tensor: Any) -> np.ndarray:
        """Return a tensor's numbers as they lie, bfloat16 as uint16."""
        return _held(np.asarray(tensor))

    def to_tensor(array: np.ndarray, dtype: str, *, copy: bool = False) -> Any:
        """Return a tensor of the array's memory, or a copy."""
        tensor = jax.numpy.array(array, copy=True) if copy else jax.dlpack.from_dlpack(array)
        return tensor.view(dtype) if dtype in _HELD else tensor

    def assign(variable: Any, tensor: Any) -> None:
        """Let a variable be a tensor's memory."""
        variable.assign(tensor)

elif BACKEND == "torch":
    import torch

    def is_traced(tensor: Any) -> bool:
        """Whether a tensor is a name in a graph, and no numbers."""
        return False

    def to_numpy(tensor: Any) -> np.ndarray:
        """Return a tensor's numbers as they lie, bfloat16 as uint16."""
        tensor = tensor.detach().contiguous()
        found: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return found

    def to_tensor(array: np.ndarray, dtype: str, *, copy: bool = False) -> Any:
        """Return a tensor of the array's memory, or a copy."""
        tensor = torch.from_numpy(array.copy() if copy else array)
        return tensor.view(torch.bfloat16) if dtype in _HELD else tensor

    def assign(variable: Any, tensor: Any) -> None:
        """Let a variable be a tensor's memory."""
        variable.value.data = tensor

else:
    raise SettingError(
        f"Expected Keras on tensorflow, jax or torch, got {BACKEND}: set KERAS_BACKEND, which is read at import."
    )


def _held(array: np.ndarray) -> np.ndarray:
    name = array.dtype.name
    return array.view(_HELD[name]) if name in _HELD else array


Read = Callable[[Any], np.ndarray]
Write = Callable[[Any, Any], None]
#: Keeps a function out of what the backend compiles, where it compiles what it sees.
uncompiled = torch.compiler.disable if BACKEND == "torch" else lambda function: function


def read(variable: Any) -> np.ndarray:
    """Return a variable's numbers as they lie."""
    return to_numpy(variable.value)


class Steps:
    """Keras's train function for a model, with the servers' part after each step."""

    def __init__(self, model: keras.Model, optimizer: Optimizer, function: Callable[..., Any]) -> None:
        self._model, self._optimizer = model, optimizer
        self._function = _jax_function(model) if BACKEND == "jax" else function
        self.is_fresh = True  # the next step is the first of a fit

    def __call__(self, *arguments: Any) -> Any:
        """Do as the train function does: `steps_per_execution` steps, or what is left of the data."""
        model = self._model
        count, model.steps_per_execution = model.steps_per_execution, 1  # the servers have their part in each
        if BACKEND == "tensorflow" and isinstance(arguments[0], GeneratorType):  # train_on_batch's one batch
            count = min(count, 1)
        step = self._step_jax if BACKEND == "jax" else self._step
        found = None
        try:
            for _ in range(count):
                found = step(*arguments)
                if BACKEND == "jax":
                    arguments = (found[1], arguments[1])
        except _ENDS:
            if found is None:
                raise
        finally:
            model.steps_per_execution = count
        return found

    def _step(self, data: Any) -> Any:
        """A step where variables hold the state."""
        link, optimizer = self._optimizer.link, self._optimizer
        if self.is_fresh:
            if not optimizer.built:
                data = self._build(data)
            self._begin(read, assign)
        link.bind(assign)
        try:
            with link.stepping():
                logs = self._function(data)
        except _ENDS:
            link.undo(optimizer)
            raise
        link.finish(optimizer, read, assign)
        return logs

    def _step_jax(self, state: tuple[Any, ...], iterator: Iterator[Any]) -> tuple[Any, tuple[Any, ...]]:
        """A step where the state is handed in and out."""
        link, optimizer, model = self._optimizer.link, self._optimizer, self._model
        held = [list(part) for part in state]
        places = {
            id(variable): (k, i)
            for k, variables in enumerate(
                (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables)
            )
            for i, variable in enumerate(variables)
        }

        def read_held(variable: Any) -> np.ndarray:
            k, i = places[id(variable)]
            return to_numpy(held[k][i])

        def write(variable: Any, tensor: Any) -> None:
            k, i = places[id(variable)]
            held[k][i] = tensor

        def hand_over() -> None:
            """Let the model find its state, also where an error ends the fit."""
            model._jax_state = dict(zip(_STATE, held, strict=True))
            model._jax_state_synced = False

        data = next(iterator)
        hand_over()
        if self.is_fresh:
            self._begin(read_held, write)
        link.bind(write)
        with link.stepping():
            logs, held[1:] = self._function(held[0], held[1:], data)
        try:
            link.finish(optimizer, read_held, write)
        finally:
            hand_over()
        return logs, tuple(held)

    def _build(self, iterator: Any) -> Any:
        """Make what TensorFlow makes only as it compiles the first step; returns the iterator, still whole."""
        model = self._model
        if isinstance(iterator, tf.data.Iterator):
            batch = iterator.element_spec
        else:
            batch = next(iterator)
            iterator = chain([batch], iterator)
        if not model.built:
            model._symbolic_build(data_batch=batch)
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        return iterator

    def _begin(self, read: Read, write: Write) -> None:
        """The first step of a fit."""
        layers = self._model._flatten_layers()
        policy = ", ".join(sorted({layer.dtype_policy.name for layer in layers}))
        averaged = [
            variable
            for layer in layers
            if layer.trainable
            for variable in layer._non_trainable_variables
            if keras.backend.is_float_dtype(variable.dtype)
        ]
        self._optimizer.link.begin(self._optimizer, read, write, policy=policy, averaged=averaged)
        self.is_fresh = False


_STATE = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")


def _jax_function(model: keras.Model) -> Callable[..., Any]:
    """Return Keras's train step that takes the parameters and does not return them: they are the session's memory."""

    def step(trainable: Any, others: Any, data: Any) -> Any:
        logs, (_, *others) = model.train_step((trainable, *others), data)
        return logs, [list(part) for part in others]

    if model.run_eagerly or not model.jit_compile:
        return step
    # The old gradients are of no use but for their memory, which the new ones take.
    return jax.jit(step, donate_argnums=1, keep_unused=True)
