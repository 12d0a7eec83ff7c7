"""Train a small Inception to read handwritten digits, with any number of workers.

    headwater run -n 2 examples/inception.py                       # a server and two workers
    headwater run -n 2 --consistency asp examples/inception.py     # nobody waits for the other
    python examples/inception.py                                   # one worker, the server inside its process

The network is here; it is trained as the ResNet beside it is, by `resnet.run`.
"""

from __future__ import annotations

from collections.abc import Sequence

import resnet
import torch
from mnist import CLASSES
from torch import Tensor, nn


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
    """GoogLeNet (Szegedy et al. 2014) up to its module 4a, with 1/`share` of its channels, and half of its dropout.

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
            nn.Dropout(0.2),
            nn.Linear(512 // share, classes),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    resnet.run(Inception, arguments)


if __name__ == "__main__":
    main()
