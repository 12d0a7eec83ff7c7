"""The ceiling: the fused kernel alone, on the buffers a server would have, with nobody to wait for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.harness import Step
from bench.ours import optimizer_of
from headwater import _kernels
from headwater._memory import SharedBuffer, zeroed


class FusedPass:
    """The kernel with a state of its own: parameters in shared memory, the optimizer's slots in private memory, two sides."""

    def __init__(self, optimizer: str, gradients: Sequence[np.ndarray]) -> None:
        self._settings = optimizer_of(optimizer)
        self._gradients = gradients
        self.size = gradients[0].size
        self.sides = [self._planes(), self._planes()]
        self._scalars = np.array([self._settings.row(self._settings.scalars(), 1)])
        self._coefficients = np.full((1, len(gradients)), 1 / len(gradients))

    def _planes(self) -> list[np.ndarray]:
        slots = [zeroed(4 * self.size).view(np.float32) for _ in self._settings.slots]
        for slot in slots:
            slot.fill(0)  # so that its pages exist
        return [shared_array(self.size, 0.5), *slots]

    def __call__(self, side: int, start: int, stop: int, threads: int) -> None:
        """Sum the gradients of elements [start, stop), step from one side of the state to the other, check.

        With a clip_norm the gradient is measured first, as where the step before was clipped.
        """
        source, target = ([plane[start:stop] for plane in self.sides[i]] for i in (side, 1 - side))
        runs = np.array([[0, stop - start, 0]])
        gradients = [gradient[start:stop].view(np.uint8) for gradient in self._gradients]
        commit = (runs, self._scalars, gradients, self._coefficients)
        kind, flags = self._settings.kind, self._settings.flags
        if self._settings.clip_norm is not None:
            _kernels.square_sums("float32", runs, gradients, self._coefficients, threads=threads, level="auto")
        bad = _kernels.apply(kind, flags, "float32", source, target, [commit], threads=threads, level="auto")
        assert bad is None, f"a gradient of the bench is not finite: {bad}"


def bare_kernel(optimizer: str, parameters: int, workers: int, threads: int) -> Step:
    """Return a step that does all that a server does between two commits. It is worth `workers` worker-steps."""
    apply = FusedPass(optimizer, [shared_array(parameters, 1e-6) for _ in range(workers)])
    side = 0

    def step() -> None:
        nonlocal side
        apply(side, 0, parameters, threads)
        side = 1 - side

    return step


def shared_array(elements: int, value: float) -> np.ndarray:
    """Return float32 memory of the kind that servers and workers share, every page touched."""
    array = SharedBuffer(4 * elements, "bench").array.view(np.float32)
    array.fill(value)
    return array
