"""The Open Inference Protocol, as bytes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from headwater._errors import RequestError
from headwater._oip import DATATYPES, Inference, Tensor, decode_request, encode_answer, from_bf16, to_bf16

SHAPES = nps.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)


@st.composite
def tensors(draw: st.DrawFn, *, is_finite: bool = False) -> Tensor:
    """Any tensor that the protocol has."""
    datatype = draw(st.sampled_from(sorted(DATATYPES)))
    shape = draw(SHAPES)
    if datatype == "BYTES":
        elements = st.text(max_size=5).map(str.encode) if is_finite else st.binary(max_size=5)
        return Tensor("x", datatype, draw(nps.arrays(object, shape, elements=elements)))
    if datatype == "BF16":
        values = draw(nps.arrays(np.float32, shape, elements=st.floats(-1000, 1000, width=16)))
        return Tensor("x", datatype, to_bf16(values))
    dtype = DATATYPES[datatype]
    elements = nps.from_dtype(dtype, allow_nan=not is_finite, allow_infinity=not is_finite)
    return Tensor("x", datatype, draw(nps.arrays(dtype, shape, elements=elements)))


def answer(tensor: Tensor, *, is_binary: bool) -> tuple[bytes, str | None]:
    """Return an answer with the tensor, made into a request for it."""
    pieces, size = encode_answer("m", "1", Inference("", [], [], is_binary), [tensor])
    says = msgspec.json.decode(pieces[0])
    body = msgspec.json.encode({"inputs": says["outputs"]})
    return b"".join([body, *pieces[1:]]), None if size is None else str(len(body))


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one[:2] == other[:2]
    assert one.array.dtype == other.array.dtype
    assert one.array.shape == other.array.shape
    assert one.array.tolist() == other.array.tolist() or one.array.tobytes() == other.array.tobytes()


@given(tensors())
def test_raw_tensors_come_back(tensor: Tensor) -> None:
    assert_same(decode_request(*answer(tensor, is_binary=True)).inputs[0], tensor)


@given(tensors(is_finite=True))
def test_tensors_in_json_come_back(tensor: Tensor) -> None:
    assert_same(decode_request(*answer(tensor, is_binary=False)).inputs[0], tensor)


def test_nested_data_is_what_flat_data_is() -> None:
    def read(data: Any) -> Any:
        body = {"inputs": [{"name": "x", "shape": [2, 2], "datatype": "INT8", "data": data}]}
        return decode_request(msgspec.json.encode(body), None).inputs[0].array.tolist()

    assert read([1, 2, 3, 4]) == read([[1, 2], [3, 4]]) == [[1, 2], [3, 4]]


def test_bf16_is_rounded_to_the_nearest() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, np.inf, np.nan, 3.4e38], np.float32)
    assert from_bf16(to_bf16(values)).tolist()[:5] == [1.0, 1.0, 1.015625, -0.0, np.inf]
    assert np.isnan(from_bf16(to_bf16(values))[5])


BAD = {
    "not JSON": (b"{", None),
    "another document": (b"[]", None),
    "deep": (b'{"inputs":' + b"[" * 100_000, None),
    "no datatype": (b'{"inputs":[{"name":"x","shape":[1],"data":[1]}]}', None),
    "an unheard datatype": (b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP8","data":[1]}]}', None),
    "a negative size": (b'{"inputs":[{"name":"x","shape":[-1],"datatype":"FP32","data":[1]}]}', None),
    "an endless size": (b'{"inputs":[{"name":"x","shape":[99999999999999999999],"datatype":"FP32","data":[1]}]}', None),
    "a shape of many": (b'{"inputs":[{"name":"x","shape":[%s1],"datatype":"FP32","data":[1]}]}' % (b"1," * 40), None),
    "a claim of much": (b'{"inputs":[{"name":"x","shape":[4000000000,4000000000],"datatype":"FP32","data":[1]}]}', None),
    "neither": (b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32"}]}', None),
    "text among numbers": (b'{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","data":[1,"a"]}]}', None),
    "a fraction": (b'{"inputs":[{"name":"x","shape":[1],"datatype":"INT32","data":[1.5]}]}', None),
    "too large": (b'{"inputs":[{"name":"x","shape":[1],"datatype":"INT8","data":[300]}]}', None),
    "ragged": (b'{"inputs":[{"name":"x","shape":[2,2],"datatype":"FP32","data":[[1,2,3],[4]]}]}', None),
    "arrays in arrays": (b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":%s1%s}]}' % (b"[" * 99, b"]" * 99), None),
    "twice": (b'{"inputs":[%s,%s]}' % ((b'{"name":"x","shape":[1],"datatype":"FP32","data":[1]}',) * 2), None),
    "shared memory": (
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1],"parameters":{"shared_memory_region":"r"}}]}', None,
    ),
    "no number": (b"{}", "-1"),
    "beyond the body": (b"{}", "3"),
    "bytes that nobody claims": (b'{"inputs":[]}abc', "13"),
    "bytes that are not there": (
        b'{"inputs":[{"name":"x","shape":[9],"datatype":"FP32","parameters":{"binary_data_size":36}}]}', "91",
    ),
    "an element beyond its end": (
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":5}}]}\xff\xff\xff\xffa', "91",
    ),
    "a bool of 2": (b'{"inputs":[{"name":"x","shape":[1],"datatype":"BOOL","parameters":{"binary_data_size":1}}]}\x02', "90"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_malformed_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(RequestError, match="Expected"):
        decode_request(*BAD[name])


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-1, 300).map(str), st.text(max_size=3)))
def test_any_bytes_are_understood_or_refused(body: bytes, length: str | None) -> None:
    with suppress(RequestError):
        decode_request(body, length)
