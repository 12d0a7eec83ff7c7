"""What one array needs to become another: differences of the elements' bits, zstd. Lossless, blind to the dtype; no I/O.

    difference := target bits − base bits, as integers, zigzag: 0, −1, 1, −2, … are 0, 1, 2, 3, …
    planes     := for each 65,536 elements the lowest byte of each difference, then the next; all in one zstd frame
    sparse     := of differences that are not 0: how many are 0 before each, a byte where that is below 255, else 255s and the rest;
                  then their bytes, by plane; in one zstd frame. Above it, 8 bytes: how many there are, how many bytes tell where

Between two steps at a low learning rate most high bytes are 0; in bfloat16, where a step is smaller than half of their last bit, most
elements are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import zstandard

_PIECE = 1 << 16  # elements
_LEVEL = 1  # higher ones took longer and gained nothing
_SPOTS, _SPOT = 8, 4096  # parts that are tried first, elements of each
_SPARSE = 8  # one element in so many at most


def estimate(base: np.ndarray, target: np.ndarray) -> float:
    """Return about how many bytes `encode` would give, from a few parts of the arrays, contiguous ones of one dtype and size."""
    old, new = _bits(base), _bits(target)
    if new.size <= 2 * _SPOTS * _SPOT:
        return len(_encode(old, new)[1]) if new.size else 0
    starts = np.linspace(0, new.size - _SPOT, _SPOTS).astype(np.int64).tolist()
    some_old, some_new = (np.concatenate([bits[start : start + _SPOT] for start in starts]) for bits in (old, new))
    return len(_encode(some_old, some_new)[1]) * new.size / some_new.size


def encode(base: np.ndarray, target: np.ndarray) -> tuple[str, bytes] | None:
    """Return what makes `target` of `base`, contiguous arrays of one dtype and size, and the name of its form.

    None where that is no smaller than `target`.
    """
    old, new = _bits(base), _bits(target)
    form, found = _encode(old, new)
    return (form, found) if len(found) < new.nbytes else None


def apply(form: str, difference: bytes | memoryview, base: np.ndarray, target: np.ndarray) -> None:
    """Fill `target` with what `encode` was given, `base` being the same as then; the two may be one array.

    Raises ValueError where the difference is not one for these arrays; `target` then holds anything.
    """
    old, new = _bits(base), _bits(target)
    if old.size != new.size or old.dtype != new.dtype:
        raise ValueError(
            f"expected a base of {new.size} elements of {new.itemsize} bytes, got {old.size} of {old.itemsize}"
        )
    try:
        if form == "planes":
            _apply_planes(difference, old, new)
        elif form == "sparse":
            _apply_sparse(difference, old, new)
        else:
            raise ValueError(f"expected planes or sparse, got {form!r}: use the headwater that wrote it")
    except zstandard.ZstdError as error:
        raise ValueError(f"expected a zstd frame: {error}") from error


def _encode(old: np.ndarray, new: np.ndarray) -> tuple[str, bytes]:
    changed = sum(int(np.count_nonzero(old[some] != new[some])) for some in _pieces(new.size))
    if changed * _SPARSE > new.size:
        compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj(size=new.nbytes)
        found = [compressor.compress(_to_planes(_zigzag(new[some] - old[some])).data) for some in _pieces(new.size)]
        return "planes", b"".join([*found, compressor.flush()])
    places = [np.flatnonzero(old[some] != new[some]) + some.start for some in _pieces(new.size)]
    where = np.concatenate([np.empty(0, np.int64), *places])
    gaps = np.diff(where, prepend=-1) - 1
    ends = np.cumsum(gaps // 255 + 1)
    told = np.full(int(ends[-1]) if changed else 0, 255, np.uint8)
    told[ends - 1] = gaps % 255
    values = _to_planes(_zigzag(new[where] - old[where]))
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(told.tobytes() + values.tobytes())
    return "sparse", np.array([changed, len(told)], "<u4").tobytes() + packed


def _apply_planes(difference: bytes | memoryview, old: np.ndarray, new: np.ndarray) -> None:
    reader = zstandard.ZstdDecompressor().stream_reader(difference)
    for some in _pieces(new.size):
        count = len(new[some])
        planes = _read(reader, count * new.itemsize)
        np.add(old[some], _unzigzag(_from_planes(planes, count)), out=new[some])
    if reader.read(1):
        raise ValueError(f"expected the difference of {new.nbytes} bytes, got one of more")


def _apply_sparse(difference: bytes | memoryview, old: np.ndarray, new: np.ndarray) -> None:
    if len(difference) < 8:
        raise ValueError(f"expected the head of a difference, got {len(difference)} bytes")
    changed, length = map(int, np.frombuffer(difference, "<u4", 2))
    if changed > new.size or length > new.size + changed:
        raise ValueError(f"expected at most {new.size} differences, got {changed} in {length} bytes")
    reader = zstandard.ZstdDecompressor().stream_reader(difference[8:])
    told = _read(reader, length)
    ends = np.flatnonzero(told != 255)
    where = np.cumsum(told, dtype=np.int64)[ends] + np.arange(len(ends))
    if len(ends) != changed or (changed and where[-1] >= new.size):
        raise ValueError(f"expected {changed} places below {new.size}, got others")
    values = _unzigzag(_from_planes(_read(reader, changed * new.itemsize), changed))
    new[...] = old
    new[where] += values


def _read(reader: Any, size: int) -> np.ndarray:
    """Return the bytes that come next, uint8 (size,)."""
    found = np.empty(size, np.uint8)
    view, done = memoryview(found), 0
    while done < size:
        got = reader.readinto(view[done:])
        if not got:
            raise ValueError(f"expected {size} bytes more, got {done}")
        done += got
    return found


def _to_planes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T)


def _from_planes(planes: np.ndarray, count: int) -> np.ndarray:
    item = len(planes) // count if count else 1
    whole: np.ndarray = np.ascontiguousarray(planes.reshape(item, count).T).reshape(-1).view(f"<u{item}")
    return whole


def _zigzag(values: np.ndarray) -> np.ndarray:
    signed: np.ndarray = values.view(f"<i{values.itemsize}")
    mixed: np.ndarray = (signed << 1) ^ (signed >> (8 * values.itemsize - 1))
    return mixed.view(values.dtype)


def _unzigzag(values: np.ndarray) -> np.ndarray:
    plain: np.ndarray = (values >> np.uint8(1)) ^ -(values & values.dtype.type(1))
    return plain


def _pieces(size: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, size, _PIECE))


def _bits(array: np.ndarray) -> np.ndarray:
    """Return the elements as unsigned integers, flat."""
    bits: np.ndarray = array.reshape(-1).view(f"<u{array.itemsize}")
    return bits
