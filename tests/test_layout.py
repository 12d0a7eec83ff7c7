"""Where tensors lie: aligned, apart, and cut among servers without a gap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater import _kernels
from headwater._errors import LayoutError
from headwater._layout import (
    ALIGN_BYTES,
    AVERAGED,
    BLOCK,
    DTYPES,
    PAGE_BYTES,
    Layout,
    TensorSpec,
    difference,
    round_up,
    runs,
    tensor_at,
)

Array = npt.NDArray[Any]

dtypes = st.sampled_from(list(DTYPES))
#: Sizes on both sides of a block's edge and of several blocks.
shapes = (
    st.tuples()
    | st.tuples(st.integers(1, 40))
    | st.tuples(st.integers(1, 9), st.integers(1, 9))
    | st.tuples(st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]))
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Draw up to 8 tensors of mixed dtypes and sizes, trained or averaged."""
    tensors = draw(st.lists(st.tuples(shapes, dtypes, st.sampled_from([0, 0, AVERAGED])), min_size=1, max_size=8))
    return Layout([TensorSpec(f"t{i}", *tensor) for i, tensor in enumerate(tensors)])


counts = st.integers(1, 6)


def test_the_blocks_are_the_kernels_blocks() -> None:
    assert BLOCK == _kernels.BLOCK


def test_the_example_in_the_module() -> None:
    layout = Layout([TensorSpec("a", (3,), "float32"), TensorSpec("b", (2, 2), "float32")])
    assert layout.lanes[0].offsets == (0, 16)
    assert layout.wire_bytes == 128
    assert layout.parameters == 7


@given(layouts())
def test_tensors_are_aligned_and_do_not_overlap(layout: Layout) -> None:
    taken = np.zeros(layout.wire_bytes, np.uint8)
    for name, view in layout.views(taken).items():
        spec = layout.specs[layout.index[name]]
        assert view.shape == spec.shape
        assert view.itemsize == DTYPES[spec.dtype][0]
        assert (view.ctypes.data - taken.ctypes.data) % ALIGN_BYTES == 0
        raw = view.reshape(-1).view(np.uint8)
        assert not raw.any()
        raw[:] = 1
    sizes = [spec.size * DTYPES[spec.dtype][0] for spec in layout.specs]
    assert taken.sum() == sum(sizes)
    assert layout.wire_bytes <= sum(round_up(size, ALIGN_BYTES) for size in sizes) + PAGE_BYTES * (
        len(layout.lanes) - 1
    )


@given(layouts())
def test_lanes_start_on_pages_and_hold_one_dtype_each_trained_or_averaged(layout: Layout) -> None:
    kinds = [(spec.dtype, spec.is_averaged) for spec in layout.specs]
    assert [(lane.dtype, lane.is_averaged) for lane in layout.lanes] == list(dict.fromkeys(kinds))
    for lane in layout.lanes:
        assert lane.start_byte % PAGE_BYTES == 0
        assert {kinds[t] for t in lane.tensors} == {(lane.dtype, lane.is_averaged)}
        assert sorted(lane.tensors) == list(lane.tensors)


@given(layouts(), counts)
def test_parts_tile_the_arena(layout: Layout, count: int) -> None:
    """Every element belongs to one server; seams lie on pages, so that shared memory can be mapped side by side."""
    elements = dict.fromkeys(layout.lanes, 0)
    at = 0
    for part in [layout.part(i, count) for i in range(count)]:
        if not part.slices:
            assert part.wire_bytes == part.master_bytes == 0
            continue
        assert part.start_byte == round_up(at, PAGE_BYTES)
        at = part.start_byte + part.wire_bytes
        for s in part.slices:
            assert s.start == elements[s.lane]
            assert s.start % BLOCK == 0
            assert s.byte + part.start_byte == s.lane.start_byte + s.start * s.lane.item_bytes
            elements[s.lane] = s.stop
        assert part.slices[-1].byte + part.slices[-1].wire_bytes == part.wire_bytes
    assert at == layout.wire_bytes
    assert elements == {lane: lane.elements for lane in layout.lanes}


@given(layouts(), counts)
def test_parts_differ_by_a_block_at_most(layout: Layout, count: int) -> None:
    blocks = [sum(-(-s.elements // BLOCK) for s in layout.part(i, count).slices) for i in range(count)]
    assert max(blocks) - min(blocks) <= 1


@given(layouts(), counts, st.data())
def test_runs_cover_each_slice_with_the_right_cells(layout: Layout, count: int, data: st.DataObject) -> None:
    size = len(layout.specs)
    cells = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=size, max_size=size)), np.int32)
    for part in [layout.part(i, count) for i in range(count)]:
        for s in part.slices:
            table = runs(s, cells)
            assert table.dtype == np.int64
            assert table[0, 0] == 0
            assert table[-1, 1] == s.elements
            assert (table[1:, 0] == table[:-1, 1]).all()
            assert (table[:, 0] < table[:, 1]).all()
            for start, stop, cell in table.tolist():
                assert cells[tensor_at(s.lane, s.start + start)] == cell
                assert cells[tensor_at(s.lane, s.start + stop - 1)] == cell


@given(layouts())
def test_an_element_is_found_in_its_tensor(layout: Layout) -> None:
    for tensor, (lane, at) in layout.places.items():
        assert tensor_at(lane, at) == tensor
        assert tensor_at(lane, at + layout.specs[tensor].size - 1) == tensor


def new_plane(layout: Layout) -> list[Array]:
    return layout.part(0, 1).new_plane()


def filled(layout: Layout) -> dict[str, Array]:
    """Return master arrays in which no two elements of a dtype are equal."""
    found = layout.master_views(new_plane(layout))
    for i, array in enumerate(found.values()):
        array[...] = (np.arange(array.size) + 100_000 * i).reshape(array.shape)
    return found


def assert_same(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


@given(layouts(), counts)
def test_planes_come_back_from_their_parts(layout: Layout, count: int) -> None:
    arrays, found = filled(layout), new_plane(layout)
    for part in [layout.part(i, count) for i in range(count)]:
        raw = part.gather(arrays)
        assert raw.nbytes == part.master_bytes
        part.spread(raw, found)
    assert_same(layout.master_views(found), arrays)


def test_averaged_tensors_are_in_no_parameter_group() -> None:
    assert Layout([TensorSpec("a", (1,), "float32", AVERAGED)]).groups == 0


def test_more_servers_than_blocks_leave_some_with_nothing() -> None:
    layout = Layout([TensorSpec("a", (10,), "float32")])
    assert [layout.part(i, 3).wire_bytes for i in range(3)] == [0, 0, 64]


def test_bfloat16_is_seen_as_its_bits() -> None:
    layout = Layout([TensorSpec("a", (2,), "bfloat16")])
    assert layout.views(np.zeros(layout.wire_bytes, np.uint8))["a"].dtype == np.uint16
    assert layout.master_views(new_plane(layout))["a"].dtype == np.float32


def test_groups_count_from_zero_to_the_highest() -> None:
    specs = [TensorSpec("a", (1,), "float32", 0), TensorSpec("b", (1,), "float32", 2), TensorSpec("c", (1,), "float32")]
    assert Layout(specs).groups == 3


A, B = TensorSpec("a", (2, 3), "float32"), TensorSpec("b", (4,), "float64", 1)


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        ([A, B], ""),
        ([B, A], "the tensors come in another order"),
        ([A], "tensor 'b' (4,) is missing"),
        ([A, B, TensorSpec("c", (1,), "float32")], "tensor 'c' (1,) is unknown"),
        ([TensorSpec("a", (3, 2), "float32"), B], "tensor 'a': expected float32 (2, 3) in group 0, got float32 (3, 2) in group 0"),
        ([TensorSpec("a", (2, 3), "float16"), B], "tensor 'a': expected float32 (2, 3) in group 0, got float16 (2, 3) in group 0"),
        ([A, TensorSpec("b", (4,), "float64", 0)], "tensor 'b': expected float64 (4,) in group 1, got float64 (4,) in group 0"),
        (
            [A, TensorSpec("b", (4,), "float64", AVERAGED)],
            "tensor 'b': expected float64 (4,) in group 1, got float64 (4,) that is averaged",
        ),
    ],
)  # fmt: skip
def test_difference_says_what_differs_first(theirs: list[TensorSpec], sentence: str) -> None:
    assert difference([A, B], theirs) == sentence


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([A, A], "a name of its own, got 'a' twice"),
        ([TensorSpec("a", (2,), "int64")], "one of float32, float64, bfloat16, float16, got int64 — tensor 'a'"),
        ([TensorSpec("a", (2, 0), "float32")], r"with elements, got shape \(2, 0\) — tensor 'a': leave it out"),
        ([TensorSpec("a", (-2, -3), "float32")], r"with elements, got shape \(-2, -3\)"),
        ([TensorSpec("a", (2,), "float32", 1)], "a parameter group from 0 to 0, got 1 — tensor 'a'"),
        ([TensorSpec("a", (2,), "float32", -2)], "a parameter group from 0 to 0, got -2"),
        ([TensorSpec("a", (1 << 38, 2), "float32")], "at most 1099511627776 bytes of parameters, got 2199023255552"),
    ],
)
def test_senseless_specs_are_refused(specs: list[TensorSpec], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout(specs)


def test_a_job_without_tensors_has_an_empty_arena() -> None:
    layout = Layout([])
    assert (layout.wire_bytes, layout.groups, layout.views(np.empty(0, np.uint8))) == (0, 0, {})
    assert layout.part(1, 2).wire_bytes == 0
