"""The native kernels: the same bits everywhere, bad numbers found, bad arguments refused."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater import _kernels, optim
from headwater._kernels import BLOCK

Array = npt.NDArray[Any]

LEVELS = _kernels.simd_levels()
DTYPES = ("float32", "float64", "bfloat16", "float16")
OPTIMIZERS = (
    optim.SGD(lr=0.1),
    optim.SGD(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    optim.SGD(lr=0.1, momentum=0.9, nesterov=True),
    optim.Adagrad(lr=0.1, lr_decay=0.1),
    optim.RMSprop(lr=0.01, alpha=0.9),
    optim.RMSprop(lr=0.01, alpha=0.3, momentum=0.9, centered=True),
    optim.RMSprop(lr=0.01, alpha=0.3, momentum=0.9, keras_form=True),
    optim.Adam(lr=0.01),
    optim.AdamW(lr=0.01, betas=(0.0, 0.9), amsgrad=True),
    optim.Mean(),
)
SIZE = 5 * BLOCK + 333  # elements: enough blocks for several threads, and a ragged end

deterministic = settings(derandomize=True, deadline=None, max_examples=40)
few = settings(deterministic, max_examples=15)


def master_of(wire: str) -> str:
    return "float64" if wire == "float64" else "float32"


def to_wire(values: Array, wire: str) -> Array:
    """Return float32 or float64 values as the wire dtype; bfloat16 as uint16."""
    if wire == "bfloat16":
        out = np.empty(values.shape, np.uint16)
        _kernels.convert(out, "bfloat16", np.ascontiguousarray(values, np.float32), "float32")
        return out
    return values.astype(wire)


def from_wire(values: Array, wire: str) -> Array:
    if wire == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(master_of(wire))


def make_planes(optimizer: optim.Optimizer, wire: str, size: int, seed: int = 0) -> list[Array]:
    """Return planes of random numbers, those that stand for squares not negative."""
    rng = np.random.default_rng(seed)
    master = rng.standard_normal(size).astype(master_of(wire))
    planes = [master, *(np.abs(rng.standard_normal(size)).astype(master.dtype) for _ in optimizer.slots)]
    return planes if wire == master_of(wire) else [to_wire(master, wire), *planes]


def make_commit(
    optimizer: optim.Optimizer, wire: str, size: int, count: int = 2, seed: int = 1, cuts: tuple[int, ...] = ()
) -> tuple[Array, Array, list[Array], Array]:
    """Return a commit whose runs are cut at `cuts`, each with a row of its own."""
    rng = np.random.default_rng(seed)
    edges = np.array([0, *cuts, size], np.int64)
    runs = np.stack((edges[:-1], edges[1:], np.arange(len(edges) - 1)), axis=1).copy()
    scalars = np.array([optimizer.row(optimizer.scalars(), step + 1) for step in range(len(runs))]).reshape(
        len(runs), -1
    )
    contributions = [to_wire(rng.standard_normal(size), wire) for _ in range(count)]
    return runs, scalars, contributions, rng.uniform(0.1, 1.0, (len(runs), count))


def run_apply(
    optimizer: optim.Optimizer,
    wire: str,
    source: list[Array],
    commits: list[Any],
    threads: int = 1,
    level: str = "auto",
) -> list[Array]:
    target = [np.full_like(plane, 7) for plane in source]
    before = [plane.copy() for plane in source]
    bad = _kernels.apply(optimizer.kind, optimizer.flags, wire, source, target, commits, threads=threads, level=level)
    assert bad is None
    for plane, kept in zip(source, before, strict=True):
        assert plane.tobytes() == kept.tobytes(), "the source was written"
    return target


def assert_same_bits(a: list[Array], b: list[Array]) -> None:
    assert [plane.tobytes() for plane in a] == [plane.tobytes() for plane in b]


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_every_level_and_thread_count_gives_the_same_bits(optimizer: optim.Optimizer, wire: str) -> None:
    source = make_planes(optimizer, wire, SIZE)
    commits = [make_commit(optimizer, wire, SIZE, count=3, cuts=(17, BLOCK, 3 * BLOCK + 5))]
    expected = run_apply(optimizer, wire, source, commits, threads=1, level="baseline")
    for level in LEVELS:
        for threads in (1, 2, 4):
            assert_same_bits(run_apply(optimizer, wire, source, commits, threads, level), expected)


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_commits_in_one_pass_equal_commits_one_by_one(optimizer: optim.Optimizer, wire: str) -> None:
    source = make_planes(optimizer, wire, SIZE)
    commits = [make_commit(optimizer, wire, SIZE, count=i + 1, seed=i, cuts=(100 * (i + 1),)) for i in range(3)]
    commits[1][0][0, 2] = -1  # a run that the second commit leaves alone
    one_by_one = source
    for commit in commits:
        one_by_one = run_apply(optimizer, wire, one_by_one, [commit])
    assert_same_bits(run_apply(optimizer, wire, source, commits, threads=2), one_by_one)


@pytest.mark.parametrize("wire", ["float32", "float64"])
def test_gradient_descent_is_exactly_parameter_minus_rate_times_gradient(wire: str) -> None:
    optimizer = optim.SGD(lr=0.1)
    source = make_planes(optimizer, wire, SIZE)
    commit = make_commit(optimizer, wire, SIZE)
    _, _, (g, h), coefficients = commit
    (result,) = run_apply(optimizer, wire, source, [commit])
    t = source[0].dtype.type
    a, b = (t(c) for c in coefficients[0])
    assert np.array_equal(result, source[0] - t(0.1) * (a * g + b * h))


def test_contributions_are_summed_from_the_left() -> None:
    optimizer = optim.Mean()
    values = np.random.default_rng(3).standard_normal((7, SIZE)).astype(np.float32)
    commit = (np.array([[0, SIZE, 0]]), np.zeros((1, 0)), list(values), np.ones((1, 7)))
    (result,) = run_apply(optimizer, "float32", [np.zeros(SIZE, np.float32)], [commit])
    expected = values[0]
    for value in values[1:]:
        expected = expected + value
    assert np.array_equal(result, expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3], ids="{} contributions".format)
def test_large_planes_are_written_around_the_cache_with_the_same_bits(wire: str, count: int, level: str) -> None:
    """Planes on cache lines are streamed when they are large together; planes that start elsewhere never are."""
    optimizer = optim.Adam()
    size = 1_000_000  # elements: 24 MB of planes and more
    source = make_planes(optimizer, wire, size)
    commit = make_commit(optimizer, wire, size, count=count, cuts=(37, 64, 500_000))
    results = []
    for shift in (0, 1):
        target = [mapped(plane.dtype, size + shift)[shift:] for plane in source]
        assert _kernels.apply("adam", 0, wire, source, target, [commit], threads=2, level=level) is None
        results.append(target)
    assert_same_bits(results[0], results[1])


def mapped(dtype: np.dtype[Any], size: int) -> Array:
    """Return an array that starts on a page."""
    return np.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype)


@pytest.mark.parametrize("wire", DTYPES)
def test_blocks_one_after_another_are_the_whole(wire: str) -> None:
    optimizer = optim.Adam()
    source, commit = make_planes(optimizer, wire, SIZE), make_commit(optimizer, wire, SIZE, cuts=(BLOCK + 3,))
    pieces = [np.full_like(plane, 7) for plane in source]
    edges = [0, 1, 1, 4, -(-SIZE // BLOCK)]
    for blocks in pairwise(edges):
        found = _kernels.apply("adam", 0, wire, source, pieces, [commit], threads=2, level="auto", blocks=blocks)
        assert found is None
        end = min(blocks[1] * BLOCK, SIZE)
        assert all((plane[end:] == 7).all() for plane in pieces)
    assert_same_bits(pieces, run_apply(optimizer, wire, source, [commit]))


@pytest.mark.parametrize("wire", DTYPES)
def test_untouched_runs_are_copied_through(wire: str) -> None:
    optimizer = optim.Adam()
    source = make_planes(optimizer, wire, SIZE)
    commit = make_commit(optimizer, wire, SIZE, cuts=(64, 2 * BLOCK))
    commit[0][1, 2] = -1
    commit[2][0][100] = to_wire(np.array([np.nan]), wire)[0]  # in the untouched run: not read
    result = run_apply(optimizer, wire, source, [commit], threads=2)
    for plane, kept in zip(result, source, strict=True):
        assert np.array_equal(plane[64 : 2 * BLOCK], kept[64 : 2 * BLOCK])
        assert not np.array_equal(plane[:64], kept[:64])
        assert not np.array_equal(plane[2 * BLOCK :], kept[2 * BLOCK :])


@pytest.mark.parametrize("wire", DTYPES)
def test_an_absent_contribution_is_neither_read_nor_checked(wire: str) -> None:
    optimizer = optim.Mean()
    runs, scalars, contributions, coefficients = make_commit(optimizer, wire, SIZE, count=3, cuts=(1000,))
    coefficients[0, 1] = 0.0
    whole = [c.copy() for c in contributions]
    contributions[1][:1000] = to_wire(np.array([np.inf]), wire)[0]
    source = make_planes(optimizer, wire, SIZE)
    result = run_apply(optimizer, wire, source, [(runs, scalars, contributions, coefficients)])
    t = np.dtype(master_of(wire)).type
    a, _, c = (t(x) for x in coefficients[0])
    wide = [from_wire(w, wire) for w in whole]
    assert np.array_equal(result[-1][:1000], (a * wide[0] + c * wide[2])[:1000])


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_the_wire_plane_is_the_master_rounded_to_nearest_even(wire: str) -> None:
    optimizer = optim.SGD(lr=0.5)
    result = run_apply(optimizer, wire, make_planes(optimizer, wire, SIZE), [make_commit(optimizer, wire, SIZE)])
    if wire == "float16":
        assert np.array_equal(result[0], result[1].astype(np.float16))
    else:
        assert_same_bits([result[0]], [rounded_to_bfloat16(result[1])])


def rounded_to_bfloat16(values: Array) -> Array:
    """Return the bits of finite float32 values in bfloat16, by exact arithmetic on integers."""
    bits = values.view(np.uint32).astype(np.uint64)
    low, high = bits & 0xFFFF, bits >> 16
    up = (low > 0x8000) | ((low == 0x8000) & (high & 1 == 1))
    return np.asarray(high + up).astype(np.uint16)


def test_every_float16_converts_as_numpy_does() -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    numbers = halves[~np.isnan(halves)]
    for count in (len(numbers), 5):  # whole vectors, and what is left over
        wide = np.empty(count, np.float32)
        _kernels.convert(wide, "float32", numbers[:count].copy(), "float16")
        assert_same_bits([wide], [numbers[:count].astype(np.float32)])
    back = np.empty(len(numbers), np.float16)
    _kernels.convert(back, "float16", numbers.astype(np.float32), "float32")
    assert_same_bits([back], [numbers])


@deterministic
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_float32_rounds_to_the_nearest_half(values: list[float]) -> None:
    wide = np.array(values, np.float32)
    half = np.empty(len(wide), np.float16)
    _kernels.convert(half, "float16", wide, "float32")
    with np.errstate(over="ignore", under="ignore"):
        assert_same_bits([half], [wide.astype(np.float16)])
    brain = np.empty(len(wide), np.uint16)
    _kernels.convert(brain, "bfloat16", wide, "float32")
    assert_same_bits([brain], [rounded_to_bfloat16(wide)])


def test_subnormal_halves_round_the_same_at_every_level() -> None:
    """Gradients of every float16 number, whose mean is then written as float16."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)].copy()
    size = len(finite)
    commit = (np.array([[0, size, 0]]), np.zeros((1, 0)), [finite], np.ones((1, 1)))
    source: list[Array] = [np.zeros(size, np.float16), np.zeros(size, np.float32)]
    for level in LEVELS:
        wire, master = run_apply(optim.Mean(), "float16", source, [commit], level=level)
        assert_same_bits([wire, master], [finite, finite.astype(np.float32)])


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_lowest_non_finite_element_is_found(wire: str, level: str) -> None:
    optimizer = optim.SGD(lr=0.1)
    source = make_planes(optimizer, wire, SIZE)
    clean = [make_commit(optimizer, wire, SIZE, count=3, seed=i, cuts=(500,)) for i in range(2)]

    @few
    @given(
        st.lists(
            st.tuples(
                st.integers(0, 1),
                st.integers(0, 2),
                st.integers(0, SIZE - 1),
                st.sampled_from([np.nan, np.inf, -np.inf]),
            ),
            min_size=1,
            max_size=3,
        ),
        st.sampled_from([1, 2, 4]),
    )
    def find(places: list[tuple[int, int, int, float]], threads: int) -> None:
        commits = [(r, s, [g.copy() for g in gs], c) for r, s, gs, c in clean]
        for commit, contribution, element, value in places:
            commits[commit][2][contribution][element] = to_wire(np.array([value]), wire)[0]
        target = [np.empty_like(plane) for plane in source]
        before = [plane.tobytes() for plane in source]
        found = _kernels.apply("sgd", 0, wire, source, target, commits, threads=threads, level=level)
        assert found == min(place[:3] for place in places)
        assert [plane.tobytes() for plane in source] == before

    find()


@pytest.mark.parametrize("wire", DTYPES)
def test_the_largest_finite_numbers_are_not_refused(wire: str) -> None:
    largest: float = {
        "float32": float(np.finfo(np.float32).max),
        "float64": float(np.finfo(np.float64).max),
        "bfloat16": 3.3895313892515355e38,
        "float16": 65504.0,
    }[wire]
    gradient = to_wire(np.full(1000, largest), wire)
    gradient[::2] = to_wire(np.array([-largest]), wire)[0]
    optimizer = optim.Mean()
    commit = (np.array([[0, 1000, 0]]), np.zeros((1, 0)), [gradient], np.ones((1, 1)))
    source = make_planes(optimizer, wire, 1000)
    for level in LEVELS:
        assert_same_bits(run_apply(optimizer, wire, source, [commit], level=level)[-1:], [from_wire(gradient, wire)])


def test_flushing_denormals_in_the_caller_changes_nothing() -> None:
    """A thread may have set its CPU to flush denormals (`torch.set_flush_denormal`); kernels set it back for their own time."""
    if os.uname().machine != "x86_64":
        return
    optimizer = optim.SGD(lr=1.0)
    tiny = np.full(BLOCK, 1e-40, np.float32)
    commit = (np.array([[0, BLOCK, 0]]), np.array([optimizer.row(optimizer.scalars(), 1)]), [tiny], np.ones((1, 1)))
    libm = ctypes.CDLL("libm.so.6")
    environment = (ctypes.c_uint32 * 8)()  # fenv_t on x86-64: the last word is MXCSR
    libm.fegetenv(environment)
    saved = environment[7]
    environment[7] = saved | 0x8040
    libm.fesetenv(environment)
    try:
        (result,) = run_apply(optimizer, "float32", [np.zeros(BLOCK, np.float32)], [commit])
        libm.fegetenv(environment)
        assert environment[7] & 0x8040 == 0x8040, "the caller's setting was lost"
    finally:
        environment[7] = saved
        libm.fesetenv(environment)
    assert_same_bits([result], [-tiny])


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("blocks", [None, (1, 3)])
def test_gradients_aggregated_beside_a_pass_are_those_aggregated_alone(
    wire: str, blocks: tuple[int, int] | None
) -> None:
    """And the pass is as ever."""
    commits = []
    for count in (3, 1, 2):
        runs, scalars, contributions, coefficients = make_commit(
            optim.Adam(), wire, SIZE, count=count, cuts=(10, 2 * BLOCK + 77)
        )
        runs[1, 2] = -1
        commits.append((runs, scalars, contributions, coefficients))
    master = master_of(wire)
    alone = [np.full(SIZE, 7, master) for _ in commits]
    for out, (runs, _, contributions, coefficients) in zip(alone, commits, strict=True):
        _kernels.aggregate(wire, runs, contributions, coefficients, out, threads=1, level="baseline")
    source = make_planes(optim.Adam(), wire, SIZE)
    first, limit = (0, SIZE) if blocks is None else (blocks[0] * BLOCK, min(blocks[1] * BLOCK, SIZE))
    plain: list[Array] = [plane.copy() for plane in source]
    assert _kernels.apply("adam", 0, wire, source, plain, commits, threads=1, level="auto", blocks=blocks) is None
    for level in LEVELS:
        for threads in (1, 2):
            target = [plane.copy() for plane in source]
            beside = [np.full(SIZE, 7, master) for _ in commits]
            how: dict[str, Any] = {"threads": threads, "level": level, "blocks": blocks, "aggregated": beside}
            assert _kernels.apply("adam", 0, wire, source, target, commits, **how) is None
            assert_same_bits(target, plain)
            for out, expected in zip(beside, alone, strict=True):
                assert_same_bits([out[first:limit]], [expected[first:limit]])
                assert (out[:first] == 7).all()
                assert (out[limit:] == 7).all()


def test_room_for_aggregated_gradients_is_checked() -> None:
    source, target = (make_planes(optim.SGD(), "float32", SIZE) for _ in range(2))
    commit = make_commit(optim.SGD(), "float32", SIZE, count=1)
    out = np.zeros(SIZE, np.float32)
    for aggregated, says in (
        ([], "for each of 1 commits, got 0"),
        ([out, out.copy()], "for each of 1 commits, got 2"),
        ([out[:-1]], "aggregated elements"),
        ([target[0]], "overlaps another buffer"),
        ([commit[2][0]], "overlaps another buffer"),
    ):
        with pytest.raises(ValueError, match=says):
            _kernels.apply(
                "sgd", 0, "float32", source, target, [commit], threads=1, level="auto", aggregated=aggregated
            )


@pytest.mark.parametrize("wire", DTYPES)
def test_square_sums_are_the_same_everywhere_and_close_to_numpy(wire: str) -> None:
    runs, _, contributions, coefficients = make_commit(optim.Mean(), wire, SIZE, count=3, cuts=(10, 2 * BLOCK + 77))
    runs[1, 2] = -1
    coefficients[2, 0] = 0.0
    expected = _kernels.square_sums(wire, runs, contributions, coefficients, threads=1, level="baseline")
    for level in LEVELS:
        for threads in (1, 2, 4):
            sums = _kernels.square_sums(wire, runs, contributions, coefficients, threads=threads, level=level)
            assert_same_bits([sums], [expected])
    source, target = make_planes(optim.Mean(), wire, SIZE), make_planes(optim.Mean(), wire, SIZE)
    beside = np.full(len(expected), np.nan)
    commits = [(runs, np.zeros((3, 0)), contributions, coefficients)]
    assert _kernels.apply("mean", 0, wire, source, target, commits, threads=2, level="auto", sums=beside) is None
    assert_same_bits([beside], [expected])
    gradient = np.zeros(6 * BLOCK)
    for (start, stop, row), shares in zip(runs, coefficients, strict=True):
        if row >= 0:
            gradient[start:stop] = sum(
                c * from_wire(g[start:stop], wire) for c, g in zip(shares, contributions, strict=True)
            )
    # Each element was rounded to the master dtype on the way, hence not closer than float32.
    assert np.allclose(expected, (gradient.reshape(6, BLOCK) ** 2).sum(axis=1), rtol=1e-6, atol=0)


def test_square_sums_do_not_depend_on_how_runs_are_cut() -> None:
    _, _, contributions, coefficients = make_commit(optim.Mean(), "float32", SIZE)
    whole = np.array([[0, SIZE, 0]])
    cut = np.array([[0, 13, 0], [13, BLOCK + 1, 0], [BLOCK + 1, SIZE, 0]])
    a = _kernels.square_sums("float32", whole, contributions, coefficients, threads=1, level="auto")
    b = _kernels.square_sums("float32", cut, contributions, np.repeat(coefficients, 3, axis=0), threads=2, level="auto")
    assert_same_bits([a], [b])


@pytest.mark.parametrize("size", [0, 1, 4097, 9 << 20])
def test_copy_copies(size: int) -> None:
    source = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    target = np.zeros(size + 1, np.uint8)
    _kernels.copy(target[1:], source, threads=2)
    assert np.array_equal(target[1:], source)


def test_buffers_of_other_kinds_are_taken() -> None:
    optimizer = optim.SGD(lr=0.1)
    source = make_planes(optimizer, "float32", SIZE)
    runs, scalars, contributions, coefficients = make_commit(optimizer, "float32", SIZE)
    expected = run_apply(optimizer, "float32", source, [(runs, scalars, contributions, coefficients)])
    region = mmap.mmap(-1, SIZE * 4)
    commit = (memoryview(runs), scalars, (memoryview(contributions[0]), contributions[1].view(np.uint8)), coefficients)
    assert (
        _kernels.apply("sgd", 0, "float32", (source[0].tobytes(),), [region], [commit], threads=1, level="auto") is None
    )
    assert region[:] == expected[0].tobytes()


def bad_arguments() -> Iterator[Any]:
    """Yield (what is wrong, keyword arguments that differ from good ones)."""
    f, runs, scalars, ones = np.zeros(100, np.float32), np.array([[0, 100, 0]]), np.zeros((1, 4)), np.ones((1, 1))
    fresh = np.zeros(100, np.float32)

    def commit(runs: Any = runs, scalars: Any = scalars, contributions: Any = (f,), coefficients: Any = ones) -> Any:
        return {"commits": [(runs, scalars, contributions, coefficients)]}

    yield "optimizer", {"optimizer": "lion"}
    yield "flags", {"flags": 8}
    yield "flags without momentum", {"flags": 2}
    yield "wire", {"wire": "float8"}
    yield "level", {"level": "mmx"}
    yield "no threads", {"threads": 0}
    yield "too many threads", {"threads": 10_000}
    yield "missing slot", {"flags": 1}
    yield "too many planes", {"source": [f, f], "target": [fresh, fresh.copy()]}
    yield "short source", {"source": [f[:99]]}
    yield "short target", {"target": [fresh[:99]]}
    yield "dtype of a plane", {"source": [f.astype(np.float64)]}
    yield "half an element", {"source": [np.zeros(401, np.uint8)]}
    yield "misaligned", {"source": [np.zeros(404, np.uint8)[1:401]]}
    yield "strided", {"source": [np.zeros(200, np.float32)[::2]]}
    yield "not a buffer", {"source": [3]}
    yield "not a list", {"source": f}
    yield "read-only target", {"target": [f.tobytes()]}
    yield "target is source", {"target": [f]}
    yield "no commits", {"commits": []}
    yield "blocks beyond the end", {"blocks": (0, 2)}
    yield "blocks backwards", {"blocks": (1, 0)}
    yield "sums of another size", {"sums": np.zeros(2)}
    yield "dtype of sums", {"sums": np.zeros(2, np.float32)}
    yield "a part missing", {"commits": [(runs, scalars, (f,))]}
    yield "runs too long", commit(runs=np.array([[0, 101, 0]]))
    yield "runs too short", commit(runs=np.array([[0, 99, 0]]))
    yield "runs overlap", commit(runs=np.array([[0, 60, 0], [50, 100, 0]]), coefficients=np.ones((2, 1)))
    yield "runs leave a gap", commit(runs=np.array([[0, 40, 0], [50, 100, 0]]), coefficients=np.ones((2, 1)))
    yield "run before the start", commit(runs=np.array([[-5, 100, 0]]))
    yield "run backwards", commit(runs=np.array([[0, 110, 0], [110, 100, 0]]), coefficients=np.ones((2, 1)))
    yield "empty run", commit(runs=np.array([[0, 0, 0], [0, 100, 0]]), coefficients=np.ones((2, 1)))
    yield "no runs", commit(runs=np.zeros((0, 3), np.int64), coefficients=np.ones((0, 1)))
    yield "row out of range", commit(runs=np.array([[0, 100, 1]]))
    yield "row below -1", commit(runs=np.array([[0, 100, -2]]))
    yield "dtype of runs", commit(runs=runs.astype(np.int32))
    yield "shape of runs", commit(runs=np.array([0, 100, 0]))
    yield "width of scalars", commit(scalars=np.zeros((1, 3)))
    yield "a scalar is not finite", commit(scalars=np.full((1, 4), np.nan))
    yield "a coefficient is not finite", commit(coefficients=np.full((1, 1), np.inf))
    yield "shape of coefficients", commit(coefficients=np.ones((1, 2)))
    yield "dtype of coefficients", commit(coefficients=ones.astype(np.float32))
    yield "short contribution", commit(contributions=(f[:99],))
    yield "dtype of a contribution", commit(contributions=(f.astype(np.float64),))


@pytest.mark.parametrize(("what", "changes"), list(bad_arguments()), ids=lambda x: x if isinstance(x, str) else "")
def test_arguments_that_do_not_fit_are_refused(what: str, changes: dict[str, Any]) -> None:
    f = np.zeros(100, np.float32)
    commits = [(np.array([[0, 100, 0]]), np.zeros((1, 4)), [f], np.ones((1, 1)))]
    target = np.full(100, 7, np.float32)
    arguments: dict[str, Any] = {
        "optimizer": "sgd", "flags": 0, "wire": "float32", "source": [f], "target": [target], "commits": commits,
        "threads": 1, "level": "auto",
    }  # fmt: skip
    arguments |= changes
    if what == "target is source":
        arguments["source"] = arguments["target"]
    with pytest.raises(ValueError, match=r"\."):
        _kernels.apply(**arguments)
    assert (target == 7).all(), "refused, and yet something was written"


def test_targets_that_overlap_each_other_or_a_contribution_are_refused() -> None:
    f = np.zeros(100, np.float32)
    both = np.zeros(150, np.float32)
    commits = [(np.array([[0, 100, 0]]), np.zeros((1, 4)), [f], np.ones((1, 1)))]
    with pytest.raises(ValueError, match="overlap"):
        _kernels.apply("sgd", 1, "float32", [f, f], [both[:100], both[50:]], commits, threads=1, level="auto")
    source = np.zeros(100, np.float32)
    with pytest.raises(ValueError, match="overlap"):
        _kernels.apply("sgd", 0, "float32", [source], [f], commits, threads=1, level="auto")


def test_other_functions_refuse_what_does_not_fit() -> None:
    a = np.zeros(10, np.float32)
    with pytest.raises(ValueError, match="40 bytes"):
        _kernels.copy(a, np.zeros(9, np.float32))
    with pytest.raises(ValueError, match="overlaps"):
        _kernels.copy(a[1:], a[:-1])
    with pytest.raises(ValueError, match="writable"):
        _kernels.copy(a.tobytes(), a)
    with pytest.raises(ValueError, match="10 elements"):
        _kernels.convert(np.zeros(10, np.uint16), "bfloat16", np.zeros(9, np.float32), "float32")
    with pytest.raises(ValueError, match="float32 on one side"):
        _kernels.convert(a, "float32", a.copy(), "float32")
    with pytest.raises(ValueError, match="contribution 0"):
        _kernels.square_sums("float32", np.array([[0, 11, 0]]), [a], np.ones((1, 1)), threads=1, level="auto")


def test_nothing_to_do_is_done() -> None:
    empty = np.zeros(0, np.float32)
    commit = (np.zeros((0, 3), np.int64), np.zeros((0, 4)), [empty], np.zeros((0, 1)))
    assert _kernels.apply("sgd", 0, "float32", [empty], [empty.copy()], [commit], threads=2, level="auto") is None


# Python warns of forking with threads; here they are the kernels' own, and that this works is the point.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    optimizer = optim.SGD(lr=0.1)
    source, commit = make_planes(optimizer, "float32", SIZE), make_commit(optimizer, "float32", SIZE)
    expected = run_apply(optimizer, "float32", source, [commit], threads=4)
    child = os.fork()
    if child == 0:
        try:
            assert_same_bits(run_apply(optimizer, "float32", source, [commit], threads=4), expected)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


# ---- aggregate


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_a_commit_replayed_from_its_aggregated_gradient_gives_the_same_bits(
    optimizer: optim.Optimizer, wire: str
) -> None:
    narrow = int(wire != master_of(wire))

    @few
    @given(
        st.sampled_from([1, 700, BLOCK, SIZE]),
        st.integers(0, 5),
        st.integers(0, 2**32),
        st.sampled_from(LEVELS),
        st.sampled_from([1, 2, 4]),
    )
    def replay(size: int, count: int, seed: int, level: str, threads: int) -> None:
        rng = np.random.default_rng(seed)
        cuts = tuple(sorted({int(cut) for cut in rng.integers(0, size, rng.integers(0, 4))} - {0}))
        runs, scalars, contributions, coefficients = make_commit(optimizer, wire, size, count, seed, cuts)
        runs[rng.random(len(runs)) < 0.2, 2] = -1
        coefficients[rng.random(coefficients.shape) < 0.3] = 0.0
        coefficients *= rng.choice([-1.0, 1.0, 1e-50], coefficients.shape)
        for (
            contribution
        ) in contributions:  # zeros of both signs, and numbers so small and so large that sums lose or pass them
            some = rng.random(size) < 0.2
            extremes = np.array([0.0, -0.0, 1e-40, 6e-8, 60_000.0, 3.3e38 if wire != "float16" else 1.0])
            contribution[some] = to_wire(rng.choice(extremes, size), wire)[some]
        source = make_planes(optimizer, wire, size, seed)
        with np.errstate(all="ignore"):
            expected = run_apply(
                optimizer, wire, source, [(runs, scalars, contributions, coefficients)], threads, level
            )
            total = np.full(size, 7, master_of(wire))
            _kernels.aggregate(wire, runs, contributions, coefficients, total, threads=threads, level=level)
            replayed = [np.full_like(plane, 7) for plane in source[narrow:]]
            found = _kernels.apply(
                optimizer.kind,
                optimizer.flags,
                master_of(wire),
                source[narrow:],
                replayed,
                [(runs, scalars, [total], np.ones((len(runs), 1)))],
                threads=threads,
                level=LEVELS[seed % len(LEVELS)],
                check=False,
            )
        assert found is None
        assert_same_bits(replayed, expected[narrow:])
        touched = np.zeros(size, bool)
        for (start, stop, row), shares in zip(runs, coefficients, strict=True):
            touched[start:stop] = row >= 0
            if row < 0 or not shares.any():
                assert total[start:stop].tobytes() == bytes(total[start:stop].nbytes)
        if narrow:
            rounded = np.empty_like(expected[0])
            _kernels.convert(rounded, wire, replayed[0], "float32")
            assert_same_bits([rounded[touched]], [expected[0][touched]])

    replay()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("wire", DTYPES)
def test_an_aggregated_gradient_written_around_the_cache_has_the_same_bits(wire: str, level: str) -> None:
    size = 2_200_000 // (1 + (wire == "float64"))
    for count in (1, 2, 3):
        runs, _, contributions, coefficients = make_commit(
            optim.Mean(), wire, size, count, cuts=(37, 64, 500_000, 500_500)
        )
        runs[1, 2] = -1
        coefficients[3] = 0.0
        source = make_planes(optim.Mean(), wire, size)
        expected = run_apply(
            optim.Mean(), wire, source, [(runs, np.zeros((len(runs), 0)), contributions, coefficients)], threads=2
        )[-1]
        expected[37:64] = 0.0
        for shift in (0, 1):
            out = mapped(np.dtype(master_of(wire)), size + shift)[shift:]
            _kernels.aggregate(wire, runs, contributions, coefficients, out, threads=2, level=level)
            assert_same_bits([out], [expected])


def test_a_replay_takes_what_has_overflowed() -> None:
    largest = np.full(5000, np.finfo(np.float32).max, np.float32)
    runs, ones, source = np.array([[0, 5000, 0]]), np.ones((1, 2)), [np.zeros(5000, np.float32)]
    whole = run_apply(optim.Mean(), "float32", source, [(runs, np.zeros((1, 0)), [largest, largest], ones)])
    total, target = np.zeros_like(largest), np.zeros_like(largest)
    _kernels.aggregate("float32", runs, [largest, largest], ones, total, threads=1, level="auto")
    assert_same_bits(whole, [total])
    assert np.isinf(total).all()
    commits = [(runs, np.zeros((1, 0)), [total], ones[:, :1].copy())]
    assert _kernels.apply("mean", 0, "float32", source, [target], commits, threads=1, level="auto") == (0, 0, 0)
    assert not _kernels.apply("mean", 0, "float32", source, [target], commits, threads=1, level="auto", check=False)
    assert_same_bits(whole, [target])


def test_an_aggregated_gradient_is_refused_where_it_does_not_fit() -> None:
    runs, _, contributions, coefficients = make_commit(optim.Mean(), "bfloat16", 100)
    for out in (np.zeros(99, np.float32), np.zeros(100, np.float64), contributions[0].repeat(2)[::2], bytes(400)):
        with pytest.raises(ValueError, match="Expected"):
            _kernels.aggregate("bfloat16", runs, contributions, coefficients, out, threads=1, level="auto")
    shared = np.ones(100, np.float32)
    with pytest.raises(ValueError, match="overlaps"):
        _kernels.aggregate("float32", runs, [shared, shared.copy()], coefficients, shared, threads=1, level="auto")
    with pytest.raises(ValueError, match="threads"):
        _kernels.aggregate("float32", runs, [shared] * 2, coefficients, shared.copy(), threads=0, level="auto")


# ---- Arena


def make_file(size: int, fill: int) -> int:
    fd = os.memfd_create("test")
    os.write(fd, bytes([fill]) * size)
    return fd


def test_an_arena_joins_files_into_one_range() -> None:
    page = mmap.PAGESIZE
    fds = [make_file(2 * page, 1), make_file(page, 2)]
    array = _kernels.Arena(fds, [2 * page, page], private=False).array
    assert array.nbytes == 3 * page
    assert (array[: 2 * page] == 1).all()
    assert (array[2 * page :] == 2).all()
    array[2 * page - 1 : 2 * page + 1] = 9  # across the seam
    assert os.pread(fds[0], 1, 2 * page - 1) == b"\x09"
    assert os.pread(fds[1], 1, 0) == b"\x09"
    for fd in fds:
        os.close(fd)
    assert array.sum(dtype=np.int64) == (2 * page - 1) + 2 * (page - 1) + 18  # still mapped: the array keeps the arena


def test_private_writes_stay_here_and_can_be_discarded() -> None:
    page = mmap.PAGESIZE
    fds = [make_file(8 * page, 1), make_file(8 * page, 2)]
    arena = _kernels.Arena(fds, [8 * page, 8 * page], private=True)
    array = arena.array
    assert array[::page].sum() == 24  # read: these pages are the files'
    assert not arena.discard_private(), "reading is not writing"
    array[3 * page] = array[7 * page + 5] = array[8 * page] = array[15 * page] = 99
    assert os.pread(fds[0], 1, 3 * page) == b"\x01"
    assert arena.discard_private()
    assert array[3 * page] == 1
    assert array[8 * page] == 2
    os.pwrite(fds[0], b"\x05", 3 * page)
    assert array[3 * page] == 5, "what others write shows again"
    assert not arena.discard_private()
    array[0] = 7  # guarded anew
    assert arena.discard_private()
    assert array[0] == 1
    for fd in fds:
        os.close(fd)


def test_an_arena_shows_other_files_at_the_same_addresses() -> None:
    page = mmap.PAGESIZE
    for private in (True, False):
        old, new = [make_file(2 * page, 1), make_file(page, 2)], [make_file(page, 3), make_file(2 * page, 4)]
        arena = _kernels.Arena(old, [2 * page, page], private=private)
        array = arena.array
        view = array[page - 1 : 2 * page + 1]
        array[5] = array[2 * page + 5] = 99
        arena.remap(new, [page, 2 * page])
        for fd in new[:1] + old:
            os.close(fd)
        assert (array[:page] == 3).all()
        assert (array[page:] == 4).all()
        assert view.tolist() == [3] + [4] * (page + 1)
        assert arena.array.ctypes.data == array.ctypes.data
        assert not arena.discard_private(), "what was written before is gone, and nothing was written since"
        view[1] = 7
        assert os.pread(new[1], 1, 0) == (b"\x04" if private else b"\x07")
        assert arena.discard_private() == private
        assert view[1] == (4 if private else 7)
        os.close(new[1])


def test_an_arena_that_cannot_be_mapped_anew_is_what_it_was() -> None:
    page = mmap.PAGESIZE
    old, new = [make_file(page, 1), make_file(page, 2)], [make_file(page, 3), make_file(page, 4)]
    shared = _kernels.Arena(old, [page, page], private=False)
    private = _kernels.Arena(old, [page, page], private=True)
    private.array[0] = 9
    read_only = os.open(f"/proc/self/fd/{new[1]}", os.O_RDONLY)
    with pytest.raises(OSError, match="mmap"):
        shared.remap([new[0], read_only], [page, page])
    with pytest.raises(OSError, match="fstat"):
        private.remap([new[0], -1], [page, page])
    for fds, sizes in (
        (new[:1], [page]),
        (new[:1], [2 * page]),
        (new, [page, 2 * page]),
        ([], [2 * page]),
        (new, [page]),
    ):
        for arena in (shared, private):
            with pytest.raises(ValueError, match="Expected"):
                arena.remap(fds, sizes)
    with pytest.raises(ValueError, match="Expected 0 files"):
        _kernels.Arena([], [page], private=True).remap(new[:1], [page])
    assert shared.array[::page].tolist() == [1, 2]
    assert private.array[::page].tolist() == [9, 2], "what was written is still there"
    assert private.discard_private()
    assert private.array[0] == 1
    private.remap([read_only, new[0]], [page, page])  # a private mapping needs no right to write
    assert private.array[::page].tolist() == [4, 3]
    for fd in (*old, *new, read_only):
        os.close(fd)


def test_a_private_arena_can_be_written_while_it_is_mapped_anew() -> None:
    page = mmap.PAGESIZE
    files = [[make_file(4 * page, fill), make_file(4 * page, fill)] for fill in (1, 2)]
    arena = _kernels.Arena(files[0], [4 * page] * 2, private=True)
    array, is_over = arena.array, threading.Event()

    def write() -> None:
        while not is_over.is_set():
            array[::page] = 9

    thread = threading.Thread(target=write)
    thread.start()
    for i in range(300):
        arena.remap(files[i % 2], [4 * page] * 2)
    is_over.set()
    thread.join()
    arena.discard_private()
    assert (array == 2).all()
    for fd in files[0] + files[1]:
        os.close(fd)


def test_a_fault_that_is_nobodys_still_kills_with_a_traceback() -> None:
    program = (
        "import faulthandler, ctypes, os; faulthandler.enable()\n"
        "from headwater import _kernels\n"
        "fd = os.memfd_create('x'); os.ftruncate(fd, 4096)\n"
        "arena = _kernels.Arena([fd], [4096], private=True)\n"
        "arena.array[0] = 1\n"
        "print('guarded', flush=True)\n"
        "ctypes.string_at(8)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "guarded\n"
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr


def test_an_arena_without_files_is_zeroed_memory() -> None:
    arena = _kernels.Arena([], [2 * mmap.PAGESIZE], private=True)
    arena.array[5] = 1
    assert not arena.discard_private(), "there is nothing below to show again"
    assert arena.array.sum() == 1


def test_an_arena_refuses_what_does_not_fit() -> None:
    page = mmap.PAGESIZE
    fd = make_file(page, 1)
    for sizes in ([page + 1], [0], [-page], [], [2 * page], [page, page], [1 << 62, 1 << 62]):
        with pytest.raises(ValueError, match="Expected"):
            _kernels.Arena([fd] if sizes != [1 << 62, 1 << 62] else [], sizes, private=True)
    os.close(fd)
    with pytest.raises(OSError, match=r"fstat"):
        _kernels.Arena([fd], [page], private=True)
    with pytest.raises(OSError, match="mmap"):
        _kernels.Arena([], [1 << 60], private=True)


# ---- Heartbeat


def read_exactly(end: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        part = end.recv(size - len(got))
        assert part, "closed early"
        got += part
    return got


def test_a_heart_beats_while_the_gil_is_held() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        heart = _kernels.Heartbeat(ours.fileno(), b"beat", 0.002)
        ctypes.PyDLL(None).usleep(40_000)  # PyDLL keeps the GIL
        theirs.setblocking(False)
        assert len(theirs.recv(4096)) >= 4 * 4
        heart.stop()


def test_a_heart_stops_at_once_and_for_good() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(10)
        heart = _kernels.Heartbeat(ours.fileno(), b"beat", 3600.0)
        assert read_exactly(theirs, 4) == b"beat", "the first beat comes now"
        assert heart.alive
        began = time.monotonic()
        heart.stop()
        heart.stop()
        assert time.monotonic() - began < 10
        assert not heart.alive
        assert not select.select([theirs], [], [], 0)[0]


def test_a_heart_has_a_descriptor_of_its_own() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.settimeout(10)
        heart = _kernels.Heartbeat(ours.fileno(), b"beat", 0.001)
        ours.close()
        assert read_exactly(theirs, 40) == b"beat" * 10
        del heart  # stops it and closes its descriptor
        while theirs.recv(4096):
            pass


def test_a_heart_dies_with_its_connection() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        heart = _kernels.Heartbeat(ours.fileno(), b"beat", 0.001)
        theirs.close()
        limit = time.monotonic() + 10
        while heart.alive:
            assert time.monotonic() < limit
            os.sched_yield()
        heart.stop()


def test_a_heart_can_be_stopped_while_nobody_listens() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        heart = _kernels.Heartbeat(ours.fileno(), b"x" * 1_000_000, 0.001)  # more than the socket holds
        theirs.settimeout(10)
        assert theirs.recv(1) == b"x"
        heart.stop()
        assert not heart.alive


def test_a_heart_refuses_what_does_not_fit() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for frame, interval_s in ((b"", 1.0), (b"beat", 0.0), (b"beat", float("nan")), (b"beat", -1.0), (b"beat", 1e9)):
            with pytest.raises(ValueError, match="Expected"):
                _kernels.Heartbeat(ours.fileno(), frame, interval_s)
    with pytest.raises(OSError, match="dup"):
        _kernels.Heartbeat(-1, b"beat", 1.0)
