"""From an accepted commit to the numbers that every server applies: who counts how much where, and at which step.

Tensors that have made the same steps in the same parameter group form a *cohort*; normally there is one per group. A
tensor that no push has a gradient for stays untouched and its step count stands still, so cohorts part. Within a commit,
tensors of one cohort that the same pushes have gradients for form a *cell*.

The mean is over all pushes of the commit, weighted: g = Σ wᵢ·gᵢ / Σ wᵢ, a missing gradient counting as zero. That is what one
process with the larger batch computes. Of a tensor that is averaged it is the mean of the values that were pushed: one that is missing
is left out, and neither sign nor clipping have a say.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec
import numpy as np

from headwater._consistency import PushEntry
from headwater._layout import AVERAGED
from headwater._messages import CommitSpec
from headwater.optim import AnyOptimizer


class Plan(NamedTuple):
    """Step counts after some commit. Immutable: a commit that is refused leaves nothing behind."""

    cohort_of: np.ndarray  # int32, one per tensor
    cells: bytes  # the same as bytes: the cells of a commit in which every gradient is present
    cohorts: tuple[tuple[int, int], ...]  # (parameter group or AVERAGED, steps made)

    @classmethod
    def start(cls, groups: Sequence[int], steps: Sequence[int] = ()) -> Plan:
        """Return the plan of tensors in these groups that have made these steps; none: all 0."""
        keys = list(zip(groups, steps or [0] * len(groups), strict=True))
        cohorts = tuple(dict.fromkeys(keys))
        number = {key: i for i, key in enumerate(cohorts)}
        cohort_of = np.array([number[key] for key in keys], np.int32)
        return cls(cohort_of, cohort_of.tobytes(), cohorts)

    @classmethod
    def of(cls, cells: bytes, cohorts: Sequence[tuple[int, int]]) -> Plan:
        """Return the plan that has these fields."""
        return cls(np.frombuffer(cells, np.int32), cells, tuple(cohorts))

    def steps(self) -> tuple[int, ...]:
        """Steps made, one per tensor."""
        return tuple(self.cohorts[c][1] for c in self.cohort_of)

    def next(self, optimizer: AnyOptimizer, pushes: Sequence[PushEntry]) -> tuple[CommitSpec, Plan]:
        """Return the commit of these pushes (one or more), and the plan after it."""
        names = tuple([(p.worker, p.sequence) for p in pushes])
        weights = tuple([p.weight for p in pushes])
        sign = -1.0 if getattr(optimizer, "maximize", False) else 1.0
        if any(p.absent for p in pushes):
            present = np.array([~_absent(p, len(self.cohort_of)) for p in pushes])
            plan, cells, cell_cohorts, held = self._split(present)
        else:
            plan, cells, cell_cohorts, held = self, self.cells, list(range(len(self.cohorts))), None
        averaged = tuple([plan.cohorts[cohort][0] == AVERAGED for cohort in cell_cohorts])
        coefficients = _shares(weights, sign, averaged, None if held is None else held.tobytes())
        cohorts = list(plan.cohorts)
        for cohort in set(cell_cohorts):
            group, steps = cohorts[cohort]
            cohorts[cohort] = (group, steps + 1)
        scalars = [dict(zip(optimizer.scalar_names, row, strict=True)) for row in pushes[0].scalars]
        rows = [() if group == AVERAGED else tuple(optimizer.row(scalars[group], steps)) for group, steps in cohorts]
        spec = CommitSpec(names, cells, tuple([rows[c] for c in cell_cohorts]), coefficients)
        return spec, Plan(plan.cohort_of, plan.cells, tuple(cohorts))

    def _split(self, present: np.ndarray) -> tuple[Plan, bytes, list[int], np.ndarray]:
        """Part cohorts whose tensors are not all touched, and tell the cells apart.

        present: bool (pushes, tensors). Returns the plan, the cells, each cell's cohort and bool (cells, pushes).
        """
        touched = np.asarray(present.any(axis=0))
        cohort_of, cohorts = self.cohort_of.copy(), list(self.cohorts)
        for cohort in range(len(cohorts)):
            mine = np.equal(cohort_of, cohort)
            if touched[mine].any() and not touched[mine].all():
                cohort_of[mine & touched] = len(cohorts)
                cohorts.append(cohorts[cohort])
        cells = np.full(len(cohort_of), -1, np.int32)
        seen: dict[tuple[int, bytes], int] = {}
        for tensor in np.flatnonzero(touched):
            key = (int(cohort_of[tensor]), present[:, tensor].tobytes())
            cells[tensor] = seen.setdefault(key, len(seen))
        held = np.array([np.frombuffer(pattern, bool) for _, pattern in seen]).reshape(len(seen), len(present))
        plan = Plan(cohort_of, cohort_of.tobytes(), tuple(cohorts))
        return plan, cells.tobytes(), [cohort for cohort, _ in seen], held


def scaled(spec: CommitSpec, factor: float) -> CommitSpec:
    """Return the same commit with its gradient multiplied by a factor."""
    # What is averaged has no scalars.
    factors = np.repeat([factor if row else 1.0 for row in spec.rows], len(spec.pushes))
    return msgspec.structs.replace(spec, coefficients=(np.frombuffer(spec.coefficients) * factors).tobytes())


@lru_cache(maxsize=64)
def _shares(weights: tuple[float, ...], sign: float, averaged: tuple[bool, ...], held: bytes | None) -> bytes:
    """Return float64 (cells, pushes): each push's share in the mean.

    averaged: whether a cell's tensors are. held: bool (cells, pushes), which pushes have it; None: all have all.
    """
    total = sum(weights)
    shares = np.array([[weight / total for weight in weights]] * len(averaged))
    present = np.ones(shares.shape, bool) if held is None else np.frombuffer(held, bool).reshape(shares.shape)
    for i, is_averaged in enumerate(averaged):
        if is_averaged and not present[i].all():
            shares[i] = np.divide(weights, sum(w for w, here in zip(weights, present[i], strict=True) if here))
        elif not is_averaged:
            shares[i] *= sign
    return np.where(present, shares, 0.0).tobytes()


def pack_absent(absent: Sequence[bool]) -> bytes:
    """Return the bits of a push's missing gradients; empty when none is missing."""
    return np.packbits(np.array(absent, bool)).tobytes() if any(absent) else b""


def _absent(push: PushEntry, tensors: int) -> np.ndarray:
    if not push.absent:
        return np.zeros(tensors, bool)
    return np.unpackbits(np.frombuffer(push.absent, np.uint8), count=tensors).astype(bool)
