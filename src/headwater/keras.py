"""The Keras side: parameter servers for `model.fit`, with Keras 3 on TensorFlow, JAX or PyTorch.

    strategy = hw.keras.ParameterServerStrategy()
    with strategy.scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile(optimizer="sgd", loss="mean_squared_error")
    model.fit(dataset, epochs=10)

A variable's name in the job is its `path`, such as "dense/kernel", and follows from the names of layers and of a Sequential model;
its layout is Keras's. While `fit` runs, variables lie in the session's memory, so a push copies only gradients and, on one machine, a
pull copies nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import numpy as np

from headwater import optim
from headwater._connect import connect_session
from headwater._errors import LayoutError, SettingError, UsageError
from headwater._layout import AVERAGED, TensorSpec
from headwater._plan import pack_absent
from headwater._sealed import natural
from headwater._session import Session, Start
from headwater._versions import Weights, as_float, check_nothing_left

try:
    import keras
except ImportError as error:
    raise SettingError(
        f"Expected Keras 3 and the backend that KERAS_BACKEND names, got: {error}: pip install 'headwater[keras]' and one of "
        "tensorflow-cpu, jax or torch."
    ) from error

from headwater._keras_embedding import Embedding
from headwater._keras_steps import BACKEND, Read, Steps, Write, assign, is_traced, read, to_numpy, to_tensor, uncompiled

__all__ = ["Embedding", "Optimizer", "ParameterServerStrategy", "load_weights"]

_DTYPES = ("float32", "float64", "bfloat16", "float16")
_KEY = "keras"  # in the job's dictionary: the dtype policy, and the count of iterations with which the job began

#: Our slot → where optimizers of Keras's keep it; SGD has a name of its own.
_SLOTS = {
    "momentum_buffer": "_momentums",
    "sum": "_accumulators",
    "square_avg": "_velocities",
    "grad_avg": "_average_gradients",
    "exp_avg": "_momentums",
    "exp_avg_sq": "_velocities",
    "max_exp_avg_sq": "_velocity_hats",
}
_NUMBERED = re.compile(r"_\d+(?=/|$)")  # what Keras gives to the second of a class, and so on
_KINDS = tuple(getattr(keras.optimizers, name) for name in ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW"))


class ParameterServerStrategy:
    """Trains Keras models against the job's servers; used as `tf.distribute.ParameterServerStrategy` is.

    Every worker runs the same script, from building the model to `fit`, on data of its own; one model to a job. All workers' gradients
    count alike, whatever their batches. session: default a new one from `headwater.connect()`.
    """

    def __init__(self, *, session: Session | None = None) -> None:
        self.session = connect_session() if session is None else session

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Within the block `compile` gives the model's optimizer to the servers."""
        # Where it is defined: a model whose own class had another would not be compiled as it is loaded.
        owner = next(kind for kind in keras.Model.__mro__ if "compile" in vars(kind))
        original, session = owner.compile, self.session

        @wraps(original)
        def compile_for_servers(model: keras.Model, optimizer: Any = "rmsprop", *args: Any, **kwargs: Any) -> None:
            optimizer = keras.optimizers.get(optimizer)
            inner = _inner(optimizer)
            if inner is not None and not isinstance(inner, Optimizer):
                Optimizer(inner, session=session)
            original(model, optimizer, *args, **kwargs)

        owner.compile = compile_for_servers
        try:
            yield
        finally:
            owner.compile = original

    def shard(self, *arrays: Any) -> tuple[Any, ...]:
        """Return this worker's part of each: items index, index + workers, …

        arrays: with `len()` and slices. Raises SettingError where one has fewer items than there are workers. A `tf.data.Dataset` has
        a `shard` of its own.
        """
        for array in arrays:
            self.session.shard(array)  # which checks it
        return tuple(array[self.session.index :: self.session.workers] for array in arrays)

    def get_config(self) -> dict[str, Any]:
        """Return the job's settings, as this worker sees them."""
        session = self.session
        return {
            "backend": BACKEND,
            "worker": session.index,
            "workers": session.workers,
            "servers": session.servers,
            "consistency": str(session.consistency),
        }


class Optimizer(keras.optimizers.Optimizer):  # type: ignore[misc]  # Keras has no types
    """A Keras optimizer whose state lies on the job's servers.

    optimizer: "sgd", "adagrad", "rmsprop", "adam", "adamw" or an object of Keras's. That object itself becomes ours, so that whoever
    holds it still changes its learning rate; its state, if it has any, is what the job begins with. session: default a new one from
    `headwater.connect()`. Raises SettingError for an optimizer or an option that the servers do not have.

    Variables come under the job's care with the first step of `fit` or `train_on_batch`; a loop of one's own says `register` before,
    and calls `apply` where nothing is compiled. A step raises NonFiniteError where the gradient was refused; the job goes on, and
    so may the caller.
    """

    link: Link
    built: bool

    def __new__(cls, optimizer: Any, *, session: Session | None = None) -> Optimizer:
        """Return Keras's own object, made one of ours."""
        found = keras.optimizers.get(optimizer)
        if isinstance(found, Optimizer):
            raise SettingError("Expected an optimizer of Keras's, got one that is on servers already.")
        _settings_of(found)  # before it is changed
        own = type(found)
        object.__setattr__(found, "__class__", type(own.__name__, (cls, own), {}))
        return found  # type: ignore[no-any-return]

    def __init__(self, optimizer: Any, *, session: Session | None = None) -> None:
        self.link = Link(connect_session() if session is None else session, _settings_of(self))
        if self.built:
            self.link.start = _read_slots(self, self.link.settings)
            for variable in self.variables:
                if variable is not self._iterations and variable is not self._learning_rate:
                    self._untrack_variable(variable)
            self.built = False
        _hook_models()

    @property  # type: ignore[misc]  # isinstance() and serialization ask for it
    def __class__(self) -> Any:
        """Keras's own: it is what a saved model names, which therefore loads without Headwater."""
        return _kind_of(self)

    def build(self, variables: Sequence[Any]) -> None:
        """Make what a step needs here; the state is made on the servers."""
        if self.built:
            return
        keras.optimizers.Optimizer.build(self, variables)
        link, link.variables = self.link, list(variables)
        if BACKEND != "torch":
            link.outbox = [self.add_variable_from_reference(v, name="outbox") for v in variables]
            link.mark = self.add_variable((len(variables),), dtype="int32", name="mark")
            link.rate = self.add_variable((), dtype="float32", name="rate")

    def register(self, variables: Sequence[Any]) -> None:
        """Put variables under the job's care; they take the job's values. `fit` does it by itself."""
        if BACKEND == "jax" and self.gradient_accumulation_steps:
            raise SettingError(
                "Expected no gradient_accumulation_steps in a loop of one's own on JAX, where Keras makes each step and takes it back: "
                "gather gradients in the loop, or use fit()."
            )
        self.build(variables)
        self.link.begin(self, read, assign, policy=keras.config.dtype_policy().name)
        self.link.bind(assign)

    @uncompiled  # type: ignore[untyped-decorator]
    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        link = self.link
        gradients = {self._get_variable_index(v): g for v, g in zip(trainable_variables, grads, strict=True)}
        if BACKEND != "torch" and (link.is_stepping or any(is_traced(gradient) for gradient in grads)):
            link.put(gradients, learning_rate)
            return
        rate = float(keras.ops.convert_to_numpy(learning_rate))
        link.exchange({i: to_numpy(gradient) for i, gradient in gradients.items()}, rate, read, assign)

    def _clip_gradients(self, grads: Any) -> Any:
        """Leave the global norm to the servers, who see the mean of all workers' gradients; other limits are each worker's own."""
        return grads if self.global_clipnorm else super()._clip_gradients(grads)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Leave it to the servers."""

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """End a fit: variables get memory of their own, and keep their values whatever others push."""
        self.link.release()

    def save_own_variables(self, store: Any) -> None:
        """Save as Keras's own optimizer does; the state is fetched from the servers."""
        twin, link = self._twin(), self.link
        _write_slots(twin, link.settings, link.read_slots() if link.is_registered else link.start or {})
        twin.save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Take what Keras's own optimizer has saved, for the job to begin with. Raises UsageError after the first step."""
        if self.link.is_registered:
            raise UsageError("Expected saved state before the first step, got it later: load it in a new job.")
        twin = self._twin()
        twin.load_own_variables(store)
        for ours, theirs in ((self._iterations, twin._iterations), (self._learning_rate, twin._learning_rate)):
            if isinstance(ours, keras.Variable):
                ours.assign(theirs)
        self.link.start = _read_slots(twin, self.link.settings)

    def _twin(self) -> keras.optimizers.Optimizer:
        """Return Keras's own optimizer with these settings, variables and counts."""
        twin = _kind_of(self).from_config(self.get_config())
        twin.build(self.link.variables)
        twin._iterations.assign(self._iterations)
        return twin


class Link:
    """What an optimizer knows of the servers: the session, the variables, and what a compiled step leaves for them."""

    def __init__(self, session: Session, settings: optim.AnyOptimizer) -> None:
        self.session, self.settings = session, settings
        self.variables: list[Any] = []
        self.outbox: list[Any] = []  # the gradients
        self.mark: Any = None  # int32, by variable: how often its gradient was put there
        self.rate: Any = None  # the learning rate
        self.start: dict[str, list[np.ndarray]] | None = None  # slots, by variable, that the job is to begin with
        self.is_registered = False
        self.is_stepping = False  # within Keras's train function
        self._names: dict[int, str] = {}  # by variable; one without elements has none
        self._averaged: dict[str, Any] = {}  # variables that layers update as they are trained
        self._decays: list[float] = []  # by parameter group
        self._side = -1  # where the variables lie
        self._held: dict[str, np.ndarray] = {}  # and that side's arrays
        self._first = 0  # iterations when the job began
        self._gathered = 1  # iterations that make a step
        self._seen = 0  # iterations after the last one
        self._has_stepped = False

    # Registration.

    def check(self, model: keras.Model) -> None:
        """Raise LayoutError where a model is not what it was."""
        known = getattr(model, "_compiled_trainable_state", {})
        changed = [
            layer.name for layer in model._flatten_layers() if known.get(layer, layer.trainable) != layer.trainable
        ]
        if changed:
            raise LayoutError(
                f"Expected `trainable` as it was at compile(), got it changed: layer {changed[0]!r}. Compile again before the "
                "first step; later, start another job."
            )
        variables = model.trainable_variables
        if self.is_registered and [id(v) for v in variables] != [id(v) for v in self.variables]:
            odd = next((v.path for v in variables if all(v is not known for known in self.variables)), "one less")
            raise LayoutError(
                f"Expected the variables that the job has, got another model: {odd}. Start another job for it."
            )

    def begin(
        self, optimizer: Optimizer, read: Read, write: Write, *, policy: str, averaged: Sequence[Any] = ()
    ) -> None:
        """Before the first step of a fit: put variables under the job's care. averaged: others that training changes."""
        if not self.is_registered:
            self._register(optimizer, read, policy, averaged)
        self._align(optimizer, write, int(read(optimizer._iterations)))

    def _register(self, optimizer: Optimizer, read: Read, policy: str, averaged: Sequence[Any]) -> None:
        kept = {i: v for i, v in enumerate(self.variables) if 0 not in tuple(v.shape)}
        decays = [optimizer._use_weight_decay(v) for v in kept.values()]
        groups = sorted(set(decays), reverse=True)
        specs = [_spec(v, groups.index(d)) for v, d in zip(kept.values(), decays, strict=True)]
        self._names = {i: spec.name for i, spec in zip(kept, specs, strict=True)}
        self._averaged = {v.path: v for v in averaged}
        specs += [_spec(v, AVERAGED) for v in averaged]
        self._gathered = optimizer.gradient_accumulation_steps or 1
        self._first = int(read(optimizer._iterations))
        job = {"policy": policy, "iterations": self._first}
        known = self.session.registered
        if known is None:
            unused = {name: np.zeros(variable.shape, np.float32) for name, variable in self._averaged.items()}
            slots = {
                slot: {name: held[i] for i, name in self._names.items()} | unused
                for slot, held in (self.start or {}).items()
            }
            steps = (self._first // self._gathered,) * len(specs)
            values = {name: read(kept[i]) for i, name in self._names.items()}
            values |= {name: read(variable) for name, variable in self._averaged.items()}
            self.session.register_specs(specs, values, self.settings, start=Start(slots, steps, {_KEY: job}))
        elif known[0] != tuple(specs) or known[1].structure() != self.settings.structure():
            raise LayoutError(
                "Expected the model and the optimizer that this session has, got others: one session trains one model. Start "
                "another job, or give the strategy another session."
            )
        job = self.session.state.get(_KEY, job)
        if job["policy"] != policy:
            raise SettingError(
                f"Expected the dtype policy of the job, {job['policy']}, got {policy}: give all workers the same."
            )
        self._first = job["iterations"]
        decay = getattr(self.settings, "weight_decay", 0.0)
        self._decays = [decay if decays_here else 0.0 for decays_here in groups]
        self.is_registered, self.start = True, None

    # A step.

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around Keras's train function, which `finish` follows."""
        self.is_stepping = True
        try:
            yield
        finally:
            self.is_stepping = False

    def put(self, gradients: Mapping[int, Any], rate: Any) -> None:
        """In a train function, as it is compiled or without that: leave gradients, by variable, for `finish`."""
        if not self.is_stepping:
            raise UsageError(
                "Expected fit() or train_on_batch(), or apply() where nothing is compiled, got a step compiled elsewhere."
            )
        for i, gradient in gradients.items():
            self.outbox[i].assign(keras.ops.convert_to_tensor(gradient))
        self.mark.assign(self.mark + np.array([i in gradients for i in range(len(self.variables))], np.int32))
        self.rate.assign(rate)

    def finish(self, optimizer: Optimizer, read: Read, write: Write) -> None:
        """After a step: push what it has left. One that has nothing, since the loss scale overflowed, only closes the clock."""
        before, self._seen = self._seen, int(read(optimizer._iterations))
        has_stepped, self._has_stepped = self._has_stepped, False
        mark = np.zeros(1) if self.mark is None else read(self.mark)
        if mark.any():
            self._clear(write)
            if mark.max() > 1:
                raise UsageError("Expected one step of the optimizer in a train_step, got several.")
            self.exchange(
                {i: read(self.outbox[i]) for i in np.flatnonzero(mark).tolist()}, float(read(self.rate)), read, write
            )
        elif not has_stepped:
            if self._seen != before:  # gradients are still gathered
                return
            self.exchange(None, self.settings.scalars()["lr"], read, write)
        self._has_stepped = False
        self._align(optimizer, write, self._seen)

    def _clear(self, write: Write) -> None:
        write(self.mark, keras.ops.zeros(len(self.variables), "int32"))

    def undo(self, optimizer: Optimizer) -> None:
        """The data ended within a step of TensorFlow: what of it does not depend on the data may have been done."""
        self._clear(assign)
        assign(optimizer._iterations, keras.ops.convert_to_tensor(self._seen, optimizer._iterations.dtype))

    def exchange(self, gradients: Mapping[int, np.ndarray] | None, rate: float, read: Read, write: Write) -> None:
        """Push gradients, by variable, wait, and pull; None: only close the clock. Raises NonFiniteError where it was refused."""
        if not self.is_registered:
            raise UsageError("Expected registered variables, got none: call register() before the first step.")
        self._has_stepped = True
        absent = b"" if gradients is None else self._copy_in(gradients, read)
        weight = 0.0 if gradients is None else 1.0
        self.session.push_sealed(weight=weight, scalars=self._scalars(rate), absent=absent, pull=True)
        try:
            self.session.wait()
        finally:
            self._side = -1
            self.bind(write)

    def _copy_in(self, gradients: Mapping[int, np.ndarray], read: Read) -> bytes:
        """Copy what there is to push into the push buffer; returns the bits of what is missing."""
        views, held = self.session.gradients, self.session.parameters
        found: dict[str, np.ndarray | None] = {name: gradients.get(i) for i, name in self._names.items()}
        for name, variable in self._averaged.items():
            value = read(variable)
            found[name] = None if np.array_equal(value, held[name]) else value
        for name, pushed in found.items():
            if pushed is not None:
                np.copyto(views[name], pushed)
        return pack_absent([pushed is None for pushed in found.values()])

    def _scalars(self, rate: float) -> list[tuple[float, ...]]:
        """Return what travels with a push, by parameter group."""
        fixed = self.settings.scalars()
        return [
            tuple({**fixed, "lr": rate, "weight_decay": decay}[name] for name in self.settings.scalar_names)
            for decay in self._decays
        ]

    def _align(self, optimizer: Optimizer, write: Write, iterations: int) -> None:
        """Let iterations follow the clock, so that schedules agree: for one who joins late, or whose step was skipped."""
        self._seen = self._first + self.session.clock * self._gathered
        if self._seen != iterations:
            write(optimizer._iterations, keras.ops.convert_to_tensor(self._seen, optimizer._iterations.dtype))

    def bind(self, write: Write) -> None:
        """Let variables be the session's memory, on its current side; what is averaged is a copy, since layers write into it."""
        if self._side == self.session.side:
            return
        self._side = self.session.side
        self._held = held = self.session.parameters
        for i, name in self._names.items():
            write(self.variables[i], to_tensor(held[name], self.variables[i].dtype))
        for name, variable in self._averaged.items():
            write(variable, to_tensor(held[name], variable.dtype, copy=True))

    def release(self) -> None:
        """Give variables memory of their own, until the next step."""
        if self._side >= 0:  # else a fit has failed before its first step, which is the error to be told
            self._side = -1
            for i, name in self._names.items():
                assign(self.variables[i], to_tensor(self._held[name], self.variables[i].dtype, copy=True))

    def read_slots(self) -> dict[str, list[np.ndarray]]:
        """Fetch the optimizer's state from the servers: slot → an array for each variable."""
        planes, _ = self.session.read_optimizer()
        empty = [np.zeros(v.shape, np.float32) for v in self.variables]
        return {
            slot: [planes[slot].get(self._names.get(i, ""), empty[i]) for i in range(len(empty))]
            for slot in self.settings.slots
        }


@cache
def _hook_models() -> None:
    """Let every model look, as it makes its train function, whether its optimizer is one of ours. Inert for all others."""
    original = keras.Model.make_train_function

    @wraps(original)
    def make_train_function(model: keras.Model, force: bool = False) -> None:
        original(model, force)
        optimizer = _inner(model.optimizer)
        if isinstance(optimizer, Optimizer):
            optimizer.link.check(model)
            if not isinstance(model.train_function, Steps):
                model.train_function = Steps(model, optimizer, model.train_function)
            model.train_function.is_fresh = True

    keras.Model.make_train_function = make_train_function


def _inner(optimizer: Any) -> Any:
    """Return what a loss scale is wrapped around, or the optimizer itself."""
    return optimizer.inner_optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else optimizer


def _kind_of(optimizer: Any) -> Any:
    """Return the class of Keras's that an optimizer is, whatever the backend makes of it."""
    own = [kind for kind in type(optimizer).__mro__ if not kind.__module__.startswith("keras.src.backend.")]
    return next(kind for kind in own if kind.__module__ != __name__)


def _settings_of(optimizer: Any) -> optim.AnyOptimizer:
    """Return the servers' settings for an optimizer of Keras's. Raises SettingError naming what cannot be mapped."""
    kind = _kind_of(optimizer)
    if kind not in _KINDS:
        known = ", ".join(k.__name__ for k in _KINDS)
        raise SettingError(
            f"Expected one of keras.optimizers' {known}, got {kind.__name__}: the servers have no other."
        )
    decay = optimizer.weight_decay or 0.0
    is_adam = kind in (keras.optimizers.Adam, keras.optimizers.AdamW)
    if decay and not is_adam and (kind is not keras.optimizers.SGD or optimizer.momentum):
        raise SettingError(
            f"Expected weight_decay with Adam, AdamW, or SGD without momentum, got {decay} with {kind.__name__}: leave it out."
        )
    if optimizer.use_ema:
        raise SettingError(
            "Expected an optimizer without use_ema, got use_ema=True: the servers keep no average. Leave it out."
        )
    options: dict[str, Any] = {
        "lr": float(keras.ops.convert_to_numpy(optimizer.learning_rate)),
        "clip_norm": optimizer.global_clipnorm or None,
    }
    if kind is keras.optimizers.Adagrad:  # eps stands within the root, so it can as well be there from the start
        return optim.Adagrad(
            initial_accumulator_value=optimizer.initial_accumulator_value + optimizer.epsilon, eps=0.0, **options
        )
    if is_adam:
        betas = (optimizer.beta_1, optimizer.beta_2)
        made = optim.AdamW if decay else optim.Adam
        return made(
            betas=betas,
            eps=optimizer.epsilon,
            amsgrad=optimizer.amsgrad,
            weight_decay=decay,
            keras_form=True,
            **options,
        )
    options |= {"momentum": optimizer.momentum, "keras_form": True}
    if kind is keras.optimizers.RMSprop:
        return optim.RMSprop(alpha=optimizer.rho, eps=optimizer.epsilon, centered=optimizer.centered, **options)
    return optim.SGD(nesterov=optimizer.nesterov and optimizer.momentum > 0, weight_decay=decay, **options)


def load_weights(model: keras.Model, weights: Weights) -> None:
    """Let a model have the weights of a version, between two of its calls.

    Names are the variables' paths, apart from the numbers that Keras gives to layers and models of one class in the order in which
    they are made. Values take the model's dtypes; integers, such as the state of a random generator, may be missing.
    Raises LayoutError naming the first variable that does not fit; the model is then as it was.
    """
    version, ready = weights.version, []
    names = _aligned([variable.path for variable in model.variables], weights.tensors)
    for variable in model.variables:
        name, shape = names.get(variable.path, variable.path), tuple(variable.shape)
        array = weights.tensors.get(name)
        is_float = keras.backend.is_float_dtype(variable.dtype)
        if array is None and not is_float:
            continue
        if array is None or array.shape != shape:
            got = "none" if array is None else f"one of shape {array.shape}"
            raise LayoutError(f"Expected {variable.path!r} of shape {shape}, got {got} in version {version.id}.")
        ready.append((variable, as_float(array, version.dtypes[name]) if is_float else array))
    check_nothing_left(weights, weights.tensors.keys() - set(names.values()))
    for variable, value in ready:
        variable.assign(value)


def _aligned(paths: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """Return for each path the name that stands for it: the n-th of those that are alike but for Keras's numbers."""
    found = {}
    alike: dict[str, list[str]] = {}
    for name in sorted(names, key=natural):
        alike.setdefault(_NUMBERED.sub("", name), []).append(name)
    counts = Counter[str]()
    for path in sorted(paths, key=natural):
        plain = _NUMBERED.sub("", path)
        if counts[plain] < len(alike.get(plain, [])):
            found[path] = alike[plain][counts[plain]]
        counts[plain] += 1
    return found


def _place(settings: optim.AnyOptimizer, slot: str) -> tuple[str, float]:
    """Return where Keras's optimizer keeps a slot, and its sign there: what SGD adds there we take away."""
    return ("momentums", -1.0) if settings.kind == "sgd" else (_SLOTS[slot], 1.0)


def _read_slots(optimizer: Any, settings: optim.AnyOptimizer) -> dict[str, list[np.ndarray]]:
    """Return the state of an optimizer of Keras's that is built: slot → an array for each variable."""
    found = {}
    for slot in settings.slots:
        attribute, sign = _place(settings, slot)
        found[slot] = [sign * keras.ops.convert_to_numpy(v) for v in getattr(optimizer, attribute)]
    return found


def _write_slots(optimizer: Any, settings: optim.AnyOptimizer, slots: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Give an optimizer of Keras's that state."""
    for slot, arrays in slots.items():
        attribute, sign = _place(settings, slot)
        for variable, array in zip(getattr(optimizer, attribute), arrays, strict=True):
            variable.assign(sign * array)


def _spec(variable: Any, group: int) -> TensorSpec:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    if dtype not in _DTYPES:
        raise LayoutError(f"Expected float32, float64, bfloat16 or float16, got {dtype} — variable {variable.path!r}.")
    if variable.constraint is not None:
        raise LayoutError(
            f"Expected variables without constraints, got {type(variable.constraint).__name__} — variable {variable.path!r}: the "
            "servers know of none. Leave it out."
        )
    if getattr(variable, "overwrite_with_gradient", False):
        raise LayoutError(f"Expected variables that follow a gradient, got {variable.path!r} of float8 training.")
    return TensorSpec(variable.path, tuple(variable.shape), dtype, group)
