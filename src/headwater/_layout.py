"""Where each dense tensor lies. Pure arithmetic; workers and servers compute the same from the same specs.

    arena   := lane*                      one lane per wire dtype, and one more for what is averaged, in order of first appearance,
                                          each starting on a page
    lane    := tensor*                    in registration order, each at a multiple of 64 bytes; the gaps are zeros
    block   := 16384 elements of a lane   the unit of placement and of sums of squares

Server i of n owns blocks [B·i/n, B·(i+1)/n) of the arena's B blocks, so its part of the arena is one byte range.

Example: tensors a (3,) and b (2, 2), float32: a at elements 0–2, b at 16–19; the arena is 20 elements, rounded up to 128 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import msgspec
import numpy as np

from headwater import _limits
from headwater._errors import LayoutError

BLOCK = 16384  # elements
ALIGN_BYTES = 64
PAGE_BYTES = 4096

AVERAGED = -1  # in place of a parameter group

#: Wire dtype → (bytes per element on the wire, master dtype). The master copy is what the optimizer works on.
DTYPES = {
    "float32": (4, "float32"),
    "float64": (8, "float64"),
    "bfloat16": (2, "float32"),
    "float16": (2, "float32"),
}


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A named dense tensor; `group` is its optimizer parameter group.

    Or AVERAGED: then workers push values, not gradients, and a commit makes it their mean. It has no slots: what lies there is unused.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def is_averaged(self) -> bool:
        return self.group == AVERAGED


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple that is not below value."""
    return -(-value // multiple) * multiple


class Lane(NamedTuple):
    """All tensors of one wire dtype that are treated alike."""

    dtype: str
    is_averaged: bool
    start_byte: int  # in the arena
    elements: int  # gaps included
    tensors: tuple[int, ...]  # indices into the specs
    offsets: tuple[int, ...]  # elements, of each of these tensors

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype][0]

    @property
    def master(self) -> str:
        return DTYPES[self.dtype][1]

    @property
    def blocks(self) -> int:
        return -(-self.elements // BLOCK)


class Slice(NamedTuple):
    """The part of one lane that one server owns."""

    lane: Lane
    start: int  # element, included
    stop: int  # not included
    byte: int  # where it starts within the server's part of the wire arena

    @property
    def elements(self) -> int:
        return self.stop - self.start

    @property
    def wire_bytes(self) -> int:
        return self.elements * self.lane.item_bytes


class Layout:
    """The arena of a job, empty where it has tables only. Immutable. Raises LayoutError for specs that make no sense."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        _check(specs)
        self.specs = tuple(specs)
        self.index = {spec.name: i for i, spec in enumerate(self.specs)}
        self.groups = 1 + max((spec.group for spec in self.specs), default=-1)
        self.lanes = tuple(_lanes(self.specs))
        self.wire_bytes = max((lane.start_byte + lane.elements * lane.item_bytes for lane in self.lanes), default=0)
        self.parameters = sum(spec.size for spec in self.specs)

    @cached_property
    def places(self) -> dict[int, tuple[Lane, int]]:
        """Tensor index → its lane and its first element there."""
        return {t: (lane, at) for lane in self.lanes for t, at in zip(lane.tensors, lane.offsets, strict=True)}

    def views(self, arena: np.ndarray) -> dict[str, np.ndarray]:
        """Return an array per tensor over `arena`, uint8 of wire_bytes; 16-bit floats come as uint16 where NumPy has none."""
        found = {}
        for i, spec in enumerate(self.specs):
            lane, at = self.places[i]
            start = lane.start_byte + at * lane.item_bytes
            raw = arena[start : start + spec.size * lane.item_bytes]
            found[spec.name] = raw.view("uint16" if spec.dtype == "bfloat16" else spec.dtype).reshape(spec.shape)
        return found

    def master_views(self, lanes: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Return an array per tensor over a whole master plane, a flat array per lane."""
        flat = dict(zip((lane.start_byte for lane in self.lanes), lanes, strict=True))
        found = {}
        for i, spec in enumerate(self.specs):
            lane, at = self.places[i]
            found[spec.name] = flat[lane.start_byte][at : at + spec.size].reshape(spec.shape)
        return found

    def part(self, index: int, count: int) -> Part:
        """Return what server `index` of `count` owns."""
        return Part(self, index, count)


class Part:
    """One server's share of the arena: a byte range of the wire arena, an element range of each lane."""

    def __init__(self, layout: Layout, index: int, count: int) -> None:
        self._specs, self._lanes = layout.specs, layout.lanes
        total = sum(lane.blocks for lane in layout.lanes)
        first, limit = total * index // count, total * (index + 1) // count
        self.slices: list[Slice] = []
        self.start_byte = self.stop_byte = -1
        for lane in layout.lanes:
            start = min(max(first, 0) * BLOCK, lane.elements)
            stop = min(max(limit, 0) * BLOCK, lane.elements)
            first, limit = first - lane.blocks, limit - lane.blocks
            if start >= stop:
                continue
            at = lane.start_byte + start * lane.item_bytes
            if self.start_byte < 0:
                self.start_byte = at
            self.slices.append(Slice(lane, start, stop, at - self.start_byte))
            self.stop_byte = lane.start_byte + stop * lane.item_bytes
        self.start_byte = max(self.start_byte, 0)
        self.wire_bytes = max(self.stop_byte, 0) - self.start_byte if self.slices else 0

    def new_plane(self) -> list[np.ndarray]:
        """Return zeros for a master plane: a flat array per slice."""
        return [np.zeros(s.elements, s.lane.master) for s in self.slices]

    @property
    def master_bytes(self) -> int:
        """Size of this part of a master plane: the slices one after another, without gaps between them."""
        return sum(s.elements * np.dtype(s.lane.master).itemsize for s in self.slices)

    def spread(self, raw: np.ndarray, lanes: Sequence[np.ndarray]) -> None:
        """Copy this part of a master plane, uint8, into the whole one, a flat array per lane."""
        flat = dict(zip((lane.start_byte for lane in self._lanes), lanes, strict=True))
        at = 0
        for s in self.slices:
            target = flat[s.lane.start_byte][s.start : s.stop].view(np.uint8)
            target[:] = raw[at : at + target.nbytes]
            at += target.nbytes

    def gather(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return this part of a master plane, uint8, from whole arrays by name."""
        raw = np.zeros(self.master_bytes, np.uint8)
        for name, start, at, count in self._pieces():
            flat = np.ascontiguousarray(arrays[name]).reshape(-1)
            raw[at : at + count * flat.itemsize] = flat[start : start + count].view(np.uint8)
        return raw

    def pieces(self, s: Slice) -> Iterator[tuple[TensorSpec, int, int, int]]:
        """Yield (tensor, its first element here, where that lies in the slice, elements)."""
        for t, offset in zip(s.lane.tensors, s.lane.offsets, strict=True):
            spec = self._specs[t]
            start, stop = max(offset, s.start), min(offset + spec.size, s.stop)
            if start < stop:
                yield spec, start - offset, start - s.start, stop - start

    def _pieces(self) -> Iterator[tuple[str, int, int, int]]:
        """Yield (tensor, its first element here, where that lies in this part in bytes, elements)."""
        base = 0
        for s in self.slices:
            item = np.dtype(s.lane.master).itemsize
            for spec, start, at, count in self.pieces(s):
                yield spec.name, start, base + at * item, count
            base += s.elements * item


def runs(s: Slice, cells: np.ndarray) -> np.ndarray:
    """Cut a slice into runs of tensors of the same cell, gaps going with the tensor before them.

    cells: int32, one per tensor. Returns int64 (runs, 3): start, stop (elements, relative to the slice), cell.
    """
    lane = s.lane
    starts = np.array((*lane.offsets, lane.elements), np.int64)
    mine = cells[list(lane.tensors)]
    edge = np.flatnonzero(np.diff(mine)) + 1  # tensors whose cell differs from the one before
    heads = np.concatenate(([0], edge)).astype(np.int64)
    start = starts[heads]
    stop = np.append(start[1:], lane.elements)
    table = np.stack((np.maximum(start, s.start), np.minimum(stop, s.stop), mine[heads].astype(np.int64)), axis=1)
    table = table[table[:, 0] < table[:, 1]]
    table[:, :2] -= s.start
    return np.ascontiguousarray(table)


def tensor_at(lane: Lane, element: int) -> int:
    """Return the index of the tensor that holds this element of the lane."""
    position = int(np.searchsorted(np.array(lane.offsets), element, side="right")) - 1
    return lane.tensors[position]


def _lanes(specs: Sequence[TensorSpec]) -> Iterator[Lane]:
    start_byte = 0
    for dtype, is_averaged in dict.fromkeys((spec.dtype, spec.is_averaged) for spec in specs):
        item = DTYPES[dtype][0]
        step = ALIGN_BYTES // item
        tensors, offsets, at = [], [], 0
        for i, spec in enumerate(specs):
            if (spec.dtype, spec.is_averaged) == (dtype, is_averaged):
                tensors.append(i)
                offsets.append(at)
                at += round_up(spec.size, step)
        start_byte = round_up(start_byte, PAGE_BYTES)
        yield Lane(dtype, is_averaged, start_byte, at, tuple(tensors), tuple(offsets))
        start_byte += at * item


def _check(specs: Sequence[TensorSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise LayoutError(f"Expected every tensor to have a name of its own, got {spec.name!r} twice.")
        seen.add(spec.name)
        if spec.dtype not in DTYPES:
            raise LayoutError(f"Expected one of {', '.join(DTYPES)}, got {spec.dtype} — tensor {spec.name!r}.")
        if any(side < 1 for side in spec.shape):
            raise LayoutError(
                f"Expected a tensor with elements, got shape {spec.shape} — tensor {spec.name!r}: leave it out."
            )
        if not spec.is_averaged and not 0 <= spec.group < len(specs):
            raise LayoutError(
                f"Expected a parameter group from 0 to {len(specs) - 1}, got {spec.group} — tensor {spec.name!r}."
            )
    size = sum(spec.size * DTYPES[spec.dtype][0] for spec in specs)
    if size > _limits.PAYLOAD_BYTES:
        raise LayoutError(f"Expected at most {_limits.PAYLOAD_BYTES} bytes of parameters, got {size}.")


def difference(ours: Sequence[TensorSpec], theirs: Sequence[TensorSpec]) -> str:
    """Say in one sentence how the second model differs from the first; empty when it does not."""
    have = {spec.name: spec for spec in ours}
    got = {spec.name: spec for spec in theirs}
    for name, spec in have.items():
        if name not in got:
            return f"tensor {name!r} {spec.shape} is missing"
    for name, spec in got.items():
        if name not in have:
            return f"tensor {name!r} {spec.shape} is unknown"
        if spec != have[name]:
            old = have[name]
            return f"tensor {name!r}: expected {old.dtype} {old.shape} {_place(old)}, got {spec.dtype} {spec.shape} {_place(spec)}"
    return "" if tuple(ours) == tuple(theirs) else "the tensors come in another order"


def _place(spec: TensorSpec) -> str:
    return "that is averaged" if spec.is_averaged else f"in group {spec.group}"
