"""hw.torch.Optimizer does what a torch.optim.Optimizer does, with its state on the servers."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Arrays, assert_close, assert_equal_bits, start_job
from torch.optim import lr_scheduler

import headwater as hw
from headwater import errors

WORKERS = Path(__file__).parent / "workers"
#: Per-tensor norm of the difference after 50 steps; torch contracts and orders some products differently.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def make_model(dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)


def make_batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(count, 2, 12, 6, generator=generator, dtype=torch.float64).to(dtype)
    return [(pair[0], pair[1, :, :3]) for pair in numbers]


def backward(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
    loss.backward()
    return loss


def fit(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    for batch in batches:
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()


def values(model: torch.nn.Module) -> Arrays:
    return {name: p.detach().to(torch.float64).numpy().copy() for name, p in model.named_parameters()}


@pytest.fixture
def session() -> Iterator[hw.Session]:
    with hw.connect() as found:
        yield found


def make_pair(session: hw.Session, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Return our model and optimizer and torch's, all AdamW."""
    ours, theirs = make_model(), make_model()
    options = {"lr": 0.01, **options}
    return (
        *(ours, hw.torch.Optimizer(ours, hw.optim.AdamW(**options), session=session)),
        *(theirs, torch.optim.AdamW(theirs.parameters(), **options)),
    )


# An optimizer like any other.


def test_it_is_a_torch_optimizer(session: hw.Session) -> None:
    model, optimizer, *_ = make_pair(session)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert hw.torch.Optimizer._step_supports_amp_scaling
    hooks = []
    optimizer.register_step_post_hook(lambda *_: hooks.append(1))
    fit(model, optimizer, make_batches(2))
    assert hooks == [1, 1]


WRAPPED = [
    (torch.optim.SGD, {"lr": 0.05}),
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.001, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    (torch.optim.Adagrad, {"lr": 0.05, "lr_decay": 0.01, "initial_accumulator_value": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}),
    (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95)}),
]


@pytest.mark.parametrize(("kind", "options"), WRAPPED)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_wrapped_torch_optimizer_steps_as_it_would_itself(
    session: hw.Session, kind: type[torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype
) -> None:
    ours, theirs = make_model(dtype), make_model(dtype)
    wrapped = hw.torch.Optimizer(ours, kind(ours.parameters(), **options), session=session)
    fit(ours, wrapped, make_batches(50, dtype))
    fit(theirs, kind(theirs.parameters(), **options), make_batches(50, dtype))
    assert_close(values(ours), values(theirs), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "SGD, Adagrad, RMSprop, Adam, AdamW, got LBFGS: use where='worker' for any optimizer"),
        (torch.optim.NAdam, "got NAdam: use where='worker'"),
        (lambda p: torch.optim.SGD(p, differentiable=True), "got differentiable=True: use where='worker'"),
        (lambda p: torch.optim.Adam(p, decoupled_weight_decay=True), "use torch.optim.AdamW"),
        (
            lambda p: torch.optim.Adam([{"params": p[:2], "amsgrad": True}, {"params": p[2:]}]),
            "Expected options that shape the state to be the same in all groups",
        ),
    ],
)
def test_what_servers_cannot_do_is_refused_by_name(
    session: hw.Session, make: Callable[[Any], torch.optim.Optimizer], message: str
) -> None:
    model = make_model()
    with pytest.raises(errors.SettingError, match=message):
        hw.torch.Optimizer(model, make(list(model.parameters())), session=session)


def test_a_torch_optimizer_that_has_made_steps_is_refused(session: hw.Session) -> None:
    model = make_model()
    inner = torch.optim.Adam(model.parameters())
    fit(model, inner, make_batches(1))
    with pytest.raises(errors.SettingError, match="that has made no step"):
        hw.torch.Optimizer(model, inner, session=session)


def test_arguments_that_contradict_each_other_are_refused(session: hw.Session) -> None:
    model = make_model()
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: hw.torch.Optimizer(model, hw.optim.SGD(), where="moon", session=session), "got 'moon'"),
        (lambda: hw.torch.Optimizer(model, hw.optim.SGD(), where="worker", session=session), "a torch.optim object"),
        (
            lambda: hw.torch.Optimizer(model, torch.optim.SGD(model.parameters()), groups=[], session=session),
            "groups in the torch.optim object",
        ),
        (
            lambda: hw.torch.Optimizer(model, torch.optim.SGD(make_model().parameters()), session=session),
            "pass the same model",
        ),
    ]
    for call, message in calls:
        with pytest.raises((errors.SettingError, errors.LayoutError), match=message):
            call()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(errors.LayoutError, match="at least one parameter that requires a gradient"):
        hw.torch.Optimizer(model, hw.optim.SGD(), session=session)


def test_a_group_cannot_be_added_later(session: hw.Session) -> None:
    model, optimizer, *_ = make_pair(session)
    with pytest.raises(errors.UsageError, match="Expected all parameter groups at construction"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    fit(model, optimizer, make_batches(1))


# Schedulers, groups, accumulation.

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=10),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("target", ["ours", "wrapped", "inner"])
def test_schedulers_drive_the_rate_on_the_servers(session: hw.Session, kind: str, target: str) -> None:
    ours, theirs = make_model(), make_model()
    inner = torch.optim.Adam(ours.parameters(), lr=0.01)
    settings = hw.optim.Adam(lr=0.01) if target == "ours" else inner
    optimizer = hw.torch.Optimizer(ours, settings, session=session)
    reference = torch.optim.Adam(theirs.parameters(), lr=0.01)
    schedulers = [SCHEDULERS[kind](inner if target == "inner" else optimizer), SCHEDULERS[kind](reference)]
    for batch in make_batches(15):
        for model, stepped, scheduler in zip((ours, theirs), (optimizer, reference), schedulers, strict=True):
            fit(model, stepped, [batch])
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
    assert_close(values(ours), values(theirs), 1e-12)


def test_groups_have_rates_of_their_own(session: hw.Session) -> None:
    ours, theirs = make_model(), make_model()

    def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
        p = list(model.parameters())
        return [{"params": [p[1], p[3]], "weight_decay": 0.0}, {"params": [p[0], p[2]], "lr": 0.003}]

    settings = hw.optim.AdamW(lr=0.01, weight_decay=0.1)
    optimizer = hw.torch.Optimizer(ours, settings, groups=groups(ours), session=session)
    reference = torch.optim.AdamW(groups(theirs), lr=0.01, weight_decay=0.1)
    for stepped, model in ((optimizer, ours), (reference, theirs)):
        fit(model, stepped, make_batches(5))
        stepped.param_groups[1]["lr"] = 0.02
        fit(model, stepped, make_batches(5))
    assert_close(values(ours), values(theirs), 1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_accumulate_until_they_are_zeroed(session: hw.Session, set_to_none: bool) -> None:
    ours, optimizer, theirs, reference = make_pair(session)
    for i, batch in enumerate(make_batches(12)):
        for model, stepped in ((ours, optimizer), (theirs, reference)):
            backward(model, batch)
            if i % 3 == 2:
                stepped.step()
                stepped.zero_grad(set_to_none=set_to_none)
    assert session.clock == 4
    assert_close(values(ours), values(theirs), 1e-12)


def test_a_closure_is_evaluated_and_its_loss_returned(session: hw.Session) -> None:
    ours, optimizer, theirs, reference = make_pair(session)
    for model, stepped in ((ours, optimizer), (theirs, reference)):

        def closure(model: Any = model, stepped: Any = stepped) -> torch.Tensor:
            stepped.zero_grad()
            return backward(model, make_batches(1)[0])

        losses = [stepped.step(closure).item() for _ in range(3)]
        assert losses[2] < losses[0]
    assert_close(values(ours), values(theirs), 1e-12)


def test_the_weight_of_a_step_is_its_share_in_the_mean() -> None:
    batches = [make_batches(1)[0], tuple(t[:3] for t in make_batches(2)[1])]
    models = [make_model() for _ in range(2)]

    def work(session: hw.Session) -> Arrays:
        model, (x, y) = models[session.index], batches[session.index]
        optimizer = hw.torch.Optimizer(model, hw.optim.SGD(lr=0.1), session=session)
        backward(model, (x, y))
        optimizer.step(weight=float(len(x)))
        return values(model)

    theirs = make_model()
    whole = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    fit(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), [whole])
    with start_job(workers=2) as job:
        for found in job.run(work):
            assert_close(found, values(theirs), 1e-12)


# Parameters that are frozen, tied, without gradient, or sparse.


def test_frozen_parameters_stay_out_and_tied_ones_go_once(session: hw.Session) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.first.bias.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]

    ours, theirs = Tied(), Tied()
    frozen = ours.first.bias.detach().clone()
    optimizer = hw.torch.Optimizer(ours, hw.optim.SGD(lr=0.1, momentum=0.9), session=session)
    batches = [(x[:, :4], x[:, 2:]) for x, _ in make_batches(5, torch.float32)]
    fit(ours, optimizer, batches)
    fit(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9), batches)
    assert set(session.parameters) == {"first.weight", "second.bias"}
    assert ours.second.weight is ours.first.weight
    assert torch.equal(ours.first.bias, frozen)
    assert_close(values(ours), values(theirs), 1e-6)


def test_a_parameter_without_gradient_is_untouched_and_its_steps_do_not_count(session: hw.Session) -> None:
    ours, optimizer, theirs, reference = make_pair(session)
    for i, batch in enumerate(make_batches(6)):
        for model, stepped in ((ours, optimizer), (theirs, reference)):
            stepped.zero_grad()
            backward(model, batch)
            if i < 4:
                model[2].bias.grad = None
            stepped.step()
    assert_close(values(ours), values(theirs), 1e-12)
    assert [float(s["step"]) for s in optimizer.state_dict()["state"].values()] == [6.0, 6.0, 6.0, 2.0]


def test_a_step_without_any_gradient_changes_nothing(session: hw.Session) -> None:
    model, optimizer, *_ = make_pair(session)
    fit(model, optimizer, make_batches(1))
    before = values(model)
    optimizer.zero_grad()
    optimizer.step()
    assert session.clock == 2
    assert_equal_bits(values(model), before)


def test_sparse_gradients_are_pushed_densely(session: hw.Session) -> None:
    torch.manual_seed(0)
    ours = torch.nn.Embedding(10, 3, sparse=True)
    theirs = copy.deepcopy(ours)
    optimizer = hw.torch.Optimizer(ours, hw.optim.SGD(lr=0.1), session=session)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for ids in ([1, 2, 2], [9, 1, 0]):
        for model, stepped in ((ours, optimizer), (theirs, reference)):
            stepped.zero_grad()
            model(torch.tensor(ids)).sum().backward()
            stepped.step()
    assert ours.weight.grad is not None
    assert ours.weight.grad.is_sparse
    assert_close(values(ours), values(theirs), 1e-6)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_graph_that_spans_a_step_is_refused_by_autograd_as_with_torch(transport: str) -> None:
    """Parameters change in place, or with their version, so that a stale graph is an error and not a wrong gradient."""
    with start_job(transport=transport) as job, job.connect() as session:
        ours, optimizer, theirs, reference = make_pair(session)
        for model, stepped in ((theirs, reference), (ours, optimizer)):
            loss = torch.nn.functional.mse_loss(model(make_batches(1)[0][0]), make_batches(1)[0][1])
            loss.backward(retain_graph=True)
            stepped.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


# State.


@pytest.mark.parametrize(("kind", "options"), WRAPPED)
def test_state_goes_to_torch_and_back(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    """Five steps with us, five with torch from our state, five with us from torch's: as fifteen with torch alone."""
    batches = make_batches(15)
    theirs = make_model()
    fit(theirs, kind(theirs.parameters(), **options), batches)
    model = make_model()
    with hw.connect() as session:
        optimizer = hw.torch.Optimizer(model, kind(model.parameters(), **options), session=session)
        fit(model, optimizer, batches[:5])
        state, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    model = make_model()
    model.load_state_dict(weights)
    inner = kind(model.parameters(), **options)
    inner.load_state_dict(state)
    fit(model, inner, batches[5:10])
    other = make_model()
    with hw.connect() as session:
        optimizer = hw.torch.Optimizer(other, kind(other.parameters(), **options), session=session)
        other.load_state_dict(model.state_dict())
        optimizer.load_state_dict(inner.state_dict())
        fit(other, optimizer, batches[10:])
    assert_close(values(other), values(theirs), 1e-12)


def test_a_state_dict_survives_a_round_trip_through_a_file(session: hw.Session, tmp_path: Path) -> None:
    model, optimizer, theirs, reference = make_pair(session)
    fit(model, optimizer, make_batches(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)
    with hw.connect() as second:
        other, resumed, *_ = make_pair(second, lr=0.5)
        other.load_state_dict(loaded["model"])
        resumed.load_state_dict(loaded["optimizer"])
        assert resumed.param_groups[0]["lr"] == 0.01
        fit(other, resumed, make_batches(3))
        fit(theirs, reference, make_batches(3) * 2)
        assert_close(values(other), values(theirs), 1e-12)


def test_a_scheduler_on_the_inner_optimizer_goes_on_after_loading(session: hw.Session) -> None:
    ours = make_model()
    inner = torch.optim.SGD(ours.parameters(), lr=0.1)
    optimizer = hw.torch.Optimizer(ours, inner, session=session)
    scheduler = lr_scheduler.LambdaLR(inner, lambda step: 0.5**step)
    fit(ours, optimizer, make_batches(1))
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_every_worker_may_load_the_same_state() -> None:
    model = make_model()
    reference = torch.optim.AdamW(model.parameters(), lr=0.01)
    fit(model, reference, make_batches(3))
    state, weights = reference.state_dict(), model.state_dict()
    models = [make_model() for _ in range(2)]

    def work(session: hw.Session) -> Arrays:
        ours = models[session.index]
        optimizer = hw.torch.Optimizer(ours, hw.optim.AdamW(lr=0.01), session=session)
        ours.load_state_dict(weights)
        optimizer.load_state_dict(state)
        fit(ours, optimizer, make_batches(2))
        return values(ours)

    with start_job(workers=2) as job:
        found = job.run(work)
    fit(model, reference, make_batches(2))
    assert_close(found[0], values(model), 1e-12)
    assert_equal_bits(found[1], found[0])


def test_a_state_that_is_handed_back_as_it_was_read_takes_nothing_back() -> None:
    """A loop that wraps an optimizer may do so, while others train; where anything was changed it is a wish to set it."""
    with start_job(workers=2, consistency=hw.asp()) as job, job.connect() as one, job.connect() as other:
        models = make_model(), make_model()
        optimizers = [
            hw.torch.Optimizer(m, hw.optim.AdamW(lr=0.01), session=s) for m, s in zip(models, (one, other), strict=True)
        ]
        fit(models[0], optimizers[0], make_batches(2))
        state = optimizers[1].state_dict()
        fit(models[0], optimizers[0], make_batches(2))
        wrapped = {
            "state": {key: dict(value) for key, value in state["state"].items()},
            "param_groups": state["param_groups"],
        }
        optimizers[1].load_state_dict(wrapped)
        assert set(one.read_optimizer()[1].values()) == {4}

        state = optimizers[1].state_dict()
        with torch.no_grad():
            next(models[1].parameters()).zero_()
        optimizers[1].load_state_dict(state)
        assert not one.pull()["0.weight"].any()
        state = optimizers[1].state_dict()
        state["state"][0]["exp_avg"].zero_()
        optimizers[1].load_state_dict(state)
        assert not one.read_optimizer()[0]["exp_avg"]["0.weight"].any()
        fit(models[1], optimizers[1], make_batches(1))
        optimizers[1].load_state_dict(state)
        assert set(one.read_optimizer()[1].values()) == {4}


def test_a_server_that_ends_while_a_step_waits_is_what_the_step_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    with start_job(workers=2) as job, job.connect() as one, job.connect() as other:
        models = make_model(), make_model()
        optimizer, _ = [
            hw.torch.Optimizer(m, hw.optim.SGD(lr=0.1), session=s) for m, s in zip(models, (one, other), strict=True)
        ]
        backward(models[0], make_batches(1)[0])
        wait = one.wait

        def wait_for_a_server_that_ends() -> int:
            job.servers[0].close()
            return wait()

        monkeypatch.setattr(one, "wait", wait_for_a_server_that_ends)
        with pytest.raises(errors.PeerLostError):
            optimizer.step()


def test_a_compiled_model_has_the_names_of_the_plain_one(session: hw.Session) -> None:
    inner: Any = torch.compile(torch.nn.BatchNorm1d(2), backend="eager")
    model: Any = torch.compile(torch.nn.Sequential(inner, torch.nn.Linear(2, 1)), backend="eager")
    hw.torch.Optimizer(model, hw.optim.SGD(lr=0.1), session=session)
    assert list(session.parameters) == ["0.weight", "0.bias", "1.weight", "1.bias", "0.running_mean", "0.running_var"]


# Low precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_model_has_float32_masters(session: hw.Session, dtype: torch.dtype) -> None:
    """Equal to a float32 model whose copy in low precision computes the gradients."""
    ours, low, masters = make_model(dtype), make_model(dtype), make_model(dtype).to(torch.float32)
    optimizer = hw.torch.Optimizer(ours, hw.optim.AdamW(lr=0.003), session=session)
    reference = torch.optim.AdamW(masters.parameters(), lr=0.003)
    for batch in make_batches(10, dtype):
        fit(ours, optimizer, [batch])
        low.zero_grad()
        backward(low, batch)
        for p, q in zip(low.parameters(), masters.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.to(torch.float32)
        reference.step()
        for p, q in zip(low.parameters(), masters.parameters(), strict=True):
            p.data.copy_(q.data)
    assert ours[0].weight.dtype == dtype
    assert_close(values(ours), values(low), 1e-2)
    planes, _ = session.read_optimizer()
    found = {name: planes["master"][name].astype(np.float64) for name in values(masters)}
    assert_close(found, values(masters), 1e-4)
    state = optimizer.state_dict()["state"][0]
    assert state["master"].dtype == torch.float32


def test_a_low_precision_state_keeps_its_masters(session: hw.Session) -> None:
    ours = make_model(torch.bfloat16)
    optimizer = hw.torch.Optimizer(ours, hw.optim.AdamW(lr=0.003), session=session)
    fit(ours, optimizer, make_batches(3, torch.bfloat16))
    state, weights = optimizer.state_dict(), ours.state_dict()
    with hw.connect() as second:
        other = make_model(torch.bfloat16)
        resumed = hw.torch.Optimizer(other, hw.optim.AdamW(lr=0.003), session=second)
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        fit(ours, optimizer, make_batches(3, torch.bfloat16))
        fit(other, resumed, make_batches(3, torch.bfloat16))
        assert_equal_bits(values(other), values(ours))


def fit_scaled(model: Any, optimizer: Any, batches: list[Any], *, bad: int, clip: bool) -> torch.amp.GradScaler:
    """Train with a GradScaler; the gradient of step `bad` overflows."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y) * (np.inf if step == bad else 1.0)
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    return scaler


@pytest.mark.parametrize("clip", [False, True])
def test_a_grad_scaler_unscales_and_skips_what_overflows(session: hw.Session, clip: bool) -> None:
    ours, optimizer, theirs, reference = make_pair(session)
    scaler = fit_scaled(ours, optimizer, make_batches(8), bad=3, clip=clip)
    assert scaler.get_scale() == fit_scaled(theirs, reference, make_batches(8), bad=3, clip=clip).get_scale() == 512.0
    assert session.clock == 8
    assert session.stats().refused == 0
    assert_close(values(ours), values(theirs), 1e-12)


def test_a_skipped_step_of_one_worker_leaves_the_others_mean() -> None:
    models = [make_model() for _ in range(2)]
    batches = make_batches(3)

    def work(session: hw.Session) -> Arrays:
        model = models[session.index]
        optimizer = hw.torch.Optimizer(model, hw.optim.SGD(lr=0.1), session=session)
        fit_scaled(model, optimizer, batches, bad=1 if session.index else -1, clip=False)
        assert session.clock == 3
        return values(model)

    with start_job(workers=2) as job:
        found = job.run(work)
    alone = make_model()  # both had the same batches, so the mean is either's gradient
    fit(alone, torch.optim.SGD(alone.parameters(), lr=0.1), batches)
    for entry in found:
        assert_close(entry, values(alone), 1e-12)


def test_a_nan_gradient_is_refused_and_training_goes_on(session: hw.Session) -> None:
    model, optimizer, theirs, reference = make_pair(session)
    fit(model, optimizer, make_batches(2))
    before = values(model)
    backward(model, make_batches(1)[0])
    model[0].weight.grad[0, 0] = torch.nan
    with pytest.raises(errors.NonFiniteError, match=r"'0.weight' \(8, 6\) at element 0"):
        optimizer.step()
    assert_equal_bits(values(model), before)
    fit(model, optimizer, make_batches(2))
    fit(theirs, reference, make_batches(2) * 2)
    assert_close(values(model), values(theirs), 1e-12)


# The optimizer on the worker.

ON_WORKERS: list[tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.NAdam, {"lr": 0.01}),
    (torch.optim.Adamax, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
]


@pytest.mark.parametrize(("kind", "options"), ON_WORKERS)
@pytest.mark.parametrize("servers", [1, 2])
def test_an_optimizer_on_the_workers_equals_one_process(
    kind: Callable[..., torch.optim.Optimizer], options: dict[str, Any], servers: int
) -> None:
    models = [make_model() for _ in range(2)]

    def work(session: hw.Session) -> Arrays:
        model = models[session.index]
        optimizer = hw.torch.Optimizer(model, kind(model.parameters(), **options), session=session, where="worker")
        fit(model, optimizer, [(x[session.index :: 2], y[session.index :: 2]) for x, y in make_batches(10)])
        return values(model)

    theirs = make_model()
    fit(theirs, kind(theirs.parameters(), **options), make_batches(10))
    with start_job(workers=2, servers=servers) as job:
        first, second = job.run(work)
    assert_equal_bits(first, second)
    assert_close(first, values(theirs), 1e-9)


@pytest.mark.parametrize("where", ["server", "worker"])
def test_every_worker_adopts_the_values_of_one(where: str) -> None:
    models: list[Any] = [torch.nn.Linear(3, 2) for _ in range(3)]
    starts = [values(model)["weight"].tolist() for model in models]

    def work(session: hw.Session) -> object:
        model = models[session.index]
        inner = torch.optim.SGD(model.parameters())
        hw.torch.Optimizer(model, inner, session=session, where=where)
        weight: object = values(model)["weight"].tolist()
        return weight

    with start_job(workers=3) as job:
        first, *others = job.run(work)
    assert first in starts
    assert others == [first, first]


def test_an_optimizer_on_the_worker_keeps_its_state_there(session: hw.Session) -> None:
    ours, theirs = make_model(), make_model()
    inner = torch.optim.NAdam(ours.parameters(), lr=0.01)
    optimizer = hw.torch.Optimizer(ours, inner, session=session, where="worker")
    fit(ours, optimizer, make_batches(3))
    assert optimizer.state_dict()["state"].keys() == inner.state_dict()["state"].keys() == {0, 1, 2, 3}
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    fit(ours, optimizer, make_batches(2))
    scheduler.step()
    fit(ours, optimizer, make_batches(2))
    reference = torch.optim.NAdam(theirs.parameters(), lr=0.01)
    fit(theirs, reference, make_batches(3))
    fit(theirs, reference, make_batches(2))
    reference.param_groups[0]["lr"] = 0.005
    fit(theirs, reference, make_batches(2))
    assert_close(values(ours), values(theirs), 1e-9)  # loading casts NAdam's mu_product to the parameter's dtype


def test_on_the_worker_a_parameter_that_nobody_has_a_gradient_for_is_untouched() -> None:
    models = [make_model() for _ in range(2)]

    def work(session: hw.Session) -> Arrays:
        model = models[session.index]
        inner = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
        optimizer = hw.torch.Optimizer(model, inner, session=session, where="worker")
        for step, batch in enumerate(make_batches(4)):
            optimizer.zero_grad()
            backward(model, batch)
            if step == 2 or (step == 1 and session.index == 0):
                model[0].bias.grad = None
            optimizer.step()
        return values(model)

    with start_job(workers=2) as job:
        first, second = job.run(work)
    assert_equal_bits(first, second)


def test_an_optimizer_on_the_worker_needs_a_barrier() -> None:
    with start_job(consistency=hw.asp()) as job, job.connect() as session:
        model = make_model()
        with pytest.raises(
            errors.SettingError, match="Expected bsp for an optimizer that runs on the workers, got asp"
        ):
            hw.torch.Optimizer(model, torch.optim.NAdam(model.parameters()), session=session, where="worker")


# Data.


def test_dataloader_workers_read_a_part_by_fork_and_by_spawn() -> None:
    done = subprocess.run(
        [sys.executable, str(WORKERS / "loaders.py")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    squares = [n * n for n in range(20)]
    assert done.stdout.splitlines() == [f"fork {squares}", f"spawn {squares}", "clock 10, sum -10.0"]


def test_parts_of_a_dataset_cover_it_once() -> None:
    def work(session: hw.Session) -> list[int]:
        part = session.shard(range(10))
        return [part[i] for i in range(len(part))]

    with start_job(workers=3) as job:
        parts = job.run(work)
    assert parts == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
