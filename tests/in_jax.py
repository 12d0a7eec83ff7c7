"""hw.jax.Optimizer does what Optax does, with its state on the servers. Run by test_jax.py in a process that may have JAX in it."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jobs import Array, start_job

import headwater as hw
from headwater import errors

Tree = Any


@pytest.fixture
def session() -> Iterator[hw.Session]:
    with hw.connect() as found:
        yield found


def make_params(dtype: Any = jnp.float32) -> Tree:
    keys = jax.random.split(jax.random.key(0), 2)
    shapes = ((6, 8), (8, 3))
    return [
        {"kernel": jax.random.normal(key, shape, dtype) / 2, "bias": jnp.zeros(shape[1], dtype)}
        for key, shape in zip(keys, shapes, strict=True)
    ]


def loss(params: Tree, x: Array, y: Array) -> jax.Array:
    hidden = jnp.tanh(x @ params[0]["kernel"] + params[0]["bias"])
    return jnp.square(hidden @ params[1]["kernel"] + params[1]["bias"] - y).mean()


value_and_gradients = jax.jit(jax.value_and_grad(loss))


def batches(count: int, dtype: Any = np.float32) -> list[tuple[Array, Array]]:
    numbers = np.random.default_rng(1).standard_normal((count, 2, 12, 6)).astype(dtype)
    return [(pair[0], pair[1, :, :3]) for pair in numbers]


def fit_with_optax(params: Tree, transformation: Any, data: list[tuple[Array, Array]]) -> Tree:
    state = transformation.init(params)
    for batch in data:
        updates, state = transformation.update(value_and_gradients(params, *batch)[1], state, params)
        params = optax.apply_updates(params, updates)
    return params


def fit(optimizer: hw.jax.Optimizer, data: list[tuple[Array, Array]]) -> Tree:
    for batch in data:
        optimizer.step(value_and_gradients(optimizer.params, *batch)[1])
    return optimizer.params


def assert_close(ours: Tree, theirs: Tree, tolerance: float = 2e-6) -> None:
    for a, b in zip(jax.tree_util.tree_leaves(ours), jax.tree_util.tree_leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=0, atol=tolerance)


def same(ours: Tree, theirs: Tree) -> bool:
    return bool(jax.tree_util.tree_all(jax.tree_util.tree_map(lambda a, b: bool((a == b).all()), ours, theirs)))


@pytest.mark.parametrize(
    ("settings", "transformation"),
    [
        (hw.optim.SGD(lr=0.1), optax.sgd(0.1)),
        (hw.optim.SGD(lr=0.1, momentum=0.9, nesterov=True), optax.sgd(0.1, 0.9, nesterov=True)),
        (hw.optim.Adam(lr=0.01), optax.adam(0.01)),
        (hw.optim.AdamW(lr=0.01, weight_decay=0.1), optax.adamw(0.01, weight_decay=0.1)),
        (
            hw.optim.AdamW(lr=0.01, weight_decay=0.1, clip_norm=0.1),
            optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01, weight_decay=0.1)),
        ),
    ],
    ids=["sgd", "nesterov", "adam", "adamw", "clipped"],
)
def test_it_equals_optax(session: hw.Session, settings: Any, transformation: Any) -> None:
    optimizer = hw.jax.Optimizer(make_params(), settings, session=session)
    assert_close(fit(optimizer, batches(20)), fit_with_optax(make_params(), transformation, batches(20)), 1e-5)


@pytest.mark.parametrize("where", ["server", "worker"])
@pytest.mark.parametrize("servers", [1, 2])
def test_two_workers_equal_one_with_the_double_batch(where: str, servers: int) -> None:
    chained = optax.chain(optax.clip_by_global_norm(0.5), optax.lion(0.01))

    def body(session: hw.Session) -> Tree:
        settings: Any = chained if where == "worker" else hw.optim.AdamW(lr=0.01)
        mine = slice(session.index, None, 2)
        optimizer = hw.jax.Optimizer(make_params(), settings, session=session, where=where)
        return fit(optimizer, [(x[mine], y[mine]) for x, y in batches(10)])

    with start_job(workers=2, servers=servers) as job:
        ours, theirs = job.run(body)
    assert same(ours, theirs)
    alone = fit_with_optax(
        make_params(), chained if where == "worker" else optax.adamw(0.01, weight_decay=0.01), batches(10)
    )
    assert_close(ours, alone, 1e-5)


def test_bfloat16_leaves_have_float32_masters(session: hw.Session) -> None:
    """Equal to a float32 model whose copy in bfloat16 computes the gradients; float16 beside it."""
    params = make_params(jnp.bfloat16)
    params[1] = jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.float16), params[1])
    dtypes = jax.tree_util.tree_map(lambda leaf: leaf.dtype, params)
    masters = jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.float32), params)
    optimizer = hw.jax.Optimizer(params, hw.optim.Adam(lr=0.003), session=session)
    transformation = optax.adam(0.003)
    state = transformation.init(masters)
    for batch in batches(10):
        _, gradients = value_and_gradients(params, *batch)
        updates, state = transformation.update(
            jax.tree_util.tree_map(lambda g: g.astype(jnp.float32), gradients), state
        )
        masters = optax.apply_updates(masters, updates)
        params = jax.tree_util.tree_map(lambda leaf, dtype: leaf.astype(dtype), masters, dtypes)
        assert_close(optimizer.step(gradients), params, 0.02)
    planes, _ = session.read_optimizer()
    assert planes["master"]["0.kernel"].dtype == np.float32
    np.testing.assert_allclose(planes["master"]["0.kernel"], masters[0]["kernel"], atol=1e-3)


def test_a_rate_may_change_by_the_step(session: hw.Session) -> None:
    schedule = optax.exponential_decay(0.1, 1, 0.5)
    optimizer = hw.jax.Optimizer(make_params(), hw.optim.SGD(lr=9.0), session=session)
    for step, batch in enumerate(batches(4)):
        optimizer.step(value_and_gradients(optimizer.params, *batch)[1], scalars={"lr": schedule(step)})
    assert_close(optimizer.params, fit_with_optax(make_params(), optax.sgd(schedule), batches(4)))


@pytest.mark.parametrize("consistency", [hw.bsp(), hw.asp()], ids=str)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_arrays_that_were_pulled_never_change(consistency: hw.Consistency, transport: str) -> None:
    """JAX relies on it; and so may who keeps old parameters, or a computation that is still running."""
    with start_job(consistency=consistency, transport=transport) as job, job.connect() as session:
        optimizer = hw.jax.Optimizer(make_params(), hw.optim.SGD(lr=0.5), session=session)
        kept, copies = [optimizer.params], [jax.tree_util.tree_map(np.array, optimizer.params)]
        for batch in batches(5):
            kept.append(optimizer.step(value_and_gradients(kept[-1], *batch)[1]))
            copies.append(jax.tree_util.tree_map(np.array, kept[-1]))
        session.pull()
        assert all(same(now, then) for now, then in zip(kept, copies, strict=True))
        assert not same(kept[0], kept[-1])


class Layer(NamedTuple):
    kernel: Any
    scale: Any


@jax.tree_util.register_pytree_with_keys_class
class Plain:
    """A node whose children have no names of their own kind."""

    def __init__(self, child: Any) -> None:
        self.child = child

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        return ((jax.tree_util.FlattenedIndexKey(7), self.child),), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Plain:
        return cls(*children)


def test_names_are_paths(session: hw.Session) -> None:
    tree = {"b": [Layer(jnp.ones(2), np.ones(()))], "a": {3: jnp.ones(1)}, "none": None, "plain": Plain(jnp.ones(1))}
    optimizer = hw.jax.Optimizer(tree, hw.optim.SGD(lr=0.5), session=session)
    assert list(session.parameters) == ["a.3", "b.0.kernel", "b.0.scale", "plain.7"]
    assert optimizer.step(tree)["b"][0].scale == 0.5
    with hw.connect() as other:
        hw.jax.Optimizer(jnp.ones(3), hw.optim.SGD(lr=0.5), session=other)
        assert list(other.parameters) == ["params"]


def test_what_is_not_trained_is_averaged() -> None:
    """Constants are left out: the mean of three equal values may be another one, and infinity would be refused."""
    constant = jnp.array([-jnp.inf, 1 / 3], jnp.bfloat16)

    def body(session: hw.Session) -> Tree:
        statistics = {"mean": jnp.zeros(2), "constant": constant}
        optimizer = hw.jax.Optimizer(jnp.ones(2), hw.optim.SGD(lr=0.5), averaged=statistics, session=session)
        found = [optimizer.averaged]
        for step in range(3):
            own = optimizer.averaged | {"mean": optimizer.averaged["mean"] + 2.0**session.index}
            optimizer.step(jnp.ones(2), averaged=None if step == 1 else own)
            found.append(optimizer.averaged)
        optimizer.step(jnp.ones(2), weight=0.0, averaged=own | {"mean": own["mean"] * jnp.nan})
        return [*found, optimizer.averaged]

    with start_job(workers=3) as job:
        for found in job.run(body):
            assert all(same(tree["constant"], constant) for tree in found)
            np.testing.assert_allclose(
                [tree["mean"][0] for tree in found], [0, 7 / 3, 7 / 3, 14 / 3, 14 / 3], rtol=1e-6
            )


def test_rows_of_a_table_are_pulled_before_the_step_and_their_gradients_pushed(session: hw.Session) -> None:
    ids = np.array([[5, 9], [5, 7]])
    table = session.table("items", 3, optimizer=hw.optim.SGD(lr=0.5), initial=hw.Constant(1.0))
    optimizer = hw.jax.Optimizer(jnp.ones(3), hw.optim.SGD(lr=0.5), session=session)
    step = jax.jit(jax.value_and_grad(lambda params, rows: (rows @ params).sum(), argnums=(0, 1)))
    _, (gradient, row_gradients) = step(optimizer.params, table.pull(ids))
    table.push(ids, row_gradients)
    optimizer.step(gradient)
    assert optimizer.params.tolist() == [-1.0] * 3
    assert table.pull([5, 7, 9, 11])[:, 0].tolist() == [0.0, 0.5, 0.5, 1.0]


def test_the_readmes_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = re.findall(r"## JAX\n.*?```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    runpy.run_path(str(tmp_path / "example.py"))["session"].close()
    assert float(re.findall(r"loss ([\d.]+)", capsys.readouterr().out)[0]) < 0.1


# Bad input.


def test_a_gradient_that_is_not_finite_counts_nowhere(session: hw.Session) -> None:
    optimizer = hw.jax.Optimizer(make_params(), hw.optim.Adam(lr=0.01), session=session)
    before = optimizer.params
    gradients = jax.tree_util.tree_map(jnp.ones_like, before)
    gradients[1]["bias"] = gradients[1]["bias"].at[2].set(jnp.nan)
    with pytest.raises(errors.NonFiniteError, match=r"in '1.bias' \(3,\) at element 2"):
        optimizer.step(gradients)
    assert same(optimizer.params, before)
    assert session.clock == 1


def at_step(act: Callable[[hw.jax.Optimizer], Any]) -> Callable[[hw.Session], Any]:
    return lambda session: act(hw.jax.Optimizer(make_params(), hw.optim.SGD(lr=0.1), session=session))


def in_jit(optimizer: hw.jax.Optimizer) -> Any:
    return jax.jit(optimizer.step)(optimizer.params)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (at_step(lambda o: o.step(o.params[:1])), "LayoutError", "a tree like params, PyTreeDef.* got another: PyTreeDef"),
        (at_step(lambda o: o.step([o.params[0], {}])), "LayoutError", "got another: PyTreeDef"),
        (
            at_step(lambda o: o.step(jax.tree_util.tree_map(lambda p: p.astype(jnp.bfloat16), o.params))),
            "LayoutError",
            r"a gradient of float32 \(8,\), got bfloat16 \(8,\) — tensor '0.bias', push 0",
        ),
        (at_step(lambda o: o.step(jax.tree_util.tree_map(jnp.transpose, o.params))), "LayoutError", r"\(6, 8\), got float32 \(8, 6\)"),
        (at_step(lambda o: o.step(o.params, averaged=[jnp.ones(1)])), "LayoutError", "a tree like averaged, .* got another"),
        (at_step(lambda o: o.step(o.params, scalars={"rate": 1.0})), "SettingError", "lr, momentum, dampening"),
        (at_step(in_jit), "UsageError", "arrays, got tracers: call it outside of jit"),
        (
            lambda s: hw.jax.Optimizer(make_params(), optax.adam(0.1), session=s),
            "SettingError",
            "settings from headwater.optim, got GradientTransformation.*: servers cannot see .* Take hw.optim.AdamW .* or where='worker'",
        ),
        (
            lambda s: hw.jax.Optimizer(make_params(), hw.optim.SGD(), session=s, where="worker"),
            "SettingError",
            "an Optax transformation for where='worker', got settings",
        ),
        (lambda s: hw.jax.Optimizer([], hw.optim.SGD(), session=s, where="there"), "SettingError", "got 'there'"),
        (lambda s: hw.jax.Optimizer([], hw.optim.SGD(), session=s), "LayoutError", "at least one tensor"),
        (lambda s: hw.jax.Optimizer([jnp.arange(3)], hw.optim.SGD(), session=s), "LayoutError", "float16, got int32 — tensor '0'"),
        (
            lambda s: hw.jax.Optimizer({"a": jnp.ones(1)}, hw.optim.SGD(), averaged={"a": jnp.ones(1)}, session=s),
            "LayoutError",
            "a name of its own for each leaf, got 'a' twice",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_and_nothing_is_pushed(
    session: hw.Session, act: Any, error: str, message: str
) -> None:
    with pytest.raises(getattr(errors, error), match=message):
        act(session)
    assert session.clock == 0
