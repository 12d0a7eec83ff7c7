"""The Open Inference Protocol, version 2, as bytes and arrays. No I/O.

    body   := JSON, or JSON followed by raw tensors (the binary extension); then the header Inference-Header-Content-Length says
              how long the JSON is, and a tensor's parameter binary_data_size how many bytes of the rest are its own, in order
    BYTES  := per element, raw: length u32, little-endian, then so many bytes; in JSON a string in UTF-8

Raw tensors are little-endian in C order. BF16 is held as the uint16 of its bits: NumPy has no such type. NaN and infinity become
null in JSON, which cannot say them; ask for binary outputs where they matter. What is malformed is a RequestError that says
what was expected; nothing here is as large as what a request claims before its bytes have been counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from headwater import _limits
from headwater._errors import RequestError

LENGTH_HEADER = "Inference-Header-Content-Length"
#: The protocol's names of types, and the arrays that hold them.
DATATYPES = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"), "UINT16": np.dtype("<u2"), "UINT32": np.dtype("<u4"), "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"), "INT16": np.dtype("<i2"), "INT32": np.dtype("<i4"), "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"), "FP32": np.dtype("<f4"), "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
    "BYTES": np.dtype("O"),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DATATYPES.items() if name != "BF16"}

_OPENING = re.compile(rb"[\[\s]*")

Parameters = dict[str, bool | int | float | str]


class Tensor(NamedTuple):
    """A named array."""

    name: str
    datatype: str  # a key of DATATYPES
    array: np.ndarray  # of that dtype; read-only where it came with a request

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> Tensor:
        """Return a tensor of the array's own type. Raises KeyError for one that the protocol does not have."""
        return cls(name, _NAMES[array.dtype], array)


class Wanted(NamedTuple):
    """An output that a request asks for."""

    name: str
    is_binary: bool


class Inference(NamedTuple):
    """A request, understood."""

    id: str
    inputs: list[Tensor]
    outputs: list[Wanted] | None  # None: all, as `is_binary` says
    is_binary: bool


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters = {}
    data: msgspec.Raw = msgspec.Raw()  # empty: there is none


class _Output(msgspec.Struct):
    name: str
    parameters: Parameters = {}


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str = ""
    parameters: Parameters = {}
    outputs: list[_Output] | None = None


def decode_request(body: bytes, json_bytes: str | None) -> Inference:
    """Understand the body of a request; the arrays of raw tensors lie in it.

    json_bytes: the header LENGTH_HEADER. Raises RequestError.
    """
    length = len(body) if json_bytes is None else _length(json_bytes, len(body))
    try:
        request = msgspec.json.decode(memoryview(body)[:length], type=_Request)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"Expected an inference request in JSON, got: {error}.") from None
    raw = memoryview(body)[length:]
    inputs = []
    for each in request.inputs:
        tensor, raw = _read_input(each, raw)
        inputs.append(tensor)
    if raw.nbytes:
        raise RequestError(
            f"Expected as many bytes after the JSON as the inputs' binary_data_size say, got {raw.nbytes} more."
        )
    if len({each.name for each in inputs}) < len(inputs):
        raise RequestError("Expected each input once, got one twice.")
    is_binary = _flag(request.parameters, "binary_data_output", False)
    outputs = [
        Wanted(each.name, _flag(_known(each.name, each.parameters), "binary_data", is_binary))
        for each in request.outputs or ()
    ]
    return Inference(request.id, inputs, outputs or None, is_binary)


def _length(text: str, limit: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= limit):
        raise RequestError(f"Expected {LENGTH_HEADER} to be a number of at most {limit} bytes, got {text[:40]!r}.")
    return int(text)


def _known(name: str, parameters: Parameters) -> Parameters:
    """Refuse what would be answered wrongly were it passed over."""
    for key in ("shared_memory_region", "classification"):
        if key in parameters:
            raise RequestError(
                f"Expected tensors in the request's body, got the parameter {key} — tensor {name[:80]!r}."
            )
    return parameters


def _flag(parameters: Parameters, key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise RequestError(f"Expected true or false for {key}, got {value!r}.")
    return value


def _read_input(given: _Input, raw: memoryview) -> tuple[Tensor, memoryview]:
    """Return an input's array, and what of the raw bytes is left for others."""
    name, shape, parameters = given.name, given.shape, _known(given.name, given.parameters)
    where = f"input {name[:80]!r}"
    dtype = DATATYPES.get(given.datatype)
    if dtype is None:
        raise RequestError(f"Expected a datatype among {', '.join(DATATYPES)}, got {given.datatype[:40]!r} — {where}.")
    if len(shape) > _limits.TENSOR_DIMENSIONS or any(not 0 <= size < 1 << 63 for size in shape):
        raise RequestError(
            f"Expected a shape of at most {_limits.TENSOR_DIMENSIONS} sizes from 0 on, got {str(shape)[:80]} — {where}."
        )
    count = math.prod(shape)
    size = parameters.get("binary_data_size")
    data = bytes(given.data)
    if (size is None) == (not data):
        raise RequestError(f"Expected either data or binary_data_size, got {'both' if data else 'neither'} — {where}.")
    if size is None:
        flat = _from_json(given.datatype, data, count, where)
    elif isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= raw.nbytes:
        raise RequestError(
            f"Expected binary_data_size to be a number of at most the {raw.nbytes} bytes that are left, got {size!r} — {where}."
        )
    else:
        mine, raw = raw[:size], raw[size:]
        flat = _from_raw(given.datatype, dtype, mine, count, where)
    return Tensor(name, given.datatype, flat.reshape(shape)), raw


def _from_raw(datatype: str, dtype: np.dtype[Any], raw: memoryview, count: int, where: str) -> np.ndarray:
    if datatype == "BYTES":
        return _objects(_split_bytes(raw, where), count, where)
    if raw.nbytes != count * dtype.itemsize:
        raise RequestError(f"Expected {count * dtype.itemsize} bytes of {datatype}, got {raw.nbytes} — {where}.")
    if datatype == "BOOL" and bytes(raw).translate(None, b"\0\1"):
        raise RequestError(f"Expected bytes of 0 or 1 for BOOL, got others — {where}.")
    return np.frombuffer(raw, dtype)


def _split_bytes(raw: memoryview, where: str) -> list[bytes]:
    elements, at = [], 0
    while at < raw.nbytes:
        size = int.from_bytes(raw[at : at + 4], "little")
        at += 4 + size
        if at > raw.nbytes:
            raise RequestError(
                f"Expected BYTES elements to fill binary_data_size, got one of {size} bytes beyond it — {where}."
            )
        elements.append(bytes(raw[at - size : at]))
    return elements


def _objects(elements: Sequence[bytes], count: int, where: str) -> np.ndarray:
    if len(elements) != count:
        raise RequestError(f"Expected {count} elements as the shape says, got {len(elements)} — {where}.")
    array = np.empty(count, object)
    array[:] = elements
    return array


def _from_json(datatype: str, text: bytes, count: int, where: str) -> np.ndarray:
    kind: Any = {"BOOL": bool, "BYTES": str}.get(datatype, float if "F" in datatype else int)
    nested = _OPENING.match(text).group().count(b"[")  # type: ignore[union-attr]  # it always matches
    if nested > _limits.TENSOR_DIMENSIONS:
        raise RequestError(f"Expected at most {_limits.TENSOR_DIMENSIONS} arrays in one another, got more — {where}.")
    for _ in range(max(nested, 1)):  # flat, or as the shape is
        kind = list[kind]
    try:
        values: list[Any] = msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"Expected an array of {datatype}, got: {error} — {where}.") from None
    for _ in range(nested - 1):
        if len({len(each) for each in values}) > 1:
            raise RequestError(f"Expected rows of equal lengths, got others — {where}.")
        values = [value for each in values for value in each]
    if datatype == "BYTES":
        return _objects([value.encode() for value in values], count, where)
    if len(values) != count:
        raise RequestError(f"Expected {count} elements as the shape says, got {len(values)} — {where}.")
    if datatype == "BF16":
        return to_bf16(np.array(values, np.float32))
    try:
        with np.errstate(over="ignore"):  # to infinity, as floats go
            return np.array(values, DATATYPES[datatype])
    except OverflowError as error:
        raise RequestError(f"Expected values that {datatype} holds, got: {error} — {where}.") from None


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even; returns its bits, uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Return the float32 of a bfloat16's bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode_answer(
    model: str, version: str, request: Inference, outputs: Iterable[Tensor]
) -> tuple[list[bytes | memoryview], int | None]:
    """Return the pieces of an answer's body, and the length of its JSON where raw tensors follow. Raises RequestError."""
    found = {each.name: each for each in outputs}
    wanted = request.outputs or [Wanted(name, request.is_binary) for name in found]
    described, pieces = [], list[bytes | memoryview]()
    for name, is_binary in wanted:
        tensor = found.get(name)
        if tensor is None:
            raise RequestError(f"Expected outputs among {', '.join(found)}, got {name[:80]!r}.")
        about: dict[str, Any] = {"name": name, "datatype": tensor.datatype, "shape": tensor.array.shape}
        if is_binary:
            raw = _to_raw(tensor)
            about["parameters"] = {"binary_data_size": len(raw)}
            pieces.append(raw)
        else:
            about["data"] = _to_json(tensor)
        described.append(about)
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": described}
    if request.id:
        answer["id"] = request.id
    json = msgspec.json.encode(answer)
    return [json, *pieces], len(json) if pieces else None


def _to_raw(tensor: Tensor) -> bytes | memoryview:
    if tensor.datatype == "BYTES":
        return b"".join(len(each).to_bytes(4, "little") + each for each in tensor.array.ravel())
    array = np.ascontiguousarray(tensor.array)
    return array.reshape(-1).view(np.uint8).data if array.size else b""


def _to_json(tensor: Tensor) -> list[Any]:
    flat = tensor.array.ravel()
    if tensor.datatype == "BYTES":
        return [each.decode(errors="replace") for each in flat]
    values: list[Any] = (from_bf16(flat) if tensor.datatype == "BF16" else flat).tolist()
    return values


class Slot(NamedTuple):
    """What a model says of an input or output of its own."""

    name: str
    datatype: str | None  # None: it does not say
    shape: tuple[int, ...]  # -1: any size


def describe(
    model: str, versions: Sequence[int], platform: str, inputs: Sequence[Slot], outputs: Sequence[Slot]
) -> dict[str, Any]:
    """Return a model's metadata. A datatype that the model does not say is left out."""
    return {
        "name": model,
        "versions": [str(version) for version in versions],
        "platform": platform,
        "inputs": [_slot(each) for each in inputs],
        "outputs": [_slot(each) for each in outputs],
    }


def _slot(slot: Slot) -> Mapping[str, Any]:
    says: dict[str, Any] = {"name": slot.name, "shape": slot.shape}
    return says if slot.datatype is None else says | {"datatype": slot.datatype}
