"""A job on disk: a folder that other tools can read. What `Session.save` writes and what a store holds are the same.

    model-0.safetensors           server 0's part of the parameters, in the master dtype: whole tensors under their names, a
                                  tensor that is cut between servers as flat pieces "name[start:stop]"
    optimizer-0.safetensors       "exp_avg/name" and so on, likewise
    table-0-0-00000.safetensors   rows of table 0 at server 0: ids, values, state, counts, last_seen, deleted. WholeRows of later segments
                                  replace those of earlier ones, and `deleted` removes rows of earlier segments
    job.json                      the manifest, written last: without it there is no saved job

The manifest names every file with its size and hash, and ends with the hash of its own text. A save has one part, as if of one
server. Nothing here is written in place: a folder is whole and has its manifest, or it does not count.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
import numpy as np

from headwater import _kernels
from headwater._consistency import Consistency
from headwater._errors import StorageError
from headwater._files import Files
from headwater._layout import DTYPES, Layout, Part, TensorSpec
from headwater._rows import BUCKETS, AnyInitial, RowPolicy, TableSpec, WholeRows, buckets_of
from headwater._sealed import (
    File,
    Source,
    copy_file,
    created,
    folder_of,
    header,
    natural,
    read_header,
    read_sealed,
    reading,
    size_text,
    write_sealed,
)
from headwater.optim import AnyOptimizer, RowOptimizer

FORMAT = 2
MANIFEST = "job.json"
SEGMENT_BYTES = 1 << 24  # of a table, about; several times that is in memory while it is written
_SNAPSHOT = re.compile(r"snapshot-(\d{12,})")
_SEGMENT = re.compile(r"table-(\d+)-(\d+)-(\d+)\.safetensors")

Planes = Mapping[str, Sequence[np.ndarray]]  #: plane → a flat array of the master dtype per slice of a part


class Tensor(msgspec.Struct, frozen=True):
    """A `TensorSpec`, and how many steps the tensor has made."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int
    steps: int


class SavedTable(msgspec.Struct, frozen=True):
    """A `TableSpec`, and the table's step number."""

    name: str
    dim: int
    optimizer: RowOptimizer
    initial: AnyInitial
    seed: int
    policy: RowPolicy
    consistency: str
    step: int

    @classmethod
    def of(cls, spec: TableSpec, step: int) -> SavedTable:
        """Return what is written of a table."""
        fields = {name: getattr(spec, name) for name in TableSpec.__struct_fields__}
        return cls(**{**fields, "consistency": str(spec.consistency), "step": step})

    @property
    def spec(self) -> TableSpec:
        """The table's settings. Raises SettingError where they make no sense."""
        fields = {name: getattr(self, name) for name in TableSpec.__struct_fields__}
        return TableSpec(**{**fields, "consistency": Consistency.parse(self.consistency)})

    def check(self, spec: TableSpec) -> None:
        """Refuse a table of other rows. Raises StorageError."""
        if (self.dim, self.optimizer.kind) != (spec.dim, spec.optimizer.kind):
            raise StorageError(
                f"Expected saved rows of dim {spec.dim} with {spec.optimizer}, got dim {self.dim} with {self.optimizer} — table "
                f"{spec.name!r}: declare it as it was, or load rows that Table.export() wrote."
            )


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """job.json. Bytes are in base64."""

    format: int = FORMAT
    commit: int
    time: datetime
    servers: int
    consistency: str
    optimizer: AnyOptimizer | None  # None: no tensors were registered
    tensors: tuple[Tensor, ...] = ()
    tables: tuple[SavedTable, ...] = ()  # by number
    state: dict[str, bytes] = {}  # the job's small dictionary; values are MessagePack
    book: bytes = b""  # the coordinator's
    parts: tuple[bytes, ...] = ()  # each server's
    files: tuple[File, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        commit: int,
        servers: int,
        consistency: Consistency,
        optimizer: AnyOptimizer | None,
        tensors: Sequence[TensorSpec],
        steps: Sequence[int],
        tables: Sequence[tuple[TableSpec, int]] = (),  # settings and step, by number
        state: Mapping[str, bytes],
        files: Sequence[File],
        book: bytes = b"",
        parts: Sequence[bytes] = (),
    ) -> Manifest:
        """Return the manifest of a job as it is now."""
        return cls(
            commit=commit,
            time=datetime.now(UTC).replace(microsecond=0),
            servers=servers,
            consistency=str(consistency),
            optimizer=optimizer,
            tensors=tuple(
                Tensor(spec.name, spec.shape, spec.dtype, spec.group, step)
                for spec, step in zip(tensors, steps, strict=True)
            ),
            tables=tuple(SavedTable.of(spec, step) for spec, step in tables),
            state=dict(sorted(state.items())),
            book=book,
            parts=tuple(parts),
            files=tuple(sorted(files, key=lambda file: natural(file.name))),
        )

    @property
    def layout(self) -> Layout:
        """Where the tensors lay."""
        return Layout([TensorSpec(t.name, t.shape, t.dtype, t.group) for t in self.tensors])

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps by tensor."""
        return tuple(tensor.steps for tensor in self.tensors)

    def check(self, layout: Layout, optimizer: AnyOptimizer) -> None:
        """Refuse another model or optimizer. Raises StorageError."""
        if [tensor.name for tensor in self.tensors] != [spec.name for spec in layout.specs]:
            raise StorageError("Expected a saved job with this model's parameters, got other names.")
        for spec, saved in zip(layout.specs, self.tensors, strict=True):
            ours, theirs = DTYPES[spec.dtype][1], DTYPES[saved.dtype][1]
            if (spec.shape, ours) != (saved.shape, theirs):
                raise StorageError(f"Expected {ours} {spec.shape} saved for {spec.name!r}, got {theirs} {saved.shape}.")
        if self.tensors and (self.optimizer is None or set(self.optimizer.slots) != set(optimizer.slots)):
            raise StorageError(f"Expected the saved state of {optimizer}, got that of {self.optimizer}.")

    def file(self, folder: str, name: str) -> File:
        """Return the entry of a file that must be there. Raises StorageError."""
        for file in self.files:
            if file.name == name:
                return file
        raise StorageError(f"Cannot read {folder}/{name}: {MANIFEST} does not name it.")


# Dense tensors.


class _Piece(NamedTuple):
    """A tensor, or what one server has of it, in a file."""

    key: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    plane: str
    slice: int  # of the part
    at: int  # elements into the slice
    start: int  # elements into the tensor
    size: int  # elements

    @property
    def bytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize


def write_dense(files: Files, folder: str, server: int, part: Part, planes: Planes) -> list[File]:
    """Write a server's part of every plane, "master" and the optimizer's slots, straight from where it lies; returns the files.

    planes: a flat array of the master dtype per slice of the part, gaps included. What is returned is on the disk. Raises StorageError.
    """
    written = []
    for name, kind in _dense_files(server, set(planes) - {"master"}):
        pieces = _pieces(part, kind)
        if not pieces:
            continue
        with created(files, folder, name) as sink:
            sink.write(header([(p.key, p.dtype, p.shape, p.bytes) for p in pieces]))
            for p in pieces:
                sink.write(planes[p.plane][p.slice][p.at : p.at + p.size])
        written.append(sink.file)
    return written


def read_dense(files: Files, folder: str, manifest: Manifest, part: Part, planes: Planes, *, threads: int = 1) -> None:
    """Fill arrays like those of `write_dense`, for a part of any number of servers; gaps stay as they are. threads: files read at once.

    The model and the optimizer must be the saved ones, as `Manifest.check` finds. Raises StorageError naming the file that is missing,
    torn or rotten; then the arrays hold anything.
    """
    mine = {p.name: p for p in _pieces(part, ["master"])}

    def read(name: str, pieces: Sequence[_Piece]) -> None:
        shared = [(p, *_shared(p, mine.get(p.name))) for p in pieces]
        if not any(start < stop for _, start, stop in shared):
            return
        with reading(folder, name):
            source = Source(files, folder, manifest.file(folder, name))
            source.skip_header(sum(p.bytes for p in pieces))
            for p, start, stop in shared:
                item = np.dtype(p.dtype).itemsize
                source.skip((start - p.start) * item)
                if start < stop:
                    ours = mine[p.name]
                    at = ours.at + start - ours.start
                    source.fill(planes[p.plane][ours.slice][at : at + stop - start])
                source.skip((p.start + p.size - stop) * item)
            source.finish()

    slots = manifest.optimizer.slots if manifest.optimizer is not None else ()
    parts = (manifest.layout.part(server, manifest.servers) for server in range(manifest.servers))
    found = [(name, _pieces(p, kind)) for i, p in enumerate(parts) for name, kind in _dense_files(i, slots)]
    if threads == 1:
        for each in found:
            read(*each)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        for task in [pool.submit(read, *each) for each in found]:
            task.result()


def _shared(theirs: _Piece, ours: _Piece | None) -> tuple[int, int]:
    """Return which elements of a tensor two pieces of it share, from and to; none from where the first one ends."""
    end = theirs.start + theirs.size
    if ours is None:
        return end, end
    start = min(max(theirs.start, ours.start), end)
    return start, max(min(end, ours.start + ours.size), start)


def _dense_files(server: int, slots: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each file's name and its planes."""
    yield f"model-{server}.safetensors", ["master"]
    yield f"optimizer-{server}.safetensors", sorted(slots)


def _pieces(part: Part, planes: Sequence[str]) -> list[_Piece]:
    """Return what lies in a file of these planes, in its order."""
    found = []
    for plane in planes:
        for i, s in enumerate(part.slices):
            if plane != "master" and s.lane.is_averaged:
                continue
            for spec, start, at, size in part.pieces(s):
                is_whole = size == spec.size
                key = spec.name if is_whole else f"{spec.name}[{start}:{start + size}]"
                shape = spec.shape if is_whole else (size,)
                found.append(
                    _Piece(
                        key if plane == "master" else f"{plane}/{key}",
                        spec.name, shape, s.lane.master, plane, i, at, start, size,
                    )
                )  # fmt: skip
    return sorted(found, key=lambda p: -np.dtype(p.dtype).itemsize)  # so that each is aligned


# Tables.


class TableWriter:
    """Writes a table's rows at one server as segments of about SEGMENT_BYTES. Of calls for one id the last one counts."""

    def __init__(self, files: Files, folder: str, server: int, number: int, spec: TableSpec) -> None:
        self._files, self._folder, self._spec = files, folder, spec
        self._prefix = f"table-{number}-{server}"
        self._row_bytes = 20 + 4 * spec.width
        self._pending: list[WholeRows] = []  # rows of width 0 are deletions
        self._bytes = 0
        self._written: list[File] = []

    def rows(self, ids: np.ndarray, last_seen: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> None:
        """Write rows, arrays as in `WholeRows`, which must stay as they are until `close`. Raises StorageError."""
        step = max(SEGMENT_BYTES // self._row_bytes, 1)
        for i in range(0, len(ids), step):
            some = slice(i, i + step)
            self._add(WholeRows(ids[some], last_seen[some], rows[some], counts[some]), self._row_bytes)

    def deleted(self, ids: np.ndarray) -> None:
        """Note that these rows, int64 (k,), are gone. Raises StorageError."""
        nothing = np.zeros(len(ids), np.int64)
        self._add(WholeRows(ids, nothing, np.empty((len(ids), 0), np.float32), nothing.astype(np.float32)), 8)

    def close(self) -> list[File]:
        """Write what is left; returns all files, which are then on the disk. Raises StorageError."""
        self._flush()
        return self._written

    def _add(self, rows: WholeRows, item: int) -> None:
        if self._bytes and self._bytes + item * len(rows.ids) > SEGMENT_BYTES:
            self._flush()
        if len(rows.ids):
            self._pending.append(rows)
            self._bytes += item * len(rows.ids)

    def _flush(self) -> None:
        pending, self._pending, self._bytes = self._pending, [], 0
        if not pending:
            return
        every = np.concatenate([some.ids for some in pending])
        last = len(every) - 1 - np.unique(every[::-1], return_index=True)[1]
        counts = np.zeros(len(every), bool)
        counts[last] = True
        deleted, kept, at = [np.empty(0, np.int64)], list[WholeRows](), 0
        for some in pending:
            mask = counts[at : at + len(some.ids)]
            at += len(some.ids)
            some = some if mask.all() else WholeRows(*(column[mask] for column in some))  # noqa: PLW2901
            if some.rows.shape[1]:
                kept.append(some)
            else:
                deleted.append(some.ids)
        width, dim = self._spec.width, self._spec.dim
        whole = WholeRows(*(np.concatenate(columns) for columns in zip(WholeRows.none(width), *kept, strict=True)))
        columns = {
            "deleted": np.concatenate(deleted), "ids": whole.ids, "last_seen": whole.last_seen,
            "values": whole.rows[:, :dim], "state": whole.rows[:, dim:], "counts": whole.counts,
        }  # fmt: skip
        name = f"{self._prefix}-{len(self._written):05d}.safetensors"
        with created(self._files, self._folder, name) as sink:
            sink.write(header([(key, a.dtype.name, a.shape, a.nbytes) for key, a in columns.items()]))
            sink.write(*(np.ascontiguousarray(array) for array in columns.values()))
        self._written.append(sink.file)


def read_table(
    files: Files, folder: str, manifest: Manifest, number: int, server: int = 0, servers: int = 1
) -> Iterator[WholeRows]:
    """Yield the rows of a table that belong to server `server` of `servers`, a segment at a time, in order.

    WholeRows that come later replace earlier ones; those that were deleted do not come. Raises StorageError naming the file that is
    missing, torn or rotten, before anything of it is yielded.
    """
    spec = manifest.tables[number].spec
    first, limit = buckets_of(server, servers)
    segments = _segments(manifest, number, first, limit)
    removed = [_read_column(files, folder, file, "deleted") for file in segments]
    ids = np.concatenate([np.empty(0, np.int64), *removed])
    # By id, the last segment that deletes it: rows of earlier segments do not come.
    ids, at = np.unique(ids[::-1], return_index=True)
    until = np.repeat(np.arange(len(segments)), [len(some) for some in removed])[::-1][at]
    for i, file in enumerate(segments):
        rows = _read_segment(files, folder, file, spec)
        mask = np.ones(len(rows.ids), bool)
        if (first, limit) != (0, BUCKETS):
            buckets = _kernels.bucket_of(rows.ids)
            mask &= (buckets >= first) & (buckets < limit)
        if len(ids):
            place = np.minimum(np.searchsorted(ids, rows.ids), len(ids) - 1)
            mask &= (ids[place] != rows.ids) | (until[place] <= i)
        yield rows if mask.all() else WholeRows(*(column[mask] for column in rows))


def _segments(manifest: Manifest, number: int, first: int = 0, limit: int = BUCKETS) -> list[File]:
    """Return a table's files that may have rows of these buckets, in order."""
    found = []
    for file in manifest.files:
        match = _SEGMENT.fullmatch(file.name)
        if match is not None and int(match[1]) == number:
            begin, end = buckets_of(int(match[2]), manifest.servers)
            if begin < limit and first < end:
                found.append(file)
    return found


def _read_segment(files: Files, folder: str, file: File, spec: TableSpec) -> WholeRows:
    with reading(folder, file.name):
        columns, start = read_header(files, folder, file)
        source = Source(files, folder, file)
        source.skip(start)
        found = {}
        for name, column in columns.items():
            found[name] = np.empty(column.shape, column.dtype)
            source.fill(found[name])
        source.finish()
        k, ids, last_seen = len(found["ids"]), found["ids"], found["last_seen"]
        rows = np.concatenate((found["values"], found["state"]), axis=1)
        wanted = [(ids, np.int64, (k,)), (last_seen, np.int64, (k,)), (rows, np.float32, (k, spec.width))]
        for array, dtype, shape in [*wanted, (found["counts"], np.float32, (k,))]:
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"expected {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape}")
        return WholeRows(ids, last_seen, rows, found["counts"])


def _read_column(files: Files, folder: str, file: File, name: str) -> np.ndarray:
    """Return one column of a segment, unverified."""
    with reading(folder, file.name):
        columns, start = read_header(files, folder, file)
        array = np.empty(columns[name].shape, columns[name].dtype)
        if array.nbytes:
            files.read_into(
                f"{folder}/{file.name}", start + columns[name].data_offsets[0], memoryview(array.view(np.uint8))
            )
        return array


# The folder.


def snapshot_name(commit: int) -> str:
    """Return the name of a store's snapshot."""
    return f"snapshot-{commit:012d}"


def publish(files: Files, folder: str, manifest: Manifest) -> None:
    """Write the manifest of a folder whose files are all on the disk: from now on it is a saved job. Raises StorageError."""
    write_sealed(files, folder, MANIFEST, manifest)


def open_manifest(files: Files, folder: str) -> Manifest:
    """Return the manifest of a saved job whose files are all there, by their sizes; their hashes say `verify` and whoever reads them.

    Raises StorageError naming the file.
    """
    manifest = read_sealed(files, folder, MANIFEST, Manifest, FORMAT)
    for file in manifest.files:
        with reading(folder, file.name):
            size = files.size(f"{folder}/{file.name}")
            if size != file.bytes:
                raise ValueError(f"expected {file.bytes} bytes, got {size}")
    return manifest


def verify(files: Files, folder: str, manifest: Manifest) -> None:
    """Read every file and compare its hash. Raises StorageError naming the first that is rotten."""
    for file in manifest.files:
        with reading(folder, file.name):
            source = Source(files, folder, file)
            source.skip(file.bytes)
            source.finish()


def find(files: Files, store: str) -> list[str]:
    """Return the names of a store's snapshots that have their manifest, newest first."""
    return [name for name in _snapshots(files, store) if MANIFEST in files.list(f"{store}/{name}")]


def prune(files: Files, store: str, keep: int = 2) -> None:
    """Remove all but the newest `keep` whole snapshots, and whatever is older than the newest one and is not whole.

    Whole is what `open_manifest` opens; with none of them nothing is removed. Raises StorageError.
    """
    whole = 0
    for name in _snapshots(files, store):
        folder = f"{store}/{name}"
        try:
            open_manifest(files, folder)
        except StorageError:
            if whole == 0:  # it may be about to be written
                continue
        else:
            whole += 1
            if whole <= max(keep, 1):
                continue
        files.remove(f"{folder}/{MANIFEST}")  # first: a snapshot without some of its files must not count
        files.sync_folder(folder)
        files.remove(folder)


@contextmanager
def replacing(files: Files, path: str) -> Iterator[str]:
    """Give a new folder to fill, and put it in the place of the saved job at `path`; on failure that is still there.

    Raises StorageError.
    """
    path = path.rstrip("/")
    parent, name = folder_of(path), path.rpartition("/")[2]
    new = f"{parent}/.{name}.{os.getpid()}"
    old = _old(path)
    try:
        if files.list(path) and MANIFEST not in files.list(path):
            raise StorageError("Expected a saved job there, or nothing, got other files: choose another folder.")
        files.remove(new)
        yield new
        if name in files.list(parent):
            files.remove(old)
            files.rename(path, old)
        try:
            files.rename(new, path)
        except StorageError:
            if MANIFEST in files.list(old):
                files.rename(old, path)
            raise
        files.sync_folder(parent)
        files.remove(old)
    except BaseException as error:
        with suppress(StorageError):
            files.remove(new)
        if isinstance(error, StorageError):
            raise StorageError(f"Cannot save to {path}: {error} What was there before is still there.") from error
        raise


def locate(files: Files, path: str) -> str:
    """Return where the job that was saved at `path` is: aside, if the machine went down while it was being replaced."""
    path = path.rstrip("/")
    return _old(path) if not files.list(path) and MANIFEST in files.list(_old(path)) else path


def _old(path: str) -> str:
    return f"{folder_of(path)}/.{path.rpartition('/')[2]}.old"


def copy(files: Files, folder: str, target_files: Files, target: str) -> int:
    """Copy a saved job, verified on the way, to the place of what is at `target`; returns its commit. Raises StorageError."""
    manifest = open_manifest(files, folder)
    with replacing(target_files, target) as new:
        for file in manifest.files:
            copy_file(files, folder, file, target_files, new)
        publish(target_files, new, manifest)
    return manifest.commit


# For people.


def describe(files: Files, path: str) -> tuple[str, bool]:
    """Say what a saved job or a store holds, and whether all of it is sound; every byte is read.

    Raises StorageError where there is neither.
    """
    path = path.rstrip("/")
    names = _snapshots(files, path)
    if not names:
        return _describe_job(files, path, open_manifest(files, path))
    blocks, is_sound = [], True
    for name in names:
        folder = f"{path}/{name}"
        if MANIFEST not in files.list(folder):
            blocks.append(f"{folder}\n  half written: it does not count\n")
            continue
        try:
            text, holds = _describe_job(files, folder, open_manifest(files, folder))
        except StorageError as error:
            text, holds = f"{folder}\n  {error}\n", False
        blocks.append(text)
        is_sound &= holds
    logs = [name for name in files.list(path) if name.endswith(".hwl")]
    blocks += [f"{path}/{name}\n  log  {size_text(files.size(f'{path}/{name}'))}\n" for name in logs]
    return "\n".join(blocks), is_sound


def _describe_job(files: Files, folder: str, manifest: Manifest) -> tuple[str, bool]:
    try:
        verify(files, folder, manifest)
        hashes, is_sound = "all hold", True
        rows = [_count_rows(files, folder, manifest, number) for number in range(len(manifest.tables))]
    except StorageError as error:
        hashes, is_sound, rows = str(error), False, []
    dtypes = ", ".join(dict.fromkeys(tensor.dtype for tensor in manifest.tensors))
    layout = manifest.layout
    lines = [
        ("commit", f"{manifest.commit:,}"),
        ("written", f"{manifest.time:%Y-%m-%d %H:%M:%S} UTC"),
        ("servers", str(manifest.servers)),
        ("consistency", manifest.consistency),
        ("optimizer", str(manifest.optimizer or "none")),
        ("parameters", f"{layout.parameters:,}" + (f" in {len(layout.specs):,} tensors of {dtypes}" if dtypes else "")),
    ]
    for number, table in enumerate(manifest.tables):
        held = f"{rows[number]:,} rows" if rows else "rows unknown"
        lines.append(
            (
                f"table {number}",
                f"{table.name}: {held} of dim {table.dim}, step {table.step:,}, {table.optimizer}, {table.consistency}",
            )
        )
    lines += [
        ("state", ", ".join(manifest.state) or "none"),
        ("files", f"{len(manifest.files)}, {size_text(sum(file.bytes for file in manifest.files))}"),
        ("hashes", hashes),
    ]
    width = max(len(key) for key, _ in lines)
    return "".join([f"{folder}\n", *(f"  {key:{width}}  {text}\n" for key, text in lines)]), is_sound


def _count_rows(files: Files, folder: str, manifest: Manifest, number: int) -> int:
    ids, is_row = [np.empty(0, np.int64)], [np.empty(0, bool)]
    for file in _segments(manifest, number):
        for name in ("deleted", "ids"):
            ids.append(_read_column(files, folder, file, name))
            is_row.append(np.full(len(ids[-1]), name == "ids"))
    last = np.unique(np.concatenate(ids)[::-1], return_index=True)[1]
    return int(np.concatenate(is_row)[::-1][last].sum())


def _snapshots(files: Files, store: str) -> list[str]:
    """Return the names of all snapshots, newest first, half-written ones included."""
    names = [name for name in files.list(store) if _SNAPSHOT.fullmatch(name)]
    return sorted(names, key=natural, reverse=True)
