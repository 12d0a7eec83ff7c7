"""How long a run of an example lasts, and the learning rate at each of its steps: the same in all workers."""

from __future__ import annotations

import math
import time

import torch

import headwater as hw

WARM_UP = 40  # steps
FAR = 10**9  # steps: an end that is not known yet


def share_of_peak(step: int, steps: int, warm_up: int = WARM_UP) -> float:
    """Return the share of the peak learning rate at a step: a warm-up, then half a cosine down to a tenth."""
    progress = min(1.0, max(0, step - warm_up) / max(1, steps - warm_up))
    return min(1.0, (max(0, step) + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * progress))


def share_of_batch(session: hw.Session) -> float:
    """Return which part of the batch of all workers a step of the job is made from.

    Under BSP a step is made from the mean of all; else each push makes one, and the peak rate is to be scaled: with this share for SGD
    (Goyal et al. 2017), with its root for Adam (Malladi et al. 2022).
    """
    return 1.0 if session.consistency == hw.bsp() else 1 / session.workers


def adamw(
    session: hw.Session, rate: float, *, betas: tuple[float, float], weight_decay: float, clip_norm: float
) -> hw.optim.AdamW:
    """Return what these settings, those of a step of the whole batch, are for the job's steps.

    A step made from a part of the batch is smaller and forgets less of the squares and the weights (Malladi et al. 2022). Where nobody
    waits gradients come late, which is a momentum of its own (Mitliagkas et al. 2016): half as much again is left out of the mean.
    """
    share = share_of_batch(session)
    if share == 1:
        return hw.optim.AdamW(lr=rate, betas=betas, weight_decay=weight_decay, clip_norm=clip_norm)
    smaller = share**0.5
    betas = (1 - 1.5 * (1 - betas[0]), 1 - share * (1 - betas[1]))
    return hw.optim.AdamW(lr=rate * smaller, betas=betas, weight_decay=weight_decay * smaller, clip_norm=clip_norm)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of a step that is about to be made.

    A worker that has waited for data goes on at a later clock, so with leased data the rate is settled no earlier.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate


class Run:
    """How long this run lasts, and the learning rate at each step: the same in all workers, as their steps are taken together.

    Nobody knows how many steps a minute has. Worker 0 finds out during the warm-up and tells the others, and those who join later
    or resume, through the job's state.
    """

    def __init__(self, session: hw.Session, steps: int | None, minutes: float) -> None:
        self._session, self._minutes = session, minutes
        self._start, self._start_s = session.clock, time.monotonic()
        self.begin: int  # included
        self.end: int  # not included
        self.begin, self.end = session.state.get("run", (0, 0))
        if self.end <= session.clock:  # not a run that is under way
            self.begin, self.end = session.clock, session.clock + (steps or FAR)
            if session.index == 0:
                session.state["run"] = self.begin, self.end

    def update(self) -> None:
        """Find out when the run ends, until it is known; to be called after each step."""
        if self.has_end:
            return
        if self._session.index > 0:
            self.begin, self.end = self._session.state["run"]
        elif self._session.clock == self._start + WARM_UP // 2:
            self.end = self._start + round(60 * self._minutes / self._step_s)
            self._session.state["run"] = self.begin, self.end

    @property
    def has_end(self) -> bool:
        return self.end < self.begin + FAR

    @property
    def is_over(self) -> bool:
        return self._session.clock >= self.end

    @property
    def rate(self) -> float:
        """The share of the peak learning rate."""
        return share_of_peak(self._session.clock - self.begin, self.end - self.begin)

    @property
    def _step_s(self) -> float:  # the mean so far
        return (time.monotonic() - self._start_s) / (self._session.clock - self._start)

    def figures(self) -> dict[str, float]:
        """How far the run is, for the display."""
        if not self.has_end:
            return {}
        left = max(0, self.end - self._session.clock)
        return {"progress": 1 - left / (self.end - self.begin), "seconds_left": left * self._step_s}
