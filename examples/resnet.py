"""Train a small ResNet to read handwritten digits, with any number of workers.

    headwater run -n 2 examples/resnet.py                       # a server and two workers
    headwater run -n 2 --consistency asp examples/resnet.py     # nobody waits for the other
    python examples/resnet.py                                   # one worker, the server inside its process

What Headwater adds to an ordinary training script, all in `train` and `run`: it connects, hands the model to the job's optimizer,
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
SMOOTHING = 0.1  # of labels: with few digits a network gets too sure of them (Szegedy et al. 2015b, section 7)


def convolution(before: int, after: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution of float32 (batch, channels, height, width), and what normalises its result."""
    layer = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after))


class Block(nn.Module):
    """Two convolutions, whose result is added to what came in; that is projected where shapes differ."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(convolution(before, after, stride=stride), nn.ReLU(), convolution(after, after))
        is_same = before == after and stride == 1
        self.shortcut = nn.Identity() if is_same else convolution(before, after, size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.residual(x) + self.shortcut(x))


class ResNet(nn.Sequential):
    """The ResNet for small images (He et al. 2015, section 4.2), of 6 · blocks + 2 layers.

    Three stages, each at half the resolution of the one before and with twice its channels; then the mean of each channel. From
    float32 (batch, 1, height, width) to logits, float32 (batch, classes).
    """

    def __init__(self, blocks: int = 1, width: int = 16, classes: int = CLASSES) -> None:
        layers: list[nn.Module] = [convolution(1, width), nn.ReLU()]
        before = width
        for after in (width, 2 * width, 4 * width):
            for _ in range(blocks):
                layers.append(Block(before, after, stride=1 if before == after else 2))
                before = after
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


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
        loss = functional.cross_entropy(model(images), labels, label_smoothing=SMOOTHING)
        loss.backward()
        set_rate(optimizer, rate * share_of_peak(session.clock, steps, warm_up=steps // 4))
        optimizer.step()  # push gradients, pull parameters
        optimizer.zero_grad()
        session.report(loss=loss.item())
        if session.index == 0 and session.clock % EVALUATE_EVERY == 0:
            found = digits.accuracy(model, held_out)
            session.report(held_out=found)
            print(f"step {session.clock}: loss {loss.item():.3f}, held-out accuracy {found:.1%}")


def run(network: type[nn.Module], arguments: Sequence[str] | None) -> None:
    """Make a network, train it as the arguments say, and tell how well it reads."""
    options = digits.parse_options(f"Train a small {network.__name__} on handwritten digits with Headwater.", arguments)
    training, held_out = digits.load(options.data)
    torch.manual_seed(options.seed)
    model = network()
    with hw.connect() as session:  # $HEADWATER_ADDRESS, or a server inside this process
        start = time.monotonic()
        train(session, model, training, held_out, options)
        if session.index == 0:
            found, seconds = digits.accuracy(model, held_out), time.monotonic() - start
            print(
                f"{network.__name__} reads {found:.2%} of {len(held_out)} held-out digits rightly, after {session.clock} steps "
                f"and {seconds:.0f} s"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    run(ResNet, arguments)


if __name__ == "__main__":
    main()
