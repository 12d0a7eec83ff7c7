"""A disk in memory that loses, tears and spoils what a real one may, by a seed; and a way to spoil a file on a real one."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from headwater._files import Writer, byte_views, named_failure

if TYPE_CHECKING:
    from typing_extensions import Buffer

SECTOR = 512


def cut_off_spilled(folder: Path) -> None:
    """Cut off the unnamed file to which a table of this process spills in a folder: no row comes back whole."""
    links = [(link, str(link.readlink())) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    (file,) = [link for link, target in links if target.startswith(str(folder))]
    os.truncate(file, 0)


class _File:
    def __init__(self, data: bytes = b"", ahead: int = 0) -> None:
        self.data = bytearray(data)
        self.ahead = min(ahead, SECTOR + 100)  # zeros that stand at the end until it is closed
        self.synced = len(data)  # so many bytes survive a power cut
        self.is_broken = False  # a sync failed: later ones say that all is well, and save nothing


class _Folder:
    def __init__(self) -> None:
        self.names: dict[str, _Node] = {}
        self.synced: dict[str, _Node] = {}  # the names that survive a power cut
        self.pending: list[dict[str, _Node | None]] = []  # changes since then; each survives as a whole, or not

    def change(self, change: dict[str, _Node | None]) -> None:
        _apply(self.names, change)
        self.pending.append(change)

    def sync(self) -> None:
        self.synced = dict(self.names)
        self.pending.clear()


_Node: TypeAlias = _File | _Folder


def _apply(names: dict[str, _Node], change: dict[str, _Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class FaultyFiles:
    """Files in memory. `cut_power` returns the disk as the next life finds it.

    `hook(operation, path)` is called before each operation and may raise; `room` is the bytes until the disk is full; the `failing_sync`-th
    sync, of a file or a folder, fails with EIO.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        room: int | None = None,
        failing_sync: int = 0,
        hook: Callable[[str, str], None] = lambda operation, path: None,
    ) -> None:
        self.hook, self.room, self.failing_sync, self.syncs = hook, room, failing_sync, 0
        self._random = random.Random(seed)
        self._root = _Folder()

    def cut_power(self) -> FaultyFiles:
        """Of names and bytes that were not synced any part survives: of a file a prefix, now and then with a hole of zeros."""
        after = FaultyFiles(self._random.randrange(1 << 62))
        after._root = self._surviving(self._root)
        return after

    def flip(self, path: str, offset: int, bit: int) -> None:
        """Flip one bit of a file."""
        self._file(path).data[offset] ^= 1 << bit

    def create(self, path: str, *, ahead: int = 0, is_read_soon: bool = True) -> Writer:
        self.hook("create", path)
        with named_failure("create", path):
            folder, name = self._place(path)
            if isinstance(folder.names.get(name), _Folder):
                raise IsADirectoryError(errno.EISDIR, path)
            file = _File(ahead=ahead)
            folder.change({name: file})
            return _FaultyWriter(self, path, file)

    def read_into(self, path: str, offset: int, target: memoryview) -> int:
        self.hook("read", path)
        with named_failure("read", path):
            file = self._file(path)
            data = (file.data + bytes(file.ahead))[offset : offset + target.nbytes]
            target[: len(data)] = data
            return len(data)

    def size(self, path: str) -> int:
        self.hook("size", path)
        file = self._file(path)
        return len(file.data) + file.ahead

    def list(self, folder: str) -> list[str]:
        self.hook("list", folder)
        node = self._node(folder)
        return sorted(node.names) if isinstance(node, _Folder) else []

    def rename(self, old: str, new: str) -> None:
        self.hook("rename", old)
        with named_failure("rename", f"{old} to {new}"):
            (folder, name), (to, new_name) = self._place(old), self._place(new)
            assert folder is to, "from one folder to another it would not be atomic here"
            if name not in folder.names:
                raise FileNotFoundError(errno.ENOENT, old)
            target = folder.names.get(new_name)
            if isinstance(target, _Folder) and target.names:
                raise OSError(errno.ENOTEMPTY, new)
            folder.change({name: None, new_name: folder.names[name]})

    def remove(self, path: str) -> None:
        self.hook("remove", path)
        node = self._node(path)
        if node is None:
            return
        if isinstance(node, _Folder):
            for name in sorted(node.names):
                self.remove(f"{path}/{name}")
        folder, name = self._place(path)
        folder.change({name: None})

    def make_folder(self, path: str) -> None:
        self.hook("make_folder", path)
        folder = self._root
        for name in path.strip("/").split("/"):
            if name not in folder.names:
                folder.change({name: _Folder()})
                folder.sync()
            node = folder.names[name]
            assert isinstance(node, _Folder)
            folder = node

    def write_again(self, path: str, start: int, stop: int) -> None:
        self.hook("sync", path)
        with named_failure("sync", path):
            file = self._file(path)
            file.is_broken = file.is_broken and start > file.synced
            zeros = max(stop - len(file.data), 0)  # that stood there already, and are written now
            file.data, file.ahead = file.data + bytes(zeros), file.ahead - zeros
            self._sync(file)

    def sync_folder(self, path: str) -> None:
        self.hook("sync_folder", path)
        with named_failure("sync the folder", path):
            node = self._node(path)
            if not isinstance(node, _Folder):
                raise FileNotFoundError(errno.ENOENT, path)
            self._count_sync()
            node.sync()

    def _write(self, file: _File, view: memoryview) -> int:
        room = view.nbytes if self.room is None else min(view.nbytes, self.room)
        if self.room is not None:
            self.room -= room
        file.data += view[:room]
        return room

    def _sync(self, file: _File) -> None:
        try:
            self._count_sync()
        except OSError:
            file.is_broken = True
            raise
        if not file.is_broken:
            file.synced = len(file.data)

    def _count_sync(self) -> None:
        self.syncs += 1
        if self.syncs == self.failing_sync:
            raise OSError(errno.EIO, "sync")

    def _node(self, path: str) -> _Node | None:
        node: _Node | None = self._root
        for name in path.strip("/").split("/"):
            node = node.names.get(name) if isinstance(node, _Folder) else None
        return node

    def _file(self, path: str) -> _File:
        node = self._node(path)
        if not isinstance(node, _File):
            raise FileNotFoundError(errno.ENOENT, path)
        return node

    def _place(self, path: str) -> tuple[_Folder, str]:
        parent, _, name = path.rpartition("/")
        folder = self._node(parent) if parent else self._root
        if not isinstance(folder, _Folder):
            raise FileNotFoundError(errno.ENOENT, parent)
        return folder, name

    def _surviving(self, folder: _Folder) -> _Folder:
        names = dict(folder.synced)
        for change in folder.pending:
            if self._random.random() < 0.5:
                _apply(names, change)
        after = _Folder()
        for name, node in sorted(names.items()):
            after.names[name] = self._surviving(node) if isinstance(node, _Folder) else self._torn(node)
        after.sync()
        return after

    def _torn(self, file: _File) -> _File:
        end = self._random.choice((file.synced, len(file.data), self._random.randint(file.synced, len(file.data))))
        data = file.data[:end]
        if self._random.random() < 0.3:
            start = max(file.synced, self._random.randint(0, end) // SECTOR * SECTOR)
            stop = min(start + SECTOR, end)
            data[start:stop] = bytes(stop - start)
        return _File(bytes(data) + bytes(self._random.randint(0, file.ahead)))


class _FaultyWriter:
    def __init__(self, files: FaultyFiles, path: str, file: _File) -> None:
        self.size = 0
        self._files, self._path, self._file = files, path, file

    def write(self, *buffers: Buffer) -> None:
        self._files.hook("write", self._path)
        with named_failure("write to", self._path):
            for view in byte_views(buffers):
                written = self._files._write(self._file, view)
                self.size += written
                if written < view.nbytes:
                    raise OSError(errno.ENOSPC, self._path)

    def sync(self) -> None:
        self._files.hook("sync", self._path)
        with named_failure("sync", self._path):
            self._files._sync(self._file)

    def close(self) -> None:
        self._files.hook("close", self._path)
        self._file.ahead = 0
