"""This worker's part of a dataset."""

from __future__ import annotations

from typing import Any, Protocol

from headwater._errors import SettingError


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
