"""The recommender examples: their data, and that they learn, with two workers, on made ratings in MovieLens' own format."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import movielens
import numpy as np
import pytest
import wheels
from movielens import GENRES, Film, load

EXAMPLES = Path(movielens.__file__).parent
PEOPLE, FILMS, RATED = 150, 200, 60  # films that each person has rated


def write_grouplens(folder: Path, seed: int = 0) -> None:
    """Write ratings that follow from genres, which people like to different degrees, and from how good film and year are."""
    chance = np.random.default_rng(seed)
    genre, second = chance.integers(1, 9, FILMS), chance.integers(9, 19, FILMS)
    years = chance.integers(1930, 1998, FILMS)
    quality = 0.02 * (1964 - years) + chance.normal(0, 0.3, FILMS)
    likes = chance.normal(0, 0.9, (PEOPLE, len(GENRES)))
    generosity = chance.normal(0, 0.4, PEOPLE)
    rows = []
    for user in range(PEOPLE):
        films = chance.choice(FILMS, RATED, replace=False)
        stars = 3.4 + generosity[user] + quality[films] + likes[user, genre[films]] + chance.normal(0, 0.3, RATED)
        rows += [
            f"{user + 1}\t{film + 1}\t{star:.0f}\t881250949" for film, star in zip(films, stars.clip(1, 5), strict=True)
        ]
    (folder / "u.data").write_text("\n".join(rows) + "\n")
    flags = [["1" if i in (genre[film], second[film]) else "0" for i in range(len(GENRES))] for film in range(FILMS)]
    lines = [
        f"{film + 1}|Film {film + 1}, Thé ({years[film]})|01-Jan-1995|||" + "|".join(flags[film])
        for film in range(FILMS)
    ]
    (folder / "u.item").write_text("\n".join(lines) + "\n", encoding="latin-1")


def run(example: str, folder: Path, *options: str) -> str:
    """Run an example with a server and two workers; returns what they print."""
    command = [
        sys.executable,
        "-m",
        "headwater",
        "run",
        "-n",
        "2",
        str(EXAMPLES / example),
        "--data",
        str(folder),
        *options,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in {text}"
    return float(found[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [("--consistency", "asp"), ("--consistency", "mixed", "--model", "two-tower")],
    ids=["factorisation-asp", "two-tower-mixed"],
)
def test_collaborative_filtering_foresees_better_than_biases(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Biases cannot know who likes which genre; a model that has learnt nothing beyond them fails."""
    write_grouplens(tmp_path)
    said = run("collaborative_filtering.py", tmp_path, "--epochs", "12", "--batch", "500", *options)
    assert number(r": (-?[\d.]+) lower", said) > 0.1


@pytest.mark.slow
def test_content_based_foresees_films_without_a_rating(tmp_path: Path) -> None:
    write_grouplens(tmp_path)
    said = run("content_based.py", tmp_path, "--epochs", "10", "--batch", "500")
    assert number(r"interval (-?[\d.]+)%", said) > 15
    assert len(re.findall(r"user \d+ gives \d\.\d, gave \d", said)) == 5


def test_ratings_and_films_are_read_from_a_folder_of_grouplens(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n186\t302\t5\t891717742\n")
    flags = "|".join("1" if genre in ("Comedy", "Drama") else "0" for genre in GENRES)
    (tmp_path / "u.item").write_bytes(
        f"242|Misérables, Les (1995)|x|||{flags}\n302|unknown||||{flags}\n".encode("latin-1")
    )
    ratings, films = load(tmp_path)
    assert films == {
        242: Film("Misérables, Les", 1995, ("Comedy", "Drama")),
        302: Film("unknown", None, ("Comedy", "Drama")),
    }
    assert films[242].words == ["misérables", "les"]
    assert (ratings.users.tolist(), ratings.films.tolist(), ratings.stars.tolist()) == (
        [196, 186],
        [242, 302],
        [3.0, 5.0],
    )
    assert ratings.times.tolist() == [881250949, 891717742]


def test_ratings_and_films_are_read_from_a_zip_file_of_recbole(tmp_path: Path) -> None:
    """The wheel is one: nothing of it is unpacked or imported."""
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(
            "x/ml-100k.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t9\n"
        )
        archive.writestr(
            "x/ml-100k.item", "item_id:token\tmovie_title\tyear\tclass\n242\tI'll Do (1995)\tV\tWar Drama\n"
        )
    ratings, films = load(tmp_path / "a.whl")
    assert films == {242: Film("I'll Do", 1995, ("War", "Drama"))}
    assert films[242].words == ["i'll", "do"]
    assert len(ratings) == 1


def test_held_out_ratings_are_the_same_for_a_seed_and_no_rating_is_in_both(tmp_path: Path) -> None:
    write_grouplens(tmp_path)
    ratings, _ = load(tmp_path)
    keys = [{*zip(some.users.tolist(), some.films.tolist(), strict=True)} for some in ratings.split(seed=3)]
    assert [len(some) for some in keys] == [PEOPLE * RATED * 9 // 10, PEOPLE * RATED // 10]
    assert not keys[0] & keys[1]
    np.testing.assert_array_equal(ratings.split(seed=3)[1].films, ratings.split(seed=3)[1].films)
    assert (ratings.split(seed=3)[1].films != ratings.split(seed=4)[1].films).any()


def test_a_path_without_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"Expected u\.data and u\.item.*got neither"):
        load(tmp_path)
    with pytest.raises(SystemExit, match=r"got .*missing, which is neither"):
        load(tmp_path / "missing")
    (tmp_path / "u.data").write_text("a\tb\tc\td\n")
    (tmp_path / "u.item").write_text("")
    with pytest.raises(SystemExit, match="files that cannot be read"):
        load(tmp_path)


def test_without_a_package_index_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        SystemExit, match=f"(?s)No matching distribution.*put recbole-.*whl into {tmp_path}, or pass --data"
    ):
        load()
    assert list(tmp_path.iterdir()) == []
