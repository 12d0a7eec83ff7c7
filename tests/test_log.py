"""A server's log: its bytes, what power cuts and bad disks do to it, who waits for whom."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from faulty_files import FaultyFiles
from xxhash import xxh3_64_intdigest

from headwater import _log
from headwater._errors import InternalError, StorageError
from headwater._files import Files, LocalFiles
from headwater._log import Log, LogEnd, LogReader

FOLDER = "/store"
FIRST = f"{FOLDER}/log-0-000000000120.hwl"
Record = tuple[bytes, list[bytes]]


def disk(
    seed: int = 0,
    room: int | None = None,
    failing_sync: int = 0,
    hook: Callable[[str, str], None] = lambda operation, path: None,
) -> FaultyFiles:
    files = FaultyFiles(seed, room=room, failing_sync=failing_sync)
    files.make_folder(FOLDER)
    files.hook = hook
    return files


def append(log: Log, *records: Record) -> None:
    """Append records and sync each."""
    for head, blobs in records:
        log.sync(log.append(head, blobs))


def read(files: Files, since: int = 0, folder: str = FOLDER) -> tuple[list[Record], LogEnd]:
    reader = LogReader(files, folder, 0, since)
    records = [(entry.head, [blob.tobytes() for blob in entry.blobs()]) for entry in reader]
    return records, reader.end._replace(known=0)


def small(number: int) -> Record:
    return f"head {number}".encode(), [bytes([number]) * (number % 4) for number in range(number, number + number % 3)]


def two_files(count: int = 3) -> tuple[FaultyFiles, list[Record]]:
    """Return a log with some synced records in each of two files."""
    files, records = disk(), [small(number) for number in range(2 * count)]
    log = Log(files, FOLDER, 0, 120)
    append(log, *records[:count])
    log.rotate(130)
    append(log, *records[count:])
    log.close()
    return files, records


def content(files: FaultyFiles, path: str) -> bytes:
    data = bytearray(files.size(path))
    files.read_into(path, 0, memoryview(data))
    return bytes(data)


def replace(files: FaultyFiles, path: str, data: bytes) -> None:
    writer = files.create(path)
    writer.write(data)
    writer.close()


# What is written is read.


def test_format_is_the_documented_one() -> None:
    files = disk()
    log = Log(files, FOLDER, 0, 120)
    log.append(b"push", [b"abc", b""])
    log.close()
    start = "48454144574c4f47 02000000 00000000 7800000000000000 00000000 01000000 00000000 0000000000000000 0000000000000000"
    record = """48575243 04000000 02000000 0300000000000000 3c00000000000000
        55c1799ae19ba844 50392f89945faf78 e468da86b142db59 0300000000000000 0000000000000000 70757368 616263"""
    assert content(files, FIRST) == bytes.fromhex(start + "bd167cdfc852e486" + record)
    for line in record.splitlines():
        words = [word for word in line.split() if len(word) > 6]
        assert all(word in (_log.__doc__ or "") for word in words)


def test_records_are_read_in_order_on_a_real_disk(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((300, 1000)).astype(np.float32)
    log = Log(LocalFiles(), str(tmp_path), 0, 0)
    ticket = 0
    for number, row in enumerate(values):
        if number % 100 == 50:
            log.rotate(number)
        ticket = log.append(str(number).encode(), [row.data, row[: number % 7].data, np.arange(number)])
    log.sync(ticket)
    log.close()
    Log(LocalFiles(), str(tmp_path), 11, 0).close()  # another server's
    reader = LogReader(LocalFiles(), str(tmp_path), 0)
    count = 0
    for number, entry in enumerate(reader):
        blobs = entry.blobs()
        assert entry.head == str(number).encode()
        assert all(blob.dtype == np.uint8 for blob in blobs)
        np.testing.assert_array_equal(blobs[0].view(np.float32), values[number])
        np.testing.assert_array_equal(blobs[1].view(np.float32), values[number][: number % 7])
        np.testing.assert_array_equal(blobs[2].view(np.int64), np.arange(number))
        count += 1
    assert count == len(values)
    assert reader.end[:3] == (
        str(tmp_path / "log-0-000000000250.hwl"),
        (tmp_path / "log-0-000000000250.hwl").stat().st_size,
        "",
    )


def test_heads_are_scanned_without_the_payload() -> None:
    files, length = disk(), 1 << 22
    log = Log(files, FOLDER, 0, 120)
    append(log, *[(b"head", [bytes(length)])] * 5)
    log.close()
    asked = 0
    real = files.read_into

    def counting(path: str, offset: int, target: memoryview) -> int:
        nonlocal asked
        asked += target.nbytes
        return real(path, offset, target)

    files.read_into = counting  # type: ignore[method-assign]
    assert len(list(LogReader(files, FOLDER, 0))) == 5
    assert asked < 2 * length  # the last one's, which nothing shows to have been durable


def test_no_log_is_empty() -> None:
    assert read(disk()) == ([], LogEnd("", 0, ""))


def test_reading_begins_with_the_snapshot() -> None:
    files, records = two_files()
    assert read(files, 120)[0] == records
    assert read(files, 121)[0] == records[3:]
    assert read(files, 130)[0] == records[3:]
    assert read(files, 131) == ([], LogEnd("", 0, ""))


# Lives follow each other.


def test_lives_that_begin_at_the_same_commit_follow_each_other() -> None:
    files = disk()
    records = [small(number) for number in range(13)]
    for record in records:
        log = Log(files, FOLDER, 0, 120)
        append(log, record)
        log.close()
    assert files.list(FOLDER)[:3] == [Path(FIRST).name + end for end in ("", ".1", ".10")]
    assert read(files, 120)[0] == records


def test_a_torn_tail_is_left_behind_by_the_next_life() -> None:
    files, records = two_files()
    last = f"{FOLDER}/log-0-000000000130.hwl"
    replace(files, last, content(files, last)[:-1])
    left, end = read(files)
    assert left == records[:-1]
    assert end.torn == "it is cut short"
    log = Log(files, FOLDER, 0, 132)
    append(log, (b"next", []))
    log.close()
    assert read(files)[0] == [*records[:-1], (b"next", [])]


def test_what_lies_behind_the_end_is_given_up() -> None:
    """A life may end the log earlier, even by whole files."""
    files, records = two_files()
    entries = list(LogReader(files, FOLDER, 0))
    log = Log(files, FOLDER, 0, 122, LogEnd(entries[1].file, entries[1].end, ""))
    append(log, (b"next", []))
    log.close()
    assert read(files)[0] == [*records[:2], (b"next", [])]


def test_a_file_that_was_torn_when_it_was_made_holds_nothing() -> None:
    files, records = two_files()
    for size in range(60):
        torn = f"{FOLDER}/log-0-000000000140.hwl"
        replace(files, torn, b"HEADWLOG"[:size] + bytes(max(0, size - 8)))
        left, end = read(files)
        assert left == records
        assert end.torn == f"{torn}: its header is damaged"
    log = Log(files, FOLDER, 0, 140)
    append(log, (b"next", []))
    log.close()
    assert read(files)[0] == [*records, (b"next", [])]


def test_dropping_leaves_what_is_read_from_there_on() -> None:
    for commit, left in ((119, 4), (120, 4), (125, 4), (130, 3), (135, 3), (140, 2), (145, 1)):
        files, _ = two_files()
        Log(files, FOLDER, 0, 140).close()
        log = Log(files, FOLDER, 0, 140)
        append(log, (b"next", []))
        before = read(files, commit)
        log.drop_before(commit)
        log.close()
        assert read(files, commit) == before
        assert len(files.list(FOLDER)) == left
    with pytest.raises(StorageError, match=r"140\.hwl .*: it is missing"):
        read(files)


def test_a_log_does_not_go_back() -> None:
    files, _ = two_files()
    with pytest.raises(InternalError, match="goes on after commit 130, got one from 129 on"):
        Log(files, FOLDER, 0, 129)


def test_a_life_that_came_to_nothing_is_given_up() -> None:
    """This server came back to commit 150, another did not; the job then goes on from what that one has."""
    files, records = two_files()
    Log(files, FOLDER, 0, 150).close()
    log = Log(files, FOLDER, 0, 140)
    append(log, (b"next", []))
    log.close()
    assert read(files)[0] == [*records, (b"next", [])]


# Damage is noticed.


def test_every_flipped_bit_is_noticed() -> None:
    """Where a later record or file shows that the damaged one had been durable, by an error; else by a log that ends there."""
    files, records = two_files()
    last = LogReader(files, FOLDER, 0)
    entry = list(last)[-1]
    for path in (FIRST, entry.file):
        for offset in range(files.size(path)):
            for bit in range(8):
                files.flip(path, offset, bit)
                if path == entry.file and offset >= entry.offset:
                    left, end = read(files)
                    assert left == records[:-1]
                    assert end[:2] == (path, entry.offset)
                    assert end.torn
                else:
                    with pytest.raises(StorageError, match=f"{path}"):
                        read(files)
                files.flip(path, offset, bit)
    assert read(files)[0] == records


def test_a_cut_is_noticed_where_it_can_be() -> None:
    files, records = two_files()
    entries = list(LogReader(files, FOLDER, 0))
    for path in (FIRST, entries[-1].file):
        whole = content(files, path)
        ends = [60, *(entry.end for entry in entries if entry.file == path)]
        for size in range(len(whole)):
            replace(files, path, whole[:size])
            if path == FIRST:
                with pytest.raises(StorageError, match=f"{path}"):
                    read(files)
            else:
                left, end = read(files)
                assert left == records[: 3 + max(0, sum(size >= end for end in ends) - 1)]
                assert bool(end.torn) == (size not in ends)
        replace(files, path, whole)


def test_a_missing_file_is_noticed() -> None:
    files, _ = two_files()
    files.remove(FIRST)
    with pytest.raises(StorageError, match=f"{FIRST} .*: it is missing"):
        read(files)


def test_a_file_under_another_name_is_noticed() -> None:
    files, _ = two_files()
    files.rename(f"{FOLDER}/log-0-000000000130.hwl", f"{FOLDER}/log-0-000000000140.hwl")
    with pytest.raises(
        StorageError, match=r"Expected .*140\.hwl to be what its name says, got that of server 0, commit 130"
    ):
        read(files)


def test_another_format_is_said() -> None:
    files = disk()
    whole = _log._START.pack(b"HEADWLOG", 3, 0, 120, 0, 1, 0, 0, 0)
    replace(files, FIRST, whole + _log._SUM.pack(xxh3_64_intdigest(whole)))
    with pytest.raises(StorageError, match=r"Expected format 2 in .*, got 3: use the headwater that wrote it\."):
        read(files)


def test_a_hole_in_what_was_not_synced_ends_the_log() -> None:
    """Though whole records lie behind it: the disk wrote them first."""
    files = disk()
    log = Log(files, FOLDER, 0, 120)
    append(log, (b"durable", []))
    hole = read(files)[1].offset
    for number in range(3):
        log.append(b"lost %d" % number)
    log.close()
    files.flip(FIRST, hole, 0)
    assert read(files) == ([(b"durable", [])], LogEnd(FIRST, hole, "its header is damaged"))


def test_a_log_within_a_payload_is_not_taken_for_one() -> None:
    files, records = two_files()
    inner = content(files, FIRST)
    log = Log(files, FOLDER, 0, 140)
    append(log, (b"copy", [inner, inner]))
    log.close()
    path = f"{FOLDER}/log-0-000000000140.hwl"
    files.flip(path, 60, 0)
    assert read(files) == (records, LogEnd(path, 60, "its header is damaged"))


# Failures stick.


@pytest.mark.parametrize("failure", ["full", "sync"])
def test_after_a_failure_nothing_more_is_promised(failure: str) -> None:
    files = disk(failing_sync=4 if failure == "sync" else 0)
    log = Log(files, FOLDER, 0, 120)  # two syncs
    append(log, (b"durable", []))
    if failure == "full":
        files.room = 100
        with pytest.raises(StorageError, match="The disk is full"):
            log.append(b"x", [bytes(1000)])
        files.room = None
    else:
        ticket = log.append(b"x")
        with pytest.raises(StorageError, match=r"Cannot sync .*Input/output error"):
            log.sync(ticket)
        with pytest.raises(StorageError, match="got one that stopped: Cannot sync"):
            log.sync(ticket)
    with pytest.raises(StorageError, match=r"got one that stopped: Cannot .* start this server again"):
        log.append(b"y")
    with pytest.raises(StorageError, match="got one that stopped"):
        log.rotate(130)
    log.sync(1)  # was durable before
    log.close()
    assert read(files.cut_power())[0][0] == (b"durable", [])


def test_a_closed_log_says_so() -> None:
    log = Log(disk(), FOLDER, 0, 120)
    log.close()
    log.close()
    with pytest.raises(StorageError, match="got one that stopped: it was closed"):
        log.append(b"x")


# Many wait for one.


def test_one_sync_serves_all_who_wait() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hook(operation: str, path: str) -> None:
        if operation == "sync" and threading.current_thread().name == "first":
            entered.set()
            assert go_on.wait(30)

    files = disk(hook=hook)
    log = Log(files, FOLDER, 0, 120)
    before = files.syncs
    threads = [threading.Thread(target=append, args=(log, (b"first", [])), name="first")]
    threads[0].start()
    assert entered.wait(30)
    appended = threading.Barrier(9)

    def wait(number: int) -> None:
        ticket = log.append(b"%d" % number)
        appended.wait(30)
        log.sync(ticket)

    threads += [threading.Thread(target=wait, args=(number,)) for number in range(8)]
    for thread in threads[1:]:
        thread.start()
    appended.wait(30)  # all eight are appended while the first sync runs
    go_on.set()
    for thread in threads:
        thread.join()
    assert files.syncs == before + 2
    log.close()
    assert len(read(files.cut_power())[0]) == 9


def test_all_who_wait_hear_of_a_failed_sync() -> None:
    files = disk(failing_sync=3)
    log = Log(files, FOLDER, 0, 120)
    appended, failed = threading.Barrier(8), []

    def wait() -> None:
        ticket = log.append(b"x")
        appended.wait(30)
        try:
            log.sync(ticket)
        except StorageError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(failed) == 8
    assert all("Input/output error" in text for text in failed)


def test_many_threads_append_sync_and_rotate(tmp_path: Path) -> None:
    log = Log(LocalFiles(), str(tmp_path), 0, 0)
    done = threading.Barrier(5)

    def work(who: int) -> None:
        for number in range(40):
            append(log, (b"%d %d" % (who, number), [bytes([who]) * 1000]))
        done.wait(30)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for commit in range(1, 11):
        log.rotate(commit)
    done.wait(30)
    for thread in threads:
        thread.join()
    log.close()
    records, _ = read(LocalFiles(), folder=str(tmp_path))
    for who in range(4):
        mine = [head for head, blobs in records if blobs == [bytes([who]) * 1000]]
        assert mine == [b"%d %d" % (who, number) for number in range(40)]


# Whatever happens.


class PowerCutError(Exception):
    pass


class Life:
    """A server's life with the log on a disk that fails, and what must be found after it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.records: list[Record] = []  # as they were appended
        self.durable = 0  # so many of them
        self.base = 0  # the log begins behind so many
        self.made = 0
        self.files = disk(seed)

    def live(self) -> None:
        """Find what the life before left, go on until something fails, lose power."""
        begins = self.recovered()
        self.is_dropping = False
        self.appended: list[tuple[int, int]] = []  # tickets, and how many records are durable with them
        self.files.syncs = 0
        match self.random.randrange(4):
            case 0:
                self.files.failing_sync = self.random.randrange(1, 15)
            case 1:
                self.files.room = self.random.randrange(4000)
            case _:
                self.files.hook = self.cut_after(self.random.randrange(60))
        log = None
        try:
            log = Log(self.files, FOLDER, 0, *begins)
            del self.records[begins[0] :]  # only now: what was given up in vain may be found again
            for _ in range(30):
                self.act(log)
            cut = self.random.random() < 0.5  # else only the process died
        except (PowerCutError, StorageError):
            cut = self.random.random() < 0.5
            self.files.hook = lambda operation, path: None
            if log is not None and not self.is_dropping:
                with pytest.raises(StorageError, match="got one that stopped"):
                    log.append(b"after")
        self.files.hook = lambda operation, path: None
        self.files.room, self.files.failing_sync = None, 0
        if cut:
            self.files = self.files.cut_power()

    def recovered(self) -> tuple[int, LogEnd | None]:
        """Return what the next log begins with, having checked what there is."""
        reader = LogReader(self.files, FOLDER, 0, self.base)
        entries = list(reader)
        found = [(entry.head, [blob.tobytes() for blob in entry.blobs()]) for entry in entries]
        expected = self.records[self.base :]
        assert found == expected[: len(found)], "not what was appended, in order"
        assert self.base + len(found) >= self.durable, "something acknowledged is lost"
        end = reader.end
        keep = self.random.randint(self.durable - self.base, len(found))
        if 0 < keep < len(found) and self.random.random() < 0.3:  # a life may give up what was not acknowledged
            end = LogEnd(entries[keep - 1].file, entries[keep - 1].end, "")
        else:
            keep = len(found)
        return self.base + keep, self.random.choice((end, None)) if end == reader.end else end

    def cut_after(self, operations: int) -> Callable[[str, str], None]:
        def hook(operation: str, path: str) -> None:
            nonlocal operations
            operations -= 1
            if operations < 0:
                raise PowerCutError

        return hook

    def act(self, log: Log) -> None:
        match self.random.randrange(10):
            case 0:
                log.rotate(len(self.records))
                self.durable = len(self.records)
                if self.random.random() < 0.5:
                    self.base = len(self.records)  # a snapshot is there
                    self.is_dropping = True
                    log.drop_before(self.base)
                    self.is_dropping = False
            case 1 | 2 | 3:
                if self.appended:
                    ticket, count = self.random.choice(self.appended)
                    log.sync(ticket)
                    self.durable = max(self.durable, count)
            case _:
                blobs: Sequence[bytes] = [
                    self.random.randbytes(self.random.choice((0, 1, 50, 700))) for _ in range(self.random.randrange(4))
                ]
                self.made += 1
                record = (b"%d" % self.made, list(blobs))
                self.records.append(record)
                self.appended.append((log.append(*record), len(self.records)))


def test_what_was_acknowledged_survives_whatever_happens() -> None:
    for seed in range(1500):
        life = Life(seed)
        try:
            for _ in range(4):
                life.live()
            life.recovered()
        except BaseException as error:
            error.add_note(f"replay with seed {seed}")
            raise
