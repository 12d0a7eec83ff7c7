"""What a figure says, as text, as JSON and as a row of the README's table. Pure but for reading the machine's name."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

START, STOP = "<!-- bench -->", "<!-- /bench -->"


@dataclass(frozen=True)
class Check:
    """One part of a target: a value that must be at least (or at most) a bound."""

    name: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    @property
    def target(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"

    @property
    def rounded(self) -> float:
        return round(self.value, 3)


@dataclass(frozen=True)
class Result:
    """A measured figure. The first check is its headline; `beside` is what else was measured and has no target."""

    figure: str
    what: str
    unit: str
    checks: list[Check] = field(default_factory=list)
    beside: dict[str, float] = field(default_factory=dict)
    error: str = ""  # why it could not be measured

    @property
    def holds(self) -> bool:
        return not self.error and all(check.holds for check in self.checks)

    @property
    def reason(self) -> str:
        """Why it falls short; empty when it holds."""
        return self.error.partition("\n")[0] or "; ".join(
            f"{c.name} is {c.rounded:g}, not {c.target}" for c in self.checks if not c.holds
        )

    @property
    def target(self) -> str:
        return "; ".join(c.target if i == 0 else f"{c.name} {c.target}" for i, c in enumerate(self.checks))

    def json(self) -> str:
        """Return the one line that programs read."""
        answer = {
            "figure": self.figure,
            "what": self.what,
            "value": self.checks[0].rounded if self.checks else None,
            "unit": self.unit,
            "beside": {c.name: c.rounded for c in self.checks[1:]} | {k: round(v, 3) for k, v in self.beside.items()},
            "target": self.target,
            "holds": self.holds,
        }
        return json.dumps(answer if self.holds else answer | {"reason": self.reason}, ensure_ascii=False)

    def row(self) -> str:
        """Return the row of the README's table."""
        value = f"{self.checks[0].rounded:g} {self.unit}" if self.checks else "—"
        beside = [f"{c.name} {c.rounded:g} ({c.target})" for c in self.checks[1:]]
        beside += [f"{name} {_plain(number)}" for name, number in self.beside.items()]
        verdict = "holds" if self.holds else f"**short**: {self.reason}"
        headline = self.checks[0].target if self.checks else "—"
        cells = (self.figure, self.what, f"**{value}**", headline, "; ".join(beside), verdict)
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _plain(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def table(results: list[Result], machine: str) -> str:
    """Return the README's table."""
    head = "| figure | what | value | target | beside it | |\n|---|---|---|---|---|---|"
    rows = "\n".join(result.row() for result in results)
    note = "Medians of ratios taken in the same round; `make bench FIGURE=core.1` measures one of them again."
    return f"Measured on {machine}.\n\n{head}\n{rows}\n\n{note}"


def insert(text: str, body: str) -> str:
    """Return a document with `body` between its two marker comments. Raises ValueError when they are missing."""
    before, start, rest = text.partition(START)
    _, stop, after = rest.partition(STOP)
    if not start or not stop:
        raise ValueError(f"expected the lines {START} and {STOP} in the document")
    return f"{before}{START}\n{body}\n{STOP}{after}"


def machine() -> str:
    """Name the hardware, the date and the versions that matter."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {_version(name)}" for name in ("headwater", "numpy", "torch"))
    python = ".".join(map(str, sys.version_info[:3]))
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores, {memory:.0f} GiB, Linux {platform.release().split('-')[0]}, {date.today()}: Python {python}, {packages}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
