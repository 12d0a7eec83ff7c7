"""Optimizer settings: the same steps as torch.optim, and wrong settings refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater import _kernels, optim
from headwater._errors import SettingError

Array = npt.NDArray[Any]

SIZE, STEPS = 500, 50
#: Largest difference of a plane after 50 steps, relative to the plane's largest element. torch contracts a·b + c into one
#: rounding and orders some products differently, so a step may differ by a few units in the last place (6e-8 and 1e-16);
#: RMSprop centered subtracts two close numbers, which multiplies that (seen: 1.2e-6 and 5e-16).
TOLERANCE = {"float32": 5e-6, "float64": 1e-13}

rates = st.floats(1e-4, 0.1)
decays = st.sampled_from([0.0, 0.01, 0.3])
momenta = st.sampled_from([0.0, 0.5, 0.9])
signs = st.booleans()


def run_ours(optimizer: optim.Optimizer, start: Array, gradients: Array) -> dict[str, Array]:
    """Return the planes after a step per gradient."""
    source = [start.copy(), *(np.full(SIZE, optimizer.initial(slot), start.dtype) for slot in optimizer.slots)]
    target = [np.zeros_like(plane) for plane in source]
    runs = np.array([[0, SIZE, 0]])
    sign = -1.0 if getattr(optimizer, "maximize", False) else 1.0
    for step, gradient in enumerate(gradients, 1):
        row = np.array([optimizer.row(optimizer.scalars(), step)])
        commit = (runs, row, [gradient], np.array([[sign]]))
        bad = _kernels.apply(
            optimizer.kind, optimizer.flags, str(start.dtype), source, target, [commit], threads=1, level="auto"
        )
        assert bad is None
        source, target = target, source
    return dict(zip(("parameters", *optimizer.slots), source, strict=True))


def run_torch(make: Callable[..., Any], options: dict[str, Any], start: Array, gradients: Array) -> dict[str, Array]:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = make([parameter], foreach=False, **options)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    state = {name: value.numpy() for name, value in optimizer.state[parameter].items() if torch.is_tensor(value)}
    return {"parameters": parameter.detach().numpy(), **state}


def compare(name: str, dtype: str, options: dict[str, Any]) -> None:
    """Assert that parameters and every slot move as torch.optim's do."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.standard_normal(SIZE).astype(dtype)
    gradients = rng.standard_normal((STEPS, SIZE)).astype(dtype)
    ours = run_ours(getattr(optim, name)(**options), start, gradients)
    theirs = run_torch(getattr(torch.optim, name), options, start, gradients)
    for plane, values in ours.items():
        error = np.abs(values - theirs[plane]).max() / max(np.abs(theirs[plane]).max(), 1e-30)
        assert error <= TOLERANCE[dtype], f"{plane}: {error}"


steps = settings(derandomize=True, deadline=None, max_examples=12)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


@dtypes
@steps
@given(
    lr=rates,
    momentum=momenta,
    dampening=st.sampled_from([0.0, 0.1]),
    weight_decay=decays,
    maximize=signs,
    nesterov=signs,
)
def test_sgd_steps_as_torch_does(dtype: str, **options: Any) -> None:
    options["nesterov"] &= options["momentum"] > 0 and options["dampening"] == 0
    compare("SGD", dtype, options)


@dtypes
@steps
@given(
    lr=rates, lr_decay=st.sampled_from([0.0, 0.1]), weight_decay=decays, initial_accumulator_value=st.sampled_from([0.0, 0.1]),
    eps=st.sampled_from([1e-10, 1e-3]), maximize=signs,
)  # fmt: skip
def test_adagrad_steps_as_torch_does(dtype: str, **options: Any) -> None:
    compare("Adagrad", dtype, options)


@dtypes
@steps
@given(
    lr=rates, alpha=st.sampled_from([0.3, 0.9, 0.99]), weight_decay=decays, momentum=momenta, centered=signs,
    eps=st.sampled_from([1e-8, 1e-3]), maximize=signs,
)  # fmt: skip
def test_rmsprop_steps_as_torch_does(dtype: str, **options: Any) -> None:
    compare("RMSprop", dtype, options)


@dtypes
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@steps
@given(
    lr=rates, betas=st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.4, 0.5)]), weight_decay=decays, amsgrad=signs,
    eps=st.sampled_from([1e-8, 1e-3]), maximize=signs,
)  # fmt: skip
def test_adam_steps_as_torch_does(name: str, dtype: str, **options: Any) -> None:
    compare(name, dtype, options)


ALL = (
    optim.SGD(),
    optim.SGD(lr=0.1, momentum=0.9, nesterov=True, clip_norm=1),
    optim.Adagrad(initial_accumulator_value=0.5),
    optim.RMSprop(centered=True, momentum=0.1),
    optim.SGD(momentum=0.9, nesterov=True, keras_form=True),
    optim.Adam(amsgrad=True),
    optim.AdamW(betas=(0.8, 0.9), maximize=True),
    optim.Mean(),
)
every = pytest.mark.parametrize("optimizer", ALL, ids=repr)


@every
def test_an_optimizer_travels(optimizer: optim.AnyOptimizer) -> None:
    data = msgspec.msgpack.encode(optimizer)
    back = msgspec.msgpack.decode(data, type=optim.AnyOptimizer)
    assert back == optimizer
    assert back.structure() == optimizer.structure()


def test_a_wrong_optimizer_does_not_arrive() -> None:
    for fields in ({"type": "SGD", "lr": -1.0}, {"type": "SGD", "momentun": 0.9}, {"type": "Lion"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=optim.AnyOptimizer)


def test_defaults_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.zeros(1))
    for name in ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW"):
        theirs = getattr(torch.optim, name)([parameter]).defaults
        ours = getattr(optim, name)()
        for field in msgspec.structs.fields(ours):
            if field.name not in ("clip_norm", "keras_form"):
                assert getattr(ours, field.name) == theirs[field.name], f"{name}.{field.name}"


@every
def test_rows_have_what_the_kernel_takes(optimizer: optim.Optimizer) -> None:
    planes = [np.zeros(1, np.float32) for _ in range(1 + len(optimizer.slots))]
    for step in (0, 1, 10**9):
        row = np.array([optimizer.row(optimizer.scalars(), step)])
        commit = (np.array([[0, 1, 0]]), row, [np.zeros(1, np.float32)], np.ones((1, 1)))
        target = [plane.copy() for plane in planes]
        assert (
            _kernels.apply(
                optimizer.kind, optimizer.flags, "float32", planes, target, [commit], threads=1, level="auto"
            )
            is None
        )


@every
def test_registered_scalars_pass_their_own_check(optimizer: optim.Optimizer) -> None:
    optimizer.check(optimizer.scalars())


@every
def test_scalars_that_are_wrong_are_refused(optimizer: optim.Optimizer) -> None:
    good = optimizer.scalars()
    with pytest.raises(SettingError, match="nonsense"):
        optimizer.check({**good, "nonsense": 1.0})
    for name in good:
        with pytest.raises(SettingError, match=name):
            optimizer.check({k: v for k, v in good.items() if k != name})
        for value in (float("nan"), float("inf"), *(() if name == "dampening" else (-1.0,))):
            with pytest.raises(SettingError, match=name):
                optimizer.check({**good, name: value})


def test_scalars_may_change_by_the_step_but_not_the_planes() -> None:
    without, with_momentum = optim.SGD(), optim.SGD(momentum=0.9)
    without.check({**without.scalars(), "lr": 0.5, "weight_decay": 0.1})
    with_momentum.check({**with_momentum.scalars(), "momentum": 0.5})
    with pytest.raises(SettingError, match="stay 0"):
        without.check({**without.scalars(), "momentum": 0.9})
    with pytest.raises(SettingError, match="stay above 0"):
        with_momentum.check({**with_momentum.scalars(), "momentum": 0.0})
    nesterov = optim.SGD(momentum=0.9, nesterov=True)
    with pytest.raises(SettingError, match="Nesterov"):
        nesterov.check({**nesterov.scalars(), "dampening": 0.1})


def test_structure_is_everything_but_the_scalars() -> None:
    base = optim.SGD(lr=0.1, momentum=0.9)
    assert base.structure() == optim.SGD(lr=0.2, momentum=0.5, weight_decay=0.1).structure()
    for other in (
        optim.SGD(lr=0.1),
        optim.SGD(lr=0.1, momentum=0.9, nesterov=True),
        optim.SGD(lr=0.1, momentum=0.9, maximize=True),
        optim.SGD(lr=0.1, momentum=0.9, clip_norm=1.0),
        optim.RMSprop(lr=0.1, momentum=0.9),
    ):
        assert other.structure() != base.structure()
    assert optim.Adagrad().structure() != optim.Adagrad(initial_accumulator_value=0.1).structure()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (optim.SGD, {"lr": -0.1}),
        (optim.SGD, {"lr": float("nan")}),
        (optim.SGD, {"lr": "fast"}),
        (optim.SGD, {"momentum": -0.5}),
        (optim.SGD, {"nesterov": True}),
        (optim.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
        (optim.SGD, {"nesterov": 1, "momentum": 0.9}),
        (optim.SGD, {"clip_norm": 0.0}),
        (optim.SGD, {"clip_norm": float("inf")}),
        (optim.SGD, {"clip_norm": "1e"}),
        (optim.Adagrad, {"lr_decay": -1.0}),
        (optim.Adagrad, {"initial_accumulator_value": -1.0}),
        (optim.RMSprop, {"alpha": 1.5}),
        (optim.RMSprop, {"eps": -1e-8}),
        (optim.Adam, {"betas": (0.9, 1.0)}),
        (optim.Adam, {"betas": (-0.1, 0.9)}),
        (optim.Adam, {"betas": 0.9}),
        (optim.Adam, {"betas": (0.9, None)}),
        (optim.AdamW, {"weight_decay": -0.1}),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[..., Any], options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="Expected"):
        make(**options)


def test_numbers_of_other_kinds_become_floats() -> None:
    optimizer = optim.Adam(lr=np.float32(0.5), betas=[0, np.float64(0.5)], clip_norm=1)  # type: ignore[arg-type]
    assert (type(optimizer.lr), type(optimizer.clip_norm)) == (float, float)
    assert optimizer.betas == (0.0, 0.5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(optimizer), type=optim.AnyOptimizer) == optimizer


def test_unknown_slots_are_refused() -> None:
    assert optim.Adagrad(initial_accumulator_value=0.5).initial("sum") == 0.5
    with pytest.raises(SettingError, match="momentum_buffer"):
        optim.SGD().initial("momentum_buffer")
