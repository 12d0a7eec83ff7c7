"""A store of versions: what is published is read, bit by bit, and what is torn, rotten or gone is named."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from headwater import _delta, _versions
from headwater._errors import LayoutError, SettingError, StorageError
from headwater._versions import Versions, Weights

rng = np.random.default_rng(5)
DTYPES = [np.float32, np.float64, np.float16, np.uint16, np.int64, np.int8, np.bool_]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    some = np.random.default_rng(seed)
    return {
        "embedding": some.standard_normal((300, 8), np.float32),
        "half": some.integers(0, 1 << 16, (70,), np.uint16),  # bfloat16's bits
        "count": np.array(7, np.int64),
        "mask": np.array([True, False, True]),
    }


BITS = {"half": "bfloat16"}


def nudged(tensors: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Some elements of the first tensor become others."""
    some = np.random.default_rng(seed)
    embedding = tensors["embedding"].copy()
    embedding[some.integers(0, 300, 5)] += np.float32(1e-3)
    return {**tensors, "embedding": embedding}


def assert_same(found: Weights, expected: dict[str, np.ndarray]) -> None:
    assert found.tensors.keys() == expected.keys()
    for name, array in expected.items():
        got = found.tensors[name]
        assert (got.shape, got.dtype) == (array.shape, array.dtype)
        assert got.tobytes() == array.tobytes()
        assert not got.flags.writeable


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Versions]:
    versions = Versions(tmp_path / "store" if request.param == "local" else "memory://versions")
    yield versions
    versions.files.remove(versions.path)


# Differences.


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_difference_makes_the_target_of_the_base(data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    size = data.draw(st.sampled_from([0, 1, 7, 1000, 70_000, 140_001]))
    base = np.random.default_rng(data.draw(st.integers(0, 9))).bytes(size * dtype.itemsize)
    old: np.ndarray = np.frombuffer(base, np.uint8).copy()
    new: np.ndarray = old.copy()
    share = data.draw(st.sampled_from([0.0, 1e-4, 0.05, 0.5, 1.0]))
    where = np.random.default_rng(data.draw(st.integers(0, 9))).random(len(old)) < share
    new[where] += data.draw(st.sampled_from([np.uint8(1), np.uint8(255), np.uint8(7)]))
    kind = np.uint8 if dtype == np.bool_ else dtype
    old, new = old.view(kind), new.view(kind)
    coded = _delta.encode(old, new)
    if coded is None:
        assert share > 0.4 or size < 100
        return
    assert len(coded[1]) < new.nbytes
    out = np.full_like(new, 1)
    _delta.apply(*coded, old, out)
    assert out.tobytes() == new.tobytes()
    again = old.copy()
    _delta.apply(*coded, again, again)
    assert again.tobytes() == new.tobytes()


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["planes", "sparse", "other"]),
    st.binary(max_size=60),
    st.integers(0, 40),
    arrays.arrays(np.uint16, 500, elements=st.integers(0, 3)),
)
def test_a_rotten_difference_is_an_error_or_another_array(form: str, noise: bytes, at: int, base: np.ndarray) -> None:
    target = base.copy()
    target[[3, 250]] += 1
    coded = _delta.encode(base, target)
    assert coded is not None
    rotten = coded[1][:at] + noise + coded[1][at + len(noise) :]
    out = base.copy()
    with suppress(ValueError):
        _delta.apply(form, rotten, base, out)


def test_a_step_that_bfloat16_hardly_sees_is_small() -> None:
    old = (rng.standard_normal(1_000_000).astype(np.float32) * 0.02).view(np.uint32)
    new = (old.view(np.float32) + np.float32(2e-6)).view(np.uint32)
    base, target = ((bits + 0x8000 >> 16).astype(np.uint16) for bits in (old, new))
    coded = _delta.encode(base, target)
    assert coded is not None
    assert coded[0] == "sparse"
    assert 20 * len(coded[1]) < target.nbytes


# Versions.


def test_what_is_published_is_read(store: Versions, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"layers": 2}')
    tensors = weights()
    version = store.publish(tensors, dtypes=BITS, commit=12, metrics={"loss": 2.5}, tag="prod", attach=[config])
    assert (version.id, version.parent, version.commit, version.metrics) == (1, None, 12, {"loss": 2.5})
    assert version.is_full
    assert store.tags() == {"prod": 1}
    found = store.load("prod")
    assert_same(found, tensors)
    assert found.version.dtypes["half"] == "bfloat16"
    assert store.load("latest").version == store.load(1).version == version


def test_a_full_version_is_a_folder_that_others_load(tmp_path: Path) -> None:
    store = Versions(tmp_path)
    tensors = weights()
    store.publish(tensors, dtypes=BITS)
    path = tmp_path / "version-000000001" / "model.safetensors"
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == tensors.keys()
        for name in ("embedding", "count", "mask"):
            assert file.get_tensor(name).tobytes() == tensors[name].tobytes()


def test_a_chain_of_deltas_gives_the_same_bits(store: Versions, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("{}")
    history = [weights()]
    base = None
    kinds = []
    for i in range(14):
        version = store.publish(history[-1], dtypes=BITS, base=base, keep=20, attach=[config])
        kinds.append(version.is_full)
        base = Weights(version, history[-1])
        history.append(nudged(history[-1], i))
    assert [i for i, is_full in enumerate(kinds) if is_full] == [0, 11]  # no chain is longer than ten
    assert store.get(2).bytes < 0.2 * store.get(1).bytes
    assert [held.version for held in store.get(11).attached] == [1]
    for number in (1, 2, 11, 12, 14):
        assert_same(store.load(number), history[number - 1])
    ahead = store.load(10)
    assert_same(store.load(11, base=ahead), history[10])
    assert_same(store.load(13, base=ahead), history[12])
    store.fetch(11, tmp_path / "fetched")
    with safetensors.safe_open(tmp_path / "fetched" / "model.safetensors", "numpy") as file:
        assert file.get_tensor("embedding").tobytes() == history[10]["embedding"].tobytes()
    assert sorted(path.name for path in (tmp_path / "fetched").iterdir()) == ["config.json", "model.safetensors"]


def test_memory_is_used_again_once_nobody_refers_to_it(tmp_path: Path) -> None:
    store, room = Versions(tmp_path), _versions.Room()
    for seed in range(3):
        store.publish(weights(seed), dtypes=BITS)
    first = store.load(1, room=room)
    kept = first.tensors["half"][3:]
    del first
    second = store.load(2, room=room)
    place = second.tensors["half"].ctypes.data
    assert not np.shares_memory(kept, second.tensors["half"])
    del second
    third = store.load(3, room=room)
    assert third.tensors["half"].ctypes.data == place
    assert_same(third, weights(2))
    assert kept.tobytes() == weights(0)["half"][3:].tobytes()


def test_a_delta_is_never_made_where_it_would_not_pay(store: Versions) -> None:
    one, other = weights(1), weights(2)
    first = store.publish(one, dtypes=BITS)
    assert store.publish(other, dtypes=BITS, base=Weights(first, one)).is_full
    grown = {**one, "new": np.zeros(3, np.float32), "embedding": np.zeros((2, 2), np.float32)}
    del grown["mask"]
    second = store.publish(grown, dtypes=BITS, base=Weights(first, one))
    assert_same(store.load(second.id), grown)


def test_versions_go_but_not_those_that_are_needed(store: Versions) -> None:
    tensors, base = weights(), None
    for i in range(6):
        version = store.publish(tensors, dtypes=BITS, base=base, keep=100)
        base, tensors = Weights(version, tensors), nudged(tensors, i)
    for _ in range(3):
        store.publish(weights(3), dtypes=BITS, keep=100)
    store.tag("prod", 3)
    assert store.prune(2) == [4, 5, 6, 7]
    assert [version.id for version in store.all()] == [1, 2, 3, 8, 9]
    store.untag("prod")
    assert store.prune(1) == [1, 2, 3, 8]
    assert store.publish(weights()).id == 10  # numbers are not used again


def test_a_half_written_version_counts_for_nothing(store: Versions) -> None:
    store.publish(weights(), dtypes=BITS)
    store.files.make_folder(store.folder(2))
    writer = store.files.create(f"{store.folder(2)}/model.safetensors")
    writer.write(b"half")
    writer.close()
    assert store.resolve("latest") == 1
    assert len(store.all()) == 1
    with pytest.raises(StorageError, match=r"Expected version 2 .* whole"):
        store.load(2)
    assert store.publish(weights(), dtypes=BITS).id == 3
    assert store._numbers() == [1, 3]


def rot(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", ["rotten", "torn", "missing"])
@pytest.mark.parametrize("name", ["version-000000001/model.safetensors", "version-000000002/delta.safetensors",
                                  "version-000000002/version.json", "tags/prod"])  # fmt: skip
def test_what_is_rotten_torn_or_missing_is_named(tmp_path: Path, name: str, harm: str) -> None:
    store = Versions(tmp_path)
    first = store.publish(weights(), dtypes=BITS)
    store.publish(nudged(weights(), 1), dtypes=BITS, base=Weights(first, weights()), tag="prod")
    path = tmp_path / name
    if harm == "rotten":
        rot(path, 3 if name == "tags/prod" else len(path.read_bytes()) - 9)
    elif harm == "torn":
        path.write_bytes(path.read_bytes()[:5])
    else:
        path.unlink()
    with pytest.raises(StorageError) as error:
        Versions(tmp_path).load("prod")
    assert path.name in str(error.value) or str(tmp_path) in str(error.value)


def test_a_delta_with_the_wrong_base_is_refused(tmp_path: Path) -> None:
    store = Versions(tmp_path)
    first = store.publish(weights(), dtypes=BITS)
    store.publish(nudged(weights(), 1), dtypes=BITS, base=Weights(first, weights()))
    other = Versions(tmp_path / "other")
    other.publish(weights(9), dtypes=BITS)
    for file in ("model.safetensors", "version.json"):
        (tmp_path / "version-000000001" / file).write_bytes(
            (tmp_path / "other" / "version-000000001" / file).read_bytes()
        )
    with pytest.raises(StorageError, match="version 1 to be what the delta of version 2 rests on"):
        Versions(tmp_path).load(2)


def test_tags_move_and_are_checked(store: Versions) -> None:
    for seed in range(3):
        store.publish(weights(seed), dtypes=BITS, tag="prod")
    assert store.resolve("prod") == 3
    assert store.tag("prod", 1) == 1
    assert store.tag("canary", "prod") == 1
    assert store.tags() == {"canary": 1, "prod": 1}
    with pytest.raises(StorageError, match="Expected version 9"):
        store.tag("prod", 9)
    assert store.resolve("prod") == 1
    with pytest.raises(StorageError, match=r"one of the tags canary, prod, latest .* got 'stage'"):
        store.resolve("stage")
    for name in ("latest", "12", "../x", ".hidden", "a b", "", "x" * 65):
        with pytest.raises(SettingError, match="Expected a tag"):
            store.tag(name, 1)


def test_what_no_file_holds_is_refused_and_leaves_nothing(store: Versions, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="safetensors can hold, got complex64"):
        store.publish({"w": np.zeros(3, np.complex64)})
    with pytest.raises(LayoutError, match="'w'"):
        store.publish({"w": np.zeros(3, np.float32)}, dtypes={"w": "bfloat16"})
    with pytest.raises(SettingError, match="files to attach"):
        store.publish(weights(), dtypes=BITS, attach=[tmp_path / "nowhere"])
    assert store.all() == []
    with pytest.raises(StorageError, match=r"Expected a version in .* publish one"):
        store.load("latest")


def test_publishers_take_turns(tmp_path: Path) -> None:
    """Threads here and another process: every version is whole, and none is lost."""
    code = (
        "import sys, numpy as np\nfrom headwater._versions import Versions\n"
        "for i in range(5):\n    Versions(sys.argv[1]).publish({'w': np.full(1000, i, np.float32)}, keep=100)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])

    def publish() -> None:
        for i in range(5):
            Versions(tmp_path).publish({"w": np.full(1000, i, np.float32)}, keep=100)

    threads = [threading.Thread(target=publish) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.wait() == 0
    store = Versions(tmp_path)
    assert [version.id for version in store.all()] == list(range(1, 21))
    for number in range(1, 21):
        store.load(number)


def test_how_two_versions_differ(store: Versions) -> None:
    one = weights()
    other = nudged(one, 1)
    del other["mask"]
    other["more"] = np.zeros(2, np.float32)
    other["half"] = one["half"][:5]
    store.publish(one, dtypes=BITS)
    store.publish(other, dtypes=BITS)
    found = {d.name: d for d in store.compare(1, 2)}
    assert {name: d.what for name, d in found.items()} == {
        "mask": "removed", "more": "added", "half": "of another shape", "embedding": "changed",
    }  # fmt: skip
    assert 0 < found["embedding"].share <= 5 / 300
    assert found["embedding"].largest == pytest.approx(1e-3, rel=0.1)
    assert store.compare(1, 1) == []


def test_the_manifest_says_what_a_version_is(tmp_path: Path) -> None:
    Versions(tmp_path).publish(weights(), dtypes=BITS, commit=3)
    found = json.loads((tmp_path / "version-000000001" / "version.json").read_text())
    assert (found["id"], found["commit"], found["format"]) == (1, 3, _versions.FORMAT)
    assert {tensor["name"] for tensor in found["tensors"]} == weights().keys()


def test_a_disk_that_fills_leaves_nothing_of_a_version(tmp_path: Path) -> None:
    """A limit of a file's size stands for the disk's: the system refuses what is written in the same place."""
    versions, folder = Versions(tmp_path / "store"), tmp_path / "folder"
    versions.publish({"w": np.zeros(1 << 20, np.float32)}, tag="prod")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with pytest.raises(StorageError, match="folder"):
            versions.fetch("prod", folder)
        with pytest.raises(StorageError, match="version-000000002"):
            versions.publish({"w": np.random.default_rng(0).normal(0, 1, 1 << 20).astype(np.float32)}, tag="prod")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]
    assert [version.id for version in versions.all()] == [1]
    assert versions.fetch("prod", folder).id == 1
