"""How a process gets its session: from what it says, from its environment, or with a server of its own inside."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

from headwater import _limits
from headwater._consistency import Consistency
from headwater._errors import SettingError
from headwater._messages import Hello
from headwater._peers import Peers, nearest
from headwater._session import Session, environment_number
from headwater._transport import Address, new_identity, process_label
from headwater.durability import Durability, snapshot

if TYPE_CHECKING:
    from headwater._server import Server


def connect_session(
    address: str | None = None,
    *,
    consistency: Consistency | None = None,
    workers: int | None = None,
    transport: str | None = None,
    token: str | None = None,
    timeout_s: float = 600.0,
    durability: Durability | None = None,
    store: str | None = None,
    resume: bool = False,
    role: str = "worker",
) -> Session:
    """Connect to a job, or start one inside this process, and return this worker's session.

    address: the job's first server, such as tcp://10.0.0.5:7077; default $HEADWATER_ADDRESS; with neither, a server is embedded
    in this process and the script runs alone. consistency: `bsp()` (default), `ssp(staleness)` or `asp()`; it is the job's, so
    leave it out where the server was told. workers: how many the job waits for at its start; default $HEADWATER_WORKERS.
    transport: "auto" takes shared memory where it can, "shm" insists on it, "tcp" does without; default
    $HEADWATER_TRANSPORT, or auto. token: default
    $HEADWATER_TOKEN. timeout_s: how long any wait may last; past it a WaitTimeoutError says for whom.
    durability: what the job survives, `hw.durability.snapshot()` (default where there is a store) or `log()`; it is the job's, so
    leave it out where the servers were told. store: the folder or fsspec URL where a job in this process is kept, with a last snapshot
    when the session is closed; resume: go on from what lies there, if anything does; else it must be empty.

    SIGTERM, by which a machine says that it is taken away, then ends a worker's process as the end of its script does, with exit status
    143: what is sealed counts, the session is closed, and after _limits.TERMINATE_S the process is killed. That holds where the script
    has no handler of its own and connects in the main thread; Python runs handlers there, between two of its instructions.

    Raises UnreachableError, AuthenticationError, SettingError.
    """
    transport = transport or os.environ.get("HEADWATER_TRANSPORT") or "auto"
    if transport not in ("auto", "shm", "tcp"):
        raise SettingError(f"Expected transport auto, shm or tcp, got {transport!r}.")
    text = address or os.environ.get("HEADWATER_ADDRESS") or None
    hello = Hello(
        token=token if token is not None else os.environ.get("HEADWATER_TOKEN", ""),
        role=role,
        identity=new_identity(),
        index=environment_number("HEADWATER_WORKER", -1 if text else 0) if role == "worker" else -1,
        workers=(environment_number("HEADWATER_WORKERS", 0) if workers is None else workers) if text else 0,
        consistency=consistency,
        label=process_label(),
    )
    target = Address.parse(text) if text else None
    if target is None:
        server = _embed(hello, durability, store, resume=resume)
        try:
            return Session(
                Peers(None, hello, transport=transport, timeout_s=timeout_s, server=server, owns_server=True)
            )
        except BaseException:
            server.close()
            raise
    if store is not None or resume:
        raise SettingError(f"Expected a store for a job in this process only, got one for {target}, which has its own.")
    if role == "worker":
        _exit_on_sigterm()
    if target.kind == "tcp" and target.is_local and transport != "tcp":
        target = nearest(target, hello, timeout_s)
    return Session(Peers(target, hello, transport=transport, timeout_s=timeout_s, durability=durability))


def _embed(hello: Hello, durability: Durability | None, store: str | None, *, resume: bool) -> Server:
    """Start a server for a job in this process."""
    from headwater._server import Server  # only who serves pays for it at start

    if store is None and (durability is not None or resume):
        raise SettingError("Expected a store with durability or resume, got none: connect(store='runs/a', …).")
    if store is not None:
        durability = durability or snapshot()
    return Server(
        token=hello.token, consistency=hello.consistency, workers=1, durability=durability, store=store or "", resumes=resume
    )  # fmt: skip


def _exit_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit in the main thread, unless it has a meaning already."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, _: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_limits.TERMINATE_S)  # not a thread of Python's: that would wait for whoever holds the interpreter
    raise SystemExit(128 + number)


def _keep_sigterm_in_parent() -> None:
    """A forked child ends as any process does."""
    if signal.getsignal(signal.SIGTERM) is _exit:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_keep_sigterm_in_parent)
