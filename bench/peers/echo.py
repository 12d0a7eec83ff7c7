"""Ceilings of a round trip between two Python processes: 64 bytes there and back over TCP; the bytes of a lookup over a Unix socket."""

from __future__ import annotations

import socket
import threading

from bench.harness import Step
from bench.traffic import DIM

BYTES = 64


def echo_server() -> int:
    """Serve one connection; returns the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(listener,), daemon=True).start()
    return int(listener.getsockname()[1])


def _serve(listener: socket.socket) -> None:
    peer, _ = listener.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(BYTES))
    while count := peer.recv_into(buffer):
        peer.sendall(buffer[:count])


def echo_worker(port: int) -> Step:
    """Return a step that sends 64 bytes and waits until they are back."""
    peer = socket.create_connection(("127.0.0.1", port))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    message, buffer = bytes(BYTES), memoryview(bytearray(BYTES))

    def step() -> None:
        peer.sendall(message)
        missing = BYTES
        while missing:
            missing -= peer.recv_into(buffer[:missing])

    return step


def lookup_server(path: str, count: int) -> str:
    """Serve one connection: for the bytes of `count` ids, those of their rows. Returns where."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def serve() -> None:
        peer, _ = listener.accept()
        ids, rows = memoryview(bytearray(8 * count)), bytes(4 * DIM * count)
        while _fill(peer, ids):
            peer.sendall(rows)

    threading.Thread(target=serve, daemon=True).start()
    return path


def lookup_worker(path: str, count: int) -> Step:
    """Return a step that sends as many bytes as `count` ids have and waits for those of their rows."""
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(path)
    ids, rows = bytes(8 * count), memoryview(bytearray(4 * DIM * count))

    def step() -> None:
        peer.sendall(ids)
        _fill(peer, rows)

    return step


def _fill(peer: socket.socket, view: memoryview) -> bool:
    while view:
        got = peer.recv_into(view)
        if not got:
            return False
        view = view[got:]
    return True
