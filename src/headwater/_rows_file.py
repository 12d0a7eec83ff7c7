"""A table on disk: one file that other tools can read, safetensors or Parquet.

    ids        int64 (k,)
    values     float32 (k, dim)
    state      float32 (k, state)      the optimizer's, as the kernels keep it
    counts     float32 (k,)            sightings
    last_seen  int64 (k,)              in steps, or in seconds where the policy's expiry is in seconds

The metadata, under "headwater", is a JSON object: format, name, step and optimizer. Only ids and values must be there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from headwater import _limits
from headwater._errors import HeadwaterError, LayoutError, SettingError, StorageError
from headwater._rows import TableSpec
from headwater.optim import RowOptimizer

FORMAT = 1
_T = TypeVar("_T")


class SavedRows(NamedTuple):
    """Some rows of a saved table."""

    ids: np.ndarray  # int64 (k,)
    values: np.ndarray  # float32 (k, dim)
    state: np.ndarray  # float32 (k, state)
    counts: np.ndarray  # float32 (k,)
    last_seen: np.ndarray  # int64 (k,)
    step: int


class _About(msgspec.Struct):
    format: int
    name: str
    step: int
    optimizer: RowOptimizer


def write_rows(path: Path, spec: TableSpec, pages: Iterable[SavedRows]) -> int:
    """Write a table; returns how many rows. Raises StorageError; then what was there before is still there."""
    write = _by_suffix(path, _write_safetensors, _write_parquet)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        count = write(aside, spec, pages)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.rename(path)
    except HeadwaterError:
        raise
    except Exception as error:  # the file libraries have classes of their own
        raise StorageError(
            f"Cannot save table {spec.name!r} to {path}: {error}. What was there is still there."
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    return count


def read_rows(path: Path, spec: TableSpec) -> Iterator[SavedRows]:
    """Yield the rows of a saved table. Raises StorageError when it is missing, torn, or of another shape."""
    read = _by_suffix(path, _read_safetensors, _read_parquet)
    try:
        for columns, about in read(path):
            if about is not None and about.format != FORMAT:
                raise StorageError(
                    f"Expected format {FORMAT} in {path}, got {about.format}: use the headwater that wrote it."
                )
            yield _fitted(columns, about, spec, path)
    except StorageError:
        raise
    except Exception as error:  # every kind of rot: missing, torn, not of this kind, names that differ
        raise StorageError(
            f"Cannot read {path}: {type(error).__name__}: {error}. Expected what export() wrote."
        ) from error


def _fitted(columns: dict[str, np.ndarray], about: _About | None, spec: TableSpec, path: Path) -> SavedRows:
    """Return rows as this table has them. Raises StorageError."""
    ids, values = np.asarray(columns["ids"]), np.asarray(columns["values"])
    count, state_width = len(ids), len(spec.initial_state)
    state = columns.get("state") if state_width else np.empty((count, 0), np.float32)
    if state is None or (about is not None and about.optimizer.kind != spec.optimizer.kind):
        state = np.tile(np.array(spec.initial_state, np.float32), (count, 1))
    counts = columns.get("counts", np.ones(count, np.float32))
    last_seen = columns.get("last_seen", np.full(count, -1))  # now
    wanted = {
        "ids": (ids, np.int64, (count,)),
        "values": (values, np.float32, (count, spec.dim)),
        "state": (state, np.float32, (count, state_width)),
        "counts": (counts, np.float32, (count,)),
        "last_seen": (last_seen, np.int64, (count,)),
    }
    for name, (array, dtype, shape) in wanted.items():
        if array.dtype != dtype or array.shape != shape:
            raise StorageError(
                f"Expected {np.dtype(dtype)} {shape} for {name!r} in {path}, got {array.dtype} {array.shape} — table {spec.name!r}."
            )
    if not np.isfinite(values).all() or not np.isfinite(state).all():
        raise StorageError(f"Expected finite rows in {path}, got NaN or infinity — table {spec.name!r}.")
    return SavedRows(ids, values, state, counts, last_seen, about.step if about is not None else 0)


def _about(spec: TableSpec, step: int) -> str:
    return msgspec.json.encode(_About(FORMAT, spec.name, step, spec.optimizer)).decode()


def _parse(text: str | bytes | None) -> _About | None:
    return None if text is None else msgspec.json.decode(text, type=_About)


def _write_safetensors(path: Path, spec: TableSpec, pages: Iterable[SavedRows]) -> int:
    import safetensors.numpy  # here, so that start-up does not pay for it

    empty = SavedRows(
        np.empty(0, np.int64), np.empty((0, spec.dim), np.float32), np.empty((0, spec.width - spec.dim), np.float32),
        np.empty(0, np.float32), np.empty(0, np.int64), 0,
    )  # fmt: skip
    *columns, steps = zip(empty, *pages, strict=True)
    names = SavedRows._fields[:-1]
    arrays = {name: np.concatenate(parts) for name, parts in zip(names, columns, strict=True)}
    safetensors.numpy.save_file(arrays, path, metadata={"headwater": _about(spec, max(steps))})
    return len(arrays["ids"])


def _read_safetensors(path: Path) -> Iterator[tuple[dict[str, np.ndarray], _About | None]]:
    import safetensors

    with safetensors.safe_open(path, framework="numpy") as file:
        about = _parse((file.metadata() or {}).get("headwater"))
        yield {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - it is no mapping


def _write_parquet(path: Path, spec: TableSpec, pages: Iterable[SavedRows]) -> int:
    arrow, parquet = _pyarrow()
    state = spec.width - spec.dim
    fields = [
        ("ids", arrow.int64()),
        ("values", arrow.list_(arrow.float32(), spec.dim)),
        *([("state", arrow.list_(arrow.float32(), state))] if state else []),
        ("counts", arrow.float32()),
        ("last_seen", arrow.int64()),
    ]
    written = step = 0
    with parquet.ParquetWriter(path, arrow.schema(fields)) as writer:
        for page in pages:
            columns = [
                arrow.FixedSizeListArray.from_arrays(np.ascontiguousarray(array).reshape(-1), array.shape[1])
                if array.ndim == 2
                else arrow.array(array)
                for array in (getattr(page, name) for name, _ in fields)
            ]
            writer.write_table(arrow.Table.from_arrays(columns, schema=arrow.schema(fields)))
            written, step = written + len(page.ids), max(step, page.step)
        writer.add_key_value_metadata({"headwater": _about(spec, step)})
    return written


def _read_parquet(path: Path) -> Iterator[tuple[dict[str, np.ndarray], _About | None]]:
    _, parquet = _pyarrow()
    with parquet.ParquetFile(path) as file:
        about = _parse((file.metadata.metadata or {}).get(b"headwater"))
        for batch in file.iter_batches(_limits.PAGE_ROWS):
            columns = {}
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                is_row = hasattr(column, "flatten")
                flat = (column.flatten() if is_row else column).to_numpy(zero_copy_only=False)
                columns[name] = flat.reshape(len(column), -1) if is_row else flat
            yield columns, about


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise SettingError(
            "Expected pyarrow for a .parquet file, got none: pip install 'headwater[parquet]', or use .safetensors."
        ) from error
    return pa, parquet


def _by_suffix(path: Path, safetensors: Callable[..., _T], parquet: Callable[..., _T]) -> Callable[..., _T]:
    known = {".safetensors": safetensors, ".parquet": parquet}
    if path.suffix not in known:
        raise LayoutError(f"Expected a path that ends in .safetensors or .parquet, got {path}.")
    if path.suffix == ".parquet":
        _pyarrow()
    return known[path.suffix]
