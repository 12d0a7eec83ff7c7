"""A saved job: read by any number of servers and by other tools, whole or refused by the name of what is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from click.testing import CliRunner
from faulty_files import FaultyFiles
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import start_job
from test_layout import counts, layouts
from test_table import everything

import headwater as hw
from headwater import _cli, _kernels, _limits, _sealed, _session, _snapshot, errors, optim
from headwater._files import Files, open_files
from headwater._layout import Layout, TensorSpec
from headwater._rows import RowPolicy, TableSpec, Uniform, WholeRows, buckets_of
from headwater._sealed import File
from headwater._snapshot import Manifest, TableWriter

Array = npt.NDArray[Any]
ADAM = optim.Adam()
PLANES = ("master", *ADAM.slots)
SPEC = TableSpec("items", 3, optim.Adagrad(), Uniform(), 0, RowPolicy(), hw.asp())


def manifest(layout: Layout, files: list[File], servers: int = 1, commit: int = 1, **options: Any) -> Manifest:
    return Manifest.of(
        commit=commit,
        servers=servers,
        consistency=hw.bsp(),
        optimizer=ADAM,
        tensors=layout.specs,
        steps=[7] * len(layout.specs),
        **{"state": {"epoch": b"\x03"}, **options},
        files=files,
    )


def planes(layout: Layout, index: int = 0, servers: int = 1, *, filled: bool = False) -> dict[str, list[Array]]:
    """Return a part's planes; filled: with what is the same for an element of a tensor whatever the part.

    What is averaged has no slots.
    """
    found = {plane: layout.part(index, servers).new_plane() for plane in PLANES}
    if filled:
        part = layout.part(index, servers)
        for p, plane in enumerate(PLANES):
            for s, array in zip(part.slices, found[plane], strict=True):
                if s.lane.is_averaged and plane != "master":
                    continue
                for spec, start, at, size in part.pieces(s):
                    array[at : at + size] = 1e6 * p + 1e5 * layout.index[spec.name] + np.arange(start, start + size)
    return found


def write(files: Files, folder: str, layout: Layout, servers: int) -> Manifest:
    written: list[File] = []
    for i in range(servers):
        written += _snapshot.write_dense(
            files, folder, i, layout.part(i, servers), planes(layout, i, servers, filled=True)
        )
    _snapshot.publish(files, folder, manifest(layout, written, servers))
    return _snapshot.open_manifest(files, folder)


def store(files: Files, *commits: int) -> None:
    """Write a small snapshot after each of these commits."""
    layout = Layout([TensorSpec("w", (3,), "float32")])
    for commit in commits:
        folder = f"store/{_snapshot.snapshot_name(commit)}"
        part = planes(layout, filled=True)
        part["master"][0][:3] = commit
        written = _snapshot.write_dense(files, folder, 0, layout.part(0, 1), part)
        writer = TableWriter(files, folder, 0, 0, SPEC)
        writer.rows(*rows(range(commit, commit + 3)))
        _snapshot.publish(
            files, folder, manifest(layout, written + writer.close(), commit=commit, tables=[(SPEC, commit)])
        )


def newest(files: Files) -> int:
    """Return the commit of the newest snapshot, having read all of it."""
    folder = f"store/{_snapshot.find(files, 'store')[0]}"
    found = _snapshot.open_manifest(files, folder)
    into = planes(found.layout)
    _snapshot.read_dense(files, folder, found, found.layout.part(0, 1), into)
    assert into["master"][0][:3].tolist() == [found.commit] * 3
    (page,) = _snapshot.read_table(files, folder, found, 0)
    assert page.ids.tolist() == list(range(found.commit, found.commit + 3))
    _snapshot.verify(files, folder, found)
    return found.commit


def rows(ids: Any, version: int = 0) -> WholeRows:
    """Return rows that tell their id and version."""
    array = np.array(list(ids), np.int64)
    values = np.stack([array % 1000 + 1000 * version] * SPEC.width, axis=1).astype(np.float32)
    return WholeRows(array, array % 100 + version, values, np.full(len(array), version, np.float32))


# Dense tensors.


@given(layouts(), counts, counts)
def test_any_number_of_servers_reads_what_any_other_wrote(layout: Layout, before: int, after: int) -> None:
    files = FaultyFiles()
    found = write(files, "jobs/saved", layout, before)
    assert found.layout.specs == layout.specs
    assert found.steps == (7,) * len(layout.specs)
    for i in range(after):
        ours = planes(layout, i, after)
        _snapshot.read_dense(files, "jobs/saved", found, layout.part(i, after), ours, threads=after)
        for plane, arrays in planes(layout, i, after, filled=True).items():
            for array, expected in zip(ours[plane], arrays, strict=True):
                np.testing.assert_array_equal(array, expected, strict=True)


@settings(max_examples=20)
@given(layouts(), counts)
def test_other_tools_read_the_tensors_by_name(
    tmp_path_factory: pytest.TempPathFactory, layout: Layout, servers: int
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    found = write(*open_files(str(folder)), layout, servers)
    loaded: dict[str, Array] = {}
    for file in found.files:
        loaded |= safetensors.numpy.load_file(folder / file.name)
    whole = planes(layout, filled=True)
    for plane in PLANES:
        prefix = "" if plane == "master" else f"{plane}/"
        for name, array in layout.master_views(whole[plane]).items():
            if prefix and layout.specs[layout.index[name]].is_averaged:
                continue
            if prefix + name in loaded:
                np.testing.assert_array_equal(loaded.pop(prefix + name), array, strict=True)
            else:
                pieces = [key for key in loaded if key.startswith(f"{prefix}{name}[")]
                pieces.sort(key=lambda key: int(key.rpartition("[")[2].partition(":")[0]))
                joined = np.concatenate([loaded.pop(key) for key in pieces])
                np.testing.assert_array_equal(joined, array.reshape(-1), strict=True)
    assert loaded == {}


def test_large_files_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sealed, "PIECE_BYTES", 1 << 10)
    files = FaultyFiles()
    layout = Layout([TensorSpec(f"t{i}", (size,), "float32") for i, size in enumerate((3, 5000, 7, 9, 300, 20_000, 1))])
    found = write(files, "jobs/saved", layout, 2)
    for i in range(3):
        ours = planes(layout, i, 3)
        _snapshot.read_dense(files, "jobs/saved", found, layout.part(i, 3), ours)
        expected = planes(layout, i, 3, filled=True)
        assert all((a == b).all() for plane in PLANES for a, b in zip(ours[plane], expected[plane], strict=True))


# Tables.


#: (deleted, ids), one call each.
calls = st.lists(st.tuples(st.booleans(), st.lists(st.integers(-5, 40), max_size=12, unique=True)), max_size=8)


@given(calls, counts, counts, st.sampled_from([60, 200, 1 << 20]))
def test_of_a_row_the_last_word_counts(
    every: list[tuple[bool, list[int]]], before: int, after: int, segment_bytes: int
) -> None:
    files, expected = FaultyFiles(), dict[int, int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_snapshot, "SEGMENT_BYTES", segment_bytes)
        writers = [TableWriter(files, "jobs/saved", i, 0, SPEC) for i in range(before)]
        for version, (is_deleted, ids) in enumerate(every):
            buckets = _kernels.bucket_of(np.array(ids, np.int64))
            for i, writer in enumerate(writers):
                first, limit = buckets_of(i, before)
                here = [id_ for id_, b in zip(ids, buckets, strict=True) if first <= b < limit]
                if is_deleted:
                    writer.deleted(np.array(here, np.int64))
                else:
                    writer.rows(*rows(here, version))
            for id_ in ids:
                expected[id_] = version
                if is_deleted:
                    del expected[id_]
        written = [file for writer in writers for file in writer.close()]
    _snapshot.publish(files, "jobs/saved", manifest(Layout([]), written, before, tables=[(SPEC, 5)]))
    saved = _snapshot.open_manifest(files, "jobs/saved")
    assert saved.tables[0].spec == SPEC
    found: dict[int, int] = {}
    for i in range(after):
        mine = dict[int, int]()
        for page in _snapshot.read_table(files, "jobs/saved", saved, 0, i, after):
            mine |= dict(zip(page.ids.tolist(), page.counts.astype(int).tolist(), strict=True))
            for column, column_expected in zip(page, rows(page.ids, 0), strict=True):
                versions = page.counts.reshape(-1, *[1] * (column.ndim - 1))
                factor = {np.float32: 1000 if column.ndim == 2 else 1}.get(column.dtype.type, 1)
                if column is not page.ids:
                    np.testing.assert_array_equal(column, column_expected + factor * versions.astype(column.dtype))
        assert not mine.keys() & found.keys()
        found |= mine
    assert found == expected
    text, is_sound = _snapshot.describe(files, "jobs/saved")
    assert is_sound
    assert f"items: {len(expected):,} rows of dim 3" in text


def test_other_tools_read_the_rows(tmp_path: Path) -> None:
    files, folder = open_files(str(tmp_path))
    writer = TableWriter(files, folder, 4, 2, SPEC)
    writer.rows(*rows([3, 1, 2]))
    writer.deleted(np.array([9, 1]))
    (file,) = writer.close()
    assert file.name == "table-2-4-00000.safetensors"
    assert (tmp_path / file.name).stat().st_size == file.bytes
    found = safetensors.numpy.load_file(tmp_path / file.name)
    assert set(found) == {"ids", "values", "state", "counts", "last_seen", "deleted"}
    assert found["ids"].tolist() == [3, 2]
    assert found["values"].shape == found["state"].shape == (2, 3)
    assert sorted(found["deleted"].tolist()) == [1, 9]


# Rot.


def test_a_flipped_bit_anywhere_is_noticed_and_its_file_named(tmp_path: Path) -> None:
    files, root = open_files(str(tmp_path))
    folder = f"{root}/saved"
    layout = Layout([TensorSpec("w", (5,), "float32"), TensorSpec("v", (2,), "float64")])
    written = _snapshot.write_dense(files, folder, 0, layout.part(0, 1), planes(layout, filled=True))
    writer = TableWriter(files, folder, 0, 0, SPEC)
    writer.rows(*rows([1, 2]))
    writer.deleted(np.array([3]))
    written += writer.close()
    _snapshot.publish(files, folder, manifest(layout, written, tables=[(SPEC, 1)]))

    saved = _snapshot.open_manifest(files, folder)

    def read() -> None:
        _snapshot.read_dense(files, folder, saved, layout.part(0, 1), planes(layout))
        for _ in _snapshot.read_table(files, folder, saved, 0):
            pass

    def check() -> None:
        _snapshot.verify(files, folder, saved)

    def reopen() -> None:
        _snapshot.open_manifest(files, folder)

    for path in sorted((tmp_path / "saved").iterdir()):
        good = path.read_bytes()
        for at in range(len(good)):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
            for use in (reopen,) if path.name == "job.json" else (read, check):
                with pytest.raises(errors.StorageError, match=rf"^Cannot read {path}: "):
                    use()
        path.write_bytes(good)
    read()
    check()
    reopen()


@pytest.mark.parametrize("damage", ["missing", "torn", "longer", "empty"])
def test_a_file_of_another_size_is_noticed_when_the_manifest_is_opened(tmp_path: Path, damage: str) -> None:
    files, root = open_files(str(tmp_path))
    write(files, f"{root}/saved", Layout([TensorSpec("w", (5,), "float32")]), 1)
    for path in sorted((tmp_path / "saved").iterdir()):
        good = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes({"torn": good[:-1], "longer": good + b"\0", "empty": b""}[damage])
        with pytest.raises(errors.StorageError, match=rf"^Cannot read {path}: "):
            _snapshot.open_manifest(files, f"{root}/saved")
        path.write_bytes(good)


def test_another_format_is_refused_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"format": 1, "commit": 3, "steps": {}}')
    with pytest.raises(errors.StorageError, match="expected format 2, got 1: use the headwater that wrote it"):
        _snapshot.open_manifest(*open_files(str(tmp_path)))


def test_a_file_that_the_manifest_does_not_name_is_missed() -> None:
    files = FaultyFiles()
    layout = Layout([TensorSpec("w", (5,), "float32")])
    _snapshot.publish(files, "jobs/saved", manifest(layout, []))
    with pytest.raises(
        errors.StorageError, match=r"^Cannot read jobs/saved/model-0.safetensors: job.json does not name it"
    ):
        _snapshot.read_dense(
            files, "jobs/saved", _snapshot.open_manifest(files, "jobs/saved"), layout.part(0, 1), planes(layout)
        )


# The store.


def half_written(files: Files, commit: int) -> None:
    folder = f"store/{_snapshot.snapshot_name(commit)}"
    files.make_folder(folder)
    files.create(f"{folder}/model-0.safetensors").close()


def test_snapshots_are_found_newest_first_and_only_whole_ones() -> None:
    files = FaultyFiles()
    assert _snapshot.find(files, "store") == []
    store(files, 3, 1_000_000_000_000, 20)
    files.create("store/log-0-000000000120.hwl").close()
    half_written(files, 99)
    names = ["snapshot-1000000000000", "snapshot-000000000020", "snapshot-000000000003"]
    assert _snapshot.find(files, "store") == names


def test_pruning_keeps_the_newest_whole_ones_and_what_is_being_written() -> None:
    files = FaultyFiles()
    store(files, 1, 2, 4, 6)
    for commit in (3, 5, 7):  # half written
        half_written(files, commit)
    files.create("store/log-0-000000000120.hwl").close()
    _snapshot.prune(files, "store", keep=2)
    kept = [f"snapshot-{commit:012d}" for commit in (4, 6, 7)]
    assert files.list("store") == ["log-0-000000000120.hwl", *kept]
    assert newest(files) == 6


def test_pruning_counts_only_snapshots_that_can_be_opened() -> None:
    files = FaultyFiles()
    store(files, 1, 2, 3)
    files.remove("store/snapshot-000000000003/model-0.safetensors")
    _snapshot.prune(files, "store", keep=1)
    assert files.list("store") == ["snapshot-000000000002", "snapshot-000000000003"]
    files.remove("store/snapshot-000000000002/model-0.safetensors")
    _snapshot.prune(files, "store", keep=1)
    assert files.list("store") == ["snapshot-000000000002", "snapshot-000000000003"]


class PowerCutError(Exception):
    """The machine goes down."""


def cut_at(operation: int) -> FaultyFiles:
    """Return files whose machine goes down before this operation."""
    left = iter(range(operation))

    def hook(_: str, __: str) -> None:
        if next(left, None) is None:
            raise PowerCutError

    return FaultyFiles(operation, hook=hook)


def each_power_cut(
    prepare: Callable[[Files], None], act: Callable[[Files], None]
) -> Iterator[tuple[FaultyFiles, bool]]:
    """Yield what is on the disk after a power cut before each operation of `act`, and whether that had ended; `prepare` had."""
    counted: list[str] = []
    files = FaultyFiles(hook=lambda operation, path: counted.append(operation))
    prepare(files)
    start = len(counted)
    act(files)
    for operation in range(start, len(counted) + 1):
        files, is_done = cut_at(operation), False
        prepare(files)
        with suppress(PowerCutError):
            act(files)
            is_done = True
        yield files.cut_power(), is_done


def test_a_power_cut_leaves_the_snapshot_before_or_the_new_one() -> None:
    seen = set()
    for disk, is_done in each_power_cut(lambda files: store(files, 1), lambda files: store(files, 2)):
        seen.add(newest(disk))
        assert not is_done or newest(disk) == 2
    assert seen == {1, 2}


def test_a_power_cut_while_pruning_leaves_whole_snapshots_only() -> None:
    for disk, _ in each_power_cut(
        lambda files: store(files, 1, 2, 3), lambda files: _snapshot.prune(files, "store", keep=1)
    ):
        assert newest(disk) == 3
        for name in _snapshot.find(disk, "store"):
            folder = f"store/{name}"
            _snapshot.verify(disk, folder, _snapshot.open_manifest(disk, folder))


def test_a_full_disk_leaves_the_snapshot_before() -> None:
    files = FaultyFiles()
    store(files, 1)
    size = sum(
        files.size(f"store/{_snapshot.snapshot_name(1)}/{name}")
        for name in files.list(f"store/{_snapshot.snapshot_name(1)}")
    )
    for room in range(0, size, 37):
        files = FaultyFiles(room=size + room)
        store(files, 1)
        with pytest.raises(errors.StorageError, match="The disk is full"):
            store(files, 2)
        assert newest(files) == 1
        files.room = None
        _snapshot.prune(files, "store")
        store(files, 2)
        assert newest(files) == 2


def test_a_disk_that_cannot_sync_publishes_nothing_torn() -> None:
    for failing in range(1, 100):
        files = FaultyFiles(failing, failing_sync=failing)
        try:
            store(files, 1, 2)
        except errors.StorageError:
            disk = files.cut_power()
            if _snapshot.find(disk, "store"):
                newest(disk)
        else:
            break
    assert 8 < failing < 99


def test_a_job_is_saved_to_a_url() -> None:
    import fsspec

    url = "memory://headwater-tests/saved"
    with hw.connect() as session:
        tables = begin(session)
        for _ in range(2):
            go_on(session, tables, 1, seed=1)
            session.save(url)
        expected = whole_state(session, tables)
    with hw.connect() as session:
        session.load(url)
        tables = begin(session)
        assert whole_state(session, tables) == expected
    fsspec.filesystem("memory").rm("/headwater-tests", recursive=True)


# For people.


def test_a_store_is_described_and_rot_is_named(tmp_path: Path) -> None:
    files, root = open_files(str(tmp_path / "store"))
    layout = Layout([TensorSpec("w", (4, 3), "bfloat16"), TensorSpec("b", (3,), "float32")])
    write(files, f"{root}/snapshot-000000000120", layout, 2)
    (tmp_path / "store" / "snapshot-000000000130").mkdir()
    (tmp_path / "store" / "log-0-000000000120.hwl").write_bytes(bytes(1500))
    run = CliRunner().invoke(_cli.main, ["inspect", root])
    assert run.exit_code == 0, run.output
    for text in (
        "snapshot-000000000130\n  half written",
        "snapshot-000000000120\n  commit       1\n",
        "  servers      2\n",
        "  consistency  bsp\n",
        "  optimizer    Adam(",
        "  parameters   15 in 2 tensors of bfloat16, float32\n",
        "  state        epoch\n",
        "  hashes       all hold\n",
        "log-0-000000000120.hwl\n  log  1.5 kB\n",
    ):
        assert text in run.output
    file = tmp_path / "store" / "snapshot-000000000120" / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    for path in (root, str(file.parent)):
        run = CliRunner().invoke(_cli.main, ["inspect", path])
        assert run.exit_code == 1
        assert f"  hashes       Cannot read {file}: " in run.output
    run = CliRunner().invoke(_cli.main, ["inspect", str(tmp_path)])
    assert run.exit_code == 2
    assert f"headwater: Cannot read {tmp_path}/job.json: " in run.output


# A real job's save and load.

DENSE: dict[str, Array] = {"w": np.arange(40_000, dtype=np.float32), "v": np.arange(6, dtype=np.float64)}
ITEMS = {"dim": 3, "optimizer": optim.Adam(lr=0.1)}


def begin(session: hw.Session, path: Path | None = None) -> tuple[hw.Table, hw.Table]:
    """Declare and register, from what was saved where a path is given."""
    if path is not None:
        session.load(path)
    found = session.table("items", **ITEMS), session.table("words", 2)  # type: ignore[arg-type]
    session.register(DENSE, optim.Adam(lr=0.1))
    return found


def go_on(session: hw.Session, tables: tuple[hw.Table, hw.Table], steps: int, seed: int) -> None:
    random = np.random.default_rng([seed, session.index])
    for _ in range(steps):
        for table in tables:
            ids = random.integers(0, 500, 100)
            table.push(ids, random.standard_normal((100, table.dim), np.float32))
        session.step({name: random.standard_normal(a.shape).astype(a.dtype) for name, a in DENSE.items()})


def whole_state(session: hw.Session, tables: tuple[hw.Table, hw.Table]) -> dict[str, Any]:
    found, steps = session.read_optimizer()
    state: dict[str, Any] = {f"{p}/{n}": a.tobytes() for p, arrays in found.items() for n, a in arrays.items()}
    return {**state, **steps, **{table.name: (everything(table), table.stats().step) for table in tables}}


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("consistency", [hw.bsp(), hw.asp()], ids=str)
def test_a_saved_job_goes_on_with_its_tables(
    tmp_path: Path, consistency: hw.Consistency, before: int, after: int
) -> None:
    path = tmp_path / "saved"
    with start_job(servers=before, consistency=consistency) as job, job.connect() as session:
        tables = begin(session)
        go_on(session, tables, 3, seed=1)
        session.save(path)
        saved = whole_state(session, tables)
        go_on(session, tables, 2, seed=2)
        expected = whole_state(session, tables)
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]
    with start_job(servers=after, consistency=consistency) as job, job.connect() as session:
        tables = begin(session, path)
        assert whole_state(session, tables) == saved
        assert session.clock == 3
        go_on(session, tables, 2, seed=2)
        assert whole_state(session, tables) == expected


def test_a_save_that_fails_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(session: hw.Session, files: Files) -> None:
        monkeypatch.setattr(_session, "open_files", lambda path: (files, path))
        session.save("jobs/saved")

    def clock(files: Files) -> int:
        return _snapshot.open_manifest(files, _snapshot.locate(files, "jobs/saved")).commit

    with hw.connect() as session:
        tables = begin(session)
        go_on(session, tables, 1, seed=1)
        first = FaultyFiles()
        save(session, first)
        size = sum(first.size(f"jobs/saved/{name}") for name in first.list("jobs/saved"))
        other = hw.connect()
        with other:
            go_on(other, begin(other), 2, seed=1)
            for room in range(0, size, size // 5):
                files = FaultyFiles(room=size + room)
                save(session, files)
                with pytest.raises(
                    errors.StorageError, match=r"Cannot save to jobs/saved: .*What was there before is still there"
                ):
                    save(other, files)
                assert clock(files) == 1
                assert files.list("jobs") == ["saved"]
            seen = set()
            for disk, is_done in each_power_cut(lambda files: save(session, files), lambda files: save(other, files)):
                seen.add(clock(disk))
                assert not is_done or clock(disk) == 2
                folder = _snapshot.locate(disk, "jobs/saved")
                _snapshot.verify(disk, folder, _snapshot.open_manifest(disk, folder))
                save(other, disk)
                assert clock(disk) == 2
            assert seen == {1, 2}


def test_a_save_replaces_nothing_but_a_saved_job(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("six years")
    with hw.connect() as session:
        begin(session)
        with pytest.raises(errors.StorageError, match="Expected a saved job there, or nothing, got other files"):
            session.save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "six years"


def test_one_worker_writes_the_rows_and_the_others_wait_for_them(tmp_path: Path) -> None:
    with start_job(workers=2) as job:

        def save(session: hw.Session) -> None:
            tables = begin(session)
            go_on(session, tables, 3, seed=1)
            if session.index == 0:
                session.save(tmp_path / "saved")

        job.run(save)

    def load(session: hw.Session) -> tuple[dict[int, bytes], int]:
        tables = begin(session, tmp_path / "saved")
        found = everything(tables[0])
        go_on(session, tables, 1, seed=2)
        return found, tables[0].stats().step

    with start_job(workers=2) as job:
        (ours, step), (theirs, _) = job.run(load)
    assert ours == theirs != {}
    assert step == 4


@pytest.mark.parametrize("consistency", [hw.bsp(), hw.asp()], ids=str)
def test_a_job_of_tables_alone_is_saved_and_begins_with_the_first_use(
    tmp_path: Path, consistency: hw.Consistency
) -> None:
    with hw.connect(consistency=consistency) as session:
        first, second = session.table("items", **ITEMS), session.table("words", 2)  # type: ignore[arg-type]
        for table in (first, second):
            table.push([1, 2, 3], np.ones((3, table.dim), np.float32))
        if consistency.kind == "bsp":
            session.step()
        session.save(tmp_path / "saved")
        expected = everything(first), everything(second)
    with hw.connect(consistency=consistency) as session:
        session.load(tmp_path / "saved")
        first, second = session.table("items", **ITEMS), session.table("words", 2)  # type: ignore[arg-type]
        first.pull([1], touch=False)
        assert (everything(first), everything(second)) == expected
        assert all(len(rows_found) == 3 for rows_found in expected)


def test_an_observer_saves_the_tables_too(tmp_path: Path) -> None:
    with start_job(servers=2) as job, job.connect() as session:
        go_on(session, begin(session), 2, seed=1)
        with job.connect(role="observer") as observer:
            observer.save(tmp_path / "saved")
        session.save(tmp_path / "too")
    names = sorted(file.name for file in (tmp_path / "too").iterdir())
    assert len(names) == 5
    for name in names:
        if name != "job.json":
            assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "too" / name).read_bytes()


def test_saved_tables_that_nobody_declares_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with hw.connect() as session:
        go_on(session, begin(session), 1, seed=1)
        session.save(tmp_path / "saved")
    with hw.connect() as session:
        session.load(tmp_path / "saved")
        session.table("words", 2)
        session.register(DENSE, optim.Adam(lr=0.1))
    (message,) = caplog.messages
    assert "holds rows of table items, which nobody has declared yet" in message


def test_a_table_of_other_rows_is_refused(tmp_path: Path) -> None:
    with hw.connect() as session:
        go_on(session, begin(session), 1, seed=1)
        session.save(tmp_path / "saved")
    for table in ({"dim": 4, "optimizer": optim.Adam()}, {"dim": 3, "optimizer": optim.Adagrad()}):
        with hw.connect() as session:
            session.load(tmp_path / "saved")
            session.table("items", **table)  # type: ignore[arg-type]
            with pytest.raises(errors.StorageError, match=r"Expected saved rows of dim .* — table 'items': declare it"):
                session.register(DENSE, optim.Adam(lr=0.1))


def test_rot_is_found_before_a_job_begins_from_it(tmp_path: Path) -> None:
    with hw.connect() as session:
        go_on(session, begin(session), 1, seed=1)
        session.save(tmp_path / "saved")
    for path in (tmp_path / "saved").glob("*.safetensors"):
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with hw.connect() as session, pytest.raises(errors.StorageError, match=rf"^Cannot read {path}: "):
            begin(session, tmp_path / "saved")
        path.write_bytes(good)


def test_a_save_that_commits_overtake_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_job() as job, job.connect() as session, job.connect(role="observer") as observer:
        tables = begin(session)
        go_on(session, tables, 1, seed=1)
        pages = hw.Table.pages

        def slow_pages(table: hw.Table) -> Iterator[Any]:
            for page in pages(table):
                session.step()  # nobody holds it back any more
                yield page

        monkeypatch.setattr(hw.Table, "pages", slow_pages)
        monkeypatch.setattr(_limits, "HOLD_S", 0.0)
        with pytest.raises(errors.WaitTimeoutError, match="got one that changes: save again"):
            observer.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
