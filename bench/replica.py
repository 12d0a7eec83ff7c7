"""A replica as `headwater serve --fleet` runs it, of a model in NumPy, so that eight start at once in a moment.

    python -m bench.replica STORE FLAG

While the file FLAG exists, what it reads of weights has a wrong bit.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from headwater._files import LocalFiles
from headwater._http import ModelServer, listen, url_of
from headwater._oip import Slot, Tensor
from headwater._versions import Versions, Weights

LAYERS = 4


class Telling:
    """Each layer's output is its weight, which is the version: a mixture would show."""

    platform = "numpy"
    inputs: Sequence[Slot] = (Slot("x", "FP32", (-1,)),)
    outputs: Sequence[Slot] = ()

    def apply(self, weights: Weights) -> None:
        self._layers = [weights.tensors[f"layer{i}"] for i in range(LAYERS)]

    def check(self, inputs: Sequence[Tensor]) -> None:
        pass

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        rows = len(inputs["x"].array)
        found = np.array([bound for layer in self._layers for bound in (layer.min(), layer.max())], np.float32)
        return [Tensor("layers", "FP32", np.tile(found, (rows, 1)))]


class RottenFiles(LocalFiles):
    """A disk that lies while a flag is up."""

    def __init__(self, flag: str) -> None:
        self._flag = Path(flag)

    def read_into(self, path: str, offset: int, target: memoryview) -> int:
        done = super().read_into(path, offset, target)
        if path.endswith(".safetensors") and done and self._flag.exists():
            raw = target.cast("B")
            raw[done // 2] ^= 1
        return done


def main(store: str, flag: str) -> None:
    """Serve until SIGTERM."""
    versions = Versions(store)
    versions.files = RottenFiles(flag)
    sock = listen("http://127.0.0.1:0", "")
    server = ModelServer("m", Telling, versions, tag="prod", fleet_url=url_of(sock))
    print(url_of(sock), flush=True)
    server.run(sock)


if __name__ == "__main__":
    main(*sys.argv[1:])
