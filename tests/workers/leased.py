"""A worker whose data is read ahead by two processes; says what it used. With a number it dies after so many batches."""

import os
import sys

import numpy as np
import torch

import headwater as hw


def main() -> None:
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else -1
    with hw.connect() as session:
        session.register({"w": np.zeros(1, np.float32)}, hw.optim.SGD(lr=1.0))
        dataset = torch.utils.data.TensorDataset(torch.arange(50))
        loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True, num_workers=2)
        data = session.shard(loader, epochs=2, piece=1)
        for number, (batch,) in enumerate(data):
            if number == limit:
                os._exit(9)
            session.step({"w": np.ones(1, np.float32)})
            sys.stdout.write("".join(f"{data.epoch} {item}\n" for item in batch.tolist()))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
