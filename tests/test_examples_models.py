"""The model examples: their data, that every family learns with two workers, and what they share."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import digits
import numpy as np
import pytest
import torch
from bert import CONTEXT, MASK, PAD, START, STOP, Bert, Reader, frame
from inception import Inception
from mnist import SIDE
from resnet import ResNet
from schedule import WARM_UP, share_of_peak
from test_examples_tables import number
from text import VOCABULARY, paragraphs_of_topics

EXAMPLES = Path(digits.__file__).parent


def run(example: str, *options: str, consistency: str = "bsp", environment: Mapping[str, str] | None = None) -> str:
    """Run an example with a server and two workers; returns what they print."""
    words = ["-m", "headwater", "run", "-n", "2", "--consistency", consistency, str(EXAMPLES / example), *options]
    done = subprocess.run(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | dict(environment or {}),
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def made_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 800 made digits in MNIST's format: a pattern of blots for each, the same but for noise."""
    chance = np.random.default_rng(0)
    patterns = chance.integers(0, 2, (10, 4, 4)).repeat(7, axis=1).repeat(7, axis=2).reshape(10, -1)
    labels = np.arange(800) % 10
    pixels = (200 * patterns[labels] + chance.integers(0, 55, (800, 28 * 28))).astype(int)
    path = tmp_path_factory.mktemp("digits") / "made.csv.gz"
    rows = "\n".join(",".join(map(str, [*row, label])) for row, label in zip(pixels, labels, strict=True))
    path.write_bytes(gzip.compress(rows.encode(), compresslevel=1))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("example", "consistency"), [("resnet", "bsp"), ("inception", "asp")])
def test_images_are_read_better_than_by_guessing(example: str, consistency: str, made_digits: Path) -> None:
    said = run(f"{example}.py", "--data", str(made_digits), "--epochs", "4", consistency=consistency)
    assert number(r"reads ([\d.]+)% of 160 held-out digits", said) > 50


@pytest.mark.slow
def test_images_are_read_with_keras(made_digits: Path) -> None:
    said = run("resnet_keras.py", "--data", str(made_digits), "--epochs", "4", environment={"KERAS_BACKEND": "torch"})
    assert number(r"reads ([\d.]+)% of 160 held-out digits", said) > 50


@pytest.mark.slow
@pytest.mark.parametrize("library", [[], ["--transformers"]], ids=["own", "transformers"])
def test_bert_goes_on_from_text_to_topics(library: list[str]) -> None:
    said = run("bert.py", "--epochs", "1", "1", "--batch", "16", *library)
    number(r"tells the topic of ([\d.]+)% of \d+ held-out paragraphs; the largest topic is [\d.]+% of them", said)


def test_a_rate_warms_up_and_stays_at_a_tenth_past_its_end() -> None:
    """A worker that is behind a phase's beginning, or past its end, as some are where nobody waits, has a rate all the same."""
    rates = [share_of_peak(step, 100) for step in range(-3, 110)]
    assert rates[: WARM_UP + 3] == sorted(rates[: WARM_UP + 3])
    assert 0.0 < rates[0] < max(rates) == 1.0
    assert rates[-10:] == pytest.approx([0.1] * 10)


def test_digits_are_split_once_and_for_all(made_digits: Path) -> None:
    training, held_out = digits.load(made_digits)
    assert (len(training), len(held_out)) == (640, 160)
    assert training[0][0].shape == held_out[0][0].shape == (1, SIDE, SIDE)
    assert abs(float(training.images[..., 1:-1, 1:-1].mean())) < 1e-5
    torch.testing.assert_close(digits.load(made_digits)[1].images, held_out.images)


def test_an_image_is_moved_by_a_pixel_at_most(made_digits: Path) -> None:
    training, held_out = digits.load(made_digits)
    moved, _ = training[0]
    windows = [training.images[0, :, i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)]
    assert any(torch.equal(moved, window) for window in windows)
    assert torch.equal(held_out[0][0], held_out.images[0])


def test_a_file_without_digits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "digits.csv").write_text("1,2,3\n")
    with pytest.raises(SystemExit, match="Expected rows of 784 pixels and a label"):
        digits.load(tmp_path / "digits.csv")


def test_networks_are_those_of_the_papers() -> None:
    """ResNet-20's count of parameters is the paper's 0.27 M; Inception 3a at full width gives the 256 channels of its table."""
    count = sum(p.numel() for name, p in ResNet(blocks=3).named_parameters() if "shortcut" not in name)
    assert round(count / 1e6, 2) == 0.27
    layers = Inception(share=1)
    found = [layer(torch.zeros(1, channels, 7, 7)).shape[1] for layer, channels in ((layers[3], 192), (layers[4], 256))]
    assert found == [256, 480]


def test_tokens_are_masked_as_in_the_paper() -> None:
    """Of 15 % of the text's tokens 80 % are masked, 10 % are others, 10 % stay; padding and frame are left alone."""

    class Seer(Bert):
        def forward(self, tokens: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
            self.seen = tokens
            return tokens[..., None].expand(*tokens.shape, 8).float()

        def guess(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    torch.manual_seed(0)
    tokens = torch.stack(
        [frame(torch.randint(VOCABULARY, (length,))) for length in torch.randint(5, 90, (2000,)).tolist()]
    )
    seer = Seer(8, CONTEXT, 32, 1)
    chosen, expected = Reader(seer, 8, 2).guess(tokens)
    is_text = tokens < VOCABULARY
    assert torch.equal(seer.seen[~is_text], tokens[~is_text])
    assert len(expected) / int(is_text.sum()) == pytest.approx(0.15, abs=0.01)
    assert float((chosen[:, 0] == MASK).float().mean()) == pytest.approx(0.8, abs=0.01)
    assert float((chosen[:, 0] == expected).float().mean()) == pytest.approx(0.1, abs=0.01)


def test_a_text_is_framed() -> None:
    assert frame(torch.tensor([7, 8])).tolist() == [START, 7, 8, STOP] + [PAD] * (CONTEXT - 4)
    assert len(frame(torch.arange(200))) == CONTEXT


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = Reader(Bert(VOCABULARY + 4, CONTEXT, 32, 1), 32, 2).eval()
    tokens = frame(torch.arange(10))[None]
    torch.testing.assert_close(model.classify(tokens), model.classify(tokens[:, :12]))


def test_no_paragraph_is_of_two_topics() -> None:
    paragraphs = [paragraph for paragraph, _ in paragraphs_of_topics(7)]
    assert len(paragraphs) == len(set(paragraphs)) > 500
