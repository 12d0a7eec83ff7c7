"""A job on disk: a directory that other tools can read.

model.safetensors       every parameter under its name, in the master dtype
optimizer.safetensors   "exp_avg/NAME" and so on, one tensor per optimizer slot and parameter
job.json                commit, steps per parameter, the optimizer's settings, the job's state
"""

from __future__ import annotations

import base64
import os
import shutil
from pathlib import Path

import msgspec
import numpy as np

from headwater._errors import StorageError
from headwater._layout import DTYPES, Layout
from headwater.optim import AnyOptimizer

FORMAT = 1


class _Job(msgspec.Struct):
    """job.json."""

    format: int
    commit: int
    steps: dict[str, int]
    optimizer: AnyOptimizer
    state: dict[str, str]  # base64 of MessagePack


class Checkpoint:
    """Everything a job needs to go on: planes by name and tensor, steps in tensor order, commit, state."""

    def __init__(
        self,
        planes: dict[str, dict[str, np.ndarray]],
        steps: tuple[int, ...],
        commit: int,
        state: dict[str, bytes],
        optimizer: AnyOptimizer,
    ) -> None:
        self.planes, self.steps, self.commit, self.state, self.optimizer = (
            planes,
            steps,
            commit,
            state,
            optimizer,
        )

    def write(self, path: Path) -> None:
        """Write the directory aside, sync it, and put it in the place of what was there. Raises StorageError."""
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        import safetensors.numpy  # here, so that start-up does not pay for it

        names = list(self.planes["master"])
        job = _Job(
            FORMAT,
            self.commit,
            dict(zip(names, self.steps, strict=True)),
            self.optimizer,
            {key: base64.b64encode(value).decode() for key, value in self.state.items()},
        )
        slots = {f"{p}/{name}": a for p, arrays in self.planes.items() if p != "master" for name, a in arrays.items()}
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            safetensors.numpy.save_file(self.planes["master"], aside / "model.safetensors")
            safetensors.numpy.save_file(slots, aside / "optimizer.safetensors")
            (aside / "job.json").write_bytes(msgspec.json.format(msgspec.json.encode(job)))
            for file in (*aside.iterdir(), aside):
                _sync(file)
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            if path.exists():
                path.rename(old)
            aside.rename(path)
            shutil.rmtree(old, ignore_errors=True)
            _sync(path.parent)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise StorageError(f"Cannot save to {path}: {error}. What was there before is still there.") from error

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read a directory that `write` made. Raises StorageError naming the file."""
        import safetensors.numpy

        file = path / "job.json"
        try:
            job = msgspec.json.decode(file.read_bytes(), type=_Job)
            if job.format != FORMAT:
                raise StorageError(
                    f"Expected format {FORMAT} in {file}, got {job.format}: use the headwater that wrote it."
                )
            file = path / "model.safetensors"
            planes = {"master": safetensors.numpy.load_file(file)}
            file = path / "optimizer.safetensors"
            for key, array in safetensors.numpy.load_file(file).items():
                slot, _, name = key.partition("/")
                planes.setdefault(slot, {})[name] = array
            names = list(job.steps)
            planes = {plane: {name: arrays[name] for name in names} for plane, arrays in planes.items()}
            state = {key: base64.b64decode(value) for key, value in job.state.items()}
        except StorageError:
            raise
        except Exception as error:  # every kind of rot: missing, torn, not JSON, not safetensors, names that differ
            raise StorageError(
                f"Cannot read {file}: {type(error).__name__}: {error}. Expected what save() wrote."
            ) from error
        return cls(planes, tuple(job.steps.values()), job.commit, state, job.optimizer)

    def check(self, layout: Layout, optimizer: AnyOptimizer) -> None:
        """Refuse a checkpoint of another model or optimizer. Raises StorageError."""
        if tuple(self.planes["master"]) != tuple(spec.name for spec in layout.specs):
            raise StorageError("Expected a saved job with this model's parameters, got other names.")
        for spec in layout.specs:
            array = self.planes["master"][spec.name]
            if array.shape != spec.shape or array.dtype != DTYPES[spec.dtype][1]:
                raise StorageError(
                    f"Expected {DTYPES[spec.dtype][1]} {spec.shape} saved for {spec.name!r}, got {array.dtype} {array.shape}."
                )
        if set(self.planes) != {"master", *optimizer.slots}:
            raise StorageError(f"Expected the saved state of {optimizer}, got that of {self.optimizer}.")

    def __repr__(self) -> str:
        return f"<Checkpoint commit={self.commit} tensors={len(self.steps)}>"


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
