"""Versions of a model over HTTP: swaps, pins, canaries, batches, and what clients must not be able to do."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import msgspec
import numpy as np
import pytest
import served
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from served import Answer, ask, request

from headwater import _limits
from headwater._batching import Batcher
from headwater._errors import AddressError, RequestError, SettingError
from headwater._http import Canary, ModelServer, listen
from headwater._metrics import Metrics
from headwater._models import KerasModel, TorchModel, open_model, wrap
from headwater._oip import Slot, Tensor
from headwater._versions import Versions

PATIENCE_S = 60.0
PATH = "/v2/models/m/infer"


@contextmanager
def serving(store: Path, make: Any = None, **options: Any) -> Iterator[ModelServer]:
    """Serve without a socket; `follower.step()` looks at the tags."""
    make = make or (lambda: wrap(served.build()))
    server = ModelServer("m", make, Versions(store), **{"tag": "prod", **options})
    try:
        server.follower.step()
        yield server
    finally:
        server.close()


def infer(server: ModelServer, path: str = PATH, body: bytes = b"", **headers: str) -> Answer:
    return ask(server.service, "POST", path, body or request(), **headers)


def version_of(answer: Answer) -> int:
    """Return the version that an answer names, having checked that every layer was of it."""
    assert answer.status == 200, answer.body
    found = {each["name"]: each["data"] for each in answer.json["outputs"]}
    version = int(answer.headers["x-model-version"])
    assert answer.json["model_version"] == str(version)
    assert set(found["first"] + found["second"]) == {float(version)}
    assert found["y"] == [x * version**2 for x in (1.0, 2.0, 3.0)]
    return version


def test_the_tag_moves_and_another_version_answers(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert ask(server.service, "GET", "/v2/health/ready").status == 503
        assert "Expected a version for the tag 'prod'" in infer(server).json["error"]
        for version in (1, 2):
            served.publish(tmp_path, version, "prod")
            server.follower.step()
            assert ask(server.service, "GET", "/v2/health/ready").status == 200
            assert version_of(infer(server)) == version
        Versions(tmp_path).tag("prod", 1)
        server.follower.step()
        assert version_of(infer(server)) == 1


def test_swaps_under_load_fail_no_request_and_mix_nothing(tmp_path: Path) -> None:
    """Ten swaps while four clients ask; each answer is of one version, and nobody goes back."""
    served.publish(tmp_path, 1, "prod")
    with serving(tmp_path) as server, ThreadPoolExecutor(4) as pool:
        is_over = threading.Event()

        def client() -> list[int]:
            seen = []
            while not is_over.is_set():
                seen.append(version_of(infer(server)))
            return seen

        clients = [pool.submit(client) for _ in range(4)]
        for version in range(2, 12):
            served.publish(tmp_path, version, "prod")
            server.follower.step()
        is_over.set()
        wait(clients, PATIENCE_S)
        for each in clients:
            assert each.result() == sorted(each.result())
        assert version_of(infer(server)) == 11
        assert 'headwater_swaps_total{tag="prod"} 11' in server.metrics.text()


def test_a_request_that_began_on_the_old_version_ends_on_it(tmp_path: Path) -> None:
    served.publish(tmp_path, 1, "prod")
    entered, go_on = threading.Event(), threading.Event()

    class Slow(served.Telling):
        def forward(self, x: Any, scale: Any = None) -> Any:
            entered.set()
            assert go_on.wait(PATIENCE_S)
            return super().forward(x, scale)

    with serving(tmp_path, lambda: wrap(Slow())) as server, ThreadPoolExecutor(1) as pool:
        old = pool.submit(infer, server)
        assert entered.wait(PATIENCE_S)
        for version in (2, 3):  # an instance that is left free must not be this one
            served.publish(tmp_path, version, "prod")
            server.follower.step()
        go_on.set()
        assert version_of(old.result()) == 1
        assert version_of(infer(server)) == 3


def break_store(store: Path, how: str) -> str:
    """Make the next update fail; returns what is said of it."""
    if how == "another shape":
        served.publish(store, 2, "prod", width=4)
        return "Expected"
    if how == "a rotten file":
        path = Path(Versions(store).folder(served.publish(store, 2, "prod").id)) / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        return "XXH3"
    if how == "a version that is gone":
        (store / "tags" / "prod").write_text('{"version": 77}')
        return "version 77"
    (store / "tags" / "prod").unlink()
    return "prod"


@pytest.mark.parametrize("how", ["another shape", "a rotten file", "a version that is gone", "no tag"])
def test_an_update_that_fails_leaves_the_old_version_answering(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    served.publish(tmp_path, 1, "prod")
    with serving(tmp_path) as server:
        says = break_store(tmp_path, how)
        server.follower.step()
        server.follower.step()
        assert version_of(infer(server)) == 1
        assert ask(server.service, "GET", "/v2/health/ready").status == 200
        assert 'headwater_update_failing{tag="prod"} 1' in server.metrics.text()
        (record,) = caplog.records  # once, not with each look
        assert "1 goes on" in record.message
        assert says in record.message
        number = 1 + len(Versions(tmp_path).all())
        served.publish(tmp_path, number, "prod")
        server.follower.step()
        assert version_of(infer(server)) == number
        assert 'headwater_update_failing{tag="prod"} 0' in server.metrics.text()


def test_pinned_versions_are_loaded_when_they_are_asked_for(tmp_path: Path) -> None:
    for version in range(1, 6):
        served.publish(tmp_path, version, "prod")
    with serving(tmp_path, pins=2) as server:
        for version in (1, 2, 3, 1, 5):
            assert version_of(infer(server, f"/v2/models/m/versions/{version}/infer")) == version
        about = ask(server.service, "GET", "/v2/models/m").json
        assert about["versions"] == ["1", "3", "5"]  # the last two, and the tag's
        assert ask(server.service, "GET", "/v2/models/m/versions/3/ready").status == 200
        assert ask(server.service, "GET", "/v2/models/m/versions/2/ready").status == 503
        gone = infer(server, "/v2/models/m/versions/9/infer")
        assert gone.status == 404
        assert "never published, or has been removed" in gone.json["error"]


def test_a_canary_answers_its_share_and_who_asks_for_it(tmp_path: Path) -> None:
    served.publish(tmp_path, 1, "prod")
    served.publish(tmp_path, 2, "canary")
    with serving(tmp_path, canary=Canary.parse("canary:20")) as server:
        seen = Counter(version_of(infer(server)) for _ in range(400))
        assert 40 < seen[2] < 130  # 80 expected; beyond five standard deviations
        assert version_of(infer(server, X_Model_Tag="canary")) == 2
        assert version_of(infer(server, X_Model_Tag="prod")) == 1
        assert infer(server, X_Model_Tag="other").status == 404
    for text in ("canary", "canary:", "canary:101", ":5", "canary:nan"):
        with pytest.raises(SettingError, match="Expected --canary TAG:PERCENT"):
            Canary.parse(text)


class Recording:
    """A model that says how many rows each run had."""

    platform = "test"
    inputs: Sequence[Slot] = ()
    outputs: Sequence[Slot] = ()

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.entered, self.go_on = threading.Event(), threading.Event()

    def apply(self, weights: Any) -> None:
        pass

    def check(self, inputs: Sequence[Tensor]) -> None:
        pass

    def run(self, inputs: Any) -> list[Tensor]:
        array = inputs["x"].array
        self.runs.append(len(array))
        self.entered.set()
        assert self.go_on.wait(PATIENCE_S)
        if (array < 0).any():
            raise ValueError("a negative number")
        return [Tensor("y", "FP32", array * 2)]


def rows(*values: float, width: int = 2) -> list[Tensor]:
    return [Tensor("x", "FP32", np.full((len(values), width), np.array(values, np.float32)[:, None]))]


def test_requests_that_wait_are_run_together(tmp_path: Path) -> None:
    """Those of one shape, in as many rows as are allowed; and each gets its own rows."""
    model, batcher = Recording(), Batcher(Metrics(), rows=4)
    try:
        first = batcher.submit(model, rows(1), lambda: None)
        assert model.entered.wait(PATIENCE_S)
        others = [
            batcher.submit(model, each, lambda: None) for each in (rows(2, 3), rows(4, width=3), rows(5), rows(6, 7))
        ]
        model.go_on.set()
        assert [each.result(PATIENCE_S)[0].array[:, 0].tolist() for each in (first, *others)] == [
            [2],
            [4, 6],
            [8],
            [10],
            [12, 14],
        ]
        assert model.runs == [1, 3, 1, 2]
    finally:
        batcher.close()


def test_nobody_is_refused_for_what_another_sent(tmp_path: Path) -> None:
    model, batcher = Recording(), Batcher(Metrics(), rows=8)
    try:
        batcher.submit(model, rows(1), lambda: None)
        assert model.entered.wait(PATIENCE_S)
        good, bad, fine = (batcher.submit(model, rows(value), lambda: None) for value in (1, -1, 2))
        model.go_on.set()
        assert good.result(PATIENCE_S)[0].array.tolist() == [[2, 2]]
        assert fine.result(PATIENCE_S)[0].array.tolist() == [[4, 4]]
        with pytest.raises(RequestError, match="The model failed on these inputs: ValueError: a negative number"):
            bad.result(PATIENCE_S)
    finally:
        batcher.close()


def test_too_many_that_wait_are_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "QUEUE_REQUESTS", 1)
    model, batcher, released = Recording(), Batcher(Metrics(), rows=1), list[int]()
    try:
        batcher.submit(model, rows(1), lambda: released.append(1))
        assert model.entered.wait(PATIENCE_S)
        waiting = batcher.submit(model, rows(1), lambda: released.append(2))
        refused = batcher.submit(model, rows(1), lambda: released.append(3))
        with pytest.raises(RequestError, match="at most 1 requests to wait"):
            refused.result(PATIENCE_S)
        model.go_on.set()
        waiting.result(PATIENCE_S)
    finally:
        batcher.close()
    assert sorted(released) == [1, 2, 3]


def test_a_model_says_what_it_takes(tmp_path: Path) -> None:
    """A PyTorch model by the parameters of forward, and by its example."""
    served.publish(tmp_path, 1, "prod")

    def make() -> Any:
        module: Any = served.Telling()
        module.example_input_array = torch.ones(2, 3)
        return wrap(module)

    with serving(tmp_path, make) as server:
        about = ask(server.service, "GET", "/v2/models/m/versions/1").json
        assert about["platform"] == "pytorch"
        assert about["inputs"] == [
            {"name": "x", "shape": [-1, 3], "datatype": "FP32"},
            {"name": "scale", "shape": [-1]},
        ]
        assert [each["name"] for each in about["outputs"]] == ["y", "first", "second"]
        wrong = request().replace(b"FP32", b"FP64")
        assert "Expected FP32 of shape [-1, 3], got FP64" in infer(server, body=wrong).json["error"]
        assert (
            "Expected the inputs x, scale, got z" in infer(server, body=request().replace(b'"x"', b'"z"')).json["error"]
        )
        assert infer(server, body=request([[1.0, 2.0]])).status == 422


def test_a_keras_model_is_served(tmp_path: Path) -> None:
    """A functional one: two inputs and two outputs, by name."""

    def make() -> Any:
        a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b", dtype="int32")
        total = keras.layers.Dense(1, name="dense")(a)
        model = keras.Model([a, b], {"sum": total, "same": b * 2})
        return wrap(model)

    names = {"dense/kernel": np.array([[1.0], [2.0]], np.float32), "dense/bias": np.array([0.5], np.float32)}
    Versions(tmp_path).publish(names, tag="prod")
    with serving(tmp_path, make) as server:
        about = ask(server.service, "GET", "/v2/models/m").json
        assert [(each["name"], each["datatype"], each["shape"]) for each in about["inputs"]] == [
            ("a", "FP32", [-1, 2]), ("b", "INT32", [-1, 2]),
        ]  # fmt: skip
        inputs = [
            {"name": "b", "shape": [1, 2], "datatype": "INT32", "data": [3, 4]},
            {"name": "a", "shape": [1, 2], "datatype": "FP32", "data": [1, 1]},
        ]
        answer = infer(
            server, body=msgspec.json.encode({"inputs": inputs, "outputs": [{"name": "sum"}, {"name": "same"}]})
        )
        assert [each["data"] for each in answer.json["outputs"]] == [[3.5], [6, 8]]


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="got 'served:nothing'"):
        open_model("served:nothing")
    with pytest.raises(SettingError, match=r"Expected build\(\) to return a torch.nn.Module or a keras.Model, got int"):
        wrap(3)
    with pytest.raises(SettingError, match="unbuilt"):
        wrap(keras.Sequential([keras.layers.Dense(1)]))
    assert isinstance(open_model("served:build")(), TorchModel)
    assert isinstance(wrap(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])), KerasModel)


def test_a_request_that_is_too_large_is_refused(tmp_path: Path) -> None:
    served.publish(tmp_path, 1, "prod")
    with serving(tmp_path, body_bytes=300) as server:
        assert version_of(infer(server)) == 1
        for headers in ({}, {"Content_Length": "5" * 30}):
            answer = infer(server, body=b"x" * 301, **headers)
            assert answer.status == 413
            assert answer.headers["connection"] == "close"
        assert infer(server, Content_Encoding="gzip").status == 415


def test_a_model_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served.publish(tmp_path, 1, "prod")
    monkeypatch.setattr(_limits, "ANSWER_S", 0.01)
    model = Recording()
    with serving(tmp_path, lambda: model) as server:
        assert infer(server).status == 504
        model.go_on.set()


def test_what_replicas_are_told_needs_the_token(tmp_path: Path) -> None:
    served.publish(tmp_path, 1, "prod")
    body = msgspec.json.encode({"epoch": 1, "previous": None, "version": 1})
    kind = {"Content_Type": "application/json"}
    with serving(tmp_path, fleet_url="http://here:1", token="secret") as server:
        for headers in (kind, kind | {"Authorization": "Bearer another"}, kind | {"Authorization": "Bearer ü"}):
            assert ask(server.service, "POST", "/fleet/prepare", body, **headers).status == 401
        shown = {"Authorization": "Bearer secret"}
        assert ask(server.service, "POST", "/fleet/prepare", body, **shown).status == 415
        assert ask(server.service, "POST", "/fleet/prepare", b"{", **kind, **shown).status == 400
        assert ask(server.service, "POST", "/fleet/prepare", body, **kind, **shown).status == 200


def test_no_token_no_listening_off_this_machine() -> None:
    with pytest.raises(SettingError, match="Expected HEADWATER_TOKEN"):
        listen("http://0.0.0.0:0", "")
    listen("http://0.0.0.0:0", "secret").close()
    listen("http://127.0.0.1:0", "").close()
    for url in ("tcp://127.0.0.1:1", "http://127.0.0.1", "http://127.0.0.1:99999", "http://:1/x"):
        with pytest.raises(SettingError, match="Expected --listen"):
            listen(url, "")
    with pytest.raises(AddressError, match="Cannot listen at"):
        listen("http://192.0.2.1:1", "secret")


KEYS = st.sampled_from(["name", "shape", "datatype", "data", "parameters"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
    max_leaves=8,
)
NEARLY = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "scale", "z"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "datatype": st.sampled_from(["FP32", "FP64", "INT8", "BYTES", "BOOL", "BF16"]) | JSON,
    },
    optional={
        "data": st.lists(st.integers(-2, 200), max_size=6) | JSON,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 20)}) | JSON,
    },
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    store = tmp_path_factory.mktemp("store")
    served.publish(store, 1, "prod")
    with serving(store) as server:
        yield server


@given(
    path=st.sampled_from(
        [
            PATH,
            "/v2/models/m/versions/1/infer",
            "/v2/models/m/versions/x/infer",
            "/v2/models//infer",
            "/v2/metrics",
            "/ü",
        ]
    ),
    method=st.sampled_from(["POST", "GET", "PUT"]),
    inputs=st.lists(NEARLY, max_size=2) | JSON,
    tail=st.binary(max_size=20),
    length=st.none() | st.integers(-1, 400) | st.just("all"),
    cut=st.integers(0, 3),
)
@settings(max_examples=300)
def test_whatever_is_asked_is_answered_and_harms_nobody(
    fuzzed: ModelServer, path: str, method: str, inputs: Any, tail: bytes, length: int | str | None, cut: int
) -> None:
    head = msgspec.json.encode({"inputs": inputs})
    body = head[: len(head) - cut] + tail
    headers = (
        {}
        if length is None
        else {"Inference_Header_Content_Length": str(len(head) - cut if length == "all" else length)}
    )
    answer = ask(fuzzed.service, method, path, body, **headers)
    assert answer.status == 200 or 400 <= answer.status < 500
    if answer.status != 200:
        assert answer.json["error"]
    assert version_of(infer(fuzzed)) == 1
