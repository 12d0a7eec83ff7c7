"""Counts and measurements of a process, in the text that Prometheus reads. No I/O. Everything can be shared between threads."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

#: Values by what the labels say, in their order.
Values = Mapping[tuple[str, ...], float]
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """All that a process shows; a name is shown from when it is made."""

    def __init__(self) -> None:
        self._shown: dict[str, Callable[[], list[str]]] = {}

    def counter(self, name: str, says: str, *labels: str) -> Counter:
        """Return what counts up. name: ends in _total."""
        counter = Counter(labels)
        self._show(name, "counter", says, lambda: _lines(name, labels, counter.values()))
        return counter

    def gauge(self, name: str, says: str, read: Callable[[], float | Values], *labels: str) -> None:
        """Show what `read` returns whenever somebody asks: a number, or numbers by label values; from any thread, and quickly."""

        def lines() -> list[str]:
            found = read()
            return _lines(name, labels, found if isinstance(found, Mapping) else {(): found})

        self._show(name, "gauge", says, lines)

    def histogram(self, name: str, says: str, bounds: Sequence[float]) -> Histogram:
        """Return what sorts values into classes. bounds: their upper ends, ascending; the unit is the name's end."""
        histogram = Histogram(bounds)
        self._show(name, "histogram", says, lambda: histogram.lines(name))
        return histogram

    def _show(self, name: str, kind: str, says: str, lines: Callable[[], list[str]]) -> None:
        assert name not in self._shown
        self._shown[name] = lambda: [f"# HELP {name} {says}", f"# TYPE {name} {kind}", *lines()]

    def text(self) -> str:
        """Return all of it."""
        return "".join(f"{line}\n" for lines in list(self._shown.values()) for line in lines())


class Counter:
    """Counts by what the labels say."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, *labels: str, amount: float = 1.0) -> None:
        with self._lock:
            self._values[labels] = self._values.get(labels, 0.0) + amount

    def values(self) -> Values:
        with self._lock:
            return dict(self._values)


class Histogram:
    """How many values there were up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._lock = threading.Lock()
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def lines(self, name: str) -> list[str]:
        with self._lock:
            counts, total = list(accumulate(self._counts)), self._sum
        buckets = zip([*map(_number, self._bounds), "+Inf"], counts, strict=True)
        return [
            *(f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in buckets),
            f"{name}_sum {_number(total)}",
            f"{name}_count {counts[-1]}",
        ]


def _lines(name: str, labels: Sequence[str], values: Values) -> list[str]:
    lines = []
    for key, value in sorted(values.items()):
        says = ",".join(f'{label}="{escape(text)}"' for label, text in zip(labels, key, strict=True))
        lines.append(f"{name}{{{says}}} {_number(value)}" if says else f"{name} {_number(value)}")
    return lines


def escape(text: str) -> str:
    """Return a label's value as it stands between quotes."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
