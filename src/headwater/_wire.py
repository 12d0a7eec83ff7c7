"""Framing: how messages lie on a byte stream. No I/O.

    frame   := header control payload
    header  := magic "HW" | version u8 | zero u8 | control length u32 | payload length u64     (16 bytes, little-endian)
    control := the message, MessagePack (`_messages`)
    payload := bulk bytes, only after messages that carry one

Control and bulk bytes are told apart so that bulk bytes are never copied, parsed or trusted.
"""

from __future__ import annotations

import struct

from headwater import _limits
from headwater._errors import ProtocolError

MAGIC = b"HW"
VERSION = 2
HEADER_BYTES = 16
_HEADER = struct.Struct("<2sBBIQ")


def pack_header(control_bytes: int, payload_bytes: int) -> bytes:
    """Return the 16 header bytes."""
    return _HEADER.pack(MAGIC, VERSION, 0, control_bytes, payload_bytes)


def unpack_header(data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[int, int]:
    """Return the control and payload sizes that the 16 bytes at `offset` promise. Raises ProtocolError, before anything is allocated."""
    magic, version, zero, control_bytes, payload_bytes = _HEADER.unpack_from(data, offset)
    if magic != MAGIC:
        raise ProtocolError(
            f"Expected a Headwater frame, got bytes beginning {bytes(magic)!r}: is this another program's port?"
        )
    if version != VERSION:
        raise ProtocolError(
            f"Expected protocol version {VERSION}, got {version}: install the same headwater on workers and servers."
        )
    if zero or not 0 < control_bytes <= _limits.CONTROL_BYTES or payload_bytes > _limits.PAYLOAD_BYTES:
        raise ProtocolError(
            f"Expected a frame of at most {_limits.CONTROL_BYTES} control and {_limits.PAYLOAD_BYTES} payload bytes, "
            f"got a header promising {control_bytes} and {payload_bytes}."
        )
    return control_bytes, payload_bytes
