"""Files that must outlive a power cut: on this machine's disk, or wherever an fsspec URL points.

A name that is new survives from `sync_folder` of its folder on, what a file holds from its own `sync` on. A failure is a StorageError
that names the file and says what to do; a file that was being written then holds any part of what it was given.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from headwater._errors import SettingError, StorageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BUFFERS = 1024  # in one system call, IOV_MAX on Linux
_DIRECT_BYTES = 1 << 22  # at once past the cache
_BEGIN_BYTES = 1 << 24  # written to the cache before the disk begins to take them

_ADVICE = {
    errno.ENOSPC: "The disk is full: free some space there, or choose another store",
    errno.EDQUOT: "This user's quota is used up: free some space there, or choose another store",
    errno.EACCES: "Let this user write there, or choose another store",
    errno.EROFS: "Make it writable, or choose another store",
    errno.ENOENT: "Check the path; was it removed meanwhile?",
}


class Writer(Protocol):
    """An open file that grows at its end. Not for several threads at once, but `sync` may run beside `write`."""

    size: int  # bytes written so far

    def write(self, *buffers: Buffer) -> None:
        """Append all of them, in order; contiguous, only read, and the caller's again on return. Raises StorageError."""

    def sync(self) -> None:
        """Return when what was written before the call survives a power cut. Raises StorageError."""

    def close(self) -> None:
        """Close without syncing; a second time does nothing. Raises StorageError."""


class Files(Protocol):
    """What a store's files can do; every failure is a StorageError. Calls may come from several threads."""

    def create(self, path: str, *, ahead: int = 0, is_read_soon: bool = True) -> Writer:
        """Open a file for writing; what was there is lost.

        ahead: space is taken on the disk for so many bytes more than are written, which makes `sync` faster; after a crash they
        stand at the end as zeros. is_read_soon: whether it is worth a place in the system's cache.
        """

    def read_into(self, path: str, offset: int, target: memoryview) -> int:
        """Fill the target from the offset on; returns the bytes read, fewer only at the end of the file."""

    def size(self, path: str) -> int:
        """Return a file's bytes. Raises FileNotFoundError when it is missing."""

    def list(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted; none when the folder is missing."""

    def rename(self, old: str, new: str) -> None:
        """Put a file in the place of what has the new name, or move a folder to a free name; durable after sync_folder."""

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all in it; missing is fine."""

    def make_folder(self, path: str) -> None:
        """Make a folder and those above it, durably; existing is fine."""

    def write_again(self, path: str, start: int, stop: int) -> None:
        """Return when what a file holds from `start` to `stop`, whoever wrote it, survives a power cut.

        A sync of another life may have failed, after which the system takes what was not written for written.
        """

    def sync_folder(self, path: str) -> None:
        """Return when the names in a folder, those made, renamed and removed, survive a power cut."""


@contextmanager
def named_failure(doing: str, path: str, kind: type[Exception] = OSError) -> Iterator[None]:
    """Turn an error of the system, or of another kind, into a StorageError that names the file and what to do."""
    try:
        yield
    except StorageError:
        raise
    except kind as error:
        number = error.errno if isinstance(error, OSError) else None
        why = os.strerror(number) if number else f"{type(error).__name__}: {error}"
        advice = _ADVICE.get(number or 0, "Check the disk or the service behind it, or choose another store")
        raise StorageError(f"Cannot {doing} {path}: {why}. {advice}.") from error


def byte_views(buffers: Sequence[Buffer]) -> list[memoryview]:
    """Return each buffer that is not empty as bytes, nothing copied."""
    views = [memoryview(buffer) for buffer in buffers]
    return [view.cast("B") for view in views if view.nbytes]


class _LocalWriter:
    def __init__(self, path: str, ahead: int = 0) -> None:
        self.size = self._taken = self._begun = 0
        self._path, self._ahead = path, ahead
        with named_failure("create", path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(self, *buffers: Buffer) -> None:
        views = byte_views(buffers)
        self._take(sum(view.nbytes for view in views))
        with named_failure("write to", self._path):
            while views:
                written = os.writev(self._fd, views[:_BUFFERS])
                self.size += written
                whole = 0
                while whole < len(views) and written >= views[whole].nbytes:
                    written -= views[whole].nbytes
                    whole += 1
                del views[:whole]
                if written:
                    views[0] = views[0][written:]
        if self.size - self._begun >= _BEGIN_BYTES:
            with suppress(OSError):  # dirty pages begin to be written, and stay
                os.posix_fadvise(self._fd, self._begun, self.size - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = self.size

    def _take(self, size: int) -> None:
        """Have space for so many bytes and some ahead."""
        end = self.size + size
        if self._ahead and end > self._taken:
            with suppress(OSError):  # where there is none the write says so
                os.posix_fallocate(self._fd, self._taken, end + self._ahead - self._taken)
            self._taken = end + self._ahead

    def sync(self) -> None:
        with named_failure("sync", self._path):
            os.fdatasync(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with named_failure("close", self._path):
                try:
                    if self._taken:
                        os.ftruncate(fd, self.size)
                finally:
                    os.close(fd)


class _DirectWriter(_LocalWriter):
    """Past the system's cache, where the file system can: a fifth of the work, and what others have there stays."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._room, self._filled = mmap.mmap(-1, _DIRECT_BYTES), 0  # which begins on a page
        self._set_direct(True)

    def _set_direct(self, is_direct: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT
        with suppress(OSError):  # it has no such thing
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | (os.O_DIRECT if is_direct else 0))

    def write(self, *buffers: Buffer) -> None:
        for view in byte_views(buffers):
            at = 0
            while at < view.nbytes:
                count = min(view.nbytes - at, _DIRECT_BYTES - self._filled)
                self._room[self._filled : self._filled + count] = view[at : at + count]
                at, self._filled = at + count, self._filled + count
                if self._filled == _DIRECT_BYTES:
                    self._flush()

    def _flush(self) -> None:
        filled, self._filled = self._filled, 0
        with memoryview(self._room) as room:
            super().write(room[:filled])

    def sync(self) -> None:
        self._set_direct(False)  # the rest is no whole page
        self._flush()
        super().sync()


class LocalFiles:
    """This machine's file system, unbuffered: one system call per write, straight from memory."""

    def create(self, path: str, *, ahead: int = 0, is_read_soon: bool = True) -> Writer:
        return _LocalWriter(path, ahead) if is_read_soon else _DirectWriter(path)

    def read_into(self, path: str, offset: int, target: memoryview) -> int:
        target = target.cast("B") if target.nbytes else target
        done = 0
        with named_failure("read", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while done < target.nbytes and (got := os.preadv(fd, [target[done:]], offset + done)):
                    done += got
            finally:
                os.close(fd)
        return done

    def size(self, path: str) -> int:
        try:
            return Path(path).stat().st_size
        except FileNotFoundError:
            raise
        except OSError:
            with named_failure("measure", path):
                raise

    def list(self, folder: str) -> list[str]:
        with named_failure("list", folder), suppress(FileNotFoundError):
            return sorted(entry.name for entry in Path(folder).iterdir())
        return []

    def rename(self, old: str, new: str) -> None:
        with named_failure("rename", f"{old} to {new}"):
            Path(old).rename(new)

    def remove(self, path: str) -> None:
        with named_failure("remove", path), suppress(FileNotFoundError):
            if Path(path).is_dir():
                shutil.rmtree(path)
            else:
                Path(path).unlink()

    def make_folder(self, path: str) -> None:
        with named_failure("make the folder", path):
            missing = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
            Path(path).mkdir(parents=True, exist_ok=True)
            for folder in missing:
                self.sync_folder(str(folder.parent))

    def write_again(self, path: str, start: int, stop: int) -> None:
        with named_failure("sync", path), Path(path).open("r+b") as file:
            while start < stop:
                file.seek(start)
                data = file.read(min(1 << 20, stop - start))
                if not data:
                    break
                file.seek(start)
                file.write(data)
                start += len(data)
            file.flush()
            os.fsync(file.fileno())

    def sync_folder(self, path: str) -> None:
        with named_failure("sync the folder", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


class _RemoteWriter:
    def __init__(self, system: Any, path: str) -> None:
        self.size = 0
        self._path = path
        with named_failure("create", path, Exception):
            self._file = system.open(path, "wb")

    def write(self, *buffers: Buffer) -> None:
        with named_failure("write to", self._path, Exception):
            for view in byte_views(buffers):
                self._file.write(view)
                self.size += view.nbytes

    def sync(self) -> None:
        with named_failure("sync", self._path, Exception):
            self._file.flush()

    def close(self) -> None:
        with named_failure("close", self._path, Exception):
            self._file.close()


class RemoteFiles:
    """What an fsspec URL points at. A file is there, whole, once it is closed; `sync` only flushes, a folder need not be synced.

    Renaming a file copies it where the service knows no better; renaming a folder is then not atomic.
    """

    def __init__(self, system: Any) -> None:
        self._system = system  # an fsspec.AbstractFileSystem

    def create(self, path: str, *, ahead: int = 0, is_read_soon: bool = True) -> Writer:
        return _RemoteWriter(self._system, path)

    def read_into(self, path: str, offset: int, target: memoryview) -> int:
        target = target.cast("B") if target.nbytes else target
        done = 0
        with named_failure("read", path, Exception), self._system.open(path, "rb", cache_type="none") as file:
            file.seek(offset)
            while done < target.nbytes and (got := file.readinto(target[done:])):
                done += got
        return done

    def size(self, path: str) -> int:
        self._system.invalidate_cache()
        try:
            return int(self._system.size(path))
        except FileNotFoundError:
            raise
        except Exception:
            with named_failure("measure", path, Exception):
                raise

    def list(self, folder: str) -> list[str]:
        with named_failure("list", folder, Exception), suppress(FileNotFoundError):
            self._system.invalidate_cache()
            return sorted(str(path).rstrip("/").rpartition("/")[2] for path in self._system.ls(folder, detail=False))
        return []

    def rename(self, old: str, new: str) -> None:
        with named_failure("rename", f"{old} to {new}", Exception):
            self._system.mv(old, new, recursive=self._system.isdir(old))

    def remove(self, path: str) -> None:
        with named_failure("remove", path, Exception), suppress(FileNotFoundError):
            self._system.rm(path, recursive=True)

    def make_folder(self, path: str) -> None:
        with named_failure("make the folder", path, Exception):
            self._system.makedirs(path, exist_ok=True)

    def write_again(self, path: str, start: int, stop: int) -> None:
        pass

    def sync_folder(self, path: str) -> None:
        pass


def claim(files: Files, path: str) -> Callable[[], None]:
    """Be the only one who holds a file, where it is this machine's; returns what lets go of it, as the end of the process does.

    Raises SettingError naming the process that holds it.
    """
    if not isinstance(files, LocalFiles):
        return lambda: None
    with named_failure("lock", path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 256).decode(errors="replace") or "another process"
            os.close(fd)
            raise SettingError(
                f"Expected a store that nobody uses, got one that {holder} holds — {path}: end that job, or give another folder."
            ) from None
        os.truncate(fd, 0)
        os.write(fd, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return partial(os.close, fd)


def open_files(store: str) -> tuple[Files, str]:
    """Return the files of a store and its path there: a folder of this machine, or an fsspec URL such as 's3://bucket/job'.

    Raises SettingError when fsspec, or what it needs for that URL, is not installed.
    """
    protocol, url, path = store.partition("://")
    if not url or protocol == "file":
        return LocalFiles(), str(Path(path if url else store).expanduser().absolute())
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(store)
    except (ImportError, ValueError) as error:
        raise SettingError(
            f"Expected fsspec and its part for {protocol}:// to be installed, got: {error} — store {store!r}: "
            "pip install 'headwater[remote]' and what is named here, or name a folder."
        ) from error
    return RemoteFiles(system), path
