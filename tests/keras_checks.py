"""What must hold with Keras on one backend; `test_keras` runs it once for each, in a process of its own.

    KERAS_BACKEND=jax python tests/keras_checks.py        a line of JSON for each check: its name, and what went wrong

Workers are threads of this process, with a session each.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from jobs import Array, start_job

import headwater as hw
from headwater import errors

BACKEND = keras.config.backend()
K = keras.optimizers
CHECKS: list[Callable[[], None]] = []


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS.append(function)
    return function


def make_model(*, seed: int = 1, normalised: bool = False, policy: str | None = None) -> keras.Model:
    """Return a small model whose variables have the same names each time."""
    keras.utils.set_random_seed(seed)
    x = found = keras.Input((6,))
    found = keras.layers.Dense(8, activation="tanh", name="hidden", dtype=policy)(found)
    if normalised:
        found = keras.layers.BatchNormalization(name="norm", momentum=0.9)(found)
    return keras.Model(x, keras.layers.Dense(3, name="out", dtype=policy)(found))


def make_data(count: int = 64, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 6)).astype(np.float32)
    return x, x[:, :3] * 2 + 1


@contextlib.contextmanager
def open_strategy(**options: Any) -> Iterator[hw.keras.ParameterServerStrategy]:
    """A strategy of one worker, with a server in this process."""
    with hw.connect(**options) as session:
        yield hw.keras.ParameterServerStrategy(session=session)


def compile_on(strategy: Any, model: keras.Model, optimizer: Any = "sgd", **options: Any) -> keras.Model:
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        model.compile(optimizer, "mean_squared_error", **options)
    return model


def fit(model: keras.Model, data: tuple[Array, Array] | None = None, **options: Any) -> Any:
    x, y = data or make_data()
    options = {"batch_size": 16, "epochs": 2, "verbose": 0, "shuffle": False, **options}
    return model.fit(x, y, **options).history


def assert_same(ours: keras.Model, theirs: keras.Model, tolerance: float = 1e-5) -> None:
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def run_workers(models: Sequence[keras.Model], strategies: Sequence[Any], body: Callable[[int], Any]) -> list[Any]:
    """Run the body for each worker in a thread of its own; raises what one of them raised."""
    found: list[Any] = [None] * len(models)

    def work(i: int) -> None:
        try:
            found[i] = body(i)
        except Exception as error:  # noqa: BLE001 - raised below
            found[i] = error
        strategies[i].session.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


# The same steps as Keras's.


def schedule() -> Any:
    return K.schedules.ExponentialDecay(0.1, 3, 0.7)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: K.SGD(0.1),
    "momentum": lambda: K.SGD(schedule(), momentum=0.9),
    "nesterov": lambda: K.SGD(schedule(), momentum=0.9, nesterov=True),
    "sgd, decay": lambda: K.SGD(0.1, weight_decay=0.1),
    "adagrad": lambda: K.Adagrad(0.1),
    "adagrad from 0": lambda: K.Adagrad(0.1, initial_accumulator_value=0.0, epsilon=0.01),
    "rmsprop": lambda: K.RMSprop(schedule(), epsilon=0.01),
    "rmsprop, all": lambda: K.RMSprop(schedule(), momentum=0.9, centered=True, epsilon=0.01),
    "adam": lambda: K.Adam(schedule(), epsilon=0.01),
    "amsgrad": lambda: K.Adam(0.1, beta_1=0.5, beta_2=0.6, amsgrad=True),
    "adam, decay": lambda: K.Adam(0.1, weight_decay=0.1),
    "adamw": lambda: K.AdamW(schedule()),
    "clipnorm": lambda: K.SGD(0.1, clipnorm=0.5),
    "clipvalue": lambda: K.SGD(0.1, clipvalue=0.2),
    "global_clipnorm": lambda: K.SGD(0.1, global_clipnorm=0.5),
    "gathered": lambda: K.Adam(schedule(), gradient_accumulation_steps=3),
    "scaled": lambda: K.Adam(0.1, loss_scale_factor=8.0),
}


def make_variables() -> list[Any]:
    rng = np.random.default_rng(3)
    return [
        keras.Variable(rng.standard_normal(s).astype(np.float32), name=f"v{i}") for i, s in enumerate([(4, 3), (3,)])
    ]


@check
def optimizers_step_as_keras_does() -> None:
    for name, make in OPTIMIZERS.items():
        rng = np.random.default_rng(0)
        gradients = [[rng.standard_normal(s).astype(np.float32) for s in [(4, 3), (3,)]] for _ in range(12)]
        with hw.connect() as session:
            ours, theirs = make_variables(), make_variables()
            mine, peer = hw.keras.Optimizer(make(), session=session), make()
            if BACKEND == "jax" and name == "gathered":
                with pytest.raises(errors.SettingError, match="gradient_accumulation_steps"):
                    mine.register(ours)
                continue
            mine.register(ours)
            peer.build(theirs)
            for step in gradients:
                for optimizer, variables in ((mine, ours), (peer, theirs)):
                    optimizer.apply([keras.ops.convert_to_tensor(g) for g in step], variables)
            for a, b in zip(ours, theirs, strict=True):
                error = np.abs(keras.ops.convert_to_numpy(a) - keras.ops.convert_to_numpy(b)).max()
                assert error < 1e-5, f"{name}: {error}"
            assert session.clock == (4 if name == "gathered" else 12), name


@check
def variables_named_by_the_user_are_left_out_of_weight_decay() -> None:
    with hw.connect() as session:
        ours, theirs = make_variables(), make_variables()
        mine, peer = K.AdamW(0.1, weight_decay=0.5), K.AdamW(0.1, weight_decay=0.5)
        for optimizer in (mine, peer):
            optimizer.exclude_from_weight_decay(var_names=["v1"])
        hw.keras.Optimizer(mine, session=session)
        mine.register(ours)
        peer.build(theirs)
        for optimizer, variables in ((mine, ours), (peer, theirs)):
            optimizer.apply([keras.ops.ones(v.shape) for v in variables], variables)
        for a, b in zip(ours, theirs, strict=True):
            got, wanted = keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b)
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-6)


@check
def fit_is_as_keras_fits() -> None:
    x, y = make_data()
    rates: dict[int, list[float]] = {0: [], 1: []}
    found = []
    for i in range(2):
        with open_strategy() if i == 0 else contextlib.nullcontext() as strategy:
            model = compile_on(strategy, make_model(), K.Adam(0.02, gradient_accumulation_steps=2), metrics=["mae"])
            callback = keras.callbacks.LearningRateScheduler(lambda epoch: 0.02 / (1 + epoch))
            note = keras.callbacks.LambdaCallback(
                on_epoch_end=lambda *_, i=i, m=model: rates[i].append(
                    float(keras.ops.convert_to_numpy(m.optimizer.learning_rate))
                )
            )
            history = fit(
                model, validation_data=(x, y), callbacks=[callback, note], sample_weight=np.linspace(0, 1, 64), epochs=3
            )
            found.append((model, history, model.evaluate(x, y, verbose=0), model.predict(x, verbose=0)))
    ours, theirs = found
    assert rates[0] == rates[1]
    assert_same(ours[0], theirs[0])
    for key, values in theirs[1].items():
        np.testing.assert_allclose(ours[1][key], values, rtol=1e-4, err_msg=key)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-4)
    np.testing.assert_allclose(ours[3], theirs[3], rtol=1e-3, atol=1e-4)


@check
def classes_have_weights() -> None:
    x, _ = make_data()
    y = (x[:, 0] > 0).astype(np.int32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = []
    for is_ours in (True, False):
        model = make_model()
        with open_strategy() if is_ours else contextlib.nullcontext() as strategy:
            with strategy.scope() if strategy else contextlib.nullcontext():
                model.compile("sgd", loss)
            fit(model, (x, y), class_weight={0: 0.1, 1: 3.0, 2: 1.0})
        found.append(model)
    assert_same(*found)


@check
def ways_to_run_a_step_are_alike() -> None:
    ways: list[dict[str, Any]] = [{"run_eagerly": True}]
    if BACKEND != "torch":
        ways += [{"steps_per_execution": 3}]
    peer = compile_on(None, make_model(), "adam")
    fit(peer)
    for way in ways:
        with open_strategy() as strategy:
            model = compile_on(strategy, make_model(), "adam", **way)
            fit(model)
            assert_same(model, peer)
            assert strategy.session.clock == 8, way


@check
def a_model_without_an_input_is_built_by_its_data() -> None:
    with open_strategy() as strategy:
        model = compile_on(strategy, keras.Sequential([keras.layers.Dense(3)]))
        before = fit(model, epochs=10)["loss"]
        assert before[-1] < before[0]
        model.train_on_batch(*make_data(8))
        assert strategy.session.clock == 41


@check
def data_without_a_known_length_ends() -> None:
    """Which TensorFlow notices within a step."""
    import itertools

    def batches() -> Iterator[Any]:
        for i in itertools.count():
            if i % 5 == 4:
                return
            yield make_data(8, seed=i)

    peer = compile_on(None, make_model(), K.SGD(schedule()))
    with open_strategy() as strategy:
        model = compile_on(strategy, make_model(), K.SGD(schedule()))
        for each in (model, peer):
            for _ in range(2):
                each.fit(batches(), verbose=0)
        assert strategy.session.clock == 8
        assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 8


@check
def an_overflow_of_the_loss_scale_closes_the_clock() -> None:
    def scaled() -> Any:
        return K.LossScaleOptimizer(K.SGD(0.01), initial_scale=2.0**127)

    x, y = make_data()
    peer = compile_on(None, make_model(), scaled())
    fit(peer, (x, 100 * y))
    with open_strategy() as strategy:
        model = compile_on(strategy, make_model(), scaled())
        fit(model, (x, 100 * y))
        assert_same(model, peer)
        assert strategy.session.clock == 8
        assert float(keras.ops.convert_to_numpy(model.optimizer.dynamic_scale)) < 2.0**127


@check
def dtype_policies_work() -> None:
    for policy, tolerance in (("mixed_bfloat16", 0.05), ("bfloat16", 0.2)):
        peer = compile_on(None, make_model(policy=policy), K.SGD(0.05))
        fit(peer)
        with open_strategy() as strategy:
            model = compile_on(strategy, make_model(policy=policy), K.SGD(0.05))
            history = fit(model)
            assert history["loss"][-1] < history["loss"][0]
            for a, b in zip(model.trainable_variables, peer.trainable_variables, strict=True):
                assert a.dtype == b.dtype
                got, wanted = (keras.ops.convert_to_numpy(keras.ops.cast(v, "float32")) for v in (a, b))
                np.testing.assert_allclose(got, wanted, atol=tolerance)


@check
def a_refused_gradient_raises_and_leaves_the_model_whole() -> None:
    x, y = make_data()
    with open_strategy() as strategy:
        model = compile_on(strategy, make_model())
        fit(model, (x, y))
        before = [w.copy() for w in model.get_weights()]
        bad = y.copy()
        bad[0, 0] = np.nan
        with pytest.raises(errors.NonFiniteError):
            fit(model, (x, bad))
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)
        history = fit(model, (x, y))
        assert np.isfinite(history["loss"]).all()


@check
def variables_are_the_models_own_after_fit() -> None:
    with open_strategy() as strategy:
        model = compile_on(strategy, make_model())
        fit(model)
        before = [w.copy() for w in model.get_weights()]
        for _ in range(3):
            strategy.session.step({"out/bias": np.ones(3, np.float32)})
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(strategy.session.parameters["out/bias"], before[3] - 0.03, rtol=1e-5)
        model.train_on_batch(*make_data(8))  # from the job's values on
        assert np.all(model.get_weights()[3] < before[3] + 0.02)


# Several workers.


@check
def two_workers_are_one_with_the_larger_batch() -> None:
    x, y = make_data()
    peer = compile_on(None, make_model(), K.Adam(0.02, global_clipnorm=0.5))
    fit(peer, (x, y))
    with start_job(workers=2) as job:
        strategies = [hw.keras.ParameterServerStrategy(session=job.connect()) for _ in range(2)]
        models = [
            compile_on(s, make_model(seed=i + 1), K.Adam(0.02, global_clipnorm=0.5)) for i, s in enumerate(strategies)
        ]
        order = [s.session.index for s in strategies]
        assert {s.get_config()["worker"] for s in strategies} == {0, 1}
        assert strategies[0].get_config() | {"worker": 0} == {
            "backend": BACKEND, "worker": 0, "workers": 2, "servers": 1, "consistency": "bsp",
        }  # fmt: skip
        first = make_model(seed=1).get_weights()
        for model in models:
            model.set_weights(first)
        found = run_workers(
            models, strategies, lambda i: fit(models[i], (x[order[i] :: 2], y[order[i] :: 2]), batch_size=8)
        )
        assert all(isinstance(each, dict) for each in found), found
        for model in models:
            assert_same(model, peer, 1e-4)


@check
def moving_statistics_are_averaged() -> None:
    with start_job(workers=2) as job:
        strategies = [hw.keras.ParameterServerStrategy(session=job.connect()) for _ in range(2)]
        models = [compile_on(strategy, make_model(normalised=True)) for strategy in strategies]
        x, y = make_data(8)
        found = run_workers(
            models,
            strategies,
            lambda i: fit(models[i], (x + 10 * i, y), batch_size=8, epochs=1) and models[i].get_weights(),
        )
    a, b = found
    for ours, theirs in zip(a, b, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    hidden = make_model(normalised=True).get_layer("hidden")
    means = [keras.ops.convert_to_numpy(hidden(x + 10 * i)).mean(0) for i in range(2)]
    wanted = 0.1 * (means[0] + means[1]) / 2
    moving = next(w for v, w in zip(models[0].weights, a, strict=True) if v.path.endswith("norm/moving_mean"))
    np.testing.assert_allclose(moving, wanted, rtol=1e-4, atol=1e-5)


@check
def who_joins_late_goes_on_with_the_schedule() -> None:
    with start_job(workers=1) as job:
        for clock in (8, 16):
            with job.connect() as session:
                strategy = hw.keras.ParameterServerStrategy(session=session)
                model = compile_on(strategy, make_model(seed=clock), K.SGD(schedule()))
                fit(model)
                assert session.clock == clock
                assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == clock


@check
def workers_of_two_frameworks_train_one_job() -> None:
    if BACKEND == "tensorflow":
        return  # two backends of three will do: beside TensorFlow, PyTorch takes seconds to load
    import torch

    x, y = make_data()
    with start_job(workers=2) as job:
        strategy = hw.keras.ParameterServerStrategy(session=job.connect())
        model = compile_on(strategy, make_model(), K.SGD(0.05))
        session = job.connect()
        names = {v.path: torch.nn.Parameter(torch.zeros(tuple(v.shape))) for v in model.trainable_variables}
        failed: list[BaseException] = []

        def train() -> None:
            try:
                optimizer = hw.torch.Optimizer(
                    names.items(), hw.optim.SGD(lr=float(np.float32(0.05)), keras_form=True), session=session
                )
                inputs, targets = torch.from_numpy(x[::2]), torch.from_numpy(y[::2])
                for _ in range(4):
                    optimizer.zero_grad()
                    hidden = torch.tanh(inputs @ names["hidden/kernel"] + names["hidden/bias"])
                    found = hidden @ names["out/kernel"] + names["out/bias"]
                    (found - targets).square().mean().backward()
                    optimizer.step()
            except BaseException as error:  # noqa: BLE001 - told below
                failed.append(error)
            finally:
                session.close()

        peer = compile_on(None, make_model(), K.SGD(0.05))
        other = threading.Thread(target=train)
        first = model.get_weights()
        with torch.no_grad():
            for parameter, value in zip(names.values(), first, strict=True):
                parameter.copy_(torch.from_numpy(value))
        other.start()
        fit(model, (x[1::2], y[1::2]), batch_size=32, epochs=4)
        strategy.session.close()
        other.join(60)
        assert not failed, failed
    fit(peer, (x, y), batch_size=64, epochs=4)
    assert_same(model, peer, 1e-4)


# Saving.


@check
def what_is_saved_goes_on_in_keras_and_back() -> None:
    for name in ("rmsprop, all", "amsgrad"):  # with every kind of slot and a schedule
        make = OPTIMIZERS[name]
        peer = compile_on(None, make_model(), make())
        fit(peer)
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours = f"{folder}/theirs.keras", f"{folder}/ours.keras"
            peer.save(theirs)
            fit(peer)
            with open_strategy() as strategy:
                model = compile_on(strategy, make_model(), make())
                fit(model)
                model.save(ours)
            assert "headwater" not in zipfile.ZipFile(ours).read("config.json").decode()
            loaded = keras.models.load_model(ours)
            assert not isinstance(loaded.optimizer, hw.keras.Optimizer)
            fit(loaded)
            assert_same(loaded, peer, 1e-4)
            with open_strategy() as strategy, strategy.scope():
                back = keras.models.load_model(theirs)
                assert isinstance(back.optimizer, hw.keras.Optimizer)
                fit(back)
                assert_same(back, peer, 1e-4)
            with open_strategy() as strategy:
                again = keras.models.load_model(ours)
                with strategy.scope():
                    again.compile(again.optimizer, "mean_squared_error")
                fit(again)
                assert_same(again, peer, 1e-4)


@check
def checkpoints_are_written_and_weights_loaded() -> None:
    with tempfile.TemporaryDirectory() as folder, open_strategy() as strategy:
        model = compile_on(strategy, make_model(), "adam")
        fit(model, callbacks=[keras.callbacks.ModelCheckpoint(f"{folder}/{{epoch}}.keras")])
        assert sorted(path.name for path in Path(folder).iterdir()) == ["1.keras", "2.keras"]
        loaded = keras.models.load_model(f"{folder}/2.keras")
        assert_same(loaded, model, 0)
        model.save_weights(f"{folder}/all.weights.h5")
        with open_strategy() as second:
            other = compile_on(second, make_model(seed=9))
            other.load_weights(f"{folder}/all.weights.h5")
            fit(other, epochs=1, batch_size=64)
            assert_same(other, model, 0.1)


@check
def a_published_version_loads_into_a_model_of_other_numbers() -> None:
    """Layers that Keras names: the second model of a process has other numbers in its paths."""

    def make() -> keras.Model:
        layers = [
            keras.layers.Dense(5),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(3),
        ]
        return keras.Sequential([keras.Input((6,)), *layers])

    with tempfile.TemporaryDirectory() as folder, open_strategy() as strategy:
        model = compile_on(strategy, make(), "adam")
        fit(model)
        strategy.session.publish("prod", store=folder).result()
        other = make()
        with hw.subscribe(folder, "prod") as subscription:
            with subscription._changed:
                assert subscription._changed.wait_for(lambda: subscription._ready is not None, 30)
            assert subscription.apply(other) is not None
            assert_same(other, model, 0)
            wrong = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
            before = wrong.get_weights()
            with pytest.raises(errors.LayoutError, match="shape"):
                hw.keras.load_weights(wrong, subscription.versions.load("prod"))
            assert all((a == b).all() for a, b in zip(wrong.get_weights(), before, strict=True))


# Data.


@check
def portions_and_leases_feed_a_model() -> None:
    x, y = make_data(33)
    with open_strategy() as strategy:
        session = strategy.session
        model = compile_on(strategy, make_model())
        fit(model, (np.asarray(session.shard(x)), np.asarray(session.shard(y))))
        for part, whole in zip(strategy.shard(x, y), (x, y), strict=True):
            np.testing.assert_array_equal(part, whole)
        for batch in session.shard(list(zip(x, y, strict=True)), epochs=2, batch_size=8):
            model.train_on_batch(*map(np.stack, zip(*batch, strict=True)))
        assert session.clock == 6 + 10
    with (
        start_job(workers=2) as job,
        job.connect() as session,
        pytest.raises(errors.SettingError, match="at least one item"),
    ):
        hw.keras.ParameterServerStrategy(session=session).shard(x[:1])


@check
def tables_embed() -> None:
    with open_strategy() as strategy:
        table = strategy.session.table("items", 4, optimizer=hw.optim.SGD(lr=0.5), initial=hw.Uniform(0.1))
        if BACKEND == "jax":
            with pytest.raises(errors.SettingError, match="TensorFlow or PyTorch"):
                hw.keras.Embedding(table)
            return
        ids = np.array([[1, 1 << 40], [1, 7], [9, 9], [7, -3]], np.int64)
        y = np.array([[1.0], [2.0], [3.0], [4.0]], np.float32)
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((2,), dtype="int64"), hw.keras.Embedding(table), keras.layers.Flatten(), keras.layers.Dense(1)]
        )
        compile_on(strategy, model, K.SGD(0.5))
        distinct, places = np.unique(ids, return_inverse=True)
        peer = keras.Sequential(
            [
                keras.Input((2,), dtype="int64"),
                keras.layers.Embedding(5, 4),
                keras.layers.Flatten(),
                keras.layers.Dense(1),
            ]
        )
        peer.layers[0].set_weights([table.pull(distinct)])
        peer.layers[2].set_weights(model.layers[2].get_weights())
        compile_on(None, peer, K.SGD(0.5))
        assert table.stats().rows == 0
        model.predict(ids, verbose=0)
        assert table.stats().rows == 0
        for each, data in ((model, ids), (peer, places.reshape(ids.shape))):
            each.fit(data, y, batch_size=4, epochs=3, verbose=0, shuffle=False)
        np.testing.assert_allclose(table.pull(distinct), peer.layers[0].get_weights()[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            model.layers[2].get_weights()[0], peer.layers[2].get_weights()[0], rtol=1e-4, atol=1e-5
        )
        assert table.stats().rows == 5
        with pytest.raises(errors.UsageError, match=r"session\.save"):
            model.save(f"{tempfile.mkdtemp()}/never.keras")


# What is wrong.


@check
def what_servers_do_not_have_is_refused_by_name() -> None:
    wrong = {
        "Nadam": K.Nadam(),
        "weight_decay": K.RMSprop(weight_decay=0.1),
        "momentum": K.SGD(momentum=0.9, weight_decay=0.1),
        "use_ema": K.SGD(use_ema=True),
    }
    with open_strategy() as strategy:
        for word, optimizer in wrong.items():
            with pytest.raises(errors.SettingError, match=word):
                compile_on(strategy, make_model(), optimizer)
        with pytest.raises(ValueError, match="nothing"):
            compile_on(strategy, make_model(), "nothing")
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, kernel_constraint="non_neg")])
        with pytest.raises(errors.LayoutError, match=r"constraints, got NonNeg — variable '.*kernel'"):
            fit(compile_on(strategy, model))
        with pytest.raises(errors.SettingError, match="on servers already"):
            hw.keras.Optimizer(hw.keras.Optimizer("sgd", session=strategy.session))


@check
def a_scope_puts_compile_back() -> None:
    before = keras.Model.compile
    with open_strategy() as strategy:
        with pytest.raises(ValueError, match="nothing"), strategy.scope(), strategy.scope():
            make_model().compile("nothing")
        with strategy.scope():
            assert keras.Model.compile is not before
        assert keras.Model.compile is before
        model = make_model()
        model.compile("sgd", "mse")
        fit(model)
        assert not isinstance(model.optimizer, hw.keras.Optimizer)
        assert strategy.session.clock == 0


@check
def a_model_that_changed_is_refused() -> None:
    with open_strategy() as strategy:
        model = compile_on(strategy, make_model())
        fit(model)
        model.get_layer("hidden").trainable = False
        with pytest.raises(errors.LayoutError, match=r"'hidden'.*Compile again"):
            fit(model)
        compile_on(strategy, model)
        with pytest.raises(errors.LayoutError, match="one session trains one model"):
            fit(model)
    with open_strategy() as strategy:
        model = compile_on(strategy, keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)]))
        fit(model)
        model.add(keras.layers.Dense(3, name="more"))
        with pytest.raises(errors.LayoutError, match="more/kernel"):
            fit(model)


@check
def a_model_that_is_compiled_again_goes_on() -> None:
    with open_strategy() as strategy:
        model = compile_on(strategy, make_model(), K.SGD(0.1))
        fit(model)
        compile_on(strategy, model, K.SGD(0.05))
        fit(model)
        peer = compile_on(None, make_model(), K.SGD(0.1))
        fit(peer)
        compile_on(None, peer, K.SGD(0.05))
        fit(peer)
        assert_same(model, peer)
        assert strategy.session.clock == 16
        compile_on(strategy, model, "adam")
        with pytest.raises(errors.LayoutError, match="the optimizer that this session has"):
            fit(model)


@check
def workers_that_differ_are_told() -> None:
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (errors.LayoutError, "'norm/gamma'", {"normalised": True}),
        (
            errors.SettingError,
            "dtype policy of the job, float32, got float32, mixed_bfloat16",
            {"policy": "mixed_bfloat16"},
        ),
    ]
    for error, words, options in wrong:
        with start_job(workers=2) as job, job.connect() as first, job.connect() as second:
            model = compile_on(hw.keras.ParameterServerStrategy(session=first), make_model())
            model.optimizer.register(model.trainable_variables)
            model = compile_on(hw.keras.ParameterServerStrategy(session=second), make_model(**options))
            with pytest.raises(error, match=words):
                fit(model)


@check
def a_step_compiled_elsewhere_is_refused() -> None:
    with hw.connect() as session:
        optimizer, variables = hw.keras.Optimizer("sgd", session=session), make_variables()
        with pytest.raises(errors.UsageError, match="register"):
            optimizer.apply([keras.ops.ones(v.shape) for v in variables], variables)
        optimizer.register(variables)
        if BACKEND == "tensorflow":
            import tensorflow as tf

            with pytest.raises(errors.UsageError, match="compiled elsewhere"):
                tf.function(
                    lambda: optimizer.apply([tf.ones(v.shape) for v in variables], variables), autograph=False
                )()
        elif BACKEND == "jax":
            import jax

            state = [v.value for v in optimizer.variables], [v.value for v in variables], [v.value for v in variables]
            with pytest.raises(errors.UsageError, match="compiled elsewhere"):
                jax.jit(optimizer.stateless_apply)(*state)


@check
def example_learns_the_line_alone() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_path(str(Path(__file__).parent.parent / "examples" / "keras_linear.py"))
    assert said.getvalue() == (
        f"{{'backend': '{BACKEND}', 'worker': 0, 'workers': 1, 'servers': 1, 'consistency': 'bsp'}}\ny = 2.00x + 1.00\n"
    )


def main(names: Sequence[str]) -> None:
    for each in CHECKS:
        if names and each.__name__ not in names:
            continue
        keras.utils.clear_session()
        start = time.perf_counter()
        try:
            each()
            said = ""
        except BaseException:  # noqa: BLE001 - the test shows it
            said = traceback.format_exc()
        sys.stdout.write(
            json.dumps({"check": each.__name__, "said": said, "s": round(time.perf_counter() - start, 2)}) + "\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
