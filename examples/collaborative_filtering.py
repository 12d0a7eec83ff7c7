"""Learn from 90,000 ratings who likes which film, and foresee 10,000 others.

    headwater run -n 2 examples/collaborative_filtering.py                       # a server and two workers
    headwater run -n 2 examples/collaborative_filtering.py --model two-tower
    python examples/collaborative_filtering.py                                   # one worker, the server inside its process

People and films are rows of two embedding tables that the job's servers hold: a row exists once it was first trained, so there is no
vocabulary and no size to choose. A lookup pulls rows; `loss.backward()` pushes their gradients.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from movielens import Film, Ratings, load
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import headwater as hw

WIDTH = 32  # of what is learnt about a person or a film; their rows hold a bias too
GENRE_WIDTH = 16
NEAR_ZERO = hw.Uniform(0.05)
SHRINK_BIASES, SHRINK_TASTES = 0.005, 0.1  # how strongly the loss pulls towards zero what few ratings have taught


class Factorisation(nn.Module):
    """Biased matrix factorisation (Koren et al., 2009): mean + generosity of the user + quality of the film + their affinity."""

    def __init__(self, session: hw.Session, mean: float, options: argparse.Namespace) -> None:
        super().__init__()
        self._session, self._options = session, options
        self.users, self.films = (hw.torch.Embedding(self.table(name, 1 + WIDTH)) for name in ("users", "films"))
        self.mean = nn.Parameter(torch.tensor(mean))

    def table(self, name: str, width: int) -> hw.Table:
        optimizer = hw.optim.Adagrad(lr=self._options.rate)
        alone = hw.asp() if self._options.consistency == "mixed" else None  # None: as the job
        return self._session.table(
            name, dim=width, optimizer=optimizer, initial=NEAR_ZERO, seed=self._options.seed, consistency=alone
        )

    def tastes(self, user: Tensor, film: Tensor, films: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is multiplied: float32 (batch, WIDTH) for the users and for the films, whose ids are int64 (batch,)."""
        return user, film

    def forward(self, users: Tensor, films: Tensor) -> tuple[Tensor, Tensor]:
        """Return ratings, float32 (batch,), and the penalty that is part of the loss. users, films: int64 (batch,)."""
        user_bias, user = self.users(users).split([1, WIDTH], dim=1)
        film_bias, film = self.films(films).split([1, WIDTH], dim=1)
        user, film = self.tastes(user, film, films)
        ratings = self.mean + (user_bias + film_bias).squeeze(1) + (user * film).sum(1)
        biases, tastes = user_bias.square() + film_bias.square(), user.square() + film.square()
        return ratings, SHRINK_BIASES * biases.sum(1).mean() + SHRINK_TASTES * tastes.sum(1).mean()


class TwoTower(Factorisation):
    """A small network on either side; that of the films sees their genres too."""

    def __init__(
        self, session: hw.Session, mean: float, options: argparse.Namespace, catalogue: dict[int, Film]
    ) -> None:
        super().__init__(session, mean, options)
        self.genres = hw.torch.EmbeddingBag(self.table("genres", GENRE_WIDTH), mode="mean")
        self.user_tower, self.film_tower = self._tower(WIDTH), self._tower(WIDTH + GENRE_WIDTH)
        self._genres_of = {i: torch.from_numpy(hw.hash_ids(film.genres)) for i, film in catalogue.items()}

    @staticmethod
    def _tower(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def tastes(self, user: Tensor, film: Tensor, films: Tensor) -> tuple[Tensor, Tensor]:
        genres = [self._genres_of[i] for i in films.tolist()]
        offsets = torch.tensor([0, *(len(some) for some in genres[:-1])]).cumsum(0)
        seen = torch.cat([film, self.genres(torch.cat(genres), offsets)], dim=1)
        return user + self.user_tower(user), film + self.film_tower(seen)


def batches(ratings: Ratings, size: int, seed: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield users, films and stars in an order of chance."""
    order = np.random.default_rng(seed).permutation(len(ratings))
    for start in range(0, len(order), size):
        some = ratings[order[start : start + size]]
        yield torch.from_numpy(some.users), torch.from_numpy(some.films), torch.from_numpy(some.stars)


def train(
    session: hw.Session, model: Factorisation, ratings: Ratings, held_out: Ratings, options: argparse.Namespace
) -> None:
    """Make this worker's part of the epochs; worker 0 looks after each how well the held-out ratings are foreseen."""
    optimizer = hw.torch.Optimizer(model, hw.optim.Adam(lr=3e-3), session=session)  # for what is no table
    part = ratings[np.array(session.shard(range(len(ratings))))]
    start = time.perf_counter()
    for epoch in range(options.epochs):
        losses = []
        for users, films, stars in batches(part, options.batch, (options.seed, session.index, epoch)):
            foreseen, penalty = model(users, films)
            loss = mse_loss(foreseen, stars) + penalty
            loss.backward()  # pushes the rows' gradients
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            session.report(loss=losses[-1])
        if session.index == 0:
            rmse, mean = evaluate(model, held_out), sum(losses) / len(losses)
            session.report(held_out_rmse=rmse)
            seconds = time.perf_counter() - start
            print(f"epoch {epoch + 1}: loss {mean:.4f}, held-out RMSE {rmse:.4f}, {seconds:.2f} s", flush=True)


@torch.no_grad()
def evaluate(model: Factorisation, ratings: Ratings) -> float:
    """Return the root of the mean squared error in stars."""
    foreseen, _ = model(torch.from_numpy(ratings.users), torch.from_numpy(ratings.films))
    return rmse_of(foreseen.numpy(), ratings)


def rmse_of(foreseen: np.ndarray, ratings: Ratings) -> float:
    return math.sqrt(np.square(foreseen.clip(1, 5) - ratings.stars).mean())


def bias_only(ratings: Ratings, held_out: Ratings, shrink: float = 5.0, rounds: int = 10) -> float:
    """Return the RMSE of mean + user's bias + film's bias, fitted in turn by ridge regression: what any model has to beat."""
    mean = ratings.stars.mean()
    sides = [(ratings.users, held_out.users), (ratings.films, held_out.films)]
    biases = [np.zeros(1 + max(known.max(), new.max())) for known, new in sides]
    for i in [1, 0] * rounds:
        ids, others = sides[i][0], sides[1 - i][0]
        rest = ratings.stars - mean - biases[1 - i][others]
        biases[i] = np.bincount(ids, rest, len(biases[i])) / (shrink + np.bincount(ids, minlength=len(biases[i])))
    return rmse_of(mean + sum(bias[new] for bias, (_, new) in zip(biases, sides, strict=True)), held_out)


def wait_for_others(session: hw.Session) -> None:
    """Wait until no live worker has fewer steps behind it: outside BSP they need not end together."""
    while any(worker.live and worker.clock < session.clock for worker in session.stats().workers):
        time.sleep(0.05)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Foresee how people rate films they have not rated, with Headwater.")
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="your own MovieLens-100k; default: fetched once by pip"
    )
    parser.add_argument("--model", choices=["factorisation", "two-tower"], default="factorisation")
    parser.add_argument(
        "--consistency",
        default="asp",
        help="bsp, ssp:STALENESS, asp (default), or mixed: asp for tables, bsp for the rest; not to be given to headwater run too",
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2000, help="ratings per worker and step; default 2000")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of the tables' Adagrad; default 0.1")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out ratings and of all else that is random")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.manual_seed(options.seed)
    everything, catalogue = load(options.data)
    ratings, held_out = everything.split(options.seed)
    job = hw.Consistency.parse("bsp" if options.consistency == "mixed" else options.consistency)
    with hw.connect(consistency=job) as session:  # $HEADWATER_ADDRESS, or a server inside this process
        mean = float(ratings.stars.mean())
        if options.model == "two-tower":
            model: Factorisation = TwoTower(session, mean, options, catalogue)
        else:
            model = Factorisation(session, mean, options)
        train(session, model, ratings, held_out, options)
        if session.index == 0:
            wait_for_others(session)
            ours, baseline = evaluate(model, held_out), bias_only(ratings, held_out)
            print(f"held-out RMSE {ours:.4f}; with biases only {baseline:.4f}: {baseline - ours:.4f} lower")


if __name__ == "__main__":
    main()
