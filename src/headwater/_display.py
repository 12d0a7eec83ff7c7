"""What a person sees while a job runs: one table that the terminal redraws, or a line now and then where there is no terminal."""

from __future__ import annotations

import time
from collections import deque

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headwater._messages import Stats, WorkerStats

_BARS = "▁▂▃▄▅▆▇█"
_CURVE = 48  # points of the loss curve
_LINE_S = 5.0  # between lines where there is no terminal
_RATE_S = 3.0  # over which rates are taken


class Display:
    """Shows a job's statistics. A context manager; `update` is called as often as one likes.

    Workers say what they know through `session.report`: loss, held_out, tokens (so far), progress (0 to 1), seconds_left.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._title = title
        self._console = console or Console()
        self._live = Live(console=self._console, refresh_per_second=8, transient=False)
        self._past: deque[tuple[float, Stats]] = deque()
        self._losses: list[float] = []
        self._last_line_s = 0.0

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, stats: Stats) -> None:
        """Show newer statistics."""
        now = time.monotonic()
        self._past.append((now, stats))
        while len(self._past) > 2 and now - self._past[0][0] > _RATE_S:
            self._past.popleft()
        loss = _mean(stats, "loss")
        if loss is not None:
            self._losses.append(loss)
        if self._console.is_terminal:
            self._live.update(self._render(stats))
        elif now - self._last_line_s >= _LINE_S and stats.commit:
            self._last_line_s = now
            self._console.print(self._line(stats), highlight=False)

    def _render(self, stats: Stats) -> RenderableType:
        progress = _largest(stats, "progress") or 0.0
        servers = f"{stats.servers} server" + "s" * (stats.servers > 1)
        head = Text.assemble(
            (self._title, "bold"), f"  {stats.parameters / 1e6:.1f} M parameters · {servers} · {stats.consistency}"
        )
        bar = Table.grid(padding=(0, 1), expand=False)
        bar.add_row(ProgressBar(total=1.0, completed=progress, width=_CURVE), f"{progress:4.0%}", self._left(stats))
        return Group(head, bar, Text(self._line(stats)), Text(_curve(self._losses), "cyan"), self._workers(stats))

    def _line(self, stats: Stats) -> str:
        parts = [f"step {stats.commit:,}"]
        for name, label in (("loss", "loss"), ("held_out", "held-out")):
            value = _mean(stats, name)
            if value is not None:
                parts.append(f"{label} {value:.3f}")
        parts.append(f"{self._rate('tokens'):,.0f} tokens/s")
        parts.append(f"pushed {_bytes(stats.push_bytes)}")
        if not self._console.is_terminal:
            parts.append(f"staleness {max((w.staleness for w in stats.workers), default=0)}")
            parts.append(self._left(stats))
        if stats.refused:
            parts.append(f"refused {stats.refused}")
        return " · ".join(parts)

    def _workers(self, stats: Stats) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("worker", "clock", "staleness", "loss", "tokens/s", "steps/s", ""):
            table.add_column(name, justify="left" if name in ("worker", "") else "right")
        for worker in stats.workers:
            loss = worker.figures.get("loss")
            table.add_row(
                f"{worker.index} {worker.label}",
                f"{worker.clock:,}",
                f"{worker.staleness} (max {worker.staleness_max})",
                "" if loss is None else f"{loss:.3f}",
                f"{self._rate('tokens', worker):,.0f}",
                f"{self._rate('', worker):.1f}",
                "" if worker.live else "gone",
            )
        return table

    def _rate(self, figure: str, worker: WorkerStats | None = None) -> float:
        """Per second, of a counting figure or of pushes; of one worker or of all. Over the whole job once it has ended."""
        (start_s, first), (end_s, last) = self._past[0], self._past[-1]

        def total(stats: Stats) -> float:
            rows = [w for w in stats.workers if worker is None or w.index == worker.index]
            return sum(w.figures.get(figure, 0.0) if figure else w.pushes for w in rows)

        if not any(w.live for w in last.workers):
            return total(last) / max(last.seconds, 1e-9)
        return max(total(last) - total(first), 0.0) / max(end_s - start_s, 1e-9)

    def _left(self, stats: Stats) -> str:
        left = _largest(stats, "seconds_left")
        return "" if left is None else f"{int(left) // 60}:{int(left) % 60:02d} left"


def _mean(stats: Stats, figure: str) -> float | None:
    values = [w.figures[figure] for w in stats.workers if figure in w.figures]
    return sum(values) / len(values) if values else None


def _largest(stats: Stats, figure: str) -> float | None:
    return max((w.figures[figure] for w in stats.workers if figure in w.figures), default=None)


def _curve(values: list[float]) -> str:
    """Draw values as bars, the newest at the right, thinned to fit."""
    if len(values) < 2:
        return ""
    step = max(1, -(-len(values) // _CURVE))
    points = [sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)]
    low, high = min(points), max(points)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((p - low) * scale)] for p in points)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
