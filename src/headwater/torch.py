"""The PyTorch side: an optimizer whose step pushes gradients and pulls parameters, and modules around tables.

    optimizer = hw.torch.Optimizer(model, hw.optim.AdamW(lr=3e-4))
    embedding = hw.torch.Embedding(session.table("items", dim=64))

The model's parameters move into the session's arena, so that a push copies only gradients and, on one machine, a pull
copies nothing (with several servers: under BSP).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from headwater import optim
from headwater._connect import connect_session
from headwater._errors import ClosedError, LayoutError, SettingError, UsageError
from headwater._layout import AVERAGED, TensorSpec
from headwater._plan import pack_absent
from headwater._session import Session
from headwater._table_copy import TableCopy
from headwater._torch_embedding import Embedding, EmbeddingBag
from headwater._versions import Weights, check_nothing_left

__all__ = ["Embedding", "EmbeddingBag", "Optimizer", "load_weights"]

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

_COMPILED = "_orig_mod."  # what torch.compile puts into names

#: torch.optim class → ours. Options that only choose torch's implementation are of no concern to the servers.
_MAPPED: dict[type[torch.optim.Optimizer], type[optim.Optimizer]] = {
    torch.optim.SGD: optim.SGD,
    torch.optim.Adagrad: optim.Adagrad,
    torch.optim.RMSprop: optim.RMSprop,
    torch.optim.Adam: optim.Adam,
    torch.optim.AdamW: optim.AdamW,
}
_IMPLEMENTATION = {
    "params",
    "param_names",
    "foreach",
    "fused",
    "capturable",
    "initial_lr",
    "decoupled_weight_decay",
}


class Optimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose state lives on the job's servers.

    model: a module, compiled or not, or (name, parameter) pairs; names must be the same in every worker. Frozen parameters stay out, tied
    ones go once; there may be none where the session has tables. optimizer: settings from `headwater.optim`, or the user's own
    `torch.optim` object, whose groups and options are mapped, or refused by name. groups: parameter groups as `torch.optim` takes
    them, for settings from `headwater.optim`. session: default a new one from `headwater.connect()`. where: "server", or
    "worker": the servers only average gradients and the given `torch.optim` object, of any kind, makes the step here.

    From here on parameters lie in the session's memory: `.to(dtype)` afterwards is an error at the next step, and what
    user code writes into a parameter is undone by it. Schedulers, `zero_grad`, gradient accumulation, GradScaler work as ever.

    A module's persistent floating-point buffers, such as BatchNorm's running statistics, are the job's as well, and *averaged*: each step
    pushes those that were changed here since the last one, and brings back the mean of what was pushed; a step that counts nowhere
    leaves nothing of them. Other buffers, integers such as num_batches_tracked among them, stay this worker's own.

    `step` raises NonFiniteError where the gradient was refused; the job goes on, and so may the caller.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf instead of skipping the step

    def __init__(
        self,
        model: torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]],
        optimizer: optim.AnyOptimizer | torch.optim.Optimizer,
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        session: Session | None = None,
        where: str = "server",
    ) -> None:
        if where not in ("server", "worker"):
            raise SettingError(f"Expected where='server' or where='worker', got {where!r}.")
        named = list(model.named_parameters() if isinstance(model, torch.nn.Module) else model)
        named = [(name.replace(_COMPILED, ""), p) for name, p in named if p.requires_grad]
        self._is_open = True  # param groups may still be added
        self.inner = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        self._on_worker = where == "worker"
        if isinstance(optimizer, torch.optim.Optimizer):
            if groups is not None:
                raise SettingError("Expected groups in the torch.optim object, got groups= beside it: leave them out.")
            settings = optim.Mean() if self._on_worker else _map_optimizer(optimizer)
            super().__init__(optimizer.param_groups, optimizer.defaults)
        else:
            if self._on_worker:
                raise SettingError("Expected a torch.optim object for where='worker', got settings for the servers.")
            settings = optimizer
            members = list(groups) if groups is not None else [{"params": [p for _, p in named]}]
            super().__init__([dict(group) for group in members], _defaults(settings))
        self._is_open = False
        self.settings = settings
        self._names = settings.scalar_names
        self._parameters = _ordered(named, self.param_groups)
        self._module = model if isinstance(model, torch.nn.Module) else None
        self._buffers = _averaged(self._module) if self._module is not None else []
        if not self._parameters and not (session is not None and session.has_tables):
            raise LayoutError("Expected at least one parameter that requires a gradient, got none.")
        self.session = connect_session() if session is None else session
        self._register()

    def _register(self) -> None:
        """Move the parameters into the session's memory; their values are now the job's."""
        buffers = [(buffer.name, buffer.tensor, AVERAGED) for buffer in self._buffers]
        tensors: list[tuple[str, torch.Tensor, int]] = [*self._parameters, *buffers]
        specs = [TensorSpec(n, tuple(t.shape), _dtype(n, t), g) for n, t, g in tensors]
        self._dtypes = {name: tensor.dtype for name, tensor, _ in tensors}
        self.session.register_specs(specs, {name: _to_numpy(t.detach()) for name, t, _ in tensors}, self.settings)
        pushed = self._views(self.session.gradients)
        self._gradients, self._values = pushed[: len(self._parameters)], pushed[len(self._parameters) :]
        self._sides: list[list[torch.Tensor]] = []
        self._versions: list[int] = []  # of the parameters as they were pulled
        self._bind(first=True)
        self.session.moved = self._bind
        self.session.untrained = self._untrained

    def _current(self) -> list[torch.Tensor]:
        """Return the parameters of the session's current side, then the buffers."""
        for side in self.session.sides[len(self._sides) :]:  # more come while others join
            self._sides.append(self._views(side))
        return self._sides[self.session.side]

    def _views(self, arrays: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
        return [_to_torch(arrays[name], dtype) for name, dtype in self._dtypes.items()]

    def _bind(self, *, first: bool = False) -> None:
        """Let the parameters be the session's current side, and the buffers copies of it."""
        side = self._current()
        self._read: list[tuple[weakref.ref[torch.Tensor], int]] | None = None  # what `state_dict` has returned since
        for buffer, view in zip(self._buffers, side[len(self._parameters) :], strict=True):
            buffer.tensor.copy_(view)
        if not self._on_worker:
            parameters = [parameter for _, parameter, _ in self._parameters]
            for parameter, view in zip(parameters, side, strict=False):
                parameter.data = view
            torch.autograd.graph.increment_version(parameters)  # a graph from before the step is stale, and told so
        elif first:
            for (_, parameter, _), view in zip(self._parameters, side, strict=False):
                parameter.data.copy_(view)
        self._versions = [p._version for _, p, _ in self._parameters]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the job knows the parameters."""
        if not self._is_open:
            raise UsageError(
                "Expected all parameter groups at construction, got another: the job's layout is agreed once."
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, weight: float = 1.0) -> Any:
        """Push the gradients, wait for the commit, pull the parameters.

        closure: re-evaluates the model and returns the loss. weight: this worker's share in the mean, such as its number of samples.
        A parameter whose grad is None is left out; one that no worker has a gradient for stays as it is. A step without any gradient
        counts nowhere. Returns the closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_arena()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf.item()):
            weight = 0.0
        absent = [p.grad is None for _, p, _ in self._parameters]
        if all(absent) and not self.session.has_staged:
            weight = 0.0
        bits = b""
        if weight > 0:
            self._copy_gradients(absent)
            missing = [False] * len(absent) if self._on_worker else absent
            bits = pack_absent([*missing, *self._copy_buffers()])
        self.session.push_sealed(weight=weight, scalars=self._rows(), absent=bits, pull=True)
        try:
            self.session.wait()
        finally:
            with suppress(ClosedError):  # whatever closed it is what is to be told
                self._bind()
        if self._on_worker and self.session.accepted:
            self._step_here(absent)
        if self.inner is not None:
            self.inner._opt_called = True  # type: ignore[attr-defined]  # for schedulers made around the inner one
        return loss

    def _copy_gradients(self, absent: Sequence[bool]) -> None:
        scale = getattr(self, "grad_scale", None)
        if scale is not None and self.session.has_staged and float(scale) != 1.0:
            raise UsageError("Expected rows of tables without GradScaler, got both: what backward() pushed is scaled.")
        targets, sources = [], []
        for (_, parameter, _), view, missing in zip(self._parameters, self._gradients, absent, strict=True):
            grad = parameter.grad
            if missing or grad is None:
                if self._on_worker:
                    view.zero_()
                continue
            if grad.is_sparse:
                grad = grad.to_dense()
            targets.append(view)
            sources.append(grad)
        if scale is not None and sources:
            sources = list(torch._foreach_div(sources, float(scale)))
        if targets:
            torch._foreach_copy_(targets, sources)

    def _copy_buffers(self) -> list[bool]:
        """Copy the buffers that were changed since the last pull; returns for each whether it was not.

        A constant is never pushed: the mean of equal values may differ from them in the last bit, and a mask may hold infinity.
        """
        same = self._are_same()
        for buffer, view, is_same in zip(self._buffers, self._values, same, strict=True):
            if not is_same:
                view.copy_(buffer.tensor)
        return same

    def _are_same(self) -> list[bool]:
        """Return for each buffer whether its bits are those of the last pull."""
        side = self._current()[len(self._parameters) :]
        return [
            torch.equal(_bits(buffer.tensor), _bits(view)) for buffer, view in zip(self._buffers, side, strict=True)
        ]

    def _step_here(self, absent: Sequence[bool]) -> None:
        """where="worker": make the user's own step from the mean gradient."""
        assert self.inner is not None
        side = self._current()
        for (_, parameter, _), mean, missing in zip(self._parameters, side, absent, strict=False):
            # Nobody had a gradient where the mean of all is nothing but zeros: untouched, as in one process.
            parameter.grad = None if missing and not mean.any() else mean.clone()
        self.inner.step()

    def _check_arena(self) -> None:
        for buffer, view in zip(self._buffers, self._values, strict=True):
            held = buffer.held
            if held is None or held.shape != view.shape or held.dtype != view.dtype:
                raise LayoutError(
                    f"Expected buffer {buffer.name!r} to stay {view.dtype} {tuple(view.shape)}, got "
                    f"{None if held is None else (held.dtype, tuple(held.shape))}: convert the model before the optimizer is made."
                )
        if self._on_worker:
            return
        for (name, parameter, _), view in zip(self._parameters, self._current(), strict=False):
            if parameter.data_ptr() != view.data_ptr() or parameter.dtype != view.dtype:
                raise LayoutError(
                    f"Expected parameter {name!r} in the session's memory as {view.dtype}, got it elsewhere as {parameter.dtype}: "
                    "move or convert the model before the optimizer is made."
                )

    def _untrained(self) -> dict[str, tuple[np.ndarray, str]]:
        """Return what a version of this model has besides what the servers have, with dtypes; frozen parameters as they lie."""
        if self._module is None:
            return {}
        known = set() if self._on_worker else {id(p) for _, p, _ in self._parameters}  # there they have mean gradients
        known |= {id(buffer.tensor) for buffer in self._buffers}
        found = {}
        for name, tensor in self._module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, torch.Tensor) or id(tensor) in known:
                continue
            known.add(id(tensor))
            held = tensor.detach().cpu()
            is_still = isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
            array = _to_numpy(held if is_still else held.clone())
            found[name.replace(_COMPILED, "")] = array, str(tensor.dtype).removeprefix("torch.")
        return found

    def _rows(self) -> list[tuple[float, ...]]:
        if not self._parameters:
            return []
        if self._on_worker:
            return [()] * len(self.param_groups)
        return [tuple(_scalar(group, name) for name in self._names) for group in self.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups in torch's own form; the state is fetched from the servers.

        Low-precision parameters come with their float32 "master".
        """
        if self.inner is not None and self._on_worker:
            return self.inner.state_dict()
        planes, steps = self.session.read_optimizer()
        for name, parameter, _ in self._parameters:
            if steps[name] == 0:
                continue
            state: dict[str, Any] = {"step": torch.tensor(float(steps[name]))}
            keep_master = _DTYPES[parameter.dtype] not in ("float32", "float64")
            for plane, arrays in planes.items():
                if plane != "master" or keep_master:
                    state[plane] = torch.from_numpy(arrays[name])
            self.state[parameter] = state
        try:
            found = super().state_dict()
        finally:
            self.state.clear()
        self._read = [(weakref.ref(tensor), tensor._version) for tensor in _tensors(found)]
        return found

    def _is_as_read(self, state_dict: Mapping[str, Any]) -> bool:
        """Whether these are the tensors that were read last, and nobody has written into them, parameters or buffers."""
        tensors, read = _tensors(state_dict), self._read
        return (
            read is not None
            and len(read) == len(tensors)
            and all(ref() is t and t._version == version for t, (ref, version) in zip(tensors, read, strict=True))
            and self._versions == [p._version for _, p, _ in self._parameters]
            and all(self._are_same())
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take state and groups as `state_dict` returned them, here or from the mapped torch optimizer, to the servers.

        The parameters' present values go along, so load the model's first. Every worker may do it, all with the same values. Where all is
        as it was read and pulled nothing is written: some loops hand an optimizer its own state, while others have trained on.
        """
        if self.inner is not None and self._on_worker:
            self.inner.load_state_dict(state_dict)
            self.param_groups = self.inner.param_groups
            return
        is_as_read = self._is_as_read(state_dict)
        super().load_state_dict(state_dict)
        if self.inner is not None:
            self.inner.param_groups = self.param_groups  # still the same for its scheduler
        self.state.clear()
        if is_as_read:
            return
        order = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        saved = {p: state_dict["state"].get(i, {}) for p, i in zip(order, ids, strict=True)}
        steps, planes = {}, {plane: {} for plane in ("master", *self.settings.slots)}  # type: ignore[var-annotated]
        tensors = [(name, p.detach()) for name, p, _ in self._parameters]
        states = [saved[p] for _, p, _ in self._parameters] + [{}] * len(self._buffers)
        for (name, parameter), state in zip(tensors + [(b.name, b.tensor) for b in self._buffers], states, strict=True):
            steps[name] = int(state.get("step", 1 if state else 0))
            master = np.float64 if parameter.dtype == torch.float64 else np.float32
            value = state.get("master", parameter)
            planes["master"][name] = value.to(dtype=torch.from_numpy(np.zeros(0, master)).dtype).cpu().numpy().copy()
            for slot in self.settings.slots:
                held = state.get(slot)
                planes[slot][name] = (
                    np.full(tuple(parameter.shape), self.settings.initial(slot), master)
                    if held is None
                    else held.detach().cpu().numpy().astype(master)
                )
        self.session.write_optimizer(planes, steps)
        self._bind()


@torch.no_grad()
def load_weights(module: torch.nn.Module, weights: Weights) -> None:
    """Let a module have the weights of a version, all in one step between two of its calls; they are copied beside it first.

    Names are those of `module.state_dict()`, tied ones once; values take the module's dtypes and devices. Rows go into the module's
    `TableCopy`s, by the tables' names. Raises LayoutError naming the
    first tensor that does not fit; the module is then as it was.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            tensors[id(tensor)] = tensor
            names.setdefault(id(tensor), []).append(name.replace(_COMPILED, ""))
    left, dtypes = set(weights.tensors), weights.version.dtypes
    held_tables = (getattr(each, "table", None) for each in module.modules())
    copies = {table.name: table for table in held_tables if isinstance(table, TableCopy)}
    for name, copy in copies.items():
        ids, values = (weights.tensors.get(f"tables/{name}/{part}") for part in ("ids", "values"))
        if ids is None or values is None or values.shape != (len(ids), copy.dim):
            got = "none" if values is None else f"values of shape {values.shape}"
            raise LayoutError(
                f"Expected rows of dim {copy.dim} for table {name!r}, got {got} in version {weights.version.id}."
            )
        left -= {f"tables/{name}/ids", f"tables/{name}/values"}
    ready: list[tuple[torch.Tensor, torch.Tensor]] = []
    for key, tensor in tensors.items():
        name = next((name for name in names[key] if name in left), "")
        if not name:
            raise LayoutError(f"Expected {names[key][0]!r} in version {weights.version.id}, got a version without it.")
        array = weights.tensors[name]
        if array.shape != tuple(tensor.shape):
            raise LayoutError(
                f"Expected {name!r} of shape {tuple(tensor.shape)}, got {array.shape} in version {weights.version.id}."
            )
        held = torch.from_numpy(array.copy())
        held = held.view(torch.bfloat16) if dtypes[name] == "bfloat16" else held
        ready.append((tensor, held.to(device=tensor.device, dtype=tensor.dtype)))
        left -= set(names[key])
    check_nothing_left(weights, left)
    for name, copy in copies.items():
        copy.replace(weights.tensors[f"tables/{name}/ids"], weights.tensors[f"tables/{name}/values"])
    for tensor, held in ready:
        tensor.data = held


def _tensors(state_dict: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors of an optimizer's state."""
    return [t for state in state_dict["state"].values() for t in state.values() if isinstance(t, torch.Tensor)]


class _Buffer(NamedTuple):
    """A buffer that is averaged; it may be another tensor at each step."""

    name: str
    module: torch.nn.Module
    key: str

    @property
    def held(self) -> torch.Tensor | None:
        return self.module._buffers.get(self.key)

    @property
    def tensor(self) -> torch.Tensor:
        held = self.held
        assert held is not None
        return held


def _averaged(model: torch.nn.Module) -> list[_Buffer]:
    """Return the model's persistent buffers that servers can average; tied ones once."""
    found: dict[torch.Tensor, _Buffer] = {}
    for prefix, module in model.named_modules():
        for key, tensor in module._buffers.items():
            is_kept = key not in module._non_persistent_buffers_set
            if tensor is not None and is_kept and tensor.dtype in _DTYPES and tensor.numel():
                name = f"{prefix}.{key}" if prefix else key
                found.setdefault(tensor, _Buffer(name.replace(_COMPILED, ""), module, key))
    return list(found.values())


def _ordered(
    named: Sequence[tuple[str, torch.nn.Parameter]], groups: Sequence[Mapping[str, Any]]
) -> list[tuple[str, torch.nn.Parameter, int]]:
    """Return (name, parameter, group) in the model's order; each parameter must be in one group."""
    group_of = {p: g for g, group in enumerate(groups) for p in group["params"] if p.requires_grad}
    known = {p for _, p in named}
    if any(p not in known for p in group_of):
        raise LayoutError(
            "Expected the optimizer's parameters to be the model's, got one that is not: pass the same model."
        )
    found = [(name, p, group_of[p]) for name, p in named if p in group_of]
    used = sorted({g for _, _, g in found})
    if found and used != list(range(len(groups))):
        raise LayoutError("Expected a trainable parameter in every group, got an empty group: leave it out.")
    return found


def _defaults(settings: optim.AnyOptimizer) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__struct_fields__ if name != "clip_norm"}


def _scalar(group: Mapping[str, Any], name: str) -> float:
    value = group["betas"][int(name[-1]) - 1] if name in ("beta1", "beta2") else group[name]
    return float(value)


def _map_optimizer(inner: torch.optim.Optimizer) -> optim.AnyOptimizer:
    """Return the server's settings for a torch.optim object. Raises SettingError naming what cannot be mapped."""
    kind = _MAPPED.get(type(inner))
    if kind is None:
        known = ", ".join(k.__name__ for k in _MAPPED)
        raise SettingError(
            f"Expected one of torch.optim's {known}, got {type(inner).__name__}: use where='worker' for any optimizer."
        )
    if any(
        state and float(state.get("step", 1)) > 0 for state in inner.state.values()
    ):  # Adagrad's is there from the start
        raise SettingError(
            "Expected a torch.optim object that has made no step, got one with state: load_state_dict() it instead."
        )
    found = [_options(kind, group) for group in inner.param_groups]
    first = kind(**found[0])
    for options in found[1:]:
        if kind(**options).structure() != first.structure():
            raise SettingError(f"Expected options that shape the state to be the same in all groups, got {found}.")
    return first  # type: ignore[return-value]


def _options(kind: type[optim.Optimizer], group: Mapping[str, Any]) -> dict[str, Any]:
    options = {}
    decoupled = group.get("decoupled_weight_decay", kind is optim.AdamW)
    if bool(decoupled) != (kind is optim.AdamW):
        raise SettingError("Expected decoupled_weight_decay as the class has it, got the other: use torch.optim.AdamW.")
    for name, value in group.items():
        if name in kind.__struct_fields__:
            options[name] = value.item() if isinstance(value, torch.Tensor) else value
        elif name not in _IMPLEMENTATION and value:
            raise SettingError(f"Expected options that servers know, got {name}={value!r}: use where='worker'.")
    return options


def _dtype(name: str, parameter: torch.Tensor) -> str:
    if parameter.device.type != "cpu":
        raise LayoutError(f"Expected parameters on the CPU, got {name!r} on {parameter.device}.")
    if parameter.dtype not in _DTYPES:
        raise LayoutError(
            f"Expected float32, float64, bfloat16 or float16, got {parameter.dtype} — parameter {name!r}."
        )
    return _DTYPES[parameter.dtype]


def _to_torch(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
