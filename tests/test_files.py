"""The contract of a store's files, kept by each kind of them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from faulty_files import FaultyFiles

from headwater._errors import SettingError, StorageError
from headwater._files import Files, LocalFiles, RemoteFiles, open_files


@pytest.fixture(params=["local", "remote", "faulty"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Files, str]]:
    if request.param == "faulty":
        yield FaultyFiles(seed=1), "/store"
    else:
        files, path = open_files(str(tmp_path / "store") if request.param == "local" else "memory://store")
        yield files, path
        files.remove(path)


def write(files: Files, path: str, *parts: bytes) -> None:
    writer = files.create(path)
    writer.write(*parts)
    writer.sync()
    writer.close()


def read(files: Files, path: str, offset: int = 0, size: int | None = None) -> bytes:
    target = bytearray(files.size(path) if size is None else size)
    return bytes(target[: files.read_into(path, offset, memoryview(target))])


def test_what_was_written_is_read(store: tuple[Files, str]) -> None:
    files, root = store
    files.make_folder(f"{root}/a/b")
    files.make_folder(f"{root}/a/b")
    writer = files.create(f"{root}/a/b/file")
    writer.write(b"one", bytearray(b""), memoryview(b"two"))
    writer.write(np.arange(3, dtype="<u2"), np.empty((0, 4), np.float32))
    writer.write()
    assert writer.size == 12
    writer.sync()
    writer.close()
    writer.close()
    files.write_again(f"{root}/a/b/file", 3, 12)
    files.sync_folder(f"{root}/a/b")
    assert files.size(f"{root}/a/b/file") == 12
    assert read(files, f"{root}/a/b/file") == b"onetwo\0\0\1\0\2\0"


def test_reading_is_short_only_at_the_end(store: tuple[Files, str]) -> None:
    files, root = store
    files.make_folder(root)
    write(files, f"{root}/file", b"0123456789")
    assert read(files, f"{root}/file", 2, 3) == b"234"
    assert read(files, f"{root}/file", 8, 5) == b"89"
    assert read(files, f"{root}/file", 10, 5) == b""
    assert read(files, f"{root}/file", 12, 5) == b""
    assert read(files, f"{root}/file", 2, 0) == b""


def test_many_buffers_are_written_in_order(store: tuple[Files, str]) -> None:
    files, root = store
    files.make_folder(root)
    parts = [bytes([number % 251]) * (number % 7) for number in range(5000)]
    write(files, f"{root}/file", *parts)
    assert read(files, f"{root}/file") == b"".join(parts)


def test_creating_again_truncates(store: tuple[Files, str]) -> None:
    files, root = store
    files.make_folder(root)
    write(files, f"{root}/file", b"long before")
    write(files, f"{root}/file", b"now")
    assert read(files, f"{root}/file") == b"now"


def test_names_are_listed_sorted(store: tuple[Files, str]) -> None:
    files, root = store
    assert files.list(root) == []
    files.make_folder(f"{root}/folder")
    for name in ("b", "a", "c"):
        write(files, f"{root}/{name}", b"x")
    write(files, f"{root}/folder/inner", b"x")
    assert files.list(root) == ["a", "b", "c", "folder"]
    assert files.list(f"{root}/folder") == ["inner"]


def test_a_renamed_file_replaces_another(store: tuple[Files, str]) -> None:
    files, root = store
    files.make_folder(root)
    write(files, f"{root}/old", b"old")
    write(files, f"{root}/new", b"new")
    files.rename(f"{root}/new", f"{root}/old")
    assert files.list(root) == ["old"]
    assert read(files, f"{root}/old") == b"new"


def test_a_renamed_folder_keeps_what_is_in_it(store: tuple[Files, str]) -> None:
    files, root = store
    files.make_folder(f"{root}/aside")
    write(files, f"{root}/aside/file", b"x")
    files.rename(f"{root}/aside", f"{root}/place")
    assert files.list(root) == ["place"]
    assert read(files, f"{root}/place/file") == b"x"


def test_removing_takes_files_and_folders_and_nothing_else(store: tuple[Files, str]) -> None:
    files, root = store
    files.make_folder(f"{root}/folder/inner")
    write(files, f"{root}/folder/inner/file", b"x")
    write(files, f"{root}/folder2", b"x")
    write(files, f"{root}/file", b"x")
    for name in ("folder", "file", "missing"):
        files.remove(f"{root}/{name}")
    assert files.list(root) == ["folder2"]


def test_what_is_missing_is_said(store: tuple[Files, str]) -> None:
    files, root = store
    files.make_folder(root)
    with pytest.raises(FileNotFoundError):
        files.size(f"{root}/missing")
    with pytest.raises(StorageError, match=r"Cannot read .*store/missing: .*\."):
        read(files, f"{root}/missing", size=1)
    with pytest.raises(StorageError, match=r"Cannot rename .*store/missing to .*store/here"):
        files.rename(f"{root}/missing", f"{root}/here")


def test_a_full_disk_is_called_full() -> None:
    writer = open_files("/dev")[0].create("/dev/full")
    with pytest.raises(
        StorageError, match=r"Cannot write to /dev/full: No space left on device\. The disk is full: free some"
    ):
        writer.write(b"x")
    assert writer.size == 0
    writer.close()


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev

    def short(fd: int, views: list[memoryview]) -> int:
        return real(fd, [views[0], views[1][:1]] if len(views) > 1 else [views[0][:2]])

    monkeypatch.setattr(os, "writev", short)
    write(LocalFiles(), str(tmp_path / "file"), b"0", b"123", b"", b"4567", b"89")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_failed_sync_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(os, "fdatasync", fail)
    writer = LocalFiles().create(str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"Cannot sync .*file: Input/output error\. Check the disk"):
        writer.sync()
    writer.close()


def test_where_no_folder_can_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    files = LocalFiles()
    for fails in (
        files.make_folder,
        files.list,
        partial(files.write_again, start=0, stop=1),
        files.sync_folder,
        files.create,
        files.size,
    ):
        with pytest.raises(StorageError, match=r"Cannot .*file/folder: Not a directory\."):
            fails(str(tmp_path / "file" / "folder"))


def test_a_store_is_a_folder_or_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for store in ("store", "./store", f"{tmp_path}/store", f"file://{tmp_path}/store"):
        files, path = open_files(store)
        assert isinstance(files, LocalFiles)
        assert path == str(tmp_path / "store")
    files, path = open_files("memory://store/job")
    assert isinstance(files, RemoteFiles)
    assert path.endswith("store/job")


def test_an_unheard_protocol_is_said() -> None:
    with pytest.raises(SettingError, match=r"Expected fsspec and its part for unheard:// .*store 'unheard://x'"):
        open_files("unheard://x")


def test_a_missing_fsspec_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(SettingError, match=r"pip install 'headwater\[remote\]'"):
        open_files("memory://x")
