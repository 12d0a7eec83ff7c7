"""Native tables: the same rows as torch's sparse optimizers, the same bits everywhere, budgets and streams that hold."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from faulty_files import cut_off_spilled
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from table_model import mix64

from headwater import _kernels, optim
from headwater._errors import SettingError

Array = npt.NDArray[Any]

LEVELS = _kernels.simd_levels()
RULES = (
    optim.SGD(lr=0.1, weight_decay=0.01),
    optim.Adagrad(lr=0.1, lr_decay=0.1, weight_decay=0.01, initial_accumulator_value=0.1),
    optim.RowwiseAdagrad(lr=0.1, weight_decay=0.01),
    optim.Adam(lr=0.01, weight_decay=0.01),
    optim.FTRL(lr=0.1, beta=0.5, l1=0.5, l2=0.01),
)
rules = pytest.mark.parametrize("optimizer", RULES, ids=lambda o: str(o.kind))
EXTREME = np.array([0, -1, 1, -(1 << 63), (1 << 63) - 1, 1 << 32, -(1 << 32)])

deterministic = settings(derandomize=True, deadline=None, max_examples=40)


def make_table(optimizer: optim.Optimizer, dim: int, **options: Any) -> _kernels.Table:
    return _kernels.Table(dim, optimizer.kind, optimizer.row_slots(dim), **{"scale": 0.1} | options)


def pull(
    table: _kernels.Table, ids: Array, dim: int, *, touch: bool = False, now: float = 0.0, **options: Any
) -> Array:
    out = np.full((len(ids), dim), np.nan, np.float32)
    table.pull(np.asarray(ids, np.int64), out, touch=touch, now=now, **options)
    return out


def push(
    table: _kernels.Table, optimizer: optim.Optimizer, ids: Array, gradients: Array, step: int = 1, now: float = 0.0
) -> None:
    row = np.array(optimizer.row(optimizer.scalars(), step))
    table.push(np.asarray(ids, np.int64), gradients, row, step=step, now=now)


def dump(table: _kernels.Table, limit: int = 1 << 62) -> dict[int, bytes]:
    """Return everything about every row, by id."""
    found: dict[int, bytes] = {}
    cursor = 0
    while cursor >= 0:
        ids, rows, counts, last_seen, cursor = table.export(cursor, limit)
        assert len(ids) <= limit
        for i, row, count, last in zip(ids, rows, counts, last_seen, strict=True):
            assert int(i) not in found
            found[int(i)] = row.tobytes() + count.tobytes() + last.tobytes()
    return found


def draw_push(rng: np.random.Generator, space: int, size: int, dim: int) -> tuple[Array, Array]:
    ids = rng.choice(space, min(size, space), replace=False).astype(np.int64) * 7919 - space
    return ids, rng.standard_normal((len(ids), dim)).astype(np.float32)


# ---- optimizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 3, 16, 37])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (optim.SGD(lr=0.1), "SGD", {"lr": 0.1}),
        (
            optim.Adagrad(lr=0.1, initial_accumulator_value=0.1),
            "Adagrad",
            {"lr": 0.1, "initial_accumulator_value": 0.1},
        ),
        # torch.optim.SparseAdam adds eps before it corrects the bias, torch.optim.Adam after: so small that it is the same.
        (optim.Adam(lr=0.01, eps=1e-12), "SparseAdam", {"lr": 0.01, "eps": 1e-12}),
    ],
    ids=["sgd", "adagrad", "adam"],
)
def test_rows_move_as_in_a_sparse_torch_embedding(
    ours: optim.Optimizer, theirs: str, options: dict[str, float], dim: int
) -> None:
    """Repeated ids, rows that come late, rows that come once. Tolerance: some units in the last place a step, as in test_optim."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(dim)
    table = make_table(ours, dim)
    embedding = torch.nn.Embedding(50, dim, sparse=True)
    with torch.no_grad():
        embedding.weight.copy_(torch.from_numpy(pull(table, np.arange(50), dim)))
    optimizer = getattr(torch.optim, theirs)(list(embedding.parameters()), **options)
    for step in range(1, 31):
        ids = rng.integers(0, 50, 20)
        gradients = rng.standard_normal((20, dim)).astype(np.float32)
        optimizer.zero_grad()
        embedding(torch.from_numpy(ids)).backward(torch.from_numpy(gradients))
        with torch.sparse.check_sparse_tensor_invariants():
            optimizer.step()
        distinct, _, inverse = _kernels.unique(ids)
        summed = np.empty((len(distinct), dim), np.float32)
        _kernels.sum_rows(gradients, inverse, summed)
        push(table, ours, distinct, summed, step)
    np.testing.assert_allclose(pull(table, np.arange(50), dim), embedding.weight.detach().numpy(), rtol=1e-5, atol=2e-6)


def reference_step(o: optim.Optimizer, w: Array, state: Array, g: Array, step: int) -> None:
    """One step in float64, from the papers' formulas; w: (dim,), state: (slots,), both changed in place."""
    dim = len(w)
    if isinstance(o, optim.FTRL):
        z, n = state[:dim], state[dim:]
        sigma = (np.sqrt(n + g * g) - np.sqrt(n)) / o.lr
        z += g - sigma * w
        n += g * g
        w[:] = np.where(np.abs(z) <= o.l1, 0.0, -(z - np.sign(z) * o.l1) / ((o.beta + np.sqrt(n)) / o.lr + o.l2))
        return
    g = g + o.scalars()["weight_decay"] * w
    if isinstance(o, optim.SGD):
        w -= o.lr * g
    elif isinstance(o, optim.Adagrad):  # and row-wise
        state += np.mean(g * g) if isinstance(o, optim.RowwiseAdagrad) else g * g
        w -= o.lr / (1 + (step - 1) * o.lr_decay) * g / (np.sqrt(state) + o.eps)
    elif isinstance(o, optim.Adam):
        m, v = state[:dim], state[dim:]
        m += (1 - o.beta1) * (g - m)
        v += (1 - o.beta2) * (g * g - v)
        w -= o.lr * (m / (1 - o.beta1**step)) / (np.sqrt(v / (1 - o.beta2**step)) + o.eps)


@rules
@pytest.mark.parametrize("dim", [1, 16, 37])
def test_rows_and_state_follow_the_formulas(optimizer: optim.Optimizer, dim: int) -> None:
    """Against float64; 3e-5 of the largest element after 30 steps in float32, FTRL's differences of roots cost most of it."""
    rng = np.random.default_rng(7)
    table = make_table(optimizer, dim)
    w = pull(table, np.arange(20), dim).astype(np.float64)
    state = np.array([optimizer.row_slots(dim)] * 20, np.float64).reshape(20, -1)
    for step in range(1, 31):
        ids = rng.permutation(20)[:12]
        gradients = rng.standard_normal((12, dim)).astype(np.float32)
        push(table, optimizer, ids, gradients, step)
        for i, g in zip(ids, gradients, strict=True):
            reference_step(optimizer, w[i], state[i], g.astype(np.float64), step)
    ids, rows, _, _, end = table.export()
    assert end == -1
    assert sorted(ids) == list(range(20))
    expected = np.concatenate((w, state), axis=1)[ids]
    for columns in (slice(0, dim), slice(dim, None)):
        if expected[:, columns].size:
            assert np.abs(rows[:, columns] - expected[:, columns]).max() <= 3e-5 * np.abs(expected[:, columns]).max()
    if isinstance(optimizer, optim.FTRL) and dim > 1:
        assert (rows[:, :dim] == 0.0).any(), "l1 gives exact zeros"


@pytest.mark.parametrize(
    ("optimizer", "wrong"),
    [
        (optim.SGD(momentum=0.9), "momentum=0.9"),
        (optim.Adam(amsgrad=True), "amsgrad=True"),
        (optim.Adagrad(maximize=True), "maximize=True"),
        (optim.FTRL(clip_norm=1.0), "clip_norm=1.0"),
        (optim.AdamW(), "Expected SGD"),
        (optim.RMSprop(), "Expected SGD"),
        (optim.Mean(), "Expected SGD"),
    ],
    ids=repr,
)
def test_settings_that_tables_do_not_have_are_refused_by_name(optimizer: optim.Optimizer, wrong: str) -> None:
    with pytest.raises(SettingError, match=wrong):
        optimizer.row_slots(4)


@pytest.mark.parametrize("optimizer", [optim.RowwiseAdagrad(), optim.FTRL()], ids=repr)
def test_optimizers_of_tables_are_refused_for_tensors(optimizer: optim.Optimizer) -> None:
    with pytest.raises(SettingError, match=type(optimizer).__name__):
        optimizer.check_dense()


# ---- initial values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", ["uniform", "normal", "constant"])
def test_initial_values_depend_on_seed_id_and_position_alone(initial: str) -> None:
    rng = np.random.default_rng(0)
    ids = np.concatenate((EXTREME, rng.integers(-(1 << 63), 1 << 63, 5000, dtype=np.int64)))
    expected = pull(make_table(RULES[0], 37, initial=initial, level="baseline"), ids, 37)
    for level in LEVELS:
        for threads in (1, 2, 4):
            table = make_table(RULES[0], 37, initial=initial, level=level, threads=threads)
            order = rng.permutation(len(ids))
            assert pull(table, ids[order], 37).tobytes() == expected[order].tobytes()
            part = pull(table, ids[:100], 37, prefetch=False)
            assert part.tobytes() == expected[:100].tobytes()
    shorter = pull(make_table(RULES[0], 16, initial=initial), ids, 16)
    assert shorter.tobytes() == np.ascontiguousarray(expected[:, :16]).tobytes(), "a position's value depends on dim"
    other = pull(make_table(RULES[0], 37, initial=initial, seed=1), ids, 37)
    assert (initial == "constant") == (other.tobytes() == expected.tobytes())


def test_a_row_begins_with_its_initial_value() -> None:
    table = make_table(RULES[1], 5, initial="normal")
    before = pull(table, EXTREME, 5)
    push(table, optim.Adagrad(lr=0.0), EXTREME, np.ones((len(EXTREME), 5), np.float32))
    assert pull(table, EXTREME, 5).tobytes() == before.tobytes()


def test_initial_values_are_spread_as_they_should() -> None:
    """Mean, deviation and range of 1.6 million numbers; limits at five standard errors. Neighbours do not go together."""
    for initial, deviation, limit in (("uniform", 0.1 / np.sqrt(3.0), 0.1), ("normal", 0.1, 0.49)):
        x = pull(make_table(RULES[0], 16, initial=initial), np.arange(100_000), 16).astype(np.float64)
        assert abs(x.mean()) < 5 * deviation / np.sqrt(x.size)
        assert abs(x.std() / deviation - 1.0) < 5 / np.sqrt(x.size)
        assert np.abs(x).max() <= limit
        assert np.abs(x).max() > 0.8 * limit
        for a, b in ((x[:-1], x[1:]), (x[:, :-1], x[:, 1:]), (x[:, :8], x[:, 8:])):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


def test_golden_numbers_that_saved_tables_and_other_servers_rely_on() -> None:
    assert _kernels.bucket_of(EXTREME).tolist() == [226, 228, 145, 72, 42, 196, 33]
    hashes = [-2152535657050944081, 6774081908283191102, -172204208953579751, -5465541261717808143]
    assert _kernels.hash_ids(["", "a", "item:42", "ü" * 9]).tolist() == hashes
    assert pull(make_table(RULES[0], 2, seed=7), np.array([0, -5]), 2).tolist() == [
        [0.018118083477020264, 0.04551321268081665],
        [0.05371277406811714, -0.06371375173330307],
    ]
    assert pull(make_table(RULES[0], 2, seed=7, initial="normal"), np.array([0, -5]), 2).tolist() == [
        [0.08426287770271301, 0.07838359475135803],
        [-0.015613926574587822, 0.09757629781961441],
    ]


# ---- the same bits everywhere --------------------------------------------------------------------------------


@rules
def test_every_level_and_thread_count_gives_the_same_table(optimizer: optim.Optimizer) -> None:
    """Growth, admission, eviction at a budget, expiry, decay and the stream among it; evictions are drawn, the same each time."""

    def run(level: str, threads: int) -> tuple[Any, ...]:
        rng = np.random.default_rng(3)
        options = {"admit_after": 2, "expire_steps": 9, "decay": 0.75, "budget_bytes": 264_000, "stripes": 8}
        options["budget_bytes"] += 5_520 * (92 + 4 * len(optimizer.row_slots(19)))
        table = make_table(optimizer, 19, level=level, threads=threads, **options)
        table.track("replica")
        pulled = []
        for step in range(1, 30):
            ids, gradients = draw_push(rng, 8_000, 5_040, 19)
            push(table, optimizer, ids, gradients, 150 * step if step > 20 else step)
            pulled.append(pull(table, ids, 19, touch=step % 2 == 0).tobytes())
        stats = table.stats()
        assert stats["evicted"] > 100
        assert stats["expired"] > 100
        changes = [part.tobytes() for part in table.changes("replica")[:5]]
        return pulled, dump(table), stats, changes

    expected = run("baseline", 1)
    for level in LEVELS:
        for threads in (1, 2, 4):
            if (level, threads) != ("baseline", 1):
                assert run(level, threads) == expected


# ---- ids -----------------------------------------------------------------------------------------------------


@deterministic
@given(st.lists(st.integers(-5, 5) | st.sampled_from(EXTREME.tolist())), st.integers(1, 5))
def test_unique_keeps_the_order_of_first_appearance_within_a_server(values: list[int], servers: int) -> None:
    ids = np.array(values, np.int64)
    distinct, ends, inverse = _kernels.unique(ids, servers)
    server = _kernels.bucket_of(distinct).astype(int) * servers // 256
    first = {id_: values.index(id_) for id_ in values}
    assert distinct.tolist() == sorted(first, key=lambda i: (server[distinct.tolist().index(i)], first[i]))
    assert ends.tolist() == np.cumsum(np.bincount(server, minlength=servers)).tolist()
    assert distinct[inverse].tolist() == values


def test_unique_of_many_ids_is_numpys() -> None:
    some = np.random.default_rng(0).zipf(1.2, 200_000).astype(np.int64)
    # First hardly any that was not there before, then all of them, then some.
    ids = np.concatenate([np.zeros(5000, np.int64), np.arange(-20_000, 0), some])
    distinct, ends, inverse = _kernels.unique(ids)
    theirs, index = np.unique(ids, return_index=True)
    assert distinct.tolist() == theirs[np.argsort(index)].tolist()
    assert ends.tolist() == [len(theirs)]
    assert (distinct[inverse] == ids).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_sums_are_those_from_the_left_to_the_right(in_order: bool, routed: bool, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    count, dim = 20_000, 23  # a wide vector of any level, a narrow one, and what is left
    targets = rng.integers(0, 300, count, dtype=np.int32)
    if in_order:  # as `unique` numbers them; and some have no row
        targets = _kernels.unique(targets.astype(np.int64))[2]
        targets += targets > 150
    sources = rng.integers(0, 500, count, dtype=np.int32) if routed else None
    rows = rng.standard_normal((500 if routed else count, dim)).astype(np.float32)
    weights = rng.standard_normal(count).astype(np.float32) if weighted else None
    expected = np.zeros((302, dim), np.float32)
    for i in range(count):
        row = rows[i if sources is None else sources[i]]
        expected[targets[i]] += row if weights is None else weights[i] * row
    for level in LEVELS:
        for threads in (1, 2, 4):
            out = np.full_like(expected, np.nan)
            assert _kernels.sum_rows(rows, targets, out, sources=sources, weights=weights, threads=threads, level=level)
            assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dim", [1, 4, 16, 23])
def test_sums_that_are_not_finite_are_told(dim: int) -> None:
    targets = np.array([0, 1, 0, 2], np.int32)
    most = float(np.finfo(np.float32).max)
    for bad in ([np.nan, 0, 0, 0], [0, 0, -np.inf, 0], [np.inf, 0, -np.inf, 0], [0, np.inf, 0, 0], [most, 0, most, 0]):
        for position in (0, dim - 1):
            rows = np.ones((4, dim), np.float32)
            rows[:, position] = bad
            for level in LEVELS:
                assert not _kernels.sum_rows(rows, targets, np.empty((3, dim), np.float32), level=level)
    rows = np.full((4, dim), most / 2, np.float32)
    assert _kernels.sum_rows(rows, targets, np.empty((4, dim), np.float32))


def test_same_ids_are_the_same_in_the_same_order() -> None:
    ids = np.arange(5)
    assert _kernels.same_ids(ids, ids.copy())
    assert _kernels.same_ids(ids[:0], ids[5:])
    assert not _kernels.same_ids(ids, ids[:4])
    assert not _kernels.same_ids(ids, ids[::-1].copy())


def test_taken_rows_are_the_rows() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 7)).astype(np.float32)
    sources = rng.integers(0, 300, 10_000, dtype=np.int32)
    out = np.empty((10_000, 7), np.float32)
    _kernels.take_rows(rows, sources, out, threads=2)
    assert out.tobytes() == rows[sources].tobytes()


def test_the_first_bad_number_is_found() -> None:
    rows = np.zeros((40_000, 7), np.float32)
    assert _kernels.find_bad(rows, threads=4) == -1
    assert _kernels.find_bad(np.empty((0, 7), np.float32)) == -1
    for place, bad in ((279_999, np.nan), (150_000, -np.inf), (149_999, np.inf), (0, np.nan)):
        rows.flat[place] = bad
        assert _kernels.find_bad(rows, threads=4) == place
    assert _kernels.find_bad(np.array([np.finfo(np.float32).max, -0.0, 1e-45], np.float32)) == -1


def test_hashes_of_text_are_apart() -> None:
    texts = ["", "\0", "\0\0", "a", "a\0", "aaaaaaaa", "aaaaaaaaa", *map(str, range(100_000))]
    hashes = _kernels.hash_ids(texts)
    assert len(set(hashes.tolist())) == len(texts)
    assert _kernels.hash_ids([t.encode() for t in texts]).tolist() == hashes.tolist()
    assert _kernels.hash_ids([]).shape == (0,)
    with pytest.raises(ValueError, match="got int — string 1"):
        _kernels.hash_ids(["a", 1])  # type: ignore[list-item]


def test_one_id_a_million_times_is_one_step() -> None:
    ids = np.full(1_000_000, -(1 << 63))
    gradients = np.ones((1_000_000, 4), np.float32)
    distinct, _, inverse = _kernels.unique(ids)
    assert distinct.tolist() == [-(1 << 63)]
    summed = np.empty((1, 4), np.float32)
    _kernels.sum_rows(gradients, inverse, summed, threads=4)
    table = make_table(RULES[0], 4, initial="constant", scale=0.0)
    push(table, optim.SGD(lr=1.0), distinct, summed)
    assert (pull(table, ids, 4, touch=True) == -1_000_000.0).all()
    assert table.stats()["hits"] == 1_000_000
    assert table.stats()["rows"] == 1


def test_a_push_finds_the_same_rows_whatever_numbers_it_is_told() -> None:
    """Numbers of a pull, of one before rows came and went, of other rows, and of none: what they say is never relied on."""
    rng, optimizer, dim = np.random.default_rng(3), optim.RowwiseAdagrad(lr=0.1), 3
    tables = [make_table(optimizer, dim, threads=2, budget_bytes=600_000) for _ in range(2)]
    numbers = np.zeros(3000, np.uint32)
    for step in range(1, 40):
        ids = rng.choice(9000, 3000, replace=False)
        gradients = rng.standard_normal((3000, dim)).astype(np.float32)
        out = np.empty((3000, dim), np.float32)
        if step % 4 < 2:
            asked = ids if step % 4 == 0 else rng.permutation(ids)
            tables[0].pull(asked, out, touch=False, now=0.0, numbers=numbers)
        elif step % 4 == 2:
            numbers[:] = rng.integers(0, 1 << 32, 3000)
        scalars = np.array(optimizer.row(optimizer.scalars(), step))
        tables[0].push(ids, gradients, scalars, step=step, now=0.0, numbers=numbers)
        tables[1].push(ids, gradients, scalars, step=step, now=0.0)
        assert dump(tables[0]) == dump(tables[1])
    assert tables[0].stats()["evicted"] > 0
    with pytest.raises(ValueError, match="numbers"):
        tables[0].push(ids, gradients, scalars, step=step, now=0.0, numbers=numbers[:-1])


def test_extreme_ids_are_ids_like_any_other() -> None:
    table = make_table(RULES[2], 3)
    gradients = np.arange(3 * len(EXTREME), dtype=np.float32).reshape(-1, 3)
    for step in (1, 2, 3):
        push(table, RULES[2], EXTREME, gradients, step)
    assert sorted(dump(table)) == sorted(EXTREME.tolist())
    assert table.delete(EXTREME[:3]) == 3
    assert sorted(dump(table)) == sorted(EXTREME[3:].tolist())


def test_an_empty_batch_changes_nothing_but_the_step() -> None:
    table = make_table(RULES[0], 3)
    none, rows = np.empty(0, np.int64), np.empty((0, 3), np.float32)
    assert table.pull(none, rows, touch=True, now=0.0) == 0
    push(table, RULES[0], none, rows, step=5)
    table.put(none, rows, np.empty(0, np.float32), none, step=5, now=0.0)
    assert table.delete(none) == 0
    assert table.sweep(step=5, now=0.0) == 0
    assert table.stats()["step"] == 5
    assert dump(table) == {}
    assert [len(part) for part in _kernels.unique(none, 2)] == [0, 2, 0]


def test_buckets_that_live_elsewhere_are_refused() -> None:
    ids = np.arange(100)
    here = ids[_kernels.bucket_of(ids) < 128]
    table = make_table(RULES[0], 3, buckets=(0, 128))
    push(table, RULES[0], here, np.ones((len(here), 3), np.float32))
    with pytest.raises(ValueError, match=r"buckets \[0, 128\)"):
        push(table, RULES[0], ids, np.ones((100, 3), np.float32))
    with pytest.raises(ValueError, match=r"buckets \[0, 128\)"):
        pull(table, ids, 3)
    assert sorted(dump(table)) == here.tolist()


# ---- arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 0}, {"dim": 65_537}, {"optimizer": "rmsprop"}, {"initial_slots": []}, {"initial_slots": [0.0, 0.0]},
        {"initial_slots": [np.nan]}, {"initial": "zeros"}, {"scale": np.inf}, {"admit_after": 0}, {"admit_after": 1 << 21},
        {"expire_steps": -1}, {"expire_s": -1.0}, {"expire_s": np.nan}, {"expire_steps": 1, "expire_s": 1.0}, {"decay": 0.0},
        {"decay": 1.1}, {"budget_bytes": -1}, {"budget_bytes": 10_000}, {"when_full": "grow"}, {"evict": "fifo"},
        {"buckets": (0, 257)}, {"buckets": (3, 3)}, {"stripes": 0}, {"stripes": 48}, {"stripes": 128}, {"threads": 0}, {"level": "mmx"},
    ],
    ids=repr,
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    make: Any = _kernels.Table
    with pytest.raises(ValueError, match="Expected"):
        make(**{"dim": 4, "optimizer": "rowwise_adagrad", "initial_slots": [0.0]} | options)


def track_many(table: _kernels.Table, count: int) -> None:
    for i in range(count):
        table.track(str(i))


def test_arguments_that_do_not_fit_change_nothing() -> None:
    table = make_table(RULES[2], 3, expire_s=10.0, budget_bytes=250_000, stripes=8)
    ids, rows, row = np.arange(4), np.ones((4, 3), np.float32), np.array(RULES[2].row(RULES[2].scalars(), 1))
    counts, seen, full = np.ones(4, np.float32), np.ones(4, np.int64), np.ones((4, 4), np.float32)
    table.track("a")
    table.push(ids, rows, row, step=3, now=1.0)
    table.changes("a")
    before = dump(table), table.stats()
    out = np.full((4, 3), 7, np.float32)
    many = np.arange(1_000_000)
    wrong: list[Any] = [
        lambda: table.pull(ids.astype(np.float64), out, touch=True, now=1.0),
        lambda: table.pull(ids.astype(np.int32), out, touch=True, now=1.0),
        lambda: table.pull(ids, out[:3], touch=True, now=1.0),
        lambda: table.pull(ids, out[:, :2].copy(), touch=True, now=1.0),
        lambda: table.pull(ids, out.astype(np.float64), touch=True, now=1.0),
        lambda: table.pull(ids[::2], out[:2], touch=True, now=1.0),
        lambda: table.pull(ids, out, touch=True, now=-1.0),
        lambda: table.pull(ids, out, touch=True, now=np.nan),
        lambda: table.push(ids, rows[:3], row, step=4, now=1.0),
        lambda: table.push(ids, rows, row[:2].copy(), step=4, now=1.0),
        lambda: table.push(ids, rows, np.full(3, np.nan), step=4, now=1.0),
        lambda: table.push(ids, rows, row, step=2, now=1.0),
        lambda: table.push(ids, rows, row, step=0, now=1.0),
        lambda: table.push(ids, rows, row, step=1 << 32, now=1.0),
        lambda: table.push(many, np.ones((len(many), 3), np.float32), row, step=4, now=1.0),
        lambda: table.put(ids, rows, counts, seen, step=4, now=1.0),
        lambda: table.put(ids, full, -counts, seen, step=4, now=1.0),
        lambda: table.put(ids, full, counts * np.float32(np.nan), seen, step=4, now=1.0),
        lambda: table.put(ids, full, counts, -seen, step=4, now=1.0),
        lambda: table.delete(ids.astype(np.uint64)),
        lambda: table.export(-1),
        lambda: table.export(1 << 62),
        lambda: table.export(0, 0),
        lambda: table.changes("b"),
        lambda: table.changes("a", 0),
        lambda: table.untrack("b"),
        lambda: table.track(""),
        lambda: track_many(table, 8),
        lambda: _kernels.unique(ids, 0),
        lambda: _kernels.unique(ids, 257),
        lambda: _kernels.sum_rows(rows, np.array([0, 1, 2, 4], np.int32), out),
        lambda: _kernels.sum_rows(rows, np.array([0, 1, 2, -1], np.int32), out),
        lambda: _kernels.sum_rows(rows[:3], np.zeros(4, np.int32), out),
        lambda: _kernels.sum_rows(rows, np.zeros(4, np.int32), out, sources=np.full(4, 4, np.int32)),
        lambda: _kernels.sum_rows(rows, np.zeros(4, np.int32), out, weights=np.ones(3, np.float32)),
        lambda: _kernels.sum_rows(out, np.zeros(4, np.int32), out),
        lambda: _kernels.take_rows(rows, np.array([0, 1, 2, 4], np.int32), out),
        lambda: _kernels.take_rows(rows, np.zeros(3, np.int32), out),
        lambda: _kernels.find_bad(rows.astype(np.float64)),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"Expected|overlaps"):
            call()
    assert (out == 7).all()
    assert (dump(table), table.stats()) == before
    assert [len(part) for part in table.changes("a")[:5]] == [0] * 5


# ---- against a plain dict ------------------------------------------------------------------------------------

POOL = np.concatenate([EXTREME, np.arange(2, 90)])


def smallest_budget(**options: Any) -> int:
    """Return a budget in bytes that a table is just content with."""
    budget = 5_000
    while True:
        try:
            _kernels.Table(**options, budget_bytes=budget)
        except ValueError:
            budget += budget // 50
        else:
            return budget


class Row:
    def __init__(self, values: Array, count: int, last: int) -> None:
        self.values, self.count, self.last = values, count, last  # value and state; sixteenths; steps or seconds

    def key(self) -> bytes:
        return self.values.tobytes() + np.float32(self.count / 16).tobytes() + np.int64(self.last).tobytes()


class TableMachine(RuleBasedStateMachine):
    """A table of two stripes, and dicts that do the same. Whom the table evicts, the model learns from the delta stream."""

    folder = ""

    @initialize(
        adagrad=st.booleans(),
        admit_after=st.integers(1, 3),
        expiry=st.sampled_from([{}, {"expire_steps": 4}, {"expire_s": 6.0}]),
        decay=st.sampled_from([1.0, 0.7]),
        full=st.sampled_from(["", "evict lru", "evict lfu", "spill lru", "spill lfu"]),
        more_bytes=st.integers(0, 4_000),
    )
    def create(
        self, adagrad: bool, admit_after: int, expiry: dict[str, Any], decay: float, full: str, more_bytes: int
    ) -> None:
        self.optimizer = optim.Adagrad(lr=0.25) if adagrad else optim.SGD(lr=0.25)
        self.admit_after, self.decay, self.by_time = admit_after, decay, "expire_s" in expiry
        self.expire_after = int(sum(expiry.values())) or None
        self.spills = full.startswith("spill")
        self.dim = 300 if self.spills else 3  # wide rows: so that few are many
        slots = self.optimizer.row_slots(self.dim)
        options: dict[str, Any] = {
            "dim": self.dim,
            "optimizer": self.optimizer.kind,
            "initial_slots": slots,
            "scale": 1.0,
        }
        self.empty = _kernels.Table(**options)
        options |= {"admit_after": admit_after, "decay": decay, "stripes": 2} | expiry
        if full:
            when_full, evict = full.split()
            options |= {"when_full": when_full, "evict": evict, "spill_folder": self.folder}
            options["budget_bytes"] = smallest_budget(**options) + more_bytes + 40_000 * self.spills
        self.budget = int(options.get("budget_bytes", 0))
        self.table = _kernels.Table(**options)
        self.table.track("model")
        self.rows: dict[int, Row] = {}
        self.counts: dict[int, list[int]] = {}  # of ids without a row: sixteenths, last seen
        self.replica: dict[int, bytes] | None = None
        self.step, self.now = 1, 0
        self.is_warming = False
        self.written: set[int] = set()  # since the last changes
        self.created: set[int] = set()

    # The model.

    @property
    def clock(self) -> int:
        return self.now if self.by_time else self.step

    def has_expired(self, last: int) -> bool:
        return self.expire_after is not None and self.clock - last > self.expire_after

    def fresh(self, i: int) -> Array:
        return np.concatenate(
            (pull(self.empty, np.array([i]), self.dim)[0], np.array(self.optimizer.row_slots(self.dim), np.float32))
        )

    def advance(self, steps: int, seconds: int) -> None:
        for _ in range((self.step + steps) // 1000 - self.step // 1000 if self.decay < 1.0 else 0):
            for row in self.rows.values():
                row.count = int(row.count * self.decay)
            for counts in self.counts.values():
                counts[0] = int(counts[0] * self.decay)
        self.step += steps
        self.now += seconds

    def see(self, i: int, gradient: Array) -> None:
        """A push of one id."""
        if i in self.rows and self.has_expired(self.rows[i].last):
            del self.rows[i]
        if i not in self.rows:
            counts = self.counts.get(i, [0, 0])
            if self.has_expired(counts[1]):
                counts[0] = 0
            self.counts[i] = [counts[0] + 16, self.clock]
            if self.counts[i][0] < 16 * self.admit_after:
                return
            self.rows[i] = Row(self.fresh(i), self.counts.pop(i)[0] - 16, 0)
            self.created.add(i)
        row = self.rows[i]
        row.count, row.last = min(row.count + 16, (1 << 24) - 1), max(row.last, self.clock)
        w, lr = row.values[: self.dim], np.float32(0.25)
        if self.optimizer.kind == "sgd":
            w -= lr * gradient
        else:
            row.values[self.dim :] += gradient * gradient
            w -= lr * gradient / (np.sqrt(row.values[self.dim :]) + np.float32(1e-10))
        self.written.add(i)

    def take_forgotten(self, i: int, there: set[int]) -> None:
        """The counters of ids without a row are bounded, too: what the model has counted is the most that it may be."""
        if i in there:
            self.rows[i].count = int(np.frombuffer(dump(self.table)[i][-12:-8], np.float32)[0] * 16)
        else:
            self.rows.pop(i, None)
            self.counts[i] = [16 * self.admit_after, self.clock]

    def take_changes(self, batch: Array, gradients: Array | None) -> None:
        """Bring the model up to what went beyond it: evictions, and the expired, whom `changes` sweeps away."""
        ids, rows, counts, last_seen, gone, step, restart, more = self.table.changes("model")
        assert not more
        there, deleted = set(ids.tolist()), set(gone.tolist())
        if restart:  # the log was too short: what there is is complete, so who is not there, or is not as he should be, was deleted
            now = dump(self.table)
            assert now.keys() == there
            deleted = {i for i, row in self.rows.items() if i not in there or (i in batch and now[i] != row.key())}
            self.written |= there
        if self.budget == 0 or self.spills:
            for i in deleted:
                assert i not in self.rows or self.has_expired(self.rows[i].last) or i in self.written
        for i in [i for i, row in self.rows.items() if self.has_expired(row.last)]:
            assert i in deleted
            del self.rows[i]
        for n, i in enumerate(batch.tolist()):
            if i in deleted and i in self.rows and gradients is not None:
                del self.rows[i]  # evicted before it was this one's turn, and it came back; or after
                if i in there:
                    self.see(i, gradients[n])
        for i in deleted:
            if i not in there:
                self.rows.pop(i, None)
        if self.budget and self.admit_after > 1 and gradients is not None:
            for i in self.created & set(batch.tolist()):
                self.take_forgotten(i, there)
        assert there == {i for i in self.written if i in self.rows}
        assert {
            int(i): row.tobytes() + count.tobytes() + last.tobytes()
            for i, row, count, last in zip(ids, rows, counts, last_seen, strict=True)
        } == {i: self.rows[i].key() for i in there}
        assert step == self.table.stats()["step"]
        self.written.clear()
        self.created.clear()

    # What happens.

    batches = st.lists(st.sampled_from(POOL.tolist()), unique=True, max_size=60)

    @rule(batch=batches, steps=st.sampled_from([0, 1, 1, 2, 700]), seconds=st.integers(0, 3), seed=st.integers(0, 99))
    def push(self, batch: list[int], steps: int, seconds: int, seed: int) -> None:
        gradients = np.random.default_rng(seed).integers(-8, 9, (len(batch), self.dim)).astype(np.float32)
        self.advance(steps, seconds)
        # With admission, whether an id that was evicted came back in the same push is not to be seen: one at a time.
        limit = 5 if self.spills else self.table.stats()["rows_max"] or 99
        size = 1 if self.budget and self.admit_after > 1 else limit
        for at in range(0, max(len(batch), 1), size):
            ids, part = np.array(batch[at : at + size], np.int64), gradients[at : at + size]
            push(self.table, self.optimizer, ids, part, self.step, self.now)
            for i, gradient in zip(ids.tolist(), part, strict=True):
                self.see(i, gradient)
            self.take_changes(ids, part)

    @rule(batch=batches, touch=st.booleans(), seconds=st.integers(0, 3), prefetch=st.booleans())
    def pull(self, batch: list[int], touch: bool, seconds: int, prefetch: bool) -> None:
        self.advance(0, seconds)
        ids = np.array(batch + batch[:5], np.int64)
        got = pull(self.table, ids, self.dim, touch=touch, now=self.now, prefetch=prefetch)
        for i, row in zip(ids.tolist(), got, strict=True):
            known = self.rows.get(i)
            if known is None or self.has_expired(known.last):
                assert row.tobytes() == self.fresh(i)[: self.dim].tobytes()
            else:
                assert row.tobytes() == known.values[: self.dim].tobytes()
                known.last = max(known.last, self.clock) if touch else known.last

    @precondition(lambda self: self.spills)
    @rule(batch=batches)
    def prefetch(self, batch: list[int]) -> None:
        self.table.prefetch(np.array(batch, np.int64))
        self.is_warming = True  # from now on rows may move at any time

    @rule(batch=batches)
    def delete(self, batch: list[int]) -> None:
        count = self.table.delete(np.array(batch, np.int64))
        assert count == sum(i in self.rows for i in batch)
        for i in batch:
            self.rows.pop(i, None)
            self.counts.pop(i, None)
        self.take_changes(np.empty(0), None)

    @rule(batch=st.lists(st.sampled_from(POOL.tolist()), unique=True, max_size=4), seed=st.integers(0, 99))
    def put(self, batch: list[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        rows = rng.uniform(0.0, 1.0, (len(batch), len(self.fresh(0)))).astype(np.float32)
        counts, seen = rng.integers(0, 50, len(batch)), np.full(len(batch), self.clock)
        for i, row, count, last in zip(batch, rows, counts.tolist(), seen.tolist(), strict=True):
            one = np.array([i])
            self.table.put(
                one, row[None], np.array([count / 16], np.float32), np.array([last]), step=self.step, now=self.now
            )
            self.rows[i] = Row(row.copy(), count, last)
            self.counts.pop(i, None)
            self.written.add(i)
            self.take_changes(np.empty(0), None)

    @rule(steps=st.integers(0, 3), seconds=st.integers(0, 3))
    def sweep(self, steps: int, seconds: int) -> None:
        self.advance(steps, seconds)
        gone = self.table.sweep(step=self.step, now=self.now)
        assert gone == sum(self.has_expired(row.last) for row in self.rows.values())
        self.take_changes(np.empty(0), None)

    @rule(limit=st.sampled_from([1, 5, 1 << 62]), whole=st.booleans())
    def follow(self, limit: int, whole: bool) -> None:
        """A second consumer, who asks now and then."""
        if self.replica is None:
            self.replica = {}
            self.table.track("replica")
        self.rows = {
            i: row for i, row in self.rows.items() if not self.has_expired(row.last)
        }  # they are swept away now
        more = True
        while more:
            ids, rows, _, _, deleted, _, restart, more = self.table.changes("replica", limit)
            if restart:
                self.replica.clear()
            for i in deleted.tolist():
                self.replica.pop(i, None)
            self.replica.update({int(i): row.tobytes() for i, row in zip(ids, rows, strict=True)})
            if not whole:
                return
        assert self.replica == {i: row.values.tobytes() for i, row in self.rows.items()}

    @precondition(lambda self: self.replica is not None)
    @rule()
    def stop_following(self) -> None:
        self.table.untrack("replica")
        self.replica = None

    @invariant()
    def is_the_same(self) -> None:
        if not hasattr(self, "table"):
            return
        expected = {i: row.key() for i, row in self.rows.items() if not self.has_expired(row.last)}
        assert dump(self.table) == expected
        if not self.is_warming:
            assert dump(self.table, 3) == expected
        if self.budget:
            assert self.table.bytes <= self.budget
        stats = self.table.stats()
        assert stats["rows"] + stats["spilled_rows"] >= len(expected)


def test_a_table_does_what_plain_dicts_do(tmp_path: Path) -> None:
    TableMachine.folder = str(tmp_path)
    run_state_machine_as_test(
        TableMachine, settings=settings(derandomize=True, deadline=None, max_examples=100, stateful_step_count=30)
    )


# ---- the budget ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evict", ["lru", "lfu"])
@pytest.mark.parametrize("admit_after", [1, 2])
def test_the_budget_is_never_exceeded(evict: str, admit_after: int) -> None:
    """New ids, old ids, all ids of one stripe, imports, deletions, followers who do not ask; checked after every call."""
    rng = np.random.default_rng(5)
    budget = 1_500_000
    options = {"budget_bytes": budget, "evict": evict, "admit_after": admit_after, "decay": 0.9, "expire_steps": 60}
    table = make_table(RULES[2], 12, threads=2, **options)
    limit = table.stats()["rows_max"]
    assert budget / limit < 1.6 * (16 + 13 * 4)
    skewed = np.array([i for i in range(100_000) if mix64(i) % 64 == 7])
    step, most = 1, 0
    for turn in range(400):
        kind = turn % 8
        if kind == 5:
            ids = rng.choice(skewed, 800, replace=False)
        elif kind == 6:
            ids = np.arange(turn * 10_000, turn * 10_000 + limit)
        else:
            ids = rng.choice(3 * limit, int(rng.integers(1, limit // 3)), replace=False)
        values = np.ones((len(ids), 13), np.float32)
        if kind == 7:
            table.delete(ids)
        elif kind == 4:
            table.put(ids, values, values[:, 0].copy(), np.full(len(ids), step), step=step, now=0.0)
        else:
            for _ in range(admit_after):
                push(table, RULES[2], ids, values[:, :12].copy(), step)
        table.sweep(step=step, now=0.0)
        if turn % 50 == 20:
            table.track(f"follower {turn % 200}")
        most = max(most, table.bytes)
        assert most <= budget
        step += int(rng.integers(0, 30))
    stats = table.stats()
    assert most > 0.8 * budget
    assert stats["evicted"] > 1_000
    assert stats["expired"] > 1_000
    assert len(dump(table)) <= stats["rows"] <= limit


def test_the_least_recently_used_and_the_least_frequently_used_go_first() -> None:
    """Of rows drawn at random: so nearly all of the old, or the rare, and hardly any of the others."""
    for evict in ("lru", "lfu"):
        table = make_table(RULES[0], 4, budget_bytes=1 << 20, evict=evict)
        limit = table.stats()["rows_max"]
        kept, gone = np.arange(limit // 3), np.arange(limit, limit + limit // 3)
        for step in range(1, 6):
            push(table, RULES[0], kept, np.ones((len(kept), 4), np.float32), step)
        push(table, RULES[0], gone, np.ones((len(gone), 4), np.float32), 6)
        if evict == "lru":  # a pull counts as seen
            push(table, RULES[0], gone[:0], np.ones((0, 4), np.float32), 7)
            pull(table, kept, 4, touch=True)
        fresh = np.arange(2 * limit, 2 * limit + limit // 2)
        for part in np.array_split(fresh, 10):
            push(table, RULES[0], part, np.ones((len(part), 4), np.float32), 8)
        rows = dump(table)
        assert sum(i in rows for i in kept.tolist()) > 0.9 * len(kept)


def test_memory_grows_with_the_rows() -> None:
    """Without a budget, from 200,000 rows on: at most 15 % above value, state and 16 bytes a row."""
    table = make_table(RULES[2], 16, threads=2)
    gradients = np.ones((50_000, 16), np.float32)
    for at in range(0, 1_000_000, 50_000):
        push(table, RULES[2], np.arange(at, at + 50_000), gradients)
        if at >= 150_000:
            assert table.bytes <= 1.15 * (at + 50_000) * (16 * 4 + 4 + 16)


def test_rows_stay_the_same_when_their_addresses_run_out() -> None:
    """Two stripes of 2 MB each at first, 20 MB at last: what is in use moves, in small pages and in huge ones; rows keep what they hold."""
    table, dim = make_table(RULES[0], 500, stripes=2, threads=2), 500
    initial = np.arange(20_000)
    expected = pull(table, initial, dim)
    for at in range(0, 20_000, 900):
        ids = initial[at : at + 900]
        gradients = np.repeat((ids % 7).astype(np.float32)[:, None], dim, axis=1)
        push(table, optim.SGD(lr=0.5), ids, gradients)
        expected[ids] -= np.float32(0.5) * gradients
        asked = initial[: at + 900 : 50].copy()
        assert pull(table, asked, dim).tobytes() == expected[asked].tobytes()
    assert pull(table, initial, dim).tobytes() == expected.tobytes()
    assert table.stats()["rows"] == 20_000


def test_a_follower_who_asks_too_late_starts_over() -> None:
    table = make_table(RULES[0], 4, budget_bytes=1 << 20)
    limit = table.stats()["rows_max"]
    ones = np.ones((limit // 2, 4), np.float32)
    table.track("late")
    assert table.changes("late")[6], "the first time"
    for at in range(0, 20 * limit, limit // 2):
        push(table, RULES[0], np.arange(at, at + limit // 2), ones)
    ids, rows, _, _, deleted, _, restart, more = table.changes("late")
    assert restart
    assert not more
    assert len(deleted) == 0
    assert {int(i): row.tobytes() for i, row in zip(ids, rows, strict=True)} == {
        i: whole[:16] for i, whole in dump(table).items()
    }


# ---- spilling ------------------------------------------------------------------------------------------------

HERE = np.arange(100_000)
BUDGET = 2_500_000


def spilling_table(folder: Path, budget: int = BUDGET, **options: Any) -> _kernels.Table:
    options = {"stripes": 16, "budget_bytes": budget, "when_full": "spill", "spill_folder": str(folder)} | options
    return make_table(RULES[2], 12, **options)


def fill(table: _kernels.Table, count: int, batch: int = 5_000) -> None:
    """Push every one of the first `count` ids once."""
    for at in range(0, count, batch):
        push(table, RULES[2], HERE[at : at + batch], np.ones((batch, 12), np.float32))


@pytest.mark.parametrize("evict", ["lru", "lfu"])
def test_rows_on_disk_are_the_same_rows(tmp_path: Path, evict: str) -> None:
    """Against a table that has room for all: pushes, both kinds of pulls, deletions, expiry, decay, a follower; budget kept."""
    options: dict[str, Any] = {"decay": 0.8, "expire_steps": 900}
    table = spilling_table(tmp_path, evict=evict, threads=2, **options)
    twin = make_table(RULES[2], 12, **options)
    table.track("replica")
    rng = np.random.default_rng(0)
    replica: dict[int, bytes] = {}
    step = 1
    for turn in range(60):
        step += int(rng.integers(0, 40))
        ids = HERE[rng.choice(60_000, 5_000, replace=False)]
        gradients = rng.standard_normal((5_000, 12)).astype(np.float32)
        for each in (table, twin):
            push(each, RULES[2], ids, gradients, step)
        asked, touch = HERE[rng.choice(60_000, 9_000)], turn % 2 == 0
        assert pull(table, asked, 12, touch=touch).tobytes() == pull(twin, asked, 12, touch=touch).tobytes()
        if turn % 10 == 5:
            assert table.delete(asked[:500]) == twin.delete(asked[:500])
        if turn % 7 == 3:
            table.prefetch(asked)
        if turn % 20 == 10:
            more = True
            while more:
                written, rows, _, _, deleted, _, restart, more = table.changes("replica", 20_000)
                if restart:
                    replica.clear()
                for i in deleted.tolist():
                    replica.pop(i, None)
                replica |= {int(i): row.tobytes() for i, row in zip(written, rows, strict=True)}
            assert replica == {i: whole[: 13 * 4] for i, whole in dump(twin).items()}
        assert table.bytes <= BUDGET
    stats = table.stats()
    assert stats["spilled"] > 50_000
    assert stats["loaded"] > 50_000
    assert stats["spilled_bytes"] < 3 * stats["spilled_rows"] * 68 + (8 << 20), "the file does not grow for ever"
    assert dump(table) == dump(twin)
    table.sweep(step=step + 2_000, now=0.0)
    table.changes("replica")
    assert dump(table) == {}
    assert table.stats()["spilled_rows"] == 0


def test_a_spilled_row_costs_little_memory(tmp_path: Path) -> None:
    """11 bytes in a large table; here also what a small one rounds up to."""
    table = spilling_table(tmp_path, budget=3_000_000)
    before = table.bytes
    fill(table, 100_000)
    stats = table.stats()
    assert stats["rows"] + stats["spilled_rows"] == 100_000
    assert stats["spilled_rows"] > 60_000
    assert table.bytes <= 3_000_000
    assert table.bytes - before - stats["rows"] * (16 + 13 * 4) < 18 * stats["spilled_rows"]


def test_what_is_asked_for_ahead_comes_into_memory(tmp_path: Path) -> None:
    table = spilling_table(tmp_path)
    fill(table, 90_000)
    wanted, before = HERE[:3_000], dump(table)
    table.prefetch(wanted)
    limit = time.monotonic() + 30
    while table.stats()["loaded"] < 2_000:
        assert time.monotonic() < limit
        os.sched_yield()
    assert pull(table, wanted, 12).tobytes() == b"".join(before[i][:48] for i in wanted.tolist())
    del table  # the thread that brings them in ends


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    """A limit of a file's size stands for the disk's: the system refuses room in the same place."""
    table = spilling_table(tmp_path)
    ones = np.ones((5_000, 12), np.float32)
    at = 0
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, old[1]))
    try:
        with pytest.raises(OSError, match="Cannot make room on the disk for rows") as caught:  # noqa: PT012
            while at < 95_000:
                push(table, RULES[2], HERE[at : at + 5_000], ones, at + 1)
                at += 5_000
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert at > 40_000
        rows = dump(table)
        assert sorted(rows) == HERE[:at].tolist()
        with pytest.raises(OSError, match="Cannot make room"):
            push(table, RULES[2], HERE[at : at + 5_000], ones, at + 1)
        assert dump(table) == rows
        asked = HERE[:at]
        assert pull(table, asked, 12).tobytes() == b"".join(rows[i][:48] for i in asked.tolist())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    push(table, RULES[2], HERE[at : at + 5_000], ones, at + 1)
    assert sorted(dump(table)) == HERE[: at + 5_000].tolist()


def test_rows_that_cannot_be_read_back_are_an_error_and_the_others_are_as_they_were(tmp_path: Path) -> None:
    """The file is cut off behind the table's back: what a disk that fails answers, too, is no row."""
    table = spilling_table(tmp_path)
    fill(table, 60_000)
    before = dump(table)
    cut_off_spilled(tmp_path)
    lost, kept = list[tuple[int, int | None]](), list[int]()
    for some in HERE[:60_000:97].tolist():
        ids = np.array([some])
        try:
            row = pull(table, ids, 12)
        except OSError as error:
            lost.append((some, error.errno))
        else:
            assert row.tobytes() == before[some][:48]
            kept.append(some)
    assert min(len(lost), len(kept)) > 50
    assert {code for _, code in lost} == {errno.EIO}
    with pytest.raises(OSError, match="Cannot read spilled rows"):
        push(table, RULES[2], np.array([lost[0][0], *kept]), np.ones((1 + len(kept), 12), np.float32), 2)
    for some in kept:
        assert pull(table, np.array([some]), 12).tobytes() == before[some][:48]
    push(table, RULES[2], np.array(kept), np.ones((len(kept), 12), np.float32), 2)


def test_spilling_needs_a_folder_and_a_budget(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Cannot make a file to spill to") as caught:
        spilling_table(tmp_path / "nowhere")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(ValueError, match="one missing"):
        spilling_table(tmp_path, budget=0)
    with pytest.raises(ValueError, match="one missing"):
        make_table(RULES[0], 3, when_full="spill", budget_bytes=1 << 24)
    spilling_table(tmp_path)
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_more_rows_than_fit_in_memory_are_refused_in_a_push_and_pulled_in_turns(tmp_path: Path) -> None:
    table = spilling_table(tmp_path)
    fill(table, 60_000)
    before, ids = dump(table), HERE[:60_000]
    with pytest.raises(ValueError, match="raise the budget or send smaller batches"):
        push(table, RULES[2], ids, np.ones((60_000, 12), np.float32))
    assert dump(table) == before
    assert pull(table, ids, 12, touch=True).tobytes() == b"".join(before[i][:48] for i in ids.tolist())
    assert table.bytes <= BUDGET


# ---- snapshots -----------------------------------------------------------------------------------------------


class Snapshot:
    """What changes of a table from the beginning on; and a table made of it."""

    def __init__(self, table: _kernels.Table) -> None:
        self.table, self.restarts = table, -1  # the first is none
        self.answers: list[tuple[Array, Array, Array, Array, Array, int]] = []
        table.track("snapshot")

    def take(self, limit: int = 1 << 62) -> bool:
        ids, rows, counts, last_seen, deleted, step, restart, more = self.table.changes("snapshot", limit)
        if restart:
            self.answers.clear()
            self.restarts += 1
        self.answers.append((deleted, ids, rows, counts, last_seen, step))
        return more

    def restore(self, table: _kernels.Table, now: float) -> None:
        for deleted, ids, rows, counts, last_seen, step in self.answers:
            table.delete(deleted)
            table.put(ids, rows, counts, last_seen, step=max(step, 1), now=now)
        assert table.stats()["evicted"] == 0


SNAPSHOT_TABLES: dict[str, dict[str, Any]] = {
    "grows": {"admit_after": 2},
    "lru": {"budget_bytes": 900_000},
    "lfu": {"budget_bytes": 900_000, "evict": "lfu"},
    "spills": {"budget_bytes": 1_400_000, "when_full": "spill"},
    "spills lfu": {"budget_bytes": 1_400_000, "when_full": "spill", "evict": "lfu"},
}


@pytest.mark.parametrize("kind", SNAPSHOT_TABLES)
def test_a_snapshot_is_the_table_however_it_changed_meanwhile(kind: str, tmp_path: Path) -> None:
    """Pushes of old and new ids, deletions, expiry, decay, evictions, spilling and loading between any two answers."""
    figures = dict.fromkeys(("evicted", "expired", "deleted", "spilled", "loaded", "restarted"), 0)
    kept = 0
    for seed in range(9):
        rng = np.random.default_rng(seed)
        touches = seed % 3 == 0
        expiries: list[dict[str, Any]] = [{}, {"expire_steps": 40}, {"expire_s": 50.0}]
        options = (
            SNAPSHOT_TABLES[kind] | expiries[seed % 3] | {"stripes": 16, "decay": 0.8, "spill_folder": str(tmp_path)}
        )
        table = make_table(RULES[2], 12, **options)
        step, now, space = 1, 1_000.0, int(rng.choice([4_000, 20_000]))

        def change(
            table: _kernels.Table = table,
            rng: np.random.Generator = rng,
            touches: bool = touches,
            options: Any = options,
        ) -> None:
            nonlocal step, now, space
            turn = rng.integers(0, 8)
            ids = HERE[rng.choice(space, int(rng.integers(1, 1_500)), replace=False)]
            if turn < 4:
                step, now = (
                    step + int(rng.choice([0, 1, 3, 300], p=[0.3, 0.3, 0.37, 0.03])),
                    now + float(rng.integers(0, 4)),
                )
                push(table, RULES[2], ids, rng.standard_normal((len(ids), 12)).astype(np.float32), step, now)
            elif turn == 4:
                space = min(space + 800, len(HERE))
            elif turn == 5:
                table.delete(ids[:200])
            elif turn == 6:
                step += (
                    0 if "expire_steps" in options else int(rng.choice([0, 600]))
                )  # counts decay, and nobody looks at them
                table.sweep(step=step, now=now)
            else:
                pull(table, ids[:800], 12, touch=touches, now=now)

        for _ in range(40):
            change()
        snapshot = Snapshot(table)
        ahead, asked = int(rng.choice([1, 3])), 0
        while snapshot.take(int(rng.integers(1, 1_200))) or asked < 20:
            asked += 1
            for _ in range(ahead if asked < 60 else 0):
                change()
        expected = dump(table)
        fresh = make_table(RULES[2], 12, **options)
        snapshot.restore(fresh, now)
        found = dump(fresh)
        kept += len(expected)
        assert found.keys() == expected.keys(), f"seed {seed}"
        to = -8 if touches else None  # pulls make rows seen, and nothing else
        assert all(found[i][:to] == expected[i][:to] for i in expected), f"seed {seed}"
        figures = {name: figures[name] + table.stats().get(name, snapshot.restarts > 0) for name in figures}
    assert kept > 1_000
    assert figures["expired"] > 100
    assert figures["deleted"] > 100
    assert figures["restarted"] <= 6
    assert (figures["evicted"] > 1_000) == (kind in ("lru", "lfu"))
    assert (min(figures["spilled"], figures["loaded"]) > 1_000) == kind.startswith("spills")


@pytest.mark.parametrize("kind", ["grows", "lru", "spills"])
def test_a_snapshot_is_made_while_others_use_the_table(kind: str, tmp_path: Path) -> None:
    options = SNAPSHOT_TABLES[kind] | {"stripes": 16, "spill_folder": str(tmp_path), "admit_after": 1}
    table = make_table(RULES[2], 12, threads=2, **options)
    fill(table, 20_000, 1_000)
    is_over, failures, pushes = threading.Event(), [], [0, 0]

    def use(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            while not is_over.is_set():
                ids = HERE[rng.choice(25_000, 400, replace=False)]
                table.prefetch(ids[:200])
                push(table, RULES[2], ids, rng.standard_normal((400, 12)).astype(np.float32))
                table.delete(ids[:20])
                pull(table, ids, 12, touch=True)
                pushes[seed] += 1
        except BaseException as error:
            failures.append(error)
            raise

    users = [threading.Thread(target=use, args=(seed,)) for seed in range(2)]
    for user in users:
        user.start()
    try:
        snapshot = Snapshot(table)
        for _ in range(30):
            snapshot.take(700)
            before, limit = sum(pushes), time.monotonic() + 30
            while sum(pushes) == before:
                assert time.monotonic() < limit
                os.sched_yield()
    finally:
        is_over.set()
        for user in users:
            user.join()
    assert sum(pushes) > 10
    while snapshot.take():
        pass
    assert failures == []
    assert snapshot.restarts == 0 or kind == "lru"
    fresh = make_table(RULES[2], 12, **options)
    snapshot.restore(fresh, 0.0)
    found, expected = dump(fresh), dump(table)
    assert found.keys() == expected.keys()
    assert all(found[i][:-8] == expected[i][:-8] for i in expected)


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_changes_come_in_parts_of_the_limit_and_each_once(limit: int, tmp_path: Path) -> None:
    for table, count in ((make_table(RULES[2], 12), 2_000), (spilling_table(tmp_path), 50_000)):
        fill(table, count, 1_000)
        most = limit + 4096 // (16 + 13 * 4)  # a page of rows on disk is read as a whole
        table.track("x")
        found: list[int] = []
        more = True
        while more:
            ids, _, _, _, deleted, _, restart, more = table.changes("x", limit)
            assert restart == (found == [])
            assert len(deleted) == 0
            assert 0 < len(ids) <= most
            found += ids.tolist()
        assert sorted(found) == HERE[:count].tolist()


def test_a_consumer_who_reads_in_time_is_not_overtaken_because_of_one_who_does_not() -> None:
    """The log keeps 2,048 ids a stripe at least."""
    table = make_table(RULES[0], 1, stripes=1)
    table.track("sleeper")
    table.changes("sleeper")
    table.track("reader")
    table.changes("reader")
    for at in range(0, 20_480, 2_048):
        some = HERE[at : at + 2_048]
        push(table, RULES[0], some, np.ones((2_048, 1), np.float32))
        assert table.delete(some) == 2_048
        *_, deleted, _, restart, _ = table.changes("reader")
        assert not restart
        assert deleted.tolist() == some.tolist()
    assert table.changes("sleeper")[6]
