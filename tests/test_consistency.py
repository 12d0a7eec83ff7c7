"""The consistency policy: in any order of events clocks close, nothing counts twice, and nobody waits for nobody."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headwater import asp, bsp, ssp
from headwater._consistency import Commit, Consistency, Policy, PushEntry
from headwater._errors import DisagreementError, HeadwaterError, ProtocolError, SettingError

ONE, OTHER = ((0.1,),), ((0.2,),)  # two schedules


class Peer:
    """What the test knows of a worker by what it was told."""

    def __init__(self, index: int, clock: int) -> None:
        self.index, self.clock = index, clock
        self.sequence = -1
        self.pending: PushEntry | None = None  # sealed, its clock not closed
        self.is_refused = False
        self.is_live = True
        self.is_paused = False


class Jobs(RuleBasedStateMachine):
    """Workers that come, push when they may, and go; the policy is judged by its answers alone."""

    peers: dict[int, Peer]

    @initialize(
        consistency=st.sampled_from([bsp(), bsp(), ssp(0), ssp(1), ssp(3), asp()]), expected=st.sampled_from([1, 2, 4])
    )
    def start(self, consistency: Consistency, expected: int) -> None:
        self.policy = Policy(consistency, expected)
        self.is_bsp = consistency.kind == "bsp"
        self.peers = {}  # by identity, who has left included
        self.commits: list[Commit] = []
        self.came: set[int] = set()

    @property
    def live(self) -> dict[int, Peer]:
        return {identity: peer for identity, peer in self.peers.items() if peer.is_live}

    @property
    def free(self) -> list[int]:
        """Live workers that may run their next step."""
        return [identity for identity in self.live if self.policy.is_released(identity)]

    @precondition(lambda self: sum(peer.is_live or peer.is_paused for peer in self.peers.values()) < 5)
    @rule(pick=st.integers(0, 3))
    def join(self, pick: int) -> None:
        taken = {peer.index for peer in self.peers.values() if peer.is_live or peer.is_paused}
        index = [i for i in range(9) if i not in taken][pick]
        identity = 1000 - len(self.peers)  # later ones are smaller: the order of identities decides nothing
        clocks = [peer.clock for peer in self.live.values()]
        clock = self.policy.join(identity, index)
        assert clock == (self.policy.commit if self.is_bsp or not clocks else min(clocks))
        self.peers[identity] = Peer(index, clock)
        self.came.add(index)

    @precondition(lambda self: self.free)
    @rule(
        data=st.data(),
        weight=st.sampled_from([1.0, 1.0, 2.5, 0.0]),
        scalars=st.sampled_from([ONE, ONE, ONE, OTHER]),
        skip=st.sampled_from([1, 1, 3]),
    )
    def push(self, data: st.DataObject, weight: float, scalars: tuple[tuple[float, ...], ...], skip: int) -> None:
        identity = data.draw(st.sampled_from(self.free))
        self.take(identity, PushEntry(identity, self.peers[identity].sequence + skip, weight, scalars))

    def take(self, identity: int, entry: PushEntry) -> None:
        peer = self.peers[identity]
        held = [p.pending for p in self.peers.values() if p.pending is not None and not p.is_refused]
        differs = any(h.weight > 0 and h.scalars != entry.scalars for h in held)
        before = state_of(self.policy)
        foretold = self.policy.completed_by(entry)
        assert state_of(self.policy) == before
        commits, refused = self.policy.push(entry)
        if self.is_bsp:
            assert foretold == (commits[0].pushes if commits and refused is None else ())
        assert (refused is not None) == (self.is_bsp and entry.weight > 0 and differs)
        peer.sequence, peer.pending, peer.is_refused = entry.sequence, entry, refused is not None
        self.record(commits)
        if not self.is_bsp:
            assert len(commits) == 1
            assert peer.pending is None

    @precondition(lambda self: self.peers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Death, or the end of the data; a push that was sealed still counts. A second time does nothing."""
        identity = data.draw(st.sampled_from(list(self.peers)))
        was_live = self.peers[identity].is_live
        self.peers[identity].is_live = self.peers[identity].is_paused = False
        commits = self.policy.leave(identity)
        assert was_live or not commits
        self.record(commits)

    @precondition(lambda self: any(peer.pending is None for peer in self.live.values()))
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        identity = data.draw(st.sampled_from([i for i, peer in self.live.items() if peer.pending is None]))
        self.peers[identity].is_live, self.peers[identity].is_paused = False, True
        self.record(self.policy.pause(identity))

    @precondition(lambda self: any(peer.is_paused for peer in self.peers.values()))
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        identity = data.draw(st.sampled_from([i for i, peer in self.peers.items() if peer.is_paused]))
        peer, clocks = self.peers[identity], [p.clock for p in self.live.values()]
        clock = self.policy.join(identity, peer.index)
        assert clock == (self.policy.commit if self.is_bsp else max([peer.clock, *([min(clocks)] if clocks else [])]))
        peer.is_live, peer.is_paused, peer.clock = True, False, clock

    @precondition(lambda self: any(peer.pending is not None or not peer.is_live for peer in self.peers.values()))
    @rule(data=st.data())
    def pause_again(self, data: st.DataObject) -> None:
        names = [i for i, peer in self.peers.items() if peer.pending is not None or not peer.is_live]
        identity = data.draw(st.sampled_from(names))
        self.refused(lambda: self.policy.pause(identity))

    @precondition(lambda self: self.peers)
    @rule(data=st.data(), back=st.integers(0, 2))
    def push_again(self, data: st.DataObject, back: int) -> None:
        identity = data.draw(st.sampled_from(list(self.peers)))
        self.refused(lambda: self.policy.push(PushEntry(identity, self.peers[identity].sequence - back, 1.0, ONE)))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def join_again(self, data: st.DataObject) -> None:
        identity = data.draw(st.sampled_from(list(self.live)))
        self.refused(lambda: self.policy.join(identity, 8))

    def refused(self, call: object) -> None:
        """An illegal call raises and leaves everything as it was."""
        before = state_of(self.policy)
        assert callable(call)
        with pytest.raises(ProtocolError):
            call()
        assert state_of(self.policy) == before

    def record(self, commits: list[Commit]) -> None:
        """Check each commit against what was pushed."""
        for commit in commits:
            assert commit.number == len(self.commits) + 1
            due = [(i, p) for i, p in self.peers.items() if p.pending is not None]
            due.sort(key=lambda item: (item[1].index, item[0]))
            if self.is_bsp:
                assert len(self.came) >= self.policy.expected
                assert all(peer.pending is not None for peer in self.live.values())
            else:
                assert len(due) == 1
            assert commit.closes == tuple((i, p.sequence) for i, p in due)
            counted = [p.pending for _, p in due if not p.is_refused]
            assert commit.pushes == tuple(entry for entry in counted if entry is not None and entry.weight > 0)
            for _, peer in due:
                peer.pending = None
                peer.clock = commit.number if self.is_bsp else peer.clock + 1
            self.commits.append(commit)

    @invariant()
    def each_push_counts_at_most_once(self) -> None:
        closed = [name for commit in self.commits for name in commit.closes]
        assert len(closed) == len(set(closed))

    @invariant()
    def a_complete_clock_is_closed(self) -> None:
        """Under BSP nothing hangs once everybody who lives has pushed; otherwise nothing is ever held back."""
        due = [peer for peer in self.peers.values() if peer.pending is not None]
        complete = all(peer.pending is not None for peer in self.live.values())
        assert not due or (self.is_bsp and not (complete and self.policy.started))

    @invariant()
    def clocks_keep_together(self) -> None:
        clocks = [peer.clock for peer in self.live.values()]
        slack = {"bsp": 0, "ssp": self.policy.consistency.staleness, "asp": 1 << 30}[self.policy.consistency.kind]
        for identity, peer in self.live.items():
            is_near = peer.clock <= min(clocks) + slack
            assert self.policy.is_released(identity) == (peer.pending is None and is_near)
            assert peer.clock <= min(clocks) + slack + 1

    @invariant()
    def whoever_waits_waits_for_somebody_who_can_act(self) -> None:
        for identity in self.live:
            names = self.policy.waiting_for(identity)
            if identity in self.free:
                assert names == []
            else:
                assert set(names) <= set(self.live) - {identity}
                assert set(names) & set(self.free) or self.policy.missing()

    @invariant()
    def missing_are_those_that_never_came(self) -> None:
        missing = self.policy.missing()
        assert bool(missing) == (len(self.came) < self.policy.expected)
        assert not set(missing) & self.came
        assert len(missing) + len(self.came) == self.policy.expected or self.policy.started

    def teardown(self) -> None:
        """Let everybody go on once more: every push that was sealed is closed."""
        if not hasattr(self, "policy"):
            return
        due = [(identity, peer.sequence) for identity, peer in self.peers.items() if peer.pending is not None]
        for index in self.policy.missing():
            identity = 2000 + index
            self.peers[identity] = Peer(index, self.policy.join(identity, index))
            self.came.add(index)
        for identity in self.live:
            if self.policy.is_released(identity):
                self.take(identity, PushEntry(identity, self.peers[identity].sequence + 1, 0.0))
        closed = {name for commit in self.commits for name in commit.closes}
        assert closed.issuperset(due) or not self.live


TestJobs = Jobs.TestCase
TestJobs.settings = settings(max_examples=200, stateful_step_count=40)


class State(NamedTuple):
    commit: int
    members: dict[int, tuple[int, int, int, PushEntry | None, bool]]
    missing: list[int]


def state_of(policy: Policy) -> State:
    members = {i: (m.index, m.clock, m.sequence, m.pending, m.leaving) for i, m in policy.members.items()}
    return State(policy.commit, members, policy.missing())


def job(consistency: Consistency, workers: int) -> Policy:
    """Return a job in which workers 10, 11, … of index 0, 1, … have joined."""
    policy = Policy(consistency, workers)
    for index in range(workers):
        policy.join(10 + index, index)
    return policy


def push(policy: Policy, worker: int, sequence: int, weight: float = 1.0) -> list[Commit]:
    commits, refused = policy.push(PushEntry(worker, sequence, weight, ONE))
    assert refused is None
    return commits


def test_bsp_commits_in_the_order_of_indices_not_of_arrival() -> None:
    policy = job(bsp(), 3)
    assert push(policy, 12, 0) == []
    assert push(policy, 10, 0) == []
    [commit] = push(policy, 11, 0)
    assert [entry.worker for entry in commit.pushes] == [10, 11, 12]


def test_empty_push_closes_the_clock_and_adds_nothing() -> None:
    policy = job(bsp(), 2)
    push(policy, 10, 0, weight=0.0)
    [commit] = push(policy, 11, 0)
    assert [entry.worker for entry in commit.pushes] == [11]
    assert commit.closes == ((10, 0), (11, 0))


def test_clock_in_which_nobody_gives_advances_all_the_same() -> None:
    policy = job(bsp(), 2)
    push(policy, 10, 0, weight=0.0)
    assert push(policy, 11, 0, weight=0.0) == [Commit(1, (), ((10, 0), (11, 0)))]


def test_end_of_data_releases_the_others() -> None:
    policy = job(bsp(), 2)
    push(policy, 10, 0)
    [commit] = policy.leave(11)
    assert commit.closes == ((10, 0),)
    assert policy.is_released(10)


def test_sealed_push_of_a_worker_that_dies_counts() -> None:
    policy = job(bsp(), 2)
    push(policy, 10, 0)
    assert policy.leave(10) == []
    [commit] = push(policy, 11, 0)
    assert commit.closes == ((10, 0), (11, 0))
    assert list(policy.members) == [11]


def test_who_pauses_is_not_waited_for_and_goes_on_where_the_others_are() -> None:
    policy = job(bsp(), 2)
    push(policy, 10, 0)
    [commit] = policy.pause(11)
    assert commit.closes == ((10, 0),)
    assert len(push(policy, 10, 1)) == 1
    assert policy.join(11, 1) == 2
    assert push(policy, 10, 2) == []
    [commit] = push(policy, 11, 0)
    assert commit.closes == ((10, 2), (11, 0))


def test_ssp_does_not_wait_for_who_pauses_nor_after_it_for_old_clocks() -> None:
    policy = job(ssp(0), 2)
    policy.pause(11)
    for sequence in range(3):
        push(policy, 10, sequence)
        assert policy.is_released(10)
    assert policy.join(11, 1) == 3
    with pytest.raises(ProtocolError, match="got worker 1 again"):
        policy.join(11, 1)


def test_joiner_is_waited_for_from_the_next_clock_on() -> None:
    policy = job(bsp(), 1)
    push(policy, 10, 0)
    assert policy.join(11, 1) == 1
    assert push(policy, 10, 1) == []
    assert policy.waiting_for(10) == [11]


def test_bsp_makes_no_commit_before_everybody_has_come() -> None:
    policy = Policy(bsp(), expected=3)
    policy.join(10, 1)
    assert push(policy, 10, 0) == []
    assert policy.missing() == [0, 2]
    assert policy.waiting_for(10) == []
    policy.join(11, 0)
    assert policy.missing() == [2]
    policy.join(12, 2)
    assert policy.missing() == []
    assert push(policy, 11, 0) == []
    assert len(push(policy, 12, 0)) == 1


def test_worker_that_came_and_went_has_come() -> None:
    policy = Policy(bsp(), expected=2)
    policy.join(10, 0)
    policy.leave(10)
    assert policy.missing() == [1]
    policy.join(11, 1)
    assert policy.started


def test_index_beyond_the_expected_number_counts_as_one_of_them() -> None:
    policy = Policy(bsp(), expected=3)
    policy.join(10, 7)
    assert policy.missing() == [0, 1]


def test_ssp_holds_the_fast_worker_until_the_slowest_moves() -> None:
    policy = job(ssp(1), 2)
    push(policy, 10, 0)
    assert policy.is_released(10)
    push(policy, 10, 1)
    assert not policy.is_released(10)
    assert policy.waiting_for(10) == [11]
    push(policy, 11, 0)
    assert policy.is_released(10)


def test_ssp_does_not_wait_for_the_dead() -> None:
    policy = job(ssp(0), 2)
    push(policy, 10, 0)
    assert not policy.is_released(10)
    policy.leave(11)
    assert policy.is_released(10)


def test_ssp_joiner_starts_with_the_slowest() -> None:
    policy = job(ssp(3), 2)
    for sequence in range(3):
        push(policy, 10, sequence)
    push(policy, 11, 0)
    assert policy.join(12, 2) == 1


def test_asp_never_waits() -> None:
    policy = job(asp(), 2)
    for sequence in range(50):
        [commit] = push(policy, 10, sequence)
        assert commit.number == sequence + 1
        assert policy.is_released(10)


def test_disagreement_names_both_workers_and_closes_the_clock() -> None:
    policy = job(bsp(), 2)
    push(policy, 10, 0)
    commits, refused = policy.push(PushEntry(11, 0, 1.0, OTHER))
    assert isinstance(refused, DisagreementError)
    for part in ("clock 0", "worker 0 has (0.1,)", "worker 1 has (0.2,)", "group 0", "same schedule"):
        assert part in str(refused)
    assert commits[0].closes == ((10, 0), (11, 0))
    assert [entry.worker for entry in commits[0].pushes] == [10]


def test_disagreement_names_the_group_that_differs() -> None:
    policy = job(bsp(), 2)
    policy.push(PushEntry(10, 0, 1.0, ((0.1,), (0.3,))))
    _, refused = policy.push(PushEntry(11, 0, 1.0, ((0.1,), (0.4,))))
    assert "group 1" in str(refused)


def test_empty_push_disagrees_with_nobody() -> None:
    policy = job(bsp(), 2)
    push(policy, 10, 0)
    assert policy.push(PushEntry(11, 0, 0.0, OTHER))[1] is None


def test_asp_lets_everybody_have_a_schedule() -> None:
    policy = job(asp(), 2)
    push(policy, 10, 0)
    assert policy.push(PushEntry(11, 0, 1.0, OTHER))[1] is None


def test_push_that_was_counted_is_refused_the_second_time() -> None:
    policy = job(asp(), 1)
    push(policy, 10, 4)
    with pytest.raises(ProtocolError, match=r"Expected push 5 or later of worker 0, got 4: it counts once\."):
        push(policy, 10, 4)


def test_push_of_a_stranger_is_refused() -> None:
    policy = job(bsp(), 1)
    policy.leave(10)
    with pytest.raises(ProtocolError, match="a worker that has left it"):
        push(policy, 10, 0)


def test_joining_twice_is_refused() -> None:
    with pytest.raises(ProtocolError, match="got worker 0 again"):
        job(bsp(), 1).join(10, 0)


@pytest.mark.parametrize(("text", "value"), [("bsp", bsp()), ("asp", asp()), ("ssp:0", ssp(0)), ("ssp:12", ssp(12))])
def test_setting_reads_as_it_prints(text: str, value: Consistency) -> None:
    assert Consistency.parse(text) == value
    assert str(value) == text


@pytest.mark.parametrize("text", ["", "sync", "BSP", "ssp", "ssp:", "ssp:-1", "ssp:x", "bsp:1", "asp:2", "ssp:1:2"])
def test_wrong_setting_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="Expected"):
        Consistency.parse(text)


def test_negative_staleness_is_refused() -> None:
    with pytest.raises(SettingError, match="got -1 for ssp"):
        ssp(-1)


def test_every_refusal_is_a_headwater_error() -> None:
    assert issubclass(DisagreementError, HeadwaterError)
    assert issubclass(ProtocolError, HeadwaterError)
