"""Versions of a model in memory, and which of them answers.

Each version has an instance of the model of its own. A newer one is fetched, verified and built beside the one that answers; then
one assignment makes it the one that answers what comes from then on. What began on the old one ends on it, and then its instance is
used for the next. Whatever fails before the assignment leaves the old one answering, and is told.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from headwater import _limits
from headwater._errors import HeadwaterError, RequestError, warn
from headwater._metrics import Metrics
from headwater._models import ServedModel
from headwater._versions import Versions, Weights

_NICE = 10  # of the thread that makes versions ready: requests go first
_FIRST_S, _LAST_S = 0.5, 60.0  # until a version that failed is tried again, longer each time


class Resident:
    """A version in memory."""

    def __init__(self, version: int, model: ServedModel) -> None:
        self.version, self.model = version, model
        self.users = 0  # requests; guarded by Residents

    def __repr__(self) -> str:
        return f"Resident(version={self.version}, users={self.users})"


class Residents:
    """The versions in memory: one for each tag, and the pinned ones that were asked for last. Can be shared between threads.

    make: returns a new instance of the model. pins: how many pinned versions stay. For the duration of an update there is one
    instance more, which is kept for the next one.
    """

    def __init__(self, make: Callable[[], ServedModel], versions: Versions, *, pins: int, metrics: Metrics) -> None:
        self._make, self._versions, self._pins = make, versions, pins
        self._lock = threading.Lock()  # held for moments only
        self._preparing = threading.Lock()  # one at a time
        self._newest: Weights | None = None  # from which a delta may go on; guarded by _preparing
        self._by_tag: dict[str, Resident] = {}
        self._pinned: dict[int, Resident] = {}  # the one that was asked for last is the last
        self._leaving: list[Resident] = []  # that requests still use
        self._spare: ServedModel | None = make()  # now: whether it can be built at all
        self._swaps = metrics.counter("headwater_swaps_total", "Times that a tag got another version.", "tag")
        self._pauses = metrics.histogram(
            "headwater_swap_pause_seconds",
            "How long requests were held back by a swap.",
            [1e-6, 1e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2],
        )
        metrics.gauge(
            "headwater_current_version",
            "The version that answers.",
            lambda: {(tag,): float(each.version) for tag, each in list(self._by_tag.items())},
            "tag",
        )

    def current(self, tag: str) -> int | None:
        """Return the version that answers for a tag."""
        resident = self._by_tag.get(tag)
        return None if resident is None else resident.version

    def versions(self) -> list[int]:
        """Return all that are in memory, ascending."""
        with self._lock:
            return sorted({each.version for each in self._by_tag.values()} | self._pinned.keys())

    def acquire(self, tag: str) -> Resident:
        """Take the version that answers for a tag; `release` it. Raises RequestError while there is none."""
        with self._lock:
            resident = self._by_tag.get(tag)
            if resident is None:
                raise RequestError(
                    f"Expected a version for the tag {tag!r}, got none yet: publish one, or look at /metrics.", 503
                )
            resident.users += 1
            return resident

    def acquire_version(self, version: int) -> Resident | None:
        """Take a version that is in memory; `release` it."""
        with self._lock:
            resident = self._find(version)
            if resident is not None:
                resident.users += 1
                if version in self._pinned:
                    self._pinned[version] = self._pinned.pop(version)
            return resident

    def _find(self, version: int) -> Resident | None:
        return self._pinned.get(version) or next((e for e in self._by_tag.values() if e.version == version), None)

    def load_version(self, version: int) -> Resident:
        """Take a version, from the store where it is not in memory; `release` it.

        Raises RequestError where there is none, StorageError where it is not sound.
        """
        if (resident := self.acquire_version(version)) is not None:
            return resident
        if not self._versions.is_whole(version):
            raise RequestError(
                f"Expected a version that is kept, got {version}: it was never published, or has been removed.", 404
            )
        made = self.prepare(version)
        with self._lock:
            made.users += 1
            self._pinned[version] = made
            while len(self._pinned) > self._pins:
                self._leave(self._pinned.pop(next(iter(self._pinned))))
        return made

    def release(self, resident: Resident) -> None:
        """Let go of a version."""
        with self._lock:
            resident.users -= 1
            if not resident.users and resident in self._leaving:
                self._leaving.remove(resident)
                self._spare = resident.model

    def _leave(self, resident: Resident) -> None:
        """Take a version out of memory once nobody uses it. The lock is held."""
        if resident in self._by_tag.values() or resident in self._pinned.values():
            return
        if resident.users:
            self._leaving.append(resident)
        else:
            self._spare = resident.model

    def prepare(self, version: int) -> Resident:
        """Return a version that is ready to answer, fetched, verified and built while others answer. Raises HeadwaterError."""
        with self._preparing:
            with self._lock:
                resident = self._find(version)
            if resident is not None:
                return resident
            weights = self._versions.load(version, base=self._newest)
            if self._newest is None or version > self._newest.version.id:
                self._newest = weights
            with self._lock:
                model, self._spare = self._spare, None
            model = self._make() if model is None else model
            model.apply(weights)
            return Resident(version, model)

    def discard(self, resident: Resident) -> None:
        """Give up a version that was prepared and is not to answer."""
        with self._lock:
            self._leave(resident)

    def flip(self, tag: str, resident: Resident) -> None:
        """Let a version answer what comes for a tag from now on."""
        start = time.perf_counter()
        with self._lock:
            old = self._by_tag.get(tag)
            self._by_tag[tag] = resident
            if old is not None and old is not resident:
                self._leave(old)
        self._pauses.add(time.perf_counter() - start)
        self._swaps.add(tag)


class Failure:
    """What went wrong with a tag last: when it is tried again, later each time."""

    def __init__(self, version: int | None, reason: str, delay_s: float) -> None:
        self.version, self.reason, self.delay_s = version, reason, delay_s
        self.again_s = time.monotonic() + delay_s


class Follower:
    """Keeps tags' versions answering: a thread that looks at the store. `step` is one look, for tests and for the first one.

    resolve: says which version a tag names. flip: lets one answer.
    """

    def __init__(
        self,
        residents: Residents,
        tags: Sequence[str],
        metrics: Metrics,
        *,
        resolve: Callable[[str], int],
        flip: Callable[[str, Resident], None] | None = None,
        look_s: float = _limits.LOOK_TAG_S,
    ) -> None:
        self._look_s = look_s
        self._residents, self._tags = residents, list(tags)
        self._resolve, self._flip = resolve, flip or residents.flip
        self.failures: dict[str, Failure] = {}
        self._updated_s: dict[str, float] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._live, name="headwater-follower", daemon=True)
        self._failed = metrics.counter("headwater_update_failures_total", "Updates that came to nothing.", "tag")
        metrics.gauge(
            "headwater_update_age_seconds", "Since a tag's version began to answer.",
            lambda: {(tag,): time.monotonic() - at for tag, at in list(self._updated_s.items())}, "tag",
        )  # fmt: skip
        metrics.gauge(
            "headwater_update_failing", "1 while the last update of a tag came to nothing.",
            lambda: {(tag,): float(tag in self.failures) for tag in self._tags}, "tag",
        )  # fmt: skip

    def start(self) -> None:
        """Look from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _live(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # of this thread, on Linux
        while not self._stopped.wait(self._look_s):
            self.step()

    def step(self) -> None:
        """Bring every tag to the version that it names now."""
        for tag in self._tags:
            try:
                version = self._resolve(tag)
            except HeadwaterError as error:
                self._note(tag, None, str(error))
            else:
                self.follow(tag, version)

    def follow(self, tag: str, version: int) -> None:
        """Bring a tag to a version, unless it is there, or that version failed and is not to be tried again yet."""
        failure = self.failures.get(tag)
        if version == self._residents.current(tag):
            self.failures.pop(tag, None)
        elif failure is None or failure.version != version or time.monotonic() >= failure.again_s:
            self.bring(tag, version)

    def bring(self, tag: str, version: int) -> bool:
        """Let a version answer for a tag; False: it could not be, and the old one goes on."""
        try:
            resident = self._residents.prepare(version)
        except Exception as error:  # noqa: BLE001 - a model's own code is run: nothing may end the following
            self._note(tag, version, str(error) if isinstance(error, HeadwaterError) else repr(error))
            return False
        self._flip(tag, resident)
        self._updated_s[tag] = time.monotonic()
        self.failures.pop(tag, None)
        return True

    def _note(self, tag: str, version: int | None, reason: str) -> None:
        before = self.failures.get(tag)
        is_new = before is None or (before.version, before.reason) != (version, reason)
        if is_new or version is not None:
            self._failed.add(tag)
        delay_s = _FIRST_S if is_new or before is None else min(2 * before.delay_s, _LAST_S)
        self.failures[tag] = Failure(version, reason, delay_s)
        if is_new:
            current = self._residents.current(tag)
            with suppress(ValueError):  # logging to a stream that is closed
                warn(
                    f"The update of {tag!r} came to nothing, {'none' if current is None else current} goes on: {reason}"
                )
