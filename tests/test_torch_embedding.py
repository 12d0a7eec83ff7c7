"""Tables as PyTorch modules: what torch's own modules and sparse optimizers give, with rows that live on the servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jobs import start_job

import headwater as hw
from headwater import errors

VOCABULARY, DIM = 11, 5
#: What tables have, and torch's optimizer of sparse gradients that makes the same steps.
OPTIMIZERS: dict[str, tuple[Any, Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (hw.optim.SGD(lr=0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
    "adagrad": (
        hw.optim.Adagrad(lr=0.3, lr_decay=0.1, initial_accumulator_value=0.2),
        lambda p: torch.optim.Adagrad(p, lr=0.3, lr_decay=0.1, initial_accumulator_value=0.2),
    ),
    "adam": (hw.optim.Adam(lr=0.3), lambda p: torch.optim.SparseAdam(list(p), lr=0.3)),
}
optimizers = pytest.mark.parametrize("kind", list(OPTIMIZERS))


def table_like(session: hw.Session, weight: torch.Tensor, optimizer: Any = None, **options: Any) -> hw.Table:
    """Return a table whose rows for 0, 1, … begin as `weight` does: where they are first trained they must lie there already."""
    table = session.table("items", DIM, optimizer=optimizer or hw.optim.SGD(lr=1.0), initial=hw.Uniform(0.5), **options)
    with torch.no_grad():
        weight.copy_(torch.from_numpy(table.pull(range(len(weight)))))
    return table


def assert_same(table: hw.Table, weight: torch.Tensor, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(table.pull(range(len(weight))), weight.detach().numpy(), rtol=tolerance, atol=tolerance)


@optimizers
def test_embedding_trains_as_torchs_sparse_one(kind: str) -> None:
    ours, theirs = OPTIMIZERS[kind]
    peer = torch.nn.Embedding(VOCABULARY, DIM, sparse=True)
    step = theirs(peer.parameters())
    with hw.connect(consistency=hw.asp()) as session:
        embedding = hw.torch.Embedding(table_like(session, peer.weight, ours))
        random = torch.Generator().manual_seed(3)
        for shape in [(4,), (2, 3), (), (1, 2, 3), (20,)] * 2:
            ids = torch.randint(VOCABULARY, shape, generator=random)
            target = torch.randn(*shape, DIM, generator=random)
            found = [(module(ids) - target).square().sum() for module in (embedding, peer)]
            torch.testing.assert_close(*found)
            peer.zero_grad()
            for loss in found:
                loss.backward()
            with torch.sparse.check_sparse_tensor_invariants():  # or torch warns that nobody does
                step.step()
        assert_same(embedding.table, peer.weight, 1e-5)


Case = tuple[torch.Tensor, torch.Tensor | None, bool]
CASES: dict[str, Case] = {
    "two dimensions": (torch.tensor([[1, 2, 2], [3, 1, 9]]), None, False),
    "offsets": (torch.tensor([1, 2, 2, 5, 1]), torch.tensor([0, 2, 4]), False),
    "empty bags": (torch.tensor([1, 2, 2, 5, 1]), torch.tensor([0, 0, 3, 3, 5]), False),
    "last offset": (torch.tensor([4, 4, 2]), torch.tensor([0, 1, 1, 3]), True),
    "only empty bags": (torch.tensor([], dtype=torch.int64), torch.tensor([0, 0]), False),
    "no bag": (torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64), False),
    "32 bits": (torch.tensor([1, 2, 2], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32), False),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
def test_bags_are_torchs(case: str, mode: str) -> None:
    ids, offsets, has_last = CASES[case]
    options: Any = {"mode": "sum" if mode == "weighted" else mode, "include_last_offset": has_last}
    peer = torch.nn.EmbeddingBag(VOCABULARY, DIM, sparse=mode != "weighted", **options)
    step = torch.optim.SGD(peer.parameters(), lr=1.0)
    with hw.connect(consistency=hw.asp()) as session:
        bag = hw.torch.EmbeddingBag(table_like(session, peer.weight), **options)
        weights = [
            torch.linspace(-1, 1, ids.numel()).view(ids.shape).requires_grad_() if mode == "weighted" else None
        ] * 2
        weights = [w if w is None else w.detach().clone().requires_grad_() for w in weights]
        for _ in range(2):
            found = [module(ids, offsets, w) for module, w in zip((bag, peer), weights, strict=True)]
            torch.testing.assert_close(*found)
            peer.zero_grad()
            for rows in found:
                if rows.requires_grad:
                    (rows * torch.arange(float(rows.numel())).view(rows.shape)).sum().backward()
            step.step()
        assert_same(bag.table, peer.weight)
        if weights[0] is not None and ids.numel():
            assert weights[1] is not None
            torch.testing.assert_close(weights[0].grad, weights[1].grad)


def test_rows_count_with_backward_or_with_the_step() -> None:
    for consistency in (hw.asp(), hw.bsp()):
        weight = torch.zeros(VOCABULARY, DIM)
        with hw.connect(consistency=consistency) as session:
            embedding = hw.torch.Embedding(table_like(session, weight))
            optimizer = hw.torch.Optimizer(embedding, hw.optim.SGD(lr=1.0), session=session)
            embedding(torch.tensor([2])).sum().backward()
            trained = weight.clone()
            trained[2] -= 1
            assert_same(embedding.table, trained if consistency == hw.asp() else weight)
            optimizer.step()
            assert_same(embedding.table, trained)
            optimizer.step()  # nothing is pushed
            assert_same(embedding.table, trained)
            assert (session.clock, embedding.table.stats().step) == (2, 1)


def test_evaluation_reads_and_leaves_no_trace() -> None:
    with hw.connect(consistency=hw.asp()) as session:
        table = session.table("items", DIM, policy=hw.RowPolicy(expire_steps=2))
        embedding, bag = hw.torch.Embedding(table), hw.torch.EmbeddingBag(table, mode="sum")
        table.push([1, 2], np.ones((2, DIM), np.float32))
        rows = torch.from_numpy(table.pull([1, 2]))
        for _ in range(4):
            table.push([9], np.ones((1, DIM), np.float32))
            embedding.train()
            with torch.no_grad():
                found = embedding(torch.tensor([1]))
            embedding.eval()
            bag.eval()
            for output in (found, embedding(torch.tensor([2])), bag(torch.tensor([[1, 2]]))):
                assert not output.requires_grad
            table.pull([1])
        torch.testing.assert_close(embedding(torch.tensor([1])), rows[:1])
        weights = torch.ones(1, 2, requires_grad=True)
        bag(torch.tensor([[1, 1]]), per_sample_weights=weights).sum().backward()
        torch.testing.assert_close(weights.grad, rows[:1].sum().repeat(1, 2))
        assert (table.stats().rows, table.stats().step) == (2, 5)  # id 2 was only read, and has expired
        assert table.stats().misses > 0


def test_a_table_is_shared_by_features_and_modules_are_called_twice() -> None:
    """All of a step's gradients of a row are one gradient, as with one torch module."""
    peer = torch.nn.Embedding(VOCABULARY, DIM)
    with hw.connect() as session:
        table = table_like(session, peer.weight, hw.optim.Adagrad(lr=1.0))
        clicks, views = hw.torch.Embedding(table), hw.torch.Embedding(table)
        bag = hw.torch.EmbeddingBag(table, mode="sum")
        model = torch.nn.ModuleList([clicks, views, bag])
        optimizer = hw.torch.Optimizer(model, hw.optim.SGD(lr=1.0), session=session)
        step = torch.optim.Adagrad(peer.parameters(), lr=1.0)
        one, two = torch.tensor([1, 2, 3]), torch.tensor([3, 3, 4])
        for _ in range(3):
            (clicks(one) * views(two) + clicks(two).square() + bag(one[None]) * 2).sum().backward()
            optimizer.step()
            step.zero_grad()
            (peer(one) * peer(two) + peer(two).square() + peer(one).sum(0) * 2).sum().backward()
            step.step()
        assert_same(table, peer.weight, 1e-5)
        assert table.stats().step == 3


class Model(torch.nn.Module):
    """Two tables and a dense head."""

    def __init__(self, users: torch.nn.Module, films: torch.nn.Module) -> None:
        super().__init__()
        self.users, self.films = users, films
        self.head = torch.nn.Linear(2 * DIM, 1)
        with torch.no_grad():  # the same in all threads, which share torch's random numbers
            self.head.weight.copy_(torch.linspace(-0.5, 0.5, 2 * DIM))
            self.head.bias.zero_()

    def forward(self, user: torch.Tensor, film: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(torch.cat([self.users(user), self.films(film)], dim=-1)).squeeze(-1)
        return found


def ratings(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    user, film = (torch.randint(VOCABULARY, (count,), generator=random) for _ in range(2))
    return user, film, torch.randn(count, generator=random)


@pytest.mark.parametrize(("transport", "servers"), [("shm", 1), ("tcp", 2)])
def test_two_workers_train_what_one_process_trains(transport: str, servers: int) -> None:
    """Everything BSP: two workers with half a batch each are one process with the whole."""
    user, film, target = ratings(40)

    def make(session: hw.Session) -> Model:
        tables = (session.table(name, DIM, optimizer=hw.optim.Adagrad(lr=0.2)) for name in ("users", "films"))
        return Model(*(hw.torch.Embedding(table) for table in tables))

    def body(session: hw.Session) -> tuple[bytes, np.ndarray]:
        model = make(session)
        optimizer = hw.torch.Optimizer(model, hw.optim.SGD(lr=0.1), session=session)
        for start in range(0, 40, 8):
            mine = slice(start + 4 * session.index, start + 4 * session.index + 4)
            (model(user[mine], film[mine]) - target[mine]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        rows = session.table("users").pull(range(VOCABULARY))
        return rows.tobytes() + session.pull()["head.weight"].tobytes(), rows

    peer = Model(*(torch.nn.Embedding(VOCABULARY, DIM) for _ in range(2)))
    with hw.connect() as session:
        like = make(session)
        peer.load_state_dict(like.state_dict(), strict=False)
        with torch.no_grad():
            for name in ("users", "films"):
                getattr(peer, name).weight.copy_(torch.from_numpy(session.table(name).pull(range(VOCABULARY))))
    sparse = torch.optim.Adagrad([*peer.users.parameters(), *peer.films.parameters()], lr=0.2)
    dense = torch.optim.SGD(peer.head.parameters(), lr=0.1)
    for start in range(0, 40, 8):
        whole = slice(start, start + 8)
        peer.zero_grad()
        (peer(user[whole], film[whole]) - target[whole]).square().mean().backward()
        sparse.step()
        dense.step()
    results = []
    for _ in range(2):
        with start_job(workers=2, servers=servers, transport=transport) as started:
            results += started.run(body)
    assert len({bits for bits, _ in results}) == 1
    expected: Any = dict(peer.named_parameters())["users.weight"].detach()
    np.testing.assert_allclose(results[0][1], expected, rtol=1e-4, atol=1e-5)


def test_gradients_accumulate_over_backwards_and_count_with_the_steps_weight() -> None:
    def body(session: hw.Session) -> np.ndarray:
        table = session.table("items", DIM, optimizer=hw.optim.SGD(lr=1.0), initial=hw.Constant(0.0))
        embedding = hw.torch.Embedding(table)
        optimizer = hw.torch.Optimizer(embedding, hw.optim.SGD(), session=session)
        for _ in range(2):
            embedding(torch.tensor([session.index])).sum().backward()
        optimizer.step(weight=1.0 + 2.0 * session.index)
        return table.pull([0, 1])[:, 0]

    with start_job(workers=2, servers=2) as started:
        for rows in started.run(body):
            np.testing.assert_array_equal(rows, [-0.5, -1.5])


def test_a_model_of_rows_alone_needs_a_session_with_tables() -> None:
    with hw.connect() as session:
        with pytest.raises(errors.LayoutError, match="at least one parameter that requires a gradient, got none"):
            hw.torch.Optimizer(torch.nn.ModuleList(), hw.optim.SGD(), session=session)
        table = session.table("items", DIM)
        embedding = hw.torch.Embedding(table)
        assert embedding.state_dict() == {}
        assert repr(embedding) == f"Embedding('items', dim={DIM})"
        optimizer = hw.torch.Optimizer(embedding, hw.optim.AdamW(), session=session)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        embedding(torch.tensor([1])).sum().backward()
        optimizer.step()
        scheduler.step()
        assert (session.clock, table.stats().rows) == (1, 1)


def test_bad_input_is_named() -> None:
    with hw.connect() as session:
        table = session.table("items", DIM)
        embedding, bag = hw.torch.Embedding(table), hw.torch.EmbeddingBag(table, mode="sum")
        mean = hw.torch.EmbeddingBag(table)
        ids, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 2])
        weights = torch.ones(3)
        calls: list[tuple[Callable[[], Any], str]] = [
            (lambda: embedding(torch.tensor([1.0])), r"integers, got float32 \(1,\) — table 'items'"),
            (lambda: embedding([1, 2]), "Expected ids in a tensor on the CPU, got list"),
            (lambda: embedding(ids.to("meta")), "Expected ids in a tensor on the CPU, got meta"),
            (lambda: bag(ids), r"got \(3,\) without offsets"),
            (lambda: bag(ids[None], offsets), r"got \(1, 3\) with offsets"),
            (lambda: bag(ids, torch.tensor([1, 2])), "that start at 0 and never fall, up to 3 ids"),
            (lambda: bag(ids, torch.tensor([0, 2, 1])), "that start at 0 and never fall, up to 3 ids"),
            (lambda: bag(ids, torch.tensor([0, 4])), "that start at 0 and never fall, up to 3 ids"),
            (lambda: bag(ids, torch.tensor([0.0])), "Expected ids that are integers, got float32"),
            (lambda: mean(ids, offsets, weights), "with mode='sum', got torch.float32"),
            (lambda: bag(ids, offsets, weights[:2]), r"got torch.float32 \(2,\)"),
            (lambda: bag(ids, offsets, weights.double()), "got torch.float64"),
            (
                lambda: hw.torch.EmbeddingBag(table, include_last_offset=True)(ids, offsets),
                "Expected offsets that end with 3",
            ),
        ]
        for call, message in calls:
            with pytest.raises(errors.LayoutError, match=message):
                call()
        with pytest.raises(errors.SettingError, match="Expected mode 'sum' or 'mean', got 'max'"):
            hw.torch.EmbeddingBag(table, mode="max")
        with pytest.raises(
            errors.NonFiniteError, match="for id 2 at position 0, number 1 of the batch — table 'items'"
        ):
            (embedding(ids).sum(1) * torch.tensor([1.0, float("nan"), 1.0])).sum().backward()
        assert not session.has_staged


def test_a_scaled_loss_is_refused_where_rows_are_staged() -> None:
    with hw.connect() as session:
        embedding = hw.torch.Embedding(session.table("items", DIM))
        model = Model(embedding, embedding)
        optimizer = hw.torch.Optimizer(model, hw.optim.SGD(), session=session)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(model(torch.tensor([1]), torch.tensor([2])).sum()).backward()
        with pytest.raises(errors.UsageError, match="Expected rows of tables without GradScaler"):
            scaler.step(optimizer)
