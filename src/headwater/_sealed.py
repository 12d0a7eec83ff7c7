"""Files that are hashed on their way: tensors as safetensors, and JSON texts that end with their own hash.

Nothing is written in place. What was read counts once its hash has been found to be the one that was noted when it was written.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

import msgspec
import numpy as np
import xxhash

from headwater._errors import HeadwaterError, StorageError
from headwater._files import Files, LocalFiles
from headwater._layout import round_up

PIECE_BYTES = 1 << 22  # that are read or written at once
_CACHED = 1 << 18  # likewise, where they are to be in the processor's cache still when they are hashed or written

#: The names that safetensors has for dtypes. NumPy has no bfloat16: arrays of it are of its bits, uint16.
_KINDS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
}  # fmt: skip
_DTYPES = {kind: dtype for dtype, kind in _KINDS.items()}


class File(msgspec.Struct, frozen=True):
    """A file of a saved job."""

    name: str
    bytes: int
    xxh3: str  # XXH3-64, 16 hexadecimal digits


class Column(msgspec.Struct):
    """A tensor of a safetensors header."""

    kind: str = msgspec.field(name="dtype")
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def dtype(self) -> str:
        return _DTYPES[self.kind]


def header(
    tensors: Sequence[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the head of a safetensors file of these (name, dtype, shape, bytes), which follow in this order."""
    columns: dict[str, Column | Mapping[str, str]] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for key, dtype, shape, size in tensors:
        columns[key] = Column(kind=_KINDS[dtype], shape=shape, data_offsets=(at, at + size))
        at += size
    text = msgspec.json.encode(columns)
    text = text.ljust(round_up(8 + len(text), 64) - 8)
    return len(text).to_bytes(8, "little") + text


def read_header(files: Files, folder: str, file: File) -> tuple[dict[str, Column], int]:
    """Return a file's tensors in the order of their bytes, and where those begin; unverified, but within the file."""
    size = np.zeros(1, np.uint64)
    files.read_into(f"{folder}/{file.name}", 0, memoryview(size.view(np.uint8)))
    start = 8 + int(size[0])
    if start > file.bytes:
        raise ValueError(f"expected a header within {file.bytes} bytes, got {start}")
    text = np.empty(start - 8, np.uint8)
    files.read_into(f"{folder}/{file.name}", 8, memoryview(text))
    columns = msgspec.json.decode(text.tobytes(), type=dict[str, Column])
    ordered = dict(sorted(columns.items(), key=lambda item: item[1].data_offsets))
    at = start
    for column in ordered.values():
        at += int(np.prod([np.dtype(column.dtype).itemsize, *column.shape]))
        if column.data_offsets[1] != at - start or min(column.shape) < 0:
            raise ValueError("expected tensors that follow one another")
    if at != file.bytes:
        raise ValueError(f"expected {file.bytes} bytes, got {at}")
    return ordered, start


class Sink:
    """A file that grows at its end and is hashed on its way."""

    def __init__(self, files: Files, path: str, *, is_read_soon: bool = False) -> None:
        self._writer = files.create(path, is_read_soon=is_read_soon)
        self._name = path.rpartition("/")[2]
        self._hash = xxhash.xxh3_64()
        self._pending: list[memoryview] = []
        self._size = 0

    def write(self, *buffers: bytes | np.ndarray) -> None:
        """Write buffers, which must stay as they are until the file is closed."""
        for buffer in buffers:
            raw = np.frombuffer(buffer, np.uint8) if isinstance(buffer, bytes) else buffer.reshape(-1).view(np.uint8)
            for start in range(0, raw.nbytes, _CACHED):
                piece = memoryview(raw[start : start + _CACHED])
                self._hash.update(piece)
                self._pending.append(piece)
                self._size += piece.nbytes
                if self._size >= _CACHED:
                    self._flush()

    def _flush(self) -> None:
        self._writer.write(*self._pending)
        self._pending, self._size = [], 0

    def finish(self) -> None:
        """Bring it all to the disk."""
        self._flush()
        self._writer.sync()
        self.file = File(self._name, self._writer.size, self._hash.hexdigest())

    def close(self) -> None:
        """Give up the file."""
        self._writer.close()


@contextmanager
def created(files: Files, folder: str, name: str, *, is_read_soon: bool = False) -> Iterator[Sink]:
    """Create a file; where the block ends well it is on the disk, and `file` of the sink describes it."""
    files.make_folder(folder)
    sink = Sink(files, f"{folder}/{name}", is_read_soon=is_read_soon)
    try:
        yield sink
        sink.finish()
    finally:
        sink.close()


class Source:
    """Reads a file from its start to its end, hashing it while it is in the cache."""

    def __init__(self, files: Files, folder: str, file: File) -> None:
        self._files, self._path, self._file = files, f"{folder}/{file.name}", file
        self._hash = xxhash.xxh3_64()
        self._at = 0
        self._piece = _CACHED if isinstance(files, LocalFiles) else PIECE_BYTES
        self._window = memoryview(np.empty(min(self._piece, file.bytes), np.uint8))
        self._ahead = self._window[:0]  # read, but not asked for yet

    def fill(self, target: np.ndarray) -> None:
        """Read the bytes that come next; large ones straight to where they belong."""
        view = memoryview(target.reshape(-1).view(np.uint8)) if target.size else memoryview(b"")
        while view:
            if not self._ahead and len(view) >= self._piece // 8:
                piece = view[: self._piece]
                self._read(piece)
            else:
                self._more()
                piece = view[: len(self._ahead)]
                piece[:] = self._ahead[: len(piece)]
                self._ahead = self._ahead[len(piece) :]
            view = view[len(piece) :]

    def skip(self, size: int) -> None:
        """Pass over the bytes that come next; they are hashed all the same."""
        while size:
            self._more()
            step = min(size, len(self._ahead))
            self._ahead = self._ahead[step:]
            size -= step

    def skip_header(self, body: int) -> None:
        """Pass over the head of a safetensors file that has so many bytes after it."""
        size = np.zeros(1, np.uint64)
        self.fill(size)
        if 8 + int(size[0]) + body != self._file.bytes:
            raise ValueError(f"expected {body} bytes after the header, got {self._file.bytes - 8 - int(size[0])}")
        self.skip(int(size[0]))

    def finish(self) -> None:
        """Say that all has been read. Raises StorageError when it is not what was written."""
        if self._ahead or self._at != self._file.bytes:
            raise ValueError(f"expected {self._file.bytes} bytes, got {self._at - len(self._ahead)}")
        if self._hash.hexdigest() != self._file.xxh3:
            raise ValueError(f"expected XXH3 {self._file.xxh3}, got {self._hash.hexdigest()}")

    def _more(self) -> None:
        if not self._ahead:
            self._ahead = self._window[: self._file.bytes - self._at]
            self._read(self._ahead)

    def _read(self, view: memoryview) -> None:
        if not view or self._files.read_into(self._path, self._at, view) < len(view):
            raise ValueError(f"expected {self._file.bytes} bytes, got fewer")
        self._hash.update(view)
        self._at += len(view)


def copy_file(files: Files, folder: str, file: File, target_files: Files, target: str) -> None:
    """Copy a file to another folder, verified on the way. Raises StorageError."""
    source = Source(files, folder, file)
    with created(target_files, target, file.name) as sink, reading(folder, file.name):
        for start in range(0, file.bytes, PIECE_BYTES):
            piece = np.empty(min(PIECE_BYTES, file.bytes - start), np.uint8)
            source.fill(piece)
            sink.write(piece)
        source.finish()


# Texts.


def replace_text(files: Files, folder: str, name: str, text: bytes) -> None:
    """Put a text in the place of what has its name, at once and whole, whoever else does so at the same time. Raises StorageError."""
    aside = f".{name}.{os.getpid()}.{threading.get_ident()}"
    with created(files, folder, aside, is_read_soon=True) as sink:
        sink.write(text)
    files.rename(f"{folder}/{aside}", f"{folder}/{name}")
    files.sync_folder(folder)


def read_text(files: Files, folder: str, name: str) -> bytes:
    """Return all of a file; within `reading`, which names it where that fails."""
    raw = np.empty(files.size(f"{folder}/{name}"), np.uint8)
    files.read_into(f"{folder}/{name}", 0, memoryview(raw))
    return raw.tobytes()


class _Format(msgspec.Struct):
    format: int


class Listed(Protocol):
    """A text that names files."""

    @property
    def format(self) -> int: ...
    @property
    def files(self) -> tuple[File, ...]: ...


_L = TypeVar("_L", bound=Listed)


def write_sealed(files: Files, folder: str, name: str, value: msgspec.Struct) -> None:
    """Write a text as JSON, last of what is in its folder: whoever finds it finds all the files that it names. Raises StorageError."""
    text = msgspec.json.format(msgspec.json.encode(value)).removesuffix(b"\n}")
    aside = f"{name}.part"
    with created(files, folder, aside) as sink:
        sink.write(text + _seal(text))
    files.sync_folder(folder)  # a manifest must not outlive the files that it names
    files.rename(f"{folder}/{aside}", f"{folder}/{name}")
    files.sync_folder(folder)
    files.sync_folder(folder_of(folder))


def is_sealed(files: Files, folder: str, name: str) -> bool:
    """Whether this text is there, and so, if nothing has rotted, all that it names."""
    return name in files.list(folder)


def read_sealed(files: Files, folder: str, name: str, kind: type[_L], expected: int) -> _L:
    """Return a text of this kind and format. Raises StorageError where it is missing, torn, rotten or of another format."""
    with reading(folder, name):
        text = read_text(files, folder, name)
        body, tail = text[: -len(_seal(b""))], text[-len(_seal(b"")) :]
        if tail != _seal(body):
            with suppress(msgspec.DecodeError):
                found = msgspec.json.decode(text, type=_Format).format
                if found != expected:
                    raise ValueError(f"expected format {expected}, got {found}: use the headwater that wrote it")
            raise ValueError('the "xxh3" at its end is not that of its text')
        value = msgspec.json.decode(body + b"\n}", type=kind)
        if value.format != expected or any("/" in file.name for file in value.files):
            raise ValueError(f"expected format {expected} and names without a folder")
        return value


def _seal(text: bytes) -> bytes:
    """Return how a manifest with this text ends."""
    return b',\n  "xxh3": "' + xxhash.xxh3_64(text).hexdigest().encode() + b'"\n}\n'


@contextmanager
def reading(folder: str, name: str) -> Iterator[None]:
    try:
        yield
    except HeadwaterError:
        raise
    except Exception as error:  # every kind of rot: missing, torn, not JSON, not of this kind
        raise StorageError(
            f"Cannot read {folder}/{name}: {type(error).__name__}: {error}. Take an older snapshot or another copy."
        ) from error


def size_text(size: float) -> str:
    """Return a size in bytes as people read it."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def natural(name: str) -> list[tuple[int, str]]:
    """Sort file-2 before file-10."""
    return [(int(text), "") if text.isdigit() else (0, text) for text in re.split(r"(\d+)", name)]


def folder_of(path: str) -> str:
    return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")
