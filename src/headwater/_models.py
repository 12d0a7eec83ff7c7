"""A framework's model as what serves it sees it: weights in, named arrays in, named arrays out."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from headwater._errors import RequestError, SettingError
from headwater._oip import DATATYPES, Slot, Tensor
from headwater._subscription import framework_of
from headwater._versions import Weights

_TORCH_NAMES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64", "string": "BYTES",
}  # fmt: skip


class ServedModel(Protocol):
    """A model of its own: nobody else holds its tensors. `run` is called by one thread at a time."""

    platform: str
    inputs: Sequence[Slot]
    outputs: Sequence[Slot]  # none: known once it has run

    def apply(self, weights: Weights) -> None:
        """Take on a version's weights, and try them on the example that the model gives. Nobody runs the model meanwhile.

        Raises LayoutError before anything is touched where names, shapes or dtypes do not fit.
        """

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Raise RequestError where names or types of inputs are others than the model's."""

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the outputs; the arrays are the caller's, and may be overwritten by him. Raises whatever the model raises."""


def open_model(spec: str, device: str = "cpu") -> Callable[[], ServedModel]:
    """Return what makes a new instance of the model that `package.module:build` builds, a torch.nn.Module or a Keras model.

    The current folder is searched, too. Raises SettingError where there is no such function, and when what it builds is neither.
    """
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        build = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"Expected --model package.module:function, got {spec!r}: {error}.") from error
    return lambda: wrap(build(), device)


def wrap(model: Any, device: str = "cpu") -> ServedModel:
    """Return what serves a torch.nn.Module or a Keras model. Raises SettingError for anything else."""
    match framework_of(model):
        case "keras":
            return KerasModel(model, device)
        case "torch":
            return TorchModel(model, device)
    raise SettingError(f"Expected build() to return a torch.nn.Module or a keras.Model, got {type(model).__name__}.")


class _Arguments:
    """The inputs of a function, by name."""

    def __init__(self, function: Callable[..., Any], skipped: Sequence[str] = ()) -> None:
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in skipped]
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.names = [p.name for p in named]
        self.needed = [p.name for p in named if p.default is p.empty]
        self.takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters)


def _check(inputs: Sequence[Tensor], slots: Sequence[Slot], needed: Iterable[str], takes_more: bool) -> None:
    known, given = {slot.name: slot for slot in slots}, {each.name for each in inputs}
    missing = [name for name in needed if name not in given]
    unknown = [] if takes_more else sorted(given - known.keys())
    if missing or unknown:
        got = ", ".join(sorted(given))[:200] or "none"
        raise RequestError(f"Expected the inputs {', '.join(known) or 'that the model names'}, got {got}.")
    for each in inputs:
        slot = known.get(each.name)
        if slot is None or slot.datatype is None:
            continue
        if each.datatype != slot.datatype or len(each.array.shape) != len(slot.shape):
            raise RequestError(
                f"Expected {slot.datatype} of shape {list(slot.shape)}, got {each.datatype} of shape {list(each.array.shape)} — "
                f"input {each.name!r}."
            )


def _named(result: Any, is_tensor: Callable[[Any], bool], names: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """Name what a model returns: one tensor, several, or several by name; what is none is left out."""
    if is_tensor(result):
        return [(names[0] if names else "output", result)]
    if isinstance(result, Mapping):
        return [(str(name), each) for name, each in result.items() if is_tensor(each)]
    names = names or getattr(result, "_fields", None) or [f"output_{i}" for i in range(len(result))]
    return [(name, each) for name, each in zip(names, result, strict=True) if is_tensor(each)]


class TorchModel:
    """A torch.nn.Module in evaluation; its inputs are the parameters of `forward`.

    `example_input_array`, as Lightning has it (a tensor, a tuple or a dict by name), says their types, and is run whenever weights
    are applied.
    """

    platform = "pytorch"

    def __init__(self, module: Any, device: str = "cpu") -> None:
        self._module, self._device = module.eval().requires_grad_(False).to(device), device
        self._arguments = _Arguments(module.forward)
        example = getattr(module, "example_input_array", None)
        if example is not None and not isinstance(example, Mapping):
            several = example if isinstance(example, (tuple, list)) else (example,)
            example = dict(zip(self._arguments.names, several, strict=False))
        self._example = example and {name: _from_torch(name, each) for name, each in example.items()}
        self.inputs: Sequence[Slot] = [self._slot(name) for name in self._arguments.names]
        self.outputs: Sequence[Slot] = ()

    def _slot(self, name: str) -> Slot:
        example = (self._example or {}).get(name)
        return Slot(name, None, (-1,)) if example is None else _slot_of(example)

    def apply(self, weights: Weights) -> None:
        from headwater.torch import load_weights

        load_weights(self._module, weights)
        if self._example:
            self.outputs = [_slot_of(each) for each in self.run(self._example)]

    def check(self, inputs: Sequence[Tensor]) -> None:
        for each in inputs:
            if each.datatype == "BYTES":
                raise RequestError(f"Expected numbers, got BYTES — input {each.name!r}.")
        _check(inputs, self.inputs, self._arguments.needed, self._arguments.takes_more)

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        import torch

        with torch.inference_mode():
            given = {name: self._tensor(each) for name, each in inputs.items()}
            result = self._module(**given)
            return [_from_torch(name, each) for name, each in _named(result, torch.is_tensor)]

    def _tensor(self, given: Tensor) -> Any:
        import torch

        if given.datatype == "BF16":
            return torch.from_numpy(given.array.view(np.int16)).view(torch.bfloat16).to(self._device)
        return torch.from_numpy(given.array).to(self._device)


def _slot_of(tensor: Tensor) -> Slot:
    """Describe what is like this one, with any number of rows."""
    return Slot(tensor.name, tensor.datatype, (-1, *tensor.array.shape[1:]) if tensor.array.shape else ())


def _from_torch(name: str, tensor: Any) -> Tensor:
    import torch

    datatype = _TORCH_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if datatype is None:
        raise TypeError(f"Expected a type that the protocol has, got {tensor.dtype} — output {name!r}.")
    tensor = tensor.detach().cpu().contiguous()
    array = tensor.view(torch.int16).numpy().view(np.uint16) if datatype == "BF16" else tensor.numpy()
    return Tensor(name, datatype, array)


class KerasModel:
    """A built Keras model, on whatever backend; its inputs are those of a functional model, by name, or the parameters of `call`."""

    platform = "keras"

    def __init__(self, model: Any, device: str = "cpu") -> None:
        if not model.built:
            raise SettingError(
                f"Expected build() to return a model whose variables are there, got {model.name!r} unbuilt: begin it with "
                "keras.Input, or call it once on an example."
            )
        self._model, self._device = model, device
        self.inputs: Sequence[Slot] = [_keras_slot(each) for each in getattr(model, "inputs", None) or ()]
        self.outputs: Sequence[Slot] = [
            _keras_slot(each, name)
            for each, name in zip(getattr(model, "outputs", None) or (), _output_names(model), strict=False)
        ]
        self._is_functional = bool(self.inputs)
        self._needed, self._takes_more = [slot.name for slot in self.inputs], False
        if not self._is_functional:
            arguments = _Arguments(model.call, skipped=("training", "mask"))
            self.inputs = [Slot(name, None, (-1,)) for name in arguments.names]
            self._needed, self._takes_more = arguments.needed, arguments.takes_more

    def apply(self, weights: Weights) -> None:
        from headwater.keras import load_weights

        load_weights(self._model, weights)

    def check(self, inputs: Sequence[Tensor]) -> None:
        _check(inputs, self.inputs, self._needed, self._takes_more)

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        import keras

        with keras.device(self._device):
            given = {name: self._tensor(each) for name, each in inputs.items()}
            if not self._is_functional:
                result = self._model(**given, training=False)
            elif len(given) == 1:
                result = self._model(next(iter(given.values())), training=False)
            elif isinstance(getattr(self._model, "input", None), Mapping):
                result = self._model({name: given[name] for name in self._model.input}, training=False)
            else:
                result = self._model([given[slot.name] for slot in self.inputs], training=False)
            names = [slot.name for slot in self.outputs]
            return [_from_keras(name, each) for name, each in _named(result, keras.ops.is_tensor, names)]

    @staticmethod
    def _tensor(given: Tensor) -> Any:
        import keras

        if given.datatype == "BF16":
            from headwater._oip import from_bf16

            return keras.ops.convert_to_tensor(from_bf16(given.array), "bfloat16")
        if given.datatype == "BYTES":
            return keras.ops.convert_to_tensor(given.array, "string")
        return keras.ops.convert_to_tensor(given.array)


def _output_names(model: Any) -> list[str]:
    output = getattr(model, "output", None)  # a Sequential has none
    if isinstance(output, Mapping):
        return [str(name) for name in output]
    return [
        str(name)
        for name in getattr(model, "output_names", None)
        or [each.name for each in getattr(model, "outputs", None) or ()]
    ]


def _keras_slot(tensor: Any, name: str = "") -> Slot:
    datatype = _TORCH_NAMES.get(str(tensor.dtype))
    return Slot(name or tensor.name, datatype, tuple(-1 if size is None else int(size) for size in tensor.shape))


def _from_keras(name: str, tensor: Any) -> Tensor:
    import keras

    datatype = _TORCH_NAMES.get(keras.backend.standardize_dtype(tensor.dtype))
    if datatype is None:
        raise TypeError(f"Expected a type that the protocol has, got {tensor.dtype} — output {name!r}.")
    if datatype == "BF16":
        from headwater._oip import to_bf16

        return Tensor(name, datatype, to_bf16(keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))))
    array = np.asarray(keras.ops.convert_to_numpy(tensor))
    return Tensor(name, datatype, array if datatype == "BYTES" else array.astype(DATATYPES[datatype], copy=False))
