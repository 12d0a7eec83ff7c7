"""The rule that turns pushes into commits. Pure: pushes, joins and departures in; commits and releases out.

Rules that live here and nowhere else:

1. BSP: commit n holds one push of every live worker, in the order of worker index; it is made when the last one is in.
2. ASP and SSP: every push is a commit at once. SSP(s) holds a worker at clock c until the slowest live worker is at c − s.
3. A clock always closes: an empty or refused push closes it like any other, and a worker that left is not waited for.
4. Pushes of one worker carry rising sequences; one that was counted is never counted again.
5. Under BSP the step's scalars must agree; the push that differs is refused, and the error names both workers.
6. A worker that waits for data is waited for by nobody: it pauses, and joins again where the others are then.

No sockets, no threads, no time: the coordinator is the thin shell around it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from headwater._errors import DisagreementError, ProtocolError, SettingError


class Consistency(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How closely workers keep together; one setting of the job. Make it with `bsp`, `ssp` or `asp`."""

    kind: str
    staleness: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("bsp", "ssp", "asp"):
            raise SettingError(f"Expected consistency bsp, ssp or asp, got {self.kind!r}.")
        if self.staleness < 0 or (self.staleness and self.kind != "ssp"):
            raise SettingError(
                f"Expected a staleness of 0 or more, for ssp only, got {self.staleness} for {self.kind}."
            )

    def __str__(self) -> str:
        return f"ssp:{self.staleness}" if self.kind == "ssp" else self.kind

    @classmethod
    def parse(cls, text: str) -> Consistency:
        """Read "bsp", "asp" or "ssp:3"."""
        kind, _, staleness = text.partition(":")
        if staleness and not staleness.isdigit():
            raise SettingError(f"Expected bsp, asp or ssp:STALENESS such as ssp:3, got {text!r}.")
        if kind == "ssp" and not staleness:
            raise SettingError("Expected ssp with its staleness, such as ssp:3, got ssp alone.")
        return cls(kind, int(staleness or 0))


def bsp() -> Consistency:
    """Bulk synchronous: clock c reads exactly commit c; N equal workers equal one with an N times larger batch."""
    return Consistency("bsp")


def ssp(staleness: int) -> Consistency:
    """Stale synchronous: a worker at clock c runs only while the slowest live one is at c − staleness or later."""
    return Consistency("ssp", staleness)


def asp() -> Consistency:
    """Asynchronous: every push counts at once and nobody waits for another."""
    return Consistency("asp")


class PushEntry(NamedTuple):
    """A whole push as the policy sees it. Weight 0 is an empty push: it closes the clock and changes nothing."""

    worker: int  # identity
    sequence: int
    weight: float
    scalars: tuple[tuple[float, ...], ...] = ()
    absent: bytes = b""


class Commit(NamedTuple):
    """A commit: accepted pushes of weight above 0, in the order of the sum, and everybody whose clock it closes."""

    number: int
    pushes: tuple[PushEntry, ...]
    closes: tuple[tuple[int, int], ...]  # (identity, sequence)


class Member:
    """A live worker."""

    __slots__ = ("clock", "index", "leaving", "pending", "sequence")

    def __init__(self, index: int, clock: int) -> None:
        self.index = index
        self.clock = clock  # finished steps
        self.sequence = -1  # of the last push that was taken
        self.pending: PushEntry | None = None  # BSP: waits for the others
        self.leaving = False  # gone, but its pending push still counts


class Policy:
    """The state of one job's barrier. An illegal call raises and leaves it unchanged."""

    def __init__(self, consistency: Consistency, expected: int = 1) -> None:
        self.consistency = consistency
        self.expected = expected  # BSP makes no commit before so many different workers have come
        self.commit = 0  # number of the last commit
        self.members: dict[int, Member] = {}
        self._arrived: set[int] = set()  # indices
        self._paused: dict[int, Member] = {}

    @property
    def started(self) -> bool:
        """Whether everybody expected at the start has come."""
        return len(self._arrived) >= self.expected

    def begin(self, arrived: Iterable[int]) -> None:
        """Go on with members that are known; these indices, too, are waited for no longer."""
        self._arrived = set(arrived)

    @property
    def is_under_way(self) -> bool:
        """Whether workers are in a step that all of them end together."""
        return self.consistency.kind == "bsp" and self.started and bool(self.members)

    def missing(self) -> list[int]:
        """Indices of the workers that have not come yet."""
        if self.started:
            return []
        return [i for i in range(self.expected) if i not in self._arrived][: self.expected - len(self._arrived)]

    def join(self, worker: int, index: int, *, sequence: int = -1, clock: int | None = None) -> int:
        """Take in a worker, new or paused, and return the clock it starts at; nobody waits for it before its next push is due.

        One that comes back has its last `sequence` that counted, and its clock, which under BSP is everybody's.
        """
        if worker in self.members:
            raise ProtocolError(f"Expected a worker to join once, got worker {index} again.")
        paused = self._paused.pop(worker, None)
        if self.consistency.kind == "bsp":
            clock = self.commit
        elif clock is None:
            clock = min((m.clock for m in self.members.values()), default=self.commit if paused is None else 0)
            clock = clock if paused is None else max(clock, paused.clock)
        member = self.members[worker] = paused or Member(index, clock)
        member.clock, member.sequence = clock, max(member.sequence, sequence)
        self._arrived.add(index)
        return clock

    def withdraw(self, worker: int) -> bool:
        """A worker is back: forget what it has sealed and what has not been committed. Returns whether it is a member."""
        member = self.members.get(worker)
        if member is None:
            return False
        if member.pending is not None:
            member.sequence = member.pending.sequence - 1
            member.pending = None
        member.leaving = False
        self._arrived.add(member.index)
        return True

    def pause(self, worker: int) -> list[Commit]:
        """Wait no longer for a worker whose pushes are all closed, until it joins again; its sequence goes on from where it was."""
        member = self.members.get(worker)
        if member is None or member.pending is not None:
            raise ProtocolError("Expected a pause of a worker that has joined and whose pushes are closed.")
        self._paused[worker] = self.members.pop(worker)
        return self._close()

    def leave(self, worker: int) -> list[Commit]:
        """Let a worker go, dead or done. A push it has sealed still counts; the others wait for it no longer."""
        self._paused.pop(worker, None)
        member = self.members.get(worker)
        if member is None:
            return []
        if member.pending is None:
            del self.members[worker]
            return self._close()
        member.leaving = True  # until the commit that holds its sealed push
        return self._close()

    def push(self, entry: PushEntry) -> tuple[list[Commit], DisagreementError | None]:
        """Take a whole push. Returns the commits it causes and, where it is refused, why (its clock closes all the same)."""
        member = self.members.get(entry.worker)
        if member is None or member.leaving:
            raise ProtocolError("Expected a push from a worker of this job, got one from a worker that has left it.")
        if entry.sequence <= member.sequence or member.pending is not None:
            raise ProtocolError(
                f"Expected push {member.sequence + 1} or later of worker {member.index}, got {entry.sequence}: it counts once."
            )
        refused = None
        if self.consistency.kind == "bsp":
            refused = self._disagreement(member, entry)
        if refused is not None:
            entry = entry._replace(weight=0.0)
        member.sequence = entry.sequence
        if self.consistency.kind == "bsp":
            member.pending = entry
            return self._close(), refused
        self.commit += 1
        member.clock += 1
        pushes = (entry,) if entry.weight > 0 else ()
        return [Commit(self.commit, pushes, ((entry.worker, entry.sequence),))], refused

    def resume(self) -> list[Commit]:
        """Fewer are expected: make the commit that is now complete, if one is."""
        return self._close()

    def completed_by(self, entry: PushEntry) -> tuple[PushEntry, ...]:
        """Return the pushes that the BSP commit would hold which `entry` completes; none where it would not, or be refused."""
        member = self.members.get(entry.worker)
        if self.consistency.kind != "bsp" or not self.started or member is None:
            return ()
        if member.pending is not None or entry.sequence <= member.sequence:
            return ()
        entries = [entry if m is member else m.pending for _, m in self._in_order()]
        found = tuple([e for e in entries if e is not None])
        if len(found) < len(entries) or self._disagreement(member, entry) is not None:
            return ()
        return tuple([e for e in found if e.weight > 0])

    def is_released(self, worker: int) -> bool:
        """Whether the worker may run its next step."""
        member = self.members.get(worker)
        if member is None:
            return True
        if member.pending is not None:
            return False
        if self.consistency.kind != "ssp":
            return True
        return member.clock - self.consistency.staleness <= min(m.clock for m in self.members.values())

    def waiting_for(self, worker: int) -> list[int]:
        """Identities of the live workers that hold this one up."""
        if self.is_released(worker):
            return []
        if self.consistency.kind == "bsp":
            return self.late()
        limit = self.members[worker].clock - self.consistency.staleness
        return [w for w, m in self.members.items() if m.clock < limit]

    def late(self) -> list[int]:
        """Identities of the live workers whose push the BSP commit to come waits for."""
        return [w for w, m in self.members.items() if m.pending is None]

    def _close(self) -> list[Commit]:
        """Make the BSP commit that is now complete, if one is."""
        if self.consistency.kind != "bsp" or not self.members or not self.started:
            return []
        entries = []
        order = self._in_order()
        for _, member in order:
            if member.pending is None:
                return []
            entries.append(member.pending)
        self.commit += 1
        for worker, member in order:
            member.pending = None
            member.clock = self.commit
            if member.leaving:
                del self.members[worker]
        pushes = tuple([e for e in entries if e.weight > 0])
        return [Commit(self.commit, pushes, tuple([(e.worker, e.sequence) for e in entries]))]

    def _in_order(self) -> list[tuple[int, Member]]:
        order = list(self.members.items())
        if len(order) > 1:
            order.sort(key=lambda item: (item[1].index, item[0]))
        return order

    def _disagreement(self, member: Member, entry: PushEntry) -> DisagreementError | None:
        if entry.weight <= 0:
            return None
        for other in self.members.values():
            held = other.pending
            if held is None or held.weight <= 0 or held.scalars == entry.scalars:
                continue
            group = next((i for i, (a, b) in enumerate(zip(held.scalars, entry.scalars, strict=False)) if a != b), 0)
            return DisagreementError(
                f"Expected the same learning rate and other scalars from every worker at clock {member.clock}: worker "
                f"{other.index} has {held.scalars[group]} for parameter group {group}, worker {member.index} has "
                f"{entry.scalars[group] if group < len(entry.scalars) else 'none'}. Give all workers the same schedule, or use asp()."
            )
        return None
