"""The ceiling of a round trip: 64 bytes there and back between two Python processes over a bare TCP socket."""

from __future__ import annotations

import socket
import threading

from bench.harness import Step

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
