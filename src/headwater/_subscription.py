"""Following a tag: each new version is fetched and verified beside whatever goes on, and taken between two calls."""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np

from headwater import _limits
from headwater._connect import connect_session
from headwater._errors import HeadwaterError, LayoutError, SettingError, UsageError, WaitTimeoutError, debug, warn
from headwater._messages import State, StateGet
from headwater._publishing import read_store
from headwater._versions import Room, Version, Versions, Weights, check_nothing_left


def subscribe(source: str | os.PathLike[str], tag: str | int = "latest", *, token: str | None = None) -> Subscription:
    """Follow a tag in a store of versions, or the versions that a running job publishes.

    source: a folder or an fsspec URL; or a job's address, tcp://… or unix://…, which says where it publishes. tag: a tag, "latest", or
    the number of a version. token: of the job, default $HEADWATER_TOKEN. Raises SettingError where a job has published nothing yet; a
    store or a tag that is not there yet is waited for.
    """
    return Subscription(open_versions(source, token), tag)


def open_versions(source: str | os.PathLike[str], token: str | None = None) -> Versions:
    """Return the versions in a store, or those that a running job publishes, as `subscribe` takes them."""
    text = os.fspath(source)
    if text.startswith(("tcp://", "unix://")):
        with connect_session(text, token=token, role="observer") as session:
            store = read_store(session._ask(StateGet(), State).items)
        if store is None:
            raise SettingError(
                f"Expected a job that publishes versions at {text}, got one that has published none yet."
            )
        text = store
    return Versions(text)


class Subscription:
    """A tag that is followed, made by `subscribe`. It can be shared between threads.

    A thread looks at the tag and brings the version it points at into memory, verified; `take` or `apply` hands it over. What goes
    wrong is said, kept in `error`, and tried again: until then the version that was taken last stays.
    """

    def __init__(self, versions: Versions, tag: str | int) -> None:
        self.versions, self.tag = versions, tag
        self.current: Version | None = None  #: the version that was taken last
        self.error: HeadwaterError | None = None  #: why the newest version is not there; None: all is well
        self._held: Weights | None = None  # what was taken last: deltas go on from there
        self._ready: Weights | None = None
        self._said = ""
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._follow, name="subscription", daemon=True)
        self._thread.start()

    def take(self) -> Weights | None:
        """Return a version that is newly there; None: what was taken last still is what the tag points at."""
        with self._changed:
            ready, self._ready = self._ready, None
            if ready is not None:
                self._held, self.current = ready, ready.version
            return ready

    def wait(self, timeout_s: float | None = None) -> Weights:
        """Wait for a version that was not taken yet, and take it. Raises WaitTimeoutError with what is in the way."""
        with self._changed:
            there = self._changed.wait_for(lambda: self._ready is not None or self._is_closed, timeout_s)
            if self._is_closed:
                raise UsageError("Expected a subscription that is open, got one that was closed.")
            if not there:
                raise WaitTimeoutError(
                    f"Expected a new version for {self.tag!r} in {self.versions} within {timeout_s} s, got none"
                    + (f": {self.error}" if self.error else ": nothing was published.")
                )
            weights = self.take()
            assert weights is not None
            return weights

    def __iter__(self) -> Iterator[Weights]:
        """Yield each version once it is there, without end; of several that came meanwhile only the last."""
        while True:
            try:
                yield self.wait()
            except UsageError:
                return

    def apply(self, target: Any) -> Version | None:
        """Let a model have the newest version, in one step; returns it, None where nothing new is there.

        target: a `torch.nn.Module`, a Keras model, or arrays by name, which are written in place. Call it between two calls of the model.
        Where the version does not fit the model stays as it was; that is said, and kept in `error`.
        """
        weights = self.take()
        if weights is None:
            return None
        try:
            load_weights(target, weights)
        except LayoutError as error:
            self._fail(error)
            return None
        return weights.version

    def close(self) -> None:
        """Follow no more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _follow(self) -> None:
        seen: Weights | None = None
        room = Room()
        failed: tuple[int, float] | None = None  # a version that could not be read, and when it is tried again
        while not self._is_closed:
            try:
                number = self.versions.resolve(self.tag)
                is_new = seen is None or number != seen.version.id
                if is_new and (failed is None or failed[0] != number or time.monotonic() >= failed[1]):
                    failed = number, time.monotonic() + _limits.LOOK_AGAIN_S
                    start = time.monotonic()
                    seen, failed = self.versions.load(number, base=seen or self._held, room=room), None
                    debug(f"version {number} of {self.versions} in {time.monotonic() - start:.3f} s")
                    with self._changed:
                        self._ready, self.error, self._said = seen, None, ""
                        self._changed.notify_all()
            except HeadwaterError as error:
                self._fail(error)
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, self.versions.look_s)

    def _fail(self, error: HeadwaterError) -> None:
        with self._changed:
            self.error = error
            self._changed.notify_all()
            if str(error) == self._said:
                return
            self._said = str(error)
        kept = "nothing yet" if self.current is None else f"version {self.current.id}"
        warn(f"{error} {self.tag!r} stays as it was: {kept}.")


def load_weights(target: Any, weights: Weights) -> None:
    """Let a `torch.nn.Module`, a Keras model or arrays by name have a version's weights. Raises LayoutError; nothing has changed then."""
    if isinstance(target, MutableMapping):
        _write(target, weights)
        return
    package = framework_of(target)
    if not package:
        raise UsageError(f"Expected a torch.nn.Module, a Keras model or arrays by name, got {type(target).__name__}.")
    importlib.import_module(f"headwater.{package}").load_weights(target, weights)


def framework_of(model: Any) -> str:
    """Return "keras" for a Keras model, which on PyTorch is a module, too, "torch" for any other module, "" for anything else."""
    kinds = {(kind.__module__.split(".")[0], kind.__name__) for kind in type(model).__mro__}
    return "keras" if ("keras", "Model") in kinds else "torch" if ("torch", "Module") in kinds else ""


def _write(arrays: MutableMapping[str, np.ndarray], weights: Weights) -> None:
    for name, array in arrays.items():
        held = weights.tensors.get(name)
        if held is None or (held.shape, held.dtype) != (array.shape, array.dtype):
            got = "none" if held is None else f"{held.dtype} {held.shape}"
            raise LayoutError(
                f"Expected {array.dtype} {array.shape} for {name!r}, got {got} in version {weights.version.id}."
            )
    check_nothing_left(weights, weights.tensors.keys() - arrays.keys())
    for name, array in arrays.items():
        array[...] = weights.tensors[name]
