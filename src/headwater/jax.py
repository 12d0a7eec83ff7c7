"""The JAX side: a step that pushes a tree of gradients and pulls the parameters, around a jitted function.

    optimizer = hw.jax.Optimizer(params, hw.optim.AdamW(lr=3e-4))
    loss_and_gradients = jax.jit(jax.value_and_grad(loss))
    for batch in batches:
        value, gradients = loss_and_gradients(optimizer.params, batch)
        optimizer.step(gradients)

Gradients on the CPU are read where JAX has them and copied once, into the push buffer. A pull copies once, too: JAX's arrays
never change, and may be in use after the servers have written their memory again.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from headwater import optim
from headwater._connect import connect_session
from headwater._errors import ClosedError, LayoutError, SettingError, UsageError
from headwater._layout import ALIGN_BYTES
from headwater._session import Session

try:
    import jax
except ModuleNotFoundError as error:
    raise SettingError("Expected JAX for headwater.jax, got none: pip install 'headwater[jax]'.") from error

__all__ = ["Optimizer"]

Tree = Any  # a pytree of arrays


class Transformation(Protocol):
    """What Optax calls a GradientTransformation."""

    def init(self, params: Tree, /) -> Tree: ...

    def update(self, updates: Tree, state: Tree, params: Tree, /) -> tuple[Tree, Tree]: ...


class Optimizer:
    """Parameters that live on the job's servers, as a pytree of JAX arrays.

    params: a tree of float32, bfloat16, float16 or float64 arrays, the same in every worker; the first worker's values are the job's. A
    leaf's name is its path, such as "dense.kernel" or "layers.0.bias". optimizer: settings from `headwater.optim`; with where="worker" an
    Optax transformation, of any kind, which makes the step here with the gradients that servers have averaged. averaged: a tree
    of what is not trained by gradients, such as BatchNorm's statistics: see `step`. session: default a new one from `headwater.connect()`.
    """

    def __init__(
        self,
        params: Tree,
        optimizer: optim.AnyOptimizer | Transformation,
        *,
        averaged: Tree = None,
        session: Session | None = None,
        where: str = "server",
    ) -> None:
        if where not in ("server", "worker"):
            raise SettingError(f"Expected where='server' or where='worker', got {where!r}.")
        if isinstance(optimizer, optim.Optimizer) == (where == "worker"):
            raise SettingError(
                "Expected an Optax transformation for where='worker', got settings for the servers."
                if where == "worker"
                else f"Expected settings from headwater.optim, got {type(optimizer).__name__}: servers cannot see what an Optax "
                "transformation, which is a pair of functions, does. Take hw.optim.AdamW and its like, or where='worker'."
            )
        self._trained, self._averaged = _Tree(params, "params"), _Tree(averaged, "averaged")
        self._optax: Any = None if isinstance(optimizer, optim.Optimizer) else optimizer
        settings: Any = optim.Mean() if self._optax is not None else optimizer
        names = [*self._trained.names, *self._averaged.names]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise LayoutError(f"Expected a name of its own for each leaf, got {twice[0]!r} twice: rename a key.")
        arrays = self._trained.named(params) | self._averaged.named(averaged)
        self.session = connect_session() if session is None else session
        self.session.register(arrays, settings, averaged=self._averaged.names)
        self._pull()
        if self._optax is not None:
            self.params: Tree = self._trained.pulled(self.session.parameters)
            self._state = self._optax.init(self.params)
            self._update = jax.jit(self._updated)
        self.session.moved = self._pull

    def _pull(self) -> None:
        pulled = self.session.parameters
        if self._optax is None:
            self.params = self._trained.pulled(pulled)  #: as last pulled; they stay as they are, `step` gives others
        self.averaged = self._averaged.pulled(pulled)  #: likewise

    def step(
        self,
        gradients: Tree,
        *,
        averaged: Tree = None,
        weight: float = 1.0,
        scalars: Mapping[str, float] | None = None,
    ) -> Tree:
        """Push the gradients, wait for the commit, pull; returns the new parameters, which are `params` as well.

        gradients: a tree like that of the parameters, of the same dtypes. averaged: this worker's new values of what is averaged, a tree
        like that given at construction; leaves that have not changed since the last pull are left out, None leaves all out. `averaged` then
        is the mean of the values that were pushed. weight: this worker's share in the mean, such as its number of samples. scalars:
        {"lr": 0.01} and others that change by the step; those left out stay as they were last.

        It is said outside of jit. Raises LayoutError for another tree, shape or dtype: then nothing was pushed. Raises NonFiniteError where
        the push was refused; the job goes on, and so may the caller.
        """
        arrays = self._trained.named(gradients)
        if averaged is not None:
            now = self.session.parameters
            arrays |= {n: a for n, a in self._averaged.named(averaged).items() if not _is_same(a, now[n])}
        try:
            self.session.step(arrays, weight=weight, scalars=scalars)
        finally:
            with suppress(ClosedError):
                self._pull()
        if self._optax is not None and self.session.accepted:
            mean = self._trained.pulled(self.session.parameters)
            self.params, self._state = self._update(mean, self._state, self.params)
        return self.params

    def _updated(self, gradients: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        """where="worker": make the transformation's step, as `optax.apply_updates` does."""
        updates, state = self._optax.update(gradients, state, params)
        return jax.tree_util.tree_map(lambda p, u: (p + u).astype(p.dtype), params, updates), state


class _Tree:
    """A tree's structure, and its leaves' names."""

    def __init__(self, tree: Tree, root: str) -> None:
        paths, structure = jax.tree_util.tree_flatten_with_path(tree)
        self._structure: Any = structure
        leaves = [jax.numpy.asarray(leaf) for _, leaf in paths]
        self._root = root
        self.names = [".".join(map(_key, path)) or root for path, _ in paths]
        self._dtypes = [leaf.dtype for leaf in leaves]
        #: Where each leaf is; None: JAX may choose.
        self._places = [leaf.sharding for leaf in leaves] if any(leaf.committed for leaf in leaves) else None

    def named(self, tree: Tree) -> dict[str, np.ndarray]:
        """Return a tree's leaves by name, without a copy where they are on the CPU. Raises LayoutError, UsageError."""
        leaves, structure = jax.tree_util.tree_flatten(tree)
        if structure != self._structure:
            raise LayoutError(f"Expected a tree like {self._root}, {self._structure}, got another: {structure}.")
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise UsageError("Expected arrays, got tracers: call it outside of jit and grad, with what they return.")
        return dict(zip(self.names, [np.asarray(jax.numpy.asarray(leaf)) for leaf in leaves], strict=True))

    def pulled(self, arrays: Mapping[str, np.ndarray]) -> Tree:
        """Return the tree of copies of these arrays, where the leaves were."""
        leaves = [_copy(arrays[name], dtype) for name, dtype in zip(self.names, self._dtypes, strict=True)]
        return jax.tree_util.tree_unflatten(self._structure, jax.device_put(leaves, self._places))


def _key(key: Any) -> str:
    """Return a step of a path as it is said in a name."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _copy(view: np.ndarray, dtype: Any) -> np.ndarray:
    """Return a copy, of this dtype, that JAX takes over as it is: it copies again what is not aligned."""
    raw = np.empty(view.nbytes + ALIGN_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGN_BYTES
    copy: np.ndarray = raw[start : start + view.nbytes].view(view.dtype).reshape(view.shape)
    copy[...] = view
    return copy.view(dtype)


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays have the same bits."""
    return one.shape == other.shape and one.tobytes() == other.tobytes()
