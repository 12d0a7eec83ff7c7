"""Foresee how people rate films that nobody has rated yet, from genres, year and title.

    headwater run -n 2 examples/content_based.py       # a server and two workers
    python examples/content_based.py                   # one worker, the server inside its process

A fifth of the films is held out with all their ratings. A film is described by words such as "genre Drama", "before 1960" and
"title star"; `hw.hash_ids` makes ids of them, with no vocabulary to keep, and an EmbeddingBag sums their rows of one table. A
person has a row of tastes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from movielens import Film, Ratings, load
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import headwater as hw

WIDTH = 16  # tastes of a person; a row holds a bias too
YEARS = 1950, 1960, 1970, 1980, 1985, 1990, 1993, 1995, 1996, 1997  # an old film is before many of them
FILMS_PER_WORD = 5  # a title word must stand in so many films to say anything about another one
TITLE_WEIGHT = 0.3  # title words say less than genres
SHRINK_GENEROSITY, SHRINK_QUALITY, SHRINK_TASTES = 0.02, 0.1, 0.1
BOOTSTRAPS = 2000
SHOWN = 5


def describe(films: dict[int, Film], learnt: set[int]) -> dict[int, list[str]]:
    """Return what is known of each film. learnt: films whose titles decide which words are common."""
    common = Counter(word for i in sorted(learnt) for word in set(films[i].words))
    found = {}
    for i, film in films.items():
        words = [f"genre {genre}" for genre in film.genres]
        if film.year is not None:
            words += [f"decade {film.year // 10}", *(f"before {year}" for year in YEARS if film.year < year)]
        found[i] = words + [f"title {word}" for word in film.words if common[word] >= FILMS_PER_WORD]
    return found


class Catalogue:
    """The films' descriptions as ids with weights, one film after another."""

    def __init__(self, descriptions: dict[int, list[str]]) -> None:
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        for i, words in descriptions.items():
            weights = torch.tensor([TITLE_WEIGHT if word.startswith("title ") else 1.0 for word in words])
            self._rows[i] = torch.from_numpy(hw.hash_ids(words)), weights / math.sqrt(max(1, len(words)))

    def bags(self, films: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, offsets and weights of a batch, as an EmbeddingBag takes them. films: int64 (batch,)."""
        rows = [self._rows[i] for i in films.tolist()]
        offsets = torch.tensor([0, *(len(ids) for ids, _ in rows[:-1])]).cumsum(0)
        return torch.cat([ids for ids, _ in rows]), offsets, torch.cat([weights for _, weights in rows])


class ContentBased(nn.Module):
    """Mean + generosity of the person + quality and affinity, of which a film's description tells."""

    def __init__(self, session: hw.Session, mean: float, catalogue: Catalogue, options: argparse.Namespace) -> None:
        super().__init__()

        def table(name: str) -> hw.Table:
            optimizer = hw.optim.Adagrad(lr=options.rate)
            return session.table(name, dim=1 + WIDTH, optimizer=optimizer, initial=hw.Uniform(0.05), seed=options.seed)

        self.people = hw.torch.Embedding(table("people"))
        self.content = hw.torch.EmbeddingBag(table("content"), mode="sum")
        self.mean = nn.Parameter(torch.tensor(mean))
        self._catalogue = catalogue

    def forward(self, people: Tensor, films: Tensor) -> tuple[Tensor, Tensor]:
        """Return ratings, float32 (batch,), and the penalty that is part of the loss. people, films: int64 (batch,)."""
        ids, offsets, weights = self._catalogue.bags(films)
        generosity, tastes = self.people(people).split([1, WIDTH], dim=1)
        quality, content = self.content(ids, offsets, per_sample_weights=weights).split([1, WIDTH], dim=1)
        ratings = self.mean + (generosity + quality).squeeze(1) + (tastes * content).sum(1)
        shrunk = SHRINK_GENEROSITY * generosity.square() + SHRINK_QUALITY * quality.square()
        return ratings, (shrunk.sum(1) + SHRINK_TASTES * (tastes.square() + content.square()).sum(1)).mean()

    @torch.no_grad()
    def foresee(self, people: np.ndarray, films: np.ndarray) -> np.ndarray:
        """Return float32 (n,) in stars."""
        stars, _ = self(torch.from_numpy(people), torch.from_numpy(films))
        found: np.ndarray = stars.clamp(1, 5).numpy()
        return found


def train(session: hw.Session, model: ContentBased, ratings: Ratings, options: argparse.Namespace) -> None:
    """Make this worker's part of the epochs."""
    optimizer = hw.torch.Optimizer(model, hw.optim.Adam(lr=3e-3), session=session)  # for what is no table
    part = ratings[np.array(session.shard(range(len(ratings))))]
    people, films, stars = (torch.from_numpy(array) for array in (part.users, part.films, part.stars))
    chance = torch.Generator().manual_seed(options.seed * 1000 + session.index)
    for epoch in range(options.epochs):
        losses = []
        for some in torch.randperm(len(part), generator=chance).split(options.batch):
            foreseen, penalty = model(people[some], films[some])
            loss = mse_loss(foreseen, stars[some]) + penalty
            loss.backward()  # pushes the rows' gradients
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            session.report(loss=losses[-1])
        if session.index == 0:
            print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}", flush=True)


def means_of_users(ratings: Ratings, people: np.ndarray) -> np.ndarray:
    """Return each person's mean rating, or everybody's for one who has rated nothing: what the model has to beat."""
    size = 1 + max(ratings.users.max(), people.max())
    counts, sums = np.bincount(ratings.users, minlength=size), np.bincount(ratings.users, ratings.stars, size)
    means: np.ndarray = np.where(counts > 0, sums / np.maximum(counts, 1), ratings.stars.mean())[people]
    return means


def compare(
    held_out: Ratings, ours: np.ndarray, theirs: np.ndarray, seed: int
) -> tuple[float, float, float, float, float]:
    """Return both RMSEs, and by which share ours is lower, with the ends of its 95 % interval.

    The interval is of a bootstrap over films, since ratings of one film err together.
    """
    _, film = np.unique(held_out.films, return_inverse=True)
    counts = np.bincount(film)
    squares = np.array([np.bincount(film, np.square(p - held_out.stars)) for p in (ours, theirs)])
    draws = np.random.default_rng(seed).integers(len(counts), size=(BOOTSTRAPS, len(counts)))
    mine, other = np.sqrt(squares[:, draws].sum(2) / counts[draws].sum(1))
    low, high = np.percentile(1 - mine / other, [2.5, 97.5])
    rmse_ours, rmse_theirs = np.sqrt(squares.sum(1) / counts.sum())
    return rmse_ours, rmse_theirs, 1 - rmse_ours / rmse_theirs, low, high


def wait_for_others(session: hw.Session) -> None:
    """Wait until no live worker has fewer steps behind it: outside BSP they need not end together."""
    while any(worker.live and worker.clock < session.clock for worker in session.stats().workers):
        time.sleep(0.05)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Foresee ratings of films that nobody has rated yet, with Headwater.")
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="your own MovieLens-100k; default: fetched once by pip"
    )
    parser.add_argument(
        "--consistency",
        default="asp",
        help="bsp, ssp:STALENESS or asp (default); not to be given to headwater run too",
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2000, help="ratings per worker and step; default 2000")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of the tables' Adagrad; default 0.1")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out films and of all else that is random")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.manual_seed(options.seed)
    everything, films = load(options.data)
    titles = sorted({film.title for film in films.values()})  # some films are listed twice
    order = np.random.default_rng(options.seed).permutation(len(titles))
    new = {titles[i] for i in order[: len(titles) // 5]}
    is_new = np.array([films[i].title in new for i in everything.films.tolist()])
    ratings, held_out = everything[~is_new], everything[is_new]
    catalogue = Catalogue(describe(films, set(ratings.films.tolist())))
    with hw.connect(consistency=hw.Consistency.parse(options.consistency)) as session:
        model = ContentBased(session, float(ratings.stars.mean()), catalogue, options)
        train(session, model, ratings, options)
        if session.index > 0:
            return
        wait_for_others(session)
        foreseen = model.foresee(held_out.users, held_out.films)
    ours, theirs, share, low, high = compare(held_out, foreseen, means_of_users(ratings, held_out.users), options.seed)
    interval = f"95 % interval {low:.2%} to {high:.2%}"
    print(f"films without a rating: RMSE {ours:.4f}; with the user's mean {theirs:.4f}: {share:.2%} lower, {interval}")
    for i in np.random.default_rng(options.seed).choice(len(held_out), min(SHOWN, len(held_out)), replace=False):
        film = films[int(held_out.films[i])]
        print(
            f"  {film.title} ({film.year}; {', '.join(film.genres)}): user {held_out.users[i]} "
            f"gives {foreseen[i]:.1f}, gave {held_out.stars[i]:.0f}"
        )


if __name__ == "__main__":
    main()
