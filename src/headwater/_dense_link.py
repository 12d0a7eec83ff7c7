"""A worker's side of the arena: the push buffer, the parameters as it reads them, and the way to every server's part."""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec
import numpy as np

from headwater import _kernels
from headwater._consistency import Consistency
from headwater._errors import ProtocolError
from headwater._layout import Layout, Part
from headwater._memory import remap_buffers, stack_buffers, zeroed
from headwater._messages import Attach, Attached, Committed, Done, Pull, Pulled, Push, Put, Seal, Sides
from headwater._peers import Peers
from headwater._transport import Connection, request


class _Link:
    """The way to one server's part."""

    def __init__(self, connection: Connection, part: Part, *, shares: bool) -> None:
        self.connection, self.part, self.shares = connection, part, shares
        self.byte = slice(part.start_byte, part.start_byte + part.wire_bytes)
        self.pushed: memoryview | None = None  # payload of a push, where it travels
        self.pulled: memoryview | None = None  # where the payload of a pull goes


class DenseLink:
    """Connects to every server that owns a part of the layout, and maps or makes the buffers. Used by the session's thread."""

    def __init__(self, peers: Peers, layout: Layout, consistency: Consistency) -> None:
        self._peers, self._layout = peers, layout
        self._links: list[_Link] = []
        self._shared: list[_kernels.Arena] = []  # sets of parameters that the servers share
        self._places: dict[int, int] = {}  # of those whose place here is not the servers' own
        self._known = 0  # how many of them are those of the servers as they are now
        attached = self._attach()
        self._sizes = [link.part.wire_bytes for link in self._links]
        if attached:
            gradients, *sides = attached
            self._pushes = stack_buffers(list(gradients), self._sizes, private=False)
            arena = self._pushes.array[: layout.wire_bytes]
            # The servers' own memory is read privately, so that a stray write harms nobody.
            self._is_private = len(sides) > 1
            self.sides: list[dict[str, np.ndarray]] = []  #: sets of parameter views, of which one is current
            self._add_sides(sides)
        else:
            arena, parameters = zeroed(layout.wire_bytes), zeroed(layout.wire_bytes)
            self._is_private = False
            self.sides = [layout.views(parameters)]
            self._travelling = arena, parameters
            self._use_travelling()
        self.gradients = layout.views(arena)  #: views of the push buffer
        self.side = 0  #: which side is current
        self.reads_in_place = self._is_private
        self._is_led = (
            self.reads_in_place and consistency.kind == "bsp"
        )  # each commit tells all workers which side to read

    @property
    def _is_direct(self) -> bool:
        """Push, seal and pull go to the same server on one connection: one message each way does."""
        return len(self._links) == 1 and self._links[0].connection is self._peers.control

    def _use_travelling(self) -> None:
        for link in self._links:
            link.pushed, link.pulled = (memoryview(arena[link.byte]) for arena in self._travelling)

    def attach_again(self, side: int) -> None:
        """Connect to servers that were started again. side: which is the state, where every commit tells it.

        What stands in the push buffer stays, all views stay valid, and those of the current side show the servers' state.
        """
        self._links.clear()
        attached = self._attach()
        if not attached:
            self._use_travelling()
            return
        gradients, *sides = attached
        saved = self._pushes.array.copy()
        remap_buffers(self._pushes, list(gradients), self._sizes)
        self._pushes.array[:] = saved
        if self.reads_in_place and not self._is_led:
            (link,) = self._links
            link.connection.send(Pull(own=True))
            side = self._peers.receive(link.connection, Pulled)[0].side
        self._known = 0
        self._places = {side: self.side, self.side: side} if self.reads_in_place else {}  # else there is one set
        self._add_sides(sides)
        if self.reads_in_place:
            self.turn(side)
        else:
            self.pull()

    def _attach(self) -> list[tuple[int, ...]]:
        """Make every server ready; returns descriptors, by buffer and server: the push buffer, then the parameters. None over TCP."""
        count = len(self._peers.addresses)
        fds: list[tuple[int, ...]] = []
        for i in range(count):
            part = self._layout.part(i, count)
            if part.wire_bytes == 0:
                continue
            connection, shares = self._peers.open("data", i)
            connection.send(Attach(shares))
            attached, passed = self._peers.receive(connection, Attached)
            if shares != bool(passed) or len(passed) != attached.fds:
                raise ProtocolError(f"Expected {attached.fds} shared buffers, got {len(passed)}.")
            self._links.append(_Link(connection, part, shares=shares))
            fds.append(passed)
        return _by_buffer(fds)

    def _add_sides(self, sides: list[tuple[int, ...]]) -> None:
        for fds in sides:
            place = self._places.get(self._known, self._known)
            self._known += 1
            if place < len(self._shared):
                remap_buffers(self._shared[place], list(fds), self._sizes)
                continue
            arena = stack_buffers(list(fds), self._sizes, private=self._is_private)
            self._shared.append(arena)
            self.sides.append(self._layout.views(arena.array[: self._layout.wire_bytes]))

    def begin(self, side: int) -> None:
        """Read the parameters for the first time; side: which is the state, where every commit tells it."""
        if self._is_led:
            self.turn(side)
        else:
            self.pull()

    def send(self, seal: Seal, *, pull: bool) -> None:
        """Push what stands in the push buffer and seal it; `answer` is to be called next. pull: it also brings the new parameters."""
        if self._is_direct:
            (link,) = self._links
            wanted = "" if not pull or self._is_led else "own" if link.shares else "sent"
            send = (
                link.connection.hold if wanted == "sent" else link.connection.send
            )  # then `answer` sends it while it reads
            send(msgspec.structs.replace(seal, pushes=True, pull=wanted), link.pushed)
            return
        for link in self._links:
            link.connection.send(Push(seal.sequence), link.pushed)
        for link in self._links:
            self._peers.receive(link.connection, Done)
        self._peers.control.send(seal)

    def answer(self, *, pull: bool) -> Committed:
        """Wait until what was sent counts and the session may go on. pull: as it was said to `send`."""
        view = self._links[0].pulled if self._is_direct else None
        committed = self._peers.receive(self._peers.control, Committed, view)[0]
        if self._is_led or (pull and self._is_direct):
            self.turn(committed.side)
        elif pull:
            self.pull()
        return committed

    def pull(self) -> None:
        """Bring the parameters up to date."""
        if self._is_led:
            self._shared[self.side].discard_private()
            return
        for link in self._links:
            link.connection.send(Pull(own=link.shares))
        for link in self._links:
            self.turn(self._peers.receive(link.connection, Pulled, link.pulled)[0].side)

    def turn(self, side: int) -> None:
        """Turn to the side that is now the state; what this process wrote there by mistake is undone."""
        if not self.reads_in_place:
            return
        while side >= self._known:
            self._map_more()
        self.side = self._places.get(side, side)
        self._shared[self.side].discard_private()

    def _map_more(self) -> None:
        """Map parameter buffers that the servers have made since."""
        for link in self._links:
            link.connection.send(Sides(self._known))
        passed = [self._peers.receive(link.connection, Attached)[1] for link in self._links]
        if not passed[0]:
            raise ProtocolError(f"Expected a buffer beside {self._known}, got none.")
        self._add_sides(_by_buffer(passed))

    def put(self, plane: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace a plane of the servers' state by whole arrays: "parameters" as they travel, others in the master dtype."""
        if plane != "parameters":
            for link in self._links:
                request(link.connection, Put(plane), payload=memoryview(link.part.gather(arrays)))
            return
        arena = np.zeros(self._layout.wire_bytes, np.uint8)
        for name, view in self._layout.views(arena).items():
            view[...] = arrays[name]
        for link in self._links:
            request(link.connection, Put(plane), payload=memoryview(arena[link.byte]))


def _by_buffer(fds: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Turn descriptors by server into descriptors by buffer, as far as every server has them; others are closed, and asked for later."""
    found = list(zip(*fds, strict=False))
    for passed in fds:
        for fd in passed[len(found) :]:
            os.close(fd)
    return found
