"""Published versions: immutable sets of weights, and the tags that point at them. No job is needed to write or to read them.

    store    := version* tags/
    version  := version-000000123/        model.safetensors, or delta.safetensors and the version it rests on; what was attached;
                                          version.json, written last: without it there is no version
    tags     := tags/prod                 {"version": 123}; moved by putting another file in its place

A full version is a folder that other tools load without us. A delta holds what its tensors differ by from those of its base, and is made
where that is at most half as large. Publishers on one machine take turns; on an fsspec URL there must be one at a time.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from headwater import _delta, _limits
from headwater._errors import LayoutError, SettingError, StorageError, WaitTimeoutError
from headwater._files import Files, LocalFiles, claim, open_files
from headwater._layout import ALIGN_BYTES, round_up
from headwater._sealed import (
    PIECE_BYTES,
    Column,
    File,
    Source,
    copy_file,
    created,
    folder_of,
    header,
    is_sealed,
    read_sealed,
    read_text,
    reading,
    replace_text,
    size_text,
    write_sealed,
)

FORMAT = 1
MANIFEST = "version.json"
MODEL, DELTA = "model.safetensors", "delta.safetensors"
LATEST = "latest"  # the tag that nobody moves: the newest version
KEEP = 10  # newest versions that stay without a tag
CHAIN = 10  # deltas until the next full version: who comes late reads no more than so many
_WORTH = 0.5  # of a full version, at most: reading a delta costs more than reading as many bytes
_FOLDER = re.compile(r"version-(\d{9,18})")
_TAG = re.compile(r"(?!\d+$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class VersionTensor(msgspec.Struct, frozen=True):
    """A tensor of a version. form: "whole", "same" as the base's, or how it differs from that, as in `_delta`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    xxh3: str  # XXH3-64 of its bytes, 16 hexadecimal digits
    form: str = "whole"

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(array_dtype(self.dtype)).itemsize


class Attached(msgspec.Struct, frozen=True):
    """A file that was handed over with the weights. version: whose folder it lies in."""

    name: str
    version: int


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """version.json: what a version is. It never changes."""

    format: int = FORMAT
    id: int
    parent: int | None  # the version before it
    base: int | None = None  # the version that its delta rests on; None: it is full
    base_xxh3: str = ""
    chain: int = 0  # deltas from the last full version to this one
    commit: int
    time: datetime
    metrics: dict[str, float] = {}
    xxh3: str  # of the names and hashes of its tensors
    tensors: tuple[VersionTensor, ...]
    attached: tuple[Attached, ...] = ()
    files: tuple[File, ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether its folder is all there is to it."""
        return self.base is None

    @property
    def bytes(self) -> int:
        """What it takes in the store, version.json apart."""
        return sum(file.bytes for file in self.files)

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of each tensor; arrays of bfloat16 are of its bits, uint16."""
        return {tensor.name: tensor.dtype for tensor in self.tensors}


class Weights(NamedTuple):
    """A version, read and verified. Arrays are read-only, of `array_dtype`."""

    version: Version
    tensors: dict[str, np.ndarray]


class Room:
    """Memory for weights, used again once nobody refers to them: new memory costs as much as reading a file from the system's cache."""

    def __init__(self) -> None:
        self._arenas: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """Return so many bytes, uint8; views of them keep them."""
        for i in range(len(self._arenas)):
            if self._arenas[i].nbytes == size and sys.getrefcount(self._arenas[i]) == 2:  # the list's, and the call's
                return self._arenas[i]
        self._arenas = [*self._arenas[-2:], np.empty(size, np.uint8)]
        return self._arenas[-1]


def check_nothing_left(weights: Weights, names: Collection[str]) -> None:
    """Refuse tensors of a version, by name, that a model has no place for. Raises LayoutError."""
    if names:
        raise LayoutError(f"Expected no {min(names)!r}, got it in version {weights.version.id}: of another model?")


class Difference(NamedTuple):
    """How a tensor of one version differs from that of another."""

    name: str
    what: str  # "added", "removed", "of another shape", "changed"
    share: float  # of its elements
    largest: float  # absolute difference of an element


def array_dtype(dtype: str) -> str:
    """Return the dtype of arrays that hold elements of `dtype`, which NumPy may not have."""
    return "uint16" if dtype == "bfloat16" else dtype


def as_float(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return an array's values as floating-point numbers."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array if array.dtype.kind == "f" else array.astype(np.float64)


class Versions:
    """The versions in a store, a folder of this machine or an fsspec URL. It can be shared between threads."""

    def __init__(self, store: str | os.PathLike[str]) -> None:
        self.files, self.path = open_files(os.fspath(store))
        self._store = self.path if isinstance(self.files, LocalFiles) else os.fspath(store)
        self._known: dict[int, Version] = {}

    @property
    def look_s(self) -> float:
        """Seconds from one look at a tag to the next that are no burden for the store."""
        return _limits.LOOK_TAG_S if isinstance(self.files, LocalFiles) else _limits.LOOK_TAG_FAR_S

    def all(self) -> list[Version]:
        """Return all versions, oldest first; those that cannot be read are left out, and `get` says why."""
        found = []
        for number in self._numbers():
            with suppress(StorageError):
                found.append(self.get(number))
        return found

    def get(self, number: int) -> Version:
        """Return what a version is. Raises StorageError when it is gone, half written or rotten."""
        folder = self.folder(number)
        if number not in self._known:
            if not self.is_whole(number):
                raise StorageError(
                    f"Expected version {number} in {self.path}, got none that is whole: `headwater versions` lists them."
                )
            version = read_sealed(self.files, folder, MANIFEST, Version, FORMAT)
            if version.id != number:
                raise StorageError(f"Expected version {number} in {folder}, got version {version.id}.")
            self._known[number] = version
        return self._known[number]

    def is_whole(self, number: int) -> bool:
        """Whether a version is there, and so, if nothing has rotted, all of it."""
        return is_sealed(self.files, self.folder(number), MANIFEST)

    def folder(self, number: int) -> str:
        """Return where a version lies, in the store's files."""
        return f"{self.path}/version-{number:09d}"

    def newest(self) -> int | None:
        """Return the number of the newest version that is whole; None: there is none."""
        return next(filter(self.is_whole, reversed(self._numbers())), None)

    def _numbers(self) -> list[int]:
        """Return the numbers of all versions, half-written ones included."""
        matches = (_FOLDER.fullmatch(name) for name in self.files.list(self.path))
        return sorted(int(match[1]) for match in matches if match)

    # Tags.

    def tags(self) -> dict[str, int]:
        """Return what each tag points at."""
        found = {}
        for name in self.files.list(f"{self.path}/tags"):
            if _TAG.fullmatch(name):
                with suppress(StorageError):
                    found[name] = self._read_tag(name)
        return found

    def resolve(self, which: int | str) -> int:
        """Return the number of a version that is named by its number or a tag, "latest" among them.

        Raises StorageError where there is no such tag; whether the version is there says `get`.
        """
        text = str(which)
        if text.isdigit():
            return int(text)
        if text == LATEST:
            newest = self.newest()
            if newest is None:
                raise StorageError(f"Expected a version in {self.path}, got none: publish one.")
            return newest
        check_tag(text)
        return self._read_tag(text)

    def _read_tag(self, name: str) -> int:
        path = f"{self.path}/tags"
        if name not in self.files.list(path):
            known = ", ".join([*self.files.list(path), LATEST])
            raise StorageError(
                f"Expected one of the tags {known} in {self.path}, got {name!r}: `headwater tag` makes one."
            )
        with reading(path, name):
            return msgspec.json.decode(read_text(self.files, path, name), type=_Tag).version

    def tag(self, name: str, which: int | str) -> int:
        """Let a tag point at a version, at once and whole; returns its number. Raises StorageError where that version is not whole."""
        check_tag(name)
        if name == LATEST:
            raise SettingError(f"Expected a tag other than {LATEST!r}, which is always the newest version.")
        number = self.get(self.resolve(which)).id
        replace_text(self.files, f"{self.path}/tags", name, msgspec.json.encode(_Tag(number)) + b"\n")
        return number

    def untag(self, name: str) -> None:
        """Remove a tag; missing is fine."""
        check_tag(name)
        self.files.remove(f"{self.path}/tags/{name}")

    # Publishing.

    def publish(
        self,
        tensors: Mapping[str, np.ndarray],
        *,
        dtypes: Mapping[str, str] | None = None,
        commit: int = 0,
        metrics: Mapping[str, float] | None = None,
        tag: str | None = None,
        attach: Iterable[str | os.PathLike[str]] = (),
        base: Weights | None = None,
        keep: int = KEEP,
    ) -> Version:
        """Write a version; returns when it would survive a power cut, and the tag points at it.

        tensors: arrays, only read. dtypes: of those that NumPy has no dtype for, "bfloat16" in arrays of uint16. attach: files,
        such as a config and a tokenizer, that are copied beside the weights. base: weights that a delta may rest on; None: a full
        version. keep: versions without a tag that nothing rests on go when they are older than the newest so many.

        Raises LayoutError for tensors that no file can hold, StorageError when it cannot be written: the store is then as it was, but
        for a half-written folder, which counts for nothing and which the next publisher removes.
        """
        if tag is not None:
            check_tag(tag)
        arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
        entries = [_entry(name, array, (dtypes or {}).get(name, array.dtype.name)) for name, array in arrays.items()]
        parts = _attachments(attach)
        with self._alone():
            newest = self.newest()
            number = 1 + max(self._numbers(), default=0)
            folder = self.folder(number)
            self.files.make_folder(folder)
            written: list[File] = []
            delta = None if base is None else self._delta(base, entries, arrays)
            below = base.version if base is not None and delta is not None else None  # what it rests on
            if delta is None:
                written.append(_write_model(self.files, folder, entries, arrays))
            else:
                entries, packed = delta
                written.append(_write_delta(self.files, folder, entries, packed))
            attached = []
            for name, (path, digest) in parts.items():
                held = None if below is None else self._holder(below, name, digest)
                if held is None:
                    written.append(_copy_in(path, self.files, folder, name))
                attached.append(Attached(name, number if held is None else held))
            version = Version(
                id=number,
                parent=newest if base is None else base.version.id,
                base=None if below is None else below.id,
                base_xxh3="" if below is None else below.xxh3,
                chain=0 if below is None else below.chain + 1,
                commit=commit,
                time=datetime.now(UTC).replace(microsecond=0),
                metrics={name: float(value) for name, value in (metrics or {}).items()},
                xxh3=_hash_of(entries),
                tensors=tuple(entries),
                attached=tuple(attached),
                files=tuple(written),
            )
            write_sealed(self.files, folder, MANIFEST, version)
            if tag is not None:
                self.tag(tag, number)
            self._prune(keep)
        return version

    def _delta(
        self, base: Weights, entries: Sequence[VersionTensor], arrays: Mapping[str, np.ndarray]
    ) -> tuple[list[VersionTensor], dict[str, bytes | np.ndarray]] | None:
        """Return the tensors as they differ from the base's, and what of them is written; None where a full version is better."""
        before = {tensor.name: tensor for tensor in base.version.tensors}
        total = sum(tensor.bytes for tensor in entries)
        alike = {t.name for t in entries if t.name in before and _is_alike(t, before[t.name])}
        same = {t.name for t in entries if t.name in alike and before[t.name].xxh3 == t.xxh3}
        if base.version.chain >= CHAIN or not self.is_whole(base.version.id):
            return None
        guess = sum(
            _delta.estimate(base.tensors[t.name], arrays[t.name]) if t.name in alike else t.bytes
            for t in entries
            if t.name not in same
        )
        if guess > total * _WORTH:
            return None
        found, packed = [], dict[str, bytes | np.ndarray]()
        for t in entries:
            form = "same"
            if t.name not in same:
                coded = _delta.encode(base.tensors[t.name], arrays[t.name]) if t.name in alike else None
                form, packed[t.name] = coded or ("whole", arrays[t.name])
            found.append(msgspec.structs.replace(t, form=form))
        size = sum(len(data) if isinstance(data, bytes) else data.nbytes for data in packed.values())
        return (found, packed) if size <= total * _WORTH else None

    def _holder(self, base: Version, name: str, digest: str) -> int | None:
        """Return the version of the base's chain in whose folder this very file lies already."""
        for held in base.attached:
            if held.name == name:
                file = next((file for file in self.get(held.version).files if file.name == name), None)
                return held.version if file is not None and file.xxh3 == digest else None
        return None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until no other publisher of this machine writes here. Raises WaitTimeoutError naming it."""
        self.files.make_folder(self.path)
        deadline = time.monotonic() + _limits.PUBLISH_S
        while True:
            try:
                let_go = claim(self.files, f"{self.path}/.lock")
                break
            except SettingError as error:
                if time.monotonic() > deadline:
                    raise WaitTimeoutError(
                        f"Expected other publishers to end within {_limits.PUBLISH_S:g} s, got: {error}"
                    ) from error
                time.sleep(0.01)
        try:
            yield
        finally:
            let_go()

    def prune(self, keep: int = KEEP) -> list[int]:
        """Remove versions that have no tag, are not among the newest `keep`, and that no other rests on; returns their numbers."""
        with self._alone():
            return self._prune(keep)

    def _prune(self, keep: int) -> list[int]:
        numbers = self._numbers()
        whole = set(filter(self.is_whole, numbers))
        wanted = {*sorted(whole)[-max(keep, 1) :], *self.tags().values()}
        waiting = list(wanted & whole)
        while waiting:
            version = self.get(waiting.pop())
            needs = {held.version for held in version.attached} | (
                {version.base} if version.base is not None else set()
            )
            waiting += [number for number in needs & whole if number not in wanted]
            wanted |= needs
        gone = [
            n for n in numbers if n not in wanted and n <= max(whole, default=-1)
        ]  # a newer one may be about to be written
        for number in gone:
            folder = self.folder(number)
            if number in whole:
                self.files.remove(f"{folder}/{MANIFEST}")  # first: a version without some of its files must not count
                self.files.sync_folder(folder)
            self.files.remove(folder)
            self._known.pop(number, None)
        return gone

    # Reading.

    def load(self, which: int | str, *, base: Weights | None = None, room: Room | None = None) -> Weights:
        """Return a version's weights, every tensor verified.

        base: weights of another version, from which a delta may go on; those arrays are shared where nothing has changed. room: where
        to put them; None: new memory. Raises StorageError naming the file or tensor that is missing, torn, rotten or rests on another base.
        """
        chain = [self.get(self.resolve(which))]
        while chain[-1].base is not None and (base is None or base.version.id != chain[-1].id):
            below = self.get(chain[-1].base)
            if below.xxh3 != chain[-1].base_xxh3 or below.chain >= chain[-1].chain:
                raise StorageError(
                    f"Expected version {below.id} to be what the delta of version {chain[-1].id} rests on, got other tensors — "
                    f"{self.path}: publish again."
                )
            chain.append(below)
        is_known = base is not None and base.version.id == chain[-1].id and base.version.xxh3 == chain[-1].xxh3
        tensors: dict[str, np.ndarray] = {}
        for version in reversed(chain):
            if is_known and base is not None and version is chain[-1]:
                tensors = base.tensors
            elif version.is_full:
                tensors = self._read_model(version, room or Room())
            else:
                tensors = self._read_delta(version, tensors)
        if len(chain) > 1:  # else its file was
            _verify(chain[0], tensors, self.folder(chain[0].id))
        for array in tensors.values():
            array.flags.writeable = False
        return Weights(chain[0], tensors)

    def _read_model(self, version: Version, room: Room) -> dict[str, np.ndarray]:
        folder = self.folder(version.id)
        arena, at = room.take(sum(round_up(tensor.bytes, ALIGN_BYTES) for tensor in version.tensors)), 0
        with reading(folder, MODEL):
            source = Source(self.files, folder, _file(version, MODEL))
            source.skip_header(sum(tensor.bytes for tensor in version.tensors))
            found = {}
            for tensor in version.tensors:
                array = arena[at : at + tensor.bytes].view(array_dtype(tensor.dtype)).reshape(tensor.shape)
                source.fill(array)
                found[tensor.name], at = array, at + round_up(tensor.bytes, ALIGN_BYTES)
            source.finish()
        return found

    def _read_delta(self, version: Version, below: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        folder = self.folder(version.id)
        with reading(folder, DELTA):
            file = _file(version, DELTA)
            raw = np.empty(file.bytes, np.uint8)
            source = Source(self.files, folder, file)
            source.fill(raw)
            source.finish()
            start = 8 + int(raw[:8].view("<u8")[0])
            columns = msgspec.json.decode(raw[8:start].tobytes(), type=dict[str, Column])
            found = {}
            for tensor in version.tensors:
                found[tensor.name] = array = np.empty(tensor.shape, array_dtype(tensor.dtype))
                if tensor.form == "same":
                    found[tensor.name] = _same(below, tensor)
                    continue
                first, end = columns[tensor.name].data_offsets
                data = raw[start + first : start + end]
                if tensor.form == "whole":
                    array.reshape(-1).view(np.uint8)[:] = data
                else:
                    _delta.apply(tensor.form, memoryview(data), _same(below, tensor), array)
        return found

    def fetch(self, which: int | str, folder: str | os.PathLike[str]) -> Version:
        """Make a folder of a version, a delta or not, as other tools load it: the weights and what was attached. Returns the version.

        What is at `folder`, if anything, must be an empty folder. Raises StorageError; there is then no such folder.
        """
        weights = self.load(which)
        files, path = open_files(os.fspath(folder))
        if files.list(path):
            raise StorageError(f"Expected an empty folder or none, got files in {path}: choose another.")
        aside = f"{folder_of(path)}/.{path.rpartition('/')[2]}.{os.getpid()}"
        version = weights.version
        entries = [msgspec.structs.replace(tensor, form="whole") for tensor in version.tensors]
        try:
            _write_model(files, aside, entries, weights.tensors)
            for held in version.attached:
                source = self.get(held.version)
                copy_file(self.files, self.folder(source.id), _file(source, held.name), files, aside)
            files.sync_folder(aside)
            files.remove(path)
            files.rename(aside, path)
            files.sync_folder(folder_of(path))
        finally:
            files.remove(aside)
        return version

    def compare(self, one: int | str, other: int | str) -> list[Difference]:
        """Return how the tensors of another version differ from those of one; those that are the same are left out."""
        old = self.load(one)
        new = self.load(other, base=old)
        had = {tensor.name: tensor for tensor in old.version.tensors}
        found = [Difference(name, "removed", 1.0, 0.0) for name in had if name not in new.tensors]
        for tensor in new.version.tensors:
            before = had.get(tensor.name)
            if before is None or not _is_alike(tensor, before):
                found.append(Difference(tensor.name, "added" if before is None else "of another shape", 1.0, 0.0))
            elif before.xxh3 != tensor.xxh3:
                a, b = old.tensors[tensor.name], new.tensors[tensor.name]
                share = float(np.mean(a != b))
                gap = np.abs(as_float(b, tensor.dtype) - as_float(a, tensor.dtype))
                found.append(Difference(tensor.name, "changed", share, float(gap.max())))
        return found

    def __str__(self) -> str:
        """Where they are, for any other process of this machine, or anywhere where it is a URL."""
        return self._store

    def __repr__(self) -> str:
        return f"<Versions in {self.path}>"


# For people.


def describe(versions: Versions) -> str:
    """Return a table of all versions, oldest first, with their tags."""
    tags: dict[int, list[str]] = {}
    for name, number in versions.tags().items():
        tags.setdefault(number, []).append(name)
    rows = [("version", "parent", "commit", "written", "kind", "size", "tags", "metrics")]
    rows += [
        (
            str(version.id),
            "-" if version.parent is None else str(version.parent),
            f"{version.commit:,}",
            f"{version.time:%Y-%m-%d %H:%M:%S}",
            "full" if version.base is None else f"delta of {version.base}",
            size_text(version.bytes),
            " ".join(tags.get(version.id, [])) or "-",
            ", ".join(f"{name} {value:g}" for name, value in version.metrics.items()) or "-",
        )
        for version in versions.all()
    ]
    if len(rows) == 1:
        return f"no versions in {versions}\n"
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "".join(
        "  ".join(f"{text:{w}}" for text, w in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )


def describe_differences(versions: Versions, one: int | str, other: int | str) -> tuple[str, bool]:
    """Say how one version differs from another, and whether their tensors are the same."""
    old, new = (versions.get(versions.resolve(which)) for which in (one, other))
    found = versions.compare(old.id, new.id)
    lines = [f"version {old.id} of commit {old.commit:,} -> version {new.id} of commit {new.commit:,}"]
    for name in sorted(old.metrics.keys() | new.metrics.keys()):
        was, now = (f"{v.metrics[name]:g}" if name in v.metrics else "-" for v in (old, new))
        lines.append(f"  {name}  {was} -> {now}")
    lines.append(f"{len(found)} of {len({*old.dtypes, *new.dtypes})} tensors differ")
    for d in sorted(found, key=lambda d: (d.what, -d.share)):
        detail = f", {100 * d.share:.3g} % of its elements, by {d.largest:.3g} at most" if d.what == "changed" else ""
        lines.append(f"  {d.name}  {d.what}{detail}")
    return "\n".join(lines) + "\n", not found


class _Tag(msgspec.Struct):
    version: int


def check_tag(name: str) -> None:
    """Refuse what is no name for a tag. Raises SettingError."""
    if not _TAG.fullmatch(name):
        raise SettingError(
            f"Expected a tag of letters, digits, '.', '_' and '-', at most 64 and not digits alone, got {name!r}."
        )


def _entry(name: str, array: np.ndarray, dtype: str) -> VersionTensor:
    try:
        header([(name, dtype, array.shape, array.nbytes)])
        is_held = array.dtype == array_dtype(dtype)
    except KeyError:
        is_held = False
    if not is_held:
        raise LayoutError(f"Expected a tensor that safetensors can hold, got {array.dtype} as {dtype} — {name!r}.")
    return VersionTensor(name, array.shape, dtype, _digest(array))


def _digest(array: np.ndarray) -> str:
    return xxhash.xxh3_64(array.tobytes() if array.ndim == 0 or not array.size else array).hexdigest()


def _hash_of(tensors: Iterable[VersionTensor]) -> str:
    text = "".join(f"{t.name}\0{t.dtype}\0{t.shape}\0{t.xxh3}\n" for t in sorted(tensors, key=lambda t: t.name))
    return xxhash.xxh3_64(text.encode()).hexdigest()


def _is_alike(tensor: VersionTensor, other: VersionTensor) -> bool:
    return (tensor.shape, tensor.dtype) == (other.shape, other.dtype)


def _same(below: Mapping[str, np.ndarray], tensor: VersionTensor) -> np.ndarray:
    array = below.get(tensor.name)
    if array is None or array.shape != tensor.shape or array.dtype != array_dtype(tensor.dtype):
        raise ValueError(f"expected a base with {tensor.dtype} {tensor.shape} for {tensor.name!r}, got another")
    return array


def _verify(version: Version, tensors: Mapping[str, np.ndarray], folder: str) -> None:
    for tensor in version.tensors:
        found = _digest(tensors[tensor.name])
        if found != tensor.xxh3:
            raise StorageError(
                f"Expected XXH3 {tensor.xxh3} of tensor {tensor.name!r}, got {found} — {folder}: take another version, or publish again."
            )
    if _hash_of(version.tensors) != version.xxh3:
        raise StorageError(f"Expected tensors of XXH3 {version.xxh3} in {folder}/{MANIFEST}, got others.")


def _ordered(tensors: Iterable[VersionTensor]) -> list[VersionTensor]:
    """Return them so that each is aligned in the file."""
    return sorted(tensors, key=lambda t: -np.dtype(array_dtype(t.dtype)).itemsize)


def _write_model(files: Files, folder: str, tensors: list[VersionTensor], arrays: Mapping[str, np.ndarray]) -> File:
    tensors[:] = _ordered(tensors)  # as the manifest has them, too
    with created(files, folder, MODEL, is_read_soon=True) as sink:
        sink.write(header([(t.name, t.dtype, t.shape, t.bytes) for t in tensors], {"format": "pt"}))
        for tensor in tensors:
            sink.write(arrays[tensor.name])
    return sink.file


def _write_delta(
    files: Files,
    folder: str,
    tensors: Sequence[VersionTensor],
    packed: Mapping[str, bytes | np.ndarray],
) -> File:
    kept = _ordered(t for t in tensors if t.form == "whole") + [t for t in tensors if t.form not in ("whole", "same")]
    columns = []
    for t in kept:
        data = packed[t.name]
        is_coded = isinstance(data, bytes)
        columns.append((t.name, "uint8", (len(data),), len(data)) if is_coded else (t.name, t.dtype, t.shape, t.bytes))
    with created(files, folder, DELTA, is_read_soon=True) as sink:
        sink.write(header(columns))
        sink.write(*(packed[t.name] for t in kept))
    return sink.file


def _attachments(paths: Iterable[str | os.PathLike[str]]) -> dict[str, tuple[Path, str]]:
    """Return the path and the hash of each file, by its name. Raises SettingError for what is no file or has a name that is taken."""
    found: dict[str, tuple[Path, str]] = {}
    for path in map(Path, paths):
        if not path.is_file() or path.name in {MODEL, DELTA, MANIFEST, *found}:
            raise SettingError(f"Expected files to attach, each with a name of its own, got {path}.")
        with path.open("rb") as file:
            digest = xxhash.xxh3_64()
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
        found[path.name] = path, digest.hexdigest()
    return found


def _copy_in(path: Path, files: Files, folder: str, name: str) -> File:
    with created(files, folder, name, is_read_soon=True) as sink, path.open("rb") as source:
        while piece := source.read(PIECE_BYTES):
            sink.write(piece)
    return sink.file


def _file(version: Version, name: str) -> File:
    for file in version.files:
        if file.name == name:
            return file
    raise StorageError(
        f"Expected {name} among the files of version {version.id}, got none: {MANIFEST} does not name it."
    )
