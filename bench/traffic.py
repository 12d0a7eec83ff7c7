"""Batches of ids as recommenders look them up: 26 features of 4,096 samples, each id equally likely or a few of them very."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import numpy as np

BATCH = 26 * 4096
DIM = 16
KINDS = ("uniform", "zipf")
ZIPF = 1.05
BATCHES = 64  # so many that their rows do not stay in the caches
FILL = 100_000  # few enough for a table that holds a small part of its rows in memory


def batches(kind: str, rows: int, seed: int) -> list[np.ndarray]:
    """Return BATCHES int64 arrays of BATCH ids below `rows`. zipf: P(rank) ∝ rank^−1.05, the ranks strewn over all ids."""
    chance = np.random.default_rng(seed)
    if kind == "uniform":
        return [chance.integers(rows, size=BATCH) for _ in range(BATCHES)]
    sums = np.cumsum(np.arange(1.0, rows + 1) ** -ZIPF)
    return [_strewn(np.searchsorted(sums, chance.random(BATCH) * sums[-1]), rows) for _ in range(BATCHES)]


def distinct_beyond(rows: int, hottest: int) -> float:
    """Return how many ids of a Zipf batch, each counted once, are not among so many of the hottest: the expected number."""
    shares = np.arange(1.0, rows + 1) ** -ZIPF
    shares /= shares.sum()
    return float(-np.expm1(BATCH * np.log1p(-shares[hottest:])).sum())


def _strewn(ranks: np.ndarray, rows: int) -> np.ndarray:
    """Map ranks to ids one to one: else the rows of ids that are often looked up together would be neighbours."""
    factor = next(f for f in range(int(rows * 0.618), rows + 2) if np.gcd(f, rows) == 1)
    return ranks * factor % rows


def fill_batches(rows: int) -> Iterator[np.ndarray]:
    """Yield ids 0 … rows − 1, many at once."""
    for start in range(0, rows, FILL):
        yield np.arange(start, min(start + FILL, rows))


def gradients(count: int, seed: int) -> np.ndarray:
    """Return small gradients, float32 (count, DIM)."""
    return np.random.default_rng(seed).normal(0, 1e-3, (count, DIM)).astype(np.float32)


def lookups(rows: int, count: int) -> Iterator[np.ndarray]:
    """Yield for ever the ids of one lookup, each equally likely; they return after a million, which is more than caches hold."""
    ids = np.random.default_rng(count).integers(rows, size=(1_000_000 // count, count))
    return cycle(list(ids))
