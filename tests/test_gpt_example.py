"""The example that newcomers read first: its parts, and that it trains, saves, resumes and writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gpt import BATCH, CONTEXT, GPT, loss_of, main, rotate, sample
from hypothesis import example, given, settings
from hypothesis import strategies as st
from schedule import WARM_UP, Run
from text import Tokenizer

import headwater as hw

TEXT = "The quick brown fox jumps over the lazy dog; the dog sleeps. " * 200
TOKENIZER = Tokenizer.learn(TEXT, size=352)


@settings(max_examples=30)
@given(st.text())
@example("\n \n\n  a\r\n b\n")
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    """Characters that were never seen while learning are spelled in bytes."""
    text = text.encode("utf-8", errors="ignore").decode()
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_learnt_pieces_make_text_shorter() -> None:
    assert len(TOKENIZER.encode(TEXT)) < len(TEXT) / 2


def test_workers_learn_the_same_pieces() -> None:
    assert Tokenizer.learn(TEXT, size=352).pieces == TOKENIZER.pieces


def test_a_text_too_poor_for_the_vocabulary_gives_fewer_pieces() -> None:
    assert Tokenizer.learn("aa").pieces[256:] == ["aa"]


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT(len(TOKENIZER.pieces), width=64, depth=2)


def test_no_position_sees_the_future() -> None:
    """What follows a token changes nothing in what the model says at the token."""
    model = make_model()
    tokens = torch.randint(256, (1, CONTEXT))
    changed = tokens.clone()
    changed[0, 40:] = torch.randint(256, (CONTEXT - 40,))
    torch.testing.assert_close(model(tokens)[:, :40], model(changed)[:, :40])
    assert not torch.equal(model(tokens)[:, 40:], model(changed)[:, 40:])


def test_attention_depends_on_distance_only() -> None:
    """Rotated vectors have the same product wherever they stand, given how far apart they are."""
    query, key = torch.randn(32), torch.randn(32)
    turned_query, turned_key = (rotate(v.expand(1, 1, 20, 32))[0, 0] for v in (query, key))
    torch.testing.assert_close(turned_query[15] @ turned_key[12], turned_query[5] @ turned_key[2])
    assert not torch.isclose(turned_query[15] @ turned_key[12], turned_query[15] @ turned_key[2])


def test_a_new_model_knows_nothing() -> None:
    """The first loss is that of guessing: the logarithm of the vocabulary."""
    tokens = torch.randint(len(TOKENIZER.pieces), (BATCH, CONTEXT + 1))
    expected = torch.tensor(len(TOKENIZER.pieces)).float().log()
    torch.testing.assert_close(loss_of(make_model(), tokens), expected, atol=0.1, rtol=0)


def test_a_sample_is_as_long_as_asked_and_the_same_again() -> None:
    model = make_model()
    first = sample(model, TOKENIZER, "The", 20, seed=1)
    assert first.startswith("The")
    assert len(first) == len("The") + 20
    assert sample(model, TOKENIZER, "The", 20, seed=1) == first
    assert sample(model, TOKENIZER, "The", 20, seed=2) != first


def test_example_trains_saves_resumes_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(TEXT)
    saved = str(tmp_path / "job")
    common = ["--small", "--text", str(tmp_path / "text")]
    main([*common, "--steps", "3", "--save", saved])
    assert "step 3: loss" in capsys.readouterr().out
    main([*common, "--steps", "2", "--resume", saved, "--save", saved])
    assert "step 5: loss" in capsys.readouterr().out
    main([*common, "--resume", saved, "--sample", "20"])
    assert len(capsys.readouterr().out) == len("The") + 20 + 1


def step_of_nothing(session: hw.Session) -> None:
    session.step({"w": np.zeros(1, np.float32)})


def test_whoever_joins_a_run_reads_its_end_and_rate() -> None:
    """A run in minutes has no end before it has been timed; then a joiner agrees with those who were there."""
    with hw.connect() as session:
        session.register({"w": np.zeros(1, np.float32)})
        run = Run(session, None, minutes=0.01)
        while not run.has_end:
            step_of_nothing(session)
            run.update()
            joined = Run(session, None, minutes=99)
            assert (joined.begin, joined.end, joined.rate) == (run.begin, run.end, run.rate)
        assert session.clock == WARM_UP // 2


def test_after_a_finished_run_another_begins() -> None:
    with hw.connect() as session:
        session.register({"w": np.zeros(1, np.float32)})
        run = Run(session, 3, minutes=1)
        while not run.is_over:
            step_of_nothing(session)
        again = Run(session, 4, minutes=1)
        assert (run.begin, run.end, again.begin, again.end) == (0, 3, 3, 7)


def test_rate_warms_up_and_ends_at_a_tenth() -> None:
    with hw.connect() as session:
        session.register({"w": np.zeros(1, np.float32)})
        run = Run(session, 2 * WARM_UP, minutes=1)
        rates = []
        while not run.is_over:
            rates.append(run.rate)
            step_of_nothing(session)
        assert rates == sorted(rates[:WARM_UP]) + sorted(rates[WARM_UP:], reverse=True)
        assert max(rates) == pytest.approx(1.0)
        assert run.rate == pytest.approx(0.1)


def test_example_trains_the_model_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tied matrix goes to the servers once."""
    (tmp_path / "text").write_text(TEXT)
    main(["--small", "--transformers", "--text", str(tmp_path / "text"), "--steps", "2"])
    assert "step 2: loss" in capsys.readouterr().out
