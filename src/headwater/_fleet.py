"""Many servers of one model that change its version together, or not at all.

    store       := … fleet/TAG/                 promotion.json replicas/ lock
    replicas    := fleet/TAG/replicas/NAME      {"url": …}; a replica's own, from its start until it has stopped
    promotion   := {"epoch", "previous", "version", "is_open"}; the tag's last one. The epoch grows with each

1. The coordinator writes an open promotion, then asks every replica to prepare: to fetch, verify and build the version aside.
2. If all have, the tag moves. *That is the decision*: from then on the promotion has happened. Else it is closed, and has not.
3. Every replica is told. The promotion is closed.

A replica that has prepared is *in doubt* until it hears what was decided. In doubt it may answer with the old version only within
LEASE_S of a moment at which nothing was decided: when it prepared, or began to read in the store an open promotion and then the tag
unmoved. So LEASE_S after the tag has moved nobody answers with the old version any more, whoever was dead, paused or cut off; `promote`
does not return before, unless all have been told. A replica that starts while a promotion is open is in doubt, too; one that missed a
decision answers 503 until it has the version. Whoever dies, the store says what was decided. Clocks need not agree, but must run at
one speed, and go on while a process is stopped. Coordinators of one machine take turns; on an fsspec URL there must be one at a time.

`Standing` is a replica's part of this: a value, no I/O, no clock.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from headwater._errors import HeadwaterError, PeerError, RequestError, SettingError, debug
from headwater._files import claim
from headwater._sealed import read_text, reading, replace_text
from headwater._serving import Resident, Residents
from headwater._versions import Versions

LEASE_S = 2.0
_LOOK_S = LEASE_S / 8  # between two looks of a replica at the store
PREPARE_S = 300.0  # to fetch, verify and build
_MARGIN_S = 0.05  # for the slowest of clocks
_ANSWER_BYTES = 1 << 16
_T = TypeVar("_T", bound=msgspec.Struct)


class Promotion(msgspec.Struct, frozen=True, kw_only=True):
    """A tag that moves, or was to move, from one version to another."""

    epoch: int
    previous: int | None
    version: int
    is_open: bool


class Replica(msgspec.Struct, frozen=True):
    """Where a replica listens."""

    url: str


class Prepare(msgspec.Struct, frozen=True):
    """Have a version ready. previous: the one that should answer now."""

    epoch: int
    previous: int | None
    version: int


class Decided(msgspec.Struct, frozen=True):
    """What came of an epoch."""

    epoch: int
    version: int
    is_committed: bool


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica knows. Times are its own monotonic clock's."""

    serving: int | None = None
    epoch: int = 0  # the newest heard of
    prepared: int | None = None  # the version that is ready for that epoch
    is_in_doubt: bool = False
    confirmed_s: float = 0.0  # when nothing was decided yet; counts in doubt
    wanted: int | None = None  # what the tag names
    is_fenced: bool = False  # what is wanted was decided on, and is not here

    def why_not(self, now_s: float) -> str:
        """Say why the tag's version must not answer now; "": it may."""
        if self.is_fenced:
            return (
                f"Version {self.wanted} was decided on, and this replica has {self.serving}: it catches up by itself."
            )
        if self.is_in_doubt and now_s >= self.confirmed_s + LEASE_S:
            return f"Promotion {self.epoch} may have been decided, and the store did not say within {LEASE_S:g} s."
        return ""

    def check(self, prepare: Prepare) -> None:
        """Refuse what cannot be prepared here and now. Raises RequestError."""
        if prepare.epoch < self.epoch:
            raise RequestError(
                f"Expected an epoch of at least {self.epoch}, got {prepare.epoch}: another promotion came since.", 409
            )
        if self.is_fenced or self.serving != prepare.previous:
            raise RequestError(
                f"Expected to be at version {prepare.previous}, this replica is at {self.serving}: try again.", 409
            )

    def prepare(self, prepare: Prepare, now_s: float) -> Standing:
        """The version is there. now_s: before this is answered. Raises RequestError."""
        self.check(prepare)
        return msgspec.structs.replace(
            self, epoch=prepare.epoch, prepared=prepare.version, is_in_doubt=True, confirmed_s=now_s
        )

    def decide(self, decided: Decided) -> Standing:
        """Hear what came of an epoch."""
        if decided.epoch < self.epoch:
            return self
        if decided.is_committed:
            return self._want(decided.version, decided.epoch, is_decided=True)
        if (
            decided.epoch > self.epoch
        ):  # it never prepared for that one; the store says what came of the one that it did
            return self
        return msgspec.structs.replace(self, prepared=None, is_in_doubt=False)

    def observe(self, promotion: Promotion | None, version: int, since_s: float) -> Standing:
        """Hear what the store says: first of the promotion, then of the tag; since_s: before it was asked."""
        epoch = 0 if promotion is None else promotion.epoch
        if epoch < self.epoch:  # it was asked before that epoch began
            return self
        if promotion is not None and promotion.is_open and version != promotion.version:
            return msgspec.structs.replace(
                self,
                epoch=epoch,
                prepared=self.prepared if epoch == self.epoch else None,
                is_in_doubt=True,
                confirmed_s=max(since_s, self.confirmed_s),
                wanted=version,
                is_fenced=version != self.serving,
            )
        is_settled = epoch == self.epoch and not self.is_in_doubt and not self.is_fenced
        is_new = promotion is not None and version == promotion.version and not is_settled
        return self._want(version, epoch, is_decided=is_new or self.is_in_doubt or self.is_fenced)

    def _want(self, version: int, epoch: int, *, is_decided: bool) -> Standing:
        """No promotion is under way. is_decided: else the tag was moved by hand, and what answers goes on until the other can."""
        return msgspec.structs.replace(
            self,
            epoch=epoch,
            prepared=None,
            is_in_doubt=False,
            wanted=version,
            is_fenced=is_decided and version != self.serving,
        )

    def serve(self, version: int) -> Standing:
        """A version answers from now on."""
        return msgspec.structs.replace(self, serving=version, is_fenced=self.is_fenced and version != self.wanted)


class Fleet:
    """What the store says of the replicas of one tag. It can be shared between threads; every failure is a HeadwaterError."""

    def __init__(self, versions: Versions, tag: str) -> None:
        self.tag = tag
        self._versions, self._files = versions, versions.files
        self._folder = f"{versions.path}/fleet/{tag}"

    def resolve(self, tag: str) -> int:
        """Return the version that a tag names."""
        return self._versions.resolve(tag)

    def move(self, version: int) -> None:
        """Let the tag name a version. Where this fails it may have moved."""
        self._versions.tag(self.tag, version)

    def promotion(self) -> Promotion | None:
        """Return the last one."""
        if "promotion.json" not in self._files.list(self._folder):
            return None
        return self._read(self._folder, "promotion.json", Promotion)

    def note(self, promotion: Promotion) -> None:
        """Write a promotion in the place of the last one."""
        self._write(self._folder, "promotion.json", promotion)

    def replicas(self) -> list[str]:
        """Return where they listen."""
        folder = f"{self._folder}/replicas"
        return sorted(self._read(folder, name, Replica).url for name in self._files.list(folder) if name[0] != ".")

    def register(self, url: str) -> None:
        """Be a replica: no promotion happens without its having prepared."""
        self._write(f"{self._folder}/replicas", quote(url, safe=""), Replica(url))

    def unregister(self, url: str) -> None:
        """Be a replica no more; missing is fine."""
        folder = f"{self._folder}/replicas"
        if (name := quote(url, safe="")) in self._files.list(folder):
            self._files.remove(f"{folder}/{name}")
            self._files.sync_folder(folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only coordinator of this machine. Raises SettingError naming the other one."""
        self._files.make_folder(self._folder)
        let_go = claim(self._files, f"{self._folder}/lock")
        try:
            yield
        finally:
            let_go()

    def _write(self, folder: str, name: str, value: msgspec.Struct) -> None:
        replace_text(self._files, folder, name, msgspec.json.encode(value))

    def _read(self, folder: str, name: str, kind: type[_T]) -> _T:
        with reading(folder, name):
            return msgspec.json.decode(read_text(self._files, folder, name), type=kind)


class Member:
    """A replica: what it promised, and a thread that looks at the store. Can be shared between threads.

    It decides when versions that are ready begin to answer for the fleet's tag; `wanted` says which one is to be made ready. Other
    tags are followed as without a fleet.
    """

    def __init__(self, fleet: Fleet, residents: Residents, url: str, now: Callable[[], float] = time.monotonic) -> None:
        self._fleet, self._residents, self._url, self._now = fleet, residents, url, now
        self._lock = threading.Lock()
        self._prepared: Resident | None = None
        self.standing = Standing()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._live, name="headwater-fleet", daemon=True)

    def start(self) -> None:
        """Register, and look at the store from now on, and once before this returns. Raises HeadwaterError."""
        self._fleet.register(self._url)
        self.look()
        self._thread.start()

    def close(self) -> None:
        """Be no replica any more. Call it when nothing is answered any more."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._fleet.unregister(self._url)

    def _live(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            try:
                self.look()
            except HeadwaterError as error:
                debug(f"The fleet's store does not answer: {error}")  # in doubt this fences, and the answers say so

    def look(self) -> None:
        """See what the store says."""
        since_s = self._now()
        promotion = self._fleet.promotion()
        version = self._fleet.resolve(self._fleet.tag)  # after it, as the tag moves before it is closed
        with self._lock:
            self._turn(self.standing.observe(promotion, version, since_s))

    def why_not(self) -> str:
        """Say why the tag's version must not answer now; "": it may."""
        return self.standing.why_not(self._now())

    def wanted(self, tag: str) -> int:
        """Return the version that should be made to answer. Raises HeadwaterError."""
        if tag != self._fleet.tag:
            return self._fleet.resolve(tag)
        wanted = self.standing.wanted
        if wanted is None:
            raise RequestError(f"Expected the store to say what {tag!r} is, got nothing yet.", 503)
        return wanted

    def flip(self, tag: str, resident: Resident) -> None:
        """Let a version answer, if it is still wanted."""
        if tag != self._fleet.tag:
            self._residents.flip(tag, resident)
            return
        with self._lock:
            if resident.version == self.standing.wanted:
                self._serve(self.standing, resident)
            else:
                self._residents.discard(resident)

    def _serve(self, standing: Standing, resident: Resident) -> None:
        """The lock is held. What answers turns before it is said that it may."""
        self._residents.flip(self._fleet.tag, resident)
        self.standing = standing.serve(resident.version)

    def _turn(self, standing: Standing) -> None:
        """Take on a new standing, and what follows from it. The lock is held."""
        prepared = self._prepared
        if prepared is not None and standing.prepared != prepared.version:
            self._prepared = None
            if standing.wanted == prepared.version:
                self._serve(standing, prepared)
                return
            self._residents.discard(prepared)
        self.standing = standing

    def prepare(self, body: bytes) -> dict[str, int]:
        """Answer a Prepare, in JSON. Raises HeadwaterError: then nothing has changed here."""
        asked = msgspec.json.decode(body, type=Prepare)
        self.standing.check(asked)
        resident = self._residents.prepare(asked.version)
        with self._lock:
            standing = self.standing.prepare(asked, self._now())
            self._turn(msgspec.structs.replace(standing, prepared=None))  # gives up what was prepared before
            self._prepared, self.standing = resident, standing
        return {"prepared": asked.version}

    def decide(self, body: bytes) -> dict[str, int | bool | None]:
        """Answer a Decided, in JSON."""
        decided = msgspec.json.decode(body, type=Decided)
        with self._lock:
            self._turn(self.standing.decide(decided))
            standing = self.standing
        return {"serving": standing.serving, "is_fenced": standing.is_fenced}


class Ask(Protocol):
    """Asks all replicas at once; returns by URL what went wrong, "" where nothing did."""

    def __call__(
        self, urls: Sequence[str], path: str, message: msgspec.Struct, timeout_s: float
    ) -> Mapping[str, str]: ...


class Promoted(NamedTuple):
    """What came of a promotion that happened."""

    version: int
    previous: int | None
    replicas: int
    absent: list[str]  # replicas that were not told; they answer nothing until they know


def promote(
    fleet: Fleet,
    version: int,
    ask: Ask,
    *,
    prepare_s: float = PREPARE_S,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Generator[str, None, Promoted]:
    """Move a fleet's tag, step by step: yields before each what it is about to do, and may be ended at any of them.

    Raises PeerError where a replica cannot: then the tag has not moved. Raises HeadwaterError where the store fails.
    """
    last = fleet.promotion()
    try:
        previous = fleet.resolve(fleet.tag)
    except HeadwaterError:
        previous = None  # the tag's first
    promotion = Promotion(epoch=1 if last is None else last.epoch + 1, previous=previous, version=version, is_open=True)
    yield "open"
    fleet.note(promotion)
    replicas = fleet.replicas()  # after it: whoever registers later finds it open
    yield "prepare"
    answers = ask(replicas, "/fleet/prepare", Prepare(promotion.epoch, previous, version), prepare_s)
    failures = {url: why for url, why in answers.items() if why}
    if failures:
        yield "abort"
        _give_up(fleet, promotion, [url for url in replicas if url not in failures], ask)
        listed = "; ".join(f"{url}: {why}" for url, why in failures.items())
        raise PeerError(
            f"Expected all {len(replicas)} replicas to prepare version {version}, got {len(failures)} that did not; nothing has changed. "
            f"{listed}. Mend them or `--forget` those that are gone, then promote again."
        )
    yield "decide"
    try:
        fleet.move(version)
    except HeadwaterError:
        if fleet.resolve(fleet.tag) != version:
            _give_up(fleet, promotion, replicas, ask)
            raise
    moved_s = now()
    yield "commit"
    decided = Decided(promotion.epoch, version, True)
    answers = dict(ask(replicas, "/fleet/decide", decided, LEASE_S))
    joined = sorted(set(fleet.replicas()) - set(replicas))  # meanwhile: they may have read the tag before
    answers |= ask(joined, "/fleet/decide", decided, LEASE_S)
    absent = sorted(url for url, why in answers.items() if why)
    yield "wait"
    if absent:
        sleep(max(moved_s + LEASE_S + _MARGIN_S - now(), 0.0))
    yield "close"
    fleet.note(msgspec.structs.replace(promotion, is_open=False))
    return Promoted(version, previous, len(answers), absent)


def _give_up(fleet: Fleet, promotion: Promotion, replicas: Sequence[str], ask: Ask) -> None:
    fleet.note(msgspec.structs.replace(promotion, is_open=False))
    ask(replicas, "/fleet/decide", Decided(promotion.epoch, promotion.version, False), LEASE_S)


def asker(token: str) -> Ask:
    """Return what asks over HTTP, showing a token."""

    def ask(urls: Sequence[str], path: str, message: msgspec.Struct, timeout_s: float) -> Mapping[str, str]:
        if not urls:
            return {}
        with ThreadPoolExecutor(len(urls)) as pool:
            one = partial(_ask, path=path, body=msgspec.json.encode(message), token=token, timeout_s=timeout_s)
            return dict(zip(urls, pool.map(one, urls), strict=True))

    return ask


def _ask(url: str, *, path: str, body: bytes, token: str, timeout_s: float) -> str:
    """Return what went wrong."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        text = answer.read(_ANSWER_BYTES).decode(errors="replace")
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except (OSError, http.client.HTTPException) as error:
        return f"cannot be reached: {error}"
    finally:
        connection.close()
    return "" if answer.status == 200 else text[:500] or f"status {answer.status}"


def check_url(url: str) -> str:
    """Return a replica's URL. Raises SettingError."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise SettingError(f"Expected a replica's http://HOST:PORT, got {url!r}.")
    return url.rstrip("/")
