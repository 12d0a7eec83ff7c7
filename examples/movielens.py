"""MovieLens-100k for the examples: 100,000 ratings of 1,682 films by 943 people, with the films' genres, years and titles.

`load` reads the user's own copy, or fetches one: the data lies as plain files in a PyPI package of 2 MB, which is downloaded once and
never imported. The data is GroupLens'; its README says what it may be used for: https://grouplens.org/datasets/movielens/100k/.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from wheels import fetch

PACKAGE, VERSION = "recbole", "1.2.1"

#: GroupLens' genres in the order of the flags in u.item.
GENRES = (  # noqa: SIM905 - nineteen lines otherwise
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical Mystery "
    "Romance Sci-Fi Thriller War Western"
).split()


@dataclass(frozen=True)
class Film:
    title: str  # without the year
    year: int | None
    genres: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """The title's words, in small letters."""
        return re.findall(r"[^\W_]+(?:'[^\W_]+)?", self.title.lower())


@dataclass(frozen=True)
class Ratings:
    """Who rated what, how and when: four arrays of one length."""

    users: np.ndarray  # int64
    films: np.ndarray  # int64
    stars: np.ndarray  # float32, 1 to 5
    times: np.ndarray  # int64, seconds since 1970

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, chosen: np.ndarray | slice) -> Ratings:
        """Return some of the ratings. chosen: indices, a mask or a slice."""
        return Ratings(self.users[chosen], self.films[chosen], self.stars[chosen], self.times[chosen])

    def split(self, seed: int, held_out: float = 0.1) -> tuple[Ratings, Ratings]:
        """Return the ratings to learn from, shuffled, and those held out: this share of all, drawn at random."""
        order = np.random.default_rng(seed).permutation(len(self))
        cut = round(len(self) * held_out)
        return self[order[cut:]], self[order[:cut]]


def load(path: Path | None = None) -> tuple[Ratings, dict[int, Film]]:
    """Return the ratings, and the films by id.

    path: a folder or zip file with GroupLens' u.data and u.item, or with RecBole's ml-100k.inter and ml-100k.item; None: the cached copy,
    fetched the first time. Ends the program with a message where there is no data.
    """
    if path is None:
        advice = "pass --data FOLDER with MovieLens-100k's u.data and u.item"
        path = fetch(PACKAGE, VERSION, "MovieLens-100k (2 MB)", advice)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            texts = {Path(name).name: archive.read(name) for name in archive.namelist() if _is_data(name)}
    elif path.is_dir():
        texts = {file.name: file.read_bytes() for file in path.iterdir() if _is_data(file.name)}
    else:
        raise SystemExit(f"Expected a folder or zip file with MovieLens-100k, got {path}, which is neither.")
    try:
        if {"u.data", "u.item"} <= texts.keys():
            return _ratings(texts["u.data"].decode()), _grouplens_films(texts["u.item"].decode("latin-1"))
        if {"ml-100k.inter", "ml-100k.item"} <= texts.keys():
            _, _, rows = texts["ml-100k.inter"].decode().partition("\n")  # the first line names the columns
            return _ratings(rows), _recbole_films(texts["ml-100k.item"].decode())
    except ValueError as error:
        raise SystemExit(f"Expected MovieLens-100k in {path}, got files that cannot be read: {error}.") from error
    found = ", ".join(sorted(texts)) or "neither"
    raise SystemExit(f"Expected u.data and u.item, or ml-100k.inter and ml-100k.item, in {path}, got {found}.")


def _is_data(name: str) -> bool:
    return Path(name).name in ("u.data", "u.item", "ml-100k.inter", "ml-100k.item")


def _ratings(rows: str) -> Ratings:
    table = np.array(rows.split(), dtype=np.int64).reshape(-1, 4)
    users, films, stars, times = table.T.copy()
    return Ratings(users, films, stars.astype(np.float32), times)


def _grouplens_films(text: str) -> dict[int, Film]:
    films = {}
    for line in text.splitlines():
        number, title, _, _, _, *flags = line.split("|")
        genres = tuple(name for name, flag in zip(GENRES, flags, strict=True) if flag == "1")
        films[int(number)] = _film(title, "", genres)
    return films


def _recbole_films(text: str) -> dict[int, Film]:
    rows = (line.split("\t") for line in text.splitlines()[1:])
    return {int(number): _film(title, year, tuple(genres.split())) for number, title, year, genres in rows}


def _film(title: str, year: str, genres: tuple[str, ...]) -> Film:
    """Take the year out of the title where it stands there."""
    in_title = re.search(r" *\((\d{4})\)", title)
    if in_title:
        title, year = title.replace(in_title[0], ""), in_title[1]
    return Film(title, int(year) if year.isdigit() else None, genres)
