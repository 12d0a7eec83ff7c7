"""From a running job to a version in a store, beside training.

    changes    of tables, until little is missing; the rest while commits are held
    SetAside   between two commits; from here on training goes on
    MakeRoom   to every server: memory for the commits that go on beside, unless it is there already
    Pull       what is set aside, from every server, into this process's memory
    Release    the servers' memory is theirs again
    publish    written to the store, as a delta where the version before, which is still in memory, makes it small

One thread for each session does it, over connections of its own, one version after the other.
"""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np

from headwater import _kernels, _limits
from headwater._errors import HeadwaterError, StorageError, UsageError, WaitTimeoutError, warn
from headwater._files import open_files
from headwater._keeper import newest
from headwater._layout import Layout
from headwater._lookup import Table
from headwater._messages import (
    AnyMessage,
    Done,
    Held,
    MakeRoom,
    Pull,
    Pulled,
    Release,
    SetAside,
    StateSet,
    Stats,
    StatsGet,
)
from headwater._peers import Peers
from headwater._rows import TableSpec
from headwater._snapshot import MANIFEST, locate, open_manifest, read_dense
from headwater._table_copy import TableCopy
from headwater._versions import Room, Version, Versions, Weights, check_tag

_M = TypeVar("_M")
_ROWS = 1 << 16  # of a table, asked for at once
STORE_KEY = "headwater.versions"  # of the job's dictionary: where its versions are


class Session(Protocol):
    """What publishing needs of a session that only reads."""

    _peers: Peers

    def _ask(self, message: AnyMessage, answer: type[_M]) -> _M: ...
    def _held(self) -> AbstractContextManager[Any]: ...
    def _table(self, number: int, spec: TableSpec) -> Table: ...
    def close(self) -> None: ...


class _Request(NamedTuple):
    tag: str | None
    metrics: Mapping[str, float]
    attach: Sequence[Path]
    keep: int
    extra: Mapping[str, tuple[np.ndarray, str]]
    publication: Publication


class Publication:
    """A version on its way to the store. It can be shared between threads."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._version: Version | None = None
        self._error: BaseException | None = None
        self.is_aside = threading.Event()  #: training may go on

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self._ended.is_set()

    def result(self, timeout_s: float | None = None) -> Version | None:
        """Wait for the version and return it; None in workers that had nothing to publish.

        Raises WaitTimeoutError, and what went wrong: a StorageError, or a PeerLostError where the job lost a server meanwhile. There
        is no such version then, and the tag is where it was.
        """
        if not self._ended.wait(timeout_s):
            raise WaitTimeoutError(f"Expected a version within {timeout_s} s, got none: it is still being written.")
        if self._error is not None:
            raise self._error
        return self._version

    def end(self, version: Version | None, error: BaseException | None = None) -> None:
        """There is nothing more to wait for."""
        self._version, self._error = version, error
        self._ended.set()
        self.is_aside.set()


class Publisher:
    """Publishes for one session. open_session: connects to the job as one who only reads. store: a folder or an fsspec URL."""

    def __init__(self, open_session: Callable[[], Session], store: str) -> None:
        self.store = store
        self.versions = Versions(store)
        self._open_session = open_session
        self._session: Session | None = None
        self._room = Room()
        self._last: Weights | None = None
        self._copies: list[tuple[Table, TableCopy]] = []  # of the job's tables, by number
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._consumer = f"versions {secrets.token_hex(4)}"
        self._thread = threading.Thread(target=self._run, name="publish", daemon=True)
        self._thread.start()

    def publish(
        self,
        tag: str | None,
        metrics: Mapping[str, float],
        attach: Sequence[Path],
        keep: int,
        extra: Mapping[str, tuple[np.ndarray, str]],
    ) -> Publication:
        """Return once the parameters are set aside. extra: further arrays, with their dtypes."""
        if tag is not None:
            check_tag(tag)
        missing = next((path for path in attach if not path.is_file()), None)
        if missing is not None:
            raise StorageError(f"Expected files to attach, got {missing}: check the path.")
        publication = Publication()
        self._requests.put(_Request(tag, metrics, attach, keep, extra, publication))
        publication.is_aside.wait()
        return publication

    def close(self) -> None:
        """Wait until all is written, within a limit."""
        self._requests.put(None)
        self._thread.join(_limits.PUBLISH_S)
        if self._thread.is_alive():
            warn(f"a version is still being written to {self.store} after {_limits.PUBLISH_S:g} s, and is given up")

    def _run(self) -> None:
        while (request := self._requests.get()) is not None:
            try:
                request.publication.end(self._publish(request))
            except HeadwaterError as error:
                warn(f"no version was published: {error}")
                self._disconnect()
                request.publication.end(None, error)
            except BaseException as error:
                request.publication.end(None, error)
                raise
        self._disconnect()

    def _disconnect(self) -> None:
        session, self._session = self._session, None
        self._copies.clear()  # their delta streams end with the session
        if session is not None:
            session.close()

    def _publish(self, request: _Request) -> Version:
        arrays, dtypes, commit = self._pull(request.publication)
        for name, (array, dtype) in request.extra.items():
            arrays[name], dtypes[name] = array, dtype
        version = self.versions.publish(
            arrays, dtypes=dtypes, commit=commit, metrics=request.metrics, tag=request.tag,
            attach=request.attach, base=self._last, keep=request.keep,
        )  # fmt: skip
        self._last = Weights(version, arrays)
        return version

    def _pull(self, publication: Publication) -> tuple[dict[str, np.ndarray], dict[str, str], int]:
        """Return the parameters by name, their dtypes, and the commit that they are of."""
        if self._session is None:
            self._session = self._open_session()
            self._session._ask(StateSet(STORE_KEY, msgspec.msgpack.encode(str(self.versions))), Done)
        session, peers = self._session, self._session._peers
        readers = [peers.reader(i) for i in range(len(peers.addresses))]
        self._follow_tables(session)
        with session._held() if self._copies else nullcontext():
            self._catch_up()
            held = session._ask(SetAside(), Held)
            rows = {table.name: copy.all_rows() for table, copy in self._copies}
        publication.is_aside.set()
        try:
            if not held.tensors and not rows:
                raise UsageError("Expected a job with registered parameters, got one that has none yet.")
            layout = Layout(held.tensors)
            for reader in readers:  # while the worker computes
                reader.send(MakeRoom())
            for reader in readers:
                peers.receive(reader, Done)
            arena = self._room.take(layout.wire_bytes)
            for i, reader in enumerate(readers):
                part = layout.part(i, len(readers))
                view = memoryview(arena[part.start_byte : part.start_byte + part.wire_bytes])
                reader.send(Pull("aside"))
                peers.receive(reader, Pulled, view)
        finally:
            session._ask(Release(), Done)
        arrays, dtypes = layout.views(arena), {spec.name: spec.dtype for spec in held.tensors}
        for name, (ids, values) in rows.items():
            arrays |= {f"tables/{name}/ids": ids, f"tables/{name}/values": values}
            dtypes |= {f"tables/{name}/ids": "int64", f"tables/{name}/values": "float32"}
        return arrays, dtypes, held.commit

    def _follow_tables(self, session: Session) -> None:
        """Have copies of all tables that lack little of what the servers have."""
        for number, spec in list(enumerate(session._ask(StatsGet(), Stats).tables))[len(self._copies) :]:
            table = session._table(number, spec)
            table.track(self._consumer, ends=True)
            self._copies.append((table, TableCopy.of(spec)))
        self._catch_up()

    def _catch_up(self) -> None:
        for table, copy in self._copies:
            more = True
            while more:
                changes = table.changes(self._consumer, _ROWS, state=False)
                copy.apply(changes)
                more = changes.more


def read_saved(path: str) -> tuple[dict[str, np.ndarray], dict[str, str], int]:
    """Return the parameters of a saved job or of a store, by name, in the model's dtypes, those, and the commit.

    Raises StorageError where there is neither, or it is torn or rotten.
    """
    files, folder = open_files(path)
    folder = locate(files, folder)
    if MANIFEST not in files.list(folder):
        folder = newest(files, folder)
    manifest = msgspec.structs.replace(open_manifest(files, folder), optimizer=None)  # of which nothing is read
    layout = manifest.layout
    part, arena = layout.part(0, 1), np.zeros(layout.wire_bytes, np.uint8)
    masters = part.new_plane()
    read_dense(files, folder, manifest, part, {"master": masters})
    for s, master in zip(part.slices, masters, strict=True):
        wire = arena[s.byte : s.byte + s.wire_bytes]
        if s.lane.dtype == s.lane.master:
            wire[:] = master.view(np.uint8)
        else:
            _kernels.convert(wire, s.lane.dtype, master, s.lane.master)
    return layout.views(arena), {spec.name: spec.dtype for spec in layout.specs}, manifest.commit


def read_store(state: Mapping[str, bytes]) -> str | None:
    """Return where a job's versions are, from its dictionary; None: it has published none."""
    data: Any = state.get(STORE_KEY)
    return None if data is None else msgspec.msgpack.decode(data, type=str)
