"""Leases: after any deaths, lost answers and returns to an earlier state, each unit of each epoch is used exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headwater import _limits
from headwater._errors import HeadwaterError, ProtocolError, SettingError
from headwater._leases import DataSpec, Leases, Piece

Unit = tuple[int, int]  # epoch, unit


def units(piece: Piece) -> list[Unit]:
    return [(piece.epoch, unit) for unit in range(piece.start, piece.stop)]


def encoded(leases: Leases) -> bytes:
    return msgspec.msgpack.encode(leases)


def decoded(data: bytes) -> Leases:
    return msgspec.msgpack.decode(data, type=Leases)


class Peer:
    """What the test knows of a worker by what it was told."""

    def __init__(self) -> None:
        self.got: list[Unit] = []
        self.used = 0

    @property
    def rest(self) -> list[Unit]:
        return self.got[self.used :]


class Data(RuleBasedStateMachine):
    """Workers that take, use, and die; the leases are judged by what they hand out."""

    @initialize(
        count=st.integers(1, 12),
        epochs=st.integers(1, 3),
        piece=st.integers(1, 5),
        batch_size=st.sampled_from([0, 1, 4]),
    )
    def start(self, count: int, epochs: int, piece: int, batch_size: int) -> None:
        self.spec = DataSpec("data", count * max(batch_size, 1), epochs, piece, batch_size)
        self.leases = Leases(self.spec)
        self.all = Counter((epoch, unit) for epoch in range(epochs) for unit in range(count))
        self.peers: dict[int, Peer] = {}
        self.used: Counter[Unit] = Counter()  # in the history that stands
        self.kept: list[tuple[bytes, Counter[Unit]]] = []

    @property
    def held(self) -> Counter[Unit]:
        return Counter(unit for peer in self.peers.values() for unit in peer.rest)

    @rule(worker=st.integers(1, 4), loses=st.booleans())
    def take(self, worker: int, loses: bool) -> None:
        self.take_piece(worker, loses=loses)

    def take_piece(self, worker: int, *, loses: bool = False) -> bool:
        peer = self.peers.setdefault(worker, Peer())
        is_free = self.all - self.used - self.held
        piece = self.leases.take(worker, len(peer.got))
        if loses:
            assert self.leases.take(worker, len(peer.got)) == piece
        assert (piece is not None) == bool(is_free)
        if piece is None:
            return False
        assert 0 < piece.stop - piece.start <= self.spec.piece
        assert Counter(units(piece)) <= is_free
        peer.got += units(piece)
        return True

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        """A commit counts the pushes of some workers."""
        for peer_id in data.draw(st.sets(st.sampled_from([w for w, p in self.peers.items() if p.rest]), min_size=1)):
            self.use_units(peer_id, data.draw(st.integers(0, len(self.peers[peer_id].rest))))

    def use_units(self, worker: int, count: int) -> None:
        peer = self.peers[worker]
        self.leases.use(worker, peer.used + count)
        self.used.update(peer.rest[:count])
        peer.used += count

    @precondition(lambda self: self.peers)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(list(self.peers)))
        del self.peers[worker]
        self.leases.give_back(worker)
        self.leases.give_back(worker)

    @rule()
    def keep(self) -> None:
        self.kept.append((encoded(self.leases), self.used.copy()))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def go_back(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.kept) - 1))
        state, used = self.kept[at]
        del self.kept[at + 1 :]  # they are of a history that does not stand any more
        self.leases, self.used, self.peers = decoded(state), used.copy(), {}
        self.leases.go_back()

    @rule(worker=st.integers(1, 5), by=st.integers(1, 3))
    def lie(self, worker: int, by: int) -> None:
        """What a worker cannot have is refused and changes nothing."""
        peer = self.peers.get(worker, Peer())
        self.refused(lambda: self.leases.use(worker, len(peer.got) + by))
        self.refused(lambda: self.leases.use(worker, peer.used - by))
        self.refused(lambda: self.leases.take(worker, len(peer.got) + by))
        self.refused(lambda: self.leases.take(worker, peer.used - by))

    def refused(self, call: Callable[[], object]) -> None:
        before = encoded(self.leases)
        with pytest.raises(ProtocolError):
            call()
        assert encoded(self.leases) == before

    @invariant()
    def every_unit_is_one_of_used_held_free_and_fresh(self) -> None:
        count = self.spec.units

        def named(ranges: list[tuple[int, int]]) -> list[Unit]:
            return [divmod(number, count) for start, stop in ranges for number in range(start, stop)]

        held = Counter(unit for h in self.leases.held.values() for unit in named(h.pieces))
        free = Counter(named([*self.leases.free, (self.leases.fresh, count * self.spec.epochs)]))
        assert held == self.held
        assert self.used + held + free == self.all

    @invariant()
    def the_state_comes_back_from_its_bytes_and_is_small(self) -> None:
        assert decoded(encoded(self.leases)) == self.leases
        assert msgspec.json.decode(msgspec.json.encode(self.leases), type=Leases) == self.leases
        gaps = zip(self.leases.free, self.leases.free[1:], strict=False)
        assert all(first[1] < second[0] for first, second in gaps)

    @invariant()
    def it_is_used_up_when_everything_is_used(self) -> None:
        assert self.leases.is_used_up == (self.used == self.all)
        assert set(self.leases.holders()) == {worker for worker, peer in self.peers.items() if peer.rest}

    def teardown(self) -> None:
        """Let those who live end their work, and a newcomer what is left."""
        if not hasattr(self, "leases"):
            return
        for worker in [*self.peers, 9]:
            while self.take_piece(worker):
                pass
            self.use_units(worker, len(self.peers[worker].rest))
        assert self.leases.is_used_up
        assert self.used == self.all


TestData = Data.TestCase
TestData.settings = settings(max_examples=200, stateful_step_count=40)


def test_what_was_given_back_is_leased_before_anything_else() -> None:
    leases = Leases(DataSpec("data", 10, 1, 4))
    assert leases.take(1, 0) == Piece(0, 0, 4)
    assert leases.take(2, 0) == Piece(0, 4, 8)
    leases.use(1, 3)
    leases.give_back(1)
    assert leases.take(2, 4) == Piece(0, 3, 4)
    assert leases.take(2, 5) == Piece(0, 8, 10)


def test_the_next_epoch_begins_while_the_last_pieces_of_one_are_held() -> None:
    leases = Leases(DataSpec("data", 5, 2, 4))
    assert [leases.take(worker, 0) for worker in (1, 2, 3)] == [Piece(0, 0, 4), Piece(0, 4, 5), Piece(1, 0, 4)]
    leases.give_back(1)
    leases.give_back(3)
    assert leases.take(2, 1) == Piece(0, 0, 4)
    assert leases.take(2, 5) == Piece(1, 0, 4)


def test_the_state_does_not_grow_with_the_data() -> None:
    leases = Leases(DataSpec("data", 10**12, 10, 10**6, 10))
    for turn in range(1000):
        assert leases.take(1, turn * 10**6) is not None
        leases.use(1, (turn + 1) * 10**6)
    assert len(encoded(leases)) < 100


def test_pieces_ahead_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "LEASES", 2)
    leases = Leases(DataSpec("data", 10, 1, 1))
    leases.take(1, 0)
    leases.take(1, 1)
    with pytest.raises(SettingError, match="Expected at most 2 pieces ahead of the pushes that use them"):
        leases.take(1, 2)
    leases.use(1, 1)
    assert leases.take(1, 2) == Piece(0, 2, 3)


@pytest.mark.parametrize(
    ("options", "units"), [({}, 10), ({"batch_size": 3}, 4), ({"batch_size": 3, "drop_last": True}, 3)]
)
def test_units_are_items_or_batches(options: dict[str, int], units: int) -> None:
    assert DataSpec("data", 10, 1, 1, **options).units == units  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataSpec("data", 0, 1, 1),
        lambda: DataSpec("data", 1, 0, 1),
        lambda: DataSpec("data", 1, 1, 0),
        lambda: DataSpec("data", 1, 1, 1, -1),
        lambda: DataSpec("data", 1, 1, 1, seed=-1),
        lambda: DataSpec("data", 3, 1, 1, 4, drop_last=True),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], DataSpec]) -> None:
    with pytest.raises(SettingError) as caught:
        make()
    assert isinstance(caught.value, HeadwaterError)
    assert "data 'data'" in str(caught.value)
