"""This worker's part of a dataset: a fixed one, or what is leased to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np

from headwater import _limits
from headwater._errors import SettingError
from headwater._leases import DataSpec, Piece

#: Options that a DataLoader keeps as attributes, with a default that is false.
_LOADER_OPTIONS = (
    "num_workers", "collate_fn", "pin_memory", "pin_memory_device", "timeout", "worker_init_fn",
    "multiprocessing_context", "generator", "prefetch_factor",
)  # fmt: skip


class Sized(Protocol):
    """Anything with a length and items by index: a list, an array, a map-style PyTorch dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Portion:
    """Items index, index + count, … of a dataset. A map-style dataset itself; it can be pickled where the dataset can."""

    def __init__(self, dataset: Sized, index: int, count: int) -> None:
        if len(dataset) < count:
            raise SettingError(
                f"Expected at least one item for each of {count} workers, got a dataset of {len(dataset)}."
            )
        self.dataset, self.index, self.count = dataset, index, count

    def __len__(self) -> int:
        return len(range(self.index, len(self.dataset), self.count))

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected an index below {len(self)}, got {index}.")
        return self.dataset[self.index + index % len(self) * self.count]

    def __repr__(self) -> str:
        return f"<Portion {self.index} of {self.count}: {len(self)} of {len(self.dataset)} items>"


class Lease(Protocol):
    """Adds a piece to the data; returns whether there was one, waiting where that is wanted."""

    def __call__(self, data: LeasedData, /, *, wait: bool) -> bool: ...


#: Makes what reads a dataset, again and again, given the indices of one unit after the other.
Reader = Callable[[Iterable[list[int]]], Iterable[Any]]


class LeasedData(Iterator[Any]):
    """Items or batches of what is leased to this worker, made by `Session.shard`. It is used by the session's thread.

    A loop that was left can be gone on with by another. Where reading fails, the next attempt begins with the same unit. It ends
    when every unit of every epoch is used: until then who has run out waits, for a worker may die, and is not waited for. Then
    it goes on from newer parameters: gradients that were gathered over several batches, and not yet pushed, are of older ones. A worker
    that pushes no more closes its session, or others wait for its pushes.
    """

    def __init__(self, spec: DataSpec, reader: Reader, lease: Lease) -> None:
        self.spec, self._make_reader, self._lease = spec, reader, lease
        self.epoch = 0  #: of what was yielded last; near an epoch's end workers are in two
        self.had = 0  #: units leased
        self.used = 0  #: units yielded: what the next push uses up
        self._counted = 0  # units used when what was not used came back last
        self._due: deque[tuple[int, int]] = deque()  # (epoch, unit), leased and not yet yielded
        self._sent = 0  # of these, given to the reader
        self._reader: Iterable[Any] | None = None
        self._stream: Iterator[Any] | None = None
        self._attempt = 0
        self._is_over = False
        self._order: tuple[int, np.ndarray] | None = None  # an epoch's, shuffled

    def __next__(self) -> Any:
        while not self._is_over:
            if self._stream is None and not self._open():
                break
            stream = self._stream
            assert stream is not None
            try:
                unit = next(stream)
            except StopIteration:
                self._stream = None  # it has read what could be had without waiting
                continue
            except BaseException:
                self._restart()
                raise
            if stream is not self._stream:  # the job went back while it read
                continue
            self.epoch, _ = self._due.popleft()
            self._sent -= 1
            self.used += 1
            return unit
        self._is_over = True
        self._restart()  # which ends a loader's processes
        raise StopIteration

    def add(self, piece: Piece) -> None:
        """Take in what was leased."""
        self.had += piece.stop - piece.start
        self._due.extend((piece.epoch, unit) for unit in range(piece.start, piece.stop))

    def roll_back(self, counted: int | None = None) -> None:
        """What pushes that count did not use comes again, or others have it. counted: so many units were used; None: as last time."""
        self._restart()
        self._due.clear()
        self.had = self.used = self._counted = self._counted if counted is None else counted
        self._is_over = False

    def _restart(self) -> None:
        self._attempt += 1
        self._reader = self._stream = None

    def _open(self) -> bool:
        """Begin to read what is due; False: nothing is, nor will be."""
        if not self._due and not self._lease(self, wait=True):
            return False
        if self._reader is None:
            self._reader = self._make_reader(_Units(self))
        self._sent = 0
        self._stream = iter(self._reader)
        return True

    def units(self) -> Iterator[list[int]]:
        """Yield the indices of each unit that is due, leasing more, until there is nothing without waiting."""
        attempt = self._attempt
        while (self._sent < len(self._due) or self._lease(self, wait=False)) and attempt == self._attempt:
            epoch, unit = self._due[self._sent]
            self._sent += 1
            yield self._indices(epoch, unit)

    def _indices(self, epoch: int, unit: int) -> list[int]:
        size = self.spec.batch_size or 1
        start, stop = unit * size, min((unit + 1) * size, self.spec.items)
        if not self.spec.shuffle:
            return list(range(start, stop))
        if self._order is None or self._order[0] != epoch:
            # Of NumPy's generators this one promises the same numbers in every version, and workers may differ in theirs.
            bits = np.random.MT19937(np.random.SeedSequence((self.spec.seed, epoch)))
            self._order = epoch, np.random.RandomState(bits).permutation(self.spec.items)
        found: list[int] = self._order[1][start:stop].tolist()
        return found

    def __repr__(self) -> str:
        return f"<LeasedData {self.spec.name!r} epoch {self.epoch} of {self.spec.epochs}, {self.used} yielded>"


class _Units:
    """What a DataLoader takes for a batch sampler."""

    def __init__(self, data: LeasedData) -> None:
        self._data = data

    def __iter__(self) -> Iterator[list[int]]:
        return self._data.units()


class _Items:
    """Reads items, or lists of them."""

    def __init__(self, dataset: Sized, in_batches: bool, units: Iterable[list[int]]) -> None:
        self._dataset, self._in_batches, self._units = dataset, in_batches, units

    def __iter__(self) -> Iterator[Any]:
        for indices in self._units:
            yield [self._dataset[i] for i in indices] if self._in_batches else self._dataset[indices[0]]


def lease_data(
    source: Any,
    lease: Lease,
    *,
    name: str,
    epochs: int,
    batch_size: int | None,
    shuffle: bool | None,
    seed: int,
    piece: int | None,
    workers: int,
) -> LeasedData:
    """Return an iterator over leased parts of a dataset or a DataLoader. Arguments and errors as of `Session.shard`."""
    loader = next((c for c in type(source).__mro__ if _name(c) == "torch.utils.data.dataloader.DataLoader"), None)
    dataset, drop_last = source, False
    reader: Reader = partial(_Items, source, batch_size is not None)
    if loader is not None:
        if batch_size is not None or shuffle is not None:
            raise SettingError(
                "Expected a DataLoader's own batch_size and shuffle, got others: leave them out in shard()."
            )
        dataset, shuffle, batch_size = source.dataset, _check_sampler(source), source.batch_size
        drop_last = source.drop_last
        options = {option: getattr(source, option) for option in _LOADER_OPTIONS if getattr(source, option, None)}
        if source.num_workers:
            options["persistent_workers"] = True  # after a wait for data the loader is iterated again
        reader = partial(_load, loader, dataset, options)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or _is_iterable(dataset):
        raise SettingError(
            f"Expected a dataset with len() and items by index, got a {type(dataset).__name__}: of one that can only be iterated "
            "nobody can say what is used. Split it by session.index and session.workers, without epochs."
        )
    if batch_size is not None and batch_size < 1:
        raise SettingError(f"Expected a batch size of 1 or more, got {batch_size} — data {name!r}.")
    units = len(dataset) // (batch_size or 1)
    # A worker that dies loses no item, so a piece costs a round trip, and at the very end a wait of up to one piece.
    piece = max(1, min(units // (32 * workers), _limits.PIECE_UNITS)) if piece is None else piece
    spec = DataSpec(name, len(dataset), epochs, piece, batch_size or 0, drop_last, bool(shuffle), seed)
    return LeasedData(spec, reader, lease)


def _load(loader: type, dataset: Any, options: dict[str, Any], units: Iterable[list[int]]) -> Iterable[Any]:
    found: Iterable[Any] = loader(dataset, batch_sampler=units, **options)
    return found


def _check_sampler(loader: Any) -> bool:
    """Return whether a DataLoader shuffles. Raises SettingError where it does anything else."""
    sampler = loader.sampler
    kind = _name(type(sampler)).removeprefix("torch.utils.data.sampler.")
    is_plain = kind == "SequentialSampler" or (
        kind == "RandomSampler" and not sampler.replacement and sampler.num_samples == len(loader.dataset)
    )
    if _is_iterable(loader.dataset):
        return False  # said in words of the dataset
    if loader.batch_size is None or not is_plain:
        raise SettingError(
            f"Expected a DataLoader with a batch_size that reads in order or shuffles, got one with {type(sampler).__name__} and "
            f"batch_size {loader.batch_size}: leases say what is read. Leave sampler and batch_sampler out, and let the "
            "dataset choose its items."
        )
    return kind == "RandomSampler"


def _is_iterable(dataset: Any) -> bool:
    """Whether a dataset can only be iterated, though its class may inherit indexing."""
    return any(c.__name__ == "IterableDataset" for c in type(dataset).__mro__)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
