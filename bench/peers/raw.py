"""The ceiling over TCP: bare sockets moving a model's gradients in and its parameters out, the same fused kernel in between.

A block goes out as soon as it has come in from every worker and has been applied. Two sizes of block make two patterns, because
which one is faster depends on cores and workers:

    in turn   one block: all gradients in, one pass over the whole model, all parameters out
    duplex    small blocks: both ways are in use at once

All buffers begin on a page, for kernels and sockets alike.
"""

from __future__ import annotations

import queue
import socket
import threading

import numpy as np

from bench.harness import Step
from bench.peers.kernel import FusedPass, shared_array

#: Pattern → bytes of a block. Smaller ones cost calls, larger ones overlap less.
BLOCK_BYTES = {"in turn": 1 << 40, "duplex": 1 << 21}


def raw_server(pattern: str, parameters: int, workers: int, cores: int) -> int:
    """Serve so many workers for ever; returns the port."""
    server = _Server(pattern, parameters, workers, cores)
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        for i in range(workers):
            peer = _without_delay(listener.accept()[0])
            threading.Thread(target=server.receive, args=(peer, i), daemon=True).start()
            threading.Thread(target=server.send, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


class _Server:
    def __init__(self, pattern: str, parameters: int, workers: int, cores: int) -> None:
        gradients = [shared_array(parameters, 0.0) for _ in range(workers)]
        self._apply, self._threads, self._workers = (
            FusedPass("sgd", gradients),
            cores if pattern == "in turn" else 1,
            workers,
        )
        self._block = min(BLOCK_BYTES[pattern], 4 * parameters)
        self._inboxes = [self._blocks(gradient) for gradient in gradients]
        self._outboxes = [self._blocks(planes[0]) for planes in self._apply.sides]
        self._count = len(self._inboxes[0])
        self._arrived = [0] * self._count
        self._applied = 0  # blocks, over all steps
        self._changed = threading.Condition()

    def _blocks(self, array: np.ndarray) -> list[memoryview]:
        view = memoryview(array).cast("B")
        return [view[at : at + self._block] for at in range(0, len(view), self._block)]

    def receive(self, peer: socket.socket, index: int) -> None:
        """Take in a worker's blocks; the thread that completes a block over all workers applies it."""
        number = 0
        while _receive_all(peer, self._inboxes[index][number % self._count]):
            step, block = divmod(number, self._count)
            with self._changed:
                self._arrived[block] += 1
                is_last = self._arrived[block] == self._workers
            if is_last:
                self._arrived[block] = 0
                start = block * self._block // 4
                stop = min(start + self._block // 4, self._apply.size)
                self._apply(step % 2, start, stop, self._threads)
                with self._changed:
                    self._applied += 1
                    self._changed.notify_all()
            number += 1

    def send(self, peer: socket.socket) -> None:
        """Send a worker the blocks that have been applied."""
        number = 0
        while True:
            with self._changed:
                while self._applied <= number:
                    self._changed.wait()
            step, block = divmod(number, self._count)
            peer.sendall(self._outboxes[1 - step % 2][block])
            number += 1


def raw_worker(port: int, parameters: int) -> Step:
    """Return a step that pushes gradients and gets parameters."""
    peer = _without_delay(socket.create_connection(("127.0.0.1", port)))
    gradients, target = (memoryview(shared_array(parameters, 1e-6)).cast("B") for _ in range(2))
    turns: queue.SimpleQueue[None] = queue.SimpleQueue()

    def send() -> None:
        while True:
            turns.get()
            peer.sendall(gradients)

    threading.Thread(target=send, daemon=True).start()

    def step() -> None:
        turns.put(None)
        if not _receive_all(peer, target):
            raise ConnectionError("the raw server has gone")

    return step


def _receive_all(peer: socket.socket, view: memoryview) -> bool:
    """Fill the view; returns whether there was more before the end."""
    at = 0
    while at < len(view):
        count = peer.recv_into(view[at:])
        if not count:
            return False
        at += count
    return True


def _without_delay(peer: socket.socket) -> socket.socket:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer
