"""Replicas change their version together or not at all, whatever dies, stops or comes late."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import msgspec
import pytest

from headwater._errors import HeadwaterError, PeerError, RequestError, StorageError
from headwater._fleet import LEASE_S, Decided, Fleet, Member, Prepare, Promotion, Standing, promote
from headwater._serving import Residents

URLS = ["http://a:1", "http://b:1", "http://c:1"]


class Store:
    """The store, in memory."""

    tag = "prod"

    def __init__(self) -> None:
        self.version, self.before, self.moved_s = 1, 1, -LEASE_S
        self.last: Promotion | None = None
        self.urls: set[str] = set()
        self.now = 0.0

    def resolve(self, tag: str) -> int:
        return self.version

    def move(self, version: int) -> None:
        self.before, self.version, self.moved_s = self.version, version, self.now

    def promotion(self) -> Promotion | None:
        return self.last

    def note(self, promotion: Promotion) -> None:
        self.last = promotion

    def replicas(self) -> list[str]:
        return sorted(self.urls)

    def register(self, url: str) -> None:
        self.urls.add(url)


class Cut(Store):
    """A replica's way to the store, which may be cut."""

    def __init__(self, store: Store, replica: Replica) -> None:
        self._store, self._replica = store, replica

    def _reach(self) -> Store:
        if self._replica.is_cut:
            raise StorageError("cut off")
        return self._store

    def resolve(self, tag: str) -> int:
        return self._reach().version

    def promotion(self) -> Promotion | None:
        return self._reach().last


class Loaded:
    """A version in memory."""

    def __init__(self, version: int) -> None:
        self.version = version


class Memory:
    """A replica's versions, of which one answers."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.answering: int | None = None

    def prepare(self, version: int) -> Loaded:
        if self._replica.is_fed_corrupt_bytes:
            raise StorageError("rotten")
        return Loaded(version)

    def flip(self, tag: str, resident: Loaded) -> None:
        self.answering = resident.version

    def discard(self, resident: Loaded) -> None:
        pass


class Replica:
    """A process: it can be killed and started again, stopped and continued."""

    def __init__(self, store: Store, url: str) -> None:
        self.store, self.url = store, url
        self.is_fed_corrupt_bytes = self.is_cut = self.is_deaf = False  # cut off from the store; from coordinators
        self.late: list[tuple[str, bytes]] = []  # that came while it was stopped
        self.is_stopped = False
        self.member: Member | None = None

    def start(self) -> None:
        self.memory = Memory(self)
        fleet, residents = cast(Fleet, Cut(self.store, self)), cast(Residents, self.memory)
        member = Member(fleet, residents, self.url, now=lambda: self.store.now)
        self.store.register(self.url)
        with suppress(HeadwaterError):  # it ends where the store cannot be reached
            member.look()
            self.member = member
            self.load()

    def load(self) -> None:
        """As the follower does."""
        member = self.member
        if member is not None and not self.is_stopped and member.standing.wanted != member.standing.serving:
            with suppress(HeadwaterError):
                member.flip("prod", cast(Any, self.memory.prepare(member.wanted("prod"))))

    def look(self) -> None:
        if self.member is not None and not self.is_stopped:
            with suppress(HeadwaterError):
                self.member.look()

    def kill(self) -> None:
        self.member, self.is_stopped = None, False
        self.late.clear()

    def go_on(self) -> None:
        self.is_stopped = False
        for path, body in self.late:
            with suppress(HeadwaterError):
                self.hear(path, body)
        self.late.clear()

    def hear(self, path: str, body: bytes) -> None:
        assert self.member is not None
        (self.member.prepare if path == "/fleet/prepare" else self.member.decide)(body)

    def answer(self) -> int | None:
        """Return the version that would answer now; None: 503, or nobody is there."""
        if self.member is None or self.is_stopped or self.member.why_not():
            return None
        return self.memory.answering


class World:
    """A store and three replicas, to which things happen, as drawn; after each it is checked who answers what."""

    def __init__(self, draw: Callable[[int], int], calm: int) -> None:
        self.draw, self.calm = draw, calm
        self.store = Store()
        self.replicas = {url: Replica(self.store, url) for url in URLS}
        for url in URLS[: 2 + draw(2)]:  # the third may come later
            self.replicas[url].start()
        self.must: int | None = 1  # what the last promotion that came to its end promised

    def ask(self, urls: Sequence[str], path: str, message: msgspec.Struct, timeout_s: float) -> Mapping[str, str]:
        answers, body = {}, msgspec.json.encode(message)
        for url in urls:
            self.happen()
            replica = self.replicas[url]
            answers[url] = ""
            if replica.member is None or replica.is_deaf:
                answers[url] = "cannot be reached"
            elif replica.is_stopped:
                replica.late.append((path, body))
                answers[url] = "no answer"
            else:
                try:
                    replica.hear(path, body)
                except HeadwaterError as error:
                    answers[url] = str(error)
            self.check()
        return answers

    def happen(self) -> None:
        """Let something happen, or nothing."""
        replica = self.replicas[URLS[self.draw(len(URLS))]]
        match self.draw(self.calm):
            case 0:
                replica.kill()
            case 1:
                replica.is_stopped = replica.member is not None
            case 2:
                replica.is_fed_corrupt_bytes = not replica.is_fed_corrupt_bytes
            case 3:
                replica.is_cut = not replica.is_cut
            case 4:
                if replica.member is None:
                    replica.start()
            case 5:
                replica.go_on()
            case 6 | 7:
                replica.look()
            case 9:
                replica.load()
            case 10:
                replica.is_deaf = not replica.is_deaf
            case 8:
                self.wait(LEASE_S / 3)
        self.check()

    def wait(self, seconds: float) -> None:
        """Let time pass; whoever can look at the store meanwhile may not have done so."""
        self.store.now += seconds
        self.check()

    def check(self) -> None:
        """Nobody answers with a version that was not decided on, or with the old one when all must have the new one."""
        store = self.store
        for replica in self.replicas.values():
            answer = replica.answer()
            if answer is None or answer == store.version:
                continue
            assert self.must is None, "the promotion had come to its end"
            assert answer == store.before
            assert store.now < store.moved_s + LEASE_S

    def promote(self, version: int, steps: int) -> None:
        """Promote; the coordinator dies after so many steps."""
        before, promised, self.must = self.store.version, self.must, None
        running = promote(cast(Fleet, self.store), version, self.ask, now=lambda: self.store.now, sleep=self.wait)
        try:
            for _ in range(steps):
                next(running)
                self.happen()
        except StopIteration:
            assert self.store.version == version
            self.must = version
        except PeerError:
            assert self.store.version == before
            self.must = promised
        self.check()

    def heal(self) -> None:
        """Mend everything; then everybody answers with what was decided."""
        for replica in self.replicas.values():
            replica.is_cut = replica.is_fed_corrupt_bytes = replica.is_deaf = False
            replica.go_on()
            if replica.member is None:
                replica.start()
            replica.look()
            replica.load()
        assert [replica.answer() for replica in self.replicas.values()] == [self.store.version] * len(URLS)


@pytest.mark.parametrize("calm", [16, 40])
def test_all_commit_or_all_stay(calm: int) -> None:
    """Replicas are killed, stopped, cut off and fed corrupt bytes, and coordinators die, at any step. calm: how seldom."""
    for seed in range(2000):
        chance = random.Random(seed)
        world = World(chance.randrange, calm)
        try:
            for version in (2, 3, 4):
                world.promote(version, steps=chance.choice([1, 2, 3, 4, 5, 6, 9, 9, 9, 9]))
                world.happen()
                if chance.random() < 0.3:
                    world.heal()
            world.heal()
            world.promote(5, steps=9)
            world.heal()
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise


def quiet() -> World:
    """Return a world in which nothing happens by itself."""
    return World(lambda limit: limit - 1, calm=16)


def test_a_promotion_reaches_everybody() -> None:
    world = quiet()
    world.promote(2, steps=9)
    assert [replica.answer() for replica in world.replicas.values()] == [2, 2, 2]
    assert world.store.last == Promotion(epoch=1, previous=1, version=2, is_open=False)


@pytest.mark.parametrize(("steps", "version"), [(3, 1), (4, 2)])
def test_replicas_end_what_a_dead_coordinator_began(steps: int, version: int) -> None:
    """It died before the decision, or right after it."""
    world = quiet()
    world.promote(2, steps=steps)
    assert world.store.version == version
    world.wait(LEASE_S)
    assert [replica.answer() for replica in world.replicas.values()] == [None] * 3  # in doubt, and nobody has looked
    world.heal()
    world.promote(3, steps=9)
    assert [replica.answer() for replica in world.replicas.values()] == [3, 3, 3]


def test_a_replica_that_missed_the_decision_is_fenced_until_it_has_the_version() -> None:
    standing = Standing(serving=1, wanted=1).decide(Decided(4, 2, True))
    assert "Version 2 was decided on, and this replica has 1" in standing.why_not(0.0)
    with pytest.raises(RequestError, match="Expected to be at version 2, this replica is at 1"):
        standing.check(Prepare(5, 2, 3))
    assert not standing.serve(2).why_not(0.0)


def test_an_older_epoch_changes_nothing() -> None:
    standing = Standing(serving=1, wanted=1).prepare(Prepare(7, 1, 2), 0.0)
    assert standing.decide(Decided(6, 3, True)) == standing
    assert standing.observe(Promotion(epoch=6, previous=1, version=3, is_open=False), 1, 0.0) == standing
    with pytest.raises(RequestError, match="Expected an epoch of at least 7, got 6"):
        standing.check(Prepare(6, 1, 3))


def test_a_tag_that_is_moved_by_hand_is_followed_while_the_old_version_answers() -> None:
    standing = Standing(serving=1, wanted=1).observe(None, 2, 0.0)
    assert standing.wanted == 2
    assert not standing.why_not(1e9)


def test_an_open_promotion_confirms_nothing_to_who_is_behind_it() -> None:
    """It missed the promotion before that one, whose coordinator died."""
    standing = Standing(serving=1, wanted=1).prepare(Prepare(1, 1, 2), 0.0)
    standing = standing.observe(Promotion(epoch=2, previous=2, version=3, is_open=True), 2, 1.0)
    assert "Version 2 was decided on, and this replica has 1" in standing.why_not(1.0)
