"""DataLoader workers, by fork and by spawn, read this worker's part of a dataset while the session trains."""

import sys
from typing import Any

import numpy as np
import torch

import headwater as hw


class Squares(torch.utils.data.Dataset[int]):
    """A dataset that is read by index only."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < 20:
            raise IndexError(index)
        return index * index


def main() -> None:
    with hw.connect() as session:
        session.register({"w": np.zeros(1, np.float32)}, hw.optim.SGD(lr=1.0))
        part: Any = session.shard(Squares())  # a map-style dataset to torch, whose class it is not
        for method in ("fork", "spawn"):
            seen = []
            loader: Any = torch.utils.data.DataLoader(part, batch_size=4, num_workers=1, multiprocessing_context=method)
            for batch in loader:
                seen += batch.tolist()
                session.step({"w": np.ones(1, np.float32)})
            sys.stdout.write(f"{method} {seen}\n")
        sys.stdout.write(f"clock {session.clock}, sum {session.pull()['w'][0]}\n")


if __name__ == "__main__":
    main()
