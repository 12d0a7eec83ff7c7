"""Versions of a running job: exactly the state of one commit, published beside training, and followed by others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import PATIENCE_S, TOKEN, Arrays, start_job

import headwater as hw
from headwater import _subscription, errors
from headwater._layout import BLOCK
from headwater._versions import Versions, Weights

SIZES = {"w": (3 * BLOCK + 5,), "b": (7, 3), "h": (BLOCK,)}
DTYPES = {"w": np.float32, "b": np.float64, "h": np.float16}


def ones(value: float = 1.0) -> Arrays:
    return {name: np.full(shape, value, DTYPES[name]) for name, shape in SIZES.items()}


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("consistency", [hw.bsp(), hw.asp()], ids=str)
def test_a_version_is_the_state_of_its_commit(
    tmp_path: Path, servers: int, transport: str, consistency: hw.Consistency
) -> None:
    """After commit n every element is −n: a version that mixed two commits would show."""
    options = {"folder": tmp_path} if transport == "shm" else {}
    store = tmp_path / "versions"

    def train(session: hw.Session) -> int:
        session.register(ones(0.0), hw.optim.SGD(lr=1.0))
        for i in range(30):
            session.step(ones())
            if i % 5 == 4:
                session.publish("prod", store=store, metrics={"step": i}, keep=100)
        return session.publish(store=store).result() is None

    with start_job(workers=2, servers=servers, transport=transport, consistency=consistency, **options) as job:
        assert job.run(train) == [False, True]  # one of them publishes
        with hw.connect(job.address, token=TOKEN, transport=transport, role="observer") as session:
            last = session.publish("final", store=store).result()
    versions = Versions(store)
    found = versions.all()
    assert [version.id for version in found] == list(range(1, 9))
    assert last is not None
    assert versions.tags() == {"prod": 6, "final": 8}
    for version in found:
        for name, array in versions.load(version.id).tensors.items():
            assert array.shape == SIZES[name]
            assert (array == -version.commit).all()
    assert last.commit == (30 if consistency.kind == "bsp" else 60)


class Recommender(torch.nn.Module):
    def __init__(self, table: hw.Table | hw.TableCopy) -> None:
        super().__init__()
        self.rows = hw.torch.Embedding(table)
        self.top = torch.nn.Linear(4, 1, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.top(self.rows(ids))
        return found


@pytest.mark.parametrize("servers", [1, 2])
def test_a_model_with_tables_is_published_whole(tmp_path: Path, servers: int) -> None:
    """Under BSP rows and tensors of a version are of one commit: after commit n each row that was ever trained n times is −n."""
    policy = hw.RowPolicy(expire_steps=8)
    publications = []
    with start_job(servers=servers, folder=tmp_path) as job, job.connect() as session:
        table = session.table("items", 4, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0), policy=policy)
        session.register({"w": np.zeros(3, np.float32)}, hw.optim.SGD(lr=1.0))
        for i in range(20):
            ids = np.arange(50) if i < 2 else np.arange(20)
            table.push(ids, np.ones((len(ids), 4), np.float32))
            session.step({"w": np.ones(3, np.float32)})
            if i in {1, 4, 5, 19}:
                publications.append(session.publish(store=tmp_path / "v", keep=9))
        expected = table.pull(np.arange(20))
        missing = int(table.stats().rows)
    versions = Versions(tmp_path / "v")
    for publication in publications:
        version = publication.result()
        assert version is not None
        found = versions.load(version.id).tensors
        assert (found["w"] == -version.commit).all()
        assert found["tables/items/values"][:20].min() == found["tables/items/values"][:20].max() == -version.commit
        assert (np.diff(found["tables/items/ids"]) > 0).all()
    assert len(versions.load(1).tensors["tables/items/ids"]) == 50
    assert len(found["tables/items/ids"]) == missing == 20  # expired rows are gone
    assert (found["tables/items/values"] == expected).all()


def test_a_served_model_has_the_rows_of_its_version(tmp_path: Path) -> None:
    ids = torch.arange(30)
    with hw.connect() as session:
        model = Recommender(session.table("items", 4, optimizer=hw.optim.SGD(lr=0.5), seed=3))
        optimizer = hw.torch.Optimizer(model, hw.optim.SGD(lr=0.5), session=session)
        for _ in range(3):
            model(ids).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        session.publish("prod", store=tmp_path).result()
        with torch.no_grad():
            expected = model.eval()(ids)
    served = Recommender(hw.TableCopy("items", 4, seed=3)).eval()
    hw.torch.load_weights(served, Versions(tmp_path).load("prod"))
    with torch.no_grad():
        assert torch.equal(served(ids), expected)
    other = Recommender(hw.TableCopy("others", 4))
    with pytest.raises(errors.LayoutError, match="rows of dim 4 for table 'others'"):
        hw.torch.load_weights(other, Versions(tmp_path).load("prod"))


def test_a_publisher_that_fails_says_so_and_the_job_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with hw.connect() as session:
        with pytest.raises(errors.UsageError, match="registered parameters"):
            session.publish(store=tmp_path / "v").result()
        session.register(ones(0.0), hw.optim.SGD(lr=1.0))
        session.step(ones())
        with pytest.raises(errors.StorageError, match="file"):
            session.publish(store=tmp_path / "file" / "v").result()
        with pytest.raises(errors.SettingError, match="a tag of letters"):
            session.publish("no tag", store=tmp_path / "v")
        with pytest.raises(errors.StorageError, match="files to attach"):
            session.publish(store=tmp_path / "v", attach=[tmp_path / "none"])
        session.step(ones())
        version = session.publish(store=tmp_path / "v", attach=[tmp_path / "file"]).result()
        assert version is not None
        assert version.commit == 2
    assert (Versions(tmp_path / "v").load("latest").tensors["w"] == -2).all()


def test_closing_waits_for_what_is_being_published(tmp_path: Path) -> None:
    with hw.connect() as session:
        session.register(ones(0.0), hw.optim.SGD(lr=1.0))
        session.publish("prod", store=tmp_path)
    assert Versions(tmp_path).resolve("prod") == 1


class Net(torch.nn.Module):
    """Tied, frozen and low-precision parameters, averaged buffers, integers and a buffer that is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.low = torch.nn.Linear(4, 4).to(torch.bfloat16)
        self.head = torch.nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.norm(self.embedding(x)))
        found: torch.Tensor = self.head(self.low(x.to(torch.bfloat16)).float())
        return found


@pytest.mark.parametrize("where", ["server", "worker"])
def test_a_torch_model_is_whole_in_its_version(tmp_path: Path, where: str) -> None:
    torch.manual_seed(1)
    net = Net()
    optimizer = hw.torch.Optimizer(net, torch.optim.SGD(net.parameters(), lr=0.1), where=where)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.arange(11)).square().mean().backward()
        optimizer.step()
    version = optimizer.session.publish("prod", store=tmp_path).result()
    optimizer.session.close()
    assert version is not None
    assert "scratch" not in version.dtypes
    assert "head.weight" not in version.dtypes
    assert version.dtypes["low.weight"] == "bfloat16"
    other = Net()
    hw.torch.load_weights(other, Versions(tmp_path).load("prod"))
    assert other.head.weight is other.embedding.weight
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert other.state_dict()["norm.num_batches_tracked"] == 3


def test_a_model_that_does_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    good = {"weight": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32)}
    versions.publish(good)
    for odd, what in [
        ({**good, "weight": np.zeros((2, 4), np.float32)}, "'weight' of shape"),
        ({"weight": good["weight"]}, "'bias'"),
        ({**good, "more": np.zeros(1, np.float32)}, "no 'more'"),
    ]:
        number = versions.publish(odd).id
        model, arrays = torch.nn.Linear(3, 2), {name: array.copy() for name, array in good.items()}
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(errors.LayoutError, match=what):
            hw.torch.load_weights(model, versions.load(number))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        with pytest.raises(errors.LayoutError, match=what.partition(" of")[0]):
            _subscription.load_weights(arrays, versions.load(number))
        assert all((arrays[name] == good[name]).all() for name in good)
    with pytest.raises(errors.UsageError, match="Keras model"):
        _subscription.load_weights(3, versions.load(1))


def wait_for(subscription: hw.Subscription, condition: Callable[[], bool]) -> None:
    with subscription._changed:
        assert subscription._changed.wait_for(condition, PATIENCE_S)


def test_a_subscriber_gets_each_version_and_keeps_the_old_one_on_any_error(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)

    def publish(value: float, columns: int = 3) -> int:
        tensors = {"weight": np.full((2, columns), value, np.float32), "bias": np.full(2, value, np.float32)}
        return Versions(tmp_path).publish(tensors, tag="prod").id

    with hw.subscribe(tmp_path, "prod") as subscription:  # before there is anything
        with pytest.raises(errors.WaitTimeoutError, match="prod"):
            subscription.wait(0.01)
        assert subscription.apply(model) is None
        publish(1.0)
        hw.torch.load_weights(model, subscription.wait(20))
        assert subscription.current is not None
        assert (subscription.current.id, float(model.bias[0].detach())) == (1, 1.0)
        path = tmp_path / "version-000000002" / "model.safetensors"
        versions = subscription.versions
        publish_rotten = Versions(tmp_path)
        publish_rotten.publish({"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float32)})
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        versions.tag("prod", 2)
        wait_for(subscription, lambda: subscription.error is not None)
        assert "version-000000002/model.safetensors" in str(subscription.error)
        assert subscription.apply(model) is None
        assert float(model.bias[0].detach()) == 1.0
        publish(3.0, columns=4)
        wait_for(subscription, lambda: subscription._ready is not None)
        assert subscription.apply(model) is None
        assert isinstance(subscription.error, errors.LayoutError)
        assert float(model.bias[0].detach()) == 1.0
        publish(4.0)
        weights = subscription.wait(20)
        assert isinstance(weights, Weights)
        hw.torch.load_weights(model, weights)
        assert float(model.bias[0].detach()) == 4.0
        versions.tag("prod", 1)  # back again
        assert subscription.wait(20).version.id == 1


def test_a_job_says_where_its_versions_are(tmp_path: Path) -> None:
    with start_job(folder=tmp_path) as job, job.connect() as session:
        with pytest.raises(errors.SettingError, match="published none yet"):
            hw.subscribe(job.address, token=TOKEN)
        session.register(ones(0.0), hw.optim.SGD(lr=1.0))
        session.publish(store=tmp_path / "versions").result()
        with hw.subscribe(job.address, token=TOKEN) as subscription:
            assert subscription.wait(20).version.commit == 0
