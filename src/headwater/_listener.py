"""Who listens: sockets, a thread for each connection, the token that every peer shows, and the end of it all.

A thin shell: what a peer may ask, and the answers, are its subclass's.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol, Self

from headwater import _limits
from headwater._errors import (
    AuthenticationError,
    HeadwaterError,
    InternalError,
    ProtocolError,
    SettingError,
    WaitTimeoutError,
)
from headwater._messages import Failed, Hello, ServerAddress
from headwater._transport import (
    Address,
    Connection,
    MemoryConnection,
    SocketConnection,
    check_user,
    host_name,
    listen,
    memory_pair,
)

#: Folders of sockets are named by this, the process id and something random.
_FOLDER = f"headwater-{os.geteuid()}-"


class Handler(Protocol):
    """What one peer may ask, and the answers."""

    role: str

    def welcome(self) -> None:
        """Take the peer in, or raise."""

    def handle(self) -> bool:
        """Carry out one request. Returns whether more may come."""

    def close(self) -> None:
        """The connection has ended."""


class Listener:
    """Sockets that listen, and what comes in on them."""

    def __init__(self, token: str) -> None:
        self.token = token
        self._listeners: list[socket.socket] = []
        self._connections: set[Connection] = set()
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._folder: str | None = None
        self.stopped = threading.Event()
        self.address = ServerAddress("", "", host_name())

    @property
    def _is_closed(self) -> bool:
        return self._closing.is_set()

    def _handler(self, connection: Connection, hello: Hello) -> Handler:
        """Return who answers a peer that has shown the token. Raises ProtocolError for a role that has no business here."""
        raise NotImplementedError

    def _listen(self, address: Address) -> None:
        """Listen there and, at a TCP address, on a Unix socket too."""
        if not self.token:
            raise SettingError("Expected a token where a server listens, got none: set HEADWATER_TOKEN.")
        tcp = ""
        _sweep_folders()
        if address.kind == "tcp":
            sock = listen(address)
            tcp = str(address._replace(port=sock.getsockname()[1]))
            self._accept_on(sock)
            self._folder = tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-")
            address = Address("unix", f"{self._folder}/socket", 0)
        self._accept_on(listen(address))
        self.address = ServerAddress(tcp, str(address), host_name())

    def _accept_on(self, sock: socket.socket) -> None:
        self._listeners.append(sock)
        threading.Thread(target=self._accept, args=(sock,), name="accept", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:  # closed, or out of descriptors for now
                if self._is_closed:
                    return
                time.sleep(0.05)
                continue
            self._serve_in_thread(SocketConnection(sock), partial(check_user, sock))

    def connect_memory(self) -> MemoryConnection:
        """Return a connection to this server from within the process."""
        ours, theirs = memory_pair()
        self._serve_in_thread(ours, lambda: None)
        return theirs

    def _serve_in_thread(self, connection: Connection, check: Callable[[], None]) -> None:
        with self._lock:
            if self._is_closed:
                connection.close()
                return
            self._connections.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection, check), name="serve", daemon=True)
            self._threads.add(thread)
            thread.start()

    def keep(self, connection: Connection) -> None:
        """Close this connection when the server closes."""
        with self._lock:
            self._connections.add(connection)
            if self._is_closed:
                connection.close()

    def drop(self, connection: Connection) -> None:
        """Close a connection that was kept."""
        connection.close()
        with self._lock:
            self._connections.discard(connection)

    # One connection.

    def _serve(self, connection: Connection, check: Callable[[], None]) -> None:
        handler = None
        try:
            check()
            connection.set_timeout(_limits.HANDSHAKE_S)
            handler = self._handler(connection, self._greet(connection))
            handler.welcome()
            connection.set_timeout(_limits.BEAT_LIMIT_S if handler.role == "beat" else None)
            while handler.handle():
                pass
        except HeadwaterError as error:
            _refuse(connection, error)  # says nothing where it is this connection that was lost
        except Exception as error:
            _refuse(connection, InternalError(f"{type(error).__name__}: {error}. Please report this."))
            raise
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()
            if handler is not None:
                handler.close()
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _greet(self, connection: Connection) -> Hello:
        hello = connection.receive().message
        if not isinstance(hello, Hello):
            raise ProtocolError(f"Expected Hello first, got {type(hello).__name__}.")
        if not hmac.compare_digest(hello.token.encode(), self.token.encode()):
            raise AuthenticationError(
                "Expected the job's token, got another or none: set HEADWATER_TOKEN as on the server."
            )
        return hello

    def close(self) -> None:
        """Stop listening and end every connection. What workers share stays theirs."""
        with self._lock:
            if self._is_closed:
                return
            self._closing.set()
            connections, threads = list(self._connections), set(self._threads)
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._remove_socket()  # first: what follows takes time, and whoever starts and stops this may lose patience
        self._ending()
        for connection in connections:
            connection.close()
        self._ended()
        # A thread that is in native code while the interpreter ends would abort the process.
        deadline = time.monotonic() + _limits.CLOSE_S
        for thread in threads - {threading.current_thread()}:
            thread.join(max(deadline - time.monotonic(), 0.0))
        self.stopped.set()

    def _remove_socket(self) -> None:
        if self.address.unix:
            path = Path(Address.parse(self.address.unix).host)
            with contextlib.suppress(OSError):
                path.unlink()
                if path.parent.name.startswith(_FOLDER):  # a launcher's, which may have been killed
                    path.parent.rmdir()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _ending(self) -> None:
        """Called when nobody new comes in, before the connections end."""

    def _ended(self) -> None:
        """Called when they have ended; their threads may still be at work."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse(connection: Connection, error: HeadwaterError) -> None:
    """Tell a peer why its connection ends, and give it a moment to read that before the reset."""
    with contextlib.suppress(HeadwaterError):
        connection.send(Failed(type(error).__name__, str(error)))
        connection.flush()
        if isinstance(error, WaitTimeoutError):
            return
        if isinstance(connection, SocketConnection):
            connection.drain()


def _sweep_folders() -> None:
    """Remove the socket folders of this user's servers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*-*"):
        process = folder.name.split("-")[2]
        gone = process.isdigit() and not Path(f"/proc/{process}").exists()
        if gone and not any(_is_heard(path) for path in folder.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)


def _is_heard(path: Path) -> bool:
    """Whether somebody listens there: a process that is unknown here may live in another container."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
