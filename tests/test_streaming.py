"""The last push of a commit is applied while it arrives, and its worker gets parameters before it has sent all gradients."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from jobs import PATIENCE_S, TOKEN, Arrays, Job, assert_equal_bits, read_all, start_job

import headwater as hw
from headwater import _limits
from headwater._consistency import PushEntry
from headwater._dense import Foreseen, Shard
from headwater._errors import NonFiniteError
from headwater._layout import BLOCK, TensorSpec
from headwater._messages import (
    Assign,
    Attach,
    Attached,
    Flip,
    Flipped,
    Hello,
    Prepare,
    Prepared,
    Register,
    Seal,
    Welcome,
)
from headwater._plan import Plan
from headwater._transport import Address, connect, request

#: Lanes of three dtypes with gaps between them, tensors over several blocks, a short last block.
SHAPES = {"w": ("float32", 3 * BLOCK + 5), "h": ("float16", 90_001), "b": ("float32", 7), "d": ("float64", 2 * BLOCK)}


def make_arrays(*seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(size).astype(dtype) for name, (dtype, size) in SHAPES.items()}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Stream even small models, and note for each foreseen commit whether it was the one that was made."""
    found: list[bool] = []
    monkeypatch.setattr(_limits, "PIECE_BYTES", 1 << 15)
    noted: list[Foreseen] = []
    prepare, flip = Shard._prepare, Shard._flip

    def note(shard: Shard, request: Prepare) -> Prepared:
        noted.extend([shard._foreseen] if shard._foreseen is not None else [])
        return prepare(shard, request)

    def judge(shard: Shard, request: Flip) -> Flipped:
        answer = flip(shard, request)
        found.extend(foreseen.has_counted for foreseen in noted)
        noted.clear()
        return answer

    monkeypatch.setattr(Shard, "_prepare", note)
    monkeypatch.setattr(Shard, "_flip", judge)
    return found


def train(session: hw.Session) -> Arrays:
    session.register(make_arrays(0), hw.optim.AdamW(lr=0.01))
    for step in range(4):
        gradients = make_arrays(1, session.index, step)
        if step == 2:
            del gradients["b"]
        session.step(gradients)
    return read_all(session) | {name: array.copy() for name, array in session.parameters.items()}


@pytest.mark.parametrize("workers", [1, 3])
def test_streamed_commits_give_the_same_bits(workers: int, counted: list[bool]) -> None:
    with start_job(workers=workers, transport="shm") as job:
        expected = job.run(train)[0]
    assert counted == []
    with start_job(workers=workers, transport="tcp") as job:
        for outcome in job.run(train):
            assert_equal_bits(outcome, expected)
    assert all(counted)
    assert len(counted) <= 4
    assert counted or workers > 1  # workers whose pushes end at the same moment foresee nothing


@pytest.mark.parametrize("place", [0, -1])
def test_a_bad_gradient_in_a_streamed_push_leaves_no_trace(place: int, counted: list[bool]) -> None:
    with start_job(transport="tcp") as job, job.connect() as session:
        session.register(make_arrays(0), hw.optim.AdamW(lr=0.01))
        session.step(make_arrays(1))
        before = read_all(session)
        bad = make_arrays(2)
        bad["d"][place] = np.nan
        with pytest.raises(NonFiniteError, match="'d'"):
            session.step(bad)
        assert_equal_bits(read_all(session), before)
        assert_equal_bits(
            {f"master/{n}": session.parameters[n] for n in ("w", "d")}, {k: before[k] for k in ("master/w", "master/d")}
        )
        session.step(make_arrays(3))
    assert counted == [True, True]


def test_clipped_and_empty_pushes_are_not_foreseen(counted: list[bool]) -> None:
    with start_job(transport="tcp") as job, job.connect() as session:
        session.register(make_arrays(0), hw.optim.SGD(lr=0.1, clip_norm=1.0))
        session.step(make_arrays(1))
        session.step(make_arrays(2), weight=0)
        assert session.clock == 2
    assert counted == []


def test_figures_may_be_reported_while_a_push_waits_to_be_sent() -> None:
    size = 12_000_000  # more than the sockets hold
    with start_job(transport="tcp") as job, job.connect() as session:
        session.register({"w": np.zeros(size, np.float32)}, hw.optim.SGD(lr=1.0))
        session.gradients["w"].fill(1)
        for step in range(2):
            session.push_sealed(weight=1.0, scalars=session._scalars, pull=True)
            session.report(loss=0.5 + step)
            session.wait()
        assert np.all(session.parameters["w"] == -2)
        assert session.stats().workers[0].figures == {"loss": 1.5}


def is_sealed(job: Job) -> bool:
    coordinator = job.servers[0].coordinator
    assert coordinator is not None
    assert coordinator._policy is not None
    return any(member.pending for member in coordinator._policy.members.values())


def test_a_worker_that_dies_within_a_streamed_push_counts_nowhere(counted: list[bool]) -> None:
    with start_job(workers=2, transport="tcp") as job, job.connect() as session:
        dying = connect(Address.parse(job.address))
        hello = Hello(TOKEN, "worker", 12345)
        assert isinstance(request(dying, hello).message, Welcome)
        session.register(make_arrays(0), hw.optim.SGD(lr=0.1))
        specs = tuple(TensorSpec(name, a.shape, a.dtype.name) for name, a in make_arrays(0).items())
        request(dying, Register(specs, hw.optim.SGD(lr=0.1)))
        assert isinstance(request(dying, Attach(False)).message, Attached)
        session.push(make_arrays(1))
        size = job.servers[0].shard.part.wire_bytes
        deadline = time.monotonic() + PATIENCE_S
        while not is_sealed(job):  # the first push, when this one begins
            assert time.monotonic() < deadline
        dying.send_head(Seal(0, 1.0, ((0.1, 0.0, 0.0, 0.0),), b"", True, "sent"), size)
        dying.send_more(memoryview(np.full(size // 2, 1, np.uint8)))
        dying.close()
        assert session.wait() == 1
        assert session.accepted == 1
        alone = session.pull()
    with hw.connect() as other:
        other.register(make_arrays(0), hw.optim.SGD(lr=0.1))
        other.step(make_arrays(1))
        assert_equal_bits(other.pull(), alone)
    assert not any(counted)


# The shard alone.


def make_shard() -> tuple[Shard, Plan, hw.optim.SGD]:
    optimizer = hw.optim.SGD(lr=0.1)
    shard, plan = Shard(), Plan.start([0])
    shard.handle(Assign((TensorSpec("w", (4 * BLOCK,), "float32"),), optimizer, 0, 1, hw.bsp()))
    for identity in (1, 2):
        shard.attach(identity, share=False)
        shard.inbox(identity, 16 * BLOCK)[:] = np.full(4 * BLOCK, identity, np.float32).tobytes()
        shard.pushed(identity, 0, True)
    return shard, plan, optimizer


def spec_of(plan: Plan, optimizer: hw.optim.SGD, *identities: int) -> Any:
    return plan.next(optimizer, [PushEntry(i, 0, 1.0, (tuple(optimizer.scalars().values()),)) for i in identities])[0]


@pytest.mark.parametrize("steps", [[16 * BLOCK], [1, 5 * BLOCK, 16 * BLOCK], [4 * BLOCK, 8 * BLOCK - 1, 16 * BLOCK]])
def test_pieces_together_are_the_whole_and_the_state_stands_still_until_the_flip(steps: list[int]) -> None:
    shard, plan, optimizer = make_shard()
    spec = spec_of(plan, optimizer, 1, 2)
    foreseen = shard.foresee(spec)
    pieces = b"".join(bytes(shard.advance(foreseen, ready)) for ready in steps)
    assert not np.any(shard.read("master")[1])
    assert shard.handle(Prepare(1, (spec,))) == Prepared()
    assert not foreseen.has_counted
    shard.handle(Flip(1, True))
    assert foreseen.has_counted
    assert (
        pieces
        == shard.read("master")[1].tobytes()
        == np.full(4 * BLOCK, np.float32(-0.15)).astype(np.float32).tobytes()
    )


@pytest.mark.parametrize("ready", [8 * BLOCK, 16 * BLOCK])
def test_another_commit_than_the_foreseen_one_is_made_as_if_nothing_had_been_foreseen(ready: int) -> None:
    shard, plan, optimizer = make_shard()
    foreseen = shard.foresee(spec_of(plan, optimizer, 1, 2))
    shard.advance(foreseen, ready)
    other = spec_of(plan, optimizer, 2)
    assert shard.handle(Prepare(1, (other,))) == Prepared()
    shard.advance(foreseen, 16 * BLOCK)  # must not write into what was prepared
    shard.handle(Flip(1, True))
    shard.advance(foreseen, 16 * BLOCK)
    assert not foreseen.has_counted
    assert np.unique(shard.read("master")[1].view(np.float32)) == np.float32(0.1) * np.float32(-2)
    assert shard.handle(Prepare(2, (other,))) == Prepared()
