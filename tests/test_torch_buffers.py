"""A module's statistics are the job's: pushed as values, averaged, and the same in every worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Arrays, assert_equal_bits, start_job
from test_durability import cluster_of

import headwater as hw
from headwater import durability, errors

INPUTS = 6


def make_model() -> Any:
    model = torch.nn.Sequential(
        torch.nn.Linear(INPUTS, 8), torch.nn.BatchNorm1d(8, momentum=0.3), torch.nn.ReLU(), torch.nn.Linear(8, 1)
    )
    generator = torch.Generator().manual_seed(0)  # workers are threads here: they share torch's own
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def make_optimizer(model: torch.nn.Module, session: hw.Session, where: str = "server") -> hw.torch.Optimizer:
    if where == "worker":
        inner = torch.optim.SGD(model.parameters(), lr=0.05)
        return hw.torch.Optimizer(model, inner, session=session, where=where)
    return hw.torch.Optimizer(model, hw.optim.AdamW(lr=0.02, clip_norm=0.5), session=session)


def batch(step: int, rows: slice = slice(None), size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, INPUTS, generator=generator) * 3 + 1
    return x[rows], (x[rows, :1] - x[rows, 1:2]).abs()


def loss_of(model: torch.nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(data[0]), data[1])


def statistics(model: torch.nn.Module) -> Arrays:
    return {name: b.numpy().copy() for name, b in model.named_buffers() if b.is_floating_point()}


def fit(session: hw.Session, steps: range, where: str = "server") -> tuple[Arrays, list[Arrays], list[Arrays]]:
    """Train on this worker's rows; return the whole state, and the statistics before and after each step."""
    model = make_model()
    optimizer = make_optimizer(model, session, where)
    before, after = [], []
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(step, slice(session.index, None, session.workers))).backward()
        before.append(statistics(model))
        optimizer.step()
        after.append(statistics(model))
    return {name: t.numpy().copy() for name, t in model.state_dict().items()}, before, after


@pytest.mark.parametrize("where", ["server", "worker"])
@pytest.mark.parametrize("workers", [2, 4])
def test_statistics_are_exactly_the_mean_of_the_workers_statistics(workers: int, where: str) -> None:
    with start_job(workers=workers) as job:
        found = job.run(lambda session: fit(session, range(4), where))
    for _, _, after in found[1:]:
        for ours, theirs in zip(found[0][2], after, strict=True):
            assert_equal_bits(ours, theirs)
    share = np.float32(1 / workers)  # a power of two: rounded nowhere
    for step, averaged in enumerate(found[0][2]):
        everybody = [before[step] for _, before, _ in found]
        assert any((everybody[0][name] != everybody[1][name]).all() for name in averaged)
        mean = {name: np.sum([share * one[name] for one in everybody], axis=0) for name in averaged}
        assert_equal_bits(averaged, mean)


def test_any_number_of_servers_gives_the_same_bits() -> None:
    def body(session: hw.Session) -> Arrays:
        return fit(session, range(3))[0]

    states = []
    for servers in (1, 3):
        with start_job(workers=3, servers=servers) as job:
            states.append(job.run(body)[0])
    assert_equal_bits(states[0], states[1])


@pytest.mark.slow
def test_four_workers_evaluate_as_well_as_one_process() -> None:
    """The same data in the same steps; only what BatchNorm sees at once is a quarter, 128 rows."""

    def body(session: hw.Session) -> tuple[float, float]:
        model = make_model()
        optimizer = make_optimizer(model, session)
        for step in range(80):
            optimizer.zero_grad()
            loss_of(model, batch(step, slice(session.index, None, session.workers), 512)).backward()
            optimizer.step()
        with torch.no_grad():
            found = float(loss_of(model.eval(), held_out))
            model[1].reset_running_stats()
            return found, float(loss_of(model, held_out))

    held_out = batch(1000, size=2048)
    variance = float(held_out[1].var())
    unexplained = {}
    for workers in (1, 4):
        with start_job(workers=workers) as job:
            found = job.run(body)
        assert len(set(found)) == 1, "each worker has the same model"
        unexplained[workers], without = (loss / variance for loss in found[0])
        assert without > 0.1, "the statistics matter"
    assert unexplained[1] < 0.005
    assert abs(unexplained[4] - unexplained[1]) < 0.002, unexplained


def test_without_a_barrier_the_statistics_are_those_that_were_pushed_last() -> None:
    with start_job(workers=2, consistency=hw.asp()) as job, job.connect() as one, job.connect() as other:
        models = [make_model(), make_model()]
        optimizers = [make_optimizer(m, s) for m, s in zip(models, (one, other), strict=True)]
        for step, which in enumerate((0, 1, 1, 0)):
            loss_of(models[which], batch(step)).backward()
            mine = statistics(models[which])
            optimizers[which].step()
            assert_equal_bits(statistics(models[which]), mine)
            assert_equal_bits({name: one.pull()[name] for name in mine}, mine)
            models[which].zero_grad()


@pytest.mark.parametrize("where", ["server", "worker"])
def test_a_step_that_counts_nowhere_leaves_nothing_of_its_statistics(where: str) -> None:
    with hw.connect() as session:
        model = make_model()
        optimizer = make_optimizer(model, session, where)
        loss_of(model, batch(0)).backward()
        optimizer.step()
        kept = statistics(model)

        loss_of(model, batch(1)).backward()
        assert not (statistics(model)["1.running_mean"] == kept["1.running_mean"]).any()
        optimizer.step(weight=0.0)
        assert_equal_bits(statistics(model), kept)

        optimizer.zero_grad()
        model(batch(2)[0])
        optimizer.step()  # no gradient at all
        assert_equal_bits(statistics(model), kept)

        loss_of(model, batch(3)).backward()
        model[1].running_var[5] = float("nan")
        with pytest.raises(
            errors.NonFiniteError, match=r"finite values, got NaN or infinity in '1.running_var' \(8,\) at element 5"
        ):
            optimizer.step()
        assert_equal_bits(statistics(model), kept)
        assert int(model[1].num_batches_tracked) == 4, "integers are this worker's own"


class Constants(torch.nn.Module):
    """Buffers of every kind that nothing changes, and one that each forward pass does."""

    own: torch.Tensor
    seen: torch.Tensor
    mask: torch.Tensor
    thirds: torch.Tensor
    unset: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("thirds", torch.full((5,), 1 / 3))
        self.register_buffer("unset", torch.tensor(float("nan")))
        self.register_buffer("own", torch.zeros(2), persistent=False)
        self.register_buffer("complex", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bfloat16))
        self.same = self.linear
        self.linear.register_buffer("of_linear", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + 1  # another tensor each time
        self.own += 1
        found: torch.Tensor = self.linear(x)
        return found


def test_constants_stay_what_they_are_and_others_keep_out() -> None:
    """The mean of three equal values is not always that value; a mask of infinities would be refused."""

    def body(session: hw.Session) -> tuple[set[str], Constants]:
        model = Constants()
        model.thirds += session.index / 7  # the first worker's count
        optimizer = hw.torch.Optimizer(model, hw.optim.SGD(lr=0.1), session=session)
        for _ in range(3):
            model(torch.ones(4, 2)).sum().backward()
            optimizer.step()
        return set(session.parameters), model

    with start_job(workers=3) as job:
        found = job.run(body)
    initial = Constants()
    for names, model in found:
        assert names == {"linear.weight", "linear.bias", "mask", "thirds", "unset", "seen", "linear.of_linear"}
        torch.testing.assert_close(model.mask, initial.mask, rtol=0, atol=0)
        assert model.thirds.unique().numel() == 1
        assert float(model.thirds[0]) in {float(torch.tensor(1 / 3) + i / 7) for i in range(3)}
        assert model.unset.isnan()
        assert (float(model.seen), model.own.tolist()) == (3.0, [3.0, 3.0])


def test_whoever_saves_loads_or_joins_has_the_statistics(tmp_path: Path) -> None:
    with start_job(workers=1, consistency=hw.asp()) as job, job.connect() as session:
        trained, _, _ = fit(session, range(3))
        session.save(tmp_path / "saved")
        with job.connect() as late:
            model = make_model()
            make_optimizer(model, late)
            trained.pop("1.num_batches_tracked")
            assert_equal_bits({n: t.numpy() for n, t in model.state_dict().items() if n in trained}, trained)
    with hw.connect() as session:
        session.load(tmp_path / "saved")
        model = make_model()
        optimizer = make_optimizer(model, session)
        assert_equal_bits({n: t.numpy() for n, t in model.state_dict().items() if n in trained}, trained)
        with torch.no_grad():
            model[1].running_mean.fill_(2.0)  # as load_state_dict of the model does
        optimizer.load_state_dict(optimizer.state_dict())
        assert session.pull()["1.running_mean"].tolist() == [2.0] * 8
        assert len(optimizer.state_dict()["state"]) == 6, "of buffers there is no state"


@pytest.mark.parametrize("servers", [1, 2])
def test_a_killed_server_brings_the_statistics_back(tmp_path: Path, servers: int) -> None:
    with hw.connect() as session:
        undisturbed = fit(session, range(5))[0]
    with (
        cluster_of(tmp_path, durability.log(0), servers=servers) as cluster,
        cluster.connect() as session,
    ):
        model = make_model()
        optimizer = make_optimizer(model, session)
        for step in range(5):
            optimizer.zero_grad()
            loss_of(model, batch(step)).backward()
            if step in (2, 4):
                cluster.restart(step % servers)
            optimizer.step()
        assert_equal_bits({n: t.numpy() for n, t in model.state_dict().items()}, undisturbed)


def replace(model: Any) -> None:
    model[1].running_mean = torch.zeros(8, dtype=torch.float64)


def remove(model: Any) -> None:
    model[1].running_mean = None


@pytest.mark.parametrize(("change", "got"), [(replace, r"torch.float64, \(8,\)"), (remove, "None")])
def test_a_buffer_that_has_become_another_kind_of_thing_is_named(change: Any, got: str) -> None:
    with hw.connect() as session:
        model = make_model()
        optimizer = make_optimizer(model, session)
        loss_of(model, batch(0)).backward()
        change(model)
        with pytest.raises(errors.LayoutError, match=rf"'1.running_mean' to stay torch.float32 \(8,\), got .*{got}"):
            optimizer.step()


def test_named_parameters_come_without_buffers() -> None:
    with hw.connect() as session:
        model = make_model()
        hw.torch.Optimizer(model.named_parameters(), hw.optim.SGD(lr=0.1), session=session)
        assert "1.running_mean" not in session.parameters
