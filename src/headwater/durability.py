"""What a job survives: one setting, `snapshot`, `log` or `replicated`.

snapshot(every_s)    the state is written every so often; the death of a server takes the job back to the last time
log()                besides, what every commit does is on disk before it is acknowledged: nothing acknowledged is lost
replicated(n)        besides, n followers have every commit before it is acknowledged, and apply it; one of them takes over
"""

from __future__ import annotations

import math

import msgspec

from headwater._errors import SettingError

EVERY_S = 60.0


class Durability(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How a job survives; one setting of the job. Make it with `snapshot`, `log` or `replicated`.

    every_s: seconds between snapshots; 0: none but those that the job's beginning and `headwater snapshot` ask for.
    """

    kind: str
    every_s: float = EVERY_S
    copies: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("snapshot", "log", "replicated"):
            raise SettingError(f"Expected durability snapshot, log or replicated, got {self.kind!r}.")
        if not (math.isfinite(self.every_s) and self.every_s >= 0):
            raise SettingError(f"Expected snapshots every 0 seconds or more, got {self.every_s}.")
        if self.copies != (self.kind == "replicated"):
            raise SettingError(f"Expected one follower for replicated, none else, got {self.copies} for {self.kind}.")

    def __str__(self) -> str:
        return self.kind if self.every_s == EVERY_S else f"{self.kind}:{self.every_s:g}"

    @classmethod
    def parse(cls, text: str) -> Durability:
        """Read "snapshot", "log" or "replicated", with the seconds between snapshots behind a colon: "log:300"."""
        kind, colon, every = text.partition(":")
        try:
            every_s = float(every) if colon else EVERY_S
        except ValueError:
            raise SettingError(f"Expected seconds such as {kind}:30, got {text!r}.") from None
        return cls(kind, every_s, int(kind == "replicated"))


def snapshot(every_s: float = EVERY_S) -> Durability:
    """Write the state every so many seconds. When a server dies the job goes back to the last snapshot and goes on from there."""
    return Durability("snapshot", every_s)


def log(every_s: float = EVERY_S) -> Durability:
    """Write what every commit does to disk before it is acknowledged, and a snapshot now and then. Nothing acknowledged is lost."""
    return Durability("log", every_s)


def replicated(n: int = 1, every_s: float = EVERY_S) -> Durability:
    """Let a follower of every server have each commit before it is acknowledged; it takes over when the server dies."""
    return Durability("replicated", every_s, n)
