"""Train a small Inception to read handwritten digits, with any number of workers.

    headwater run -n 2 examples/inception.py                       # a server and two workers
    headwater run -n 2 --consistency asp examples/inception.py     # nobody waits for the other
    python examples/inception.py                                   # one worker, the server inside its process

What Headwater adds to an ordinary training script, all in `train` and `main`: it connects, hands the model to the job's optimizer,
and `session.shard` leases the batches of each epoch to whoever asks. Every digit is used once per epoch, however fast workers are and
whether or not they all live.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import digits
import torch
from digits import Digits
from mnist import CLASSES
from schedule import set_rate, share_of_batch, share_of_peak
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import headwater as hw

EVALUATE_EVERY = 100  # steps


class Convolution(nn.Sequential):
    """A convolution of float32 (batch, channels, height, width), normalised and rectified. The paper normalised nothing yet."""

    def __init__(self, before: int, after: int, size: int) -> None:
        layer = nn.Conv2d(before, after, size, padding=size // 2, bias=False)
        super().__init__(layer, nn.BatchNorm2d(after), nn.ReLU())


class Branches(nn.Module):
    """The Inception module: convolutions of three sizes and a pooling, side by side, their channels one after the other.

    1 × 1 convolutions reduce the channels before the larger ones and after the pooling. Arguments: columns of the paper's table 1.
    """

    def __init__(
        self, before: int, one: int, reduce_three: int, three: int, reduce_five: int, five: int, pooled: int
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                Convolution(before, one, 1),
                nn.Sequential(Convolution(before, reduce_three, 1), Convolution(reduce_three, three, 3)),
                nn.Sequential(Convolution(before, reduce_five, 1), Convolution(reduce_five, five, 5)),
                nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), Convolution(before, pooled, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Inception(nn.Sequential):
    """GoogLeNet (Szegedy et al. 2014) up to its module 4a, with 1/`share` of its channels.

    Images are small, so nothing is halved before the first module. From float32 (batch, 1, height, width) to logits, float32
    (batch, classes).
    """

    def __init__(self, share: int = 8, classes: int = CLASSES) -> None:
        def module(before: int, *columns: int) -> Branches:
            return Branches(before // share, *(column // share for column in columns))

        super().__init__(
            Convolution(1, 64 // share, 3),
            Convolution(64 // share, 192 // share, 3),
            nn.MaxPool2d(3, stride=2, padding=1),
            module(192, 64, 96, 128, 16, 32, 32),  # 3a
            module(256, 128, 128, 192, 32, 96, 64),  # 3b
            nn.MaxPool2d(3, stride=2, padding=1),
            module(480, 192, 96, 208, 16, 48, 64),  # 4a
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.4),
            nn.Linear(512 // share, classes),
        )


def train(
    session: hw.Session, model: nn.Module, training: Digits, held_out: Digits, options: argparse.Namespace
) -> None:
    """Use every digit once in each epoch, moved a little by chance; worker 0 looks now and then how well others are read."""
    rate = options.rate * share_of_batch(session)
    settings = hw.optim.SGD(lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    optimizer = hw.torch.Optimizer(model, settings, session=session)  # the changed line
    loader = DataLoader(training, options.batch, shuffle=True, drop_last=True)
    steps = options.epochs * len(loader) // session.workers
    torch.manual_seed(hash((options.seed, session.index)))  # moves other digits in each worker
    for images, labels in session.shard(loader, epochs=options.epochs, seed=options.seed):
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        set_rate(optimizer, rate * share_of_peak(session.clock, steps, warm_up=steps // 4))
        optimizer.step()  # push gradients, pull parameters
        optimizer.zero_grad()
        session.report(loss=loss.item())
        if session.index == 0 and session.clock % EVALUATE_EVERY == 0:
            found = digits.accuracy(model, held_out)
            session.report(held_out=found)
            print(f"step {session.clock}: loss {loss.item():.3f}, held-out accuracy {found:.1%}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = digits.parse_options("Train a small Inception on handwritten digits with Headwater.", arguments)
    training, held_out = digits.load(options.data)
    torch.manual_seed(options.seed)
    model = Inception()
    with hw.connect() as session:  # $HEADWATER_ADDRESS, or a server inside this process
        start = time.monotonic()
        train(session, model, training, held_out, options)
        if session.index == 0:
            found, seconds = digits.accuracy(model, held_out), time.monotonic() - start
            print(
                f"Inception reads {found:.2%} of {len(held_out)} held-out digits rightly, after {session.clock} steps and {seconds:.0f} s"
            )


if __name__ == "__main__":
    main()
