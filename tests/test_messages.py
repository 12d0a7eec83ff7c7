"""What is said on the wire: the same bytes for ever, and nothing else is understood."""

from __future__ import annotations

import pickle
import typing
from typing import Any

import msgspec
import pytest
from samples import GOLDEN

from headwater import _limits
from headwater._errors import BY_NAME, InternalError, LayoutError, ProtocolError
from headwater._messages import AnyMessage, Beat, Done, Failed, Push, Seal, decode, encode
from headwater._wire import HEADER_BYTES, VERSION, pack_header, unpack_header

KINDS = typing.get_args(AnyMessage)
samples = pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=lambda value: type(value).__name__)


def test_every_kind_has_golden_bytes() -> None:
    assert [type(message) for message, _ in GOLDEN] == list(KINDS)


@samples
def test_bytes_stay_as_they_are(message: AnyMessage, golden: str) -> None:
    assert encode(message).hex() == golden


@samples
def test_message_comes_back_from_its_bytes(message: AnyMessage, golden: str) -> None:
    data = bytes.fromhex(golden)
    assert decode(data) == message
    assert decode(memoryview(data)) == message


def test_every_message_is_frozen() -> None:
    for kind in KINDS:
        assert kind.__struct_config__.frozen
        assert kind.__struct_config__.forbid_unknown_fields
        assert kind.__struct_config__.tag == kind.__name__


def test_header_bytes_stay_as_they_are() -> None:
    assert pack_header(0x0A0B0C, 0x0102030405).hex() == "48570200" + "0c0b0a00" + "0504030201000000"
    assert (HEADER_BYTES, VERSION) == (16, 2)


@pytest.mark.parametrize("header", [(1, 0), (_limits.CONTROL_BYTES, _limits.PAYLOAD_BYTES)])
def test_header_comes_back_from_its_bytes(header: tuple[int, int]) -> None:
    assert unpack_header(b"..." + pack_header(*header), 3) == header


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\n", "got bytes beginning b'GE': is this another program's port?"),
        (b"HW\x01\0" + pack_header(1, 0)[4:], "version 2, got 1: install the same headwater"),
        (b"HW\x02\x01" + pack_header(1, 0)[4:], "Expected a frame of at most"),
        (pack_header(0, 0), "promising 0 and 0"),
        (pack_header(_limits.CONTROL_BYTES + 1, 0), "promising 16777217 and 0"),
        (pack_header(1, 1 << 60), "promising 1 and 1152921504606846976"),
        (bytes(16), "another program's port"),
    ],
)
def test_wrong_header_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        unpack_header(data)


def pack(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        pack(None),
        pack({"type": "Done"}),
        pack([]),
        pack(["Unheard"]),
        pack(["Done", 1]),
        pack(["Pull", "master", True, 1]),
        pack(["Push"]),
        pack(["Push", "4"]),
        pack(["Push", 4.5]),
        pack(["Registered", 1]),
        pack(["Seal", 4, 1.0, [[b"0.1"]]]),
        pack(["State", {"key": "text"}]),
        pack(["Hello", "t", "worker", 1, 0, 1, ["bsp", -1], ""]),
        pack(["Hello", "t", "worker", 1, 0, 1, ["sync", 0], ""]),
        pack(["Register", [["w", [1], "float32", 0]], {"type": "SGD", "lr": -1.0}]),
        pack(["Register", [["w", [1], "float32", 0]], {"type": "SGD", "unheard": 1.0}]),
        pack(["Register", [["w", [1], "float32", 0]], {"type": "os.system"}]),
        pack(["Done"]) + b"\0",
        b"\x92\xa4Push\xd6\x01abcd",  # an extension type
        b"\x92\xa6Failed\xdd\xff\xff\xff\xff",  # a list that promises 4 G items
        b"\x91" * 100_000,
        b"\x91\xa4D\xffne",  # not UTF-8
        pickle.dumps(["Done"]),
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"Expected a Headwater message, got {len(data)} bytes that are none"):
        decode(data)


class Bomb:
    """Runs code wherever it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a peer's code ran",)


def test_pickle_runs_nothing() -> None:
    with pytest.raises(ProtocolError):
        decode(pickle.dumps(Bomb()))
    with pytest.raises(ProtocolError):
        decode(pack(["Put", pickle.dumps(Bomb())]))


def test_defaults_may_be_left_out() -> None:
    assert decode(pack(["Push", 4])) == Push(4)
    assert decode(pack(["Seal", 4, 1.0, []])) == Seal(4, 1.0, (), b"")


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_error_travels(name: str) -> None:
    error = decode(encode(Failed(name, "Expected this."))).exception()  # type: ignore[union-attr]
    assert type(error) is BY_NAME[name]
    assert str(error) == "Expected this."


def test_error_of_an_unknown_class_is_ours_to_explain() -> None:
    assert type(Failed("KeyboardInterrupt", "x").exception()) is InternalError
    assert type(Failed(LayoutError.__name__, "x").exception()) is LayoutError


def test_messages_are_values() -> None:
    assert {Done(), Beat(), Done()} == {Beat(), Done()}
    with pytest.raises(AttributeError):
        Push(1).sequence = 2  # type: ignore[misc]
