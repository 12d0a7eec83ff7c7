"""From pushes to numbers: what every tensor gets from whom, and at which step, against a plain dictionary."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater import optim
from headwater._consistency import PushEntry
from headwater._layout import AVERAGED
from headwater._messages import CommitSpec
from headwater._plan import Plan, pack_absent, scaled

ADAM = optim.Adam()  # its rows tell steps apart
#: One row of scalars per parameter group, each with a learning rate of its own.
SCALARS = tuple(tuple((ADAM.scalars() | {"lr": 0.1 * (group + 1)}).values()) for group in range(3))


class Entry(NamedTuple):
    """What a commit says about one tensor, None where it stays as it is."""

    shares: tuple[float, ...]  # what each push's gradient is multiplied by
    row: tuple[float, ...]


def read(spec: CommitSpec) -> list[Entry | None]:
    """Return a commit tensor by tensor."""
    cells = np.frombuffer(spec.cells, np.int32)
    shares = np.frombuffer(spec.coefficients).reshape(len(spec.rows), len(spec.pushes))
    return [None if cell < 0 else Entry(tuple(shares[cell].tolist()), spec.rows[cell]) for cell in cells]


def row(group: int, step: int) -> tuple[float, ...]:
    if group == AVERAGED:
        return ()
    return tuple(ADAM.row(dict(zip(ADAM.scalars(), SCALARS[group], strict=True)), step))


def entries(present: list[list[bool]], weights: list[float]) -> list[PushEntry]:
    """Return pushes, one per row of `present`."""
    absent = [pack_absent([not here for here in pattern]) for pattern in present]
    return [PushEntry(7 + i, 3, weights[i], SCALARS, absent[i]) for i in range(len(present))]


def state_of(plan: Plan) -> tuple[list[int], bytes, tuple[tuple[int, int], ...]]:
    return plan.cohort_of.tolist(), plan.cells, plan.cohorts


weights = st.floats(1e-3, 1e6)


@st.composite
def commits(draw: st.DrawFn, tensors: int) -> tuple[list[list[bool]], list[float], bool]:
    """Draw who has a gradient for what, the weights, and whether the commit goes through in the end."""
    count = draw(st.integers(1, 4))
    pattern = st.lists(st.booleans(), min_size=tensors, max_size=tensors) | st.just([True] * tensors)
    present = draw(st.lists(pattern, min_size=count, max_size=count))
    return present, draw(st.lists(weights, min_size=count, max_size=count)), draw(st.sampled_from([True, True, False]))


@given(st.data())
def test_every_tensor_gets_its_share_at_its_own_step(data: st.DataObject) -> None:
    """The model: a dictionary from tensor to steps made. A commit that does not go through leaves no trace."""
    groups = data.draw(st.lists(st.sampled_from([0, 1, 2, AVERAGED]), min_size=1, max_size=10))
    made = data.draw(
        st.lists(st.integers(0, 5), min_size=len(groups), max_size=len(groups)) | st.just([0] * len(groups))
    )
    steps = dict(enumerate(made))
    plan = Plan.start(groups, made)
    for present, shares, is_accepted in data.draw(st.lists(commits(len(groups)), max_size=8)):
        before = state_of(plan)
        pushes = entries(present, shares)
        spec, after = plan.next(ADAM, pushes)
        assert spec.pushes == tuple((7 + i, 3) for i in range(len(pushes)))
        found = read(spec)
        for tensor, group in enumerate(groups):
            here = [pattern[tensor] for pattern in present]
            if any(here):
                total = sum(w for w, h in zip(shares, here, strict=True) if h or group != AVERAGED)
                mean = tuple(w / total if h else 0.0 for w, h in zip(shares, here, strict=True))
                assert found[tensor] == Entry(mean, row(group, steps[tensor] + 1))
            else:
                assert found[tensor] is None
        assert state_of(plan) == before
        if is_accepted:
            plan = after
            for tensor in steps:
                steps[tensor] += found[tensor] is not None
        assert plan.steps() == tuple(steps.values())


def test_one_group_is_one_cell() -> None:
    spec, _ = Plan.start([0, 0, 0]).next(ADAM, entries([[True] * 3, [True] * 3], [1.0, 3.0]))
    assert read(spec) == [Entry((0.25, 0.75), row(0, 1))] * 3
    assert len(spec.rows) == 1


def test_mean_counts_a_missing_gradient_as_zero() -> None:
    """As one process with the larger batch computes it."""
    spec, _ = Plan.start([0, 0]).next(ADAM, entries([[True, True], [True, False]], [1.0, 1.0]))
    first, second = read(spec)
    assert first is not None
    assert second is not None
    assert first.shares == (0.5, 0.5)
    assert second.shares == (0.5, 0.0)


def test_neither_sign_nor_scale_go_into_the_shares_of_a_mean_of_values() -> None:
    plan = Plan.start([0, AVERAGED])
    spec, _ = plan.next(optim.Adam(maximize=True), entries([[True, True], [True, False]], [1.0, 3.0]))
    assert [entry and entry.shares for entry in read(scaled(spec, 0.5))] == [(-0.125, -0.375), (1.0, 0.0)]


def test_untouched_tensor_keeps_its_step() -> None:
    plan = Plan.start([0, 0])
    _, plan = plan.next(ADAM, entries([[True, False]], [1.0]))
    spec, plan = plan.next(ADAM, entries([[True, True]], [1.0]))
    assert plan.steps() == (2, 1)
    assert [entry and entry.row for entry in read(spec)] == [row(0, 2), row(0, 1)]


def test_nobody_has_any_gradient() -> None:
    plan = Plan.start([0, 1])
    spec, after = plan.next(ADAM, entries([[False, False]], [1.0]))
    assert read(spec) == [None, None]
    assert spec.rows == ()
    assert after.steps() == (0, 0)


def test_groups_have_scalars_of_their_own() -> None:
    spec, _ = Plan.start([0, 2, 1]).next(ADAM, entries([[True] * 3], [1.0]))
    assert [entry and entry.row for entry in read(spec)] == [row(0, 1), row(2, 1), row(1, 1)]


@pytest.mark.parametrize(("maximize", "scale", "share"), [(False, 0.5, 0.5), (True, 1.0, -1.0), (True, 0.25, -0.25)])
def test_scale_and_sign_go_into_the_shares(maximize: bool, scale: float, share: float) -> None:
    optimizer = optim.Adam(maximize=maximize)
    spec = scaled(Plan.start([0]).next(optimizer, entries([[True]], [9.0]))[0], scale)
    [entry] = read(spec)
    assert entry is not None
    assert entry.shares == (share,)


def test_plan_goes_on_from_saved_steps() -> None:
    spec, plan = Plan.start([0, 0, 0], [4, 9, 4]).next(ADAM, entries([[True] * 3], [1.0]))
    assert plan.steps() == (5, 10, 5)
    assert [entry and entry.row for entry in read(spec)] == [row(0, 5), row(0, 10), row(0, 5)]


@given(st.lists(st.booleans(), max_size=40))
def test_absence_is_one_bit_per_tensor(absent: list[bool]) -> None:
    packed = pack_absent(absent)
    if any(absent):
        assert len(packed) == (len(absent) + 7) // 8
        assert np.unpackbits(np.frombuffer(packed, np.uint8), count=len(absent)).tolist() == absent
    else:
        assert packed == b""
