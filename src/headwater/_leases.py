"""Who works on which part of a dataset, so that each of its units is used once per epoch whoever comes and goes. Pure.

Units, single items or batches, are numbered through all epochs: unit u of epoch e is e · units + u. At every moment each
number is exactly one of

    used     in a push whose commit counts
    held     leased to a worker, in pieces; its pushes use them in the order in which they were leased
    free     given back by a worker that left or died; leased again before any other
    fresh    never leased: those from `Leases.fresh` on

Near the end of an epoch, whose last pieces are all held, the next piece is of the next epoch: nobody waits but at the end of
the last one. An illegal call raises and leaves the state as it was.
"""

from __future__ import annotations

import msgspec

from headwater import _limits
from headwater._errors import ProtocolError, SettingError


class DataSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A dataset as it is leased, by name. All workers give the same, for the same number must mean the same items."""

    name: str
    items: int
    epochs: int
    piece: int  # units that are leased at once
    batch_size: int = 0  # items of a unit; 0: units are single items
    drop_last: bool = False  # a last batch that is not full
    shuffle: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.items, self.epochs, self.piece) < 1 or self.batch_size < 0 or self.seed < 0:
            raise SettingError(
                f"Expected at least one item, epoch and unit per piece, a batch size of 1 or more and a seed of 0 or more, got {self}."
            )
        if self.units < 1:
            raise SettingError(f"Expected at least one full batch, got {self}.")

    @property
    def units(self) -> int:
        """Units of one epoch."""
        size = self.batch_size or 1
        return self.items // size if self.drop_last else -(-self.items // size)

    def __str__(self) -> str:
        batches = f" in batches of {self.batch_size}{', the last one full' if self.drop_last else ''}"
        order = f", shuffled with seed {self.seed}" if self.shuffle else ""
        size = f"{self.items} items{batches if self.batch_size else ''}"
        return f"{size}, {self.epochs} epochs, pieces of {self.piece}{order} (data {self.name!r})"


class Piece(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Consecutive units of one epoch."""

    epoch: int
    start: int  # included
    stop: int  # not included


class Held(msgspec.Struct):
    """What one worker has: pieces in the order in which it got them, as numbers (start, stop)."""

    used: int = 0  # units used by its pushes that count, in total
    pieces: list[tuple[int, int]] = []

    @property
    def had(self) -> int:
        """Units leased to it in total."""
        return self.used + sum(stop - start for start, stop in self.pieces)


class Leases(msgspec.Struct):
    """The leases of one dataset: a value that can be encoded, as large as what is held and what was given back in pieces."""

    spec: DataSpec
    fresh: int = 0
    free: list[tuple[int, int]] = []  # (start, stop), rising and apart
    held: dict[int, Held] = {}  # by the worker's identity

    @property
    def is_used_up(self) -> bool:
        """Whether every unit of every epoch is used."""
        return self.fresh == self._end and not self.free and not self.holders()

    @property
    def _end(self) -> int:
        return self.spec.units * self.spec.epochs

    def holders(self) -> list[int]:
        """Identities of the workers that hold units."""
        return [worker for worker, held in self.held.items() if held.pieces]

    def counts(self, worker: int) -> tuple[int, int]:
        """Units that a worker has used and got in total, since it last gave any back."""
        held = self.held.get(worker) or Held()
        return held.used, held.had

    def take(self, worker: int, had: int) -> Piece | None:
        """Lease the worker a piece; None: all the others are used or held, and some may come free again.

        had: units that the worker knows to have got so far. Where it got more, because an answer was lost, it gets them again.
        """
        held = self.held.get(worker) or Held()
        if not held.used <= had <= held.had:
            raise ProtocolError(
                f"Expected a worker that got {held.had} units and used {held.used}, got one that had {had} — data {self.spec.name!r}."
            )
        position = held.used
        for start, stop in held.pieces:
            if had < position + stop - start:
                return self._piece(start + had - position, stop)
            position += stop - start
        if len(held.pieces) >= _limits.LEASES:
            raise SettingError(
                f"Expected at most {_limits.LEASES} pieces ahead of the pushes that use them, got one more — data {self.spec.name!r}: "
                "push, or make pieces larger."
            )
        if self.free:
            start, limit = self.free[0]
        elif self.fresh < self._end:
            start, limit = self.fresh, self._end
        else:
            return None
        stop = min(start + self.spec.piece, limit, (start // self.spec.units + 1) * self.spec.units)
        if self.free:
            self.free[:1] = [(stop, limit)] if stop < limit else []
        else:
            self.fresh = stop
        held.pieces.append((start, stop))
        self.held[worker] = held
        return self._piece(start, stop)

    def check(self, worker: int, used: int) -> None:
        """Raise where `use` would."""
        held = self.held.get(worker) or Held()
        if not held.used <= used <= held.had:
            raise ProtocolError(
                f"Expected {held.used} to {held.had} used units, what the worker got, got {used} — data {self.spec.name!r}."
            )

    def use(self, worker: int, used: int) -> None:
        """A push counts before which the worker had used so many units in total, each in the order in which it got them."""
        self.check(worker, used)
        if worker not in self.held:
            return
        held = self.held[worker]
        count, held.used = used - held.used, used
        while count:
            start, stop = held.pieces[0]
            step = min(count, stop - start)
            count -= step
            held.pieces[:1] = [(start + step, stop)] if start + step < stop else []

    def give_back(self, worker: int) -> None:
        """The worker left or died: what no push used is free again. One that holds nothing may be given back too."""
        held = self.held.pop(worker, None) or Held()
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(self.free + held.pieces):
            first = merged.pop()[0] if merged and merged[-1][1] == start else start
            merged.append((first, stop))
        self.free = merged

    def go_back(self) -> None:
        """This is the state of an earlier commit, gone back to: nobody holds anything, and everybody counts from 0."""
        for worker in list(self.held):
            self.give_back(worker)

    def _piece(self, start: int, stop: int) -> Piece:
        epoch, first = divmod(start, self.spec.units)
        return Piece(epoch, first, first + stop - start)
