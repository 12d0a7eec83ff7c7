"""How commits are carried out: what is said to every server, and which pushes turn out bad. Knows no lock, and workers only by name.

    Norms     with clipping: sums of squares, where they are not taken in the pass that applies
    Prepare   apply beside the current state; a bad gradient is found here, its push refused, and Prepare said again
    Gather    the rows that the pushes have staged, for tables
    Persist   where commits are kept
    Flip      what was prepared is the state

Each is said to all servers at once and answered by all before the next, so commit n is the same on every server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from headwater._book import Change
from headwater._consistency import Commit, PushEntry
from headwater._errors import DisagreementError, HeadwaterError, NonFiniteError, ProtocolError
from headwater._layout import Layout
from headwater._messages import AnyMessage, Flip, Flipped, Gather, Normed, Norms, Persist, Prepare, Prepared
from headwater._plan import Plan, scaled
from headwater._rows import TableSpec
from headwater.optim import AnyOptimizer

#: Says something to every server; returns the answers in their order.
Ask: TypeAlias = Callable[[AnyMessage], list[AnyMessage]]
#: Why pushes were refused, by the worker's identity.
Refusals: TypeAlias = dict[int, HeadwaterError]


class Trained(NamedTuple):
    """What commits change: the dense parameters, and tables."""

    layout: Layout
    optimizer: AnyOptimizer
    plan: Plan
    tables: Sequence[TableSpec]


class Carried(NamedTuple):
    """What has come of a batch of commits."""

    refusals: Refusals
    plan: Plan
    side: int


class Execution:
    """Carries commits out, one batch at a time. What `ask` raises ends a batch whose outcome is then unknown.

    names: of workers, by identity.
    """

    def __init__(self, ask: Ask, names: Callable[[int], str]) -> None:
        self._ask, self._names = ask, names
        self.forget()

    def forget(self) -> None:
        """Know nothing of the commit before the next one: the job has come back."""
        self._was_clipped = True  # the last commit; a guess at the next one

    def run(
        self, batch: Sequence[Commit], trained: Trained, persist: Callable[[Refusals, Plan], Change] | None
    ) -> Carried:
        """Apply commits on every server, without the pushes that turn out bad. persist: what is to be written down of them; None: nothing.

        A gradient that is not expected to need clipping is measured in the pass that applies it, and where it does, applied again.
        Each other retry leaves out at least one push, so this ends.
        """
        refusals: Refusals = {}
        limit: float | None = getattr(trained.optimizer, "clip_norm", None)
        while True:
            pushes = [[p for p in commit.pushes if p.worker not in refusals] for commit in batch]
            specs, plan, kept = [], trained.plan, list[int]()
            is_measured = limit is not None and not self._was_clipped and len(batch) == 1
            for i in [i for i, p in enumerate(pushes) if p]:
                spec, after = plan.next(trained.optimizer, pushes[i])
                if not spec.rows:  # none of them has any gradient: nothing changes
                    continue
                if limit is not None and not is_measured:
                    factor = _clip_factor(limit, self._ask(Norms(spec)))
                    self._was_clipped = factor != 1.0
                    spec = scaled(spec, factor)
                specs.append(spec)
                kept.append(i)
                plan = after
            if specs:
                answers = self._ask(Prepare(batch[0].number, tuple(specs), is_measured))
                bad = [a.bad for a in answers if isinstance(a, Prepared) and a.bad is not None]
                if bad:
                    for commit, push, tensor, element in bad:
                        entry = pushes[kept[commit]][push]
                        refusals[entry.worker] = self._bad_push(trained, entry, tensor, element)
                    continue
                if limit is not None and is_measured and _clip_factor(limit, answers) != 1.0:
                    self._was_clipped = True
                    continue
            if self._gather(batch, trained, refusals):
                continue
            if persist is not None:
                self._ask(Persist(persist(refusals, plan), bool(specs)))
            return Carried(refusals, plan, self.flip(batch[-1].number, swap=bool(specs)))

    def flip(self, commit: int, *, swap: bool) -> int:
        """Let what is prepared be the state; returns the side on which it lies."""
        flipped = self._ask(Flip(commit, swap))[0]
        assert isinstance(flipped, Flipped)
        return flipped.side

    def _gather(self, batch: Sequence[Commit], trained: Trained, refusals: Refusals) -> bool:
        """Let the rows that the batch's pushes have staged count with the flip to come. Returns whether that refuses one more."""
        if not any(spec.is_staged for spec in trained.tables):
            return False
        entries = {entry.worker: entry for commit in batch for entry in commit.pushes if entry.worker not in refusals}
        total = sum(entry.weight for entry in entries.values())
        pushes = [
            (worker, sequence, entries[worker].weight / total if worker in entries else 0.0)
            for commit in batch
            for worker, sequence in commit.closes
        ]
        bad = {a.bad for a in self._ask(Gather(tuple(pushes))) if isinstance(a, Prepared) and a.bad is not None}
        for _, push, tensor, element in bad:
            entry = entries[pushes[push][0]]
            refusals[entry.worker] = self._bad_push(trained, entry, tensor, element)
        return bool(bad)

    def _bad_push(self, trained: Trained, entry: PushEntry, tensor: int, element: int) -> HeadwaterError:
        if tensor == -2:
            return DisagreementError(
                f"Expected the same learning rate and other scalars from every worker for table {trained.tables[element].name!r}, "
                f"got others from {self._names(entry.worker)}: give all workers the same schedule, or declare it with hw.asp()."
            )
        if tensor < 0:
            return ProtocolError(
                f"Expected push {entry.sequence} to lie whole on every server before its seal, got none."
            )
        spec = trained.layout.specs[tensor]
        kind = "values" if spec.is_averaged else "gradients"
        return NonFiniteError(
            f"Expected finite {kind}, got NaN or infinity in {spec.name!r} {spec.shape} at element {element} — "
            f"{self._names(entry.worker)}, push {entry.sequence}. The push counts nowhere and the clock is closed; "
            "lower the learning rate, clip, or skip the step."
        )


def _clip_factor(limit: float, answers: Sequence[AnyMessage]) -> float:
    """Return what a gradient with these sums of squares is multiplied by so that its global norm is at most `limit`."""
    sums = [np.frombuffer(a.sums) for a in answers if isinstance(a, (Normed, Prepared))]
    # fsum is exact before it rounds, so the norm does not depend on how many servers the blocks lie on.
    total = math.fsum(np.concatenate(sums))
    if not math.isfinite(total):
        return 1.0  # a bad element: Prepare finds and names it
    return min(1.0, limit / (math.sqrt(total) + 1e-6))
